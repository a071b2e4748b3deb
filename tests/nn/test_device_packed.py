"""Packed matrices unpacked by torch: the numbers of the CPU's kernels bit for bit, and a model trains over them."""

from __future__ import annotations

import pytest
import torch

from quadriga.errors import ConfigError
from quadriga.model.adapter_spec import LoraSpec, adapted_shapes
from quadriga.nn.context import PackedContext
from quadriga.nn.device_packed import DevicePacked
from quadriga.nn.linear import numbers
from quadriga.nn.lora import attach, quantised
from quadriga.nn.transformer import Transformer, random_parameters
from tests.checkpoint.models import TINY
from tests.nn.test_lora import IDS, loss_of, random_factors
from tests.packing import pack, unpack

CPU = torch.device("cpu")


@pytest.mark.parametrize("form", ["q8", "q4"])
@pytest.mark.parametrize("shape", [(16, 64), (50, 130), (7, 33)])
def test_the_numbers_are_the_kernels(form: str, shape: tuple[int, int]) -> None:
    packed = pack(torch.randn(shape, generator=torch.Generator().manual_seed(3)), form)
    made = numbers(DevicePacked(packed, CPU))
    assert made.shape == shape and torch.equal(made, unpack(packed)) and made.unique().numel() > 20


def test_other_formats_are_refused() -> None:
    with pytest.raises(ConfigError, match="must be q8 or q4, got mx4"):
        DevicePacked(pack(torch.randn(16, 64), "mx4"), CPU)


@pytest.mark.parametrize("name", ["mixtral", "llama2"])
def test_a_model_over_them_has_the_gradients_of_one_over_the_kernels_blocks(name: str) -> None:
    targets = ("attention", "experts") if name == "mixtral" else ("attention", "ffn")
    spec = LoraSpec(rank=4, alpha=6.0, targets=targets)
    parameters = random_parameters(TINY[name], std=0.2)
    packed = {}
    for n in adapted_shapes(TINY[name], spec):
        one = [pack(m.contiguous(), "q4") for m in (parameters[n] if parameters[n].ndim == 3 else parameters[n][None])]
        packed[n] = one if parameters[n].ndim == 3 else one[0]
    found = []
    for device in (None, CPU):
        model = Transformer.from_parameters(TINY[name], parameters).eval()
        quantised(model, packed, device)
        made = attach(model, spec, random_factors(TINY[name], spec))
        loss_of(model).backward()
        found.append((model(IDS, PackedContext([37])).logits.detach(), [(f.a.grad, f.b.grad) for f in made.values()]))
    (logits, gradients), (theirs, their_gradients) = found
    torch.testing.assert_close(logits, theirs, rtol=1e-5, atol=2e-5)
    for pair, other in zip(gradients, their_gradients, strict=True):
        for ours, that in zip(pair, other, strict=True):
            torch.testing.assert_close(ours, that, rtol=1e-4, atol=1e-5)
