"""Tokens that the kernels choose beside those of NumPy: every setting with every other, on every instruction set."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from functools import cache
from typing import Any

import numpy as np
import pytest

from quadriga.engine.request import SamplingParams
from quadriga.engine.sampler import NONE_UNUSED, Sample, Sampler, Unused
from quadriga.engine.truncation import Floats, uniforms
from quadriga.errors import RequestError
from quadriga.kernels.cpu import library as cpu
from quadriga.kernels.cpu.sampling import RowSampler

HERE = cpu.isas_in_force()


@cache
def kernels(isa: str = HERE[-1], threads: int = 2) -> RowSampler:
    """A sampler on an instruction set."""
    return RowSampler(cpu.Context(threads, isa))


def shapes(v: int) -> Floats:
    """Rows of logits (5, v): flat, peaked, full of ties, all equal, with no more than two tokens to choose from."""
    draw = np.random.default_rng(v)
    spread = (2.5 * draw.standard_normal(v)).astype(np.float32)
    peaked, lone = spread.copy(), np.full(v, -80.0, dtype=np.float32)
    peaked[:: max(1, v // 30)] += 8
    lone[[v // 2, v - 1]] = 40.0, 39.5
    return np.stack([spread, peaked, np.round(0.8 * spread), np.full(v, -3.25, dtype=np.float32), lone])


def settings() -> Iterator[SamplingParams]:
    """Everything that changes a choice with everything else, each with a seed of its own."""
    penalties: list[dict[str, Any]] = [
        {},
        {"repetition_penalty": 1.3, "logprobs": 3},
        {"presence_penalty": 0.7, "frequency_penalty": 0.3},
        {"repetition_penalty": 0.8, "frequency_penalty": -0.2, "logit_bias": {0: 2.5, 5: -1.0}, "logprobs": 20},
    ]
    grid = itertools.product(
        (0.0, 1e-5, 0.7, 3.0),
        (0, 1, 40, 600, 2**31 - 1),
        (1e-46, 0.3, 0.95, 1 - 1e-12, 1.0),
        (0.0, 0.05, 1.0),
        penalties,
    )
    for seed, (temperature, top_k, top_p, min_p, more) in enumerate(grid):
        yield SamplingParams(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, seed=seed, **more)


def by_kernels(one: RowSampler, samplers: Sequence[Sampler], rows: Floats, allowed: Any = None) -> list[Sample]:
    """A token for each of the samplers, from its row."""
    asked = [s.ask(allowed) for s in samplers]
    chosen = one.sample(rows, range(len(samplers)), asked)
    constrained = allowed is not None
    return [s.take(c, row, constrained=constrained) for s, c, row in zip(samplers, chosen, rows, strict=True)]


RARER: list[dict[str, Any]] = [
    {"typical_p": 0.4},
    {"typical_p": 0.9, "top_k": 30, "top_p": 0.8},
    {"typical_p": 0.95, "min_p": 0.2, "xtc_probability": 0.5, "xtc_threshold": 0.02},
    {"xtc_probability": 0.5},
    {"xtc_probability": 1.0, "xtc_threshold": 0.0, "top_k": 9},
    {"xtc_probability": 1.0, "xtc_threshold": 0.05, "top_p": 0.6},
]


@pytest.mark.parametrize("v", [9, 1100])
def test_typical_tokens_and_excluded_ones_are_those_of_numpy(v: int) -> None:
    asked = [SamplingParams(temperature=t, seed=i, **more) for t in (0.8, 2.0) for i in range(10) for more in RARER]
    rows = shapes(v)[np.arange(len(asked)) % 5]
    expected = [Sampler(params, [], v).sample(row).token_id for params, row in zip(asked, rows, strict=True)]
    for isa in HERE:
        got = by_kernels(kernels(isa), [Sampler(params, [], v) for params in asked], rows)
        assert [s.token_id for s in got] == expected, isa


@pytest.mark.parametrize("v", [9, 256, 700, 3000])
def test_the_kernels_choose_what_numpy_chooses(v: int) -> None:
    """Also the second and third time, when penalties count what was said; tokens are the same on every instruction set."""
    asked = list(settings())
    rows = shapes(v)[np.arange(len(asked)) % 5]
    unused = Unused([1, v - 2] if v % 2 else [])

    def samplers() -> list[Sampler]:
        return [Sampler(params, [0, v // 2, 0], v, unused) for params in asked]

    numpy, compiled = samplers(), {isa: samplers() for isa in HERE}
    for _ in range(2):
        expected = [s.sample(row) for s, row in zip(numpy, rows, strict=True)]
        for isa in HERE:
            got = by_kernels(kernels(isa), compiled[isa], rows)
            for params, here, there in zip(asked, got, expected, strict=True):
                assert here.token_id == there.token_id, (isa, params)
                assert [i for i, _ in here.top_logprobs] == [i for i, _ in there.top_logprobs], (isa, params)
            assert [s.logprob for s in got] == pytest.approx([s.logprob for s in expected], abs=1e-5)
            of_tops = [[p for s in every for _, p in s.top_logprobs] for every in (got, expected)]
            assert of_tops[0] == pytest.approx(of_tops[1], abs=1e-5)


def test_a_token_does_not_depend_on_the_batch_or_the_threads() -> None:
    asked = [SamplingParams(temperature=0.9, top_p=0.9, top_k=k, logprobs=2, seed=k) for k in range(40)]
    rows = shapes(1500)[np.arange(40) % 5]

    def samplers() -> list[Sampler]:
        return [Sampler(params, [], 1500) for params in asked]

    together = by_kernels(kernels(threads=3), samplers(), rows)
    alone = [by_kernels(kernels(threads=1), [s], row[None])[0] for s, row in zip(samplers(), rows, strict=True)]
    beside = by_kernels(kernels().beside(), samplers(), rows)
    assert together == alone == beside


def test_a_draw_is_that_of_seed_and_position() -> None:
    """All tokens alike: the token is the number itself, in 65,536 steps."""
    flat = np.zeros((1, 65536), dtype=np.float32)
    for seed in (0, 1, 977, 2**63 - 1):
        s = Sampler(SamplingParams(temperature=1.0, seed=seed), [], 65536)
        tokens = [by_kernels(kernels(), [s], flat)[0].token_id for _ in range(4)]
        assert tokens == [int(uniforms(seed, position)[0] * 65536) for position in range(4)]


@pytest.mark.parametrize("isa", HERE)
@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_what_may_not_be_chosen_is_not(temperature: float, isa: str) -> None:
    v = 600
    draw, row = np.random.default_rng(1), shapes(v)[1]
    for n in (1, 2, 40, 599):
        allowed = np.zeros(v, dtype=np.bool_)
        allowed[draw.permutation(v)[:n]] = True
        unused = Unused(np.flatnonzero(allowed)[1::2].tolist())
        params = SamplingParams(temperature=temperature, top_p=0.99, min_new_tokens=1, logprobs=4, seed=n)
        ends = [int(np.flatnonzero(allowed)[0])]  # for n == 1 nothing else may follow: the answer ends, however short
        one, other = (Sampler(params, [], v, unused, ends) for _ in range(2))
        got, expected = by_kernels(kernels(isa), [one], row[None], allowed)[0], other.sample(row, allowed=allowed)
        assert got.token_id == expected.token_id and allowed[got.token_id] and got.token_id not in unused.ids
        assert [i for i, _ in got.top_logprobs] == [i for i, _ in expected.top_logprobs]
        assert not {i for i, _ in got.top_logprobs} & unused.ids


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_broken_logits_are_an_error_not_a_token(bad: float) -> None:
    rows = np.zeros((2, 300), dtype=np.float32)
    rows[0, 270] = bad
    samplers = [Sampler(SamplingParams(temperature=1.0), [], 300) for _ in range(2)]
    broken, good = kernels().sample(rows, [0, 1], [s.ask() for s in samplers])
    with pytest.raises(RequestError, match="not finite"):
        samplers[0].take(broken, rows[0])
    assert 0 <= samplers[1].take(good, rows[1]).token_id < 300, "another row's numbers are another's affair"


def test_a_grammar_without_a_way_on_is_an_error() -> None:
    s, row = Sampler(SamplingParams(), [], 5, NONE_UNUSED), np.zeros((1, 5), dtype=np.float32)
    with pytest.raises(RequestError, match="no token of this vocabulary may follow"):
        by_kernels(kernels(), [s], row, np.zeros(5, dtype=np.bool_))


def test_logits_are_left_as_they_are() -> None:
    rows = shapes(500)
    before = rows.copy()
    asked = SamplingParams(temperature=0.5, top_k=5, repetition_penalty=2.0, logit_bias={3: 9.0}, logprobs=3, seed=1)
    by_kernels(kernels(), [Sampler(asked, [1, 2], 500, Unused([4])) for _ in rows], rows)
    np.testing.assert_array_equal(rows, before)


@pytest.mark.parametrize("rows", [shapes(12).astype(np.float64), shapes(12)[:, ::2]], ids=["float64", "every second"])
def test_rows_that_are_not_as_the_kernels_read_them_are_refused(rows: Any) -> None:
    setting = Sampler(SamplingParams(), [], rows.shape[1]).ask()
    with pytest.raises((AssertionError, TypeError)):
        kernels().sample(rows, [0], [setting])
