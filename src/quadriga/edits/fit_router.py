"""Router rows that part tokens by domain, fitted to labelled text before any training (`upcycle --router-text`).

Branch-Train-MiX (Sukhbaatar et al. 2024, arXiv 2403.07816) trains one expert a domain and learns the router last.
Here the router comes first: the text runs through the dense model once, and at every layer a softmax regression

    min over W   mean over tokens of  weight_n * -log softmax(W x_n)[label_n]  +  RIDGE / 2 |W|^2

finds one row a label from the very vectors x_n the router will see. Upcycled with these rows the mixture still computes
the dense model's function, and each copy of the network gets, from the first step, the tokens of one domain to become
good at.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from quadriga.edits.calibrate import embed, load_block
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
    """One row a label for every layer, and how well they part tokens they were not fitted to."""

    labels: tuple[str, ...]
    rows: dict[int, Array]
    """Layer -> (labels, D) float32, in the order of ``labels``."""
    accuracy: dict[int, float]
    """Layer -> share of held-out tokens whose label has the largest logit."""


def fit_routers(
    dense: Checkpoint, texts: Mapping[str, Sequence[int]], *, window: int = 256, progress: Progress | None = None
) -> FittedRouters:
    """Fit one router row a label at every layer.

    Args:
        dense: an open dense checkpoint.
        texts: label -> token ids; a few thousand each. Every label counts the same however long its text is.
        window: tokens read together; every fifth window is held out.

    Raises:
        RequestError: fewer than two labels, or a text of fewer than five windows.
    """
    config, labels = dense.config, tuple(sorted(texts))
    short = [label for label in labels if len(texts[label]) < 5 * window]
    if len(labels) < 2 or short:
        raise RequestError(
            f"fitting routers needs two labels or more and {5 * window} tokens of each; got {list(labels)}"
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
    """Per layer, what its feed-forward sees (N, D); one layer's weights are in memory at a time."""
    config, context, found = dense.config, PackedContext(lengths), []
    with torch.inference_mode():
        h = embed(dense, tokens)
        rotations = Rotations(context.positions, h.dtype, config.max_seq_len)
        for index in range(config.n_layers):
            block = load_block(dense, config, index)
            block.ffn_norm.register_forward_hook(lambda _, __, output: found.append(output))
            h, _ = block(h, context, rotations)
    return [x.clone() for x in found]  # ordinary tensors: the fit differentiates


def _regression(x: Tensor, labels: Tensor, n_labels: int) -> Tensor:
    """The rows W (labels, D) of the regression in the module docstring."""
    counts = torch.bincount(labels, minlength=n_labels).float()
    weight = (1.0 / counts)[labels]
    weight = weight / weight.sum()
    # Columns of like size make the problem round; the rows are scaled back afterwards.
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
