"""Gemma 4's files: GGUF as llama.cpp's converter makes it (conversion/gemma.py), directories of text within pictures, and what
of either is refused.
"""

from __future__ import annotations

import json
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
from quadriga.model.families.rope_keys import FREQS, VALUES
from tests.checkpoint.gguf_twins import assert_computes, assert_same_tensors, write_tensors, write_twins
from tests.golden.checkpoints import config_json, oracle, weights
from tests.golden.weights import TOKENS

gguf = pytest.importorskip("gguf")
Array = np.ndarray[Any, Any]
GOLDEN = ["gemma4", "gemma4-dense"]
NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "model.layers": "blk",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm_2": "pre_ffw_norm_2",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "layer_scalar": "layer_output_scale.weight",
    "router.proj": "ffn_gate_inp",
    "router.scale": "ffn_gate_inp.scale",
    "router.per_expert_scale": "ffn_down_exps.scale",
    "experts.gate_up_proj": "ffn_gate_up_exps.weight",
    "experts.down_proj": "ffn_down_exps.weight",
}


def tensors(name: str) -> dict[str, Array]:
    """What the file holds."""
    out = {}
    for source, values in weights(name).items():
        target = source
        for theirs, mine in NAMES.items():
            target = target.replace(theirs, mine)
        out[target] = values
    turning = int(0.6 * 20 / 2)
    return out | {FREQS: np.array([1.0] * turning + [1e30] * (10 - turning), dtype=np.float32)}


def write(path: Path, name: str) -> None:
    """The file, by the gguf package."""
    c, arch = config_json(name), "gemma4"
    slides = [one == "sliding_attention" for one in c["layer_types"]]
    same = c["attention_k_eq_v"]
    writer = gguf.GGUFWriter(path, arch)
    sizes = {
        "block_count": c["num_hidden_layers"],
        "context_length": c["max_position_embeddings"],
        "embedding_length": c["hidden_size"],
        "feed_forward_length": c["intermediate_size"],
        "embedding_length_per_layer_input": 0,
        "attention.head_count": c["num_attention_heads"],
        "attention.key_length": c["global_head_dim"],
        "attention.value_length": c["global_head_dim"],
        "attention.key_length_swa": c["head_dim"],
        "attention.value_length_swa": c["head_dim"],
        "attention.sliding_window": c["sliding_window"],
        "attention.shared_kv_layers": 0,
        "rope.dimension_count": c["global_head_dim"],
        "rope.dimension_count_swa": c["head_dim"],
    }
    if c["enable_moe_block"]:
        sizes |= {
            "expert_count": c["num_experts"],
            "expert_used_count": c["top_k_experts"],
            "expert_feed_forward_length": c["moe_intermediate_size"],
        }
    for key, value in sizes.items():
        writer.add_uint32(f"{arch}.{key}", value)
    for key, value in {
        "rope.freq_base": c["rope_parameters"]["full_attention"]["rope_theta"],
        "rope.freq_base_swa": c["rope_parameters"]["sliding_attention"]["rope_theta"],
        "attention.layer_norm_rms_epsilon": c["rms_norm_eps"],
        "final_logit_softcapping": c["final_logit_softcapping"],
    }.items():
        writer.add_float32(f"{arch}.{key}", value)
    near = c["num_key_value_heads"]
    far = c["num_global_key_value_heads"] if same else near
    writer.add_array(f"{arch}.attention.head_count_kv", [near if slide else far for slide in slides])
    writer.add_array(f"{arch}.attention.sliding_window_pattern", slides)
    write_tensors(writer, tensors(name))


@pytest.mark.parametrize("name", GOLDEN)
def test_a_file_of_llama_cpp_computes_what_the_directory_does(tmp_path: Path, name: str) -> None:
    write(tmp_path / "x.gguf", name)
    assert_computes(tmp_path / "x.gguf", name, 2e-5)


@pytest.mark.parametrize("name", GOLDEN)
def test_a_file_written_here_is_the_one_that_llama_cpp_s_converter_makes(tmp_path: Path, name: str) -> None:
    """Every tensor to the bit, from a directory; and a directory again from the file."""
    theirs, ours = write_twins(tmp_path, name, write), GGUFSource(tmp_path / "ours.gguf")
    assert_same_tensors(ours, theirs)
    written = {key: value for key, value in theirs.metadata.items() if key.startswith("gemma4")}
    assert {key: ours.metadata.get(key) for key in written} == written
    convert(tmp_path / "theirs.gguf", tmp_path / "back", to="hf")
    back = open_checkpoint(tmp_path / "back")
    assert back.source.tensors.keys() == weights(name).keys()
    for tensor, values in weights(name).items():
        np.testing.assert_array_equal(back.source.read(tensor), values, err_msg=tensor)


