"""The hand-written gradients of training, compared with naive loops and torch's autograd in float64 and float32."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from quadriga.kernels import ops, reference, training


def _normal(*shape: int, seed: int, scale: float = 1.0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * scale


def _same_gradients(
    ours: Callable[..., Tensor], naive: Callable[..., Tensor], inputs: list[Tensor], rtol: float = 1e-10
) -> None:
    """Check that both functions give the same value, and the same gradients for a random cotangent."""
    results = []
    for function in (ours, naive):
        leaves = [x.clone().requires_grad_() for x in inputs]
        out = function(*leaves)
        out.backward(_normal(*out.shape, seed=99).to(out.dtype))
        results.append([out.detach(), *(leaf.grad for leaf in leaves)])
    for a, b in zip(*results, strict=True):
        assert a is not None and b is not None
        torch.testing.assert_close(a, b, rtol=rtol, atol=rtol)


# Experts -------------------------------------------------------------------------------------------------------------

N, D, FF, E, K = 23, 12, 20, 5, 3


def _naive_experts(ids: Tensor, activation: str) -> Callable[..., Tensor]:
    def run(x: Tensor, combine: Tensor, w_gate: Tensor, w_up: Tensor, w_down: Tensor) -> Tensor:
        rows = []
        for n in range(len(x)):
            row = torch.zeros_like(x[n])
            for j in range(ids.shape[1]):
                e = int(ids[n, j])
                hidden = ops.activate(w_gate[e] @ x[n], activation) * (w_up[e] @ x[n])
                row = row + combine[n, j] * (w_down[e] @ hidden)
            rows.append(row)
        return torch.stack(rows)

    return run


def _distinct_ids(n: int, n_experts: int, k: int) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    return torch.stack([torch.randperm(n_experts, generator=generator)[:k] for _ in range(n)])


ROUTINGS = {
    "spread": _distinct_ids(N, E, K),
    "one expert idle": _distinct_ids(N, E - 1, K) + 1,
    "all tokens to the same experts": torch.tensor([[4, 0, 2]]).expand(N, -1),
    "k = 1, all to one expert": torch.full((N, 1), 2),
    "k = E": torch.arange(E).expand(N, -1),
    "one token": _distinct_ids(1, E, K),
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("name", ROUTINGS)
@pytest.mark.parametrize("activation", ["silu", "gelu", "gelu_tanh", "relu", "relu2"])
def test_experts_equal_the_naive_loop(name: str, activation: str, dtype: torch.dtype) -> None:
    ids = ROUTINGS[name]
    n, k = ids.shape
    inputs = [
        _normal(n, D, seed=1),
        _normal(n, k, seed=2).abs(),
        _normal(E, FF, D, seed=3, scale=0.3),
        _normal(E, FF, D, seed=4, scale=0.3),
        _normal(E, D, FF, seed=5, scale=0.3),
    ]

    def ours(x: Tensor, combine: Tensor, *weights: Tensor) -> Tensor:
        return training.experts(x, ids, combine, *weights, activation)

    tolerance = 1e-10 if dtype == torch.float64 else 2e-5
    _same_gradients(ours, _naive_experts(ids, activation), [x.to(dtype) for x in inputs], tolerance)


@pytest.mark.parametrize("backend", ["training", "reference"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(("name", "activation"), [*((name, "relu2") for name in ROUTINGS), ("spread", "gelu")])
def test_experts_without_gates_equal_the_naive_loop(
    name: str, activation: str, dtype: torch.dtype, backend: str
) -> None:
    ids = ROUTINGS[name]
    inputs = [
        _normal(len(ids), D, seed=1),
        _normal(*ids.shape, seed=2).abs(),
        _normal(E, FF, D, seed=4, scale=0.3),
        _normal(E, D, FF, seed=5, scale=0.3),
    ]
    computed = training.experts if backend == "training" else reference.experts

    def ours(x: Tensor, combine: Tensor, w_up: Tensor, w_down: Tensor) -> Tensor:
        return computed(x, ids, combine, None, w_up, w_down, activation)

    def naive(x: Tensor, combine: Tensor, w_up: Tensor, w_down: Tensor) -> Tensor:
        rows = []
        for n in range(len(x)):
            made = [w_down[e] @ ops.activate(w_up[e] @ x[n], activation) for e in ids[n].tolist()]
            rows.append(sum(share * one for share, one in zip(combine[n], made, strict=True)))
        return torch.stack(rows)  # type: ignore[arg-type]

    tolerance = 1e-10 if dtype == torch.float64 else 2e-5
    _same_gradients(ours, naive, [x.to(dtype) for x in inputs], tolerance)


def test_experts_without_tokens_get_a_gradient_of_zero() -> None:
    weights = [_normal(E, *s, seed=7).requires_grad_() for s in ((FF, D), (FF, D), (D, FF))]
    out = training.experts(_normal(N, D, seed=8), torch.full((N, 1), 3), torch.ones(N, 1), *weights, "silu")
    out.sum().backward()
    for w in weights:
        assert w.grad is not None
        assert torch.count_nonzero(w.grad[3]) > 0
        assert torch.count_nonzero(w.grad[[0, 1, 2, 4]]) == 0


def test_frozen_experts_pass_the_gradient_to_their_input() -> None:
    x = _normal(N, D, seed=1).requires_grad_()
    weights = [_normal(E, *s, seed=7) for s in ((FF, D), (FF, D), (D, FF))]
    ids, combine = ROUTINGS["spread"], _normal(N, K, seed=2)
    training.experts(x, ids, combine, *weights, "silu").square().sum().backward()
    ours = x.grad
    x.grad = None
    ops.experts(x, ids, combine, *weights, "silu").square().sum().backward()
    assert ours is not None and x.grad is not None
    torch.testing.assert_close(ours, x.grad)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_experts_agree_with_the_reference_in_working_precision(dtype: torch.dtype) -> None:
    """k + 3 roundings of products of length D and F: a few units in the last place of the largest output."""
    weights = [_normal(E, *s, seed=7, scale=0.3).to(dtype) for s in ((FF, D), (FF, D), (D, FF))]
    x, ids, combine = _normal(N, D, seed=1).to(dtype), ROUTINGS["spread"], _normal(N, K, seed=2).float()
    ours = training.experts(x, ids, combine, *weights, "silu").float()
    truth = ops.experts(x.double(), ids, combine, *(w.double() for w in weights), "silu").float()
    assert (ours - truth).abs().max() < 8 * torch.finfo(dtype).eps * truth.abs().max()


# Attention -----------------------------------------------------------------------------------------------------------

BOUNDS = [0, 1, 131, 150, 410, 417]
"""A document of one token, one just longer than a block of 128, short ones, and one longer than two blocks."""


def _naive_attention(
    scale: float, soft_cap: float | None, slopes: Tensor | None, bounds: list[int]
) -> Callable[..., Tensor]:
    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        group = q.shape[1] // k.shape[1]
        documents = []
        for a, b in itertools.pairwise(bounds):
            scores = torch.einsum("thd,shd->hts", q[a:b], k[a:b].repeat_interleave(group, 1)) * scale
            if soft_cap is not None:
                scores = soft_cap * torch.tanh(scores / soft_cap)
            position = torch.arange(b - a)
            if slopes is not None:
                scores = scores + slopes.to(q.dtype)[:, None, None] * (position[None] - position[:, None])
            scores = scores.masked_fill(position[None] > position[:, None], float("-inf"))
            documents.append(torch.einsum("hts,shd->thd", scores.softmax(-1), v[a:b].repeat_interleave(group, 1)))
        return torch.cat(documents)

    return run


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("soft_cap", [None, 1.5])
@pytest.mark.parametrize("alibi", [False, True])
def test_document_attention_equals_the_naive_loop(soft_cap: float | None, alibi: bool, dtype: torch.dtype) -> None:
    n, h, kv, d = BOUNDS[-1], 6, 2, 8
    slopes = torch.linspace(0.1, 0.7, h) if alibi else None
    inputs = [_normal(n, heads, d, seed=i).to(dtype) for i, heads in ((1, h), (2, kv), (3, kv))]

    def ours(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return training.document_attention(q, k, v, BOUNDS, scale=0.4, soft_cap=soft_cap, alibi_slopes=slopes)

    tolerance = 1e-10 if dtype == torch.float64 else 2e-5
    _same_gradients(ours, _naive_attention(0.4, soft_cap, slopes, BOUNDS), inputs, tolerance)


@pytest.mark.parametrize("window", [None, 19])
@pytest.mark.parametrize("cuts", [(0, 64, 131), (0, 1, 2, 130, 131)])
def test_attention_of_parts_of_the_queries_is_that_of_all(cuts: tuple[int, ...], window: int | None) -> None:
    """Each part's results are its rows; the gradients of keys and values are the sums over parts."""
    bounds, h, kv, d = [0, 50, 51, 131], 6, 2, 8
    q, k, v, d_out = (_normal(131, heads, d, seed=i).requires_grad_() for i, heads in enumerate((h, kv, kv, h)))
    whole = training.document_attention(q, k, v, bounds, scale=0.4, window=window)
    expected = torch.autograd.grad(whole, (q, k, v), d_out)
    sums = [torch.zeros_like(x) for x in (q, k, v)]
    for first, last in itertools.pairwise(cuts):
        part = training.document_attention(q[first:last], k, v, bounds, scale=0.4, window=window, first=first)
        torch.testing.assert_close(part, whole[first:last])
        for total, gradient in zip(sums, torch.autograd.grad(part, (q, k, v), d_out[first:last]), strict=True):
            total += gradient
    torch.testing.assert_close(sums, list(expected))


