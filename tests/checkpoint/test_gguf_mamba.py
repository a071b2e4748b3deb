"""GGUF files of Granite 4, made as llama.cpp's converter makes them (conversion/granite.py and mamba.py): negative rates, a
row a head for rates and skips, a row a group of heads for norms. They compute what the directory does.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from quadriga.errors import CheckpointError, ConfigError
from quadriga.io.convert import convert
from quadriga.io.gguf_source import GGUFSource
from quadriga.io.open import open_checkpoint
from quadriga.model import families
from quadriga.model.config import AttentionSpec, Mamba2Spec, in_order
from tests.checkpoint.gguf_twins import assert_computes, assert_same_tensors, write_tensors, write_twins
from tests.checkpoint.models import TINY
from tests.golden.checkpoints import config_json, weights

gguf = pytest.importorskip("gguf")
Array = np.ndarray[Any, Any]
GOLDEN = ["granitehybrid", "granitehybrid-groups", "granitehybrid-dense"]
NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "model.layers": "blk",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "block_sparse_moe.router.layer": "ffn_gate_inp",
    "block_sparse_moe.output_linear": "ffn_down_exps",
    "mamba.A_log": "ssm_a",
    "mamba.D": "ssm_d",
    "mamba.dt_bias": "ssm_dt.bias",
    "mamba.conv1d": "ssm_conv1d",
    "mamba.norm": "ssm_norm",
    "mamba.in_proj": "ssm_in",
    "mamba.out_proj": "ssm_out",
}


def side_by_side(x: Array, n_heads: int) -> Array:
    """Rows of heads in halves as rotary pairs, as llama.cpp's converter permutes q and k."""
    return x.reshape(n_heads, 2, -1, x.shape[1]).swapaxes(1, 2).reshape(x.shape)


def tensors(name: str) -> dict[str, Array]:
    """What the file holds."""
    c, out = config_json(name), {}
    shared = "ffn_{}_shexp" if c["num_local_experts"] else "ffn_{}"
    for source, stored in weights(name).items():
        x, target = stored, source
        for theirs, mine in NAMES.items():
            target = target.replace(theirs, mine)
        if source.endswith("A_log"):
            x = -np.exp(x)
        if source.endswith(("A_log", ".D")):
            x = x[:, None]
        elif source.endswith("mamba.norm.weight"):
            x = x.reshape(c["mamba_n_groups"], -1)
        elif source.endswith("conv1d.weight"):
            x = x[:, 0]
        elif "q_proj" in source or "k_proj" in source:
            x = side_by_side(x, c["num_attention_heads" if "q_proj" in source else "num_key_value_heads"])
        block = target.split(".shared_mlp")[0].split(".block_sparse")[0]
        if "input_linear" in source:
            form = "ffn_{}_exps" if "block_sparse_moe" in source else shared
            gate, up = np.split(x, 2, axis=-2)
            out |= {f"{block}.{form.format(part)}.weight": one for part, one in (("gate", gate), ("up", up))}
        elif "shared_mlp.output_linear" in source:
            out[f"{block}.{shared.format('down')}.weight"] = x
        else:
            out[target] = x
    return out


