"""Where every byte of the files to be written goes, fixed before the first weight is read."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class FilePlan:
    """The files of a conversion's result: headers, sizes, and the place of each tensor."""

    headers: dict[str, bytes]
    """File name -> its first bytes."""
    sizes: dict[str, int]
    """File name -> its size in bytes."""
    places: dict[str, tuple[str, int]]
    """Tensor -> (file name, offset of its first byte)."""