def test_the_text_of_a_model_of_pictures_is_read_and_the_rest_is_named(tmp_path: Path) -> None:
    folder = tmp_path / "hf"
    folder.mkdir()
    text = config_json("gemma4")
    whole = {
        "model_type": "gemma4",
        "architectures": ["Gemma4ForConditionalGeneration"],
        "text_config": text,
        "vision_config": {"hidden_size": 7},
        "audio_config": None,
        "image_token_id": 90,
        "boi_token_id": 91,
        "eoi_token_id": 92,
        "tie_word_embeddings": True,
    }
    (folder / "config.json").write_text(json.dumps(whole))
    named = {key.replace("model.", "model.language_model.", 1): values for key, values in weights("gemma4").items()}
    save_file({**named, "model.vision_tower.x.weight": np.ones((2, 3), np.float32)}, folder / "model.safetensors")
    opened = open_checkpoint(folder)
    assert opened.config == families.config_from_hf(text)
    assert "the part that reads pictures is left out; text is read as it is" in families.read_hf(whole)[1]
    logits = load(folder, format="float32", kv_format="float32", threads=1).logits(TOKENS)
    wanted = oracle("gemma4").numpy()
    assert np.abs(logits - wanted).max() / np.ptp(wanted) <= 2e-5


def test_transformers_5_writes_the_heads_of_full_attention_by_layer() -> None:
    raw = config_json("gemma4")
    head_dim, heads = raw.pop("global_head_dim"), raw.pop("num_global_key_value_heads")
    own = {"head_dim": head_dim, "num_key_value_heads": heads}
    assert families.config_from_hf(raw | {"per_layer_config": {"2": own, "3": own}}) == families.config_from_hf(
        config_json("gemma4")
    )
    for wrong in ({"2": own}, {"1": own, "2": own, "3": own}, {"2": own, "3": {"head_dim": 22}}):
        with pytest.raises(ConfigError, match=r"per_layer_config must say the same of every layer of full attention"):
            families.config_from_hf(raw | {"per_layer_config": wrong})


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"hidden_size_per_layer_input": 256}, "hidden_size_per_layer_input must be 0"),
        ({"num_kv_shared_layers": 2}, "num_kv_shared_layers must be 0"),
        ({"use_bidirectional_attention": "all"}, "use_bidirectional_attention must be null or 'vision'"),
        ({"hidden_activation": "gelu"}, "hidden_activation must be 'gelu_pytorch_tanh'"),
        ({"sliding_window": 0}, "window must be"),
    ],
)
def test_what_is_not_computed_is_refused(change: dict[str, object], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        families.config_from_hf(config_json("gemma4") | change)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"gemma4.attention.sliding_window_pattern": [True] * 4}, "of which there must be both"),
        ({"gemma4.attention.head_count_kv": [2, 3, 2, 2]}, "must be the same in all layers of a kind"),
        ({"gemma4.embedding_length_per_layer_input": 256}, "embedding_length_per_layer_input must be 0"),
        ({VALUES + FREQS: [1.0] * 5 + [2.0] * 5}, "1 for the first pairs and 1e30 for those"),
        ({VALUES + FREQS: [1e30] + [1.0] * 9}, "1 for the first pairs and 1e30 for those|must begin with the pairs"),
    ],
)
def test_gguf_metadata_that_say_something_else_are_refused(change: dict[str, object], says: str) -> None:
    config = families.config_from_hf(config_json("gemma4"))
    family = families.family_of(config)
    assert family.config_to_gguf is not None
    assert family.gguf_map is not None
    metadata = family.config_to_gguf(config) | {VALUES + FREQS: [1.0] * 6 + [1e30] * 4}
    shapes = {piece.source: piece.source_shape for piece in family.gguf_map(config)}
    assert families.config_from_gguf({"general.architecture": "gemma4", **metadata}, shapes) == config
    with pytest.raises(ConfigError, match=says):
        families.config_from_gguf({"general.architecture": "gemma4", **metadata, **change}, shapes)
