"""New models from presets: sizes that are given, proportions that are kept, layers that differ; and what they store."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from quadriga.errors import ConfigError
from quadriga.io.open import open_checkpoint
from quadriga.model import families
from quadriga.model.config import AttentionSpec, DenseSpec, ModelConfig, MoESpec, RopeSpec
from quadriga.model.cost import n_params
from quadriga.model.weight_map import check_cover, parameter_shapes, source_shapes
from quadriga.nn.context import PackedContext
from quadriga.nn.load import load_parameters
from quadriga.nn.transformer import Transformer
from quadriga.train.architecture import model_config, require_stored_bias
from quadriga.train.config import ModelSection, RouterSection, RunConfig, read_toml
from quadriga.train.export import export, write_hf
from tests.train import runs

ROOT = Path(__file__).parent.parent.parent
SMALL: dict[str, Any] = {
    "d_model": 24, "n_layers": 3, "n_heads": 6, "n_kv_heads": 2, "head_dim": 8, "d_ff": 16, "n_experts": 5, "top_k": 2,
}  # fmt: skip


def small(preset: str, **changes: Any) -> ModelConfig:
    return model_config(ModelSection(preset=preset, **SMALL | changes), 90)


def test_the_first_layers_of_a_preset_with_proportions_kept() -> None:
    config = small("dots.llm1")
    dense, *mixtures = [layer.ffn for layer in config.layers]
    assert isinstance(dense, DenseSpec) and dense.d_ff == 10944 * 16 // 1408
    assert len(mixtures) == 2 and mixtures[0] is mixtures[1]
    (spec,) = set(mixtures)
    assert isinstance(spec, MoESpec) and spec.shared is not None
    assert (spec.d_ff, spec.n_experts, spec.top_k, spec.shared.d_ff) == (16, 5, 2, 32)
    assert (spec.score, spec.correction) == ("sigmoid", True)
    attention = config.layers[2].attention
    assert (attention.n_heads, attention.n_kv_heads, attention.head_dim) == (6, 2, 8)
    assert attention.qk_norm is not None
    assert (config.vocab_size, config.d_model, config.n_layers) == (128, 24, 3)


def test_sizes_that_are_not_given_follow_the_width() -> None:
    config = model_config(ModelSection(preset="dots.llm1", d_model=2048, n_layers=2), 90)
    assert [layer.network.d_ff for layer in config.layers] == [10944 // 2, 1408 // 2]
    spec = config.only_moe("this test")
    assert (spec.n_experts, spec.top_k, spec.shared and spec.shared.d_ff) == (128, 6, 1408)


def test_the_rotated_part_of_a_head_keeps_its_share() -> None:
    position = small("glm-4.5-air").layers[0].attention.position  # 64 of 128 numbers turn
    assert isinstance(position, RopeSpec) and position.dim == 4


def test_windows_alternate_as_in_the_preset() -> None:
    windows = [layer.attention.window for layer in small("gpt-oss-20b").layers]
    assert windows == [128, None, 128]


@pytest.mark.parametrize("preset", ["gemma-2-2b", "gemma-3-1b", "grok-1"])
def test_embeddings_are_multiplied_by_the_root_of_the_new_width(preset: str) -> None:
    experts = {} if preset == "grok-1" else {"n_experts": None, "top_k": None}
    config = small(preset, n_layers=6, **experts)
    assert config.embedding_scale == 24**0.5
    written = families.family_of(config).config_to_hf(config)
    assert families.config_from_hf(written) == config


def test_a_factor_of_embeddings_that_is_not_of_the_width_stays() -> None:
    assert small("granite-3.0-1b-a400m", head_dim=4).embedding_scale == 12.0


def test_a_dense_model_has_one_width() -> None:
    config = small("llama2-7b", n_experts=None, top_k=None, n_layers=200)
    assert {layer.network.d_ff for layer in config.layers} == {16} and config.n_layers == 200


@pytest.mark.parametrize(
    ("preset", "changes", "message"),
    [
        ("dots.llm1", {"n_layers": 63}, "n_layers must be at most 62: dots.llm1 has layers of 2 kinds"),
        ("deepseek-v3", {}, "layers of plain attention.*deepseek-v3 has LatentAttentionSpec"),
        ("lfm2-8b-a1b", {}, "layers of plain attention.*lfm2-8b-a1b has ShortConvSpec"),
        ("mpt-7b", {"n_experts": None, "top_k": None, "rope_theta": 1e4}, "needs a preset with rotary positions"),
        ("llama2-7b", {}, "need a preset with experts; llama2-7b is dense"),
    ],
)
def test_what_cannot_be_made_says_why(preset: str, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        small(preset, **changes)


PLAIN = [
    name for name, config in families.PRESETS.items() if all(type(x.mixer) is AttentionSpec for x in config.kinds())
]


@pytest.mark.parametrize("name", PLAIN)
def test_what_is_accepted_can_be_exported(name: str) -> None:
    """In the preset's sizes and in narrow ones, with a context as long as its window, shorter and longer; or it is
    refused before it is trained."""
    base = families.preset(name)
    windows = [layer.attention.window for layer in base.kinds() if layer.attention.window is not None]
    lengths = [None, 16, *(n for window in windows for n in (window, window + 1))]
    made, refused = [], []
    for sizes in ({}, {"d_model": 64, "n_heads": 4, "n_kv_heads": 4}, SMALL, {**SMALL, "head_dim": 4}):
        if not base.is_moe:
            sizes = {key: size for key, size in sizes.items() if key not in ("n_experts", "top_k")}
        for max_seq_len in lengths:
            try:
                config = model_config(ModelSection(preset=name, max_seq_len=max_seq_len, **sizes), 90)
            except ConfigError as error:
                refused.append(str(error))
                continue
            family = families.family_of(config)
            assert families.config_from_hf(family.config_to_hf(config)) == config
            pieces = next(iter(family.layouts.values()))(config)
            check_cover(pieces, parameter_shapes(config), source_shapes(pieces))
            made.append(config.max_seq_len)
    assert {base.max_seq_len, *filter(None, lengths)} <= set(made), refused
    assert all("could not be exported" in message or "must divide" in message for message in refused), refused


def test_a_window_that_hides_nothing_is_left_out_where_the_files_leave_it_out() -> None:
    windows = {
        n: small("mistral-7b-v0.1", n_experts=None, top_k=None, max_seq_len=n).layers[0].attention.window
        for n in (4095, 4096, 4097)
    }
    assert windows == {4095: None, 4096: None, 4097: 4096}
    assert small("gemma-2-2b", n_experts=None, top_k=None, max_seq_len=64).layers[0].attention.window == 4096


def test_heads_keep_their_width_where_none_is_resized() -> None:
    """qwen3-30b-a3b has 32 heads of 128 in a width of 2048, so the width says nothing about them."""
    widths = [
        model_config(ModelSection(preset="qwen3-30b-a3b", n_layers=2, **sizes), 90).layers[0].attention.head_dim
        for sizes in ({}, {"d_model": 512}, {"n_heads": 8}, {"d_model": 512, "head_dim": 24})
    ]
    assert widths == [128, 16, 256, 24]


def test_what_no_file_can_say_is_refused_before_it_is_trained() -> None:
    with pytest.raises(ConfigError, match=r"could not be exported: DBRX's config.json.*head_dim: 8 would become 4"):
        small("dbrx-132b")
    assert small("dbrx-132b", head_dim=4, aggregate="vote").only_moe("this test").aggregate == "vote"


def test_a_bias_that_stays_needs_a_place_before_it_is_trained() -> None:
    stays, fades = RouterSection(bias_rate=0.1, bias_fade=0.0), RouterSection(bias_rate=0.1)
    plain, biased = small("dbrx-132b", head_dim=4), small("dots.llm1")
    with pytest.raises(ConfigError, match=r"bias_fade must be above 0 .* this family, dbrx, have no place"):
        require_stored_bias(plain, stays)
    require_stored_bias(plain, fades)
    require_stored_bias(biased, stays)


def test_the_modern_recipe_has_the_active_size_of_nano() -> None:
    sizes = {}
    for name in ("nano", "modern"):
        config = read_toml(ROOT / f"recipes/{name}.toml", RunConfig)
        sizes[name] = n_params(model_config(config.model, 8192))
    assert sizes["modern"].active == pytest.approx(sizes["nano"].active, rel=0.05)
    assert sizes["modern"].total > 1.5 * sizes["nano"].total


def test_a_balancing_bias_is_stored_where_the_family_has_a_place_for_it(tmp_path: Path) -> None:
    """The exported model chooses as the trained one does, bias and all."""
    config = small("dots.llm1", vocab_size=runs.VOCAB)
    settings = runs.Settings(router=RouterSection(bias_rate=0.05, bias_fade=0.0, balance_form="document"))
    run = runs.trainer(tmp_path / "run", settings, config=config)
    run.train()
    assert run.balancer is not None and run.balancer.bias.abs().min() > 0
    export(tmp_path / "run", tmp_path / "hf", tokenizer_files={})
    opened = open_checkpoint(tmp_path / "hf")
    again = Transformer.from_parameters(opened.config, load_parameters(opened))
    opened.close()
    for layer, bias in zip((1, 2), run.balancer.bias, strict=True):
        assert torch.equal(again.layers[layer].moe.router.correction, bias)
    tokens = torch.arange(40) % runs.VOCAB
    run.balancer.apply(run.step, settings.n_steps)
    with torch.no_grad():
        wanted, found = (one.eval()(tokens, PackedContext([40])).logits for one in (run.model, again))
    assert torch.equal(wanted, found)


def test_a_correction_keeps_its_float32_beside_narrow_weights(tmp_path: Path) -> None:
    """Rounded to bfloat16, biases that differ by a thousandth would choose other experts."""
    config = small("dots.llm1")
    name = "layers.1.moe.router.correction"
    parameters = {one: torch.zeros(shape, dtype=torch.bfloat16) for one, shape in parameter_shapes(config).items()}
    parameters |= {one: values.float() for one, values in parameters.items() if one.endswith("correction")}
    parameters[name] = 1 + torch.arange(5) / 1024
    write_hf(parameters, config, tmp_path / "hf")
    with safe_open(tmp_path / "hf" / "model.safetensors", "pt") as file:
        assert torch.equal(file.get_tensor("model.layers.1.mlp.gate.e_score_correction_bias"), parameters[name])
        assert file.get_tensor("model.embed_tokens.weight").dtype == torch.bfloat16


def test_a_bias_without_a_place_is_not_exported(tmp_path: Path) -> None:
    settings = runs.Settings(router=RouterSection(bias_rate=0.05, bias_fade=0.0))
    runs.trainer(tmp_path / "run", settings).train()
    with pytest.raises(ConfigError, match=r"this family's checkpoints cannot store\. Export the run's last checkpoint"):
        export(tmp_path / "run", tmp_path / "hf", tokenizer_files={})
