"""Block codecs, bit for bit against gguf-py, on random and extreme blocks."""

from __future__ import annotations

import gguf
import numpy as np
import pytest

from quadriga.errors import CheckpointError
from quadriga.quant import codec
from quadriga.quant.codebooks import FOUR_BIT_VALUES, codebook, even_signs
from quadriga.quant.formats import FORMATS, PLAIN

BLOCKED = [name for name in FORMATS if name not in PLAIN]


def ggml_type(name: str) -> gguf.GGMLQuantizationType:
    return gguf.GGMLQuantizationType(FORMATS[name].ggml_type)


@pytest.mark.parametrize("name", FORMATS)
def test_sizes_are_ggml_s(name: str) -> None:
    assert gguf.GGML_QUANT_SIZES[ggml_type(name)] == (FORMATS[name].block, FORMATS[name].nbytes)


def same_bits(a: np.ndarray, b: np.ndarray) -> None:
    """NaN equals NaN; everything else to the sign of zero."""
    np.testing.assert_array_equal(np.isnan(a), np.isnan(b))
    np.testing.assert_array_equal(
        np.where(np.isnan(a), 0, a).view(np.uint32), np.where(np.isnan(b), 0, b).view(np.uint32)
    )


@pytest.mark.parametrize("name", [name for name in BLOCKED if name != "q8_k"])
def test_unpacking_random_bytes_is_bit_exact(name: str) -> None:
    """Random bytes cover every possible block, including Inf and NaN scales."""
    raw = np.random.default_rng(5).integers(0, 256, (3001, FORMATS[name].nbytes), dtype=np.uint8)
    ours = codec.dequantize(raw, name)
    with np.errstate(all="ignore"):
        theirs = gguf.quants.dequantize(raw, ggml_type(name)).reshape(-1)
    same_bits(ours, theirs)
    if "fp4" not in name:  # whose scales have no NaN in ggml
        assert np.isnan(ours).any()
    assert np.isfinite(ours).mean() > 0.9


def test_unpacking_q8_k() -> None:
    """gguf-py has no code for it: a float32 scale, 256 numbers, and sums that nothing but a dot product wants."""
    d = np.array([0.1, -3e38, np.nan], dtype=np.float32)
    q = np.random.default_rng(9).integers(-128, 128, (3, 256)).astype(np.int8)
    raw = np.concatenate((d[:, None].view(np.uint8), q.view(np.uint8), np.full((3, 32), 77, np.uint8)), axis=1)
    with np.errstate(over="ignore"):
        same_bits(codec.dequantize(raw, "q8_k"), (d[:, None] * q.astype(np.float32)).reshape(-1))


