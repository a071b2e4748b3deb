"""Gemma 2 and 3: GGUF files made as llama.cpp's converter makes them (conversion/gemma.py: norms plus one) compute what the
directory does; whole models' files, whose text leaves keys to its class, and the names of their tensors.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from quadriga import load
from quadriga.errors import ConfigError
from quadriga.io.convert import convert
from quadriga.io.gguf_source import GGUFSource
from quadriga.io.open import open_checkpoint
from quadriga.model import families
from quadriga.model.config import AttentionSpec, LinearScaling, RopeSpec
from tests.checkpoint.gguf_twins import assert_same_tensors, write_tensors
from tests.checkpoint.models import TINY
from tests.golden.checkpoints import config_json, weights
from tests.golden.weights import TOKENS

gguf = pytest.importorskip("gguf")
Array = np.ndarray[Any, Any]
NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "model.layers": "blk",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def raw_of(name: str) -> dict[str, Any]:
    """config.json of a model that GGUF can express: scores are divided by the root of a head's width."""
    return config_json(name) | {"query_pre_attn_scalar": 10}


def tensors(name: str) -> dict[str, Array]:
    """What the file holds."""
    out = {}
    for source, x in weights(name).items():
        target = source
        for theirs, mine in NAMES.items():
            target = target.replace(theirs, mine)
        out[target] = x + np.float32(1) if source.endswith("norm.weight") else x
    return out


def write(path: Path, name: str) -> None:
    """The file, by the gguf package."""
    c = raw_of(name)
    writer = gguf.GGUFWriter(path, name)
    for key, value in {
        "context_length": c["max_position_embeddings"],
        "embedding_length": c["hidden_size"],
        "block_count": c["num_hidden_layers"],
        "feed_forward_length": c["intermediate_size"],
        "attention.head_count": c["num_attention_heads"],
        "attention.head_count_kv": c["num_key_value_heads"],
        "attention.key_length": c["head_dim"],
        "attention.value_length": c["head_dim"],
        "attention.sliding_window": c["sliding_window"],
    }.items():
        writer.add_uint32(f"{name}.{key}", value)
    numbers = {"attention.layer_norm_rms_epsilon": c["rms_norm_eps"], "rope.freq_base": c["rope_theta"]}
    if name == "gemma2":
        numbers |= {key: c[key] for key in ("attn_logit_softcapping", "final_logit_softcapping")}
    else:
        numbers |= {"rope.scaling.factor": c["rope_scaling"]["factor"], "rope.freq_base_swa": c["rope_local_base_freq"]}
        writer.add_string(f"{name}.rope.scaling.type", "linear")
    for key, value in numbers.items():
        writer.add_float32(f"{name}.{key}", value)
    write_tensors(writer, tensors(name))


def directory(folder: Path, name: str) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(raw_of(name)))
    save_file(weights(name), folder / "model.safetensors")
    return folder


@pytest.mark.parametrize("name", ["gemma2", "gemma3"])
def test_files_of_llama_cpp_and_files_written_here_are_the_directory(tmp_path: Path, name: str) -> None:
    write(tmp_path / "theirs.gguf", name)
    source = directory(tmp_path / "hf", name)
    logits = [
        load(path, format="float32", kv_format="float32", threads=1).logits(TOKENS)
        for path in (source, tmp_path / "theirs.gguf")
    ]
    assert np.abs(logits[0] - logits[1]).max() <= 2e-5 * np.ptp(logits[0])
    theirs = GGUFSource(tmp_path / "theirs.gguf")
    for given, file in ((source, "ours.gguf"), (tmp_path / "theirs.gguf", "again.gguf")):
        convert(given, tmp_path / file, to="gguf", gguf_format="float32")
        ours = GGUFSource(tmp_path / file)
        assert_same_tensors(ours, theirs, nearly=None)
        written = {key: value for key, value in theirs.metadata.items() if key.startswith(f"{name}.")}
        assert {key: ours.metadata.get(key) for key in written} == written
    convert(tmp_path / "theirs.gguf", tmp_path / "back", to="hf")
    back = open_checkpoint(tmp_path / "back")
    for tensor, values in weights(name).items():  # 1 + w loses what float32 does not hold
        np.testing.assert_allclose(back.source.read(tensor), values, atol=1.2e-7, rtol=0, err_msg=tensor)


