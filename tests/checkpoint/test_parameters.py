"""The pieces of a weight map: cut, read, written back, and the dtype of what several of them make."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from quadriga.io.parameters import ParameterView, from_stored, slices, to_stored
from quadriga.io.safetensors import SafetensorsSource
from quadriga.model.weight_map import Piece

HEADS, ROWS, COLUMNS = 6, 8, 5


def rotary() -> Piece:
    """A projection whose heads are stored as interleaved pairs."""
    shape = (HEADS * ROWS, COLUMNS)
    return Piece(source="stored", source_shape=shape, target="wq", target_shape=shape, rotary_heads=HEADS)


@pytest.mark.parametrize("max_elements", [1, COLUMNS * ROWS - 1, COLUMNS * ROWS * 2 + 3, 10_000])
def test_rotary_heads_are_cut_between_heads(max_elements: int) -> None:
    stored = np.arange(HEADS * ROWS * COLUMNS, dtype=np.float32).reshape(HEADS * ROWS, COLUMNS)
    whole = from_stored(stored, rotary())
    # Row 2 j + side of a head becomes row side * 4 + j.
    assert [int(row[0]) // COLUMNS for row in whole[:ROWS]] == [0, 2, 4, 6, 1, 3, 5, 7]
    parts = list(slices(rotary(), max_elements))
    for part in parts:
        assert part.source_box is not None
        (start, stop), _ = part.source_box
        assert start % ROWS == 0 == stop % ROWS, "a head was cut"
        values = from_stored(stored[start:stop], part)
        assert np.array_equal(values, whole[start:stop])
        assert np.array_equal(to_stored(values, part), stored[start:stop])
    assert sum(part.rotary_heads for part in parts) == HEADS
    assert len(parts) == {1: 6, COLUMNS * ROWS - 1: 6, COLUMNS * ROWS * 2 + 3: 3, 10_000: 1}[max_elements]


@pytest.mark.parametrize(
    ("first", "second", "both"),
    [
        (torch.bfloat16, torch.float32, np.float32),
        (torch.float32, torch.bfloat16, np.float32),
        (torch.float16, torch.bfloat16, np.float32),  # neither holds the other's numbers
        (torch.float16, torch.float16, np.float16),
    ],
)
def test_a_parameter_of_several_dtypes_has_one_that_holds_all(
    tmp_path: Path, first: torch.dtype, second: torch.dtype, both: type
) -> None:
    q, k = torch.randn(4, 3).to(first), torch.randn(2, 3).to(second)
    save_file({"q": q, "k": k}, tmp_path / "x.safetensors")
    pieces = [
        Piece(source="q", source_shape=(4, 3), target="wqk", target_shape=(6, 3), target_box=((0, 4), (0, 3))),
        Piece(source="k", source_shape=(2, 3), target="wqk", target_shape=(6, 3), target_box=((4, 6), (0, 3))),
    ]
    view = ParameterView(SafetensorsSource(tmp_path / "x.safetensors"), pieces)
    assert view.dtype("wqk") == both
    assert torch.equal(torch.from_numpy(view.read("wqk").astype(np.float32)), torch.cat((q.float(), k.float())))
