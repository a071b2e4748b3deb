"""Gradients of grouped products beside torch's, in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from quadriga.kernels import ops, reference
from quadriga.kernels.triton.gradients import grouped_linear, weight_gradient


def _normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


COUNTS = {"ragged": [3, 0, 70, 1], "one row": [0, 1, 0, 0], "the last alone": [0, 0, 0, 21]}


@pytest.mark.parametrize("name", COUNTS)
def test_gradients_of_rows_and_weights(name: str) -> None:
    counts = torch.tensor(COUNTS[name])
    rows, weight = _normal(int(counts.sum()), 37, seed=1), _normal(4, 53, 37, seed=2)
    cotangent = _normal(len(rows), 53, seed=3)
    results = []
    for function, dtype in ((grouped_linear, torch.float32), (reference.grouped_linear, torch.float64)):
        leaves = [one.to(dtype, copy=True).requires_grad_() for one in (rows, weight)]
        out = function(*leaves, counts)
        out.backward(cotangent.to(dtype))
        results.append([out.detach(), *(leaf.grad for leaf in leaves)])
    for ours, truth in zip(*results, strict=True):
        assert ours is not None and truth is not None
        torch.testing.assert_close(ours.double(), truth, rtol=1e-5, atol=1e-5 * float(truth.abs().max()))
        assert ours.shape == truth.shape
    empty = counts == 0
    assert torch.equal(results[0][2][empty], torch.zeros_like(weight[empty]))


def test_a_gradient_that_is_not_asked_for_is_not_computed() -> None:
    rows, weight, counts = _normal(5, 16, seed=4), _normal(2, 24, 16, seed=5), torch.tensor([2, 3])
    weight.requires_grad_()
    grouped_linear(rows, weight, counts).sum().backward()
    assert rows.grad is None and weight.grad is not None


def test_experts_have_the_reference_s_gradients() -> None:
    ids = torch.tensor([[0, 2], [2, 1], [2, 0], [0, 1], [4, 2]])  # expert 3 of 5 idle
    shapes = [(5, 24), (5, 2), (5, 40, 24), (5, 40, 24), (5, 24, 40)]
    inputs = [_normal(*shape, seed=10 + i) for i, shape in enumerate(shapes)]
    results = []
    for backend, dtype in (("triton", torch.float32), ("reference", torch.float64)):
        x, combine, *weights = (one.to(dtype, copy=True).requires_grad_() for one in inputs)
        with ops.use(backend):
            out = ops.experts(x, ids, combine, *weights, "silu")
        out.backward(_normal(5, 24, seed=20).to(dtype))
        results.append([out.detach(), *(one.grad for one in (x, combine, *weights))])
    for ours, truth in zip(*results, strict=True):
        assert ours is not None and truth is not None
        torch.testing.assert_close(ours.double(), truth, rtol=1e-5, atol=1e-5 * float(truth.abs().max()))


def test_sums_of_bfloat16_rows_are_wide() -> None:
    """A row of 1 and 256 of 2^-8: bfloat16 sums would stay at 1, or lose half of it."""
    dy = torch.cat((torch.ones(1, 16), torch.full((256, 16), 2**-8))).bfloat16()
    dw = weight_gradient(dy, torch.ones(257, 16, dtype=torch.bfloat16), torch.tensor([0, 257], dtype=torch.int32))
    assert torch.equal(dw, torch.full((1, 16, 16), 2.0, dtype=torch.bfloat16))