@pytest.mark.parametrize("kind", ["IQ1_S", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S"])
def test_codebooks_are_ggml_s(kind: str) -> None:
    theirs = getattr(gguf.quants, kind)
    theirs.init_grid()
    np.testing.assert_array_equal(codebook(kind.lower()), theirs.grid.reshape(theirs.grid_shape))


def test_signs_are_ggml_s() -> None:
    assert bytes(even_signs()) == gguf.quants.IQ2_XXS.ksigns
    assert tuple(FOUR_BIT_VALUES) == gguf.quants.IQ4_NL.kvalues


@pytest.mark.parametrize("name", ["q8_0", "q4_0", "q4_1"])
@pytest.mark.parametrize("spread", [1e-9, 1.0, 1e4])
def test_packing_is_bit_exact(name: str, spread: float) -> None:
    values = np.random.default_rng(6).standard_normal((2048, 32), dtype=np.float32) * np.float32(spread)
    values[0] = 0
    values[1] = 1.5  # all elements equal
    values[2, ::2] = -values[2, 1::2]  # two values furthest from zero, of opposite sign
    values[3] = np.float32(spread) * np.linspace(-127, 127, 32, dtype=np.float32).round() / 127
    values[4] = values[4] * np.float32(1e-6)  # the scale is a subnormal float16, or 0
    ours = codec.quantize(values, name)
    theirs = gguf.quants.quantize(values, ggml_type(name)).reshape(-1)
    np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize(("name", "steps"), [("q8_0", 127), ("q4_0", 8), ("q4_1", 15)])
def test_packing_error_is_half_a_step(name: str, steps: int) -> None:
    values = np.random.default_rng(7).uniform(-1, 1, (512, 32)).astype(np.float32)
    back = codec.dequantize(codec.quantize(values, name), name).reshape(values.shape)
    width = np.ptp(values, axis=1) if name == "q4_1" else np.abs(values).max(axis=1)
    step = (width / steps)[:, None]
    # q4_0 has 8 steps on one side and 7 on the other, so the far end of the short side may be a whole step off; scales
    # are rounded to float16, 2^-11 of values up to `steps` steps.
    bound = step * ((1.0 if name == "q4_0" else 0.5) + steps * 2.0**-11) + 2.0**-11
    assert (np.abs(back - values) <= bound).all()


def test_halves_round_away_from_zero() -> None:
    """Rounds like C's roundf: the step is 1 here, and 0.49999997 + 0.5 is 1 in float32."""
    values = np.zeros((1, 32), dtype=np.float32)
    values[0, :8] = (127, 0.5, -0.5, 1.5, -2.5, 2.5, 0.49999997, -0.49999997)
    packed = codec.quantize(values, "q8_0")
    assert packed[2:10].view(np.int8).tolist() == [127, 1, -1, 2, -3, 3, 0, 0]
    np.testing.assert_array_equal(packed, gguf.quants.quantize(values, ggml_type("q8_0")).reshape(-1))


@pytest.mark.parametrize("name", ["q8_0", "q4_0", "q4_1"])
def test_a_block_too_small_for_its_scale_becomes_zeros(name: str) -> None:
    values = np.full((3, 32), 1e-45, dtype=np.float32)  # the inverse of the scale overflows float32
    values[:, ::3] = 0
    assert not codec.dequantize(codec.quantize(values, name), name).any()


@pytest.mark.parametrize("name", ["q8_0", "q4_0", "q4_1"])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 3e38, -3e38])
def test_what_a_block_cannot_hold_is_refused(name: str, bad: float) -> None:
    values = np.random.default_rng(8).standard_normal((5, 32), dtype=np.float32)
    values[3, 17] = bad
    with pytest.raises(CheckpointError, match="weights to be quantised must be finite"):
        codec.quantize(values, name)


@pytest.mark.parametrize(("name", "steps"), [("q8_0", 127), ("q4_0", 8), ("q4_1", 15)])
def test_the_largest_scale_is_float16_s_largest(name: str, steps: int) -> None:
    """65519 rounds to 65504 in float16, 65520 to infinity."""
    values = np.zeros((1, 32), dtype=np.float32)
    values[0, 5] = 65519 * steps
    assert codec.dequantize(codec.quantize(values, name), name)[5] == 65504 * steps
    values[0, 5] = 65521 * steps
    with pytest.raises(CheckpointError, match="below 65520"):
        codec.quantize(values, name)


# Formats that are searched -------------------------------------------------------------------------------------------

# Mean squared error of normal rows: what the search left when it was written, and 1 % more; what ggml's own quantisers leave
# on such rows (those in ctransformers 0.2.27, which has no more of them).
NORMAL_ERROR = {
    "q2_k": 0.0684, "q3_k": 0.0208, "q4_k": 0.00493, "q5_k": 0.00119, "q6_k": 0.000275,
    "q5_0": 0.00163, "q5_1": 0.00112, "iq4_nl": 0.00541, "iq4_xs": 0.00549, "mxfp4": 0.01251,
}  # fmt: skip
GGML_ERROR = {"q2_k": 0.0861, "q3_k": 0.0226, "q4_k": 0.00506, "q5_k": 0.00129, "q6_k": 0.000312}


def unpacked(raw: np.ndarray, name: str, shape: tuple[int, ...]) -> np.ndarray:
    """By gguf-py."""
    return gguf.quants.dequantize(raw.reshape(shape[0], -1), ggml_type(name)).reshape(shape)


def test_every_searched_format_has_a_bound() -> None:
    assert NORMAL_ERROR.keys() == set(codec.WRITTEN) - {"q8_0", "q4_0", "q4_1"}