def whole(keys: dict[str, Any]) -> dict[str, Any]:
    """The file of a model that sees pictures."""
    return {"model_type": "gemma3", "text_config": keys, "vision_config": {"hidden_size": 9}, "eos_token_id": [1, 106]}


def test_the_text_s_own_section_leaves_keys_to_its_class_and_it_is_said() -> None:
    published = {  # of gemma-3-4b-it
        "hidden_size": 2560,
        "intermediate_size": 10240,
        "model_type": "gemma3_text",
        "num_hidden_layers": 34,
        "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
        "sliding_window": 1024,
    }
    config, notes = families.read_hf(whole(published))
    assert config == replace(families.preset("gemma-3-4b"), bos_id=None, pad_id=None)
    assert sum("the class's default since transformers" in note for note in notes) == 9
    assert any("reads pictures is left out" in note for note in notes)


@pytest.mark.parametrize("stem", ["language_model.model.", "model.language_model."])
def test_whole_models_tensors_are_those_of_the_text(tmp_path: Path, stem: str) -> None:
    text = raw_of("gemma3") | {"sliding_window_pattern": 6}
    del text["layer_types"]
    (tmp_path / "config.json").write_text(json.dumps(whole(text)))
    stored = {stem + name.removeprefix("model."): values for name, values in weights("gemma3").items()}
    save_file(stored | {"vision_tower.x.weight": np.zeros(3, np.float32)}, tmp_path / "model.safetensors")
    opened = open_checkpoint(tmp_path)
    assert opened.config == replace(families.config_from_hf(raw_of("gemma3")), eos_ids=(1, 106))
    found = opened.parameters.read("layers.5.attn_post_norm.weight")
    np.testing.assert_array_equal(found, weights("gemma3")["model.layers.5.post_attention_layernorm.weight"])


def test_two_keys_or_two_sections_say_how_layers_turn() -> None:
    raw = raw_of("gemma3")
    five = {key: value for key, value in raw.items() if not key.startswith("rope_")}
    five["rope_parameters"] = {
        "full_attention": {"rope_theta": 5000.0, "rope_type": "linear", "factor": 4.0},
        "sliding_attention": {"rope_theta": 1000.0, "rope_type": "default"},
    }
    assert families.config_from_hf(five) == families.config_from_hf(raw)
    with pytest.raises(ConfigError, match="rope_local_base_freq must be 1000"):
        families.config_from_hf(five | {"rope_local_base_freq": 7.0})


@pytest.mark.parametrize(
    ("name", "key", "value", "says"),
    [
        ("gemma3", "attn_logit_softcapping", 50.0, "attn_logit_softcapping must be null"),
        ("gemma3", "use_bidirectional_attention", True, "use_bidirectional_attention must be False"),
        ("gemma2", "hidden_activation", "silu", "hidden_activation must be 'gelu_pytorch_tanh'"),
        ("gemma2", "attention_bias", True, "attention_bias must be False"),
        ("gemma2", "layer_types", ["full_attention"], "layer_types must be a list of 4 words"),
    ],
)
def test_what_is_not_computed_is_refused(name: str, key: str, value: object, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        families.config_from_hf(raw_of(name) | {key: value})


def test_windows_follow_the_pattern_where_a_file_is_older_than_layer_types() -> None:
    raw = raw_of("gemma2")
    del raw["layer_types"]
    assert [layer.attention.window for layer in families.config_from_hf(raw).layers] == [7, None, 7, None]


def test_what_a_format_has_no_words_for_is_refused() -> None:
    second, third = TINY["gemma2"], TINY["gemma3"]
    family, wider = families.family_of(second), second.with_mixer(scale=0.5)
    assert family.config_to_gguf is not None
    assert families.config_from_hf(family.config_to_hf(wider)) == wider
    with pytest.raises(ConfigError, match=r"scale: 0\.5 would become None"):
        family.config_to_gguf(family.gguf_form(wider))
    with pytest.raises(ConfigError, match="some of its layers must have a window, not all"):
        family.config_to_hf(second.with_mixer(window=None))

    def scaled(mixer: AttentionSpec) -> AttentionSpec:
        return replace(mixer, position=RopeSpec(theta=7.0, scaling=LinearScaling(factor=2.0)))

    bent = third.with_layers(lambda layer: replace(layer, mixer=scaled(layer.attention)))
    with pytest.raises(ConfigError, match="some layers turn by plain frequencies"):
        families.family_of(third).config_to_hf(bent)
