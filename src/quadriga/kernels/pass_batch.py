"""The tokens of one pass, as every runner takes them."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int32]
Floats = NDArray[np.float32]


@dataclass(frozen=True)
class PassBatch:
    """What one pass computes: N tokens of S sequences end to end, sequence s owning [starts[s], starts[s + 1]).

    A sequence's tokens are consecutive positions, the last ones it has; all earlier ones are in its blocks.
    """

    tokens: Ints
    """(N,)"""
    positions: Ints
    """(N,)"""
    starts: Ints
    """(S + 1,)"""
    tables: Ints
    """KV blocks of every sequence, end to end (T,), or (G, T) of a cache whose layers are in G groups; block j of a
    sequence holds positions 16 j .. 16 j + 15. Blocks that no query of the pass sees are not read: -1 stands there."""
    table_starts: Ints
    """(S + 1,)"""
    rows: Ints
    """(R,) tokens whose logits are wanted."""
    before: Ints | None = None
    """(S,) slots that the states of recurrent layers before each sequence's first token are read from; -1: the sequence
    begins here. None for both where the model has no such layer."""
    after: Ints | None = None
    """(S,) slots that the states after each sequence's last token are left in."""
    steering: Floats | None = field(default=None, kw_only=True)
    """(M, n_layers, E) what is added to the routers' logits of tokens whose requests ask for it, -infinity where an
    expert is never to be chosen; E is that of the widest layer. None: nobody asks."""
    steered: Ints | None = field(default=None, kw_only=True)
    """(N,) the row of ``steering`` that each token takes, -1: none; the same for all tokens of a sequence."""

    def state_slots(self) -> list[tuple[int, int]]:
        """(before, after) of every sequence."""
        assert self.before is not None and self.after is not None, "a recurrent model's pass says where states are"
        return list(zip(self.before.tolist(), self.after.tolist(), strict=True))
