"""The Transformer as a captured program of CPU kernels: the same model as ``nn.transformer``, op by op.

    ModelConfig + packed parameters --build--> Program --run(PassBatch)--> PassResult

What ``Transformer`` computes in torch's modules, this computes in ``kernels/cpu`` over a paged cache; the tests hold
the two to each other for every family. Nothing here branches on the family either.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from hashlib import blake2b
from math import prod

import numpy as np
from numpy.typing import NDArray

from quadriga import __version__
from quadriga.errors import ConfigError, RequestError
from quadriga.kernels.cpu.expert_store import ExpertStore
from quadriga.kernels.cpu.library import library_path
from quadriga.kernels.cpu.packing import Packed, Parameter, allocate, pack
from quadriga.kernels.cpu.program import Meeting, Program
from quadriga.kernels.cpu.sampling import Logits, RowSampler, TokenSampler
from quadriga.kernels.pass_batch import PassBatch
from quadriga.model.cache_layout import CacheLayout, one_group
from quadriga.model.config import (
    AttentionSpec,
    DeltaNetSpec,
    KVState,
    LatentState,
    LayerSpec,
    Mamba2Spec,
    ModelConfig,
    NoMixer,
    ShortConvSpec,
)
from quadriga.model.rank_share import RankShare
from quadriga.model.weight_map import parameter_shapes, stays_float32
from quadriga.quant.dtypes import Array, as_float32
from quadriga.quant.packed import KV_FORMATS, kv_block_bytes, latent_block_bytes
from quadriga.runners.base import Adapters, Floats, LayerRouting, PassResult
from quadriga.runners.compiled_layers import Layers
from quadriga.runners.steered import joined, parts_of

ACTIVATIONS = ("auto", "int8", "int16")

MAX_TOKENS = 2048
"""Tokens of one pass: bounds the activations of a long prompt; more is not faster."""


_LOOKS, _LOOK_BYTES = 64, 4096
"""What :meth:`CompiledModel.identity` reads of a matrix: so many pieces of so many bytes."""


def pack_parameters(parameters: Mapping[str, Array], form: str) -> dict[str, Parameter]:
    """All matrices of a model in one packed format, routers, biases and vectors in float32: tests and benchmarks.

    Args:
        parameters: named and shaped as ``parameter_shapes``.
        form: a name of ``quant.packed.PACKED``.
    """
    packed: dict[str, Parameter] = {}
    for name, values in parameters.items():
        if values.ndim == 1:
            packed[name] = as_float32(values)
        elif values.ndim == 2:
            packed[name] = pack(np.ascontiguousarray(values), "float32" if stays_float32(name) else form)
        else:
            packed[name] = [pack(np.ascontiguousarray(expert), form) for expert in values]
    return packed


def layer_block_bytes(layer: LayerSpec, kv_format: str) -> int:
    """Bytes of one cache block of 16 positions in a layer; 0 where it keeps nothing of them."""
    state = layer.mixer.state
    if isinstance(state, LatentState):
        return latent_block_bytes(kv_format, state.rank, state.rope_dim)
    return kv_block_bytes(kv_format, state.n_kv_heads, state.head_dim) if isinstance(state, KVState) else 0


def place_bytes(config: ModelConfig, cache: CacheLayout, kv_format: str) -> list[int]:
    """Bytes of each place in a block: of the layer that keeps most among those that use it."""
    return [max(layer_block_bytes(config.layers[layer], kv_format) for layer in layers) for layers in cache.slot_layers]


def distribution(logits: Floats, score: str) -> Floats:
    """Over the last axis: the softmax, or sigmoid scores divided by their sum."""
    if score == "sigmoid":
        scores = 1 / (1 + np.exp(-np.maximum(logits, -80)))
        return np.asarray(scores / scores.sum(-1, keepdims=True), dtype=np.float32)
    risen = np.exp(logits - logits.max(-1, keepdims=True))
    out: Floats = risen / risen.sum(-1, keepdims=True)
    return out


class CompiledModel:
    """A model ready to run on the CPU's kernels, with its key/value cache.

    Args:
        config: what the model is.
        parameters: see ``Parameter``; named as in ``parameter_shapes``. They are used where they lie.
        threads: computing threads.
        n_blocks: KV blocks of 16 tokens.
        cache: how layers share them; None: a block has room for all layers.
        n_slots: places for the states of recurrent layers; None: as many as blocks.
        kv_format: float32, bfloat16 or q8.
        activations: what quantised matrices are multiplied with: int8, int16, or auto: int16 for models of fewer than
            a billion parameters, which are sensitive (SmolLM2's perplexity: 23.67 and 23.73) and quick anyway.
        max_tokens: most tokens of one pass.
        isa: an instruction set instead of the one in force (tests).
        store: where the experts are, if they stay on disk.
        share: what of a model this is, whose ``config`` and ``cache`` are given; None: it is whole.
        meeting: the ranks that have the other parts of these layers; None: there are none.

    Raises:
        ConfigError: an unknown kv_format.
    """

    def __init__(
        self,
        config: ModelConfig,
        parameters: Mapping[str, Parameter],
        *,
        threads: int,
        n_blocks: int,
        cache: CacheLayout | None = None,
        n_slots: int | None = None,
        kv_format: str = "bfloat16",
        activations: str = "auto",
        max_tokens: int = MAX_TOKENS,
        isa: str | None = None,
        store: ExpertStore | None = None,
        share: RankShare | None = None,
        meeting: Meeting | None = None,
    ) -> None:
        if kv_format not in KV_FORMATS:
            raise ConfigError(f"the cache's format must be one of {', '.join(KV_FORMATS)}; got {kv_format!r}")
        self.config, self.n_blocks, self.kv_format = config, n_blocks, kv_format
        if activations not in ACTIVATIONS:
            raise ConfigError(f"activations must be one of {', '.join(ACTIVATIONS)}; got {activations!r}")
        self._share, whole = share, config if share is None else share.whole
        small = sum(prod(shape) for shape in parameter_shapes(whole).values()) < 1e9
        rows = (0, config.vocab_size) if share is None else share.head_rows
        self.program = Program(
            d_model=config.d_model,
            vocab_size=rows[1] - rows[0],
            max_tokens=max_tokens,
            threads=threads,
            int16=activations == "int16" or (activations == "auto" and small),
            isa=isa,
            n_groups=1 if cache is None else cache.n_groups,
            meeting=meeting,
        )
        self.parameters, self.store, self.can_steer = parameters, store, True
        self.row_sampler: TokenSampler | None = RowSampler(self.program.context)
        self._multiplied = (activations, small)  # what decides how quantised matrices are multiplied
        self.cache = cache or one_group(config.n_layers)
        shares = place_bytes(config, self.cache, kv_format)
        # A block of all layers, then the next: what is written lies together, in few of the huge pages.
        self._kv = allocate(n_blocks * sum(shares)).reshape(n_blocks, sum(shares))
        self.kv_bytes = self._kv.nbytes
        self.n_slots = (n_slots or n_blocks) if config.is_recurrent else 0
        self._states: dict[int, Floats] = {}
        for i, spec in enumerate(config.layers):
            if numbers := spec.mixer.state.numbers_per_sequence:
                self._states[i] = allocate(self.n_slots * numbers * 4).view(np.float32).reshape(self.n_slots, numbers)
        self.state_bytes = sum(state.nbytes for state in self._states.values())
        self._layers = Layers(
            config=config,
            parameters=parameters,
            cache=self.cache,
            kv=np.split(self._kv, np.cumsum(shares)[:-1], axis=1),
            kv_format=kv_format,
            states=self._states,
            store=store,
            share=share,
        )
        self._capture()

    def _capture(self) -> None:
        """The layers as ops, in their order."""
        config, share, layers = self.config, self._share, self._layers
        if share is None or share.place.first:
            self.program.embed(layers.packed("embed.weight"), config.embedding_scale)
        for layer in range(config.n_layers):
            match config.layers[layer].mixer:
                case AttentionSpec() as attention:
                    self.program.attention(layers.attention(layer, attention))
                case ShortConvSpec():
                    self.program.short_conv(layers.short_conv(layer))
                case DeltaNetSpec() as delta:
                    self.program.delta_net(layers.delta_net(layer, delta))
                case Mamba2Spec() as mamba:
                    self.program.mamba2(layers.mamba2(layer, mamba))
                case NoMixer():
                    pass
            if config.layers[layer].feeds:
                self.program.ffn(layers.ffn(layer))
        if share is None or share.place.last:
            head = layers.packed("embed.weight" if config.tied_embeddings else "lm_head.weight")
            bias = layers.vector("lm_head.bias") if config.head_bias else None
            norm = layers.norm("final_norm.weight", config.final_norm)
            self.program.head(norm, head, config.logit_scale, bias, config.logit_cap)

    @property
    def adapter_names(self) -> list[str]:
        """There are none."""
        return []

    def adapters(self) -> Adapters:
        """See :class:`Runner`.

        Raises:
            RequestError: always; the CPU's kernels know no adapters.
        """
        raise RequestError(
            "adapters chosen per request run on plain torch: load the model with a dtype, e.g. float32. For the "
            "CPU's kernels fold the adapter in: quadriga adapter merge MODEL ADAPTER OUT --format q8"
        )

    def forward(
        self, batch: PassBatch, *, adapters: Sequence[int] | None = None, hidden: bool = False, routing: bool = False
    ) -> PassResult:
        """See :class:`Runner`.

        Raises:
            HardwareError: no memory is left for the intermediate results.
            CheckpointError: experts on disk could not be read.
        """
        assert adapters is None, "there are none: adapters() refuses"
        assert (batch.steering is None) == (batch.steered is None), "a table and each token's row of it go together"
        if batch.steering is not None:
            return self._steered(batch, hidden=hidden, routing=routing)
        logits, n = self.program.run(batch), len(batch.tokens)
        states = (
            self.program.hidden(n, self._layers.norm("final_norm.weight", self.config.final_norm)) if hidden else None
        )
        return PassResult(logits, states, self._router_stats(n) if routing else None)

    def _steered(self, batch: PassBatch, *, hidden: bool, routing: bool) -> PassResult:
        """A pass in which sequences steer experts: one for all that ask the same, and the results in their places."""
        assert batch.steering is not None, "asked for where there is a table"
        results = []
        for part in parts_of(batch):
            with nullcontext() if part.row < 0 else self.program.steered(batch.steering[part.row]):
                results.append((part, self.forward(part.batch, hidden=hidden, routing=routing)))
        return joined(results, len(batch.tokens), len(batch.rows))

    def copy_blocks(self, pairs: Sequence[tuple[int, int]]) -> None:
        """See :class:`Runner`."""
        source, target = (list(side) for side in zip(*pairs, strict=True))
        self._kv[target] = self._kv[source]

    def read_block(self, block: int) -> bytes:
        """What a block of the cache holds, of all layers."""
        content: bytes = self._kv[block].tobytes()
        return content

    def write_block(self, block: int, content: bytes) -> None:
        """Put back what :meth:`read_block` has read.

        Raises:
            ConfigError: it is of another size.
        """
        _fill([self._kv[block]], content, "block")

    def read_state(self, slot: int) -> bytes:
        """What a slot holds, of all recurrent layers."""
        return b"".join(states[slot].tobytes() for states in self._states.values())

    def write_state(self, slot: int, content: bytes) -> None:
        """Put back what :meth:`read_state` has read.

        Raises:
            ConfigError: it is of another size.
        """
        _fill([states[slot] for states in self._states.values()], content, "slot")

    def identity(self) -> bytes:
        """A hash of all that keys and values depend on beside the tokens: weights, kernels, how they are stored.

        Of large matrices it reads pieces all over them: whoever trains a matrix changes all of it.

        Raises:
            ConfigError: experts lie on disk, so the weights cannot be looked at.
        """
        if self.store is not None:
            raise ConfigError("a prefix cache on disk needs all weights in memory; leave expert_memory out")
        digest = blake2b(digest_size=32)
        facts = (__version__, self.program.context.isa, self.kv_format, self._multiplied)
        digest.update(repr((facts, self.config, self.cache)).encode())
        digest.update(library_path().read_bytes())
        for name, parameter in sorted(self.parameters.items()):
            digest.update(name.encode())
            for part in [parameter] if isinstance(parameter, (Packed, np.ndarray)) else parameter:
                raw = (part.data if isinstance(part, Packed) else part).reshape(-1).view(np.uint8)
                digest.update(repr((part.format if isinstance(part, Packed) else "", raw.nbytes)).encode())
                step = max(_LOOK_BYTES, len(raw) // _LOOKS)
                for begin in range(0, len(raw), step):
                    digest.update(raw[begin : begin + _LOOK_BYTES].tobytes())
        return digest.digest()

    def row_stats(self, logits: Logits) -> tuple[list[int], list[float]]:
        """Of every row of logits (R, V): the most probable token (the lowest id of equals) and log(sum(exp))."""
        return self.program.row_stats(np.asarray(logits))

    def _router_stats(self, n_tokens: int) -> list[LayerRouting]:
        """What every layer's router decided for the last pass's tokens."""
        return [
            LayerRouting(
                r.ids[:n_tokens].astype(np.int64),
                r.weights[:n_tokens].copy(),
                distribution(logits, spec.score),
                logits,
            )
            for r, (_, spec) in zip(self.program.routing, self.config.moe_layers, strict=True)
            for logits in (r.logits[:n_tokens].copy(),)
        ]

    def weights(self) -> tuple[str, int]:
        """See :class:`Runner`. Experts on disk are not in memory."""
        n_bytes: Counter[str] = Counter()
        for parameter in self.parameters.values():
            for part in [parameter] if isinstance(parameter, (Packed, np.ndarray)) else parameter:
                n_bytes[part.format if isinstance(part, Packed) else "float32"] += (
                    part.data.nbytes if isinstance(part, Packed) else part.nbytes
                )
        return n_bytes.most_common(1)[0][0], n_bytes.total()

    def expert_load(self) -> list[NDArray[np.int64]]:
        """Per MoE layer (E,) int64: tokens every expert has seen since the model was built."""
        return [routing.load.copy() for routing in self.program.routing]


def _fill(rows: Sequence[Array], content: bytes, what: str) -> None:
    """Write bytes over rows of memory, one after the other."""
    n_bytes = sum(row.nbytes for row in rows)
    if len(content) != n_bytes:
        raise ConfigError(f"a {what} has {n_bytes} bytes, got {len(content)}")
    at = 0
    for row in rows:
        row[:] = np.frombuffer(content, dtype=row.dtype, count=row.size, offset=at)
        at += row.nbytes
