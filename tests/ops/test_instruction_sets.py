"""Instruction sets beside each other: the same bits where they have a fused multiply-add. No torch, so that an emulated processor
runs it in minutes (tools/arm.sh quick)."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from quadriga.kernels.cpu import library as cpu
from quadriga.kernels.cpu import packing
from quadriga.quant.packed import PACKED, QUANTISED

HERE = cpu.isas_in_force()
FORMS = ("float32", "bfloat16", *PACKED)

ROWS, COLS, TOKENS = 37, 300, 30


def drawn(*shape: int, seed: int) -> NDArray[np.float32]:
    """Numbers of many sizes, as weights and activations are."""
    draw = np.random.default_rng(seed)
    return (draw.standard_normal(shape) * 2.0 ** draw.integers(-3, 3, shape)).astype(np.float32)


@pytest.mark.parametrize("fine", [False, True], ids=["int8", "int16"])
@pytest.mark.parametrize("form", FORMS)
def test_a_product_is_the_same_on_every_instruction_set_and_in_every_batch(form: str, fine: bool) -> None:
    """30 tokens are many, their tiles are widened; 1 to 13 take every width of a panel. The bound is of a sum of 300 products."""
    matrix, x = packing.pack(drawn(ROWS, COLS, seed=1), form), drawn(TOKENS, COLS, seed=2)
    size = np.abs(x) @ np.abs(matrix.unpack()).T
    results = {}
    for isa in HERE:
        context = cpu.Context(2, isa)
        context.set_int16(fine)
        results[isa] = packing.linear(matrix, x, context)
        for n in (1, 2, 3, 4, 5, 6, 7, 13):
            assert np.array_equal(packing.linear(matrix, x[:n], context), results[isa][:n]), (isa, n)
    plain = results.pop("portable")
    for isa, result in results.items():
        assert np.array_equal(result, results[HERE[-1]]), isa
        assert (np.abs(result - plain) <= COLS * 2**-23 * size).all(), isa


@pytest.mark.parametrize("form", FORMS)
def test_packing_is_the_same_on_every_instruction_set(form: str) -> None:
    matrix = packing.pack(drawn(ROWS, COLS, seed=3), form)
    numbers = matrix.unpack()
    assert np.isfinite(numbers).all()
    one = np.eye(COLS, dtype=np.float32)[:TOKENS]  # a column of the matrix for each token
    for isa in HERE:
        context = cpu.Context(1, isa)
        context.set_int16(True)
        assert np.allclose(packing.linear(matrix, one, context), numbers[:, :TOKENS].T, rtol=1e-4, atol=1e-5), isa


@pytest.mark.parametrize("fine", [False, True], ids=["int8", "int16"])
@pytest.mark.parametrize("form", QUANTISED)
def test_activations_that_are_next_to_nothing_count_as_nothing(form: str, fine: bool) -> None:
    """A group whose largest number is beyond what the quotient by it can be in float32; gates far below zero leave such."""
    matrix, x = packing.pack(drawn(ROWS, COLS, seed=1), form), drawn(3, COLS, seed=2)
    small, without, least = x.copy(), x.copy(), x.copy()
    without[:, 64:96] = 0
    for row, exponent in enumerate((-149, -130, -123)):
        small[row, 64:96] = np.ldexp(np.sign(x[row, 64:96]), exponent)
    least[:, 64:96] = np.ldexp(np.sign(x[:, 64:96]), -113)  # the least that is counted, in both
    for isa in HERE:
        context = cpu.Context(1, isa)
        context.set_int16(fine)
        expected = packing.linear(matrix, without, context)
        assert np.isfinite(expected).all()
        assert np.array_equal(packing.linear(matrix, small, context), expected), isa
        alone = packing.linear(matrix, np.where(without == 0, least, 0), context)
        assert 0 < np.abs(alone).max() < 1e-25, isa
