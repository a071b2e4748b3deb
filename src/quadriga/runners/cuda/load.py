"""A checkpoint's weights on a device: block formats as planes without loss, or packed as was asked, one by one.

    a packed directory, blocks of GGUF, MXFP4 ─┐
    numbers, with a format asked for ──pack────┴► Packed ─► planes on the device        kernels.triton.packed
    float8_e4m3fn, a scale a 128 columns ────────────────► planes on the device
    numbers ─────────────────────────────────────────────► numbers of what is computed in

Vectors, routers and the biases of experts keep the dtype they are stored in. What no product of planes reads becomes
numbers of what is computed in, and a line of the log says how many and why.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator
from math import prod

import torch

from quadriga.errors import CheckpointError, ConfigError
from quadriga.io.open import Checkpoint
from quadriga.io.packed import (
    pack_parameter,
    packed_format,
    packed_manifest,
    read_rows,
    rows_of_fp8,
    runs_of_rows,
)
from quadriga.io.packed_source import PackedSource
from quadriga.io.parameters import Progress
from quadriga.kernels.arrays import tensor, torch_dtype
from quadriga.kernels.cpu.packing import Packed
from quadriga.kernels.triton.linear import Matrix
from quadriga.kernels.triton.packed import PLANES, from_packed
from quadriga.kernels.triton.weights import GroupedWeight, from_fp8, stacked
from quadriga.model.weight_map import Shape, parameter_shapes, stays_float32
from quadriga.nn.load import load_parameter
from quadriga.quant.packed import FROM_GGUF
from quadriga.runners.cuda.weights import DeviceWeights

_log = logging.getLogger(__name__)

FORMATS = ("keep", *PLANES)
"""What matrices may be asked to become."""

_BY_HEAD = ("attn.wk_b.weight", "attn.wv_b.weight")
"""A matrix a head: multiplied by a kernel that knows numbers only."""
_MULTIPLIED = (".taps", "w_ba.weight", "w_dt.weight")
"""Of what stays wide: multiplied beside states, so of their dtype."""


def load_weights(
    checkpoint: Checkpoint,
    form: str = "keep",
    *,
    dtype: torch.dtype,
    device: torch.device,
    progress: Progress | None = None,
) -> DeviceWeights:
    """Every parameter of a model on a device.

    Args:
        form: one of ``FORMATS``; keep leaves blocks as they are stored and makes all else numbers.
        dtype: what is computed in.
        progress: called after each parameter.

    Raises:
        ConfigError: a format that has no planes.
        CheckpointError: weights that cannot be read or packed.
    """
    if form not in FORMATS:
        raise ConfigError(f"the kernels for GPUs multiply matrices in {', '.join(PLANES)}, or keep; got {form!r}")
    reader = _Reader(checkpoint, form, dtype, device)
    shapes = parameter_shapes(checkpoint.config)
    total, done = sum(prod(shape) for shape in shapes.values()), 0
    loaded: dict[str, Matrix] = {}
    for name, shape in shapes.items():
        loaded[name] = reader.read(name, shape)
        done += prod(shape)
        if progress is not None:
            progress(done, total, name)
    kind = str(dtype).removeprefix("torch.")
    for why, n in reader.widened.items():
        _log.warning("%d parameters become %s on the device: %s", n, kind, why)
    return DeviceWeights(loaded, dtype)


class _Reader:
    """A checkpoint's parameters, one after the other; arguments as those of :func:`load_weights`."""

    def __init__(self, checkpoint: Checkpoint, form: str, dtype: torch.dtype, device: torch.device) -> None:
        self._checkpoint, self._form, self._dtype, self._device = checkpoint, form, dtype, device
        self._manifest = packed_manifest(checkpoint) if form == "keep" else None
        self.widened: Counter[str] = Counter()
        """Why blocks became numbers -> of how many parameters."""

    def read(self, name: str, shape: Shape) -> Matrix:
        """A parameter as it is multiplied."""
        planes = None if len(shape) == 1 or stays_float32(name) else self._planes(name, shape)
        return self._numbers(name, shape) if planes is None else planes

    def _numbers(self, name: str, shape: Shape) -> torch.Tensor:
        kept = self._dtype
        if len(shape) == 1 or (stays_float32(name) and not name.endswith(_MULTIPLIED)):
            stored = torch_dtype(self._checkpoint.parameters.dtype(name))
            kept = torch.float32 if stored == torch.float64 else stored
        return load_parameter(self._checkpoint, name, shape, dtype=kept, device=self._device, moved=lambda _: None)

    def _planes(self, name: str, shape: Shape) -> Matrix | None:
        """A matrix, or a layer's experts, as planes; None: it is to be numbers, counted where they are of blocks."""
        n = shape[0] if len(shape) == 3 else 1
        formats, matrices = self._packed(name, shape)
        if not formats & PLANES.keys():
            return None
        if name.endswith(_BY_HEAD):
            self.widened["matrices of heads have no kernel for packed weights"] += 1
            return None
        if self._form == "keep" and rows_of_fp8(self._checkpoint, name, 0) is not None:
            return stacked((self._fp8(name, expert) for expert in range(n)), n, self._device)
        runs = runs_of_rows(self._checkpoint, name) if self._form == "keep" and name.endswith("wqkv.weight") else []
        if runs:
            pieces = [read_rows(self._checkpoint, run).pack(FROM_GGUF.get(block, "q8")) for block, run in runs]
            return tuple(from_packed([piece], 1, self._device) for piece in pieces)
        if len(formats) > 1:
            self.widened[f"experts of a layer in several formats ({', '.join(sorted(formats))})"] += 1
            return None
        return from_packed(matrices, n, self._device)

    def _fp8(self, name: str, expert: int) -> GroupedWeight:
        stored = rows_of_fp8(self._checkpoint, name, expert)
        if stored is None:
            raise CheckpointError(f"{name}: all of a layer's experts must be stored alike; expert {expert} is not fp8")
        codes, scales = (tensor(values)[None].to(self._device) for values in stored)
        return from_fp8(codes.view(torch.float8_e4m3fn), scales)

    def _packed(self, name: str, shape: Shape) -> tuple[set[str], Iterator[Packed]]:
        """(formats, the matrices, mapped or packed one after the other) of a parameter: one, or one an expert."""
        if self._manifest is None:
            form = packed_format(self._checkpoint, name, self._form)
            return {form}, pack_parameter(self._checkpoint, name, shape, self._form)
        source = self._checkpoint.source
        assert isinstance(source, PackedSource), "a packed directory's"
        names = [name] if len(shape) == 2 else [f"{name}/{expert}" for expert in range(shape[0])]
        return {self._manifest.parameters[one].format for one in names}, map(source.matrix, names)
