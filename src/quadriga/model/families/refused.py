"""Families that are known and not computed, and what each would need: a refusal says more than a list of others.

Names are values of ``model_type`` in config.json (transformers 5.24.0) and of ``general.architecture`` in GGUF.
"""

from __future__ import annotations

from collections.abc import Mapping

_SPARSE = "its attention picks keys by an index of its own"
_CHUNKS = "its attention sees chunks of the text, and scales queries by their position"
_LIGHTNING = "most of its layers are lightning attention, whose heads forget at rates of their own"
_MAMBA_1 = "most of its layers are Mamba-1, whose every channel forgets by itself"
_STREAMS = "it carries several residual streams and embeddings of each layer's own"

_HYPER = "its layers mix several residual streams (hyper-connections)"
_CHANNELS = "most of its layers are a delta rule that forgets by the channel (KDA)"
_RELATIVE = "its attention adds a score for every distance that the token itself chooses"
_PAIR = "it is an encoder and a decoder, or an encoder alone; only decoders are computed"

REASONS: Mapping[str, str] = {
    "glm_moe_dsa": _SPARSE,
    "deepseek_v32": _SPARSE,
    **dict.fromkeys(("axk2", "dots3_note", "mistral_large4", "minimax_m3_vl", "qwen4_exp"), _SPARSE),
    **dict.fromkeys(("deepseek_v4", "hy_v4", "hy_v4_vl", "glm5_next"), _HYPER),
    "llama4": _CHUNKS,
    "llama4_text": _CHUNKS,
    "minimax": _LIGHTNING,
    "kimi_linear": _CHANNELS,
    "bailing_hybrid": _CHANNELS,
    "jamba": _MAMBA_1,
    **dict.fromkeys(("inkling_mm_model", "inkling2", "inkling2_loop"), _RELATIVE),
    "muse_spark": "a gate a channel weighs each of its layers against what came before",
    "longcat_flash": "its layers have two attentions, and some of its experts only hand on what they are given",
    "jetmoe": "its attention chooses experts too",
    "zaya": "its queries and keys are convolved, and its values wait for a token",
    "doge": "its attention picks keys by a mask that it computes of their values",
    "diffusion_gemma": "it writes many tokens at once and mends them (diffusion)",
    **dict.fromkeys(("nllb-moe", "switch_transformers", "openai_privacy_filter"), _PAIR),
    "gemma3n": _STREAMS,
    "gemma3n_text": _STREAMS,
}
"""model_type or architecture -> what in it is not computed."""

GGUF_ALONE: Mapping[str, str] = {
    "phimoe": "llama.cpp's program divides the two experts' weights by their sum, as the model's own router does not; "
    "its Hugging Face directory is read",
}
"""Architectures of GGUF whose models are computed, from other files."""


def reason(name: str) -> str:
    """A sentence about a family that is known and not computed; empty for any other name."""
    return f" {name} is known and not computed: {REASONS[name]}." if name in REASONS else ""


def gguf_reason(arch: str) -> str:
    """The same of a GGUF architecture."""
    return f" {arch} is not read from GGUF: {GGUF_ALONE[arch]}." if arch in GGUF_ALONE else reason(arch)
