"""Rows times a matrix, and rows of the embedding table."""

from __future__ import annotations

import pytest
import torch

from quadriga.kernels.triton.embedding import embed
from quadriga.kernels.triton.linear import head_linear, linear
from tests.triton.drawn import drawn, ints


@pytest.mark.parametrize(("n", "n_in", "n_out"), [(1, 48, 97), (70, 130, 65), (64, 64, 64)])
def test_rows_times_a_matrix(n: int, n_in: int, n_out: int) -> None:
    x, w, b = drawn(n, n_in), drawn(n_out, n_in, seed=2), drawn(n_out, seed=3)
    torch.testing.assert_close(linear(x, w), x @ w.T, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(linear(x, w, b, scale=0.3), 0.3 * (x @ w.T + b), rtol=1e-5, atol=1e-5)


def test_some_rows_only_and_in_another_dtype() -> None:
    x, w = drawn(9, 48, dtype=torch.bfloat16), drawn(97, 48, seed=2, dtype=torch.bfloat16)
    out = linear(x, w, rows=ints(8, 0, 8), dtype=torch.float32)
    assert out.dtype == torch.float32
    torch.testing.assert_close(out, x[[8, 0, 8]].float() @ w.float().T, rtol=1e-5, atol=1e-5)


def test_every_head_has_a_matrix_and_rows_of_any_stride() -> None:
    x, w = drawn(5, 6, 20), drawn(6, 33, 12, seed=2)
    out = torch.zeros(5, 6, 40)
    head_linear(x[..., 3:15], w, out[..., :33])
    torch.testing.assert_close(out[..., :33], torch.einsum("nhi,hoi->nho", x[..., 3:15], w), rtol=1e-5, atol=1e-5)
    assert not out[..., 33:].any()


def test_a_row_alone_is_what_it_is_in_a_crowd() -> None:
    x, w = drawn(130, 96), drawn(80, 96, seed=2)
    crowd = linear(x, w)
    for i in (0, 1, 63, 64, 129):
        assert torch.equal(linear(x[i : i + 1], w)[0], crowd[i])


def test_embeddings_are_rows_of_the_table_scaled() -> None:
    table = drawn(97, 1100)
    assert torch.equal(embed(ints(96, 0, 5, 5), table), table[[96, 0, 5, 5]])
    assert torch.equal(embed(ints(4), table, 3.5)[0], table[4] * 3.5)
