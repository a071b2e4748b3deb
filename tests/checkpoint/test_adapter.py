"""Adapter files: ours, peft's in both directions (against peft itself where it is installed), and folding in."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from quadriga.errors import CheckpointError, ConfigError
from quadriga.io import convert
from quadriga.io.adapter import load, merge
from quadriga.io.adapter_files import Adapter, save
from quadriga.io.open import open_checkpoint
from quadriga.io.peft_read import from_peft
from quadriga.io.peft_write import to_peft
from quadriga.kernels.arrays import tensor
from quadriga.model.adapter_spec import LoraSpec
from quadriga.nn.context import PackedContext
from quadriga.nn.load import load_parameters
from quadriga.nn.lora import attach
from quadriga.nn.transformer import Transformer, random_parameters
from tests.checkpoint.models import TINY, write_hf
from tests.checkpoint.test_upcycle import opened
from tests.nn.test_lora import ALL, IDS, stored_factors

SPEC = LoraSpec(rank=4, alpha=6.0, targets=("attention", "experts", "router"))


def adapter_for(name: str, targets: tuple[str, ...] | None = None) -> Adapter:
    spec = replace(SPEC, targets=targets or ALL[name])
    return Adapter(spec=spec, factors=stored_factors(TINY[name], spec), base=name)


def tensors(adapter: Adapter) -> dict[str, tuple[Tensor, Tensor]]:
    """Its factors for the model in torch."""
    return {name: (tensor(a), tensor(b)) for name, (a, b) in adapter.factors.items()}


def deltas(adapter: Adapter) -> dict[str, Tensor]:
    """What an adapter adds, however its ranks are arranged."""
    return {n: adapter.spec.scale * (b.double() @ a.double()) for n, (a, b) in tensors(adapter).items()}


def assert_same(one: Adapter, two: Adapter) -> None:
    first, second = deltas(one), deltas(two)
    assert first.keys() == second.keys()
    for name in first:
        torch.testing.assert_close(first[name], second[name], rtol=1e-5, atol=1e-6, msg=name)


@pytest.mark.parametrize("name", list(TINY))
def test_saved_and_loaded_it_is_the_same(tmp_path: Path, name: str) -> None:
    adapter = adapter_for(name)
    save(adapter, tmp_path / "a")
    again = load(tmp_path / "a", TINY[name])
    assert again.spec == adapter.spec and again.base == name
    for n, factors in adapter.factors.items():
        assert all(np.array_equal(x, y) for x, y in zip(factors, again.factors[n], strict=True))


def test_merged_it_computes_what_the_attached_one_does(tmp_path: Path) -> None:
    base, adapter = opened(tmp_path / "base", "mixtral"), adapter_for("mixtral")
    model = Transformer.from_parameters(base.config, load_parameters(base)).eval()
    attach(model, adapter.spec, tensors(adapter))
    wanted = model(IDS, PackedContext([37])).logits.detach()
    merged = merge(base, adapter)
    convert.write(merged, tmp_path / "hf", to="hf")
    convert.write(merged, tmp_path / "one.gguf", to="gguf", gguf_format="float32")
    for path in ("hf", "one.gguf"):
        again = open_checkpoint(tmp_path / path)
        got = Transformer.from_parameters(again.config, load_parameters(again)).eval()(IDS, PackedContext([37])).logits
        torch.testing.assert_close(
            got, wanted, rtol=0, atol=2e-4 * float(wanted.std())
        )  # near ties of the router magnify roundings


@pytest.mark.parametrize(
    ("name", "layout", "targets"),
    [
        ("llama2", None, None),
        ("llama2-tied", None, None),
        ("mixtral", "hf", None),
        ("mixtral", "hf5", ("attention", "experts")),
        ("dbrx", "split", None),
        ("gpt_oss", None, ("attention", "experts", "embeddings", "head")),
        ("mpt", None, None),
        *[(name, None, None) for name in ("glm4moe", "qwen2moe", "dots1", "ernie4_5-moe", "hunyuan-moe", "minimax-m2")],
        *[(name, None, None) for name in ("olmo2", "flex_olmo", "phimoe")],
        *[(name, None, None) for name in ("deepseek_v2", "deepseek_v3")],
    ],
)
def test_to_peft_and_back(tmp_path: Path, name: str, layout: str | None, targets: tuple[str, ...] | None) -> None:
    adapter = adapter_for(name, targets)
    to_peft(adapter, TINY[name], tmp_path / "peft", layout=layout)
    assert_same(from_peft(tmp_path / "peft", TINY[name]), adapter)


def hf_model(folder: Path, name: str) -> Any:
    transformers = pytest.importorskip("transformers")
    config = replace(TINY[name], bos_id=1, eos_ids=(2,))
    write_hf(folder, config, parameters=random_parameters(config, std=0.2))
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@pytest.mark.parametrize(
    ("name", "targets"),
    [
        ("llama2", None),
        ("llama2-tied", None),
        ("mixtral", None),
        ("gpt_oss", ("attention", "experts")),
        *[(name, None) for name in ("qwen2moe", "ernie4_5-moe", "hunyuan-moe", "olmo2", "phimoe")],
        *[(name, ("attention", "experts", "ffn", "shared", "embeddings", "head")) for name in ("glm4moe", "dots1")],
    ],
)
def test_peft_computes_the_same_from_the_files_we_write(
    tmp_path: Path, name: str, targets: tuple[str, ...] | None
) -> None:
    peft = pytest.importorskip("peft")
    model = hf_model(tmp_path / "base", name)
    adapter = adapter_for(name, targets)
    to_peft(adapter, TINY[name], tmp_path / "peft")
    with torch.no_grad():
        theirs = peft.PeftModel.from_pretrained(model, tmp_path / "peft").eval()(IDS[None]).logits[0]
        ours = Transformer.from_parameters(TINY[name], load_parameters(open_checkpoint(tmp_path / "base"))).eval()
        before = ours(IDS, PackedContext([37])).logits
        attach(ours, adapter.spec, tensors(adapter))
        got = ours(IDS, PackedContext([37])).logits
    torch.testing.assert_close(got, theirs, rtol=0, atol=1e-4 * float(theirs.std()))
    assert (got - before).abs().max() > 0.1 * theirs.std(), "the adapter does something"


def test_we_read_the_files_peft_writes(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    model = hf_model(tmp_path / "base", "mixtral")
    config = peft.LoraConfig(r=3, lora_alpha=5, target_modules=["q_proj", "v_proj", "w1", "w2"])
    theirs = peft.get_peft_model(model, config).eval()
    for n, p in theirs.named_parameters():
        if "lora_" in n:
            torch.nn.init.normal_(p, std=0.3)
    theirs.save_pretrained(tmp_path / "peft")
    adapter = load(tmp_path / "peft", TINY["mixtral"])
    assert adapter.spec.targets == ("attention", "experts")
    ours = Transformer.from_parameters(TINY["mixtral"], load_parameters(open_checkpoint(tmp_path / "base"))).eval()
    attach(ours, adapter.spec, tensors(adapter))
    with torch.no_grad():
        wanted = theirs(IDS[None]).logits[0]
        torch.testing.assert_close(
            ours(IDS, PackedContext([37])).logits, wanted, rtol=0, atol=1e-4 * float(wanted.std())
        )


def test_the_fused_form_is_what_pefts_wrapper_computes(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")

    class Experts(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gate_up_proj = torch.nn.Parameter(torch.zeros(5, 160, 48))
            self.down_proj = torch.nn.Parameter(torch.zeros(5, 48, 80))

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return self.gate_up_proj + 0, self.down_proj + 0

    class Shell(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.config = type("Config", (dict,), {"model_type": "custom"})()
            self.model = torch.nn.Module()
            self.model.layers = torch.nn.ModuleList(torch.nn.Module() for _ in range(3))
            for layer in self.model.layers:
                layer.mlp = torch.nn.Module()
                layer.mlp.experts = Experts()

        def prepare_inputs_for_generation(self) -> None: ...

        def forward(self, x: Tensor) -> list[tuple[Tensor, Tensor]]:
            return [layer.mlp.experts(x) for layer in self.model.layers]

    adapter = adapter_for("mixtral", ("experts",))
    to_peft(adapter, TINY["mixtral"], tmp_path / "peft", layout="hf5")
    theirs = peft.PeftModel.from_pretrained(Shell(), tmp_path / "peft")
    ours = deltas(adapter)
    for layer, (gate_up, down) in enumerate(theirs.get_base_model()(torch.zeros(1))):
        wanted = torch.cat((ours[f"layers.{layer}.moe.w_gate"], ours[f"layers.{layer}.moe.w_up"]), 1)
        torch.testing.assert_close(gate_up.double(), wanted, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(down.double(), ours[f"layers.{layer}.moe.w_down"], rtol=1e-5, atol=1e-5)


def test_both_forms_of_fused_stacks_are_read(tmp_path: Path) -> None:
    """peft before 0.19 takes the first axis of a slice for the input; where both fit, its version tells them apart."""
    config = TINY["mixtral"]
    square = replace(config, d_model=80)  # w_down is (E, 80, 80)
    for one, name in ((config, "oblong"), (square, "square")):
        spec = LoraSpec(rank=4, alpha=6.0, targets=("experts",))
        adapter = Adapter(spec=spec, factors=stored_factors(one, spec))
        to_peft(adapter, one, tmp_path / name, layout="hf5")
        assert_same(from_peft(tmp_path / name, one), adapter)
        tensors = load_file(tmp_path / name / "adapter_model.safetensors")
        e, old = 5, {}
        for key in [key for key in tensors if key.endswith("lora_A.weight")]:
            a, b = tensors[key], tensors[key.replace("lora_A", "lora_B")]
            a_each, b_each = a.reshape(e, -1, a.shape[1]), b.reshape(b.shape[0], -1, e)  # (E, r, in), (out, r, E)
            old[key] = b_each.permute(2, 1, 0).reshape(-1, b.shape[0]).contiguous()  # (E r, out)
            old[key.replace("lora_A", "lora_B")] = a_each.permute(2, 1, 0).reshape(a.shape[1], -1).contiguous()
        save_file(old, tmp_path / name / "adapter_model.safetensors")
        file = tmp_path / name / "adapter_config.json"
        body = json.loads(file.read_text())
        for version in ("0.18.1", None):
            file.write_text(json.dumps(body | {"peft_version": version}))
            assert_same(from_peft(tmp_path / name, one), adapter)


def test_foreign_changed_and_incomplete_files_are_refused(tmp_path: Path) -> None:
    adapter = adapter_for("mixtral")
    save(adapter, tmp_path / "a")
    with pytest.raises(CheckpointError, match="does not fit this model"):
        load(tmp_path / "a", replace(TINY["mixtral"], d_model=64))
    weights = tmp_path / "a" / "adapter.safetensors"
    raw = bytearray(weights.read_bytes())
    raw[-1] ^= 1
    weights.write_bytes(raw)
    with pytest.raises(CheckpointError, match="changed since it was written"):
        load(tmp_path / "a", TINY["mixtral"])
    with pytest.raises(CheckpointError, match="is no adapter"):
        load(tmp_path, TINY["mixtral"])
    with pytest.raises(CheckpointError, match="is not empty"):
        save(adapter, tmp_path / "a")


def test_more_than_lora_is_refused(tmp_path: Path) -> None:
    to_peft(adapter_for("llama2"), TINY["llama2"], tmp_path / "p")
    file = tmp_path / "p" / "adapter_config.json"
    body = json.loads(file.read_text())
    file.write_text(json.dumps(body | {"bias": "all"}))
    with pytest.raises(ConfigError, match="bias must be 'none'"):
        load(tmp_path / "p", TINY["llama2"])
    to_peft(adapter_for("llama2-tied"), TINY["llama2-tied"], tmp_path / "tied")
    tied = load_file(tmp_path / "tied" / "adapter_model.safetensors")
    del tied["base_model.model.lm_head.lora_A.weight"]
    save_file(tied, tmp_path / "tied" / "adapter_model.safetensors")
    with pytest.raises(ConfigError, match="both must have the same factors"):
        load(tmp_path / "tied", TINY["llama2-tied"])
    with pytest.raises(ConfigError, match="peft has no form for factors of"):
        to_peft(adapter_for("dbrx"), TINY["dbrx"], tmp_path / "q", layout="fused")


@pytest.mark.parametrize(
    ("name", "module", "target"),
    [
        ("qwen2moe", "model.layers.1.mlp.shared_expert_gate", "layers.1.moe.shared_gate"),
        ("deepseek_v3", "model.layers.1.self_attn.kv_b_proj", "layers.1.attn.wk_b.weight"),
    ],
)
def test_factors_of_what_no_adapter_changes_here_are_refused_with_the_reason(
    tmp_path: Path, name: str, module: str, target: str
) -> None:
    """What peft's all-linear makes of Qwen's shared experts and of DeepSeek's latents."""
    to_peft(adapter_for(name, None), TINY[name], tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    held = load_file(file)
    stored = f"base_model.model.{module}"
    held |= {f"{stored}.lora_A.weight": torch.ones(4, 48), f"{stored}.lora_B.weight": torch.ones(1, 4)}
    save_file(held, file)
    with pytest.raises(
        CheckpointError,
        match=r"2 tensors fit no matrix of this model.*1 of the adapted modules have no factors here "
        rf"\(e.g. {module}, our {target}\): train the adapter with '{module.rpartition('.')[2]}' in exclude_modules",
    ):
        from_peft(tmp_path, TINY[name])
