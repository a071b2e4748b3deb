"""What an adapter may have beyond its low-rank factors; it can be folded into a checkpoint, and nothing else.

DoRA                     row i of W + s B A keeps its direction and gets the length m_i      (Liu et al. 2024,
                         arXiv 2402.09353; peft divides by the norm over a row of the stored matrix)
modules_to_save          whole matrices in place of the base's
trainable_token_indices  single rows of a table in place of the base's
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from quadriga.model.weight_map import Box
from quadriga.quant.dtypes import Array

Floats = NDArray[np.float32]


@dataclass(frozen=True, kw_only=True)
class Extras:
    """Everything of an adapter that is no pair of factors; names are parameters, values float32."""

    lengths: Mapping[str, Floats] = field(default_factory=dict)
    """(rows,) or (E, rows): the length of each row of the result; NaN where a row keeps the length it has."""
    replaced: Mapping[str, list[tuple[Box, Floats]]] = field(default_factory=dict)
    """Boxes of parameters, and what stands there instead of the base's numbers."""

    def reasons(self) -> list[str]:
        """What there is, in peft's words."""
        named = {"use_dora": self.lengths, "modules_to_save or trainable_token_indices": self.replaced}
        return [name for name, there in named.items() if there]

    def parts(self) -> Iterator[tuple[str, Floats]]:
        """All numbers in a fixed order, each with where it goes."""
        for name, lengths in self.lengths.items():
            yield f"lengths of {name}", lengths
        for name, boxes in self.replaced.items():
            for box, values in boxes:
                yield f"{name} {box}", values

    def in_place(self, name: str, expert: int | None, first: int, frozen: Array) -> Array:
        """The base's rows (or elements of a vector) from ``first`` on, with what replaces them."""
        out: Array | None = None
        for box, values in self.replaced.get(name, ()):
            if expert is not None:
                if not box[0][0] <= expert < box[0][1]:
                    continue
                values, box = values[expert - box[0][0]], box[1:]
            start, stop = max(box[0][0], first), min(box[0][1], first + len(frozen))
            if start < stop:
                out = frozen.copy() if out is None else out
                part = values[start - box[0][0] : stop - box[0][0]].astype(out.dtype)
                out[(slice(start - first, stop - first), *(slice(*axis) for axis in box[1:]))] = part
        return frozen if out is None else out

    def stretched(self, name: str, expert: int | None, first: int, rows: Floats) -> Floats:
        """Rows (float32) from ``first`` on, each with the length it is to have."""
        if name not in self.lengths:
            return rows
        lengths = self.lengths[name] if expert is None else self.lengths[name][expert]
        wanted = lengths[first : first + len(rows)]
        factor = np.where(np.isnan(wanted), np.float32(1.0), wanted / np.sqrt(np.square(rows).sum(1)))
        return rows * factor[:, None]
