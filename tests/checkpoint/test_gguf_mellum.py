"""GGUF files of Mellum 2, made as llama.cpp's converter makes them, compute what the directory does; what is refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from quadriga.errors import ConfigError
from quadriga.io.gguf_source import GGUFSource
from quadriga.io.open import open_checkpoint
from quadriga.model import families
from quadriga.model.config import AttentionSpec, MoESpec, RopeSpec
from tests.checkpoint.gguf_twins import assert_computes, assert_same_tensors, write_tensors, write_twins
from tests.checkpoint.models import TINY
from tests.golden.checkpoints import config_json, weights

gguf = pytest.importorskip("gguf")
Array = np.ndarray[Any, Any]
NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "model.layers": "blk",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate.": "ffn_gate_inp.",
}


def tensors() -> dict[str, Array]:
    """What the file holds."""
    out: dict[str, Array] = {}
    stacks: dict[str, dict[int, Array]] = {}
    for source, x in weights("mellum").items():
        if ".experts." in source:
            parts = source.split(".")
            name = f"blk.{parts[2]}.ffn_{parts[6].removesuffix('_proj')}_exps.weight"
            stacks.setdefault(name, {})[int(parts[5])] = x
            continue
        target = source
        for theirs, mine in NAMES.items():
            target = target.replace(theirs, mine)
        out[target] = x
    return out | {name: np.stack([rows[e] for e in sorted(rows)]) for name, rows in stacks.items()}


def write(path: Path, name: str) -> None:
    """The file, by the gguf package."""
    c, arch = config_json(name), "mellum"
    far = c["rope_parameters"]["full_attention"]
    writer = gguf.GGUFWriter(path, arch)
    for key, value in {
        "block_count": c["num_hidden_layers"],
        "context_length": c["max_position_embeddings"],
        "embedding_length": c["hidden_size"],
        "feed_forward_length": c["intermediate_size"],
        "attention.head_count": c["num_attention_heads"],
        "attention.head_count_kv": c["num_key_value_heads"],
        "attention.key_length": c["head_dim"],
        "attention.value_length": c["head_dim"],
        "attention.sliding_window": c["sliding_window"],
        "rope.dimension_count": c["head_dim"],
        "rope.scaling.original_context_length": far["original_max_position_embeddings"],
        "expert_count": c["num_experts"],
        "expert_used_count": c["num_experts_per_tok"],
        "expert_feed_forward_length": c["moe_intermediate_size"],
    }.items():
        writer.add_uint32(f"{arch}.{key}", value)
    for key, value in {
        "rope.freq_base": far["rope_theta"],
        "rope.freq_base_swa": c["rope_parameters"]["sliding_attention"]["rope_theta"],
        "rope.scaling.factor": far["factor"],
        "rope.scaling.yarn_beta_fast": far["beta_fast"],
        "rope.scaling.yarn_beta_slow": far["beta_slow"],
        "attention.layer_norm_rms_epsilon": c["rms_norm_eps"],
    }.items():
        writer.add_float32(f"{arch}.{key}", value)
    writer.add_string(f"{arch}.rope.scaling.type", "yarn")
    slides = [kind == "sliding_attention" for kind in c["layer_types"]]
    writer.add_array(f"{arch}.attention.sliding_window_pattern", slides)
    write_tensors(writer, tensors())


def test_a_file_of_llama_cpp_computes_what_the_directory_does(tmp_path: Path) -> None:
    write(tmp_path / "x.gguf", "mellum")
    assert_computes(tmp_path / "x.gguf", "mellum", 2e-5)


def test_a_file_written_here_is_the_one_that_llama_cpp_s_converter_makes(tmp_path: Path) -> None:
    """Every tensor to the bit, from a directory; and written again from the file itself."""
    theirs = write_twins(tmp_path, "mellum", write)
    for file in ("ours.gguf", "again.gguf"):
        ours = GGUFSource(tmp_path / file)
        assert_same_tensors(ours, theirs, nearly=None)
        written = {key: value for key, value in theirs.metadata.items() if key.startswith("mellum.")}
        # Of no layer's width, and the base of the other key.
        for key in ("feed_forward_length", "rope.freq_base_swa"):
            del written[f"mellum.{key}"]
        assert {key: ours.metadata.get(key) for key in written} == written


def test_a_pattern_may_be_a_number(tmp_path: Path) -> None:
    write(tmp_path / "x.gguf", "mellum")
    source = GGUFSource(tmp_path / "x.gguf")
    key = "mellum.attention.sliding_window_pattern"
    config = families.config_from_gguf(source.metadata | {key: 2}, source.shapes)
    assert [layer.attention.window for layer in config.layers] == [7, None, 7, None]
    for wrong in ([True] * 3, 0, "sliding"):
        with pytest.raises(ConfigError, match="must be a number or 4 flags"):
            families.config_from_gguf(source.metadata | {key: wrong}, source.shapes)
    with pytest.raises(ConfigError, match=r"rope\.freq_base_swa must be 1000"):
        families.config_from_gguf(source.metadata | {"mellum.rope.freq_base_swa": 500.0}, source.shapes)


def test_dense_layers_and_the_names_of_transformers_5() -> None:
    raw = config_json("mellum")
    config = families.config_from_hf(raw)
    five = {key: value for key, value in raw.items() if key != "num_experts"} | {"num_local_experts": 5}
    assert families.config_from_hf(five) == config
    kinds = ["sparse", "dense", "sparse", "sparse"]
    dense = families.config_from_hf(raw | {"mlp_layer_types": kinds})
    assert [isinstance(layer.ffn, MoESpec) for layer in dense.layers] == [True, False, True, True]
    assert families.family_of(dense).config_to_hf(dense)["mlp_layer_types"] == kinds
    with pytest.raises(ConfigError, match="cannot express this model"):
        families.FAMILIES["mellum"].config_to_gguf(dense)  # type: ignore[misc]


@pytest.mark.parametrize(
    ("key", "value", "says"),
    [
        ("use_sliding_window", False, "use_sliding_window must be True"),
        ("attention_bias", True, "attention_bias must be False"),
        ("layer_types", ["full_attention"] * 3, "layer_types must be a list of 4 words"),
        ("mlp_layer_types", ["moe"] * 4, "mlp_layer_types must be a list of 4 words"),
        ("num_mtp_layers", 2, "num_mtp_layers must be 0 or 1"),
        (
            "rope_parameters",
            {"full_attention": {"rope_type": "default", "rope_theta": 1.0}},
            "sliding_attention.*rope_theta",
        ),
    ],
)
def test_what_is_not_computed_is_refused(key: str, value: object, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        families.config_from_hf(config_json("mellum") | {key: value})


def test_the_layer_for_multi_token_prediction_is_left_out_and_said(tmp_path: Path) -> None:
    raw = config_json("mellum") | {"num_mtp_layers": 1, "mtp_layer_types": ["sliding_attention"]}
    (tmp_path / "config.json").write_text(json.dumps(raw))
    save_file(weights("mellum") | {"mtp.fc.weight": np.zeros((48, 96), np.float32)}, tmp_path / "model.safetensors")
    assert open_checkpoint(tmp_path).config == families.config_from_hf(config_json("mellum"))
    assert any("multi-token prediction" in note for note in families.read_hf(raw)[1])


def test_what_neither_format_has_words_for_is_refused() -> None:
    config = TINY["mellum"]
    family = families.family_of(config)
    assert family.config_to_gguf is not None
    with pytest.raises(ConfigError, match="some of its layers must have a window, not all"):
        family.config_to_hf(config.with_mixer(window=None))

    def turned(mixer: AttentionSpec) -> AttentionSpec:
        return replace(mixer, position=RopeSpec(theta=77.0)) if mixer.window else mixer

    other = config.with_layers(lambda layer: replace(layer, mixer=turned(layer.attention)))
    assert families.config_from_hf(family.config_to_hf(other)) == other
    with pytest.raises(ConfigError, match=r"theta: 77\.0 would become 10000"):
        family.config_to_gguf(other)
