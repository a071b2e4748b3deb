"""What GGUF metadata says about a model, in the terms of the specs; shared by the families that GGUF can hold.

Key names are those of the PyPI package gguf 0.19.0 (``gguf.constants.Keys``); what a missing key means is what
llama.cpp's loader does (src/llama-model.cpp, release b11434), and each such rule is written out where it is used.
GGUF stores numbers as float32, so constants come back through :func:`shortest_float32` and :func:`exact_or`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, TypedDict

from quadriga.errors import ConfigError
from quadriga.model.config import (
    Activation,
    AlibiSpec,
    AttentionSpec,
    DenseSpec,
    LayerSpec,
    Mamba2Spec,
    ModelConfig,
    MoESpec,
    RopeSpec,
)
from quadriga.model.families import base, rope_keys
from quadriga.model.families.keys import Keys, equal_heads, exact_or, shortest_float32
from quadriga.model.families.pieces import ExpertPart, experts, qkv
from quadriga.model.weight_map import Piece, Shape

TOKEN_EMBEDDING = "token_embd.weight"
OUTPUT = "output.weight"

ROUTER = {"blk.{i}.ffn_gate_inp.weight": "layers.{i}.moe.router.weight"}
"""A layer's router, in every architecture."""
MERGED_EXPERTS = {
    "blk.{i}.ffn_gate_exps.weight": "layers.{i}.moe.w_gate",
    "blk.{i}.ffn_up_exps.weight": "layers.{i}.moe.w_up",
    "blk.{i}.ffn_down_exps.weight": "layers.{i}.moe.w_down",
}
"""Names of a layer's experts in one tensor each; in torch's axis order they have our shapes."""


SHARED_EXPERT = {
    "blk.{i}.ffn_gate_shexp.weight": "layers.{i}.moe.shared.w_gate",
    "blk.{i}.ffn_up_shexp.weight": "layers.{i}.moe.shared.w_up",
    "blk.{i}.ffn_down_shexp.weight": "layers.{i}.moe.shared.w_down",
}
"""Names of the network beside the routed experts, in every architecture that has one."""


def split_experts(config: ModelConfig) -> list[Piece]:
    """Pieces for the experts of files from before April 2024: a tensor each."""
    parts: tuple[ExpertPart, ...] = ("w_gate", "w_up", "w_down")
    return [
        piece
        for part in parts
        for piece in experts(config, part, f"blk.{{i}}.ffn_{part.removeprefix('w_')}.{{e}}.weight")
    ]


IGNORED = frozenset(
    {
        "tensor_data_layout",  # the words "Meta AI original pth"; the layout follows from the architecture
        "vocab_size",  # compared with the embedding table by vocabulary_size
    }
)
"""Architecture keys that say nothing the tensors do not say."""

_ID_KEYS = ("tokenizer.ggml.eos_token_id", "tokenizer.ggml.eot_token_id", "tokenizer.ggml.eom_token_id")


def architecture_keys(metadata: Mapping[str, object], arch: str) -> Keys:
    """The keys below ``arch.``, without that prefix; an array of one value a layer counts as that value.

    Raises:
        ConfigError: an array whose layers differ.
    """
    prefix = arch + "."
    found = {k.removeprefix(prefix): v for k, v in metadata.items() if k.startswith(prefix)}
    n_layers = found.get("block_count")
    return Keys({k: _of_all_layers(f"{prefix}{k}", v, n_layers) for k, v in found.items()}, f"GGUF {arch} keys")


def _of_all_layers(key: str, value: object, n_layers: object) -> object:
    """A value that converters write once for every layer (``get_key_or_arr`` of llama.cpp), where all are the same."""
    if not isinstance(value, list) or not value or len(value) != n_layers:
        return value
    other = next((i for i, one in enumerate(value) if one != value[0]), None)
    if other is not None:
        raise ConfigError(
            f"GGUF {key} must be the same in every layer, got {str(value[0])[:40]} in layer 0 and "
            f"{str(value[other])[:40]} in layer {other}. Quadriga's layers are all of one size."
        )
    return value[0]


