"""The kernels' search for scales beside its NumPy statement: the same blocks but for near ties, never a worse matrix."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from quadriga.errors import CheckpointError
from quadriga.kernels.cpu import library as cpu
from quadriga.kernels.cpu import searching
from quadriga.quant import codec
from quadriga.quant.formats import FORMATS
from quadriga.quant.search import NUMPY, Search

SEARCHED = ("q2_k", "q3_k", "q4_k", "q5_k", "q6_k", "q5_0", "q5_1", "iq4_nl", "iq4_xs")


@pytest.fixture(params=cpu.ISAS, autouse=True)
def _isa(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if cpu.ISAS.index(request.param) > cpu.ISAS.index(cpu.isa()):
        pytest.skip(f"this processor has no {request.param}")
    context = cpu.Context(1, request.param)
    monkeypatch.setattr(searching, "packing_context", lambda: context)


def errors(
    x: NDArray[np.float32], raw: NDArray[np.uint8], form: str, weight: NDArray[np.float32]
) -> NDArray[np.float64]:
    """Of every block, weighted."""
    off = codec.dequantize(raw, form).reshape(x.shape).astype(np.float64) - x
    return (weight * off**2).reshape(-1, FORMATS[form].block).sum(axis=1)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("form", SEARCHED)
def test_the_kernels_find_what_numpy_finds(form: str, weighted: bool) -> None:
    # 23 rows of 3 blocks: no multiple of the sixteen sub-blocks that are searched at once.
    rng = np.random.default_rng(17)
    x = (rng.standard_t(4, (23, 3 * FORMATS[form].block)) * 0.02).astype(np.float32)
    importance = rng.uniform(0.05, 4, x.shape[1]).astype(np.float32) if weighted else None
    theirs, ours = (codec.quantize(x, form, importance, search) for search in (NUMPY, searching.KERNELS))
    weight = np.ones(x.shape[1], dtype=np.float32) if importance is None else importance
    e_theirs, e_ours = (errors(x, raw, form, weight) for raw in (theirs, ours))
    assert e_ours.sum() <= 1.001 * e_theirs.sum()
    assert (e_ours <= 1.1 * e_theirs).all(), "no block is much worse"
    alike = (theirs.reshape(len(e_ours), -1) == ours.reshape(len(e_ours), -1)).all(axis=1)
    assert alike.mean() > 0.75  # q6_k: 0.80, the others above 0.95


@pytest.mark.parametrize("form", SEARCHED)
def test_importance_moves_the_error(form: str) -> None:
    x = np.random.default_rng(18).normal(size=(8, 2 * FORMATS[form].block)).astype(np.float32)
    importance = np.where(np.arange(x.shape[1]) % 4 == 0, 50, 0.2).astype(np.float32)
    found = [
        errors(x, codec.quantize(x, form, i, searching.KERNELS), form, importance).sum() for i in (None, importance)
    ]
    assert found[1] < 0.9 * found[0]


@pytest.mark.parametrize("form", SEARCHED)
def test_blocks_of_few_values_are_stored_as_numpy_stores_them(form: str) -> None:
    x = np.zeros((3, FORMATS[form].block), dtype=np.float32)
    x[1, ::3], x[2, 5] = 1.0, -0.5
    if form in ("iq4_nl", "iq4_xs"):
        x *= 127 / 128
    raw = codec.quantize(x, form, None, searching.KERNELS)
    theirs = codec.quantize(x, form, None, NUMPY)
    np.testing.assert_array_equal(codec.dequantize(raw, form), codec.dequantize(theirs, form))
    assert not codec.dequantize(raw, form).reshape(x.shape)[0].any()


@pytest.mark.parametrize("size", [4e8, 3e38])
@pytest.mark.parametrize("search", [NUMPY, searching.KERNELS], ids=["numpy", "kernels"])
@pytest.mark.parametrize("form", SEARCHED)
def test_numbers_beyond_float16_s_scales_are_refused(form: str, search: Search, size: float) -> None:
    x = np.full((1, FORMATS[form].block), -size, dtype=np.float32)
    x[0, 1] = size
    with pytest.raises(CheckpointError, match="float16"):
        codec.quantize(x, form, None, search)
