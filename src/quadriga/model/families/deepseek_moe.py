"""The mixture of DeepSeek-V3 as config.json and GGUF state it, both ways; shared by GLM-4.5 and dots1, and by V2's.

    first_k_dense_replace   the first layers have one network (intermediate_size), all others experts
    n_routed_experts        sigmoid scores, a stored correction for the choice alone, groups of which the best are open
    n_shared_experts        networks that every token visits, stored as one of their widths together
    routed_scaling_factor   what the weights of the chosen are multiplied by, after the division by their sum

Sources: transformers 4.57.6 (modeling_glm4_moe, modeling_dots1: the same router), llama.cpp (build_moe_ffn).
transformers gives experts in closed groups the score 0, llama.cpp minus infinity, as here: they differ where a
corrected score in an open group is negative. Published models of these families have one group.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from quadriga.model.config import DenseSpec, ModelConfig, MoESpec, countable, uniform
from quadriga.model.families import gguf_keys
from quadriga.model.families.base import of_kind
from quadriga.model.families.keys import Keys, shortest_float32
from quadriga.model.families.llama2 import common_to_gguf
from quadriga.model.weight_map import Shape

EPS = 1e-20
"""What is added to the sum of the chosen scores before dividing by it (transformers; llama.cpp has 0)."""


def ffns_from_hf(keys: Keys, n_layers: int, **mixture: Any) -> list[DenseSpec | MoESpec]:
    """The feed-forward of every layer.

    Args:
        mixture: fields of the mixtures that differ from DeepSeek-V3's.
    """
    width = keys.integer("moe_intermediate_size")
    grouped = keys.given("n_group") or keys.given("topk_group")
    moe = MoESpec(
        d_ff=width,
        n_experts=keys.integer("n_routed_experts"),
        top_k=keys.integer("num_experts_per_tok"),
        activation="silu",
        score="sigmoid",
        correction=True,
        n_groups=keys.integer("n_group") if grouped else 1,
        top_k_groups=keys.integer("topk_group") if grouped else 1,
        normalize_p=1.0 if keys.flag("norm_topk_prob") else None,
        normalize_eps=EPS,
        routed_scale=keys.number("routed_scaling_factor"),
        shared=DenseSpec(d_ff=width * keys.integer("n_shared_experts"), activation="silu"),
    )
    moe = replace(moe, **mixture)
    dense = DenseSpec(d_ff=keys.integer("intermediate_size"), activation="silu")
    first = keys.integer("first_k_dense_replace")
    return [dense if i < first else moe for i in range(countable(n_layers))]


def to_hf(config: ModelConfig, form: str) -> dict[str, object]:
    """The keys that :func:`ffns_from_hf` reads."""
    moe = config.only_moe(form)
    shared, dense = of_kind(moe.shared, DenseSpec, form), first_dense(config)
    return {
        # Where no layer is dense, nothing is of this width.
        "intermediate_size": config.layers[0].ffn.d_ff if dense else moe.d_ff * moe.top_k,
        "moe_intermediate_size": moe.d_ff,
        "n_routed_experts": moe.n_experts,
        "num_experts_per_tok": moe.top_k,
        "n_shared_experts": shared.d_ff // moe.d_ff,
        "n_group": moe.n_groups,
        "topk_group": moe.top_k_groups,
        "norm_topk_prob": moe.normalize_p is not None,
        "routed_scaling_factor": moe.routed_scale,
        "first_k_dense_replace": dense,
    }


def first_dense(config: ModelConfig) -> int:
    """How many layers come before the first mixture."""
    return next((i for i, layer in enumerate(config.layers) if layer.moe is not None), config.n_layers)


def like_its_mixtures(config: ModelConfig) -> ModelConfig:
    """A model whose layers are all like its first mixture: what keys that all layers share are written from."""
    return replace(config, layers=uniform(config.layers[first_dense(config)], config.n_layers))


_MLP = "model.layers.{i}.mlp."
_PARTS = ("gate", "up", "down")
HF_MIXTURE = {
    _MLP + "gate.weight": "layers.{i}.moe.router.weight",
    _MLP + "gate.e_score_correction_bias": "layers.{i}.moe.router.correction",
    **{f"{_MLP}shared_experts.{part}_proj.weight": f"layers.{{i}}.moe.shared.w_{part}" for part in _PARTS},
}
"""The tensors of a mixture but those of its experts, as transformers names them."""

SOFTMAX, SIGMOID = 1, 2
"""``gguf.ExpertGatingFuncType``."""


def ffns_from_gguf(keys: Keys, n_layers: int, *, groups: bool = False, **mixture: Any) -> list[DenseSpec | MoESpec]:
    """The feed-forward of every layer.

    Args:
        groups: whether the architecture may have groups of experts; where not, there must be one.
        mixture: fields of the mixtures that differ from DeepSeek-V3's.
    """
    width = keys.integer("expert_feed_forward_length")
    # llama.cpp: no scale, or 0, multiplies by nothing; no norm does not divide.
    scale = shortest_float32(keys.number("expert_weights_scale")) if keys.given("expert_weights_scale") else 1.0
    normalised = keys.given("expert_weights_norm") and keys.flag("expert_weights_norm")
    counts = []
    for key in ("expert_group_count", "expert_group_used_count"):
        if not groups:
            keys.must_be(key, 0, 1)  # llama.cpp has groups in other architectures only
        counts.append((keys.integer(key) or 1) if keys.given(key) else 1)
    n_shared = keys.integer("expert_shared_count")
    keys.must_be("expert_shared_feed_forward_length", width * n_shared, 0)
    moe = MoESpec(
        d_ff=width,
        n_experts=keys.integer("expert_count"),
        top_k=keys.integer("expert_used_count"),
        activation="silu",
        score="sigmoid",
        correction=True,
        normalize_p=1.0 if normalised else None,
        normalize_eps=EPS,
        routed_scale=scale or 1.0,
        n_groups=counts[0],
        top_k_groups=counts[1],
        shared=DenseSpec(d_ff=width * n_shared, activation="silu"),
    )
    moe = replace(moe, **mixture)
    dense = DenseSpec(d_ff=keys.integer("feed_forward_length"), activation="silu")
    first = keys.integer("leading_dense_block_count") if keys.given("leading_dense_block_count") else 0
    return [dense if i < first else moe for i in range(countable(n_layers))]


def config_to_gguf(
    config: ModelConfig, arch: str, read: Callable[[Mapping[str, object], Mapping[str, Shape]], ModelConfig]
) -> dict[str, object]:
    """Write the keys of a GGUF of LLaMA's block with such mixtures.

    Args:
        read: the family's ``config_from_gguf``, which must find the same model in them.
    """
    form = f"GGUF arch {arch}"
    metadata = {**common_to_gguf(like_its_mixtures(config), form, arch), **to_gguf(config, arch)}
    gguf_keys.must_read_back(config, read, metadata, form)
    return metadata


def to_gguf(config: ModelConfig, arch: str) -> dict[str, object]:
    """The keys that :func:`ffns_from_gguf` reads."""
    form = f"GGUF arch {arch}"
    moe = config.only_moe(form)
    shared, dense = of_kind(moe.shared, DenseSpec, form), first_dense(config)
    return {
        f"{arch}.feed_forward_length": config.layers[0].ffn.d_ff if dense else moe.d_ff * moe.top_k,
        f"{arch}.leading_dense_block_count": dense,
        f"{arch}.expert_count": moe.n_experts,
        f"{arch}.expert_used_count": moe.top_k,
        f"{arch}.expert_feed_forward_length": moe.d_ff,
        f"{arch}.expert_shared_count": shared.d_ff // moe.d_ff,
        f"{arch}.expert_gating_func": SIGMOID if moe.score == "sigmoid" else SOFTMAX,
        f"{arch}.expert_weights_norm": moe.normalize_p is not None,
        f"{arch}.expert_weights_scale": moe.routed_scale,
    }


GGUF_CORRECTION = {"blk.{i}.exp_probs_b.bias": "layers.{i}.moe.router.correction"}
GGUF_MIXTURE = gguf_keys.ROUTER | gguf_keys.MERGED_EXPERTS | gguf_keys.SHARED_EXPERT | GGUF_CORRECTION
"""The tensors of a mixture with a shared network, as llama.cpp names them."""
