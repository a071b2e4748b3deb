"""DRY beside loops that look at every place of the history, beside llama.cpp's published cases, and the two of ours."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from quadriga.engine.dry import Breakers, Dry, Spellings
from quadriga.engine.request import SamplingParams
from quadriga.engine.sampler import Sampler
from quadriga.errors import RequestError
from quadriga.hub import catalogue
from quadriga.io.open import open_checkpoint
from quadriga.kernels.cpu import library as cpu
from quadriga.kernels.cpu.sampling import RowSampler

HERE = cpu.isas_in_force()


def by_loops(dry: Dry) -> dict[int, float]:
    """token -> what it loses, each place of the history compared on its own."""
    ids = dry.history().tolist()
    n, best = len(ids), dict[int, int]()
    limit = n
    for i in range(n):  # the breakers that begin i tokens before the last
        rests = [len(ids_) - 1 for ids_ in dry.breakers.longer if tuple(ids[n - 1 - i :][: len(ids_)]) == ids_]
        rests += [0] if dry.breakers.kinds[ids[n - 1 - i]] & 1 else []
        if rests:
            limit = i - max(rests)
            break
    for end in range(n - 1):  # the repetition's first time ends there, and ids[end + 1] came next
        length = 0
        while length <= end and length < limit and ids[end - length] == ids[n - 1 - length]:
            length += 1
        if n > dry.allowed_length <= length and not dry.breakers.kinds[ids[end + 1]] & 1:
            best[ids[end + 1]] = max(best.get(ids[end + 1], 0), length)
    most = int(88.7228391 / math.log(dry.base)) if dry.base > 1 else n  # e^88.7 is about the largest float32
    powers = {token: min(length - dry.allowed_length, most) for token, length in best.items()}
    return {token: dry.multiplier * dry.base**power for token, power in powers.items()}


def histories() -> list[list[int]]:
    """Random tokens of few kinds, and repetitions with little between."""
    draw = np.random.default_rng(3)
    made = [draw.integers(0, kinds, size).tolist() for kinds, size in ((2, 3), (2, 40), (3, 70), (6, 200), (11, 90))]
    phrase = draw.integers(0, 11, 9).tolist()
    return [*made, [4] * 50, phrase * 3, [*phrase, 7, *phrase[2:], 7, *phrase[4:]], [5], []]


SETTINGS: list[tuple[float, float, int, int]] = [
    (0.8, 1.75, 2, -1),
    (2.0, 1.1, 0, -1),
    (1.5, 1.0, 4, 30),
    (0.3, 3.0, 1, 7),
    (1.0, 99.0, 2, -1),
]
BREAKERS = [
    Breakers(11),
    Breakers(11, [4]),
    Breakers(11, [9], [(0, 1), (0, 1, 1), (4, 0)]),
    Breakers(11, [0], [(0, 2)]),
]


@pytest.mark.parametrize("setting", SETTINGS, ids=str)
def test_penalties_are_those_of_plain_loops(setting: tuple[float, float, int, int]) -> None:
    n_penalised = 0
    for breakers in BREAKERS:
        for ids in histories():
            dry = Dry(*setting, breakers, ids)
            expected = by_loops(dry)
            got, amounts = dry.penalties()
            assert got.tolist() == sorted(expected)
            assert amounts == pytest.approx([expected[i] for i in got.tolist()], rel=1e-6)
            n_penalised += len(got)
    assert n_penalised > 5, "or nothing was compared"


@pytest.mark.parametrize(
    ("n_tokens", "ids", "expected", "multiplier", "allowed", "last_n", "alone"),
    [
        (4, [0, 1], [0.25] * 4, 1.0, 2, 4, []),
        (4, [0, 1, 2, 0, 1], [0.296923, 0.296923, 0.109232, 0.296923], 1.0, 2, 5, []),
        (5, [0, 1, 3, 4, 0, 1], [0.2] * 5, 1.0, 2, 6, [3]),
        (5, [0, 1, 2, 0, 1], [0.241818, 0.241818, 0.032727, 0.241818, 0.241818], 2.0, 2, 5, []),
        (5, [0, 1, 2, 3, 4, 0, 1], [0.2] * 5, 1.0, 4, 7, []),
    ],
)
def test_probabilities_are_those_of_llama_cpp(
    n_tokens: int, ids: list[int], expected: list[float], multiplier: float, allowed: int, last_n: int, alone: list[int]
) -> None:
    """The cases of its tests/test-sampling.cpp."""
    got, amounts = Dry(multiplier, 1.1, allowed, last_n, Breakers(n_tokens, alone), ids).penalties()
    weights = np.ones(n_tokens)
    weights[got] = np.exp(-amounts)
    np.testing.assert_allclose(weights / weights.sum(), expected, atol=2e-6)


def params_of(setting: tuple[float, float, int, int], **more: Any) -> SamplingParams:
    names = ("dry_multiplier", "dry_base", "dry_allowed_length", "dry_penalty_last_n")
    return SamplingParams(**dict(zip(names, setting, strict=True)), **more)


@pytest.mark.parametrize("isa", HERE)
def test_the_kernels_choose_what_numpy_chooses(isa: str) -> None:
    """Greedily and not, with a penalty before and a bias after, token for token while the history grows."""
    rows, kernels = (
        np.random.default_rng(2).standard_normal((5, 1, 11)).astype(np.float32),
        RowSampler(cpu.Context(1, isa)),
    )
    more = (
        {},
        {"temperature": 1.0, "seed": 5},
        {"repetition_penalty": 1.2, "logit_bias": {3: 1.0}, "min_new_tokens": 2},
    )
    plain = changed = 0
    for setting in SETTINGS:
        for breakers in BREAKERS:
            for ids in histories():
                for rest in more:
                    params = params_of(setting, **rest)
                    one, other = (Sampler(params, ids, 11, ends=[2], breakers=breakers) for _ in range(2))
                    for row in rows:
                        got = one.take(kernels.sample(row, [0], [one.ask()])[0], row[0])
                        assert got.token_id == other.sample(row[0]).token_id, (params, ids)
                        changed += not rest and got.token_id != int(row[0].argmax())
                        plain += not rest and got.token_id == int(row[0].argmax())
    assert changed > 50 < plain, "some tokens must lose, and some must not"


def test_nothing_lasts_from_one_row_to_the_next() -> None:
    """Scratch memory of a long history serves a row of a short one."""
    row, kernels = np.zeros((1, 11), dtype=np.float32), RowSampler(cpu.Context(1))
    for ids in ([7, 8] * 300, [1, 2, 3, 1, 2], [1, 2, 3, 3, 2, 3]):
        asked = Sampler(params_of((1.0, 2.0, 1, -1)), ids, 11)
        expected = Sampler(params_of((1.0, 2.0, 1, -1)), ids, 11).sample(row[0]).token_id
        assert asked.take(kernels.sample(row, [0], [asked.ask()])[0], row[0]).token_id == expected


class Letters:
    """A vocabulary of whole strings."""

    words = ("a", "b", "ab", ": ", "x:", "\n", "END", "EN", "D", "", "é")
    n_vocab = len(words)
    special_ids = {"<|end|>": 9}  # noqa: RUF012

    def is_token(self, token_id: int) -> bool:
        return token_id != 4

    def token_bytes(self, token_id: int) -> bytes:
        return self.words[token_id].encode()

    def encode_continuation(self, text: str) -> list[int]:
        return [self.words.index(letter) for letter in text]


def test_breakers_are_found_in_tokens_and_across_them() -> None:
    spellings = Spellings(Letters(), 13)
    alone = spellings.breakers([":", "\n", "|end"])
    assert np.flatnonzero(alone.kinds).tolist() == [3, 5, 9], (
        "an id without a token is none; names of control tokens are"
    )
    assert alone.longer == () and len(alone.kinds) == 13
    across = spellings.breakers(["END", "ba"])
    assert across.longer == ((7, 8), (1, 0), (2, 0)), "what ends with the beginning of one, before the rest of it"
    assert across.kinds.tolist() == [0, 2, 2, 0, 0, 0, 1, 2, 0, 0, 0, 0, 0]
    assert across.flat.tolist() == [2, 7, 8, 2, 1, 0, 2, 2, 0]
    assert spellings.breakers(["zz", "é"]).kinds.sum() == 1


def test_the_defaults_break_at_lines_and_quotes() -> None:
    tokenizer = open_checkpoint(catalogue.resolve("quadriga-nano")).load_tokenizer(catalogue.cl100k_ranks)
    assert tokenizer is not None
    breakers = Spellings(tokenizer, tokenizer.n_vocab).breakers(SamplingParams().dry_sequence_breakers)
    for i in range(tokenizer.n_vocab):
        held = tokenizer.is_token(i) and any(c in tokenizer.token_text(i) for c in '\n:"*')
        assert bool(breakers.kinds[i]) == held, i


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"dry_multiplier": -1.0}, "dry_multiplier"),
        ({"dry_base": 0.5}, "dry_base"),
        ({"dry_allowed_length": -1}, "dry_allowed_length"),
        ({"dry_penalty_last_n": -2}, "dry_penalty_last_n"),
        ({"dry_sequence_breakers": ["", "a"]}, "of 1 to 40 bytes"),
        ({"dry_sequence_breakers": ["é" * 21]}, "of 1 to 40 bytes"),
        ({"dry_sequence_breakers": ["a"] * 65}, "at most 64"),
    ],
)
def test_impossible_settings_are_named(given: dict[str, Any], says: str) -> None:
    with pytest.raises(RequestError, match=says):
        SamplingParams(**given)
