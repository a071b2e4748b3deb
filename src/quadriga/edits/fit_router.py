"""Fit router rows that separate tokens by domain, on labelled text before training (`upcycle --router-text`).

Branch-Train-MiX (Sukhbaatar et al. 2024, arXiv 2403.07816) trains one expert per domain and the router last.
Here the router comes first: the text runs through the dense model once, and at every layer a softmax regression

    min over W   mean over tokens of  weight_n * -log softmax(W x_n)[label_n]  +  RIDGE / 2 |W|^2

finds one row per label from the vectors x_n that the router will see. Upcycled with these rows, the mixture still
computes the dense model's function, and from the first training step each copy of the network gets the tokens of one
domain.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from quadriga.edits.block_trace import embed, load_block
from quadriga.errors import RequestError
from quadriga.io.open import Checkpoint
from quadriga.io.parameters import Progress
from quadriga.kernels.arrays import array
from quadriga.nn.context import PackedContext
from quadriga.nn.rope import Rotations
from quadriga.quant.dtypes import Array

_RIDGE = 1e-3
_ITERATIONS = 60


@dataclass(frozen=True)
class FittedRouters:
    """Router rows for every layer, one per label, and their accuracy on held-out tokens."""

    labels: tuple[str, ...]
    rows: dict[int, Array]
    """Layer -> (labels, D) float32, in the order of ``labels``."""
    accuracy: dict[int, float]
    """Layer -> fraction of held-out tokens whose label has the largest logit."""


def fit_routers(
    dense: Checkpoint, texts: Mapping[str, Sequence[int]], *, window: int = 256, progress: Progress | None = None
) -> FittedRouters:
    """Fit one router row per label at every layer.

    Args:
        dense: an open dense checkpoint.
        texts: label -> a few thousand token ids. Labels have equal weight, whatever the length of their text.
        window: context length in tokens; every fifth window is held out.

    Raises:
        RequestError: fewer than two labels, or a text of fewer than five windows.
    """
    config, labels = dense.config, tuple(sorted(texts))
    short = [label for label in labels if len(texts[label]) < 5 * window]
    if len(labels) < 2 or short:
        raise RequestError(
            f"fitting routers needs at least two labels and {5 * window} tokens of each; got {list(labels)}"
            + (f", too little of {short}" if short else "")
        )
    windows = [
        (index, list(texts[label][start : start + window]))
        for index, label in enumerate(labels)
        for start in range(0, len(texts[label]) - window + 1, window)
    ]
    tokens = torch.tensor([token for _, part in windows for token in part])
    label_of = torch.tensor([index for index, _ in windows]).repeat_interleave(window)
    held_out = (torch.arange(len(windows)) % 5 == 4).repeat_interleave(window)
    rows: dict[int, Array] = {}
    accuracy: dict[int, float] = {}
    for layer, x in enumerate(_router_inputs(dense, tokens, [window] * len(windows))):
        fitted = _regression(x[~held_out], label_of[~held_out], len(labels))
        rows[layer] = array(fitted)
        guess = (x[held_out] @ fitted.T).argmax(-1)
        accuracy[layer] = float((guess == label_of[held_out]).float().mean())
        if progress is not None:
            progress(layer + 1, config.n_layers, f"layer {layer}: {accuracy[layer]:.0%} of held-out tokens")
    return FittedRouters(labels, rows, accuracy)


def _router_inputs(dense: Checkpoint, tokens: Tensor, lengths: list[int]) -> list[Tensor]:
    """For each layer, the inputs of its feed-forward (N, D); only one layer's weights are in memory at a time."""
    config, context, found = dense.config, PackedContext(lengths), []
    with torch.inference_mode():
        h = embed(dense, tokens)
        rotations = Rotations(context.positions, h.dtype, config.max_seq_len)
        for index in range(config.n_layers):
            block = load_block(dense, config, index)
            block.ffn_norm.register_forward_hook(lambda _, __, output: found.append(output))
            h, _ = block(h, context, rotations)
    return [x.clone() for x in found]  # clones are ordinary tensors, not inference tensors: the fit needs gradients


def _regression(x: Tensor, labels: Tensor, n_labels: int) -> Tensor:
    """Solve the regression in the module docstring for W (labels, D)."""
    counts = torch.bincount(labels, minlength=n_labels).float()
    weight = (1.0 / counts)[labels]
    weight = weight / weight.sum()
    # Scaling columns to equal size improves the conditioning; the rows are scaled back afterwards.
    size = x.square().mean(0).sqrt().clamp_min(1e-6)
    scaled = x / size
    w = torch.zeros(n_labels, x.shape[1], requires_grad=True)
    optimiser = torch.optim.LBFGS([w], max_iter=_ITERATIONS, history_size=10, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimiser.zero_grad()
        nll = F.cross_entropy(scaled @ w.T, labels, reduction="none")
        total = (weight * nll).sum() + _RIDGE / 2 * w.square().sum()
        total.backward()  # type: ignore[no-untyped-call]
        return total

    optimiser.step(loss)  # type: ignore[no-untyped-call]
    return w.detach() / size