@pytest.mark.parametrize("name", NORMAL_ERROR)
def test_the_search_leaves_less_error_than_ggml_s(name: str) -> None:
    values = np.random.default_rng(1).standard_normal((96, 2048), dtype=np.float32)
    back = unpacked(codec.quantize(values, name), name, values.shape)
    assert ((back - values) ** 2).mean() < NORMAL_ERROR[name] < GGML_ERROR.get(name, 1)


@pytest.mark.parametrize("name", NORMAL_ERROR)
def test_what_a_format_can_hold_is_kept(name: str) -> None:
    """Numbers that came out of a format go in again with almost no error, and gguf-py reads what we read."""
    spec, rng = FORMATS[name], np.random.default_rng(2)
    raw = rng.integers(0, 0x3C, (64, spec.nbytes), dtype=np.uint8)
    values = codec.dequantize(raw, name).reshape(64, -1)
    again = codec.quantize(values, name)
    back = codec.dequantize(again, name).reshape(values.shape)
    np.testing.assert_array_equal(back, unpacked(again, name, values.shape))
    assert ((back - values) ** 2).mean() <= 2e-3 * (values**2).mean()


@pytest.mark.parametrize("name", NORMAL_ERROR)
@pytest.mark.parametrize("size", [0, 1e-30, 1e-9, 1e4])
def test_sizes_do_not_matter_but_at_the_ends_of_float16(name: str, size: float) -> None:
    values = np.random.default_rng(3).standard_normal((4, 512), dtype=np.float32)
    back = unpacked(codec.quantize(values * np.float32(size), name), name, values.shape)
    assert np.isfinite(back).all()
    if size < 1e-8 and name != "mxfp4":  # scales below float16's least are 0
        assert not back.any() or size == 1e-9
        return
    if size:
        assert ((back / size - values) ** 2).mean() < 1.1 * NORMAL_ERROR[name]


@pytest.mark.parametrize("name", NORMAL_ERROR)
def test_important_columns_are_nearer(name: str) -> None:
    values = np.random.default_rng(4).standard_normal((64, 512), dtype=np.float32)
    importance = np.ones(512, dtype=np.float32)
    importance[5::9] = 100
    error = {
        weighed: (unpacked(codec.quantize(values, name, weights), name, values.shape) - values) ** 2
        for weighed, weights in ((False, None), (True, importance))
    }
    chosen = importance > 1
    assert error[True][:, chosen].mean() < 0.95 * error[False][:, chosen].mean()
    assert (error[True] * importance).mean() < (error[False] * importance).mean()


@pytest.mark.parametrize("name", NORMAL_ERROR)
@pytest.mark.parametrize("importance", [0.0, -1.0, np.nan, np.inf])
def test_importance_without_a_column_that_counts_is_none(name: str, importance: float) -> None:
    values = np.random.default_rng(4).standard_normal((3, 256), dtype=np.float32)
    weights = np.ones(256, np.float32) if np.isinf(importance) else np.full(256, importance, np.float32)
    weights[17] = importance
    np.testing.assert_array_equal(codec.quantize(values, name, weights), codec.quantize(values, name))


@pytest.mark.parametrize("name", NORMAL_ERROR)
def test_columns_that_were_never_seen_are_rounded_well_too(name: str) -> None:
    values = np.random.default_rng(5).standard_normal((64, 512), dtype=np.float32)
    seen = np.repeat(np.float32([1, 0]), 256)
    error = (unpacked(codec.quantize(values, name, seen), name, values.shape) - values) ** 2
    assert error[:, 256:].mean() < 1.1 * NORMAL_ERROR[name]


@pytest.mark.parametrize("name", NORMAL_ERROR)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 3e38])
def test_a_search_refuses_what_no_block_can_hold(name: str, bad: float) -> None:
    values = np.random.default_rng(8).standard_normal((5, 256), dtype=np.float32)
    values[3, 17] = bad
    if name == "mxfp4" and bad == 3e38:
        assert codec.dequantize(codec.quantize(values, name), name).max() > 2e38
        return
    with pytest.raises(CheckpointError, match="weights to be quantised must be finite"):
        codec.quantize(values, name)
