"""GGUF files of Nemotron-H, made as llama.cpp's converter makes them (conversion/nemotron.py): lists that say what a layer is.

They compute what the directory does. What config.json may say otherwise is read alike, or refused.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from quadriga.errors import ConfigError
from quadriga.io.convert import convert
from quadriga.io.gguf_source import GGUFSource
from quadriga.io.open import open_checkpoint
from quadriga.model import cost, families
from quadriga.model.config import LayerSpec, MoESpec, NoFeedForward, NoMixer, in_order
from quadriga.model.config_json import config_from_json, config_to_json
from tests.checkpoint.gguf_twins import assert_computes, assert_same_tensors, write_tensors, write_twins
from tests.checkpoint.models import TINY
from tests.golden.checkpoints import config_json, weights

gguf = pytest.importorskip("gguf")
Array = np.ndarray[Any, Any]
GOLDEN = {"nemotron_h": "nemotron_h_moe", "nemotron_h-dense": "nemotron_h"}
"""Golden models and their architectures."""
NAMES = {
    "backbone.embeddings": "token_embd",
    "backbone.norm_f": "output_norm",
    "lm_head": "output",
    "backbone.layers": "blk",
    "mixer.norm": "ssm_norm",
    ".norm.": ".attn_norm.",
    "mixer.q_proj": "attn_q",
    "mixer.k_proj": "attn_k",
    "mixer.v_proj": "attn_v",
    "mixer.o_proj": "attn_output",
    "mixer.A_log": "ssm_a",
    "mixer.D": "ssm_d",
    "mixer.dt_bias": "ssm_dt.bias",
    "mixer.conv1d": "ssm_conv1d",
    "mixer.in_proj": "ssm_in",
    "mixer.out_proj": "ssm_out",
    "mixer.gate.e_score_correction_bias": "exp_probs_b.bias",
    "mixer.gate": "ffn_gate_inp",
    "mixer.shared_experts.up_proj": "ffn_up_shexp",
    "mixer.shared_experts.down_proj": "ffn_down_shexp",
    "mixer.up_proj": "ffn_up",
    "mixer.down_proj": "ffn_down",
}


def side_by_side(x: Array, n_heads: int) -> Array:
    """Rows of heads in halves as rotary pairs, as the converter permutes q and k though nothing turns."""
    return x.reshape(n_heads, 2, -1, x.shape[1]).swapaxes(1, 2).reshape(x.shape)


def tensors(name: str) -> dict[str, Array]:
    """What the file holds."""
    c, out, stacks = config_json(name), {}, {}
    for source, stored in weights(name).items():
        x, target = stored, source
        if ".experts." in source:
            layer, expert, part = source.split(".")[2], int(source.split(".")[5]), source.split(".")[6]
            stacks.setdefault(f"blk.{layer}.ffn_{part.removesuffix('_proj')}_exps.weight", {})[expert] = x
            continue
        for theirs, mine in NAMES.items():
            target = target.replace(theirs, mine)
        if source.endswith("A_log"):
            x = -np.exp(x)
        if source.endswith(("A_log", ".D")):
            x = x[:, None]
        elif source.endswith("mixer.norm.weight"):
            x = x.reshape(c["n_groups"], -1)
        elif source.endswith("conv1d.weight"):
            x = x[:, 0]
        elif "q_proj" in source or "k_proj" in source:
            x = side_by_side(x, c["num_attention_heads" if "q_proj" in source else "num_key_value_heads"])
        out[target] = x
    return out | {target: np.stack([rows[e] for e in sorted(rows)]) for target, rows in stacks.items()}


def write(path: Path, name: str) -> None:
    """The file, by the gguf package."""
    c, arch = config_json(name), GOLDEN[name]
    pattern, mixture = c["hybrid_override_pattern"], "n_routed_experts" in c
    writer = gguf.GGUFWriter(path, arch)
    numbers = {
        "block_count": len(pattern),
        "context_length": c["max_position_embeddings"],
        "embedding_length": c["hidden_size"],
        "attention.head_count": c["num_attention_heads"],
        "attention.key_length": c["head_dim"],
        "attention.value_length": c["head_dim"],
        "rope.dimension_count": c["head_dim"],
        "ssm.conv_kernel": c["conv_kernel"],
        "ssm.state_size": c["ssm_state_size"],
        "ssm.group_count": c["n_groups"],
        "ssm.time_step_rank": c["mamba_num_heads"],
        "ssm.inner_size": c["mamba_num_heads"] * c["mamba_head_dim"],
    }
    if mixture:
        numbers |= {
            "expert_count": c["n_routed_experts"],
            "expert_used_count": c["num_experts_per_tok"],
            "expert_feed_forward_length": c["moe_intermediate_size"],
            "expert_shared_feed_forward_length": c["moe_shared_expert_intermediate_size"],
            "expert_shared_count": c["n_shared_experts"],
            "expert_group_count": c["n_group"],
        }
        writer.add_bool(f"{arch}.expert_weights_norm", c["norm_topk_prob"])
        writer.add_float32(f"{arch}.expert_weights_scale", c["routed_scaling_factor"])
    for key, value in numbers.items():
        writer.add_uint32(f"{arch}.{key}", value)
    writer.add_float32(f"{arch}.attention.layer_norm_rms_epsilon", c["layer_norm_epsilon"])
    width = c["moe_intermediate_size"] if mixture else c["intermediate_size"]
    writer.add_array(f"{arch}.feed_forward_length", [width if kind in "-E" else 0 for kind in pattern])
    heads = [c["num_key_value_heads"] if kind == "*" else 0 for kind in pattern]
    writer.add_array(f"{arch}.attention.head_count_kv", heads)
    writer.add_bool(f"{arch}.rope.scaling.finetuned", val=False)
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
        assert ours.metadata["general.architecture"] == GOLDEN[name]
        written = {key: value for key, value in theirs.metadata.items() if key.startswith(GOLDEN[name] + ".")}
        written.pop("nemotron_h_moe.expert_group_count", None)  # one group is none
        assert {key: ours.metadata.get(key) for key in written} == written


def test_a_directory_comes_back_from_gguf(tmp_path: Path) -> None:
    """To the bit in float32, but for rates, which were said in other numbers."""
    write(tmp_path / "x.gguf", "nemotron_h")
    convert(tmp_path / "x.gguf", tmp_path / "back", to="hf")
    back, wanted = open_checkpoint(tmp_path / "back"), weights("nemotron_h")
    assert back.source.tensors.keys() == wanted.keys()
    for tensor, values in wanted.items():
        if tensor.endswith("A_log"):
            np.testing.assert_allclose(back.source.read(tensor), values, rtol=3e-7)
        else:
            np.testing.assert_array_equal(back.source.read(tensor), values, err_msg=tensor)


def test_words_and_letters_say_what_a_layer_is() -> None:
    raw = config_json("nemotron_h")
    config, letters = families.config_from_hf(raw), raw["hybrid_override_pattern"]
    ours = {"M": "mamba", "E": "moe", "*": "attention"}
    fives = {"M": "linear_attention", "E": "moe", "*": "full_attention"}
    for words in ([ours[one] for one in letters], [fives[one] for one in letters]):
        assert families.config_from_hf(raw | {"layers_block_type": words}) == config
        alone = {key: value for key, value in raw.items() if key != "hybrid_override_pattern"}
        assert families.config_from_hf(alone | {"layers_block_type": words}) == config
    with pytest.raises(ConfigError, match="must say the same of every layer"):
        families.config_from_hf(raw | {"layers_block_type": ["mamba", "moe", "mamba", "mamba", "moe"]})


@pytest.mark.parametrize(
    ("key", "value", "says"),
    [
        ("hybrid_override_pattern", "ME*MX", r"must be letters of M \* - E, got 'ME\*MX'"),
        ("num_hidden_layers", 6, "num_hidden_layers must be 5"),
        ("time_step_limit", [0.01, 100.0], "time_step_limit must be"),
        ("mlp_hidden_act", "silu", "mlp_hidden_act must be 'relu2'"),
        ("moe_latent_size", 32, "moe_latent_size must be null"),
        ("n_shared_experts", 2, "n_shared_experts must be 1"),
        ("use_bias", True, "use_bias must be False"),
        ("norm_eps", 1e-6, "norm_eps must be 1e-05"),
        ("sliding_window", 7, "sliding_window must be null"),
        ("num_nextn_predict_layers", 2, "num_nextn_predict_layers must be 0 or 1"),
    ],
)
def test_what_is_not_computed_is_refused(key: str, value: object, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        families.config_from_hf(config_json("nemotron_h") | {key: value})


def test_the_layer_for_multi_token_prediction_is_left_out_and_said(tmp_path: Path) -> None:
    raw = config_json("nemotron_h") | {"num_nextn_predict_layers": 1, "mtp_hybrid_override_pattern": "*E"}
    (tmp_path / "config.json").write_text(json.dumps(raw))
    extra = {"mtp.layers.0.eh_proj.weight": np.zeros((48, 96), np.float32)}
    save_file(weights("nemotron_h") | extra, tmp_path / "model.safetensors")
    assert open_checkpoint(tmp_path).config == families.config_from_hf(config_json("nemotron_h"))
    assert any("multi-token prediction" in note for note in families.read_hf(raw)[1])


def test_gguf_keys_that_no_layer_can_have_are_refused(tmp_path: Path) -> None:
    write(tmp_path / "x.gguf", "nemotron_h")
    source = GGUFSource(tmp_path / "x.gguf")
    for key, value, says in (
        ("feed_forward_length", [0, 56, 56, 0, 56], "must have one branch, got one with heads and a network"),
        ("feed_forward_length", [0, 56, 0, 0, 57], "the same for all others"),
        ("attention.head_count_kv", 2, "must be a number for each of the 5 layers"),
        ("nextn_predict_layers", 1, "nextn_predict_layers must be 0"),
        ("expert_group_count", 2, "expert_group_count must be 0 or 1"),
    ):
        with pytest.raises(ConfigError, match=says):
            families.config_from_gguf(source.metadata | {f"nemotron_h_moe.{key}": value}, source.shapes)


def test_models_that_are_no_nemotron_h_are_not_written_as_one() -> None:
    config = TINY["nemotron_h"]
    family = families.family_of(config)
    assert family.config_to_gguf is not None
    whole = replace(config.layers[0], ffn=config.layers[1].ffn)
    for layers in (
        (whole, *config.layers[1:]),
        (replace(config.layers[0], mixer=whole.mixer), *[config.layers[1]] * 2),
    ):
        with pytest.raises(
            ConfigError, match=r"every layer must be a Mamba-2 layer|it needs a AttentionSpec, got None"
        ):
            family.config_to_hf(replace(config, layers=in_order(layers)))
    grouped = config.with_ffn(n_experts=6, n_groups=2)
    assert families.config_from_hf(family.config_to_hf(grouped)) == grouped
    with pytest.raises(ConfigError, match="n_groups: 2 would become 1"):
        family.config_to_gguf(family.gguf_form(grouped))


def test_a_layer_of_neither_branch_is_none() -> None:
    norm = TINY["nemotron_h"].final_norm
    with pytest.raises(ConfigError, match="a layer must have a mixer, a feed-forward, or both"):
        LayerSpec(norm=norm, mixer=NoMixer(), ffn=NoFeedForward())
    with pytest.raises(ConfigError, match="this needs a layer with a feed-forward; it has none"):
        _ = TINY["nemotron_h"].layers[0].network
    with pytest.raises(ConfigError, match="experts with biases must be gated"):
        MoESpec(d_ff=8, n_experts=3, top_k=2, activation="relu2", gated=False, expert_bias=True)


@pytest.mark.parametrize("name", GOLDEN)
def test_a_layer_s_branch_is_counted_and_kept_as_json(name: str) -> None:
    config = families.config_from_hf(config_json(name))
    assert config_from_json(json.loads(json.dumps(config_to_json(config)))) == config
    n_params = sum(values.size for values in weights(name).values())
    assert cost.n_params(config).total == n_params
    assert cost.kv_bytes_per_token(config, "float32") == 4 * 2 * 2 * 10  # one attention: K and V of 2 heads of 10
    state = 3 * (96 + 2 * 14 * config.layers[0].mixer.n_groups) + 8 * 14 * 12  # type: ignore[union-attr]
    assert cost.state_bytes(config) == 4 * state * config_json(name)["hybrid_override_pattern"].count("M")
