"""What the layers must know about the tokens they are given: where each one stands and what it may attend to.

The model computes on N packed tokens and never asks which sequence they belong to. A :class:`ForwardContext` answers
instead: it holds the positions, its :meth:`attend` runs causal attention for one layer, with or without a cache, and
its :meth:`recur` runs a recurrent layer over every sequence from the state that it keeps of it.
The engine's key/value cache is one implementation, :class:`PackedContext` (no cache) is another.

    tokens (N,) ──embed──► x (N, D) ──┐
                                      ├─ per layer: q, k, v ──► context.attend(layer, q, k, v) ──► (N, H, d)
    context.positions (N,) ──rope─────┘
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from quadriga.kernels import ops
from quadriga.model.config import RecurrentState

Scan = Callable[[Tensor, Sequence[Tensor]], tuple[Tensor, Sequence[Tensor]]]
"""A recurrent layer over one sequence: (rows (T, ...), state before them) -> (rows (T, ...), state after them)."""


class ForwardContext(Protocol):
    """Positions of N packed tokens, and attention among them and whatever came before."""

    positions: Tensor
    """(N,) int64, counted from 0 within each token's own sequence."""

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, scoring: Scoring) -> Tensor:
        """Causal attention of every token to its own sequence up to itself.

        Args:
            layer: index of the layer; a cache stores k and v under it.
            q: (N, H, d). k: (N, K, d), v: (N, K, e), e usually d; rotated and clipped already.

        Returns:
            (N, H, e).
        """
        ...

    def recur(self, layer: int, x: Tensor, state: RecurrentState, scan: Scan) -> Tensor:
        """Run a recurrent layer over every sequence from what is kept of it; zeros where it begins.

        Args:
            layer: index of the layer; the state is kept under it.
            x: (N, ...), rows of all sequences.
            state: what the layer keeps.
            scan: see :data:`Scan`; the state's tensors have the shapes of ``state``.

        Returns:
            (N, ...): what ``scan`` returned of each, end to end.
        """
        ...


class Scoring:
    """How one layer turns q·k into weights: scale, soft cap, ALiBi slopes, window and sinks; see ``ops.attention``."""

    def __init__(
        self,
        scale: float,
        soft_cap: float | None = None,
        alibi_slopes: Tensor | None = None,
        window: int | None = None,
        sinks: Tensor | None = None,
    ) -> None:
        self.scale, self.soft_cap, self.alibi_slopes = scale, soft_cap, alibi_slopes
        self.window, self.sinks = window, sinks

    def attention(self, q: Tensor, k: Tensor, v: Tensor, q_positions: Tensor | None = None) -> Tensor:
        """``ops.attention`` with this layer's scoring; q (B, H, T, d), k (B, K, S, d), v (B, K, S, e)."""
        return ops.attention(
            q,
            k,
            v,
            scale=self.scale,
            q_positions=q_positions,
            soft_cap=self.soft_cap,
            alibi_slopes=self.alibi_slopes,
            window=self.window,
            sinks=self.sinks,
        )


class PackedContext:
    """Several whole sequences laid end to end, no cache: scoring, perplexity, golden tests.

    Args:
        lengths: tokens of each sequence, in order; they sum to N.
    """

    def __init__(self, lengths: Sequence[int], device: torch.device | str = "cpu") -> None:
        assert lengths and all(n > 0 for n in lengths), "every sequence has at least one token"
        self.lengths = list(lengths)
        self.positions = torch.cat([torch.arange(n, device=device) for n in self.lengths])

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, scoring: Scoring) -> Tensor:
        """See :class:`ForwardContext`. One attention call per sequence, so nothing is padded."""
        out = q.new_empty(*q.shape[:-1], v.shape[-1])
        start = 0
        for length in self.lengths:
            rows = slice(start, start + length)
            heads_first = (t[rows].transpose(0, 1)[None] for t in (q, k, v))
            out[rows] = scoring.attention(*heads_first)[0].transpose(0, 1)
            start += length
        return out

    def recur(self, layer: int, x: Tensor, state: RecurrentState, scan: Scan) -> Tensor:
        """See :class:`ForwardContext`. Every sequence begins here."""
        return torch.cat([scan(part, beginning(state, x))[0] for part in torch.split(x, self.lengths)])


def beginning(state: RecurrentState, like: Tensor) -> list[Tensor]:
    """The state before a text, zeros; float32, or float64 where ``like`` is."""
    dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
    return [torch.zeros(shape, dtype=dtype, device=like.device) for shape in state.shapes]
