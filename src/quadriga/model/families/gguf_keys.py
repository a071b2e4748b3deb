"""What GGUF metadata says about a model, in the terms of the specs; shared by the families that GGUF can hold.

Key names are those of the PyPI package gguf 0.19.0 (``gguf.constants.Keys``); what a missing key means is what
llama.cpp's loader does (src/llama-model.cpp, release b11434), and each such rule is written out where it is used.
GGUF stores numbers as float32, so constants come back through :func:`shortest_float32` and :func:`exact_or`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import TypedDict

from quadriga.errors import ConfigError
from quadriga.model.config import AttentionSpec, ModelConfig, MoESpec
from quadriga.model.families import base
from quadriga.model.families.keys import Keys, equal_heads, exact_or, shortest_float32
from quadriga.model.weight_map import Shape

TOKEN_EMBEDDING = "token_embd.weight"
OUTPUT = "output.weight"

IGNORED = frozenset(
    {
        "tensor_data_layout",  # the words "Meta AI original pth"; the layout follows from the architecture
        "vocab_size",  # compared with the embedding table by vocabulary_size
    }
)
"""Architecture keys that say nothing the tensors do not say."""

_ID_KEYS = ("tokenizer.ggml.eos_token_id", "tokenizer.ggml.eot_token_id", "tokenizer.ggml.eom_token_id")


def architecture_keys(metadata: Mapping[str, object], arch: str) -> Keys:
    """The keys below ``arch.``, without that prefix."""
    prefix = arch + "."
    return Keys({k.removeprefix(prefix): v for k, v in metadata.items() if k.startswith(prefix)}, f"GGUF {arch} keys")


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


def attention(keys: Keys, d_model: int, **extras: float | None) -> AttentionSpec:
    """Heads and head size; ``extras`` are further fields of AttentionSpec."""
    n_heads = keys.integer("attention.head_count")
    # llama.cpp: no head_count_kv means one key/value head per query head.
    n_kv_heads = keys.integer("attention.head_count_kv") if keys.given("attention.head_count_kv") else n_heads
    # llama.cpp: no key_length means embedding_length / head_count.
    given = keys.given("attention.key_length")
    head_dim = keys.integer("attention.key_length") if given else equal_heads(d_model, n_heads)
    keys.must_be("attention.value_length", head_dim)
    keys.must_be("rope.dimension_count", head_dim)
    keys.must_be("attention.causal", True)
    return AttentionSpec(n_heads=n_heads, n_kv_heads=n_kv_heads, head_dim=head_dim, **extras)


def rope_theta(keys: Keys) -> float:
    """The rotary base, after refusing every kind of context scaling."""
    keys.must_be("rope.scaling.type", "none", "linear")  # linear with factor 1 is no scaling
    keys.must_be("rope.scaling.factor", 1, 0)
    keys.must_be("rope.scale_linear", 1, 0)
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
    attn = config.attn
    eps = "layer_norm_rms_epsilon" if config.norm.kind == "rms" else "layer_norm_epsilon"
    return {
        f"{arch}.block_count": config.n_layers,
        f"{arch}.context_length": config.max_seq_len,
        f"{arch}.embedding_length": config.d_model,
        f"{arch}.feed_forward_length": config.ffn.d_ff,
        f"{arch}.vocab_size": config.vocab_size,
        f"{arch}.attention.head_count": attn.n_heads,
        f"{arch}.attention.head_count_kv": attn.n_kv_heads,
        f"{arch}.attention.{eps}": config.norm.eps,
        **token_id_keys(config),
    }


def must_read_back(
    config: ModelConfig,
    read: Callable[[Mapping[str, object], Mapping[str, Shape]], ModelConfig],
    metadata: Mapping[str, object],
    form: str,
) -> None:
    """Raise unless ``metadata`` reads back as ``config``, training-only settings aside, which GGUF has no keys for."""
    shapes = {TOKEN_EMBEDDING: (config.vocab_size, config.d_model)}
    if not config.tied_embeddings:
        shapes[OUTPUT] = (config.vocab_size, config.d_model)
    inference = config
    if isinstance(config.ffn, MoESpec):
        inference = replace(config, ffn=replace(config.ffn, aux_loss_weight=0.0, jitter_eps=None))
    base.must_read_back(inference, read(metadata, shapes), form)


def with_scale(attn: AttentionSpec, value: float) -> AttentionSpec:
    """``attn`` with the stored attention scale; left out where it is the usual 1/sqrt(head_dim)."""
    usual = attn.head_dim**-0.5
    return attn if exact_or(value, usual) == usual else replace(attn, scale=value)