def by_heads(metadata: Mapping[str, object], arch: str, otherwise: str) -> tuple[Mapping[str, object], list[bool]]:
    """Metadata with one number of heads for keys and values, and which layers are attention: those that have any.

    Args:
        otherwise: what a layer with 0 of them is.

    Raises:
        ConfigError: there is no number for each layer, or attentions differ in it.
    """
    name = f"{arch}.attention.head_count_kv"
    heads, n_layers = metadata.get(name), metadata.get(f"{arch}.block_count")
    if not isinstance(heads, list) or len(heads) != n_layers or len({*heads} - {0}) != 1:
        raise ConfigError(
            f"GGUF {name} must be a number for each of the {n_layers} layers, 0 for {otherwise} and the same for "
            f"every attention; got {str(heads)[:80]}"
        )
    return {**metadata, name: max(heads)}, [n > 0 for n in heads]


def projections(config: ModelConfig, *, interleaved: bool) -> list[Piece]:
    """Pieces of attn_q, attn_k and attn_v.

    Args:
        interleaved: llama.cpp turns rotary pairs side by side in this architecture (rope type norm), so its converter
            puts them there; elsewhere (NeoX) the halves lie as they are.
    """
    q, k, v = (f"blk.{{i}}.attn_{part}.weight" for part in "qkv")
    return qkv(config, q, k, v, interleaved=interleaved)


def plain_experts(
    keys: Keys,
    d_ff: int,
    *,
    normalised: bool = True,
    activation: Activation = "silu",
    normalize_p: float | None = 1.0,
    shared: DenseSpec | None = None,
    n_shared: int = 0,
    gating: int = 1,
) -> MoESpec:
    """The mixture of every layer, after refusing every kind but one: each layer routes alike, by a softmax.

    Args:
        d_ff: width of an expert.
        normalised: what the file may say of dividing the chosen weights by their sum.
        normalize_p: whether the architecture divides them.
        shared: the network beside them, where the architecture has one.
        n_shared: how many networks the file may say it is; 0 where converters do not say.
        gating: what the file may say of the scores; what is returned is a softmax's mixture all the same.
    """
    # 1 is the softmax (gguf.ExpertGatingFuncType), which llama.cpp takes in these architectures where a file says 0.
    keys.must_be("expert_gating_func", *((1, 0) if gating == 1 else (gating,)))
    keys.must_be("expert_weights_norm", normalised)
    keys.must_be("expert_weights_scale", 1, 0)
    keys.must_be("expert_feed_forward_length", d_ff)
    keys.must_be("expert_shared_count", n_shared)
    keys.must_be("leading_dense_block_count", 0)
    keys.must_be("expert_shared_feed_forward_length", 0 if shared is None else shared.d_ff)
    for key in ("expert_group_count", "expert_group_used_count", "interleave_moe_layer_step", "moe_every_n_layers"):
        keys.must_be(key, 0, 1)
    return MoESpec(
        d_ff=d_ff,
        n_experts=keys.integer("expert_count"),
        top_k=keys.integer("expert_used_count"),
        activation=activation,
        normalize_p=normalize_p,
        shared=shared,
    )


def number(keys: Keys, key: str) -> float:
    """A float32 number as it was written in decimal."""
    return shortest_float32(keys.number(key))


def vocabulary_size(keys: Keys, shapes: Mapping[str, Shape]) -> int:
    """Rows of the embedding table.

    Raises:
        ConfigError: there is no table, or ``vocab_size`` says otherwise.
    """
    shape = shapes.get(TOKEN_EMBEDDING)
    if shape is None or len(shape) != 2:
        raise ConfigError(f"a GGUF model must have the matrix {TOKEN_EMBEDDING}, got {shape}. Is the file complete?")
    if keys.given("vocab_size") and keys.integer("vocab_size") != shape[0]:
        raise ConfigError(
            f"GGUF vocab_size must be the rows of {TOKEN_EMBEDDING}: got {keys.integer('vocab_size')} and {shape[0]}"
        )
    return shape[0]


