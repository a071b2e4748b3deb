"""Metadata of GGUF files of Gemma 4 (arch gemma4).

Sources: see :mod:`quadriga.model.families.gemma4`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from quadriga.errors import ConfigError
from quadriga.model.config import (
    AttentionSpec,
    DenseSpec,
    ModelConfig,
    MoESpec,
    NormSpec,
    ProportionalScaling,
    QKNormSpec,
    RopeSpec,
)
from quadriga.model.families import gguf_keys
from quadriga.model.families.base import of_kind
from quadriga.model.families.gemma4_layers import both_kinds, layers_of
from quadriga.model.families.keys import Keys
from quadriga.model.families.rope_keys import FREQS, VALUES
from quadriga.model.weight_map import Shape

ARCH = "gemma4"


def from_gguf(metadata: Mapping[str, object], shapes: Mapping[str, Shape]) -> ModelConfig:
    """Read a GGUF of arch ``gemma4``."""
    attends, near_heads, far_heads = _kinds(metadata)
    by_layer = {f"{ARCH}.attention.{key}" for key in ("sliding_window_pattern", "head_count_kv")}
    keys = gguf_keys.architecture_keys({k: v for k, v in metadata.items() if k not in by_layer}, ARCH)
    for key in ("embedding_length_per_layer_input", "attention.shared_kv_layers"):
        keys.must_be(key, 0)
    norm = NormSpec(kind="rms", eps=gguf_keys.number(keys, "attention.layer_norm_rms_epsilon"))
    head_dim, n_heads = keys.integer("attention.key_length_swa"), keys.integer("attention.head_count")
    keys.must_be("attention.value_length_swa", head_dim)
    keys.must_be("rope.dimension_count_swa", head_dim)
    sliding = AttentionSpec(
        n_heads=n_heads,
        n_kv_heads=near_heads,
        head_dim=head_dim,
        position=RopeSpec(theta=gguf_keys.number(keys, "rope.freq_base_swa")),
        scale=1.0,
        qk_norm=QKNormSpec(over="head", eps=norm.eps),
        v_norm_eps=norm.eps,
        window=keys.integer("attention.sliding_window"),
    )
    full_dim = keys.integer("attention.key_length")
    keys.must_be("attention.value_length", full_dim)
    keys.must_be("rope.dimension_count", full_dim)
    full = replace(
        sliding,
        n_kv_heads=far_heads,
        head_dim=full_dim,
        window=None,
        keys_as_values=f"blk.{attends.index(True)}.attn_v.weight" not in shapes,
        position=RopeSpec(theta=gguf_keys.number(keys, "rope.freq_base"), scaling=_turning(metadata, full_dim)),
    )
    d_model = keys.integer("embedding_length")
    cap = gguf_keys.number(keys, "final_logit_softcapping") if keys.given("final_logit_softcapping") else 0.0
    keys.must_be("block_count", len(attends))
    config = ModelConfig(
        family="gemma4",
        vocab_size=gguf_keys.vocabulary_size(keys, shapes),
        d_model=d_model,
        max_seq_len=keys.integer("context_length"),
        layers=layers_of(norm, sliding, full, _ffn(keys), attends),
        final_norm=norm,
        tied_embeddings=gguf_keys.OUTPUT not in shapes,
        embedding_scale=max(d_model, 1) ** 0.5,
        logit_cap=cap or None,
        **gguf_keys.token_ids(metadata),
    )
    keys.finish(gguf_keys.IGNORED)
    return config


def _kinds(metadata: Mapping[str, object]) -> tuple[list[bool], int, int]:
    """Which layers see all, and the heads of keys of those that do not and of those that do."""
    pattern = metadata.get(f"{ARCH}.attention.sliding_window_pattern")
    if not isinstance(pattern, list) or {bool(one) for one in pattern} != {True, False}:
        raise ConfigError(
            f"GGUF {ARCH}.attention.sliding_window_pattern must be true for each layer with a window and false for "
            f"each without, of which there must be both; got {str(pattern)[:80]}"
        )
    heads = metadata.get(f"{ARCH}.attention.head_count_kv")
    counts = [heads] * len(pattern) if isinstance(heads, int) else heads
    if not isinstance(counts, list) or len(counts) != len(pattern):
        raise ConfigError(f"GGUF {ARCH}.attention.head_count_kv must be a number a layer, got {str(heads)[:80]}")
    near, far = (
        {n for n, has_window in zip(counts, pattern, strict=True) if bool(has_window) == one} for one in (1, 0)
    )
    if len(near) != 1 or len(far) != 1:
        raise ConfigError(
            f"GGUF {ARCH}.attention.head_count_kv must be the same in all layers of a kind, got {str(heads)[:80]}"
        )
    return [not one for one in pattern], near.pop(), far.pop()


def _turning(metadata: Mapping[str, object], head_dim: int) -> ProportionalScaling:
    """The part of the pairs that turns: those whose frequency is divided by 1, the others by a number without end."""
    values = metadata.get(VALUES + FREQS)
    n_pairs = head_dim // 2
    turning = values.count(1.0) if isinstance(values, list) else 0
    if not isinstance(values, list) or len(values) != n_pairs or min(values[turning:], default=1e30) < 1e20:
        raise ConfigError(
            f"the GGUF file's {FREQS} must be {n_pairs} factors, 1 for the first pairs and 1e30 for those that do not "
            f"turn; got {str(values)[:80]}"
        )
    if any(value != 1.0 for value in values[:turning]):
        raise ConfigError(f"the GGUF file's {FREQS} must begin with the pairs that turn; got {str(values)[:80]}")
    return ProportionalScaling(part=turning / n_pairs)


def _ffn(keys: Keys) -> DenseSpec | MoESpec:
    dense = DenseSpec(d_ff=keys.integer("feed_forward_length"), activation="gelu_tanh")
    if not keys.given("expert_count") or keys.integer("expert_count") == 0:
        for key in ("expert_used_count", "expert_feed_forward_length"):
            keys.has(key)
        return dense
    return MoESpec(
        d_ff=keys.integer("expert_feed_forward_length"),
        n_experts=keys.integer("expert_count"),
        top_k=keys.integer("expert_used_count"),
        activation="gelu_tanh",
        shared=dense,
        apart=True,
    )


def to_gguf(config: ModelConfig) -> dict[str, object]:
    """Write the keys of a GGUF of arch ``gemma4``."""
    form = f"GGUF arch {ARCH}"
    sliding, full = both_kinds(config, form)
    near, far, moe = sliding.attention, full.attention, sliding.moe
    network = of_kind(sliding.ffn if moe is None else moe.shared, DenseSpec, form)
    written: dict[str, object] = {
        f"{ARCH}.block_count": config.n_layers,
        f"{ARCH}.context_length": config.max_seq_len,
        f"{ARCH}.embedding_length": config.d_model,
        f"{ARCH}.feed_forward_length": network.d_ff,
        f"{ARCH}.vocab_size": config.vocab_size,
        f"{ARCH}.embedding_length_per_layer_input": 0,
        f"{ARCH}.attention.head_count": near.n_heads,
        f"{ARCH}.attention.head_count_kv": [layer.attention.n_kv_heads for layer in config.layers],
        f"{ARCH}.attention.key_length": far.head_dim,
        f"{ARCH}.attention.value_length": far.head_dim,
        f"{ARCH}.attention.key_length_swa": near.head_dim,
        f"{ARCH}.attention.value_length_swa": near.head_dim,
        f"{ARCH}.attention.layer_norm_rms_epsilon": sliding.norm.eps,
        f"{ARCH}.attention.sliding_window": near.window,
        f"{ARCH}.attention.sliding_window_pattern": [layer.attention.window is not None for layer in config.layers],
        f"{ARCH}.attention.shared_kv_layers": 0,
        f"{ARCH}.rope.freq_base": of_kind(far.position, RopeSpec, form).theta,
        f"{ARCH}.rope.freq_base_swa": of_kind(near.position, RopeSpec, form).theta,
        f"{ARCH}.rope.dimension_count": far.head_dim,
        f"{ARCH}.rope.dimension_count_swa": near.head_dim,
        **gguf_keys.token_id_keys(config),
    }
    if config.logit_cap is not None:
        written[f"{ARCH}.final_logit_softcapping"] = config.logit_cap
    if moe is not None:
        written |= {
            f"{ARCH}.expert_count": moe.n_experts,
            f"{ARCH}.expert_used_count": moe.top_k,
            f"{ARCH}.expert_feed_forward_length": moe.d_ff,
        }
    gguf_keys.must_read_back(config, from_gguf, written, form)
    return written
