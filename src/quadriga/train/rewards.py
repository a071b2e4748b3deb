"""Rewards of sampled answers: what each of them is worth, from rules, programs, a schema, a judge or your own function.

    number      1 if the last number of the answer is the last one of the row's own answer (GSM8K: after ####)
    text        1 if the answer is the row's own, but for spaces around it
    regex       1 if the pattern is found in the answer
    json        1 if the answer is JSON that follows the schema, as ``response_format`` would have it written
    code        1 if the answer's program, with the row's tests behind it, runs to its end in the sandbox
    judge       the last number of the judge's verdict, of 10
    finished    1 if the answer ended by itself, 0 if it was cut at max_new_tokens
    python      what a function of yours returns, ``module:function``

A run's reward is the weighted sum of those in its file. Nothing here imports torch; what runs programs and asks judges
is handed in (``train.services``).
"""

from __future__ import annotations

import importlib
import math
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quadriga.errors import ConfigError, GrammarError, TrainingError
from quadriga.io.json_files import read_json
from quadriga.text.grammar import Grammar, Grammars
from quadriga.text.tokenizer import Tokenizer
from quadriga.train.services import Services
from quadriga.train.tune_config import RewardSection


@dataclass(frozen=True)
class Attempt:
    """An answer that was sampled, and the row it belongs to."""

    prompt: str
    """What the model read."""
    answer: str
    """What it wrote, without the token that ended it."""
    wanted: str
    """The row's own answer; empty if it has none."""
    row: Mapping[str, Any]
    finished: bool
    """False: cut at max_new_tokens."""


Reward = Callable[[Sequence[Attempt]], list[float]]
"""Attempts -> what each is worth."""


def reward_of(
    sections: Sequence[RewardSection], services: Services, tokenizer: Tokenizer, vocab_size: int, ends: Collection[int]
) -> Reward:
    """The weighted sum of a run's rewards.

    Args:
        tokenizer, vocab_size, ends: the model's vocabulary, the rows of its head, the tokens that end an answer.

    Raises:
        ConfigError: a reward that cannot be computed here, a schema or function that cannot be read.
    """
    parts = [(one, _reward(one, services, tokenizer, vocab_size, ends)) for one in sections]

    def total(attempts: Sequence[Attempt]) -> list[float]:
        sums = [0.0] * len(attempts)
        for section, reward in parts:
            found = reward(attempts)
            if len(found) != len(attempts):
                raise TrainingError(
                    f"the reward {section.kind} must give a number for each of {len(attempts)} answers, gave "
                    f"{len(found)}"
                )
            bad = next((one for one in found if not _is_number(one)), None)
            if bad is not None:
                raise TrainingError(f"the reward {section.kind} must give finite numbers, gave {bad!r:.60}")
            sums = [a + section.weight * float(b) for a, b in zip(sums, found, strict=True)]
        return sums

    return total


def _is_number(value: Any) -> bool:
    try:
        return not isinstance(value, str) and math.isfinite(value)
    except (TypeError, ValueError):
        return False


def _reward(
    section: RewardSection, services: Services, tokenizer: Tokenizer, vocab_size: int, ends: Collection[int]
) -> Reward:
    match section.kind:
        case "number":
            return lambda attempts: [number_reward(one.answer, one.wanted) for one in attempts]
        case "text":
            return lambda attempts: [float(one.answer.strip() == one.wanted.strip()) for one in attempts]
        case "finished":
            return lambda attempts: [float(one.finished) for one in attempts]
        case "regex":
            return _regex(section)
        case "json":
            return _Schema(section, tokenizer, vocab_size, frozenset(ends))
        case "code":
            return _code(section, services)
        case "judge":
            return _judge(section, services)
        case "python":
            return _function(section.function or "")


# Numbers and patterns ------------------------------------------------------------------------------------------------

_NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")


def number_reward(text: str, answer: str) -> float:
    """1 if the last number in a text equals the last number of the answer (GSM8K: the text after ####), else 0."""
    wanted, got = (_last_number(one) for one in (answer.rpartition("####")[2], text))
    return float(wanted is not None and got is not None and abs(wanted - got) < 1e-6)


def _last_number(text: str) -> float | None:
    found = _NUMBER.findall(text)
    return float(found[-1].replace(",", "")) if found else None


