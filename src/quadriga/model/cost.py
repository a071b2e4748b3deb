"""What a model costs: parameters, operations and bytes, by arithmetic on its configuration. No tensors, no torch.

    decode one token     FLOPs = 2 * (active parameters that multiply) + sum over layers of 4 H d T   T cached positions
                         (latent attention: 2 H (2 R + p) T, R kv_rank and p rope_dim)
    keep one token       bytes = sum over layers of 2 K d * size of an element                        keys and values
                         (latent attention: R + p in place of 2 K d)
                         (with a window W a layer sees and reads min(T, W) positions, and keeps them to the block)
    keep a sequence      bytes = sum over recurrent layers of 4 * numbers of their state             float32, any length
    hold the weights     bytes = sum over parameters of elements / block * bytes of a block

Every count walks ``weight_map.parameter_shapes``, the same table the model and its checkpoints are built from, so it
cannot drift from them. What a machine needs besides weights and cache (the program itself, activations) is not counted.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from math import prod
from typing import NamedTuple

from quadriga.errors import ConfigError
from quadriga.model.cache_layout import cache_layout, most_blocks
from quadriga.model.config import (
    AttentionSpec,
    DeltaNetSpec,
    ModelConfig,
    MoESpec,
    NoMixer,
    RecurrentMixer,
    ShortConvSpec,
)
from quadriga.model.weight_map import Shape, layer_shapes, parameter_shapes, stays_float32
from quadriga.quant import formats
from quadriga.quant.packed import BLOCK_TOKENS, PACKED

ELEMENT_BYTES = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2}
"""Bytes of an element by dtype name."""


@dataclass(frozen=True)
class WeightFormat:
    """Which element, block (``quant.formats``) or packed format (``quant.packed``) each kind of parameter is in."""

    matrices: str
    tables: str
    """The embedding table and the head."""
    rest: str
    """Norms, routers and biases."""


FORMATS = {
    "f32": WeightFormat("float32", "float32", "float32"),
    "bf16": WeightFormat("bfloat16", "bfloat16", "bfloat16"),
    "q8": WeightFormat("q8_0", "bfloat16", "bfloat16"),
    "q4": WeightFormat("q4_0", "bfloat16", "bfloat16"),
    # GGUF's blocks as the kernels use them: of 256, a byte for each scale and minimum.
    **{
        form: WeightFormat(form, "q8_0", "float32")
        for form in ("q6k", "q5m", "q5k", "q5", "q4m", "q4k", "iq4nl", "iq4xs", "q3k", "q2k")
    },
    # GGUF keeps norms and router in float32 whatever the file's type.
    "gguf-f16": WeightFormat("float16", "float16", "float32"),
    "gguf-q8_0": WeightFormat("q8_0", "q8_0", "float32"),
    "gguf-q4_0": WeightFormat("q4_0", "q4_0", "float32"),
}
"""Weight formats by name. Blocks of 32 with a 16-bit scale: 8.5 bits a weight in q8, 5.5 in q5, 4.5 in q4 and iq4nl,
with a minimum 6 in q5m, 5 in q4m; of 256, with scales of their own for every 16 or 32: 6.625 in q6k, 5.625 in q5k,
4.625 in q4k, 4.375 in iq4xs, 3.625 in q3k, 2.625 in q2k."""


@dataclass(frozen=True)
class ParameterCount:
    """Parameters of a model; equal for a dense one, where every parameter works for every token."""

    total: int
    active: int
    """Parameters that one token meets: everything but the experts it is not sent to. Both token tables count."""
    active_without_input: int
    """The same without the input table, of which a token reads one row (the convention of LLM Foundry and Databricks).
    A tied table stays in: it multiplies as the head."""


def n_params(config: ModelConfig) -> ParameterCount:
    """Count parameters, to the unit."""
    total = active = 0
    for part in _parameters(config):
        total += prod(part.shape) * part.copies
        active += prod(part.used) * part.copies
    input_only = 0 if config.tied_embeddings else config.vocab_size * config.d_model
    return ParameterCount(total, active, active - input_only)


def kv_bytes_per_token(config: ModelConfig, dtype: str = "bfloat16") -> int:
    """Bytes that one cached position takes, over all layers.

    Raises:
        ConfigError: ``dtype`` is not one of ELEMENT_BYTES.
    """
    if dtype not in ELEMENT_BYTES:
        raise ConfigError(f"dtype must be one of {', '.join(ELEMENT_BYTES)}; got {dtype!r}")
    numbers = sum(layer.mixer.state.numbers_per_token * n for layer, n in config.kinds().items())
    return numbers * ELEMENT_BYTES[dtype]


def kv_bytes(config: ModelConfig, context: int, dtype: str = "bfloat16") -> int:
    """Bytes of the cache that a sequence of ``context`` positions holds; see ``model.cache_layout``.

    Raises:
        ConfigError: ``dtype`` is not one of ELEMENT_BYTES.
    """
    cache = cache_layout(config)
    whole = kv_bytes_per_token(config, dtype)  # in one group, of all layers
    if cache.n_groups > 1:
        numbers = sum(
            max(config.layers[layer].mixer.state.numbers_per_token for layer in layers) for layers in cache.slot_layers
        )
        whole = numbers * ELEMENT_BYTES[dtype]
    return whole * sum(min(context, most_blocks(window, context) * BLOCK_TOKENS) for window in cache.windows)


def flops_per_token(config: ModelConfig, context: int) -> int:
    """Floating-point operations of a forward pass for one token that attends to ``context`` positions.

    A multiplication and an addition count as two. Norm weights are counted like matrices; they are below 1e-4 of all.
    """
    return 2 * n_params(config).active_without_input + attention_flops(config, context)


def attention_flops(config: ModelConfig, context: int) -> int:
    """Operations of what is no matrix product: q·k and weights·v of attention, the steps of recurrent layers.

    For one token with ``context`` positions up to itself, all layers.
    """
    total = 0
    for layer, n in config.kinds().items():
        match layer.mixer:
            case AttentionSpec() as attn:
                total += n * 2 * attn.attended_dim * min(context, attn.window or context)
            case NoMixer():
                pass
            case recurrent:
                total += n * step_flops(recurrent)
    return total


def step_flops(mixer: RecurrentMixer) -> int:
    """Operations of a recurrent mixer for one token beside its parameters', which the taps are.

    Of a delta rule: S decayed, k S, S changed, q S; of a state-space model: S decayed, S changed, C S.
    """
    if isinstance(mixer, ShortConvSpec):
        return 2 * mixer.width
    if isinstance(mixer, DeltaNetSpec):
        return 7 * mixer.n_v_heads * mixer.k_dim * mixer.v_dim
    return 5 * mixer.inner_dim * mixer.state_dim


def kv_bytes_read(config: ModelConfig, context: int, dtype: str = "bfloat16") -> int:
    """Bytes of keys, values and states that one token reads which has ``context`` positions up to itself."""
    total = 0
    for layer, n in config.kinds().items():
        window = layer.mixer.window if isinstance(layer.mixer, AttentionSpec) else None
        total += n * layer.mixer.state.numbers_per_token * min(context, window or context) * ELEMENT_BYTES[dtype]
    return total + state_bytes(config)


def state_bytes(config: ModelConfig) -> int:
    """Bytes that the recurrent layers keep of a sequence, whatever its length: float32."""
    return 4 * sum(layer.mixer.state.numbers_per_sequence * n for layer, n in config.kinds().items())


def weight_bytes(config: ModelConfig, form: str) -> int:
    """Bytes of all weights in a format of FORMATS.

    Raises:
        ConfigError: no such format.
    """
    chosen = _format(form)
    return sum(_bytes(part.name, part.shape, chosen) * part.copies for part in _parameters(config))


def table_bytes(config: ModelConfig, form: str) -> int:
    """Bytes of the embedding table alone, of which a token reads a row (:func:`weight_bytes`)."""
    return _bytes("embed.weight", (config.vocab_size, config.d_model), _format(form))


def bytes_read_per_token(config: ModelConfig, form: str) -> int:
    """Bytes of weights that decoding one token reads at batch 1: the bound of a memory-bound machine.

    Raises:
        ConfigError: no such format.
    """
    chosen = _format(form)
    read = sum(_bytes(part.name, part.used, chosen) * part.copies for part in _parameters(config))
    if not config.tied_embeddings:
        read -= _bytes("embed.weight", (config.vocab_size - 1, config.d_model), chosen)  # one row of the input table
    return read


def expected_distinct_experts(ffn: MoESpec, n_tokens: int) -> float:
    """Experts of a layer that ``n_tokens`` independent, evenly routed tokens reach together: E (1 - (1 - k/E)^n)."""
    return ffn.n_experts * (1 - (1 - ffn.top_k / ffn.n_experts) ** n_tokens)


def memory_needed(config: ModelConfig, form: str, context: int, kv_dtype: str = "bfloat16") -> int:
    """Bytes of the weights in ``form`` and of a cache for a sequence of ``context`` tokens."""
    return weight_bytes(config, form) + kv_bytes(config, context, kv_dtype) + state_bytes(config)


def fits(config: ModelConfig, form: str, context: int, memory_bytes: int, kv_dtype: str = "bfloat16") -> bool:
    """True if weights and cache fit into ``memory_bytes``."""
    return memory_needed(config, form, context, kv_dtype) <= memory_bytes


class _Part(NamedTuple):
    """One parameter, of a kind of layer or outside the layers."""

    name: str
    shape: Shape
    used: Shape
    """What one token meets of it: top_k of stacked experts, all of anything else."""
    copies: int
    """Layers of the kind; 1 outside them."""


def _parameters(config: ModelConfig) -> Iterator[_Part]:
    for name, shape in parameter_shapes(replace(config, layers=config.layers[:1])).items():
        if not name.startswith("layers."):
            yield _Part(name, shape, shape, 1)
    for layer, copies in config.kinds().items():
        for name, shape in layer_shapes(layer, config.d_model).items():
            stacked = len(shape) == 3 or ".b_" in name  # a matrix or a bias an expert
            used = (layer.moe.top_k, *shape[1:]) if layer.moe is not None and stacked else shape
            yield _Part(name, shape, used, copies)


def _bytes(name: str, shape: Shape, form: WeightFormat) -> int:
    is_table = name in ("embed.weight", "lm_head.weight")
    if form.matrices in PACKED and len(shape) > 1 and not is_table and not stays_float32(name):
        return prod(shape[:-2]) * PACKED[form.matrices].nbytes_of(shape[-2], shape[-1])
    if len(shape) == 1 or stays_float32(name):
        stored = formats.FORMATS[form.rest]
    else:
        stored = formats.FORMATS[form.tables if is_table else form.matrices]
    if shape[-1] % stored.block:
        stored = formats.FORMATS["float16"]  # rows that are no whole blocks are not packed
    return prod(shape) // stored.block * stored.nbytes


def _format(form: str) -> WeightFormat:
    if form not in FORMATS:
        raise ConfigError(f"weight format must be one of {', '.join(FORMATS)}; got {form!r}")
    return FORMATS[form]
