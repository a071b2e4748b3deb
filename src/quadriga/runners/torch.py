"""The model on plain torch ops as a runner: any device and dtype that torch knows, CUDA included."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor

from quadriga.io.open import Checkpoint
from quadriga.io.parameters import Progress
from quadriga.kernels.cpu.expert_store import ExpertStore
from quadriga.kernels.cpu.sampling import TokenSampler
from quadriga.kernels.pass_batch import PassBatch
from quadriga.model.cache_layout import CacheLayout, cache_layout, one_group
from quadriga.model.config import AttentionSpec, LatentState, RecurrentState
from quadriga.nn import moe
from quadriga.nn.adapter_bank import AdapterBank
from quadriga.nn.context import Scan, Scoring, beginning
from quadriga.nn.devices import free_bytes, quick_float32, resolve_device, resolve_dtype, set_threads
from quadriga.nn.load import load_parameters
from quadriga.nn.transformer import Transformer
from quadriga.quant.packed import BLOCK_TOKENS
from quadriga.runners.base import CacheSize, Floats, LayerRouting, PassResult
from quadriga.runners.on_tensors import TensorRunner, dtype_sizes


def load(
    opened: Checkpoint,
    sizes: Callable[[int, int | None], CacheSize],
    *,
    dtype: str = "auto",
    device: str = "cpu",
    threads: int | None = None,
    progress: Progress | None = None,
) -> TorchRunner:
    """A checkpoint in torch.

    Args:
        sizes: size of the cache, from the bytes of a block and those that are free on the device beside the weights
            (None: it is the host).
        dtype, device: as in ``runtime.DTYPE_NAMES`` and ``runtime.check_device``, or auto.

    Raises:
        HardwareError: no such device here.
        CheckpointError, ConfigError: the files are malformed or of an unsupported kind.
    """
    set_threads(threads)
    target = resolve_device(device)
    chosen = resolve_dtype(dtype, target.type)
    parameters = load_parameters(opened, dtype=chosen, device=target, progress=progress)
    cache = cache_layout(opened.config)
    layers = opened.config.layers
    numbers = sum(max(layers[i].mixer.state.numbers_per_token for i in users) for users in cache.slot_layers)
    per_block = BLOCK_TOKENS * numbers * parameters["embed.weight"].element_size()
    room = sizes(per_block, free_bytes(target))
    model = Transformer.from_parameters(opened.config, parameters)
    return TorchRunner(model, room.n_blocks, cache, n_slots=room.n_slots)


class TorchRunner(TensorRunner):
    """A Transformer on plain torch ops over a paged cache.

    Args:
        model: its parameters' device and dtype are computed in.
        n_blocks: KV blocks of 16 tokens; None: those of two full contexts.
        cache: how layers share them; None: a block has room for all layers.
        n_slots: places for the states of recurrent layers; None: as many as blocks.
    """

    def __init__(
        self,
        model: Transformer,
        n_blocks: int | None = None,
        cache: CacheLayout | None = None,
        *,
        n_slots: int | None = None,
    ) -> None:
        self.cache = cache or one_group(model.config.n_layers)
        n_blocks = n_blocks or 2 * self.cache.n_groups * -(-model.config.max_seq_len // BLOCK_TOKENS)
        self.model, config = model.eval(), model.config
        weight = next(model.parameters())
        self.n_slots = (n_slots or n_blocks) if config.is_recurrent else 0
        self._keys: list[Tensor] = []
        self._values: list[Tensor] = []
        for layers in self.cache.slot_layers:
            mixers = [config.layers[layer].mixer for layer in layers]
            width = max(m.n_kv_heads * m.head_dim if isinstance(m, AttentionSpec) else 0 for m in mixers)
            keys = torch.zeros((n_blocks * BLOCK_TOKENS, width), dtype=weight.dtype, device=weight.device)
            self._keys.append(keys)
            # A latent is key and value: what stands in its place among the values is a view.
            state = mixers[0].state
            self._values.append(keys[:, : state.rank] if isinstance(state, LatentState) else torch.zeros_like(keys))
        self._states: dict[int, list[Tensor]] = {}
        for i, layer in enumerate(config.layers):
            if isinstance(kept := layer.mixer.state, RecurrentState):
                self._states[i] = [t.expand(self.n_slots, *t.shape).clone() for t in beginning(kept, weight)]
        stored = [*self._keys, *(values for values in self._values if values._base is None)]
        super().__init__(config, n_blocks, stored, weight.device)
        self.state_bytes = sum(t.nbytes for arrays in self._states.values() for t in arrays)
        self.store: ExpertStore | None = None
        self.row_sampler: TokenSampler | None = None
        self.can_steer = True
        self._bank: AdapterBank | None = None

    @property
    def adapter_names(self) -> list[str]:
        """See :class:`Runner`."""
        return [] if self._bank is None else list(self._bank.names)

    def adapters(self) -> AdapterBank:
        """See :class:`Runner`; the first call makes room for them."""
        if self._bank is None:
            self._bank = AdapterBank(self.model)
        return self._bank

    @torch.inference_mode()
    def forward(
        self, batch: PassBatch, *, adapters: Sequence[int] | None = None, hidden: bool = False, routing: bool = False
    ) -> PassResult:
        """See :class:`Runner`."""
        device = self._device
        tokens = torch.from_numpy(batch.tokens).long().to(device)
        rows = torch.from_numpy(batch.rows).long().to(device)
        chosen = None if adapters is None else torch.tensor(adapters, device=device)
        with quick_float32(len(tokens)), self._steered(batch):
            if self._bank is not None:
                self._bank.choose(chosen)
            states, of_layers = self.model.hidden(tokens, _PagedContext(self, batch, device))
            if self._bank is not None:
                self._bank.choose(None if chosen is None else chosen[rows])
            logits: Floats = self.model.head(states[rows]).cpu().numpy()
        self._count(of_layers, len(tokens))
        return PassResult(
            logits,
            self.model.final_norm(states).float().cpu().numpy() if hidden else None,
            [_as_arrays(stats) for stats in of_layers] if routing else None,
        )

    @contextmanager
    def _steered(self, batch: PassBatch) -> Iterator[None]:
        """Let the routers heed what the batch's requests ask of experts, for one pass."""
        if batch.steering is None or batch.steered is None:
            yield
            return
        # One more row, of zeros, which -1 means.
        table = torch.from_numpy(np.concatenate([batch.steering, np.zeros_like(batch.steering[:1])])).to(self._device)
        of_token = table[torch.from_numpy(batch.steered).long().to(self._device)]  # (N, n_layers, E)
        routers: list[moe.Router] = []
        for layer, spec in self.config.moe_layers:
            mixture = self.model.layers[layer].moe
            assert isinstance(mixture, moe.MoE), "a layer with experts has a mixture"
            mixture.router.steering = of_token[:, layer, : spec.n_experts]
            routers.append(mixture.router)
        try:
            yield
        finally:
            for router in routers:
                router.steering = None

    def _sizes(self) -> Counter[str]:
        return dtype_sizes(list(self.model.parameters()))


