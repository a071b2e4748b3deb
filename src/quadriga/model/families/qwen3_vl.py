"""Qwen3-VL (Alibaba, September 2025) as text: Qwen3's blocks under other names, dense and as mixtures.

    config.json    the text's keys are a section; whether tables are tied is said outside, for the whole model
    tensors        model.language_model.* in place of model.*; experts of a layer in two tensors, (E, D, 2 F) with gate
                   before up, and (E, F, D); transformers 5 saves them as (E, 2 F, D) and (E, D, F)

Rotary pairs are dealt to time, height and width of pictures (``mrope_section``); for text all three are the position.
What the part for pictures adds to the first layers (deepstack) is nothing where there are none. GGUF has it as archs
qwen3vl and qwen3vlmoe, whose tensors are those of qwen3 and qwen3moe. Sources: transformers 4.57.6 and 5.24.0
(configuration and modeling_qwen3_vl_moe, conversion_mapping), llama.cpp (src/models/qwen3vl.cpp).
"""

from __future__ import annotations

from collections.abc import Mapping

from quadriga.model.config import ModelConfig
from quadriga.model.families.gguf_keys import architecture_keys
from quadriga.model.families.keys import PRETRAINED_KEYS, Keys
from quadriga.model.families.pieces import copies
from quadriga.model.families.rope_keys import without_pictures
from quadriga.model.weight_map import Piece

PICTURES = "model.visual.*"
"""Tensors of the part that reads them."""
READ_ONLY = dict.fromkeys(("vl", "vl5"), "a text alone is written as Qwen3's own directories have it")
_KEYS_OF_PICTURES = frozenset(
    {"vision_config", "image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id"}
)
_LOSS = 0.001
"""``router_aux_loss_coef`` of the class, which published files leave out; for training alone."""


def text_of(raw: Mapping[str, object], model_type: str) -> Mapping[str, object]:
    """The text's keys as Qwen3's own config.json has them.

    Args:
        model_type: "qwen3_vl" or "qwen3_vl_moe", which ``raw`` is.

    Raises:
        ConfigError: no section for the text, or a key outside it that is not known.
    """
    outer = Keys(raw, "config.json")
    outer.must_be("model_type", model_type)
    inner, section = outer.section("text_config"), outer.mapping("text_config")
    inner.must_be("model_type", f"{model_type}_text")
    tied = outer.flag("tie_word_embeddings")
    outer.finish(PRETRAINED_KEYS | _KEYS_OF_PICTURES | {"bos_token_id", "eos_token_id", "pad_token_id"})
    text = {**section, "model_type": model_type.replace("_vl", ""), "tie_word_embeddings": tied}
    if model_type.endswith("moe"):
        inner.must_be("norm_topk_prob", True)
        text = {"router_aux_loss_coef": _LOSS, "norm_topk_prob": True, **text}
    return without_pictures(text, "rope_scaling", "rope_parameters")


def gguf_keys_of(metadata: Mapping[str, object], arch: str) -> Keys:
    """The keys of arch ``qwen3`` or ``qwen3moe``, or of Qwen3-VL's own, which has two more for pictures."""
    own = arch.replace("qwen3", "qwen3vl")
    if metadata.get("general.architecture") != own:
        return architecture_keys(metadata, arch)
    pictures = (f"{own}.rope.dimension_sections", f"{own}.n_deepstack_layers")
    return architecture_keys({key: value for key, value in metadata.items() if key not in pictures}, own)


def experts(config: ModelConfig) -> list[Piece]:
    """All experts of a layer in two tensors, inputs before outputs."""
    name = "model.layers.{i}.mlp.experts."
    pieces = copies(config, {name + "down_proj": "layers.{i}.moe.w_down"}, transpose=True)
    for i, spec in config.moe_layers:
        e, d, f = spec.n_experts, config.d_model, spec.d_ff
        pieces += [
            Piece(
                source=name.format(i=i) + "gate_up_proj",
                source_shape=(e, d, 2 * f),
                source_box=((0, e), (0, d), (start, start + f)),
                target=f"layers.{i}.moe.{part}",
                target_shape=(e, f, d),
                transpose=True,
            )
            for part, start in (("w_gate", 0), ("w_up", f))
        ]
    return pieces


def notes(raw: Mapping[str, object]) -> list[str]:
    """What is said of the part that is left out."""
    return ["the part that reads pictures is left out; text is read as it is"] if raw.get("vision_config") else []
