"""GGUF files of Qwen3-Next and Qwen3.5, made as llama.cpp's converter makes them (conversion/qwen.py): norms plus one, the
negative rate, and in Qwen3.5's heads of v in the order that ggml repeats heads of k in. They compute what the directory does.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from quadriga.errors import CheckpointError, ConfigError
from quadriga.io.convert import convert
from quadriga.io.gguf_source import GGUFSource
from quadriga.io.open import open_checkpoint
from quadriga.io.peft_factors import by_source
from quadriga.io.restate import restated_columns
from quadriga.model import families
from quadriga.model.config import DeltaNetSpec
from tests.checkpoint.gguf_twins import assert_computes, assert_same_tensors, write_tensors, write_twins
from tests.checkpoint.models import TINY, random_bits, write_hf
from tests.golden.checkpoints import config_json, weights

gguf = pytest.importorskip("gguf")
Array = np.ndarray[Any, Any]
NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "model.layers": "blk",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "post_attention_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate.": "ffn_gate_inp.",
    "mlp.shared_expert_gate": "ffn_gate_inp_shexp",
    "mlp.shared_expert.gate_proj": "ffn_gate_shexp",
    "mlp.shared_expert.up_proj": "ffn_up_shexp",
    "mlp.shared_expert.down_proj": "ffn_down_shexp",
    "linear_attn.A_log": "ssm_a",
    "linear_attn.dt_bias": "ssm_dt.bias",
    "linear_attn.conv1d": "ssm_conv1d",
    "linear_attn.norm": "ssm_norm",
    "linear_attn.out_proj": "ssm_out",
    "linear_attn.in_proj_ba": "ssm_ba",
    "linear_attn.in_proj_qkv.": "attn_qkv.",
    "linear_attn.in_proj_z": "attn_gate",
    "linear_attn.in_proj_b.": "ssm_beta.",
    "linear_attn.in_proj_a": "ssm_alpha",
}


def tiled(x: Array, c: dict[str, Any], first: int = 0, axis: int = 0) -> Array:
    """x with the heads of v, which begin at ``first`` on an axis, so that every head of k comes before its second."""
    n_k, n_v = c["linear_num_key_heads"], c["linear_num_value_heads"]
    x = np.moveaxis(x, axis, 0)
    heads = x[first:].reshape(n_k, n_v // n_k, -1, *x.shape[1:]).swapaxes(0, 1).reshape(x[first:].shape)
    return np.ascontiguousarray(np.moveaxis(np.concatenate((x[:first], heads)), 0, axis))


def tensors(name: str) -> dict[str, Array]:
    """What the file holds."""
    c, out = config_json(name), {}
    keys, values = (c[f"linear_num_{n}_heads"] * c[f"linear_{n}_head_dim"] for n in ("key", "value"))
    experts: dict[str, list[Array]] = {}
    for source, stored in weights(name).items():
        x = stored
        if source.endswith("A_log"):
            x = -np.exp(x)
        elif source.endswith("norm.weight") and "linear_attn" not in source:
            x = x + np.float32(1)
        elif "conv1d" in source:
            x = x[:, 0]
        if name == "qwen35moe" and "linear_attn" in source:
            if "in_proj_qkv" in source or "conv1d" in source:
                x = tiled(x, c, 2 * keys)
            elif "out_proj" in source:
                x = tiled(x, c, axis=1)
            elif not source.endswith("norm.weight"):
                x = tiled(x, c)
        target = source
        for theirs, mine in NAMES.items():
            target = target.replace(theirs, mine)
        if ".experts." in source:
            head, _, part = source.partition(".mlp.experts.")
            block = head.replace("model.layers", "blk")
            experts.setdefault(f"{block}.ffn_{part.split('.')[1].removesuffix('_proj')}_exps.weight", []).append(x)
        elif ".in_proj_qkvz" in source:
            block = source.partition(".linear_attn")[0].replace("model.layers", "blk")
            parts = x.reshape(c["linear_num_key_heads"], -1, x.shape[1])
            d, v = c["linear_key_head_dim"], values // c["linear_num_key_heads"]
            q, k, v_rows, z = np.split(parts, np.cumsum([d, d, v]), axis=1)
            rows = [one.reshape(-1, x.shape[1]) for one in (q, k, v_rows)]
            out[f"{block}.attn_qkv.weight"], out[f"{block}.attn_gate.weight"] = (
                np.concatenate(rows),
                z.reshape(values, -1),
            )
        else:
            out[target] = x[0] if "ffn_gate_inp_shexp" in target else x
    return out | {target: np.stack(parts) for target, parts in experts.items()}


def write(path: Path, name: str) -> None:
    """The file, by the gguf package."""
    c = config_json(name)
    arch = name
    writer = gguf.GGUFWriter(path, arch)
    rope = c.get("rope_parameters", c)
    for key, value in {
        "block_count": c["num_hidden_layers"],
        "context_length": c["max_position_embeddings"],
        "embedding_length": c["hidden_size"],
        "feed_forward_length": c.get("intermediate_size", 0),
        "attention.head_count": c["num_attention_heads"],
        "attention.head_count_kv": c["num_key_value_heads"],
        "attention.key_length": c["head_dim"],
        "attention.value_length": c["head_dim"],
        "rope.dimension_count": int(c["head_dim"] * rope["partial_rotary_factor"]),
        "expert_count": c["num_experts"],
        "expert_used_count": c["num_experts_per_tok"],
        "expert_feed_forward_length": c["moe_intermediate_size"],
        "expert_shared_feed_forward_length": c["shared_expert_intermediate_size"],
        "ssm.conv_kernel": c["linear_conv_kernel_dim"],
        "ssm.state_size": c["linear_key_head_dim"],
        "ssm.group_count": c["linear_num_key_heads"],
        "ssm.time_step_rank": c["linear_num_value_heads"],
        "ssm.inner_size": c["linear_num_value_heads"] * c["linear_value_head_dim"],
        "full_attention_interval": 3,
    }.items():
        writer.add_uint32(f"{arch}.{key}", value)
    writer.add_float32(f"{arch}.rope.freq_base", rope["rope_theta"])
    writer.add_float32(f"{arch}.attention.layer_norm_rms_epsilon", c["rms_norm_eps"])
    if name == "qwen35moe":
        writer.add_array(f"{arch}.rope.dimension_sections", [2, 2, 1, 0])
    write_tensors(writer, tensors(name))


@pytest.mark.parametrize("name", ["qwen3next", "qwen35moe"])
def test_a_file_of_llama_cpp_computes_what_the_directory_does(tmp_path: Path, name: str) -> None:
    write(tmp_path / "x.gguf", name)
    assert_computes(tmp_path / "x.gguf", name, 3e-5)


@pytest.mark.parametrize("name", ["qwen3next", "qwen35moe"])
def test_a_file_written_here_is_the_one_that_llama_cpp_s_converter_makes(tmp_path: Path, name: str) -> None:
    """Every tensor to the bit, from a directory; and written again from the file itself."""
    theirs = write_twins(tmp_path, name, write)
    for file in ("ours.gguf", "again.gguf"):
        ours = GGUFSource(tmp_path / file)
        # NumPy's float32 exponential is an ulp off.
        assert_same_tensors(ours, theirs, nearly="ssm_a" if file == "ours.gguf" else None)
        needed = {key for key in theirs.metadata if key.startswith(name)} - {f"{name}.feed_forward_length"}
        sections = f"{name}.rope.dimension_sections"
        assert needed <= ours.metadata.keys()
        assert {key: ours.metadata[key] for key in needed - {sections}} == {
            key: theirs.metadata[key] for key in needed - {sections}
        }


@pytest.mark.parametrize("name", ["qwen3next", "qwen35moe", "qwen35"])
def test_what_llama_cpp_s_form_loses_is_the_end_of_a_small_norm_and_of_a_rate(tmp_path: Path, name: str) -> None:
    """All but norms and rates come back from GGUF to the bit in float32; norms within half an ulp of what is stored."""
    config = TINY[name]
    rng = np.random.default_rng(0)
    shapes = {n: t.shape for n, t in random_bits(config).items()}
    values = {n: torch.from_numpy(rng.normal(size=shape).astype(np.float32)) for n, shape in shapes.items()}
    stored = write_hf(tmp_path / "hf", config, parameters=values)
    convert(tmp_path / "hf", tmp_path / "x.gguf", to="gguf", gguf_format="float32")
    convert(tmp_path / "x.gguf", tmp_path / "back", to="hf")
    back = open_checkpoint(tmp_path / "back")
    assert [layer.mixer for layer in back.config.layers] == [layer.mixer for layer in config.layers]
    assert back.config.final_norm == config.final_norm
    for tensor, wanted in stored.items():
        found = back.source.read(tensor)
        if tensor.endswith("A_log") or (tensor.endswith("norm.weight") and "linear_attn" not in tensor):
            assert not np.array_equal(found, wanted.numpy()) or tensor.endswith("A_log"), "or there is nothing to say"
            np.testing.assert_allclose(found, wanted.numpy(), atol=2.4e-7, rtol=1.2e-7)
        else:
            np.testing.assert_array_equal(found, wanted.numpy(), err_msg=tensor)


def test_rates_that_are_none_are_refused(tmp_path: Path) -> None:
    values = {n: torch.ones(t.shape) for n, t in random_bits(TINY["qwen35"]).items()}
    values["layers.2.delta.rate"][3] = 1e3
    write_hf(tmp_path / "hf", TINY["qwen35"], parameters=values)
    with pytest.raises(
        CheckpointError, match=r"layers\.2\.delta\.rate must hold logarithms of float32 numbers, got 1000"
    ):
        convert(tmp_path / "hf", tmp_path / "x.gguf", to="gguf")
    values["layers.2.delta.rate"][3] = -1.0
    write_hf(tmp_path / "again", TINY["qwen35"], parameters=values)
    convert(tmp_path / "again", tmp_path / "y.gguf", to="gguf")


def test_importance_and_adapters_know_where_the_heads_lie() -> None:
    """w_out's columns are by head of v: head 1, whose key head is 0, is third in GGUF's order; and peft's form is no GGUF's."""
    config = TINY["qwen35"]
    tiles, delta = families.family_of(config).gguf_form(config), config.layers[0].mixer
    assert isinstance(delta, DeltaNetSpec)
    name, columns = "layers.0.delta.w_out.weight", np.arange(delta.value_dim, dtype=np.float32)
    moved = restated_columns({name: columns, "lm_head.weight": columns}, config, tiles)
    assert moved[name][:: delta.v_dim].tolist() == [18 * head for head in (0, 3, 1, 4, 2, 5)]
    assert np.array_equal(moved["lm_head.weight"], columns)
    assert np.array_equal(restated_columns(moved, tiles, config)[name], columns)
    with pytest.raises(ConfigError, match="Make a directory first"):
        by_source(tiles, None)
    assert by_source(config, None)
