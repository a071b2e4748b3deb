"""The weighted sum of experts' rows."""

from __future__ import annotations

import pytest
import torch

from quadriga.kernels.triton.combine import combine


@pytest.mark.parametrize("tokens", [1, 7])
@pytest.mark.parametrize("width", [40, 1029])
def test_rows_are_weighed_and_added(tokens: int, width: int) -> None:
    top_k = 3
    generator = torch.Generator().manual_seed(5)
    rows = torch.randn(tokens * top_k, width, generator=generator)
    home = torch.randperm(tokens * top_k, generator=generator).view(tokens, top_k).to(torch.int32)
    weights = torch.rand(tokens, top_k, generator=generator)
    base = torch.randn(tokens, width, generator=generator)
    naive = torch.stack([sum(weights[n, j] * rows[home[n, j]] for j in range(top_k)) for n in range(tokens)])
    torch.testing.assert_close(combine(rows, home, weights), naive, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(combine(rows, home, weights, base), naive + base, rtol=1e-5, atol=1e-6)


def test_a_token_alone_is_what_it_is_in_a_crowd() -> None:
    generator = torch.Generator().manual_seed(6)
    rows, weights = torch.randn(20, 33, generator=generator), torch.rand(5, 4, generator=generator)
    home = torch.randperm(20, generator=generator).view(5, 4).to(torch.int32)
    crowd = combine(rows, home, weights)
    for n in range(5):
        assert torch.equal(combine(rows, home[n : n + 1], weights[n : n + 1])[0], crowd[n])


def test_bfloat16_is_summed_wide() -> None:
    """1 and four times 2^-8: in bfloat16 each addition would lose the small part."""
    rows = torch.tensor([[1.0], *[[2**-8]] * 4], dtype=torch.bfloat16)
    out = combine(rows, torch.arange(5, dtype=torch.int32).view(1, 5), torch.ones(1, 5))
    assert out.dtype == torch.bfloat16
    assert out.item() == 1 + 2**-6
