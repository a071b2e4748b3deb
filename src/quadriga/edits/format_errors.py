"""What every format costs for every matrix, in nats of divergence a token: what a budget chooses from.

A matrix's candidates are measured on a sample of its rows, rounded as the conversion will round them. Two kinds of
result have two kinds of units: a packed directory has a format for every matrix (every expert has its own), a GGUF file
one for every tensor (one for all experts of a layer); q, k and v are apart in both.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Iterator
from math import prod
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from quadriga.io.directory import SPLIT, packed_bytes
from quadriga.kernels.arrays import array, tensor
from quadriga.kernels.cpu import searching
from quadriga.kernels.cpu.packing import pack
from quadriga.model import families
from quadriga.model.config import ModelConfig
from quadriga.model.weight_map import Piece, parameter_shapes, qkv_rows, stays_float32, whole
from quadriga.quant import codec
from quadriga.quant.feedback import Importance, Moments
from quadriga.quant.format_choice import Candidate
from quadriga.quant.formats import FORMATS
from quadriga.quant.packed import TILE

PACKED_FORMATS = ("q2k", "q3k", "iq4xs", "q4", "iq4nl", "q4k", "q4m", "q5", "q5k", "q5m", "q6k", "q8", "bfloat16")
"""The packed formats that a budget chooses from."""
GGUF_FORMATS = (
    "q2_k", "q3_k", "iq4_xs", "q4_0", "iq4_nl", "q4_k", "q4_1", "q5_0", "q5_k", "q5_1", "q6_k", "q8_0", "bfloat16"
)  # fmt: skip
"""The formats of GGUF tensors that a budget chooses from."""

_ROWS = 128
"""Rows of a matrix sampled to measure a format's error, which varies by a few per cent between samples."""


class FormatErrors(Protocol):
    """Collects what formats cost."""

    def add(self, name: str, weight: Tensor, cost: Tensor, how: Importance, judge: Importance) -> None:
        """Measure the formats of a matrix; of one that is met twice (tied embeddings), their costs add up.

        Args:
            name: the parameter's, an expert's with its number.
            weight: (rows, columns), or a sample of a table's rows.
            cost: (rows,) nats of a unit of a row's error.
            how: what the rounding goes by.
            judge: what a row's error is measured with.
        """
        ...

    def candidates(self) -> dict[str, list[Candidate]]:
        """Unit -> the size and cost of every format."""
        ...


def row_errors(difference: Tensor, judge: Importance) -> Tensor:
    """Mean squares of what differences of rows (n, columns) make of a matrix's outputs, (n,)."""
    if isinstance(judge, Moments):
        made: Tensor = torch.linalg.solve_triangular(tensor(judge.upper), difference, upper=True, left=False)
        return made.square().sum(1) * float(judge.diagonal.mean())
    weighed: Tensor = difference.square() * tensor(judge)
    return weighed.sum(1)


class _Errors(ABC):
    """The sum of both kinds: unit -> format -> cost."""

    def __init__(self) -> None:
        self._costs: dict[str, dict[str, float]] = {}

    def _measure(
        self, unit: str, formats: tuple[str, ...], weight: Tensor, cost: Tensor, how: Importance, judge: Importance
    ) -> None:
        step = max(1, len(weight) // _ROWS)
        sample, of_sample = weight.detach().float()[::step][:_ROWS].contiguous(), cost[::step][:_ROWS]
        known = float(of_sample.sum())
        for form in formats:
            errors = row_errors(self._rounded(sample, form, how) - sample, judge)
            mean = float((errors * of_sample).sum()) / known if known > 0 else float(errors.mean())
            costs = self._costs.setdefault(unit, {})
            costs[form] = costs.get(form, 0.0) + mean * float(cost.sum())

    @abstractmethod
    def _rounded(self, sample: Tensor, form: str, how: Importance) -> Tensor:
        """The rows (R, C) as this form would give them back."""


class PackedErrors(_Errors):
    """Of a packed directory."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self._config, self._shapes = config, parameter_shapes(config)
        self._rows: dict[str, int] = {}

    def add(self, name: str, weight: Tensor, cost: Tensor, how: Importance, judge: Importance) -> None:
        """See :class:`FormatErrors`."""
        if stays_float32(name):
            return
        first = 0
        for unit, rows in self._units(name, len(weight)):
            part = slice(first, first + rows)
            self._measure(unit, PACKED_FORMATS, weight[part], cost[part], how, judge)
            first += rows

    def _units(self, name: str, rows: int) -> list[tuple[str, int]]:
        """What of a matrix may have formats of its own, and how many rows each has: q, k and v, in whole tiles."""
        if name.endswith(SPLIT):
            heights = qkv_rows(self._config, name)
            if all(height % TILE == 0 for height in heights):
                self._rows |= {f"{name}/{i}": height for i, height in enumerate(heights)}
                return [(f"{name}/{i}", height) for i, height in enumerate(heights)]
        return [(name, rows)]

    def _rounded(self, sample: Tensor, form: str, how: Importance) -> Tensor:
        return tensor(pack(array(sample), form, importance=how).unpack())

    def candidates(self) -> dict[str, list[Candidate]]:
        """See :class:`FormatErrors`."""

        def size(name: str, form: str) -> int:
            rows, cols = self._shapes[name.split("/")[0]][-2:]
            return packed_bytes((self._rows.get(name, rows), cols), form)

        return {
            name: [Candidate(form, size(name, form), error) for form, error in costs.items()]
            for name, costs in self._costs.items()
        }


class GGUFErrors(_Errors):
    """Of a GGUF file; the model must be of a family that GGUF knows."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        family = families.family_of(config)
        assert family.gguf_map is not None, "a family that GGUF knows"
        self._pieces: dict[str, list[Piece]] = defaultdict(list)
        for piece in family.gguf_map(family.gguf_form(config)):
            self._pieces[piece.target].append(piece)

    def add(self, name: str, weight: Tensor, cost: Tensor, how: Importance, judge: Importance) -> None:
        """See :class:`FormatErrors`."""
        if stays_float32(name):
            return
        for piece, (first, last) in self._rows(name, len(weight)):
            formats = tuple(form for form in GGUF_FORMATS if weight.shape[1] % FORMATS[form].block == 0)
            self._measure(piece.source, formats, weight[first:last], cost[first:last], how, judge)

    def _rows(self, name: str, n: int) -> Iterator[tuple[Piece, tuple[int, int]]]:
        """The tensors that hold rows of a matrix, and which; of a sampled table all."""
        target, _, expert = name.partition("/")
        for piece in self._pieces[target]:
            box = piece.target_box or whole(piece.target_shape)
            if expert:
                if box[0][0] <= int(expert) < box[0][1]:
                    yield piece, box[1]
            else:
                yield piece, box[0] if n == piece.target_shape[0] else (0, n)

    def _rounded(self, sample: Tensor, form: str, how: Importance) -> Tensor:
        if form == "bfloat16":
            return sample.bfloat16().float()
        values = np.ascontiguousarray(array(sample), dtype=np.float32)
        raw = codec.quantize(values, form, how, searching.fastest())
        return tensor(codec.dequantize(raw, form).reshape(values.shape).copy())

    def candidates(self) -> dict[str, list[Candidate]]:
        """See :class:`FormatErrors`."""
        shapes = {piece.source: piece.source_shape for pieces in self._pieces.values() for piece in pieces}
        return {
            name: [
                Candidate(form, FORMATS[form].nbytes_of((prod(shapes[name]),)), error) for form, error in costs.items()
            ]
            for name, costs in self._costs.items()
        }
