"""GGUF's blocks as packed formats: not a bit is lost, and products are those of the very numbers, on every instruction set."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from quadriga.errors import CheckpointError
from quadriga.kernels.cpu import library as cpu
from quadriga.kernels.cpu import packing, searching
from quadriga.kernels.cpu.packing import Packed, pack_blocks
from quadriga.quant import codec
from quadriga.quant.formats import FORMATS
from quadriga.quant.packed import FROM_GGUF, OF_BLOCKS, PACKED

HERE = cpu.isas_in_force()

SCALES = {
    "q2_k": (80, 82),
    "q3_k": (108,),
    "q4_k": (0, 2),
    "q5_k": (0, 2),
    "q6_k": (208,),
    "iq4_nl": (0,),
    "q5_0": (0,),
    "q5_1": (0, 2),
    "iq4_xs": (0,),
}
"""Where a block's float16 numbers stand."""


def blocks(block: str, rows: int, n: int, seed: int = 0) -> NDArray[np.uint8]:
    """(rows, n, bytes): every byte as it comes, scales finite, of both signs and of many sizes."""
    rng = np.random.default_rng(seed)
    raw = rng.integers(0, 256, (rows, n, FORMATS[block].nbytes), dtype=np.uint8)
    for at in SCALES[block]:
        half = (rng.standard_normal((rows, n)) * 2.0 ** rng.integers(-12, 0, (rows, n))).astype(np.float16)
        raw[:, :, at : at + 2] = half.view(np.uint8).reshape(rows, n, 2)
    return raw


def packed(block: str, rows: int, cols: int, seed: int = 0) -> tuple[Packed, NDArray[np.float32]]:
    """A matrix of random blocks, and the numbers that the codec finds in them."""
    raw = blocks(block, rows, cols // FORMATS[block].block, seed)
    numbers = codec.dequantize(raw, block).reshape(rows, cols)
    return pack_blocks(raw.tobytes(), block, rows, cols, FROM_GGUF[block]), numbers


@pytest.mark.parametrize("rows", [1, 16, 37])
@pytest.mark.parametrize("block", SCALES)
def test_not_a_bit_is_lost(block: str, rows: int) -> None:
    matrix, numbers = packed(block, rows, 768)
    assert np.array_equal(matrix.unpack().view(np.uint32), numbers.view(np.uint32))
    assert np.array_equal(matrix.unpack(rows // 2, 1), numbers[rows // 2 : rows // 2 + 1])


@pytest.mark.parametrize("form", OF_BLOCKS)
def test_a_scale_costs_a_byte_and_numbers_what_they_do_in_the_file(form: str) -> None:
    """Runs of columns with a scale and a minimum of their own, beside the block's float16 ones in a line of 64 bytes."""
    bits, runs, minima = {
        "q2k": (2, 16, 0), "q3k": (3, 16, 0), "q4k": (4, 8, 8), "q5k": (5, 8, 8), "q6k": (6, 16, 0), "iq4xs": (4, 8, 0),
        "iq4nl": (4, 2, 0), "q5": (5, 2, 0), "q5m": (5, 2, 2),
    }[form]  # fmt: skip
    line, per_run = (64, 1) if PACKED[form].columns == 256 else (0, 2)
    spec = PACKED[form]
    assert spec.nbytes == spec.columns * 16 * bits // 8 + 16 * (runs + minima) * per_run + line


def rounded(x: NDArray[np.float32], most: int) -> NDArray[np.float64]:
    """Activations as the kernels have them: whole numbers up to ``most`` times a scale for every 32."""
    groups = x.reshape(len(x), -1, 32)
    top = np.abs(groups).max(-1, keepdims=True)
    whole = np.rint(groups * (np.float32(most) / top))
    return (whole.astype(np.float64) * (top / np.float32(most)).astype(np.float64)).reshape(x.shape)


@pytest.mark.parametrize("isa", HERE)
@pytest.mark.parametrize("block", SCALES)
def test_products_are_those_of_the_numbers_and_of_one_row_as_of_many(block: str, isa: str) -> None:
    """Exact but for the sum of 24 groups (of two runs each) in float32; 30 rows are many: their tiles are widened."""
    matrix, numbers = packed(block, 37, 768, seed=5)
    x = np.random.default_rng(6).standard_normal((30, 768)).astype(np.float32)
    context = cpu.Context(2, isa)
    for fine, most in ((False, 127), (True, 127 * 128)):
        context.set_int16(fine)
        got = packing.linear(matrix, x, context)
        given = rounded(x, most)
        exact, size = given @ numbers.T.astype(np.float64), np.abs(given) @ np.abs(numbers.T).astype(np.float64)
        assert (np.abs(got - exact) <= 2 * 24 * 2**-24 * 6 * size).all()
        for n in (1, 2, 5, 7, 13):
            assert np.array_equal(packing.linear(matrix, x[:n], context), got[:n])


@pytest.mark.parametrize("form", OF_BLOCKS)
def test_numbers_become_the_blocks_that_a_file_would_have(form: str) -> None:
    """The last block of a row is filled up with zeros, which count for nothing."""
    values = torch.randn(21, 300, generator=torch.Generator().manual_seed(2)).numpy()
    importance = np.random.default_rng(3).random(300, dtype=np.float32)
    whole, weight = np.zeros((21, 512), dtype=np.float32), np.zeros(512, dtype=np.float32)
    whole[:, :300], weight[:300] = values, importance
    if FORMATS[OF_BLOCKS[form]].block == 32:
        whole, weight = whole[:, :320], weight[:320]
    raw = codec.quantize(whole, OF_BLOCKS[form], weight, searching.fastest())
    numbers = codec.dequantize(raw, OF_BLOCKS[form]).reshape(whole.shape)
    assert np.array_equal(packing.pack(values, form, importance=importance).unpack(), numbers[:, :300])


@pytest.mark.parametrize("row", [0, 16, 36])
@pytest.mark.parametrize("block", [block for block in SCALES if FORMATS[block].block == 256])
def test_a_scale_that_is_no_number_is_named_by_its_row(block: str, row: int) -> None:
    raw = blocks(block, 37, 2)
    for at in SCALES[block]:
        broken = raw.copy()
        broken[row, 1, at : at + 2] = 0, 0x7C  # infinite
        broken[36, 0, at : at + 2] = 0, 0x7E  # NaN
        with pytest.raises(CheckpointError, match=f"row {row} is not"):
            pack_blocks(broken.tobytes(), block, 37, 512, FROM_GGUF[block])
