"""Qwen3-VL's directories as transformers 4.57.6 writes them, and as version 5 does: the text computes what its own does."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from quadriga import load
from quadriga.errors import CheckpointError, ConfigError
from quadriga.io.convert import convert
from quadriga.io.detect import locate
from quadriga.io.open import open_checkpoint
from quadriga.model import families
from quadriga.model.weight_map import source_shapes
from tests.checkpoint.models import TINY
from tests.golden.weights import TOKENS

TEXT: dict[str, Any] = {
    "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 3, "num_attention_heads": 6, "num_key_value_heads": 2,
    "head_dim": 16, "vocab_size": 97, "max_position_embeddings": 128, "rms_norm_eps": 1e-6, "rope_theta": 5000.0,
    "rope_scaling": {"rope_type": "default", "mrope_section": [4, 2, 2], "mrope_interleaved": True}, "bos_token_id": 1,
    "eos_token_id": 2,
}  # fmt: skip
MOE = {
    "moe_intermediate_size": 20, "num_experts": 5, "num_experts_per_tok": 3, "decoder_sparse_step": 1,
    "mlp_only_layers": [1], "norm_topk_prob": True,
}  # fmt: skip
PICTURES = {
    "depth": 1, "hidden_size": 32, "intermediate_size": 40, "num_heads": 2, "out_hidden_size": 48,
    "num_position_embeddings": 16, "deepstack_visual_indexes": [0],
}  # fmt: skip
EXPERTS = "model.language_model.layers.{i}.mlp.experts."


@pytest.fixture(scope="module", params=["dense", "tied", "mixture"])
def theirs(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, np.ndarray]:
    """A directory that transformers wrote, and its logits of a text."""
    from transformers import (
        Qwen3VLConfig,
        Qwen3VLForConditionalGeneration,
        Qwen3VLMoeConfig,
        Qwen3VLMoeForConditionalGeneration,
    )

    moe = request.param == "mixture"
    settings, module = (
        (Qwen3VLMoeConfig, Qwen3VLMoeForConditionalGeneration)
        if moe
        else (Qwen3VLConfig, Qwen3VLForConditionalGeneration)
    )
    tied = {"tie_word_embeddings": request.param == "tied"}  # version 4 goes by the text's, version 5 by the other
    config = settings(text_config=TEXT | (MOE if moe else {}) | tied, vision_config=PICTURES, **tied)
    model = module._from_config(config, attn_implementation="eager", dtype=torch.float32).eval()
    torch.manual_seed(0)
    with torch.no_grad():
        for values in model.parameters():
            values.normal_(0.0, 0.3) if values.ndim > 1 else values.normal_(1.0, 0.2)
        model.tie_weights()
        logits = model(input_ids=torch.tensor([TOKENS]), use_cache=False).logits[0].numpy()
    folder = tmp_path_factory.mktemp(request.param)
    model.save_pretrained(folder)
    return folder, logits


def distance(folder: Path, wanted: np.ndarray) -> float:
    logits = load(folder, format="float32", kv_format="float32", threads=1).logits(TOKENS)
    return float(np.abs(logits - wanted).max() / np.ptp(wanted))


def test_logits_of_the_text(theirs: tuple[Path, np.ndarray], tmp_path: Path) -> None:
    folder, wanted = theirs
    assert distance(folder, wanted) <= 2e-5
    assert any("pictures is left out" in note for note in locate(folder).notes)
    convert(folder, tmp_path / "text", to="hf")  # under Qwen3's own names
    assert json.loads((tmp_path / "text" / "config.json").read_text())["model_type"] in ("qwen3", "qwen3_moe")
    assert distance(tmp_path / "text", wanted) <= 2e-5


def test_experts_as_transformers_5_saves_them(theirs: tuple[Path, np.ndarray], tmp_path: Path) -> None:
    folder, wanted = theirs
    tensors = load_file(folder / "model.safetensors")
    if EXPERTS.format(i=0) + "down_proj" not in tensors:
        assert not any("experts" in name for name in tensors)
        return
    for name in tensors:
        if ".mlp.experts." in name:
            tensors[name] = tensors[name].transpose(1, 2).contiguous()
    save_file(tensors, tmp_path / "model.safetensors")
    raw = json.loads((folder / "config.json").read_text())
    raw["text_config"]["num_local_experts"] = raw["text_config"].pop("num_experts")
    raw["text_config"].pop("norm_topk_prob")
    (tmp_path / "config.json").write_text(json.dumps(raw | {"text_config": raw["text_config"]}))
    assert open_checkpoint(tmp_path).layout == "vl5"
    assert distance(tmp_path, wanted) <= 2e-5


CONFIG: dict[str, Any] = {
    "model_type": "qwen3_vl_moe", "tie_word_embeddings": False, "vision_config": PICTURES, "image_token_id": 9,
    "text_config": {
        "model_type": "qwen3_vl_moe_text", "attention_bias": False, "hidden_act": "silu", "tie_word_embeddings": True,
        **TEXT, **MOE,
    },
}  # fmt: skip


def test_the_whole_model_says_whether_tables_are_tied() -> None:
    """transformers 5 writes its class's default into the text's section."""
    config = families.config_from_hf(CONFIG)
    assert not config.tied_embeddings and config.family == "qwen3moe"
    assert families.config_from_hf(CONFIG | {"tie_word_embeddings": True}).tied_embeddings


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"deepstack": 1}, "has the key 'deepstack'"),
        ({"text_config": CONFIG["text_config"] | {"norm_topk_prob": False}}, "norm_topk_prob must be True"),
        ({"text_config": CONFIG["text_config"] | {"model_type": "qwen3"}}, "model_type must be 'qwen3_vl_moe_text'"),
        ({"text_config": None}, "text_config must be a JSON object"),
        (
            {"text_config": CONFIG["text_config"] | {"rope_scaling": {"rope_type": "default", "mrope_part": 3}}},
            "has the key 'mrope_part'",
        ),
    ],
)
def test_what_is_not_read_is_refused_by_name(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        families.config_from_hf(CONFIG | change)


@pytest.mark.parametrize(("name", "own"), [("qwen3", "qwen3vl"), ("qwen3moe", "qwen3vlmoe")])
def test_gguf_archs_of_its_own(name: str, own: str) -> None:
    family, config = families.FAMILIES[name], TINY[name]
    assert family.config_to_gguf is not None and family.gguf_map is not None
    shapes = source_shapes(family.gguf_map(config))
    written = {key.replace(f"{name}.", f"{own}.", 1): value for key, value in family.config_to_gguf(config).items()}
    pictures = {f"{own}.rope.dimension_sections": [3, 2, 2, 0], f"{own}.n_deepstack_layers": 3}
    said = {"general.architecture": own, **written, **pictures}
    read = families.config_from_gguf(said, shapes)
    assert read == families.config_from_gguf({"general.architecture": name, **family.config_to_gguf(config)}, shapes)
    with pytest.raises(ConfigError, match=r"has the key 'rope\.sections'"):
        families.config_from_gguf(said | {f"{own}.rope.sections": 1}, shapes)


def test_a_copy_of_a_tied_table_must_be_one(tmp_path: Path) -> None:
    raw = CONFIG | {"tie_word_embeddings": True}
    folder = _written(tmp_path / "m", raw)
    tensors = load_file(folder / "model.safetensors")
    table = tensors["model.language_model.embed_tokens.weight"]
    save_file(tensors | {"lm_head.weight": table.clone()}, folder / "model.safetensors")
    assert "lm_head.weight" not in {piece.source for piece in open_checkpoint(folder).pieces}
    save_file(tensors | {"lm_head.weight": table + 1}, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match="stores two different tensors"):
        open_checkpoint(folder)


def test_its_own_names_are_not_written(tmp_path: Path) -> None:
    with pytest.raises((ConfigError, CheckpointError), match="is read and not written"):
        convert(_written(tmp_path / "a"), tmp_path / "b", to="hf", layout="vl")


def _written(folder: Path, raw: dict[str, Any] = CONFIG) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(raw))
    config = families.config_from_hf(raw)
    shapes = source_shapes(families.family_of(config).layouts["vl"](config))
    save_file({name: torch.zeros(shape) for name, shape in shapes.items()}, folder / "model.safetensors")
    return folder