def attention(
    keys: Keys, d_model: int, position: RopeSpec | AlibiSpec, *, partial: bool = False, **extras: Any
) -> AttentionSpec:
    """Heads and head size.

    Args:
        partial: whether the architecture turns a part of a head.
        extras: further fields of AttentionSpec.
    """
    n_heads = keys.integer("attention.head_count")
    # llama.cpp: no head_count_kv means one key/value head per query head.
    n_kv_heads = keys.integer("attention.head_count_kv") if keys.given("attention.head_count_kv") else n_heads
    # llama.cpp: no key_length means embedding_length / head_count.
    given = keys.given("attention.key_length")
    head_dim = keys.integer("attention.key_length") if given else equal_heads(d_model, n_heads)
    keys.must_be("attention.value_length", head_dim)
    if partial and isinstance(position, RopeSpec):
        n = keys.integer("rope.dimension_count")
        position = replace(position, dim=None if n == head_dim else n)
    else:
        keys.must_be("rope.dimension_count", head_dim)
    keys.must_be("attention.causal", True)
    return AttentionSpec(n_heads=n_heads, n_kv_heads=n_kv_heads, head_dim=head_dim, position=position, **extras)


def rope_theta(keys: Keys) -> float:
    """The rotary base, after refusing every kind of context scaling."""
    keys.must_be("rope.scaling.type", "none", "linear")  # linear with factor 1 is no scaling
    for key in ("factor", "attn_factor", "alpha"):
        keys.must_be(f"rope.scaling.{key}", 1, 0)
    keys.must_be("rope.scaling.yarn_log_multiplier", 0)
    keys.must_be("rope.scale_linear", 1, 0)
    # Facts about how a scaled model was made; nothing reads them where positions are not scaled.
    for key in ("original_context_length", "finetuned"):
        keys.has(f"rope.scaling.{key}")
    # llama.cpp: no freq_base means 10000; LLaMA-2's own files leave it out.
    return number(keys, "rope.freq_base") if keys.given("rope.freq_base") else 10_000.0


def refuse_tensors(shapes: Mapping[str, Shape], names: Mapping[str, str]) -> None:
    """Raise if one of ``names`` (tensor -> what it does) is in the file."""
    for name, meaning in names.items():
        if name in shapes:
            raise ConfigError(f"the GGUF file has {name} ({meaning}), which Quadriga does not support")


class TokenIds(TypedDict):
    """The fields of ModelConfig that a GGUF keeps with its tokenizer."""

    bos_id: int | None
    eos_ids: tuple[int, ...]
    pad_id: int | None


def token_ids(metadata: Mapping[str, object]) -> TokenIds:
    """bos_id, eos_ids and pad_id for ModelConfig; eos, eot and eom all end a generation."""
    keys = Keys(metadata, "GGUF metadata")
    ends = [keys.integer(key) for key in _ID_KEYS if keys.given(key)]
    return {
        "bos_id": keys.token_id("tokenizer.ggml.bos_token_id"),
        "eos_ids": tuple(dict.fromkeys(ends)),
        "pad_id": keys.token_id("tokenizer.ggml.padding_token_id"),
    }


def token_id_keys(config: ModelConfig) -> dict[str, object]:
    """The inverse of :func:`token_ids`.

    Raises:
        ConfigError: the model has more end tokens than GGUF has keys for.
    """
    if len(config.eos_ids) > len(_ID_KEYS):
        raise ConfigError(f"GGUF has room for {len(_ID_KEYS)} end tokens, this model has {len(config.eos_ids)}")
    written: dict[str, object] = dict(zip(_ID_KEYS, config.eos_ids, strict=False))
    if config.bos_id is not None:
        written["tokenizer.ggml.bos_token_id"] = config.bos_id
    if config.pad_id is not None:
        written["tokenizer.ggml.padding_token_id"] = config.pad_id
    return written


