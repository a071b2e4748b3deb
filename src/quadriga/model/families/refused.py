"""Families that are known and not computed, and what each would need: a refusal says more than a list of others.

Names are values of ``model_type`` in config.json (transformers 5.24.0) and of ``general.architecture`` in GGUF.
"""

from __future__ import annotations

from collections.abc import Mapping

_MIXER = "its router (SparseMixer) weighs each of two experts by a softmax of its own, over the scores near the best"
_BEHIND = "its layers have norms behind attention and feed-forward only, none before them"
_LATENT = "its attention keeps one latent vector a token in place of keys and values (multi-head latent attention)"
_STATE_SPACE = "most of its layers are state-space models (Mamba)"
_GEMMA = "its blocks have norms on both sides of every branch, whose weights are stored less one"
_SPARSE = "its attention picks keys by an index of its own"

REASONS: Mapping[str, str] = {
    "phimoe": _MIXER,
    "flex_olmo": _BEHIND,
    "olmo2": _BEHIND,
    "olmo3": _BEHIND,
    "deepseek2": _LATENT,
    "deepseek_v2": _LATENT,
    "deepseek_v3": _LATENT,
    "glm4_moe_lite": _LATENT,
    "kimi_k2": _LATENT,
    "glm_moe_dsa": _SPARSE,
    "deepseek_v32": _SPARSE,
    "granitemoehybrid": _STATE_SPACE,
    "granitehybrid": _STATE_SPACE,
    "nemotron_h": _STATE_SPACE,
    "nemotron_h_moe": _STATE_SPACE,
    "gemma2": _GEMMA,
    "gemma3": _GEMMA,
    "gemma3_text": _GEMMA,
    "gemma4": _GEMMA,
    "gemma4_text": _GEMMA,
}
"""model_type or architecture -> what in it is not computed."""


def reason(name: str) -> str:
    """A sentence about a family that is known and not computed; empty for any other name."""
    return f" {name} is known and not computed: {REASONS[name]}." if name in REASONS else ""
