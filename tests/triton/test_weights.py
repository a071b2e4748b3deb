"""Planes of weights: bits as they were, codes as the formats say."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from quadriga.errors import CheckpointError
from quadriga.kernels.cpu.packing import pack, pack_blocks, pack_mx4
from quadriga.kernels.triton import weights
from quadriga.kernels.triton.embedding import embed
from quadriga.kernels.triton.grouped import grouped_product
from quadriga.kernels.triton.packed import PLANES, from_packed
from quadriga.quant import codec, mxfp4
from quadriga.quant.formats import FORMATS
from quadriga.quant.packed import FROM_GGUF
from tests.triton.drawn import ints

ROWS, E = 37, 3


def _raw(source: str, columns: int) -> np.ndarray:
    values = np.random.default_rng(4).normal(size=(E * ROWS, columns)).astype(np.float32)
    return np.ascontiguousarray(codec.quantize(values, source)).reshape(-1, FORMATS[source].nbytes)


@pytest.mark.parametrize(("source", "columns"), [("q8_0", 160), ("q4_0", 192), ("q4_1", 96), ("q4_k", 512)])
def test_a_packed_matrix_and_a_file_s_blocks_have_the_same_planes(source: str, columns: int) -> None:
    raw = _raw(source, columns)
    one = len(raw) // E
    packed = [pack_blocks(raw[e * one : (e + 1) * one], source, ROWS, columns, FROM_GGUF[source]) for e in range(E)]
    ours, truth = from_packed(packed, E), weights.from_blocks(source, raw, E, ROWS, columns)
    assert ours.format == truth.format and ours.columns == truth.columns == columns
    if columns % 64 == 0:  # else what pads a row is anything
        for a, b in zip(ours.planes, truth.planes, strict=True):
            assert (a is None and b is None) or torch.equal(a, b)
    identity = torch.eye(columns)
    assert torch.equal(*(grouped_product(identity, w.expert(2)) for w in (ours, truth)))


@pytest.mark.parametrize("form", PLANES)
def test_a_packed_matrix_is_unpacked_to_its_numbers(form: str) -> None:
    """By the product with the identity, and as rows of a table."""
    columns = 300  # no whole block, nor whole groups
    values = np.random.default_rng(5).normal(size=(ROWS, columns)).astype(np.float32)
    packed = pack(values, form)
    ours, truth = from_packed([packed], 1), packed.unpack()
    assert ours.format == PLANES[form] and (ours.rows, ours.columns) == (ROWS, columns)
    np.testing.assert_allclose(grouped_product(torch.eye(columns), ours).numpy().T, truth, rtol=3e-7, atol=1e-7)
    looked_up = embed(ints(36, 0, 36, 17), ours, 3.0)
    np.testing.assert_allclose(looked_up.numpy(), 3 * truth[[36, 0, 36, 17]], rtol=3e-7, atol=3e-7)


def test_mx4_keeps_its_powers_of_two() -> None:
    generator = np.random.default_rng(6)
    codes = generator.integers(0, 256, (ROWS * 2, 16), dtype=np.uint8)
    scales = generator.integers(128 - 24, 128 + 15, ROWS * 2, dtype=np.uint8)
    blocks = mxfp4.as_mx4(codes, scales)
    assert blocks is not None
    packed = pack_mx4(blocks, ROWS, 64)
    ours = grouped_product(torch.eye(64), from_packed([packed], 1))
    assert np.array_equal(ours.numpy().T, packed.unpack())


def test_every_code_of_fp8() -> None:
    codes = torch.arange(256, dtype=torch.uint8)
    codes = codes[(codes & 0x7F) != 0x7F].view(torch.float8_e4m3fn)
    weight = weights.from_fp8(codes.view(1, 1, -1), torch.full((1, 1, 2), 0.75))
    ours = grouped_product(torch.eye(254), weight)
    assert torch.equal(ours[:, 0], codes.float() * 0.75)


def test_every_code_of_mxfp4_under_every_scale() -> None:
    """Beside the format's own tables; 2^127 times 6 is beyond float32, and is left out."""
    scales = np.arange(253, dtype=np.uint8)
    nibbles = np.arange(16, dtype=np.uint8)
    block = np.concatenate((nibbles[:8] | nibbles[8:] << 4, nibbles[8:] | nibbles[:8] << 4)).astype(np.uint8)
    blocks = np.concatenate((scales[:, None], np.tile(block, (len(scales), 1))), axis=1)
    ours = grouped_product(torch.eye(32), weights.from_blocks("mxfp4", blocks, 1, len(scales), 32))
    assert np.array_equal(ours.numpy().T, mxfp4.dequantize_blocks(blocks))


def test_what_has_no_planes_or_is_no_number_is_an_error() -> None:
    blocks = np.full((1, 17), 255, dtype=np.uint8)
    with pytest.raises(CheckpointError, match="mxfp4 must be numbers"):
        weights.from_blocks("mxfp4", blocks, 1, 1, 32)
    with pytest.raises(CheckpointError, match="fp8 must be numbers"):
        weights.from_fp8(torch.full((1, 1, 32), 0x7F, dtype=torch.uint8).view(torch.float8_e4m3fn), torch.ones(1, 1, 1))


@pytest.mark.parametrize("form", weights.GROUP)
def test_planes_without_numbers_are_as_large_as_they_say(form: str) -> None:
    weight = weights.empty(form, 2, 24, 1024)
    bits = 16.0 if form == "plain" else weights.BITS[form]
    assert weight.nbytes == 2 * 24 * 1024 * bits / 8
