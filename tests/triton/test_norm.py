"""Norms and the residual stream, beside the reference."""

from __future__ import annotations

import pytest
import torch

from quadriga.kernels import reference
from quadriga.kernels.triton.norm import Chosen, NormWeights, add_norm, norm
from tests.triton.drawn import drawn, ints

KINDS = [("layer", False), ("layer", True), ("rms", False), ("rms", True)]


def weights(kind: str, bias: bool, width: int, seed: int) -> NormWeights:
    return NormWeights(drawn(width, seed=seed), kind, 1e-3, drawn(width, seed=seed + 1) if bias else None)


def expected(x: torch.Tensor, by: NormWeights) -> torch.Tensor:
    return reference.norm(x, by.weight, by.kind, by.eps, by.bias)


@pytest.mark.parametrize(("kind", "bias"), KINDS)
@pytest.mark.parametrize("width", [7, 48, 1029])
def test_norms_are_the_references(kind: str, bias: bool, width: int) -> None:
    x, by = drawn(5, width) + 0.7, weights(kind, bias, width, 3)
    torch.testing.assert_close(norm(x, by), expected(x, by), rtol=1e-5, atol=1e-5)


def test_rows_may_lie_further_apart() -> None:
    x, by = drawn(5, 60), weights("rms", False, 48, 3)
    torch.testing.assert_close(norm(x[:, 3:51], by), expected(x[:, 3:51], by), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("post", [None, ("layer", True), ("rms", False)])
@pytest.mark.parametrize("then", [None, ("layer", False), ("rms", True)])
def test_a_branch_is_added_and_the_sum_is_normed(post: tuple[str, bool] | None, then: tuple[str, bool] | None) -> None:
    h, branch = drawn(5, 48), drawn(5, 48, seed=2)
    behind = None if post is None else weights(*post, 48, 4)
    next_norm = None if then is None else weights(*then, 48, 7)
    stream = h + 0.6 * (branch if behind is None else expected(branch, behind))
    given = h.clone()
    x = add_norm(given, branch, scale=0.6, post=behind, then=next_norm)
    torch.testing.assert_close(given, stream, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(x, stream if next_norm is None else expected(stream, next_norm), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("share", [False, True])
def test_rows_of_experts_are_summed_on_the_way(share: bool) -> None:
    n, k, d = 5, 3, 48
    h, rows, shared = drawn(n, d), drawn(n * k, d, seed=2), drawn(n, d, seed=3)
    home = torch.randperm(n * k, generator=torch.Generator().manual_seed(4)).view(n, k).to(torch.int32)
    by, amounts = drawn(n, k, seed=5).abs(), torch.rand(n, generator=torch.Generator().manual_seed(6))
    naive = torch.stack([sum(by[i, j] * rows[home[i, j]] for j in range(k)) for i in range(n)])
    naive = h + naive + (amounts[:, None] * shared if share else shared)
    made = Chosen(rows=rows, home=home, weights=by, shared=shared, share=amounts if share else None)
    given, then = h.clone(), weights("rms", False, d, 7)
    x = add_norm(given, made, then=then)
    torch.testing.assert_close(given, naive, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(x, expected(naive, then), rtol=1e-5, atol=1e-5)
    for i in range(n):  # alone as in a crowd
        alone = h[i : i + 1].clone()
        one = Chosen(
            rows=rows, home=home[i : i + 1], weights=by[i : i + 1], shared=shared[i : i + 1],
            share=amounts[i : i + 1] if share else None,
        )  # fmt: skip
        assert torch.equal(add_norm(alone, one, then=then)[0], x[i]) and torch.equal(alone[0], given[i])


def test_the_stream_is_normed_as_it_is_stored() -> None:
    """In bfloat16: norming what was stored gives the same as norming on the way."""
    h, branch = drawn(5, 48, dtype=torch.bfloat16), drawn(5, 48, seed=2, dtype=torch.bfloat16)
    by = NormWeights(drawn(48, seed=3, dtype=torch.bfloat16), "rms", 1e-5)
    x = add_norm(h, branch, then=by)
    assert torch.equal(norm(h, by), x)


def test_nothing_is_chosen_by_accident() -> None:
    """A home of one row for all slots is that row, times the sum of the weights."""
    h, rows = torch.zeros(1, 48), drawn(2, 48)
    add_norm(h, Chosen(rows=rows, home=ints(1, 1)[None], weights=torch.tensor([[0.25, 0.5]])))
    torch.testing.assert_close(h[0], 0.75 * rows[1])
