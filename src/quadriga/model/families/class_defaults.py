"""What transformers took for a key that a config.json of its time does not have: a dated table, not a guess.

LLaMA-1, LLaMA-2 and TinyLlama were published before ``rope_theta`` was a key: their base of 10000 stood in the program.
The rows below are the class defaults of ``LlamaConfig``, ``MixtralConfig`` and others, read in the wheels of
transformers 4.28.1, 4.31.0, 4.33.1, 4.36.2, 4.37.2, 4.38.2, 4.39.3, 4.45.2, 4.54.0, 4.57.6, 5.2.0 and 5.24.0; only
values that are the same in all of them since the release named are here. ``quadriga info`` says what is filled in.

No row: a key that is missing stays missing, and the family's reader refuses the file. DBRX's rotary base has none: the
class's 10000 is wrong for every DBRX there is.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class ClassDefault:
    """One key's default."""

    value: float
    since: str
    """The first release of transformers that has it."""
    instead: str = ""
    """A key that says the same elsewhere: where it is given, nothing is filled in."""


CLASS_DEFAULTS: Mapping[str, Mapping[str, ClassDefault]] = {
    "llama": {
        # No key before 4.33: LlamaRotaryEmbedding(base=10000) in modeling_llama.py.
        "rope_theta": ClassDefault(10_000.0, "4.28", instead="rope_parameters"),
        "max_position_embeddings": ClassDefault(2048, "4.28"),
    },
    "mixtral": {
        "rope_theta": ClassDefault(1_000_000.0, "4.36", instead="rope_parameters"),
        "num_key_value_heads": ClassDefault(8, "4.36"),
        "router_aux_loss_coef": ClassDefault(0.001, "4.36"),
    },
    "ernie4_5_moe": {
        # The release's own file leaves out what has no say in an answer, or the only value there is.
        "moe_norm_min": ClassDefault(1e-12, "4.54"),
        "moe_layer_end_index": ClassDefault(-1, "4.54"),
        "moe_layer_interval": ClassDefault(1, "4.54"),
        "router_aux_loss_coef": ClassDefault(0.001, "4.54"),
    },
    "minimax_m2": {
        "router_aux_loss_coef": ClassDefault(0.001, "5.24"),
    },
    "gemma3_text": {
        # The text's section in the files of the models that see pictures has the sizes of the network alone.
        "vocab_size": ClassDefault(262_208, "4.57"),
        "num_attention_heads": ClassDefault(8, "4.57"),
        "num_key_value_heads": ClassDefault(4, "4.57"),
        "head_dim": ClassDefault(256, "4.57"),
        "max_position_embeddings": ClassDefault(131_072, "4.57"),
        "rms_norm_eps": ClassDefault(1e-6, "4.57"),
        "query_pre_attn_scalar": ClassDefault(256, "4.57"),
        "rope_theta": ClassDefault(1_000_000.0, "4.57", instead="rope_parameters"),
        "rope_local_base_freq": ClassDefault(10_000.0, "4.57", instead="rope_parameters"),
    },
    "olmoe": {
        # The first release's file leaves it out.
        "rms_norm_eps": ClassDefault(1e-5, "4.45"),
    },
}


def filled(raw: Mapping[str, object]) -> tuple[dict[str, object], list[str]]:
    """A config.json with its class's defaults, and a sentence for each that was filled in.

    Args:
        raw: a parsed config.json with a ``model_type``.
    """
    full, notes = dict(raw), []
    for key, default in CLASS_DEFAULTS.get(str(raw.get("model_type")), {}).items():
        if key in raw or raw.get(default.instead) is not None:
            continue
        full[key] = default.value
        named = raw.get("transformers_version")
        written = f" (this file was written by {str(named)[:20]})" if named is not None else ""
        notes.append(
            f"config.json does not give {key}: {default.value:.12g} is taken, the class's default since transformers "
            f"{default.since}{written}"
        )
    return full, notes
