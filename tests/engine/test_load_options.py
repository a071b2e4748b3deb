"""Every option of ``quadriga.load`` beside every way a model runs: used, which a changed value shows, or refused by name."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import quadriga
from quadriga import LLM, option_rules, runtime
from quadriga.engine.load_options import RULES, VALUES, LoadOptions
from quadriga.errors import ConfigError
from quadriga.hub import catalogue
from quadriga.io.convert import convert
from quadriga.kernels import dispatch
from quadriga.kernels.cpu.packing import Packed
from quadriga.runners.compiled import CompiledModel
from quadriga.runners.cuda.runner import CudaRunner
from quadriga.runners.torch import TorchRunner
from tests.checkpoint.test_packed import write

IDS = [5, 17, 42, 88, 3]

WAYS: dict[str, dict[str, Any]] = {
    "kernels": {"format": "float32"},
    "quantised": {"format": "q8"},
    "directory": {},
    "dtype": {"dtype": "float32"},
    "reference": {},
    "triton": {"format": "q8", "dtype": "float32"},
}
"""How a model runs: on the CPU's kernels from plain weights, quantised as it is loaded, or from a packed directory; on
torch by a dtype, or by QUADRIGA_OPS; on the kernels for GPUs, interpreted, quantised as it is loaded."""

ON_TORCH = ("dtype", "reference")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A mixture as a Hugging Face directory, packed as q8, and a dense model packed so."""
    root = tmp_path_factory.mktemp("models")
    torch.manual_seed(0)
    write(root / "plain", "mixtral")
    convert(root / "plain", root / "packed", format="q8")
    write(root / "dense", "llama2")
    convert(root / "dense", root / "dense-packed", format="q8")
    return {one.name: one for one in root.iterdir()}


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    """What torch computes with is put back."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def load(folders: dict[str, Path], way: str, **given: Any) -> LLM:
    """The model run one way, with options besides; one given as None is left out of the way's own."""
    options = {name: value for name, value in (WAYS[way] | given).items() if value is not None}
    common = {} if way == "triton" else {"threads": 1}
    with dispatch.use(way) if way in dispatch.BACKENDS else nullcontext():
        return quadriga.load(folders["packed" if way == "directory" else "plain"], **(common | options))


def formats(llm: LLM) -> set[str]:
    assert isinstance(llm.runner, CompiledModel)
    return {p.format for p in llm.runner.parameters.values() if isinstance(p, Packed)}


def device_formats(llm: LLM) -> set[str]:
    assert isinstance(llm.runner, CudaRunner)
    return set(llm.runner._weights.sizes())


def device_dtype(llm: LLM) -> torch.dtype:
    assert isinstance(llm.runner, CudaRunner)
    return llm.runner._weights.dtype


def kernel_threads(llm: LLM) -> int:
    assert isinstance(llm.runner, CompiledModel)
    return llm.runner.program.context.threads


def weight_dtype(llm: LLM) -> str:
    assert isinstance(llm.runner, TorchRunner)
    return str(next(llm.runner.model.parameters()).dtype)


def cache_bytes(llm: LLM) -> float:
    return llm.runner.kv_bytes / llm.runner.n_blocks


def logits(llm: LLM) -> list[float]:
    values: list[float] = llm.logits(IDS)[-1].tolist()
    return values


Used = tuple[Any, Any, Callable[[LLM], Any]]
USED: dict[str, dict[str, Used]] = {
    "format": {
        "kernels": ("float32", "bfloat16", formats),
        "quantised": ("q8", "q4", formats),
        "directory": ("keep", "q4m", formats),
        "triton": ("q8", "q4", device_formats),
    },
    "dtype": {"dtype": ("float32", "float64", weight_dtype), "triton": ("float32", "bfloat16", device_dtype)},
    "device": {way: ("cpu", "auto", lambda llm: type(llm.runner)) for way in WAYS},
    "threads": {
        **dict.fromkeys(("kernels", "quantised", "directory"), (1, 2, kernel_threads)),
        **dict.fromkeys(ON_TORCH, (1, 2, lambda llm: torch.get_num_threads())),
    },
    "activations": dict.fromkeys(("quantised", "directory"), ("int8", "int16", logits)),
    "kv_format": dict.fromkeys(("kernels", "quantised", "directory"), ("bfloat16", "q8", cache_bytes)),
    "kv_memory": {way: (200_000, 400_000, lambda llm: llm.runner.n_blocks) for way in WAYS},
    "expert_memory": {"directory": (None, 1_000_000, lambda llm: llm.expert_store is None)},
    "parallel": {},  # one process alone is no mesh; tests/runners/test_distributed.py starts several
    "max_sequences": {way: (3, 7, lambda llm: llm.engine.max_sequences) for way in WAYS},
    "max_batch_tokens": {way: (300, 700, lambda llm: llm.engine.scheduler.max_batch_tokens) for way in WAYS},
}
"""Option -> way -> two values, and what they change of the loaded model. Every other cell is refused."""

UNCHANGED = {"device"}
"""Two names for the same thing on a machine without an accelerator: the model loads, and nothing differs."""

GIVEN = {
    "format": "q8",
    "dtype": "float32",
    "threads": 2,
    "activations": "int8",
    "kv_format": "bfloat16",
    "expert_memory": 1_000_000,
    "parallel": "tp=2",
}
"""What is refused is refused even where it says what happens anyway."""

CELLS = [(option, way) for option in USED for way in WAYS]


def test_the_table_has_every_option() -> None:
    own = {field.name for field in fields(LoadOptions)}
    assert set(USED) == own
    signature = inspect.signature(quadriga.load).parameters
    assert own == set(signature) - {"path_or_name", "progress"}
    assert {rule.option for rule in RULES} <= own and set(VALUES) == own - {"device", "parallel"}
    defaults = {field.name: field.default for field in fields(LoadOptions)}
    assert defaults == {name: signature[name].default for name in own}


