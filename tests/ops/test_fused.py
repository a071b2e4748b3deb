"""The operations between a training step's products: the C++ kernels compared with the plain torch code."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from quadriga.kernels import ops
from quadriga.kernels.cpu import library as cpu
from quadriga.kernels.training import fused
from quadriga.kernels.training.expert_layer import ExpertSort, padded_rows

HERE = cpu.isas_in_force()
DTYPES = [torch.float32, torch.bfloat16]
EPS = {torch.float32: 2e-6, torch.bfloat16: 8e-3}
"""Tolerance relative to the largest number: a few roundings in float32, and one of the result to bfloat16."""
WIDTHS = [1, 15, 16, 45, 64]
"""Widths below, at and above a vector of 16 numbers."""


@pytest.fixture(params=[(isa, threads) for isa in HERE for threads in (1, 3)], ids=str)
def kernels(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The compiled kernels of one instruction set, on one thread and on several."""
    isa, threads = request.param
    context = cpu.Context(threads, isa)
    monkeypatch.setattr(fused, "_context", lambda: context)


def _normal(*shape: int, seed: int, dtype: torch.dtype = torch.float32, scale: float = 1.0) -> Tensor:
    return (torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * scale).to(dtype)


def _agree(function: Callable[..., tuple[Tensor, ...]], *inputs: Tensor) -> None:
    """Check that ``function``, which may overwrite its inputs, gives the same compiled and in plain float64."""
    ours = function(*(x.clone() for x in inputs))
    with ops.use("reference"):
        truth = function(*(x.double() if x.is_floating_point() else x for x in inputs))
    for a, b in zip(ours, truth, strict=True):
        eps = EPS[a.dtype]
        assert (a.double() - b).abs().max() <= eps * max(1.0, float(b.abs().max()))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.usefixtures("kernels")
def test_rows_are_gathered_and_summed(width: int, dtype: torch.dtype) -> None:
    x = _normal(50, width, seed=1, dtype=dtype)
    index = torch.randint(50, (90,), generator=torch.Generator().manual_seed(2))
    assert torch.equal(fused.gather_rows(x, index, x.new_empty(90, width)), x[index])
    _agree(lambda rows: (fused.sum_rows(rows, index.view(30, 3)),), x)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("activation", cpu.ACTIVATIONS)
@pytest.mark.usefixtures("kernels")
def test_hidden_rows_and_their_gradients(activation: str, width: int, dtype: torch.dtype) -> None:
    scale = 8.0 if activation == "clamped_glu" else 2.0  # so that the limits of 7 are reached
    gate, up, dh = (_normal(33, width, seed=i, dtype=dtype, scale=scale) for i in range(3))
    weights = _normal(33, 1, seed=4)

    def forward(gate: Tensor, up: Tensor, weights: Tensor) -> tuple[Tensor, ...]:
        return (fused.hidden_rows(gate, up, weights, activation, torch.empty_like(gate)),)

    def backward(gate: Tensor, up: Tensor, weights: Tensor, dh: Tensor) -> tuple[Tensor, ...]:
        hidden, du, d_weights = torch.empty_like(gate), torch.empty_like(gate), torch.empty_like(weights)
        dg = fused.hidden_rows_backward(gate, up, weights, activation, dh, hidden, du, d_weights)
        return dg, hidden, du, d_weights

    _agree(forward, gate, up, weights)
    _agree(backward, gate, up, weights, dh)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("alibi", [False, True])
