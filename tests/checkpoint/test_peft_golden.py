"""Every option of peft's adapters that is read computes what peft computes; golden files, so peft is not needed here."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from quadriga.errors import CheckpointError, ConfigError
from quadriga.io.adapter import load, merge
from quadriga.io.adapter_files import low_rank, save
from quadriga.io.open import Checkpoint, open_checkpoint
from quadriga.io.peft_write import to_peft
from quadriga.nn.context import PackedContext
from quadriga.nn.load import load_parameters
from quadriga.nn.transformer import Transformer
from tests.golden import checkpoints
from tests.golden.weights import ADAPTER_ROWS, TOKENS, drawn_adapter

GOLDEN = Path(checkpoints.__file__).parent
CASES: dict[str, Any] = json.loads((GOLDEN / "adapters.json").read_text())["cases"]
BEYOND = {name for name in CASES if name.startswith(("dora", "saved", "table", "tokens")) or name == "experts-dora"}
"""Cases with more than low-rank factors."""


@cache
def logits() -> dict[str, Tensor]:
    return load_file(GOLDEN / "adapters.safetensors")


def written(name: str, folder: Path, change: Callable[[dict[str, Any], dict[str, Tensor]], None] | None = None) -> Path:
    """A case as peft saved it, perhaps changed, beside nothing else."""
    folder.mkdir(exist_ok=True)
    config = json.loads(json.dumps(CASES[name]["config"]))
    drawn = drawn_adapter(CASES[name]["tensors"], tied=CASES[name]["base"].endswith("tied"))
    tensors = {k: torch.from_numpy(v) for k, v in drawn.items()}
    if change is not None:
        change(config, tensors)
    (folder / "adapter_config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "adapter_model.safetensors")
    return folder


def base_of(name: str, tmp_path: Path) -> Checkpoint:
    folder = tmp_path / "base"
    folder.mkdir()
    checkpoints.write(CASES[name]["base"], folder)
    return open_checkpoint(folder)


def computed(checkpoint: Checkpoint) -> Tensor:
    model = Transformer.from_parameters(checkpoint.config, load_parameters(checkpoint, dtype=torch.float32)).eval()
    with torch.no_grad():
        return model(torch.tensor(TOKENS), PackedContext([len(TOKENS)])).logits[-ADAPTER_ROWS:]


@pytest.mark.parametrize("name", CASES)
def test_merged_it_computes_what_peft_does(name: str, tmp_path: Path) -> None:
    base = base_of(name, tmp_path)
    adapter = load(written(name, tmp_path / "peft"), base.config)
    wanted = logits()[name]
    torch.testing.assert_close(computed(merge(base, adapter)), wanted, rtol=0, atol=5e-4 * float(wanted.std()))
    assert (computed(base) - wanted).abs().max() > wanted.std(), "the adapter does something"


@pytest.mark.parametrize("name", CASES)
def test_only_factors_are_served_trained_on_and_exported(name: str, tmp_path: Path) -> None:
    base = base_of(name, tmp_path)
    adapter = load(written(name, tmp_path / "peft"), base.config)
    if name not in BEYOND:
        assert low_rank(adapter) is adapter.factors
        save(adapter, tmp_path / "ours")
        return
    for use in (
        lambda: low_rank(adapter),
        lambda: save(adapter, tmp_path / "ours"),
        lambda: to_peft(adapter, base.config, tmp_path / "again"),
    ):
        with pytest.raises(ConfigError, match=r"it can only be folded into its model.*quadriga adapter merge"):
            use()
    assert not (tmp_path / "ours").exists()


def test_two_merges_of_different_extras_are_told_apart(tmp_path: Path) -> None:
    """A conversion that was cut short must not go on with another adapter's numbers."""

    def other_lengths(_: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        for key in tensors:
            if key.endswith("magnitude_vector"):
                tensors[key] = tensors[key] * 2

    base = base_of("dora", tmp_path)
    for name, change in (("dora", other_lengths), ("tokens", _config(trainable_token_indices=[5, 95, 7]))):
        one = merge(base, load(written(name, tmp_path / f"{name}-1"), base.config))
        two = merge(base, load(written(name, tmp_path / f"{name}-2", change), base.config))
        assert one.recipe != two.recipe


# Refusals ------------------------------------------------------------------------------------------------------------

_REFUSED: list[tuple[dict[str, Any], str]] = [
    *(
        ({"init_lora_weights": start}, f"got '{start}'. That way of starting changes the base's weights")
        for start in (
            "pissa",
            "PiSSA",
            "pissa_niter_16",
            "olora",
            "OLoRA",
            "corda",
            "loftq",
            "lora_ga",
            "something_new",
        )
    ),
    ({"peft_type": "ADALORA"}, "peft_type must be 'LORA'"),
    ({"task_type": "SEQ_CLS"}, "task_type must be"),
    ({"bias": "all"}, "bias must be 'none'"),
    ({"bias": "lora_only"}, "bias must be 'none'"),
    ({"lora_bias": True}, "lora_bias must be False"),
    ({"fan_in_fan_out": True}, "fan_in_fan_out must be False"),
    ({"layer_replication": [[0, 2], [1, 4]]}, "layer_replication must be null"),
    ({"alora_invocation_tokens": [1, 2]}, "alora_invocation_tokens must be null"),
    ({"use_qalora": True}, "use_qalora must be False"),
    ({"use_bdlora": {"nblocks": 2}}, "use_bdlora must be null"),
    ({"arrow_config": {"top_k": 2}}, "arrow_config must be null"),
    ({"kasa_config": {}}, "kasa_config must be null"),
    ({"monteclora_config": {"num_samples": 8}}, "monteclora_config must be null"),
    ({"velora_config": {}}, "velora_config must be null"),
    ({"megatron_config": {"tensor_model_parallel_size": 2}}, "megatron_config must be null"),
    ({"use_sparse_lora": True}, "'use_sparse_lora', which Quadriga does not know"),
    ({"lora_alpa": 3}, "'lora_alpa'.*Did you mean 'lora_alpha'"),
    ({"r": 0}, "r and the values of rank_pattern must be from 1 to 4096, got 0"),
    ({"rank_pattern": {"q_proj": 0}}, "r and the values of rank_pattern must be from 1 to 4096, got 0"),
    ({"rank_pattern": {"q_proj": -2}}, "r and the values of rank_pattern must be from 1 to 4096, got -2"),
    ({"r": True}, "r must be a whole number"),
    ({"lora_alpha": "10"}, "lora_alpha must be a finite number"),
    ({"use_rslora": "yes"}, "use_rslora must be true or false"),
    ({"target_modules": {"q_proj": 1}}, "target_modules must be a list of names"),
    ({"rank_pattern": [3]}, "rank_pattern must map names to numbers"),
    ({"alpha_pattern": {"q_proj": None}}, "alpha_pattern: q_proj must be a finite number"),
    ({"alpha_pattern": {"(a+)+$": 2}}, "too involved to be followed"),
    ({"alpha_pattern": {"(a|aa)(a|aa)(a|aa)(a|aa)": 2}}, "too involved to be followed"),
    ({"target_modules": ".*.*.*.*proj"}, "too involved to be followed"),
    ({"exclude_modules": "q_proj)"}, "which is none"),
    ({"layers_to_transform": ["first"]}, "layers_to_transform must be a layer or a list"),
    ({"trainable_token_indices": [5, 5]}, "must be ids, each once"),
    ({"trainable_token_indices": {"lm_head": [-1]}}, "must be ids, each once"),
]


@pytest.mark.parametrize(
    ("change", "says"), _REFUSED, ids=[f"{next(iter(c))}-{i}" for i, (c, _) in enumerate(_REFUSED)]
)
def test_options_that_are_not_computed_are_refused_by_name(change: dict[str, Any], says: str, tmp_path: Path) -> None:
    base = base_of("plain", tmp_path)
    folder = written("plain", tmp_path / "peft", lambda config, _: config.update(change))
    with pytest.raises(ConfigError, match=says):
        load(folder, base.config)


def test_no_key_of_a_real_file_is_unknown_and_every_harmless_one_has_a_reason() -> None:
    """Each key that peft writes is read, refused or listed: take the lists away and it is named as unknown."""
    from quadriga.io import peft_config

    assert all(len(reason) > 20 for reason in peft_config.HARMLESS.values())
    assert not peft_config.HARMLESS.keys() & peft_config._UNSUPPORTED.keys()
    for case in CASES.values():
        peft_config.read(case["config"])
    with pytest.raises(ConfigError, match="which Quadriga does not know"):
        peft_config.read(CASES["plain"]["config"] | {"a_new_option": None})


def _without(*parts: str) -> Callable[[dict[str, Any], dict[str, Tensor]], None]:
    def change(_: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        gone = [key for key in tensors if any(part in key for part in parts)]
        assert gone
        for key in gone:
            del tensors[key]

    return change


def _config(**changes: Any) -> Callable[[dict[str, Any], dict[str, Tensor]], None]:
    return lambda config, _: config.update(changes)


def _longer_table(_: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    key = "base_model.model.model.embed_tokens.base_layer.weight"
    tensors[key] = torch.cat((tensors[key], tensors[key][:3]))


@pytest.mark.parametrize(
    ("name", "change", "says"),
    [
        (
            "plain",
            _config(target_modules=["q_proj"]),
            r"with factors but not named: \['model.layers.0.self_attn.v_proj",
        ),
        ("plain", _config(target_modules=r".*\.q_proj"), r"\(4\). Were the two files saved together"),
        ("plain", _config(exclude_modules=["v_proj"]), "with factors but not named"),
        ("plain", _config(layers_to_transform=[0, 1]), "with factors but not named"),
        ("plain", _without("layers.1.self_attn.q_proj"), r"Without factors: \['model.layers.1.self_attn.q_proj'\]"),
        ("plain", _config(r=4), "must have the rank that adapter_config.json gives, 4, and have 3"),
        ("rank-pattern", _config(rank_pattern={}), "must have the rank"),
        ("plain", _without("layers.1.self_attn.q_proj.lora_A"), "1 tensors fit no matrix"),
        ("saved-head", _without("lm_head"), "modules_to_save names 'lm_head', whose weight is not in"),
        ("saved-norms-and-table", _config(modules_to_save=["embed_tokens"]), "whole weight of model.layers.0.input"),
        ("dora", _config(use_dora=False), "use_dora is False"),
        ("plain", _config(use_dora=True), "use_dora is True, and 0 of 8"),
        ("dora", _without("layers.0.self_attn.q_proj.lora_magnitude"), "use_dora is True"),
        ("table", _longer_table, r"saved whole with shape \[100, 48\].*If tokens were added"),
        ("tokens", _config(trainable_token_indices=[5, 96]), "gives 2 ids"),
        ("tokens", _config(trainable_token_indices=[5, 96, 97]), "gives 3 ids below 97"),
        ("tokens", _without("token_adapter"), "has no rows of tokens"),
    ],
)
def test_a_file_that_is_not_what_its_configuration_says(
    name: str, change: Callable[[dict[str, Any], dict[str, Tensor]], None], says: str, tmp_path: Path
) -> None:
    base = base_of(name, tmp_path)
    with pytest.raises(CheckpointError, match=says):
        load(written(name, tmp_path / "peft", change), base.config)


def test_a_folder_without_safetensors_says_so(tmp_path: Path) -> None:
    base = base_of("plain", tmp_path)
    folder = written("plain", tmp_path / "peft")
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
    with pytest.raises(CheckpointError, match=r"lacks adapter_model\.safetensors: its adapter_model\.bin is a pickle"):
        load(folder, base.config)
    (folder / "adapter_model.bin").unlink()
    with pytest.raises(CheckpointError, match=r"lacks adapter_model\.safetensors$"):
        load(folder, base.config)


def test_a_matrix_of_its_own_for_a_tied_table_is_refused(tmp_path: Path) -> None:
    def save_the_head(config: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        config["modules_to_save"] = ["embed_tokens"]
        config["trainable_token_indices"] = None
        del tensors["base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta"]
        tensors["base_model.model.model.embed_tokens.weight"] = torch.randn(97, 48)

    base = base_of("tokens-tied", tmp_path)
    with pytest.raises(ConfigError, match="tied embeddings as a matrix of its own"):
        load(written("tokens-tied", tmp_path / "peft", save_the_head), base.config)


def test_dora_on_a_table_is_refused(tmp_path: Path) -> None:
    def with_lengths(config: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        config["use_dora"] = True
        for key in [key for key in tensors if key.endswith(("lora_A.weight", "lora_embedding_A"))]:
            module = key.rpartition(".lora_")[0]
            tensors[f"{module}.lora_magnitude_vector"] = torch.ones(60 if "q_proj" in key else 48)

    base = base_of("table", tmp_path)
    with pytest.raises(
        ConfigError, match=r"use_dora is read for plain linear layers only, not for model\.embed_tokens"
    ):
        load(written("table", tmp_path / "peft", with_lengths), base.config)


def test_patterns_are_read_as_peft_reads_them() -> None:
    from quadriga.io import peft_config

    def how(**changes: Any) -> peft_config.PeftConfig:
        return peft_config.read({"r": 4, "lora_alpha": 8, "target_modules": ["q_proj"]} | changes)

    assert (
        how(alpha_pattern={"q_proj": 2, "layers.0.self_attn.q_proj": 9}).scale_of("m.layers.0.self_attn.q_proj") == 0.5
    )
    assert how(alpha_pattern={"_proj": 2}).scale_of("m.layers.0.q_proj") == 2.0, "an ending begins after a dot"
    assert how(rank_pattern={r"layers\.(0|1)\..*": 2}).rank_of("model.layers.1.self_attn.q_proj") == 2
    assert how().adapts("model.layers.0.self_attn.q_proj") is True
    assert how().adapts("model.layers.0.self_attn.xq_proj") is False
    assert how(target_modules=None).adapts("anything") is None
    assert how(target_modules="all-linear").adapts("model.layers.0.mlp.up_proj") is True
    assert how(target_modules="all-linear").adapts("lm_head") is False
    assert how(layers_to_transform=3).adapts("model.layers.3.self_attn.q_proj") is True
    assert how(layers_to_transform=[3]).adapts("model.layers.13.self_attn.q_proj") is False
    assert how(layers_to_transform=[3]).adapts("model.layers.1.experts.3.q_proj") is None, "peft's meaning changed"
