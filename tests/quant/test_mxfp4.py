"""MXFP4 against transformers' own reader and gguf's, bit for bit, and what becomes of it in q8_0."""

import numpy as np
import pytest

from quadriga.errors import CheckpointError
from quadriga.quant import codec, mxfp4


def blocks_of_every_scale():
    """Every byte of codes under every scale: codes (256, 16, 16), scales (256, 16)."""
    codes = np.broadcast_to(np.arange(256, dtype=np.uint8).reshape(16, 16), (256, 16, 16)).copy()
    return codes, np.repeat(np.arange(256, dtype=np.uint8)[:, None], 16, axis=1)


def test_pairs_are_transformers_numbers_to_the_bit():
    torch = pytest.importorskip("torch")
    reader = pytest.importorskip("transformers.integrations.mxfp4").convert_moe_packed_tensors
    codes, scales = blocks_of_every_scale()
    theirs = reader(torch.from_numpy(codes[None]), torch.from_numpy(scales[None]))[0].T  # it swaps rows and columns
    ours = torch.from_numpy(mxfp4.from_pairs(codes, scales)).reshape(256, -1)
    # Scale 255 is the format's NaN; transformers multiplies by 2^128 there.
    assert torch.equal(ours[:255].to(torch.bfloat16).view(torch.int16), theirs[:255].contiguous().view(torch.int16))
    assert torch.equal(ours[:255].to(torch.bfloat16).float(), ours[:255]), "bfloat16 holds every number"
    assert ours[255].isnan().all()


def test_halves_are_ggufs_numbers_to_the_bit():
    quants = pytest.importorskip("gguf.quants")
    kind = pytest.importorskip("gguf.constants").GGMLQuantizationType.MXFP4
    codes, scales = blocks_of_every_scale()
    raw = np.concatenate((scales.reshape(-1, 1), codes.reshape(-1, 16)), axis=1)[: 255 * 16]  # not the NaN
    ours = mxfp4.dequantize_blocks(raw)
    with np.errstate(over="ignore"):
        theirs = quants.dequantize(raw, kind)
    np.testing.assert_array_equal(ours.view(np.uint32), theirs.view(np.uint32))


def test_a_block_by_hand():
    codes = np.zeros((1, 16), dtype=np.uint8)
    codes[0, 0], codes[0, 15] = 0x2F, 0x70  # low nibble 15: -6, high 2: 1; high 7: 6
    scale = np.array([128], dtype=np.uint8)  # 2
    pairs, halves = mxfp4.from_pairs(codes, scale)[0], mxfp4.from_halves(codes, scale)[0]
    assert (pairs[0], pairs[1], pairs[31]) == (-12, 2, 12) and not pairs[2:31].any()
    assert (halves[0], halves[16], halves[31]) == (-12, 2, 12) and not halves[1:16].any()


def test_q8_0_holds_them_exactly_within_float16s_powers():
    codes, scales = blocks_of_every_scale()
    values = mxfp4.from_pairs(codes, scales)

    def again(first, last):
        part = values[first:last]
        return codec.dequantize(mxfp4.as_q8_0(part), "q8_0").reshape(part.shape), part

    np.testing.assert_array_equal(*again(104, 147))
    codes, scales = codes[:147].reshape(-1, 16), scales[:147].reshape(-1)
    directly = codec.dequantize(mxfp4.pairs_as_q8_0(codes, scales), "q8_0").reshape(147, -1)
    np.testing.assert_array_equal(directly, again(0, 147)[0].reshape(147, -1))
    assert not codec.dequantize(mxfp4.pairs_as_q8_0(codes[:1] * 0 + 8, scales[:1]), "q8_0").any()
    finer, part = again(60, 104)
    assert np.abs(finer - part).max() <= 2**-25, "below, to the nearest multiple of 2^-24"
    assert (finer != part).any()
    assert not codec.dequantize(mxfp4.as_q8_0(np.zeros((3, 32), dtype=np.float32)), "q8_0").any()
    for wrong in (np.nan, np.inf, 6 * 2.0**20):
        with pytest.raises(CheckpointError, match="does not fit q8"):
            mxfp4.as_q8_0(np.full((1, 32), wrong, dtype=np.float32))
