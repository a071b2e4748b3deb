"""Sequences as the scheduler sees them, and what a pass computes of each."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from quadriga.engine.blocks import BlockTable

if TYPE_CHECKING:
    from quadriga.model.steering import Floats


BACKGROUND = -1000
"""The lowest priority: computed when nobody else wants the place, and gives it up to whoever comes; but one at a time
of all that have it is treated as a request of the usual priority, so that they move whatever comes."""


@dataclass(eq=False)
class Running:
    """One sequence as the scheduler sees it."""

    request_id: int
    tokens: list[int]
    """Prompt and answer so far."""
    max_tokens: int
    """Longest that ``tokens`` may become."""
    priority: int = 0
    """Higher goes first."""
    salt: bytes = b""
    """Prefixes are shared among sequences of equal salt only."""
    adapter: int = 0
    """Number of the adapter its tokens run with; 0: none."""
    steering: Floats | None = None
    """(n_layers, E) what is added to its routers' logits; None: nothing."""
    all_logits: bool = False
    """Every prompt position's logits are wanted, so nothing of it is taken from the prefix cache."""
    embeds: bool = False
    """Every position's last state is wanted and no token: computed like a prompt, it ends with its last token."""
    client: bytes = b""
    """Who asks."""
    group: int = -1
    """The request it is one answer of; its own ``request_id`` where nothing is given."""
    draft: list[int] = field(default_factory=list)
    """Guesses at the tokens that follow; checked in the next pass."""
    n_computed: int = 0
    """Positions whose keys and values are stored."""
    n_cached: int = 0
    """Prompt positions that were found in the prefix cache."""
    n_preempted: int = 0
    arrival: int = 0
    last_pass: int = 0
    """The number of the last pass it had a part in."""
    blocks: BlockTable = field(init=False, repr=False)
    """From :meth:`Scheduler.add` on."""
    keys: list[bytes] = field(default_factory=list)
    """Keys of the full blocks published so far."""
    slot: int = -1
    """Of a model with recurrent layers: the slot of its states at ``n_computed``; -1: it begins at 0."""
    next_slot: int = -1
    """Where the pass that is under way leaves them."""
    answer_key: bytes = b""
    """Of the latest state of its answer that is kept."""
    n_shared: int = 0
    """Positions that others have read before, as far as blocks are known: its state there is worth keeping."""
    held: bool = False
    """The logits of its next token are there, but the token is still being chosen: it takes no part in passes."""
    state: Literal["new", "waiting", "running", "parked", "done"] = "new"
    """parked: it had to give its place up while it was held, and waits for its token before it waits for a place."""

    def __post_init__(self) -> None:
        self.n_prompt = len(self.tokens)
        self.unhurried = self.in_background
        """It was asked for in the background: nobody waits for each of its tokens, whatever priority it has by now."""
        if self.group < 0:
            self.group = self.request_id

    @property
    def order(self) -> tuple[int, int]:
        """Smaller is older; a higher priority counts as older."""
        return (-self.priority, self.arrival)

    @property
    def in_background(self) -> bool:
        """It gives way to whatever is not."""
        return self.priority <= BACKGROUND

    @property
    def n_pending(self) -> int:
        """Tokens that are known and not computed."""
        return len(self.tokens) - self.n_computed

    @property
    def decodes(self) -> bool:
        """One token is left to compute, and it gives the next one."""
        return self.n_pending == 1 and not self.embeds


@dataclass(frozen=True)
class Chunk:
    """Consecutive tokens of one sequence in a pass."""

    sequence: Running
    start: int
    """Position of the first."""
    tokens: tuple[int, ...]
    n_draft: int
    """How many of the last are guesses."""
    samples: bool
    """The chunk ends at the sequence's last token (and its drafts): new tokens come from it."""
    before: int = -1
    """Slot of the recurrent states before it; -1: the sequence begins with it, or the model has none."""
    after: int = -1
    """Slot in which they are left."""


@dataclass(frozen=True)
class PassPlan:
    """What one pass computes."""

    chunks: tuple[Chunk, ...]
    n_fluent: int = 0
    """Tokens of the fluent rows; see ``engine.fluent``."""
    n_decode: int = 0
    """Tokens of all rows that decode, these included."""

    @property
    def n_tokens(self) -> int:
        """Tokens of the pass."""
        return sum(len(chunk.tokens) for chunk in self.chunks)
