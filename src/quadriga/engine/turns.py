"""Whose turn it is: a queue that is fair by client, then by request, then first come first served. Pure Python.

                          ┌─ client "a" ─┬─ request 7 (n=128) ── 128 sequences
    priority 0 ── turns ──┤              └─ request 9 ────────── 1 sequence
                          └─ client "b" ─── request 8 ────────── 1 sequence

Every client, and within a client every request (an HTTP request with its n answers), has a **service** count: tokens
computed for it. The next is the one that will have had the least when its next piece of work is done, as in weighted
fair queueing (Demers, Keshav and Shenker 1989; tokens as the measure: Sheng et al. 2024, "Fairness in Serving Large
Language Models"). One that comes new, or comes back, begins at the **clock**: what everybody would have had by now if
all had been served alike. So nobody gains by having been away, a small piece of work passes large ones, and a queue
that others have filled holds nobody up. Priorities are apart: a higher one is first, and fairness is among equals.

Adding, taking and removing cost O(log n), whatever the order of arrival.
"""

from __future__ import annotations

import heapq
from collections.abc import Hashable, Iterator
from typing import Generic, Protocol, TypeVar


class Waiter(Protocol):
    """What the queue holds; hashed by identity."""

    @property
    def priority(self) -> int:
        """Higher goes first."""
        ...

    @property
    def client(self) -> Hashable:
        """Who asks."""
        ...

    @property
    def group(self) -> Hashable:
        """The request it is part of."""
        ...

    @property
    def arrival(self) -> int:
        """Smaller came earlier."""
        ...

    @property
    def n_pending(self) -> int:
        """Its work, in tokens."""
        ...


W = TypeVar("W", bound=Waiter)


class _Flow(Generic[W]):
    """A client of a priority, a request of a client, or the priority itself: served in turn with its siblings."""

    def __init__(self, service: float, turn: int) -> None:
        self.service = service
        """Tokens computed for it, on its siblings' common scale."""
        self.clock = 0.0
        """What each of its children would have had by now, had all been served alike."""
        self.n_alive = self.n_waiting = 0
        """Sequences of it that are waiting or being computed; that are waiting."""
        self.children: dict[Hashable, _Flow[W]] = {}
        self.waiters: dict[int, W] = {}
        """A request's own sequences by arrival, in this order."""
        self._turn = turn
        self._heap: list[tuple[float, int, int, _Flow[W]]] = []
        self._entry: tuple[float, int, int, _Flow[W]] | None = None
        self._n_entries = 0

    def child(self, name: Hashable) -> _Flow[W]:
        """The child of that name, which begins at the clock if it is new or has nothing waiting."""
        found = self.children.get(name)
        if found is None:
            found = self.children[name] = _Flow(self.clock, self._turn)
        elif not found.n_waiting:
            found.service = max(found.service, self.clock)
        return found

    def first(self) -> W:
        """The sequence of it whose turn it is."""
        flow = self
        while not flow.waiters:
            flow = flow._next()
        return next(iter(flow.waiters.values()))

    def after(self, waiter: W) -> float:
        """What it will have had when a sequence's next piece of work is done."""
        return self.service + min(waiter.n_pending, self._turn)

    def queue(self, child: _Flow[W]) -> None:
        """Put a child that has something waiting where it belongs; again after what is first in it may have changed."""
        waiter = child.first()
        key = child.after(waiter), waiter.arrival
        if child._entry is not None and child._entry[:2] == key:
            return
        self._n_entries += 1  # entries differ in it, so flows are never compared
        child._entry = (*key, self._n_entries, child)
        heapq.heappush(self._heap, child._entry)

    def _next(self) -> _Flow[W]:
        """The child whose turn it is."""
        while True:
            entry = self._heap[0]
            child = entry[3]
            current = child._entry is entry  # else it has been put elsewhere since
            if current and child.n_waiting:
                return child
            heapq.heappop(self._heap)
            if current:
                child._entry = None


_Path = tuple[_Flow[W], _Flow[W], _Flow[W]]
"""Priority, client, request."""


