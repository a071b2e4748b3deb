"""Block formats decoded by the kernels: the plain codec's numbers to the bit, under every instruction set."""

from __future__ import annotations

import gguf
import numpy as np
import pytest

from quadriga.errors import ConfigError
from quadriga.kernels.cpu import decoding, file_context
from quadriga.kernels.cpu import library as cpu
from quadriga.quant import codec
from quadriga.quant.formats import FORMATS, PLAIN

BLOCKED = [name for name in FORMATS if name not in PLAIN]


def same_bits(a: np.ndarray, b: np.ndarray) -> None:
    """NaN equals NaN; everything else to the sign of zero."""
    np.testing.assert_array_equal(np.isnan(a), np.isnan(b))
    np.testing.assert_array_equal(
        np.where(np.isnan(a), 0, a).view(np.uint32), np.where(np.isnan(b), 0, b).view(np.uint32)
    )


def test_every_block_format_has_a_number() -> None:
    assert decoding.STORED.keys() == set(BLOCKED)


@pytest.mark.parametrize("isa", cpu.isas_in_force())
@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("name", BLOCKED)
def test_random_bytes_give_the_codec_s_bits(name: str, threads: int, isa: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every possible block, NaN and infinite scales too; more blocks than a thread takes at once, and a rest."""
    context = cpu.Context(threads, isa)
    monkeypatch.setattr(decoding, "packing_context", lambda: context)
    spec = FORMATS[name]
    n_blocks = 3 * (8192 // spec.block) + 5
    raw = np.random.default_rng(11).integers(0, 256, n_blocks * spec.nbytes, dtype=np.uint8)
    out = np.full(n_blocks * spec.block + 16, 7, dtype=np.float32)
    decoding.dequantize_into(out[:-16], raw, name)
    same_bits(out[:-16], codec.dequantize(raw, name))
    assert (out[-16:] == 7).all()


@pytest.mark.parametrize("name", [name for name in BLOCKED if name != "q8_k"])
def test_from_odd_addresses_the_bits_of_gguf_py(name: str) -> None:
    spec = FORMATS[name]
    raw = np.random.default_rng(12).integers(0, 256, 3 * spec.nbytes + 1, dtype=np.uint8)[1:]
    out = np.empty((3, spec.block), dtype=np.float32)
    decoding.dequantize_into(out, raw, name)
    with np.errstate(all="ignore"):
        theirs = gguf.quants.dequantize(raw.reshape(3, -1), gguf.GGMLQuantizationType(spec.ggml_type))
    same_bits(out, theirs)


def test_nothing_is_nothing() -> None:
    decoding.dequantize_into(np.empty(0, dtype=np.float32), b"", "iq1_s")


def test_without_the_library_numpy_gives_the_same(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("QUADRIGA_LIBRARY", "/nowhere/quadriga_cpu.so")
    cpu.library.cache_clear()
    file_context.is_built.cache_clear()
    raw = np.random.default_rng(13).integers(0, 256, (2, 144), dtype=np.uint8)
    out = np.empty((2, 256), dtype=np.float32)
    try:
        decoding.dequantize_into(out, raw, "q4_k")
        decoding.dequantize_into(out, raw, "q4_k")
    finally:
        monkeypatch.undo()
        cpu.library.cache_clear()
        file_context.is_built.cache_clear()
    same_bits(out.reshape(-1), codec.dequantize(raw, "q4_k"))
    assert [r.getMessage().split(",")[0] for r in caplog.records] == ["Blocks go through NumPy"]


def test_the_library_refuses_what_it_does_not_know() -> None:
    context, out = cpu.Context(1), np.zeros(256, dtype=np.float32)
    call = context.lib.qd_dequantize
    with pytest.raises(ConfigError, match="stored must be one of qd_stored, got 24"):
        context.call(call, 24, out.ctypes.data, 1, None, out.ctypes.data)
    with pytest.raises(ConfigError, match="needs its codebook"):
        context.call(call, decoding.STORED["iq3_s"], out.ctypes.data, 1, None, out.ctypes.data)
