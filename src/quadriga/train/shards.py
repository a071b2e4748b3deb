"""Store tensors that are sharded over ranks as safetensors files, one per rank.

    parameter/layers.3.moe.w_gate@4:8,0:80,0:48        name @ box of the whole tensor

A part's name gives its box (index ranges) in the whole tensor, so a run with another number of ranks finds what it
needs from the names: it copies the overlap of each stored box with its own. torch's distributed checkpoints do the
same, but store the table of boxes as a pickle; we never unpickle anything.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
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

Span = tuple[int, int]
Place = tuple[Box, Tensor]
"""A box of a whole tensor, and this rank's numbers of it (a view)."""


@dataclass(frozen=True)
class Portion:
    """Which part of a whole tensor a rank and those that shard it further have: index ranges of one dimension.

    Tensor parallelism gives a rank some heads: of the packed projection wqkv, their rows of q, of k and of v.
    """

    dim: int
    spans: tuple[Span, ...]
    """In the order they lie in the rank's tensor."""
    size: int
    """Of the whole tensor's dimension."""
    neighbours: tuple[tuple[Span, ...], ...] = ()
    """The spans of all portions that make up the whole, this one among them; each is as large."""

    def take(self, whole: Tensor) -> Tensor:
        """This portion of a whole tensor, as a copy."""
        return torch.cat([whole.narrow(self.dim, a, b - a) for a, b in self.spans], dim=self.dim)

    def joined(self, portions: Sequence[Tensor]) -> Tensor:
        """The whole tensor, of all neighbours' portions in their order."""
        out = portions[0].new_empty(self.shape(tuple(portions[0].shape)))
        for spans, portion in zip(self.neighbours, portions, strict=True):
            parts = torch.split(portion, [b - a for a, b in spans], dim=self.dim)
            for (a, b), part in zip(spans, parts, strict=True):
                out.narrow(self.dim, a, b - a).copy_(part)
        return out

    def shape(self, own: tuple[int, ...]) -> tuple[int, ...]:
        """The whole tensor's shape, from the portion's."""
        return (*own[: self.dim], self.size, *own[self.dim + 1 :])

    def places(self, box: Box, values: Tensor) -> Iterator[Place]:
        """What a box of the portion, whose numbers are ``values``, is of the whole."""
        first, last = box[self.dim]
        at = 0
        for a, b in self.spans:
            low, high = max(first, at), min(last, at + b - a)
            if low < high:
                whole = (*box[: self.dim], (a + low - at, a + high - at), *box[self.dim + 1 :])
                yield whole, values.narrow(self.dim, low - first, high - low)
            at += b - a


def places(x: Tensor, portion: Portion | None = None) -> Iterator[Place]:
    """Where this rank's numbers of a tensor lie in the whole; nothing if it has none."""
    box, values = own_box(x), x.to_local() if isinstance(x, DTensor) else x
    if portion is not None:
        yield from portion.places(box, values)
    elif all(b > a for a, b in box):
        yield box, values


_CODES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float64: "F64", torch.int64: "I64"}


def own_box(x: Tensor) -> Box:
    """The box of the whole tensor that this rank holds."""
    if not isinstance(x, DTensor):
        return tuple((0, n) for n in x.shape)
    shape, offset = compute_local_shape_and_global_offset(x.shape, x.device_mesh, x.placements)
    return tuple((a, a + n) for a, n in zip(offset, shape, strict=True))


def gathered(x: Tensor) -> Tensor:
    """The whole of a tensor on the host; all ranks that hold parts of it must call this."""
    whole: Tensor = x.full_tensor().detach() if isinstance(x, DTensor) else x.detach()
    return whole.cpu()


