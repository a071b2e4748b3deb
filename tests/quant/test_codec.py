"""Block codecs, bit for bit against gguf-py, on random and extreme blocks."""

from __future__ import annotations

import gguf
import numpy as np
import pytest

from quadriga.quant import codec
from quadriga.quant.formats import FORMATS, PLAIN

BLOCKED = [name for name in FORMATS if name not in PLAIN]


def ggml_type(name: str) -> gguf.GGMLQuantizationType:
    return gguf.GGMLQuantizationType(FORMATS[name].ggml_type)


@pytest.mark.parametrize("name", FORMATS)
def test_sizes_are_ggml_s(name: str) -> None:
    assert gguf.GGML_QUANT_SIZES[ggml_type(name)] == (FORMATS[name].block, FORMATS[name].nbytes)


@pytest.mark.parametrize("name", BLOCKED)
def test_unpacking_random_bytes_is_bit_exact(name: str) -> None:
    """Random bytes are every possible block, Inf and NaN scales included."""
    raw = np.random.default_rng(5).integers(0, 256, (3001, FORMATS[name].nbytes), dtype=np.uint8)
    ours = codec.dequantize(raw, name)
    with np.errstate(all="ignore"):
        theirs = gguf.quants.dequantize(raw, ggml_type(name)).reshape(-1)
    np.testing.assert_array_equal(ours, theirs)  # NaN equals NaN here
    assert np.isnan(ours).any() and np.isfinite(ours).mean() > 0.9


@pytest.mark.parametrize("name", ["q8_0", "q4_0", "q4_1"])
@pytest.mark.parametrize("spread", [1e-9, 1.0, 3e4])
def test_packing_is_bit_exact(name: str, spread: float) -> None:
    values = np.random.default_rng(6).standard_normal((2048, 32), dtype=np.float32) * np.float32(spread)
    values[0] = 0
    values[1] = 1.5  # every element the same
    values[2, ::2] = -values[2, 1::2]  # two values furthest from zero, of opposite sign
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
