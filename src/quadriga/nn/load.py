"""A checkpoint's parameters as torch tensors: what the model in torch is made of."""

from __future__ import annotations

from collections.abc import Callable
from math import prod

import torch
from torch import Tensor

from quadriga.io.open import Checkpoint
from quadriga.io.parameters import SLICE_BYTES, Progress, slices
from quadriga.kernels.arrays import tensor, torch_dtype
from quadriga.model.weight_map import Piece, Shape, parameter_shapes


def load_parameters(
    checkpoint: Checkpoint,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    progress: Progress | None = None,
) -> dict[str, Tensor]:
    """Every parameter in memory, part by part, under the names of ``parameter_shapes``.

    Args:
        dtype: what they become; None keeps each as it is stored (block formats become float32).
        progress: called after each part.
    """
    shapes = parameter_shapes(checkpoint.config)
    total, done = sum(prod(shape) for shape in shapes.values()), 0
    loaded: dict[str, Tensor] = {}
    for name, shape in shapes.items():
        stored = torch_dtype(checkpoint.parameters.dtype(name))
        # A correction's rounding would change choices, and it meets no product that would want it narrow.
        kept = stored if dtype is None or name.endswith("router.correction") else dtype

        def moved(n: int, name: str = name, size: int = kept.itemsize) -> None:
            nonlocal done
            done += n
            if progress is not None:
                progress(done * size, total * size, name)

        loaded[name] = load_parameter(checkpoint, name, shape, dtype=kept, device=device, moved=moved)
    return loaded


def load_parameter(
    checkpoint: Checkpoint,
    name: str,
    shape: Shape,
    *,
    dtype: torch.dtype,
    device: torch.device | str,
    moved: Callable[[int], None],
) -> Tensor:
    """One parameter in memory, part by part; ``moved`` is told how many numbers each part had."""
    out = torch.empty(shape, dtype=dtype, device=device)
    for cut in slices(_own(name, shape), SLICE_BYTES // 4):
        assert cut.target_box is not None, "slices carry their boxes"
        read = tensor(checkpoint.parameters.read(name, cut.target_box))
        out[tuple(slice(*r) for r in cut.target_box)] = read.to(device)
        moved(prod(tuple(b - a for a, b in cut.target_box)))
    return out


def _own(name: str, shape: Shape) -> Piece:
    return Piece(source=name, source_shape=shape, target=name, target_shape=shape)