@pytest.mark.parametrize(("n_queries", "keys", "offset"), [(5, 5, 0), (7, 40, 33), (16, 64, 48), (1, 1, 0)])
@pytest.mark.usefixtures("kernels")
def test_softmax_of_each_query_over_its_own_document(
    n_queries: int, keys: int, offset: int, alibi: bool, dtype: torch.dtype
) -> None:
    lows = torch.tensor([min(i * i, offset + i) for i in range(n_queries)])
    slopes = torch.tensor([0.5, 0.25, 0.1, 0.0, 0.7, 1.0]) if alibi else None
    shape = (2, n_queries, 3, keys)
    _agree(
        lambda scores: (fused.windowed_softmax(scores, lows, offset, slopes),),
        _normal(*shape, seed=1, dtype=dtype, scale=4.0),
    )
    p = fused.windowed_softmax(_normal(*shape, seed=1, dtype=dtype), lows, offset, slopes)
    _agree(
        lambda p, dp: (fused.windowed_softmax_backward(p, dp, lows, offset),), p, _normal(*shape, seed=2, dtype=dtype)
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [2, 16, 45, 1000])
@pytest.mark.usefixtures("kernels")
def test_cross_entropy_and_its_gradient(width: int, dtype: torch.dtype) -> None:
    logits = _normal(20, width, seed=1, dtype=dtype, scale=8.0)
    targets = torch.randint(width, (20,), generator=torch.Generator().manual_seed(2))
    for scale in (1.0, 0.6):
        _agree(lambda z, s=scale: (fused.cross_entropy(z, targets, s, gradient=True), z), logits)
        kept = logits.clone()
        fused.cross_entropy(kept, targets, scale, gradient=False)
        assert torch.equal(kept, logits)


@pytest.mark.parametrize("target", [-1, 5])
def test_a_target_outside_the_vocabulary_is_an_error(target: int) -> None:
    with pytest.raises(IndexError, match="must be from 0 to 4"):
        fused.cross_entropy(torch.zeros(2, 5), torch.tensor([0, target]), 1.0, gradient=True)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.usefixtures("kernels")
def test_nan_and_infinity_reach_the_result(bad: float, dtype: torch.dtype) -> None:
    """The guard skips a step by its loss and gradient, so NaN must reach both."""
    logits = _normal(3, 40, seed=1, dtype=dtype)
    logits[1, 33] = bad
    losses = fused.cross_entropy(logits, torch.tensor([0, 1, 2]), 1.0, gradient=True)
    assert losses.isnan().tolist() == [False, True, False] and bool(logits[1].isnan().all())
    scores = _normal(1, 4, 1, 4, seed=2, dtype=dtype)
    scores[0, 2, 0, 1] = bad
    p = fused.windowed_softmax(scores, torch.zeros(4, dtype=torch.int64), 0, None)[0, :, 0]
    assert p.isnan().any(1).tolist() == [False, False, True, False]
    gate, up, weights = _normal(2, 20, seed=1, dtype=dtype), _normal(2, 20, seed=2, dtype=dtype), torch.ones(2, 1)
    gate[1, 17] = bad
    up[1, 17] = bad
    hidden = fused.hidden_rows(gate, up, weights, "silu", torch.empty_like(gate))
    assert hidden.isfinite().all(1).tolist() == [True, False]
    if math.isnan(bad):  # limits of 7 bring an infinity back, as in torch, and must not do so with a NaN
        hidden = fused.hidden_rows(gate, up, weights, "clamped_glu", torch.empty_like(gate))
        assert hidden.isfinite().all(1).tolist() == [True, False]


@given(st.integers(1, 100_000))
def test_padding_is_small_and_row_counts_are_few(rows: int) -> None:
    assert rows <= padded_rows(rows) < rows + max(8, rows / 16 + 1)
    octave = range(1 << rows.bit_length() - 1, 1 << rows.bit_length())
    assert len({padded_rows(n) for n in octave}) <= 17


@given(st.integers(1, 40), st.integers(1, 6), st.integers(1, 3), st.integers(0, 1000))
def test_every_slot_has_a_row_of_its_own_expert(n: int, n_experts: int, top_k: int, seed: int) -> None:
    ids = torch.randint(n_experts, (n, top_k), generator=torch.Generator().manual_seed(seed))
    slots = ExpertSort(ids, n_experts)
    rows = slots.home.flatten()
    assert len(set(rows.tolist())) == n * top_k
    assert torch.equal(slots.tokens[slots.home], torch.arange(n)[:, None].expand(n, top_k))
    owner = torch.full((len(slots.tokens),), -1)
    for expert, first, last in slots.ranges():
        owner[first:last] = expert
    assert torch.equal(owner[slots.home], ids)
    assert sorted({e for e, _, _ in slots.ranges()} | set(slots.idle())) == list(range(n_experts))
    combine = torch.rand(n, top_k, generator=torch.Generator().manual_seed(seed))
    weights = slots.sort(combine, torch.float32)
    assert torch.equal(slots.unsort(weights, torch.float32), combine)
    assert float(weights.sum()) == pytest.approx(float(combine.sum()), rel=1e-5)  # padding rows have weight 0
