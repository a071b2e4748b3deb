"""Rounding with feedback: beside the textbook's elimination of one column at a time, and what it is for."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from quadriga.kernels.cpu.packing import pack, pack_blocks
from quadriga.quant import codec
from quadriga.quant.feedback import Moments
from quadriga.quant.formats import FORMATS
from quadriga.quant.packed import OF_BLOCKS

Floats = NDArray[np.float32]
FED = ("q2_k", "q3_k", "q4_0", "q4_1", "q4_k", "q5_k", "q6_k", "q5_0", "q5_1", "iq4_nl", "iq4_xs")


def inputs(columns: int, rows: int = 900) -> Floats:
    """Rows whose columns say much about each other."""
    rng = np.random.default_rng(columns)
    mix = rng.normal(size=(columns // 3, columns)) * rng.uniform(0.2, 3, columns)
    return (rng.normal(size=(rows, columns // 3)) @ mix + 0.3 * rng.normal(size=(rows, columns))).astype(np.float32)


def moments(x: Floats) -> Floats:
    return (x.T @ x / len(x)).astype(np.float32)


def damped(h: Floats, n: int) -> NDArray[np.float64]:
    return h / np.trace(h) * len(h) + (0.01 + 0.05 * len(h) / n) * np.eye(len(h))


def test_the_factor_is_of_the_inverse() -> None:
    x = inputs(96)
    made = Moments.of(moments(x), len(x))
    assert np.array_equal(made.upper, np.triu(made.upper))
    expected = np.linalg.inv(damped(moments(x), len(x)))
    np.testing.assert_allclose(made.upper.T.astype(float) @ made.upper, expected, rtol=1e-3, atol=1e-4 * expected.max())
    np.testing.assert_allclose(made.diagonal, (x**2).mean(0), rtol=1e-4)
    order = np.random.default_rng(1).permutation(96)
    other, turned = Moments.of(moments(x[:, order]), len(x)), made.reordered(order)
    np.testing.assert_allclose(turned.upper, other.upper, rtol=2e-2, atol=2e-3)
    assert np.array_equal(turned.diagonal, made.diagonal[order])


def test_columns_that_met_nothing_are_rounded_as_alone() -> None:
    values = np.random.default_rng(2).normal(size=(5, 512)).astype(np.float32)
    nothing = Moments.of(np.zeros((512, 512), dtype=np.float32), 0)
    assert np.array_equal(codec.quantize(values, "q4_k", nothing), codec.quantize(values, "q4_k", np.ones(512)))


def test_each_column_s_error_is_taken_from_all_behind_it() -> None:
    """By the inverse of what is left of H after every column (Frantar et al., equation 2), not by one factor."""
    x, values = inputs(96), np.random.default_rng(3).normal(size=(7, 96)).astype(np.float32)
    made = Moments.of(moments(x), len(x))
    got = codec.dequantize(codec.quantize(values, "q4_0", made), "q4_0").reshape(7, 96)
    h, rest, expected = damped(moments(x), len(x)), values.astype(np.float64), np.empty((7, 96))
    for c in range(96):
        left = np.linalg.inv(h[c:, c:])
        if c % 32 == 0:
            weight = np.array([1 / np.linalg.inv(h[j:, j:])[0, 0] for j in range(c, c + 32)], dtype=np.float32)
            alone = codec.quantize(rest[:, c : c + 32].astype(np.float32), "q4_0", weight)
            d = alone.reshape(7, 18)[:, :2].copy().view(np.float16)[:, 0].astype(np.float64)
        expected[:, c] = d * np.clip(np.rint(rest[:, c] / d), -8, 7)
        rest[:, c + 1 :] -= np.outer((rest[:, c] - expected[:, c]) / left[0, 0], left[0, 1:])
    assert np.isclose(got, expected, rtol=1e-5, atol=1e-6).mean() > 0.98
    assert np.isclose(got[:, :32], expected[:, :32], rtol=1e-5, atol=1e-6).all()


@pytest.mark.parametrize("name", FED)
def test_outputs_are_nearer_than_with_weights_alone(name: str) -> None:
    x, values = inputs(512), np.random.default_rng(4).laplace(size=(48, 512)).astype(np.float32)
    made = Moments.of(moments(x), len(x))
    errors = [
        float(
            (
                (x @ (codec.dequantize(codec.quantize(values, name, how), name).reshape(values.shape) - values).T) ** 2
            ).mean()
        )
        for how in (made.diagonal, made)
    ]
    assert errors[1] < 0.5 * errors[0], errors


@pytest.mark.parametrize("form", ["q4", "q4m", *OF_BLOCKS])
def test_packed_matrices_are_those_blocks(form: str) -> None:
    """Rows that are no whole blocks too: the columns that fill them up have no say."""
    block = (OF_BLOCKS | {"q4": "q4_0", "q4m": "q4_1"})[form]
    x, values = inputs(288), np.random.default_rng(5).normal(size=(19, 288)).astype(np.float32)
    made = Moments.of(moments(x), len(x))
    width = -(-288 // FORMATS[block].block) * FORMATS[block].block
    whole = np.zeros((19, width), dtype=np.float32)
    whole[:, :288] = values
    from quadriga.kernels.cpu import searching

    expected = codec.dequantize(codec.quantize(whole, block, made.padded(width), searching.fastest()), block)
    got = pack(values, form, importance=made).unpack()
    np.testing.assert_array_equal(got, expected.reshape(19, width)[:, :288])
    error = float((((got - values) @ x.T) ** 2).mean())
    assert error < 0.7 * float((((pack(values, form, importance=made.diagonal).unpack() - values) @ x.T) ** 2).mean())
    raw = codec.quantize(values, "q8_0")
    from_blocks = pack_blocks(raw, "q8_0", 19, 288, form, importance=made).unpack()
    again = pack(codec.dequantize(raw, "q8_0").reshape(19, 288), form, importance=made).unpack()
    np.testing.assert_array_equal(from_blocks, again)
    np.testing.assert_array_equal(
        pack(values, "q8", importance=made).unpack(), pack(values, "q8", importance=made.diagonal).unpack()
    )