def write(path: Path, name: str) -> None:
    """The file, by the gguf package."""
    c, arch = config_json(name), "granitehybrid"
    writer = gguf.GGUFWriter(path, arch)
    inner = c["mamba_n_heads"] * c["mamba_d_head"]
    for key, value in {
        "block_count": c["num_hidden_layers"],
        "context_length": c["max_position_embeddings"],
        "embedding_length": c["hidden_size"],
        "feed_forward_length": c["intermediate_size"] if c["num_local_experts"] else c["shared_intermediate_size"],
        "attention.head_count": c["num_attention_heads"],
        "rope.dimension_count": c["hidden_size"] // c["num_attention_heads"],
        "expert_count": c["num_local_experts"],
        "expert_used_count": c["num_experts_per_tok"],
        "expert_shared_feed_forward_length": c["shared_intermediate_size"],
        "ssm.conv_kernel": c["mamba_d_conv"],
        "ssm.state_size": c["mamba_d_state"],
        "ssm.group_count": c["mamba_n_groups"],
        "ssm.time_step_rank": c["mamba_n_heads"],
        "ssm.inner_size": inner,
    }.items():
        writer.add_uint32(f"{arch}.{key}", value)
    for key, value in {
        "rope.freq_base": c["rope_theta"],
        "attention.layer_norm_rms_epsilon": c["rms_norm_eps"],
        "attention.scale": c["attention_multiplier"],
        "embedding_scale": c["embedding_multiplier"],
        "residual_scale": c["residual_multiplier"],
        "logit_scale": c["logits_scaling"],
    }.items():
        writer.add_float32(f"{arch}.{key}", value)
    heads = [c["num_key_value_heads"] if one == "attention" else 0 for one in c["layer_types"]]
    writer.add_array(f"{arch}.attention.head_count_kv", heads)
    writer.add_bool(f"{arch}.rope.scaling.finetuned", c["position_embedding_type"] == "rope")
    write_tensors(writer, tensors(name))


@pytest.mark.parametrize("name", GOLDEN)
def test_a_file_of_llama_cpp_computes_what_the_directory_does(tmp_path: Path, name: str) -> None:
    write(tmp_path / "x.gguf", name)
    assert_computes(tmp_path / "x.gguf", name, 2e-5)


@pytest.mark.parametrize("name", GOLDEN)
def test_a_file_written_here_is_the_one_that_llama_cpp_s_converter_makes(tmp_path: Path, name: str) -> None:
    """Every tensor to the bit, from a directory; and written again from the file itself."""
    theirs = write_twins(tmp_path, name, write)
    for file in ("ours.gguf", "again.gguf"):
        ours = GGUFSource(tmp_path / file)
        # NumPy's float32 exponential is an ulp off.
        assert_same_tensors(ours, theirs, nearly="ssm_a" if file == "ours.gguf" else None)
        written = {key: value for key, value in theirs.metadata.items() if key.startswith("granitehybrid")}
        if config_json(name)["position_embedding_type"] == "nope":  # without a say where nothing turns
            del written["granitehybrid.rope.freq_base"]
        if not config_json(name)["num_local_experts"]:  # of a dense model ours says nothing of experts
            written = {key: value for key, value in written.items() if "expert" not in key}
        assert {key: ours.metadata.get(key) for key in written} == written


def test_a_directory_comes_back_from_gguf(tmp_path: Path) -> None:
    """To the bit in float32, but for rates, which were said in other numbers."""
    name = "granitehybrid-groups"
    write(tmp_path / "x.gguf", name)
    convert(tmp_path / "x.gguf", tmp_path / "back", to="hf")
    back, wanted = open_checkpoint(tmp_path / "back"), weights(name)
    assert back.source.tensors.keys() == wanted.keys()
    for tensor, values in wanted.items():
        if tensor.endswith("A_log"):
            np.testing.assert_allclose(back.source.read(tensor), values, rtol=3e-7)
        else:
            np.testing.assert_array_equal(back.source.read(tensor), values, err_msg=tensor)


def test_rates_that_are_none_are_refused(tmp_path: Path) -> None:
    values = weights("granitehybrid")
    values["model.layers.1.mamba.A_log"][3] = 1e3
    folder = tmp_path / "hf"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config_json("granitehybrid")))
    save_file(values, folder / "model.safetensors")
    with pytest.raises(
        CheckpointError, match=r"layers\.1\.mamba\.rate must hold logarithms of float32 numbers, got 1000"
    ):
        convert(folder, tmp_path / "x.gguf", to="gguf")


def test_numbers_that_gguf_keeps_differently_are_not_written_as_they_are() -> None:
    config = TINY["granitehybrid"]
    family = families.family_of(config)
    assert family.config_to_gguf is not None
    assert family.hf_form(family.gguf_form(config)) == config == family.hf_form(config)
    with pytest.raises(ConfigError, match=r"log_rate: True would become False"):
        family.config_to_gguf(config)
    with pytest.raises(ConfigError, match=r"log_rate: False would become True"):
        family.config_to_hf(family.gguf_form(config))