def test_document_attention_in_bfloat16_is_close() -> None:
    q, k, v = (_normal(200, heads, 16, seed=heads).bfloat16() for heads in (6, 3, 3))
    ours = training.document_attention(q, k, v, [0, 77, 200], scale=0.25)
    truth = _naive_attention(0.25, None, None, [0, 77, 200])(q.double(), k.double(), v.double())
    assert (ours.double() - truth).abs().max() < 4 * torch.finfo(torch.bfloat16).eps * truth.abs().max()


# Loss ----------------------------------------------------------------------------------------------------------------


@pytest.fixture
def tiny_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks of 32 tokens, so that several are used."""
    monkeypatch.setattr(training.token_loss, "_LOGITS_BYTES", 1)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("logit_scale", [1.0, 0.6])
def test_linear_cross_entropy_equals_torchs(
    tiny_chunks: None, weighted: bool, logit_scale: float, dtype: torch.dtype
) -> None:
    n, d, v = 101, 12, 37
    targets = torch.randint(v, (n,), generator=torch.Generator().manual_seed(0))
    targets[::7] = -100
    weights = _normal(n, seed=6).abs().float() if weighted else None
    each: list[Tensor] = []

    def ours(h: Tensor, w: Tensor) -> Tensor:
        total, losses = training.linear_cross_entropy(h, w, targets, weights, logit_scale=logit_scale)
        each.append(losses)
        return total

    def naive(h: Tensor, w: Tensor) -> Tensor:
        losses = F.cross_entropy(logit_scale * h @ w.t(), targets, reduction="none")
        torch.testing.assert_close(each[0], losses.detach())
        return (losses if weights is None else losses * weights).sum()

    inputs = [_normal(n, d, seed=1).to(dtype), _normal(v, d, seed=2).to(dtype)]
    _same_gradients(ours, naive, inputs, 1e-10 if dtype == torch.float64 else 2e-5)


def test_token_losses_equal_torchs(tiny_chunks: None) -> None:
    n, d, v = 101, 12, 37
    targets = torch.randint(v, (n,), generator=torch.Generator().manual_seed(0))
    targets[3:40] = -100

    def naive(h: Tensor, w: Tensor) -> Tensor:
        return F.cross_entropy(0.6 * h @ w.t(), targets, reduction="none")

    def ours(h: Tensor, w: Tensor) -> Tensor:
        return training.token_losses(h, w, targets, logit_scale=0.6)

    _same_gradients(ours, naive, [_normal(n, d, seed=1), _normal(v, d, seed=2)])


def test_losses_behind_a_cap_equal_torchs(tiny_chunks: None) -> None:
    n, d, v = 101, 12, 37
    targets = torch.randint(v, (n,), generator=torch.Generator().manual_seed(0))
    targets[3:40] = -100

    def naive(h: Tensor, w: Tensor) -> Tensor:
        logits = 1.5 * torch.tanh(0.6 * h @ w.t() / 1.5) / 0.7
        return F.cross_entropy(logits, targets, reduction="none")

    def ours(h: Tensor, w: Tensor) -> Tensor:
        return training.capped_losses(h, w, targets, cap=1.5, logit_scale=0.6, temperature=0.7)

    _same_gradients(ours, naive, [_normal(n, d, seed=1), _normal(v, d, seed=2)])
    none = training.capped_losses(_normal(n, d, seed=1), _normal(v, d, seed=2), torch.full((n,), -100), cap=1.5)
    assert none.tolist() == [0.0] * n


def test_losses_stay_finite_where_probabilities_underflow() -> None:
    hidden = torch.tensor([[300.0, 0.0]], requires_grad=True)
    weight = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0]])
    total, each = training.linear_cross_entropy(hidden, weight, torch.tensor([2]))
    assert total.item() == each.item() == 600.0
    total.backward()
    assert hidden.grad is not None
    assert hidden.grad.tolist() == [[2.0, 0.0]]


def test_no_target_at_all_is_a_loss_of_zero() -> None:
    hidden = torch.ones(4, 3, requires_grad=True)
    total, _ = training.linear_cross_entropy(hidden, torch.ones(5, 3, requires_grad=True), torch.full((4,), -100))
    total.backward()
    assert total.item() == 0
    assert hidden.grad is not None and torch.count_nonzero(hidden.grad) == 0
