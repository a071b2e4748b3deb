"""A checkpoint's parameters as torch tensors: what the model in torch is made of."""

from __future__ import annotations

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
    view = checkpoint.parameters
    parts = {
        name: list(slices(_own(name, shape), SLICE_BYTES // 4))
        for name, shape in parameter_shapes(checkpoint.config).items()
    }
    total = sum(prod(shape) for shape in parameter_shapes(checkpoint.config).values())
    done = 0
    loaded: dict[str, Tensor] = {}
    for name, cuts in parts.items():
        stored = torch_dtype(view.dtype(name))
        # A correction's rounding would change choices, and it meets no product that would want it narrow.
        kept = stored if dtype is None or name.endswith("router.correction") else dtype
        out = torch.empty(cuts[0].target_shape, dtype=kept, device=device)
        for cut in cuts:
            assert cut.target_box is not None, "slices carry their boxes"
            out[tuple(slice(*r) for r in cut.target_box)] = tensor(view.read(name, cut.target_box)).to(device)
            done += prod(tuple(b - a for a, b in cut.target_box))
            if progress is not None:
                progress(done * out.element_size(), total * out.element_size(), name)
        loaded[name] = out
    return loaded


def _own(name: str, shape: Shape) -> Piece:
    return Piece(source=name, source_shape=shape, target=name, target_shape=shape)