def common_keys(config: ModelConfig, arch: str) -> dict[str, object]:
    """The keys every architecture shares, ready to write."""
    layer = config.only_layer(f"GGUF arch {arch}")
    attn = layer.attention
    eps = "layer_norm_rms_epsilon" if layer.norm.kind == "rms" else "layer_norm_epsilon"
    return {
        f"{arch}.block_count": config.n_layers,
        f"{arch}.context_length": config.max_seq_len,
        f"{arch}.embedding_length": config.d_model,
        f"{arch}.feed_forward_length": layer.ffn.d_ff,
        f"{arch}.vocab_size": config.vocab_size,
        f"{arch}.attention.head_count": attn.n_heads,
        f"{arch}.attention.head_count_kv": attn.n_kv_heads,
        f"{arch}.attention.{eps}": layer.norm.eps,
        **token_id_keys(config),
    }


def expert_keys(config: ModelConfig, arch: str) -> dict[str, object]:
    """The keys of a mixture whose layers are all alike."""
    moe = base.of_kind(config.only_layer(f"GGUF arch {arch}").ffn, MoESpec, f"GGUF arch {arch}")
    return {
        f"{arch}.expert_count": moe.n_experts,
        f"{arch}.expert_used_count": moe.top_k,
        f"{arch}.expert_feed_forward_length": moe.d_ff,
    }


def must_read_back(
    config: ModelConfig,
    read: Callable[[Mapping[str, object], Mapping[str, Shape]], ModelConfig],
    metadata: Mapping[str, object],
    form: str,
) -> None:
    """Raise unless ``metadata`` reads back as ``config``.

    Settings of training aside, for which GGUF has no keys; bands of frequencies may come back as a factor each.
    """
    shapes: dict[str, Shape] = {TOKEN_EMBEDDING: (config.vocab_size, config.d_model)}
    if not config.tied_embeddings:
        shapes[OUTPUT] = (config.vocab_size, config.d_model)
    attn = config.first_attention().attention
    normed = attn.qk_norm is not None
    for name, given in (("q.bias", attn.qkv_bias), ("output.bias", attn.out_bias), ("q_norm.weight", normed)):
        if given:
            shapes[f"blk.0.attn_{name}"] = (0,)
    for i, layer in enumerate(config.layers):
        if isinstance(layer.mixer, Mamba2Spec) and layer.mixer.conv_bias:
            shapes[f"blk.{i}.ssm_conv1d.bias"] = (0,)
        if isinstance(layer.mixer, AttentionSpec) and not layer.mixer.keys_as_values:
            shapes[f"blk.{i}.attn_v.weight"] = (0,)
    for i, _ in [place for place in config.moe_layers if place[1].correction][:1]:
        shapes[f"blk.{i}.exp_probs_b.bias"] = (0,)
    arch = next(iter(metadata)).partition(".")[0]
    full = {"general.architecture": arch, **metadata}
    for tensor, values in rope_keys.gguf_tensors(config).items():
        shapes[tensor], full[rope_keys.VALUES + tensor] = (len(values),), values
    base.must_read_back(config.with_layers(_as_stored), read(full, shapes), form)


def _as_stored(layer: LayerSpec) -> LayerSpec:
    """A layer without what GGUF keeps in another form or not at all."""
    attn = layer.mixer
    if isinstance(attn, AttentionSpec) and isinstance(attn.position, RopeSpec):
        layer = replace(layer, mixer=replace(attn, position=rope_keys.as_read(attn.position, attn.head_dim)))
    if layer.moe is None:
        return layer
    return replace(layer, ffn=replace(layer.moe, aux_loss_weight=0.0, jitter_eps=None))


def with_scale(attn: AttentionSpec, value: float) -> AttentionSpec:
    """``attn`` with the stored attention scale; left out where it is the usual 1/sqrt(head_dim)."""
    usual = attn.head_dim**-0.5
    return attn if exact_or(value, usual) == usual else replace(attn, scale=value)