def writes(x: Tensor, rank: int) -> bool:
    """True if this rank writes its part of ``x``: of several copies only the lowest rank's is written."""
    if not isinstance(x, DTensor):
        return rank == 0
    coordinate = x.device_mesh.get_coordinate()
    assert coordinate is not None, "every rank is in the mesh"
    return all(c == 0 for c, p in zip(coordinate, x.placements, strict=True) if isinstance(p, Replicate))


def local_parts(
    tensors: Mapping[str, Tensor], rank: int, portions: Mapping[str, Portion] | None = None
) -> dict[str, Tensor]:
    """The parts that this rank saves, copied to the host; name with box -> tensor."""
    parts = {}
    for name, x in tensors.items():
        if writes(x, rank):
            for box, values in places(x, (portions or {}).get(name)):
                parts[name_of(name, box)] = values.detach().to("cpu", copy=True).contiguous()
    return parts


def name_of(name: str, box: Box) -> str:
    """The name of a part: ``name@0:4,8:16``, or ``name@`` for a scalar."""
    return f"{name}@" + ",".join(f"{a}:{b}" for a, b in box)


def parse_name(text: str) -> tuple[str, Box]:
    """Parse a part's name into (tensor name, box); the inverse of :func:`name_of`.

    Raises:
        CheckpointError: malformed name.
    """
    name, at, spans = text.rpartition("@")
    try:
        box = tuple((int(a), int(b)) for a, b in (span.split(":") for span in spans.split(",") if span))
    except ValueError:
        box = ((1, 0),)
    if not at or any(not 0 <= a < b for a, b in box):
        raise CheckpointError(f"{text[:100]!r} is not a part of a training checkpoint: files were changed or mixed up")
    return name, box


def encode(parts: Mapping[str, Tensor]) -> Iterator[bytes | memoryview]:
    """Yield the bytes of a safetensors file, tensor by tensor, without copying."""
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
    """Reads tensors from the parts of a saved state, for any number of ranks.

    Raises (when opened):
        CheckpointError: a file is not a safetensors file, or a part's name or shape is wrong.
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
            for stored in handle.keys():  # noqa: SIM118  (it is not a mapping)
                name, box = parse_name(stored)
                shape = tuple(b - a for a, b in box)
                if tuple(handle.get_slice(stored).get_shape()) != shape:
                    raise CheckpointError(f"{file.name}: the shape of {stored[:100]!r} differs from its name")
                self._parts.setdefault(name, []).append((box, stored, len(self._files) - 1))

    def names(self) -> set[str]:
        """Names of all tensors, without boxes."""
        return set(self._parts)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a whole tensor, from the ends of its boxes."""
        boxes = [box for box, _, _ in self._parts[name]]
        return tuple(max(b for _, b in spans) for spans in zip(*boxes, strict=True))

    @torch.no_grad()
    def fill(self, name: str, target: Tensor, portion: Portion | None = None) -> None:
        """Fill ``target``, this rank's part of a tensor (or of a portion), from the stored parts that overlap it.

        Raises:
            CheckpointError: the tensor is missing or has another shape, or its parts do not cover it.
        """
        if name not in self._parts:
            raise CheckpointError(f"the checkpoint has no tensor {name!r}: it was saved by a run with other settings")
        wanted = tuple(target.shape) if portion is None else portion.shape(tuple(target.shape))
        if self.shape(name) != wanted:
            raise CheckpointError(
                f"{name!r} is {list(self.shape(name))} in the checkpoint and {list(wanted)} in this run: the "
                "[model] sections differ"
            )
        for box, values in places(target, portion):
            self._fill_box(name, box, values)

    def _fill_box(self, name: str, box: Box, values: Tensor) -> None:
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
            raise CheckpointError(f"{name!r} is incomplete in the checkpoint: {copied} of {values.numel()} elements")

    def whole(self, name: str) -> Tensor:
        """Read a whole tensor."""
        first = self._parts[name][0]
        out = torch.empty(self.shape(name), dtype=self._files[first[2]].get_tensor(first[1]).dtype)
        self.fill(name, out)
        return out
