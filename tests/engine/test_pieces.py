"""What passes have taken, and which pieces of others' work follow from it, number by number."""

from __future__ import annotations

from quadriga.engine.pace import PAUSE_S, Pace, _Known, _Pieces


def test_a_mean_that_is_old_is_no_part_of_the_next() -> None:
    known = _Known()
    known.add(3, 1.0, 0)
    assert (known.get(3, 255), known.get(3, 256), known.get(4, 1)) == (1.0, None, None)
    known.add(3, 5.0, 256)
    assert known.get(3, 256) == 5.0
    assert known.fresh(511) == {3: 5.0} and known.fresh(512) == {}


def test_a_piece_that_is_not_full_costs_by_its_tokens() -> None:
    pieces = _Pieces(32, 512)
    pieces.record(32, 0.04, 1)
    pieces.record(50, 0.09, 1)  # 64 of these would add 115 ms
    assert pieces.next(0.1, 1.5, 2) == 32
    pieces = _Pieces(32, 512)
    pieces.record(32, 0.04, 1)
    pieces.record(60, 0.09, 1)  # 64 of these would add 96 ms
    assert pieces.next(0.1, 1.5, 2) == 64


def test_a_small_rest_says_nothing_of_the_next_size() -> None:
    pieces = _Pieces(32, 512)
    pieces.record(24, 0.0001, 1)
    assert pieces.next(0.1, 1.5, 2) == 32, "it is tried"
    pieces.record(25, 0.0001, 1)
    assert pieces.next(0.1, 1.5, 2) == 64


def spoken(n_rows: int, seconds: float) -> Pace:
    pace = Pace(512)
    pace.record(n_rows, n_rows, 0, seconds)
    return pace


def test_what_is_known_of_fewer_rows_tells_of_up_to_twice_as_many() -> None:
    for known, most in ((1, 2), (2, 4), (5, 10)):
        pace = spoken(known, 0.01)
        asked = [n for n in range(1, 13) if pace.room(n) != (0, 0)]
        assert asked == list(range(known, most + 1))


def test_where_answers_are_slow_pieces_may_be_slow_too() -> None:
    """Their own pass takes 200 ms, and as much again twice over is no more of a pause than that."""
    pace = spoken(1, 0.2)
    pace.record(1, 1, 32, 0.2 + 0.16)
    pace.record(1, 1, 64, 0.2 + 0.32)
    pace.record(1, 1, 0, 0.2)
    assert PAUSE_S < 2 * 0.16 and pace.room(1)[0] == 64
