"""Block tables and what stands behind a pool, by themselves: what is taken, what is given back, in which order."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from quadriga.engine.blocks import GONE, BlockPool, BlockTable, chain_key, group_key
from quadriga.engine.states import StatePool


class Shelf:
    """A ``Backing`` that has the keys it is told of and writes down what is asked of it.

    Args:
        broken: keys that it says it has and then cannot give.
    """

    def __init__(self, keys: set[bytes], broken: set[bytes] | None = None) -> None:
        self.keys, self.broken = keys, broken or set()
        self.stored: list[bytes] = []
        self.loaded: list[bytes] = []

    def has(self, key: bytes) -> bool:
        return key in self.keys | self.broken

    def store(self, key: bytes, block: int) -> None:
        self.stored.append(key)

    def load(self, key: bytes, block: int) -> bool:
        self.loaded.append(key)
        return key in self.keys


def chain(n: int) -> list[bytes]:
    keys, parent = [], b""
    for i in range(n):
        keys.append(parent := chain_key(parent, [i] * 16))
    return keys


def test_a_column_is_taken_whole_or_not_at_all() -> None:
    pool = BlockPool(5)
    table = BlockTable(pool, (None, 32))
    assert [table.extend() for _ in range(3)] == [True, True, False]
    assert (len(table), table.n_held, pool.n_free) == (2, 4, 1), "the fifth block is still there"


def test_a_table_that_was_emptied_is_as_new() -> None:
    pool = BlockPool(8)
    table = BlockTable(pool, (16,))
    for _ in range(4):
        table.extend()
    table.let_go(63)  # sees positions 48 to 63
    assert (table.n_held, table.rows[0][:3]) == (1, [GONE] * 3)
    table.cut(0)
    assert pool.n_free == 8
    table.extend()
    assert (table.n_held, list(table), pool.n_free) == (1, table.rows[0], 7)
    pool.check({table.rows[0][0]: 1})


def test_a_window_holds_its_last_position_and_no_more() -> None:
    pool = BlockPool(8)
    table = BlockTable(pool, (33,))
    for _ in range(4):
        table.extend()
    table.let_go(47)  # sees 15 to 47: the first block's last position
    assert table.n_held == 4
    table.let_go(48)
    assert (table.n_held, pool.n_free) == (3, 5)
    pool.check(dict.fromkeys(table, 1))


@pytest.mark.parametrize("n", [1, 2])
def test_a_prefix_is_brought_as_far_as_any_group_has_blocks_of_it(n: int) -> None:
    """The group with a window kept its last blocks only: where it has none, the prefix goes on all the same."""
    keys = chain(4)
    pool = BlockPool(9)
    behind = {*keys, *(group_key(key, 1) for key in keys[4 - n :])}
    pool.backing = shelf = Shelf(behind)
    table = BlockTable(pool, (None, 16 * n))
    assert table.find(iter(keys)) == keys and table.n_held == 4 + n
    assert set(shelf.loaded) == behind and len(shelf.loaded) == len(behind)
    table.cut(0)
    pool.check({})
    assert pool.n_cached == 4 + n, "they are known now, and nobody's"


def test_what_was_brought_is_forgotten_from_its_end() -> None:
    keys = chain(3)
    pool = BlockPool(3)
    pool.backing = Shelf({*keys})

    def nothing() -> Iterator[bytes]:
        yield from ()

    assert list(pool.bring(iter(keys), 1)) == keys
    pool.allocate()
    assert [pool.knows(key) for key in keys] == [True, True, False]
    assert list(pool.bring(nothing(), 1)) == []


def test_what_cannot_be_had_after_all_takes_no_block() -> None:
    keys = chain(3)
    pool = BlockPool(4)
    pool.backing = Shelf({keys[0]}, broken={keys[1]})
    assert list(pool.bring(iter(keys), 1)) == keys[:1]
    assert (pool.n_free, pool.n_cached) == (4, 1)
    pool.check({})


def test_what_is_forgotten_is_free_once() -> None:
    pool = BlockPool(2)
    held, cached = pool.allocate(), pool.allocate()
    assert held is not None and cached is not None
    pool.publish(held, b"held")
    pool.publish(cached, b"cached")
    pool.release(cached)
    for key in (b"held", b"cached", b"nobody's"):
        pool.forget(key)
    assert (pool.n_free, pool.n_cached, pool.knows(b"held")) == (1, 0, False)
    pool.check({held: 1})
    pool.release(held)
    assert (pool.n_free, pool.n_cached) == (2, 0), "it is no prefix any more"


class Answer:
    """What ``StatePool`` knows a sequence by."""

    def __init__(self) -> None:
        self.slot = self.next_slot = -1
        self.answer_key = b""


def step(pool: StatePool, answer: Answer, *, guesses: bool = False, accepted: bool = True) -> int:
    pool.begin(answer, guesses=guesses)
    made = answer.next_slot
    pool.end(answer, accepted=accepted)
    return made


def test_a_state_that_others_may_want_is_never_written_over() -> None:
    pool, answer = StatePool(6), Answer()
    first = step(pool, answer)
    assert step(pool, answer) == first, "nobody knows it: it is written where it is"
    pool.keep(answer, b"prompt", of_answer=False)
    second = step(pool, answer)
    assert second != first and pool.find([b"prompt"]) == (1, first)
    pool.give(first)
    third = step(pool, answer, guesses=True, accepted=False)
    assert third != second and answer.slot == second, "wrong guesses leave it as it was"
    pool.release(answer)
    pool.check([])


def test_the_longest_prefix_with_a_state_is_found() -> None:
    pool, answer = StatePool(6), Answer()
    assert pool.n_places == 3
    for key in (b"one", b"three"):
        step(pool, answer)
        pool.keep(answer, key, of_answer=False)
    found = pool.find([b"one", b"two", b"three", b"four"])
    assert found == (3, answer.slot)
    pool.give(found[1])


def test_of_an_answer_the_latest_state_is_kept_and_it_is_stored_at_its_end() -> None:
    pool, answer = StatePool(6), Answer()
    pool.backing = shelf = Shelf(set())
    step(pool, answer)
    pool.keep(answer, b"prompt", of_answer=False)
    for key in (b"early", b"late"):
        step(pool, answer)
        pool.keep(answer, key, of_answer=True)
    assert shelf.stored == [b"prompt"], "an answer's next state replaces this one"
    assert pool.find([b"early"]) == (0, -1)
    pool.release(answer)
    assert shelf.stored == [b"prompt", b"late"]
    pool.release(answer)
    assert shelf.stored == [b"prompt", b"late"], "once"
    pool.check([])


def test_a_state_from_the_backing_is_known_from_then_on() -> None:
    pool = StatePool(4)
    pool.backing = shelf = Shelf({b"a"}, broken={b"b"})
    n, slot = pool.find([b"a", b"b"])
    assert n == 1
    assert pool.find([b"a"]) == (1, slot) and shelf.loaded == [b"b", b"a"]
