"""The pace of passes, on machines made of arithmetic: what answers wait for, and what others get."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest

from quadriga.engine.pace import PAUSE_S, STRETCH, TURN_S, Pace


@dataclass
class Machine:
    """What passes take, in seconds."""

    rows: Callable[[int], float]
    prompt: Callable[[int], float] = lambda n: 0.0
    noise: Callable[[], float] = lambda: 1.0
    gaps: list[float] = field(default_factory=list)
    pieces: list[tuple[int, int]] = field(default_factory=list)

    def run(self, pace: Pace, passes: int, *, fluent: int = 1, others: int = 0, prompts: bool = False) -> Machine:
        """Passes in which everything that there is room for is in; prompts and other rows by turns."""
        turn = 0
        for _ in range(passes):
            n_prompt, n_rows = pace.room(fluent)
            n_prompt, n_rows = n_prompt if prompts else 0, min(others, n_rows)
            if n_prompt and n_rows:
                turn += 1
                n_prompt, n_rows = (n_prompt, 0) if turn % 2 else (0, n_rows)
            seconds = (self.rows(fluent + n_rows) + (self.prompt(n_prompt) if n_prompt else 0.0)) * self.noise()
            pace.record(fluent, fluent + n_rows, n_prompt, seconds)
            self.gaps.append(seconds)
            self.pieces.append((n_prompt, n_rows))
        return self

    @property
    def stretch(self) -> float:
        return sum(self.gaps) / len(self.gaps) / self.rows(1)

    def rate(self, kind: int) -> float:
        """Tokens of prompts (0) or other rows (1) a second."""
        return sum(piece[kind] for piece in self.pieces) / sum(self.gaps)


SMALL = Machine(lambda n: 0.0015 * n**0.8, lambda n: 0.00017 * max(32, n))
"""12.6M parameters on two cores: every token costs."""
MIDDLE = Machine(lambda n: 0.008 * n, lambda n: 0.0018 * max(32, n))
"""135M parameters on two cores."""
MIXTURE = Machine(lambda n: 0.3 + 0.15 * min(n, 8) + 0.02 * n, lambda n: 1.0 + 0.015 * n)
"""A large mixture on a CPU: a few rows already read all experts."""
GPU = Machine(lambda n: 0.02 + 0.0001 * n, lambda n: 0.002 + 0.00002 * n)
"""Weights are read once for all tokens of a pass."""


def on(machine: Machine, **load: int | bool) -> Machine:
    return Machine(machine.rows, machine.prompt).run(Pace(512), 1500, **load)  # type: ignore[arg-type]


@pytest.mark.parametrize("machine", [SMALL, MIDDLE, MIXTURE], ids=["small", "middle", "mixture"])
@pytest.mark.parametrize("load", [{"prompts": True}, {"others": 63}, {"prompts": True, "others": 63}], ids=str)
def test_an_answer_beside_others_work_takes_at_most_three_times_as_long(
    machine: Machine, load: dict[str, int | bool]
) -> None:
    ran = on(machine, **load)
    assert ran.stretch <= STRETCH * 1.05
    assert ran.stretch >= STRETCH * 0.75, "and others have the rest of the time"
    assert sorted(ran.gaps)[len(ran.gaps) // 2] <= STRETCH * machine.rows(1), "most tokens, not only the mean"


@pytest.mark.parametrize("load", [{"prompts": True}, {"others": 63}], ids=str)
def test_where_every_token_costs_pieces_make_short_pauses_and_passes_between_are_the_answers_own(
    load: dict[str, int | bool],
) -> None:
    ran = on(MIDDLE, **load)
    assert sorted(ran.gaps)[len(ran.gaps) // 2] == pytest.approx(MIDDLE.rows(1)), "most passes"
    assert max(ran.gaps) < 1.3 * PAUSE_S


def test_others_lose_only_the_answers_share_of_the_time() -> None:
    assert on(MIDDLE, prompts=True).rate(0) > 0.6 / 0.0018
    assert on(MIDDLE, others=63).rate(1) > 0.6 / 0.008


def test_where_tokens_cost_nothing_more_everything_is_in_every_pass() -> None:
    prompts, rows = on(GPU, prompts=True), on(GPU, others=63)
    assert prompts.pieces.count((512, 0)) > 0.95 * len(prompts.pieces)
    assert rows.pieces.count((0, 63)) > 0.95 * len(rows.pieces)


def test_pieces_of_a_mixture_are_long_enough_for_its_experts() -> None:
    prompts = on(MIXTURE, prompts=True)
    cost = [MIXTURE.prompt(n) / n for n, _ in prompts.pieces if n]
    assert sum(cost) / len(cost) < 1.6 * min(MIXTURE.prompt(n) / n for n in (32, 64, 128))
    pace = Pace(512)
    for _ in range(5):
        pace.record(63, 63, 0, MIXTURE.rows(63))  # many answers of one request, before anybody else comes
    rows = Machine(MIXTURE.rows).run(pace, 1500, others=63)
    assert rows.rate(1) > 0.4 * 63 / MIXTURE.rows(64)


@pytest.mark.parametrize("load", [{"prompts": True}, {"others": 63}], ids=str)
def test_after_a_long_pass_two_are_the_answers_own(load: dict[str, int | bool]) -> None:
    """A piece that takes 3.4 times as long on average, and as the machine likes: the mean would allow two of three."""
    rng = random.Random(1)
    wide = Machine(
        lambda n: 0.012 + 0.0018 * (n - 1), lambda n: 0.0009 * max(32, n), lambda: rng.lognormvariate(0, 0.3)
    )
    pace = Pace(512)
    ran = wide.run(pace, 1200, **load)  # type: ignore[arg-type]
    long = [any(piece) and gap > 1.5 * STRETCH * wide.rows(1) for gap, piece in zip(ran.gaps, ran.pieces, strict=True)]
    assert sum(long) > 100
    after = [ran.pieces[i + 1 : i + 3] for i, one in enumerate(long) if one][:-1]
    assert all(pieces == [(0, 0), (0, 0)] for pieces in after)
    assert sorted(ran.gaps)[len(ran.gaps) // 2] < 1.5 * wide.rows(1)


def test_noise_and_stalls_do_not_let_others_take_over() -> None:
    rng = random.Random(0)

    def noise() -> float:
        return rng.lognormvariate(0, 0.5) * (5 if rng.random() < 0.02 else 1)

    for load in ({"prompts": True}, {"others": 63}):
        ran = Machine(MIDDLE.rows, MIDDLE.prompt, noise).run(Pace(512), 3000, **load)  # type: ignore[arg-type]
        mean_noise = sum(noise() for _ in range(20_000)) / 20_000
        assert ran.stretch < 1.5 * STRETCH * mean_noise
        assert ran.stretch > 1.5 * mean_noise


def test_one_stalled_pass_does_not_shut_others_out() -> None:
    pace = Pace(512)
    Machine(MIDDLE.rows, MIDDLE.prompt).run(pace, 100, prompts=True)
    pace.record(1, 1, 32, 3600.0)  # the machine was asleep
    passes = 0
    while pace.room(1) == (0, 0):
        pace.record(1, 1, 0, MIDDLE.rows(1))
        passes += 1
    assert passes < 100


def test_before_anybody_speaks_pieces_are_turns() -> None:
    pace = Pace(512)
    assert pace.room(0)[0] == 32, "nothing is known yet"
    sizes = []
    for _ in range(50):
        n, _ = pace.room(0)
        sizes.append(n)
        pace.record(0, 0, n, MIDDLE.prompt(n))
    assert MIDDLE.prompt(sizes[-1]) <= TURN_S < MIDDLE.prompt(2 * sizes[-1])
    pace = Pace(512)
    for _ in range(50):
        n, _ = pace.room(0)
        pace.record(0, 0, n, MIXTURE.prompt(n))
    assert n >= 256 and MIXTURE.prompt(n) / n < 1.2 * MIXTURE.prompt(512) / 512, "its experts are read for all of them"


def test_a_machine_that_became_slower_is_noticed() -> None:
    pace = Pace(512)
    Machine(SMALL.rows, SMALL.prompt).run(pace, 500, prompts=True)
    slower = Machine(lambda n: 10 * SMALL.rows(n), lambda n: 10 * SMALL.prompt(n))
    slower.run(pace, 600, prompts=True)
    late = Machine(slower.rows, slower.prompt).run(pace, 1000, prompts=True)
    assert late.stretch <= STRETCH * 1.05
    assert max(late.gaps) < 3 * PAUSE_S


def test_what_answers_take_alone_is_measured_again_beside_others() -> None:
    """The machine had other work at first: what took 2.5 times as long then takes 5 times as long now."""
    pace = Pace(512)
    Machine(lambda n: 0.05 + 0.01 * (n - 1)).run(pace, 300, others=8)
    quicker = Machine(lambda n: 0.01 + 0.01 * (n - 1)).run(pace, 200, others=8)
    late = quicker.gaps[100:]
    assert sum(late) / len(late) <= STRETCH * 1.1 * 0.01
    assert sorted(late)[len(late) // 2] == pytest.approx(0.01)