def _regex(section: RewardSection) -> Reward:
    def reward(attempts: Sequence[Attempt]) -> list[float]:
        patterns = [section.pattern if section.column is None else _of(one, section.column) for one in attempts]
        return [
            float(_compiled(p or "").search(one.answer) is not None) for p, one in zip(patterns, attempts, strict=True)
        ]

    if section.pattern is not None:
        _compiled(section.pattern)
    return reward


def _compiled(pattern: str) -> re.Pattern[str]:
    try:
        return re.compile(pattern)
    except re.error as error:
        raise ConfigError(f"the pattern {pattern!r} of a regex reward cannot be read: {error}") from None


def _of(attempt: Attempt, column: str) -> str:
    value = attempt.row.get(column)
    if not isinstance(value, str) or not value:
        raise TrainingError(
            f"a reward reads the column {column!r}, which must be text in every row; a row with "
            f"{', '.join(sorted(map(str, attempt.row)))[:80]} has {value!r:.60}"
        )
    return value


# JSON ----------------------------------------------------------------------------------------------------------------


class _Schema:
    """A ``Reward``: the answer, token by token, is one that llguidance allows by the schema."""

    def __init__(self, section: RewardSection, tokenizer: Tokenizer, vocab_size: int, ends: frozenset[int]) -> None:
        self._tokenizer, self._ends, self._column = tokenizer, ends, section.column
        self._grammars = Grammars(tokenizer, vocab_size, ends)
        self._grammar: Grammar | None = None
        if section.schema is not None:
            try:
                self._grammar = self._grammars.compile("json", read_json(Path(section.schema).expanduser()))
            except GrammarError as error:
                raise ConfigError(f"the schema {section.schema} of a json reward cannot be used: {error}") from None

    def __call__(self, attempts: Sequence[Attempt]) -> list[float]:
        return [float(one.finished and self._follows(one)) for one in attempts]

    def _follows(self, attempt: Attempt) -> bool:
        grammar = self._grammar
        if grammar is None:
            grammar = self._grammars.compile("json", _of(attempt, self._column or ""))
        answer = grammar.copy()
        try:
            for token in self._tokenizer.encode(attempt.answer.strip()):
                if not answer.allowed()[token]:
                    return False
                if answer.accept(token):
                    return attempt.answer.strip().endswith(("}", "]"))
            return any(bool(answer.allowed()[end]) for end in self._ends)
        except GrammarError:
            return False


# Programs, judges, functions -----------------------------------------------------------------------------------------

_FENCE = re.compile(r"```(?:python|py)?[ \t]*\n(.*?)(?:\n```|\Z)", re.DOTALL)


def _code(section: RewardSection, services: Services) -> Reward:
    run = services.run_programs
    if run is None:
        raise ConfigError("a reward of code needs a sandbox: start the run by `quadriga tune`, or hand one to tune()")
    column = section.column or "test"

    def reward(attempts: Sequence[Attempt]) -> list[float]:
        programs = []
        for one in attempts:
            fenced = _FENCE.search(one.answer)
            programs.append("\n".join((fenced[1] if fenced else one.answer, _of(one, column), "")))
        return [float(passed) for passed in run(programs, section.timeout_s)]

    return reward


def _judge(section: RewardSection, services: Services) -> Reward:
    if services.judge is None:
        raise ConfigError("a reward of a judge needs a client: start the run by `quadriga tune`, or hand one to tune()")
    ask = services.judge(section.url or "", section.model or "")

    def reward(attempts: Sequence[Attempt]) -> list[float]:
        asked = [
            section.prompt.replace("{question}", one.prompt).replace("{answer}", one.answer).replace(
                "{wanted}", one.wanted
            )
            for one in attempts
        ]  # fmt: skip
        marks = [_last_number(verdict) for verdict in ask(asked)]
        return [0.0 if mark is None else min(max(mark / 10, 0.0), 1.0) for mark in marks]

    return reward


def _function(name: str) -> Reward:
    module, _, function = name.partition(":")
    try:
        found = getattr(importlib.import_module(module), function)
    except Exception as error:  # importing runs the module, which may raise anything
        raise ConfigError(f"the reward's function {name!r} cannot be imported: {error}") from error
    if not callable(found):
        raise ConfigError(f"the reward's function {name!r} must be a function, got {found!r:.60}")

    def reward(attempts: Sequence[Attempt]) -> list[float]:
        try:
            return list(found(attempts))
        except Exception as error:
            raise TrainingError(f"the reward's function {name!r} raised {type(error).__name__}: {error}") from error

    return reward
