"""Packing: what a format loses, what it must not lose, and what it refuses."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from quadriga.errors import CheckpointError
from quadriga.kernels.cpu.packing import allocate, pack_blocks
from quadriga.kernels.cpu.packing import pack as pack_numbers
from quadriga.quant import codec, mxfp4
from quadriga.quant.formats import FORMATS
from quadriga.quant.packed import FROM_GGUF, OF_BLOCKS, PACKED
from tests.packing import linear, pack, unpack

SHAPES = [(1, 1), (15, 31), (16, 64), (33, 65), (100, 320)]


def normal(rows: int, cols: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, cols, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("form", "dtype"), [("float32", torch.float32), ("bfloat16", torch.bfloat16)])
def test_wide_formats_lose_nothing(form: str, dtype: torch.dtype, shape: tuple[int, int]) -> None:
    values = normal(*shape).to(dtype)
    assert torch.equal(unpack(pack(values, form)), values.float())


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("form", "steps"), [("q8", 127), ("q4", 8), ("q4m", 15), ("mx4", 6)])
def test_block_formats_round_each_group_of_32_by_itself(form: str, steps: int, shape: tuple[int, int]) -> None:
    rows, cols = shape
    values = normal(*shape) * torch.logspace(-3, 2, rows)[:, None]
    values[:, cols // 2 :] *= 100
    got = unpack(pack(values, form))
    for first in range(0, cols, 32):
        group, error = values[:, first : first + 32], (got - values)[:, first : first + 32].abs().amax(1)
        # The widest step the format could need (q4m also reaches down to 0), its half, and float16's rounding; the
        # search may clip an outlier by another step.
        low = torch.minimum(group.amin(1), torch.zeros(rows)) if form == "q4m" else -group.abs().amax(1)
        width = (group.amax(1) - low) if form == "q4m" else group.abs().amax(1)
        assert bool((error <= 1.6 * width / steps + group.abs().amax(1) * 2**-10).all())


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("block", FROM_GGUF)
def test_gguf_blocks_come_over_bit_by_bit(block: str, shape: tuple[int, int]) -> None:
    rows, cols = shape[0], -(-shape[1] // FORMATS[block].block) * FORMATS[block].block
    raw = codec.quantize(normal(rows, cols).numpy(), block)
    packed = pack_blocks(raw.tobytes(), block, rows, cols, FROM_GGUF[block])
    assert np.array_equal(packed.unpack(), codec.dequantize(raw, block).reshape(rows, cols))


def test_mxfp4_becomes_mx4_without_loss() -> None:
    """Every byte of codes under every scale whose half float16 has; below, whole multiples of 2^-24."""
    codes = np.broadcast_to(np.arange(256, dtype=np.uint8).reshape(16, 16), (40, 16, 16))
    scales = np.repeat(np.arange(104, 144, dtype=np.uint8)[:, None], 16, axis=1)
    values = mxfp4.from_pairs(codes, scales).reshape(40, -1)
    assert np.array_equal(unpack(pack(torch.from_numpy(values), "mx4")).numpy(), values)
    finer = mxfp4.from_pairs(codes, scales - 20).reshape(40, -1)[:20]
    got = unpack(pack(torch.from_numpy(finer), "mx4")).numpy()
    assert not np.array_equal(got, finer) and np.abs(got - finer).max() <= 2**-24
    with pytest.raises(CheckpointError, match="row 0"):
        pack(torch.full((1, 32), 8.0 * 2**16), "mx4")


def test_mx4_takes_the_nearest_code_under_the_formats_own_scale() -> None:
    """OCP Microscaling Formats v1.0, 6.3, number by number: ties go to the even mantissa, what is too large to 6."""
    values = torch.cat((normal(20, 64), torch.arange(-30, 34)[None] / 4), 0)
    expected = values.clone()
    for row in expected:
        for first in range(0, 64, 32):
            group = row[first : first + 32]
            scale = 2.0 ** (np.floor(np.log2(float(group.abs().max()))) - 2)
            for i, x in enumerate((group / scale).tolist()):
                code = min(range(8), key=lambda n: (abs(mxfp4.E2M1[n] - abs(x)), n % 2))
                group[i] = float(mxfp4.E2M1[code]) * scale * (-1 if x < 0 else 1)
    assert torch.equal(unpack(pack(values, "mx4")), expected)


OTHERS = [
    (block, form)
    for block in ("q5_1", "q4_k", "q2_k", "iq3_s", "nvfp4")
    for form in PACKED
    if OF_BLOCKS.get(form) != block  # test_block_formats.py: these come over as they are
]


@pytest.mark.parametrize(("block", "form"), OTHERS)
def test_other_blocks_are_packed_as_the_numbers_they_are(block: str, form: str) -> None:
    """The numbers pass through a tile's worth of memory and come out as if they had been read first. 37 rows: 16s and 5."""
    rows, cols = 37, 512
    spec, rng = FORMATS[block], np.random.default_rng(3)
    raw = rng.integers(0, 60, (rows, cols // spec.block, spec.nbytes), dtype=np.uint8)  # all scales are finite
    numbers = codec.dequantize(raw, block).reshape(rows, cols)
    importance = rng.random(cols, dtype=np.float32)
    packed = pack_blocks(raw.tobytes(), block, rows, cols, form, importance=importance)
    expected = pack_numbers(numbers, form, importance=importance)
    assert np.array_equal(packed.data, expected.data)


@pytest.mark.parametrize("block", ["q4_0", "q5_0", "iq4_nl", "tq1_0", "tq2_0", "mxfp4"])
def test_q8_holds_what_are_integers_under_a_scale(block: str) -> None:
    """MXFP4's scales must be float16's: a block beyond them has its tile rounded."""
    rows, cols = 37, 512
    spec, rng = FORMATS[block], np.random.default_rng(4)
    raw = rng.integers(0, 256, (rows, cols // spec.block, spec.nbytes), dtype=np.uint8)
    at = slice(0, 1) if block == "mxfp4" else slice(-2, None) if block.startswith("tq") else slice(0, 2)
    raw[:, :, at] = rng.integers(110, 130, raw[:, :, at].shape) if block == "mxfp4" else (0x34, 0x12)
    numbers = codec.dequantize(raw, block).reshape(rows, cols)
    assert np.array_equal(pack_blocks(raw.tobytes(), block, rows, cols, "q8").unpack(), numbers)
    if block == "mxfp4":
        raw[20, 3, 0] = 70
        numbers = codec.dequantize(raw, block).reshape(rows, cols)
        got = pack_blocks(raw.tobytes(), block, rows, cols, "q8").unpack()
        assert np.array_equal(np.delete(got, range(16, 32), axis=0), np.delete(numbers, range(16, 32), axis=0))
        assert np.allclose(got, numbers, rtol=0, atol=np.abs(numbers).max() / 250)


@pytest.mark.parametrize("row", [0, 16, 36])
def test_a_block_without_finite_numbers_is_named_by_its_row(row: int) -> None:
    raw = np.zeros((37, 2, 144), dtype=np.uint8)
    raw[row, 0, :2] = 0, 0x7E  # NaN
    with pytest.raises(CheckpointError, match=f"row {row} is not"):
        pack_blocks(raw.tobytes(), "q4_k", 37, 512, "q8")
    raw[12:, :, :2] = 0, 0x7E
    with pytest.raises(CheckpointError, match=f"row {min(row, 12)} is not"):
        pack_blocks(raw.tobytes(), "q4_k", 37, 512, "q8")


@pytest.mark.parametrize("form", PACKED)
def test_rows_can_be_unpacked_alone(form: str) -> None:
    packed = pack(normal(70, 96), form)
    assert torch.equal(unpack(packed, 19, 40), unpack(packed)[19:59])


@pytest.mark.parametrize("form", ["q4", "q4m"])
def test_the_search_for_scales_minds_what_is_important(form: str) -> None:
    values = normal(256, 512)
    importance = torch.rand(512, generator=torch.Generator().manual_seed(1)) ** 4
    plain, aware = (unpack(pack(values, form, importance=i)) for i in (None, importance))
    lost = [float(((got - values).square() * importance).sum()) for got in (plain, aware)]
    assert lost[1] < 0.8 * lost[0]


@pytest.mark.parametrize("form", ["q8", "q4", "q4m", "mx4"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e9])
def test_numbers_that_no_scale_can_hold_are_refused(form: str, bad: float) -> None:
    values = normal(40, 64)
    values[17, 5] = bad
    with pytest.raises(CheckpointError, match="row 17"):
        pack(values, form)


@pytest.mark.parametrize("n", [1, 3, 17])
@pytest.mark.parametrize("form", PACKED)
def test_products_with_a_packed_matrix(form: str, n: int) -> None:
    packed, x = pack(normal(70, 200), form), normal(n, 200, 1)
    exact = x.double() @ unpack(packed).double().T
    relative = float((linear(packed, x) - exact).norm() / exact.norm())
    # bfloat16 and 8-bit activations: their unit roundoff; see tests/runners/test_compiled.py.
    assert relative < {"float32": 1e-6, "bfloat16": 2**-8}.get(form, 0.0083)


def test_memory_is_aligned_and_zero() -> None:
    pieces = [allocate(n) for n in (1, 64, 100, 300 << 20, 7)]
    for piece in pieces:
        assert piece.ctypes.data % 64 == 0
        assert not piece[:: max(1, piece.nbytes // 1000)].any()
    pieces[0][:], pieces[1][:] = 1, 2
    assert pieces[0][0] == 1 and not pieces[2].any()
