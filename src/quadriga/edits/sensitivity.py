"""How much an error in each row of each matrix costs, in nats of divergence a token.

For small changes of a model's logits, KL(before || after) is half the second moment of the change of log p(y), y drawn
from the model's own predictions. With g the gradient of sum_t log p(y_t) by a matrix's outputs, and errors that do not
depend on it,

    KL a token  ~  1/2 sum over rows r of  (1/T sum over tokens of g_r^2)  E (dW x)_r^2

which is Fisher's information with a matrix's inputs and outputs taken apart (Martens & Grosse 2015, arXiv 1503.05671).
The gradient goes backwards layer by layer, from states that the forward pass kept: one layer is in memory at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from quadriga.edits.block_trace import Met, load_block, through
from quadriga.io.open import Checkpoint
from quadriga.io.parameters import Progress
from quadriga.nn.context import PackedContext
from quadriga.nn.rope import Rotations
from quadriga.quant.format_choice import protected_share

_PRIOR_VISITS = 16
"""Visits of an expert that count as the layer's average ones: few are not representative."""

_HEAD_TOKENS = 256
"""Rows of logits held at once."""


@dataclass(frozen=True)
class Ends:
    """What the model's ends cost."""

    head: Tensor
    """(V,) of each row of the head."""
    embedding: Tensor
    """(D,) of each column of an embedded token."""


Judge = Callable[[str, Tensor, Tensor], None]
"""Called with a matrix's name, its weight (rows, columns) and what a row's mean squared output error costs (rows,)."""


def costs(
    checkpoint: Checkpoint,
    states: Sequence[Tensor],
    context: PackedContext,
    rotations: Rotations,
    head: Callable[[Tensor], Tensor],
    judge: Judge,
    progress: Progress | None = None,
) -> Ends:
    """Show ``judge`` every matrix of every layer, the last layer first.

    Args:
        states: (N, D) before every layer, and after the last.
        head: states (n, D) -> logits (n, V), with gradients.
        progress: called after each layer.
    """
    generator = torch.Generator().manual_seed(0)
    n_layers, total = checkpoint.config.n_layers, len(states[0])
    gradient, rows = _of_head(states[-1], head, generator)
    for index in reversed(range(n_layers)):
        block = load_block(checkpoint, checkpoint.config, index)
        met: dict[str, Met] = {}
        squares: dict[str, Tensor] = {}

        def see(one: Met, met: dict[str, Met] = met, squares: dict[str, Tensor] = squares) -> None:
            met[one.name] = one

            def keep(g: Tensor) -> None:
                squares[one.name] = g.detach().square().sum(0).flatten()

            if one.output.requires_grad:
                one.output.register_hook(keep)  # type: ignore[no-untyped-call]

        with torch.enable_grad():
            h = states[index].detach().requires_grad_()
            out, routed = through(block, index, h, context, rotations, see)
            (gradient,) = torch.autograd.grad(out, h, gradient)
        visits = [] if routed is None else routed.visits
        for name, one in met.items():
            got = squares.get(name)
            got = torch.zeros(len(one.weight)) if got is None else got
            if "/" in name:
                judge(name, one.weight, _of_expert(name, got, squares, visits) / total / 2)
            else:
                judge(name, one.weight, got / total / 2)
        if progress is not None:
            progress(2 * n_layers - index, 2 * n_layers, f"layer {index}, backwards")
    return Ends(rows / total / 2, gradient.square().sum(0) / total / 2)


def _of_expert(name: str, own: Tensor, squares: dict[str, Tensor], visits: list[int]) -> Tensor:
    """An expert's sums of squares, of at least half of an even share of the visits, mixed with its layer's."""
    matrix, expert = name.split("/")
    whole = sum(squares[key] for key in squares if key.startswith(matrix + "/"))
    mean = whole / max(sum(visits), 1)
    n = visits[int(expert)]
    counted = protected_share(n, sum(visits), len(visits)) * sum(visits)
    mixed: Tensor = counted * (own + _PRIOR_VISITS * mean) / (n + _PRIOR_VISITS)
    return mixed


def _of_head(last: Tensor, head: Callable[[Tensor], Tensor], generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """The gradient of sum log p(y) by the last states (N, D), and the sums of its squares by the logits (V,)."""
    gradients, rows = [], torch.zeros(0)
    for first in range(0, len(last), _HEAD_TOKENS):
        part = last[first : first + _HEAD_TOKENS]
        with torch.enable_grad():
            h = part.detach().requires_grad_()
            logits = head(h)
            drawn = torch.multinomial(logits.detach().softmax(-1), 1, generator=generator)
            (by_logits,) = torch.autograd.grad(logits.log_softmax(-1).gather(1, drawn).sum(), logits, retain_graph=True)
            (gradient,) = torch.autograd.grad(logits, h, by_logits)
        gradients.append(gradient)
        squares = by_logits.square().sum(0)
        rows = squares if not len(rows) else rows + squares
    return torch.cat(gradients), rows
