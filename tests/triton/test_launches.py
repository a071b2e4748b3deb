"""How many kernels a decode step of DBRX starts, counted on tensors that have shapes and no numbers."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from quadriga.kernels.triton.launch import recording
from quadriga.model.cache_layout import cache_layout
from quadriga.model.config import ModelConfig
from quadriga.model.families import preset
from quadriga.nn.transformer import Transformer
from quadriga.runners.cuda.inputs import StaticPass
from quadriga.runners.cuda.model import DeviceCache, DeviceModel

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


def step(config: ModelConfig, n: int) -> tuple[list[str], list[str]]:
    """(kernels of ours, operators of torch) of one step of n sequences."""
    with torch.device("meta"):
        model = Transformer(config).to(torch.bfloat16)
    layout = cache_layout(config)
    compute = DeviceModel(model, DeviceCache(model, layout, 64, 0), n)
    static = StaticPass(n, layout.n_groups, 2048, is_recurrent=False, device=torch.device("meta"))
    torch_kernels = TorchKernels()
    with recording() as noted, torch_kernels:
        compute.compute(static.inputs)
    return [one.name for one in noted], torch_kernels.started


@pytest.mark.parametrize(("n", "a_layer"), [(1, 8), (16, 8), (64, 9)])
def test_a_layer_of_dbrx_starts_eight_kernels(n: int, a_layer: int) -> None:
    """Up to 16 sequences, which a router sorts in the launch that chose; nine for more."""
    config = preset("dbrx-132b")
    short = replace(config, layers=config.layers[:3])
    ours, of_torch = step(short, n)
    one_less, _ = step(replace(config, layers=config.layers[:2]), n)
    layer = Counter(ours) - Counter(one_less)
    assert layer.total() == a_layer and of_torch == []
    assert ours[:2] == ["embed_kernel", "norm_kernel"] and ours[-1] == "linear_kernel"
    assert len(ours) == 3 * a_layer + 3, "beside the layers: embedding, the first norm, the head"