def test_a_model_of_attention_alone_is_read_and_its_state_space_keys_say_nothing() -> None:
    """Granite 4's small models of attention: the file keeps the keys of layers that are not there."""
    raw = config_json("granitehybrid-dense") | {"layer_types": ["attention"] * 4, "mamba_n_heads": 7}
    config = families.config_from_hf(raw)
    assert all(isinstance(layer.mixer, AttentionSpec) for layer in config.layers)
    with pytest.raises(ConfigError, match=r"it has no Mamba-2 layer. Without one it is a Granite 3"):
        families.family_of(config).config_to_hf(config)


@pytest.mark.parametrize(
    ("key", "value", "says"),
    [
        ("mamba_proj_bias", True, "mamba_proj_bias must be False"),
        ("time_step_limit", [0.01, 100.0], "time_step_limit must be"),
        ("mamba_d_head", 13, "mamba_d_head must be 12 or 'auto'"),
        ("mamba_n_groups", 3, "n_groups must divide n_heads: got n_heads=8, n_groups=3"),
        ("position_embedding_type", "learned", "position_embedding_type must be 'nope' or null or 'rope'"),
        ("layer_types", ["mamba", "attention", "mlp", "mamba"], "layer_types must be a list of 4 words"),
    ],
)
def test_what_is_not_computed_is_refused(key: str, value: object, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        families.config_from_hf(config_json("granitehybrid") | {key: value})


def test_transformers_5_writes_other_words_for_the_layers() -> None:
    raw = config_json("granitehybrid")
    words = {"mamba": "linear_attention", "attention": "full_attention"}
    limit = [0.0, {"__float__": "Infinity"}]
    newer = raw | {"layer_types": [words[one] for one in raw["layer_types"]], "time_step_limit": limit}
    assert families.config_from_hf(newer) == families.config_from_hf(raw)


def test_what_neither_format_has_words_for_is_refused() -> None:
    config = TINY["granitehybrid"]
    family = families.family_of(config)
    wider = config.with_layers(
        lambda layer: (
            replace(layer, mixer=replace(layer.mixer, head_dim=13)) if isinstance(layer.mixer, Mamba2Spec) else layer
        )
    )
    with pytest.raises(ConfigError, match=r"must be a multiple of the model's width, got 104 and 48"):
        family.config_to_hf(wider)
    mixed = replace(config, layers=in_order((replace(config.layers[0], residual_scale=1.0), *config.layers[1:])))
    with pytest.raises(ConfigError, match=r"residual_scale: 1.0 would become 0.5"):
        family.config_to_hf(mixed)


def test_matrices_of_a_file_are_as_narrow_as_asked_for_and_what_forgets_stays_wide(tmp_path: Path) -> None:
    """ssm_in holds the rows of the steps as well, which are float32 in memory; ssm_a is a matrix in name only."""
    folder = tmp_path / "hf"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config_json("granitehybrid")))
    save_file(weights("granitehybrid"), folder / "model.safetensors")
    convert(folder, tmp_path / "x.gguf", to="gguf", gguf_format="bfloat16")
    stored = {name: tensor.dtype for name, tensor in GGUFSource(tmp_path / "x.gguf").tensors.items()}
    wide = {name for name, dtype in stored.items() if dtype == "float32" and name.startswith("blk.0.")}
    parts = ("attn_norm.weight", "ffn_norm.weight", "ffn_gate_inp.weight")
    own = ("ssm_a", "ssm_d", "ssm_dt.bias", "ssm_conv1d.weight", "ssm_conv1d.bias", "ssm_norm.weight")
    assert wide == {f"blk.0.{name}" for name in (*parts, *own)}
    assert stored["blk.0.ssm_in.weight"] == "bfloat16"