@pytest.mark.parametrize(("option", "way"), CELLS)
def test_every_option_is_used_or_refused(folders: dict[str, Path], option: str, way: str) -> None:
    if way in USED[option]:
        first, second, seen = USED[option][way]
        if option == "device":
            if torch.cuda.is_available():
                pytest.skip("auto is the accelerator here")
            assert seen(load(folders, way, device=first)) == seen(load(folders, way, device=second))
            return
        assert seen(load(folders, way, **{option: first})) != seen(load(folders, way, **{option: second}))
        return
    if option == "dtype":
        # The one that chooses: beside it nothing of the kernels has an effect.
        if way == "reference":
            assert weight_dtype(load(folders, way, dtype="float64")) == "torch.float64"
        elif WAYS[way]:
            with pytest.raises(ConfigError, match=r"^format .* would have no effect.*dtype float32 computes in plain"):
                load(folders, way, dtype="float32")
        else:
            assert isinstance(load(folders, way, dtype="float32").runner, TorchRunner)
        return
    with pytest.raises(ConfigError, match=rf"^{option}.*(Leave|Make one|Start them)"):
        load(folders, way, **{option: GIVEN[option]})


@pytest.mark.parametrize("option", ["format", "activations", "kv_format", "expert_memory"])
def test_the_reason_names_what_chose_torch(folders: dict[str, Path], option: str) -> None:
    with pytest.raises(ConfigError, match=r"dtype bfloat16 computes in plain torch. Leave one of the two out"):
        quadriga.load(folders["plain"], dtype="bfloat16", **{option: GIVEN[option]})
    with dispatch.use("reference"), pytest.raises(ConfigError, match=r"unset QUADRIGA_OPS"):
        quadriga.load(folders["plain"], **{option: GIVEN[option]})


def test_numbers_on_a_gpu_s_kernels_are_of_dtype(folders: dict[str, Path]) -> None:
    with pytest.raises(ConfigError, match=r"^format bfloat16 would have no effect: numbers are of dtype"):
        load(folders, "triton", format="bfloat16")


def test_what_depends_on_the_model_is_refused_too(folders: dict[str, Path]) -> None:
    with pytest.raises(ConfigError, match=r"expert_memory.*model is dense"):
        quadriga.load(folders["dense-packed"], expert_memory=1_000_000)
    with pytest.raises(ConfigError, match=r"expert_memory.*packed Quadriga directory.*Make one"):
        quadriga.load(folders["plain"], expert_memory=1_000_000)
    with pytest.raises(ConfigError, match=r"activations.*int8 would have no effect"):
        quadriga.load(folders["plain"], activations="int8")
    assert np.isfinite(quadriga.load(folders["packed"], activations="int8", threads=1).logits([1])).all()


def test_more_tokens_in_a_pass_than_usual_are_computed(folders: dict[str, Path]) -> None:
    """A pass of over 2048 tokens: 60 prompts of 60 tokens at once."""
    params = quadriga.SamplingParams(max_new_tokens=1)
    prompts = [[(7 * i + j) % 97 for j in range(60)] for i in range(60)]
    wide = load(folders, "kernels", max_batch_tokens=4000, kv_memory=20_000_000)
    narrow = load(folders, "kernels", max_batch_tokens=128)
    wide_ids = [answer.token_ids for answer in wide.generate_many(prompts, params)]
    assert wide.engine.stats().n_steps < 3
    assert wide_ids == [answer.token_ids for answer in narrow.generate_many(prompts, params)]


WRONG: list[tuple[str, Any]] = [
    *((option, "nonsense") for option in ("format", "dtype", "device", "activations", "kv_format")),
    *((option, "") for option in ("format", "dtype", "device", "activations", "kv_format")),
    ("device", "mps"),
    ("device", "cuda:x"),
    ("device", "cpu:7"),
    *(
        (option, value)
        for option in ("threads", "kv_memory", "expert_memory", "max_sequences", "max_batch_tokens")
        for value in (0, -1, 2**62, 1.5, True, "4")
    ),
]


@pytest.mark.parametrize(("option", "value"), WRONG)
@pytest.mark.parametrize("way", ["kernels", "dtype"])
def test_wrong_values_are_refused_before_a_model_is_looked_for(
    monkeypatch: pytest.MonkeyPatch, option: str, value: Any, way: str
) -> None:
    def looked_for(*_: Any, **__: Any) -> Path:
        raise AssertionError("a model was looked for")

    monkeypatch.setattr(catalogue, "resolve", looked_for)
    with pytest.raises(ConfigError, match=rf"^{option} must be "):
        quadriga.load("smollm2-135m-instruct", **(WAYS[way] | {option: value}))


def test_more_sequences_than_tokens_and_more_memory_than_there_is() -> None:
    with pytest.raises(ConfigError, match=r"max_sequences must be at most max_batch_tokens"):
        quadriga.load("none", max_sequences=65, max_batch_tokens=64)
    with pytest.raises(ConfigError, match=r"--kv-memory must be at most this machine's memory"):
        LoadOptions(kv_memory=runtime.memory_bytes()[0] + 1).check(option_rules.as_flag)


def test_an_unknown_backend_is_refused_before_a_model_is_looked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "_from_environment", lambda: "nonsense")
    with pytest.raises(ConfigError, match=r"QUADRIGA_OPS"):
        LoadOptions().check()


def test_apple_gpus_are_named() -> None:
    with pytest.raises(ConfigError, match=r"--device must be .*'mps'. Apple's GPUs are not supported"):
        LoadOptions(device="mps").check(option_rules.as_flag)
