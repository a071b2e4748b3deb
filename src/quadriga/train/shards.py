"""Tensors that lie in parts on several ranks, as safetensors files, one a rank.

    parameter/layers.3.moe.w_gate@4:8,0:80,0:48        name @ box of the whole tensor that this part is

A part's name says which box of the whole tensor it is, so a run of any other number of ranks finds what it needs by
reading names: it takes the overlap of each stored box with its own. torch's distributed checkpoints do the same, but
keep the table of boxes as a pickle; nothing of ours is ever unpickled.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from math import prod
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from quadriga.errors import CheckpointError
from quadriga.model.weight_map import Box

_CODES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float64: "F64", torch.int64: "I64"}


def own_box(x: Tensor) -> Box:
    """Which box of the whole tensor this rank holds."""
    if not isinstance(x, DTensor):
        return tuple((0, n) for n in x.shape)
    shape, offset = compute_local_shape_and_global_offset(x.shape, x.device_mesh, x.placements)
    return tuple((a, a + n) for a, n in zip(offset, shape, strict=True))


def writes(x: Tensor, rank: int) -> bool:
    """True on one rank for every part: of equal copies the first rank's is written."""
    if not isinstance(x, DTensor):
        return rank == 0
    coordinate = x.device_mesh.get_coordinate()
    assert coordinate is not None, "every rank is in the mesh"
    return all(c == 0 for c, p in zip(coordinate, x.placements, strict=True) if isinstance(p, Replicate))


def local_parts(tensors: Mapping[str, Tensor], rank: int) -> dict[str, Tensor]:
    """This rank's share of what is to be saved, copied to the host, under names with boxes."""
    parts = {}
    for name, x in tensors.items():
        box = own_box(x)
        if writes(x, rank) and all(b > a for a, b in box):
            values = x.to_local() if isinstance(x, DTensor) else x
            parts[name_of(name, box)] = values.detach().to("cpu", copy=True).contiguous()
    return parts


def name_of(name: str, box: Box) -> str:
    """``name@0:4,8:16``; ``name@`` for a scalar."""
    return f"{name}@" + ",".join(f"{a}:{b}" for a, b in box)


def parse_name(text: str) -> tuple[str, Box]:
    """The inverse of :func:`name_of`.

    Raises:
        CheckpointError: it is no such name.
    """
    name, at, spans = text.rpartition("@")
    try:
        box = tuple((int(a), int(b)) for a, b in (span.split(":") for span in spans.split(",") if span))
    except ValueError:
        box = ((1, 0),)
    if not at or any(not 0 <= a < b for a, b in box):
        raise CheckpointError(f"{text[:100]!r} is no part of a training state; the files were changed or mixed")
    return name, box


def encode(parts: Mapping[str, Tensor]) -> Iterator[bytes | memoryview]:
    """The bytes of a safetensors file, tensor by tensor; nothing is copied."""
    header: dict[str, object] = {}
    at = 0
    for name, x in parts.items():
        header[name] = {"dtype": _CODES[x.dtype], "shape": list(x.shape), "data_offsets": [at, at + x.nbytes]}
        at += x.nbytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    yield len(text).to_bytes(8, "little") + text
    for x in parts.values():
        if x.numel():
            yield memoryview(x.reshape(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]


class ShardReader:
    """All parts of a saved state, whatever ranks wrote them.

    Raises (when opened):
        CheckpointError: a file is no safetensors file, or a part's name or shape is wrong.
    """

    def __init__(self, files: list[Path]) -> None:
        self._parts: dict[str, list[tuple[Box, str, int]]] = {}
        self._files: list[Any] = []
        for file in files:
            try:
                handle: Any = safe_open(file, framework="pt")
            except (SafetensorError, OSError) as error:
                raise CheckpointError(f"{file}: {error}") from None
            self._files.append(handle)
            for stored in handle.keys():  # noqa: SIM118  (it is no mapping)
                name, box = parse_name(stored)
                shape = tuple(b - a for a, b in box)
                if tuple(handle.get_slice(stored).get_shape()) != shape:
                    raise CheckpointError(f"{file.name}: {stored[:100]!r} has another shape than its name says")
                self._parts.setdefault(name, []).append((box, stored, len(self._files) - 1))

    def names(self) -> set[str]:
        """Of the whole tensors."""
        return set(self._parts)

    def shape(self, name: str) -> tuple[int, ...]:
        """Of a whole tensor: where its boxes end."""
        boxes = [box for box, _, _ in self._parts[name]]
        return tuple(max(b for _, b in spans) for spans in zip(*boxes, strict=True))

    @torch.no_grad()
    def fill(self, name: str, target: Tensor) -> None:
        """Copy what this rank holds of a tensor from the parts that overlap it.

        Raises:
            CheckpointError: the tensor is missing, has another shape, or its parts leave holes.
        """
        if name not in self._parts:
            raise CheckpointError(f"the checkpoint has no {name!r}; it was saved by a run with other settings")
        if self.shape(name) != tuple(target.shape):
            raise CheckpointError(
                f"{name!r} is {list(self.shape(name))} in the checkpoint and {list(target.shape)} in this run; the "
                "model sections differ"
            )
        box = own_box(target)
        values = target.to_local() if isinstance(target, DTensor) else target
        copied = 0
        for part, stored, file in self._parts[name]:
            common = tuple((max(a, c), min(b, d)) for (a, b), (c, d) in zip(box, part, strict=True))
            if any(a >= b for a, b in common):
                continue
            source = self._files[file].get_slice(stored)
            if part == common or not common:
                piece = self._files[file].get_tensor(stored)
            else:
                piece = source[tuple(slice(a - c, b - c) for (a, b), (c, _) in zip(common, part, strict=True))]
            values[tuple(slice(a - c, b - c) for (a, b), (c, _) in zip(common, box, strict=True))] = piece
            copied += prod(b - a for a, b in common)
        if copied != prod(b - a for a, b in box):
            raise CheckpointError(f"{name!r} is incomplete in the checkpoint: {copied} of {target.numel()} numbers")

    def whole(self, name: str) -> Tensor:
        """A whole tensor."""
        first = self._parts[name][0]
        out = torch.empty(self.shape(name), dtype=self._files[first[2]].get_tensor(first[1]).dtype)
        self.fill(name, out)
        return out