def _as_arrays(stats: moe.RouterStats) -> LayerRouting:
    return LayerRouting(*(t.cpu().numpy() for t in (stats.expert_ids, stats.expert_weights, stats.probs, stats.logits)))


class _PagedContext:
    """A ForwardContext over the runner's blocks for one batch."""

    def __init__(self, runner: TorchRunner, batch: PassBatch, device: torch.device) -> None:
        self._runner = runner
        self.positions = torch.from_numpy(batch.positions).long().to(device)
        self._spans = list(zip(batch.starts[:-1].tolist(), batch.starts[1:].tolist(), strict=True))
        self._slots: list[Tensor] = []  # per group of layers (N,): where each token's key goes
        self._past: list[list[Tensor]] = []  # per group, of every sequence: where its keys lie
        for table in np.atleast_2d(batch.tables).astype(np.int64):
            slots, past = [], []
            for s, (start, stop) in enumerate(self._spans):
                blocks = table[batch.table_starts[s] : batch.table_starts[s + 1]]
                places = np.arange(int(batch.positions[stop - 1]) + 1)
                place = blocks[places // BLOCK_TOKENS] * BLOCK_TOKENS + places % BLOCK_TOKENS
                past.append(torch.from_numpy(place).to(device))
                slots.append(place[batch.positions[start:stop]])
            self._slots.append(torch.from_numpy(np.concatenate(slots)).to(device))
            self._past.append(past)
        # All sequences decode: one padded attention for all of them.
        self._decode = len(self._spans) > 1 and all(stop - start == 1 for start, stop in self._spans)
        self._padded: dict[tuple[int, int | None], tuple[Tensor, Tensor]] = {}
        self._slots_of = batch.state_slots() if runner.n_slots else []

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, scoring: Scoring) -> Tensor:
        """Store k and v, then attend; see ``nn.context.ForwardContext``."""
        group, slot = self._runner.cache.groups[layer], self._runner.cache.slots[layer]
        # A place may be wider than what this layer keeps in it.
        keys, values = (
            stored[slot][:, : heads.shape[1] * heads.shape[2]].view(-1, *heads.shape[1:])
            for stored, heads in ((self._runner._keys, k), (self._runner._values, v))
        )
        keys[self._slots[group]], values[self._slots[group]] = k, v
        if self._decode:
            past, positions = self._together(group, scoring.window)
            past_keys, past_values = (t[past].transpose(1, 2) for t in (keys, values))  # (B, K, S, d)
            return scoring.attention(q[:, :, None], past_keys, past_values, q_positions=positions)[:, :, 0]
        out = q.new_empty(*q.shape[:-1], v.shape[-1])
        for (start, stop), past in zip(self._spans, self._past[group], strict=True):
            seen = past if scoring.window is None else past[-(stop - start + scoring.window - 1) :]
            stored = (t[seen].transpose(0, 1)[None] for t in (keys, values))
            out[start:stop] = scoring.attention(q[start:stop].transpose(0, 1)[None], *stored)[0].transpose(0, 1)
        return out

    def recur(self, layer: int, x: Tensor, state: RecurrentState, scan: Scan) -> Tensor:
        """Run a recurrent layer from the slot of each sequence into another; see ``nn.context.ForwardContext``."""
        kept, out = self._runner._states[layer], []
        for (start, stop), (before, after) in zip(self._spans, self._slots_of, strict=True):
            rows, states = scan(x[start:stop], beginning(state, x) if before < 0 else [one[before] for one in kept])
            out.append(rows)
            for one, values in zip(kept, states, strict=True):
                one[after] = values
        return torch.cat(out)

    def _together(self, group: int, window: int | None) -> tuple[Tensor, Tensor]:
        """(places (B, S) of what each sequence's query sees, padded at the end; (B, 1) where its query is in them)."""
        if (group, window) not in self._padded:
            seen = [past if window is None else past[-window:] for past in self._past[group]]
            padded = torch.empty(len(seen), max(map(len, seen)), dtype=torch.int64, device=self.positions.device)
            for row, past in zip(padded, seen, strict=True):
                # The rest repeats its own first place: a weight of 0 times another's NaN would be NaN.
                row[: len(past)], row[len(past) :] = past, past[0]
            places = torch.tensor([[len(past) - 1] for past in seen], device=self.positions.device)
            self._padded[group, window] = padded, places
        return self._padded[group, window]