class Turns(Generic[W]):
    """See the module docstring.

    A sequence that :meth:`take` gave is still alive: it counts as its client's until :meth:`done`, and :meth:`add` may
    bring it back.

    Args:
        turn: tokens of a piece of work; larger ones are done in several turns.
    """

    def __init__(self, turn: int = 1) -> None:
        self._turn = turn
        self._roots: dict[int, _Flow[W]] = {}
        self._paths: dict[W, _Path[W]] = {}  # of everything that is alive
        self._n_waiting = 0

    def __len__(self) -> int:
        return self._n_waiting

    def __iter__(self) -> Iterator[W]:
        """Everything that waits, in no particular order."""
        for root in self._roots.values():
            for client in root.children.values():
                for group in client.children.values():
                    yield from group.waiters.values()

    def add(self, waiter: W) -> None:
        """Let something wait; what was taken comes back to its place by arrival."""
        path = self._paths.get(waiter) or self._new(waiter)
        root, client, group = path
        back = bool(group.waiters) and waiter.arrival < next(reversed(group.waiters))
        group.waiters[waiter.arrival] = waiter
        if back:  # those put back come latest first, so this is nearly in order already
            group.waiters = dict(sorted(group.waiters.items()))
        for flow in path:
            flow.n_waiting += 1
        self._n_waiting += 1
        if group.n_waiting == 1 or back:
            client.queue(group)
            root.queue(client)

    def first(self) -> W:
        """Whose turn it is; there must be something waiting."""
        return self._top().first()

    def first_of(self, priority: int) -> W | None:
        """Whose turn it is in one priority; None if nothing of it waits."""
        root = self._roots.get(priority)
        return root.first() if root is not None and root.n_waiting else None

    @property
    def n_clients(self) -> int:
        """Of the priority whose turn it is."""
        return len(self._top().children)

    def neediest(self) -> W:
        """Of the highest priority, the first of the request with the fewest in work of the client with the fewest."""
        flow = self._top()
        while not flow.waiters:
            waiting = (child for child in flow.children.values() if child.n_waiting)
            flow = min(waiting, key=lambda child: child.n_alive - child.n_waiting)
        return flow.first()

    def take(self, waiter: W) -> None:
        """Let something wait no longer, because it is being computed or given up; it stays alive."""
        path = root, client, group = self._paths[waiter]
        del group.waiters[waiter.arrival]
        for flow in path:
            flow.n_waiting -= 1
        self._n_waiting -= 1
        if group.n_waiting:
            client.queue(group)
        if client.n_waiting:
            root.queue(client)

    def serve(self, work: dict[W, int]) -> None:
        """Count tokens that were computed for what is alive."""
        done: dict[_Flow[W], int] = {}
        for waiter, n_tokens in work.items():
            root, client, group = self._paths[waiter]
            client.service += n_tokens
            group.service += n_tokens
            done[root] = done.get(root, 0) + n_tokens
            done[client] = done.get(client, 0) + n_tokens
            if client.n_waiting:
                if group.n_waiting:
                    client.queue(group)
                root.queue(client)
        for flow, n_tokens in done.items():
            flow.clock += n_tokens / len(flow.children)

    def turn_of(self, waiter: W) -> tuple[int, float, float, int]:
        """Smaller is served first; of what waits and what is being computed."""
        _, client, group = self._paths[waiter]
        return -waiter.priority, client.after(waiter), group.after(waiter), waiter.arrival

    def done(self, waiter: W) -> None:
        """It was taken and is over."""
        root, client, group = self._paths.pop(waiter)
        for flow in (root, client, group):
            flow.n_alive -= 1
        if not group.n_alive:
            del client.children[waiter.group]
        if not client.n_alive:
            del root.children[waiter.client]
        if not root.n_alive:
            del self._roots[waiter.priority]

    def _top(self) -> _Flow[W]:
        return self._roots[max(p for p, root in self._roots.items() if root.n_waiting)]

    def _new(self, waiter: W) -> _Path[W]:
        root = self._roots.get(waiter.priority)
        if root is None:
            root = self._roots[waiter.priority] = _Flow(0.0, self._turn)
        client = root.child(waiter.client)
        path = self._paths[waiter] = (root, client, client.child(waiter.group))
        for flow in path:
            flow.n_alive += 1
        return path
