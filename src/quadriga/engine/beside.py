"""Tokens that are chosen beside the passes: their grammars take so long that all other answers would wait for them.

pass ─► logits of a row, copied ─► another thread: grammar, sampler ─► TokenEvent ─► the answer is in passes again
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import dataclass

from quadriga.engine.answers import Active, event_of, instead_of, own_failure
from quadriga.engine.passes import Computed
from quadriga.engine.request import TokenEvent
from quadriga.engine.sequences import Running
from quadriga.errors import QuadrigaError
from quadriga.kernels.cpu.sampling import TokenSampler
from quadriga.runners.base import Floats
from quadriga.runtime import Lane

WAIT_S = 0.01
"""A step in which everything waits for a token to be chosen waits so long for one; then it lets commands in between."""


@dataclass(eq=False)
class _Held:
    """An answer whose next token is being chosen."""

    active: Active
    choice: Future[TokenEvent]
    finish: Callable[[TokenEvent], TokenEvent]
    """Puts into the event what the pass knows of it."""


class Beside:
    """The answers that sit out passes, by request id.

    Args:
        row_sampler: what chooses tokens where the runner's kernels do; None: NumPy does.
    """

    def __init__(self, row_sampler: TokenSampler | None) -> None:
        self._row_sampler = row_sampler
        self._held: dict[int, _Held] = {}
        self._lane = Lane("choosers", n_threads=2)

    def __bool__(self) -> bool:
        return bool(self._held)

    def hold(self, active: Active, made: Computed, row: int) -> None:
        """Choose a request's next token in another thread, from a copy of its row of logits."""
        finish = made.routing_into(row) if active.request.routing else _as_it_is
        known = () if self._row_sampler is not None else (made.best[row], made.log_sums[row])
        choice = self._lane.submit(self._next, active, made.logits[row].copy(), *known)
        self._held[active.running.request_id] = _Held(active, choice, finish)

    def _next(
        self, active: Active, logits: Floats, best: int | None = None, log_sum: float | None = None
    ) -> TokenEvent:
        """A request's next token, from a row of logits of its own."""
        constraint, sampler, instead = active.request.constraint, active.sampler, instead_of(active, ())
        allowed = None if constraint is None else constraint.allowed()
        if self._row_sampler is None:
            return event_of(active, sampler.sample(logits, best, log_sum, allowed, instead), 0)
        settings = sampler.ask(allowed)
        sampled = self._row_sampler.beside().sample(logits[None], [0], [settings])[0]
        return event_of(active, sampler.take(sampled, logits, constrained=allowed is not None, instead=instead), 0)

    def chosen(self) -> list[tuple[int, Running, TokenEvent | QuadrigaError]]:
        """Those that have their token by now, or the error that ends them; they are not here any more."""
        ready = [(request_id, held) for request_id, held in self._held.items() if held.choice.done()]
        events: list[tuple[int, Running, TokenEvent | QuadrigaError]] = []
        for request_id, held in ready:
            del self._held[request_id]
            event: TokenEvent | QuadrigaError
            try:
                event = held.finish(held.choice.result())
            except BaseException as raised:
                event = own_failure(raised)
            events.append((request_id, held.active.running, event))
        return events

    def wait(self) -> None:
        """Until one of them has its token, or for :data:`WAIT_S`."""
        wait([held.choice for held in self._held.values()], WAIT_S, FIRST_COMPLETED)

    def running(self) -> list[Running]:
        """Their sequences."""
        return [held.active.running for held in self._held.values()]

    def drop(self, request_id: int) -> None:
        """Forget a request, if it is here; its token is not waited for."""
        self._held.pop(request_id, None)

    def close(self) -> None:
        """End the threads; nothing is held any more."""
        self._lane.close()


def _as_it_is(event: TokenEvent) -> TokenEvent:
    return event
