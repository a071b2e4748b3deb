"""How many kernels a decode step of DBRX starts, counted on tensors that have shapes and no numbers."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from quadriga.engine.engine import Engine
from quadriga.engine.request import Request, SamplingParams
from quadriga.kernels.triton.launch import recording
from quadriga.kernels.triton.linear import Matrix
from quadriga.kernels.triton.weights import empty
from quadriga.model.cache_layout import cache_layout
from quadriga.model.config import ModelConfig
from quadriga.model.families import preset
from quadriga.model.weight_map import parameter_shapes, stays_float32
from quadriga.runners.cuda import inputs, sampling
from quadriga.runners.cuda import runner as runner_module
from quadriga.runners.cuda.inputs import StaticPass
from quadriga.runners.cuda.model import DeviceCache, DeviceModel
from quadriga.runners.cuda.runner import CudaRunner
from quadriga.runners.cuda.weights import DeviceWeights
from tests.checkpoint.models import TINY

_FREE = (
    "view",
    "empty",
    "slice",
    "select",
    "split",
    "detach",
    "unsqueeze",
    "alias",
    "t.default",
    "transpose",
    "expand",
    "flatten",
)


class TorchKernels(TorchDispatchMode):
    """Operators of torch that would start a kernel: all but views and memory."""

    def __init__(self) -> None:
        super().__init__()
        self.started: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not any(name in str(func) for name in _FREE):
            self.started.append(str(func))
        return func(*args, **(kwargs or {}))


META = torch.device("meta")


def weights(config: ModelConfig, form: str) -> DeviceWeights:
    """A model whose matrices are of a format; on no device, of no numbers."""
    parameters: dict[str, Matrix] = {}
    for name, shape in parameter_shapes(config).items():
        wide = len(shape) == 1 or stays_float32(name) or name.endswith(("wk_b.weight", "wv_b.weight"))
        if wide or form == "plain":
            parameters[name] = torch.empty(shape, dtype=torch.bfloat16, device=META)
        else:
            parameters[name] = empty(form, shape[0] if len(shape) == 3 else 1, *shape[-2:])
    return DeviceWeights(parameters, torch.bfloat16)


class Kept(TorchDispatchMode):
    """Keeps every tensor that is made, views left out."""

    def __init__(self, made: list[torch.Tensor]) -> None:
        super().__init__()
        self._made, self._seen = made, set[int]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor) and (place := out.untyped_storage()._cdata) not in self._seen:
            self._seen.add(place)
            self._made.append(out)
        return out


def step(config: ModelConfig, n: int, form: str) -> tuple[list[str], list[str]]:
    """(kernels of ours, operators of torch) of one step of n sequences."""
    layout = cache_layout(config)
    cache = DeviceCache(config, layout, 64, 0, dtype=torch.bfloat16, device=META)
    compute = DeviceModel(config, weights(config, form), cache, n)
    static = StaticPass(n, layout.n_groups, 2048, is_recurrent=False, device=META)
    torch_kernels = TorchKernels()
    with recording() as noted, torch_kernels:
        compute.compute(static.inputs)
    return [one.name for one in noted], torch_kernels.started


@pytest.mark.parametrize(("n", "a_layer", "form"), [(1, 8, "plain"), (1, 8, "q4"), (16, 8, "q4k"), (64, 9, "plain")])
def test_a_layer_of_dbrx_starts_eight_kernels(n: int, a_layer: int, form: str) -> None:
    """Up to 16 sequences, which a router sorts in the launch that chose; nine for more. In every format."""
    config = preset("dbrx-132b")
    short = replace(config, layers=config.layers[:3])
    ours, of_torch = step(short, n, form)
    one_less, _ = step(replace(config, layers=config.layers[:2]), n, form)
    layer = Counter(ours) - Counter(one_less)
    assert layer.total() == a_layer and of_torch == []
    named = ("embed_kernel", "linear_kernel") if form == "plain" else ("embed_planes_kernel", "grouped_kernel")
    assert (ours[0], ours[-1]) == named and ours[1] == "norm_kernel"
    assert len(ours) == 3 * a_layer + 3, "beside the layers: embedding, the first norm, the head"


H100_BYTES = 80 * 2**30
"""Five stacks of 16 GiB; the driver keeps about one percent."""


def test_dbrx_132b_in_four_bits_fits_on_one_h100_with_caches_for_sixteen_thousand_tokens() -> None:
    """Weights, cache, tables of rotations, places where splits meet, static inputs: all that the runner keeps."""
    config = preset("dbrx-132b")
    made: list[torch.Tensor] = []
    with Kept(made):
        runner = CudaRunner(config, weights(config, "q4"), n_blocks=1024)
        for n in runner._graphs.buckets:
            runner._static(n)
    form, weight_bytes = runner.weights()
    assert form == "q4" and weight_bytes == pytest.approx(131.6e9 * 4.5 / 8, rel=0.001)
    assert runner.kv_bytes == 1024 * 16 * 40 * 2 * 8 * 128 * 2
    everything = sum(t.untyped_storage().nbytes() for t in made)
    assert everything >= weight_bytes + runner.kv_bytes
    assert everything < 0.95 * H100_BYTES
    assert weights(config, "plain").sizes().total() > 3 * H100_BYTES, "in bfloat16 three are not enough"


class Crossings(TorchDispatchMode):
    """Counts what leaves the device for the host, and lets numbers enter it by ``to_device`` alone, which pins them."""

    def __init__(self) -> None:
        super().__init__()
        self.fetched = 0
        self.pinning = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = [a for a in args if isinstance(a, torch.Tensor)]
        target = (kwargs or {}).get("device")
        if str(func).startswith("aten._local_scalar_dense") and any(a.is_meta for a in given):
            raise AssertionError("a number on the device was read")
        if str(func).startswith("aten._to_copy") and target is not None:
            if given[0].is_meta and torch.device(target).type == "cpu":
                self.fetched += 1
                return torch.zeros(given[0].shape, dtype=given[0].dtype)
            assert self.pinning or given[0].is_meta or torch.device(target).type != "meta", (
                "copied from pageable memory"
            )
        elif str(func).startswith("aten.copy_"):
            assert args[0].is_meta == args[1].is_meta or args[1].ndim == 0, "copied from pageable memory"
        return func(*args, **(kwargs or {}))


def test_the_host_waits_once_a_step_and_copies_pinned_memory_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whole steps of the engine, where the device is the meta device: prompts, then graphs of single tokens."""
    crossings, plain = Crossings(), inputs.to_device

    def pinned(values: Any, device: torch.device) -> torch.Tensor:
        crossings.pinning = True
        made = plain(values, device)
        crossings.pinning = False
        return made

    for module in (inputs, runner_module, sampling):
        monkeypatch.setattr(module, "to_device", pinned)
    config = replace(TINY["dbrx"], max_seq_len=64)
    engine = Engine(CudaRunner(config, weights(config, "q4"), 24), max_batch_tokens=24, max_sequences=4)
    for n in (19, 1, 7):
        params = SamplingParams(max_new_tokens=4, ignore_eos=True, temperature=0.5, seed=n, logprobs=2)
        engine.submit(Request(prompt=tuple(range(1, n + 1)), params=params))
    steps = 0
    with recording() as noted, crossings:
        while engine.has_work:
            before, launched = crossings.fetched, len(noted)
            engine.step()
            steps += 1
            assert crossings.fetched - before == 1 and len(noted) > launched
    assert steps >= 4


@pytest.mark.parametrize("family", ["dbrx", "deepseek_v3", "qwen3next", "lfm2moe", "gpt_oss", "qwen2moe"])
def test_a_step_of_any_family_can_be_captured(family: str) -> None:
    """No number is read or copied between host and device while it is computed; what is captured stays where it is."""
    config = TINY[family]
    layout = cache_layout(config)
    cache = DeviceCache(config, layout, 12, 4, dtype=torch.bfloat16, device=META)
    compute = DeviceModel(config, weights(config, "q8"), cache, 4)
    static = StaticPass(4, layout.n_groups, 3, is_recurrent=config.is_recurrent, device=META)
    with recording() as noted, Crossings() as crossings:
        compute.compute(static.inputs)
    assert noted and crossings.fetched == 0
