"""Slots of recurrent states: which sequence has which, and which prefixes' states can be found again. Pure Python.

A recurrent layer keeps one state a sequence, of its last position, and forgets the others; a prefix can be taken up
only where a state was kept. A slot holds the states of all recurrent layers at one position of one sequence.

    a pass        reads the slot ``before`` and writes ``after``: the same one, unless the first must stay as it is
    it stays      because it is known by a key (of the block that ends there), or guesses may turn out wrong
    it is kept    where a chunk ends with a block: at a prompt's last whole block, where prompts were seen to part, and
                  the latest of an answer, which replaces the one before

A running sequence has one slot between passes and at most two in one, so two for each place are enough.
"""

from __future__ import annotations

from typing import Protocol

from quadriga.engine.blocks import Backing, BlockPool


class Stateful(Protocol):
    """What a sequence remembers of its slots."""

    slot: int
    """Its state at ``n_computed``; -1: none, it begins at 0."""
    next_slot: int
    """Where the pass that is under way leaves its state; -1: no pass is."""
    answer_key: bytes
    """Of the latest state of its answer that is known; empty: none."""


class StatePool:
    """``n_slots`` slots."""

    def __init__(self, n_slots: int) -> None:
        self._pool = BlockPool(n_slots)
        self.backing: Backing | None = None
        """Keeps states beside memory: those of prompts, and the last one of an answer when it ends."""

    @property
    def n_places(self) -> int:
        """Sequences that may run at once."""
        return self._pool.n_blocks // 2

    @property
    def n_free(self) -> int:
        """Slots that can be taken."""
        return self._pool.n_free

    def take(self) -> int | None:
        """A slot of one's own, or None if none is free."""
        return self._pool.allocate()

    def give(self, slot: int) -> None:
        """Give a slot back."""
        self._pool.release(slot)

    def find(self, keys: list[bytes]) -> tuple[int, int]:
        """(how many of the blocks may be taken up, the slot of the state behind them), as many as have one."""
        for n in range(len(keys), 0, -1):
            slot = self._pool.lookup(keys[n - 1])
            if slot is None:
                slot = self._loaded(keys[n - 1])
            if slot is not None:
                return n, slot
        return 0, -1

    def _loaded(self, key: bytes) -> int | None:
        """The slot of a state that the backing had, with a reference on it, or None."""
        slot = self._pool.allocate() if self.backing is not None and self.backing.has(key) else None
        if slot is None or self.backing is None:
            return None
        if not self.backing.load(key, slot):
            self._pool.release(slot)
            return None
        self._pool.publish(slot, key)
        return slot

    def begin(self, sequence: Stateful, *, guesses: bool) -> None:
        """Choose where the next pass leaves a sequence's state."""
        own = sequence.slot >= 0 and not guesses and not self._pool.is_known(sequence.slot)
        slot = sequence.slot if own else self._pool.allocate()
        assert slot is not None, "there are two slots for every place"
        sequence.next_slot = slot

    def end(self, sequence: Stateful, *, accepted: bool) -> None:
        """A pass is over: its state is the sequence's from now on, or (guesses were wrong) it is not."""
        if sequence.next_slot != sequence.slot:
            dropped = sequence.slot if accepted else sequence.next_slot
            if dropped >= 0:
                self._pool.release(dropped)
        if accepted:
            sequence.slot = sequence.next_slot
        sequence.next_slot = -1

    def keep(self, sequence: Stateful, key: bytes, *, of_answer: bool) -> None:
        """Make a sequence's state findable by the key of the block that ends where it is."""
        if of_answer:
            if sequence.answer_key:
                self._pool.forget(sequence.answer_key)
            sequence.answer_key = key
        self._pool.publish(sequence.slot, key)
        if self.backing is not None and not of_answer:
            self.backing.store(key, sequence.slot)

    def release(self, sequence: Stateful) -> None:
        """A sequence ends or gives way."""
        if self.backing is not None and sequence.answer_key:
            kept = self._pool.lookup(sequence.answer_key)
            if kept is not None:
                self.backing.store(sequence.answer_key, kept)
                self._pool.release(kept)
        for slot in {sequence.slot, sequence.next_slot} - {-1}:
            self._pool.release(slot)
        sequence.slot = sequence.next_slot = -1
        sequence.answer_key = b""

    def forget_all(self) -> None:
        """Forget all prefixes."""
        self._pool.forget_all()

    def check(self, running: list[Stateful]) -> None:
        """Assert that no slot is lost."""
        held: dict[int, int] = {}
        for sequence in running:
            for slot in {sequence.slot, sequence.next_slot} - {-1}:
                held[slot] = held.get(slot, 0) + 1
        self._pool.check(held)
