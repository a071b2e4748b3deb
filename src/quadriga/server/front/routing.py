"""Which replica a request goes to: the one whose cache has most of its prompt, unless that one is much busier.

    prompt ─► pieces of 128 bytes ─► h1, h2, h3, ...         each a hash over all before it and over the key's salt
              the longest that a replica was given before ─► that replica, if it is not much busier than another
              none ─► the least busy; of equally busy ones the first hash chooses, so that it is the same one next time

What a replica was given is remembered here, not asked of it: a replica may have let a prefix go. Then it computes it
again, as any other would have to.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from hashlib import blake2b
from typing import Any

import msgspec

PIECE_BYTES = 128
"""About two blocks of 16 tokens."""

MAX_PIECES = 2048
"""Of a prompt; what comes behind them does not count."""

MAX_KNOWN = 1 << 18
"""Pieces that are remembered, of all prompts; those used longest ago go first."""

SLACK = 8
"""So many requests more than the least busy one has, a replica may have and still get those it knows the prompts of."""

_PARTS = ("model", "tools", "system", "instructions", "messages", "prompt", "input")
"""Fields that prompts are made of, in the order in which templates write them."""

_encode = msgspec.json.Encoder().encode


def pieces_of(body: Any, salt: bytes) -> list[bytes]:
    """The hashes of a request's prompt, the shortest beginning first; empty where the body has none."""
    if not isinstance(body, dict):
        return []
    hashes: list[bytes] = []
    last, rest = salt, b""
    for part in _parts_of(body):
        rest += part
        while len(rest) >= PIECE_BYTES and len(hashes) < MAX_PIECES:
            last = blake2b(rest[:PIECE_BYTES], key=last[:32], digest_size=12).digest()
            rest = rest[PIECE_BYTES:]
            hashes.append(last)
        if len(hashes) == MAX_PIECES:
            break
    return hashes or [blake2b(rest, key=salt[:32], digest_size=12).digest()]


def _parts_of(body: Mapping[str, Any]) -> Iterator[bytes]:
    """The prompt's parts as bytes, message by message; never more at once than a piece of a long text."""
    for name in _PARTS:
        value = body.get(name)
        if value is None:
            continue
        for one in value if isinstance(value, list) and name == "messages" else [value]:
            raw = _encode(one)
            for begin in range(0, min(len(raw), MAX_PIECES * PIECE_BYTES), 1 << 14):
                yield raw[begin : begin + (1 << 14)]


def sequences_of(body: Any) -> int:
    """How many answers or texts a request asks for, as limits count them; 1 where it is not known."""
    if not isinstance(body, dict):
        return 1
    n = body.get("n")
    given = body.get("input", body.get("prompt"))
    several = isinstance(given, list) and bool(given) and isinstance(given[0], (str, list))
    n_prompts = len(given) if isinstance(given, list) and several else 1
    return max(1, n if isinstance(n, int) and not isinstance(n, bool) else 1) * n_prompts


class Router:
    """See the module docstring. Of one event loop."""

    def __init__(self, max_known: int = MAX_KNOWN) -> None:
        self._known: OrderedDict[bytes, int] = OrderedDict()
        self._max_known = max_known
        self.n_found = 0
        """Requests that went where their prompt's beginning was known."""

    def choose(self, pieces: Sequence[bytes], loads: Mapping[int, int]) -> int:
        """A replica of those in ``loads``, which are there, with the requests that each has under way."""
        least = min(loads.values())
        for piece in reversed(pieces):
            owner = self._known.get(piece)
            if owner is not None and owner in loads:
                if loads[owner] > least + SLACK:
                    break
                self.n_found += 1
                return owner
        idle = sorted(number for number, load in loads.items() if load == least)
        # Rendezvous: each replica's hash with the piece; the highest has it, whoever else is there.
        first = pieces[0] if pieces else b""
        return max(idle, key=lambda number: blake2b(first + b"%d" % number, digest_size=8).digest())

    def learn(self, pieces: Sequence[bytes], replica: int) -> None:
        """A replica was given a prompt."""
        for piece in reversed(pieces):  # so that the shortest beginnings, which most share, go last
            self._known[piece] = replica
            self._known.move_to_end(piece)
        while len(self._known) > self._max_known:
            self._known.popitem(last=False)

    def forget(self, replica: int) -> None:
        """A replica is gone, and its cache with it."""
        self._known = OrderedDict((piece, owner) for piece, owner in self._known.items() if owner != replica)
