"""One question of a benchmark: what it asks of a model, and how an answer is graded. Plain values.

    ChoiceItem    several (context, continuation) pairs, one of them right      acc, acc_norm, acc_bytes, acc_tokens
    TruthItem     several continuations, each right or wrong                    mc2
    ClozeItem     one continuation that must be the most probable one           acc, logprob
    TextItem      a whole text                                                  logprob, words, bytes, tokens
    AnswerItem    a prompt whose generated answer is compared                   what its grader gives
    CodeItem      a prompt whose generated program is run                       passed of n samples

The three ways to compare continuations of different lengths are all kept, because published tables differ in which
they mean: by total log-probability (acc), per character (acc_norm, what EleutherAI's harness calls so), per UTF-8 byte
(acc_bytes; differs for Chinese), and per token (acc_tokens, the Gauntlet's).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from math import exp

from quadriga.evaluate.model import Likelihood

Scores = dict[str, float]


@dataclass(frozen=True, kw_only=True)
class ChoiceItem:
    """Choose the most probable of several pairs; a "schema" has one continuation after different contexts."""

    pairs: tuple[tuple[str, str], ...]
    gold: int
    texts: tuple[str, ...] = ()
    """What lengths are counted of, where a continuation carries a delimiter; default: the continuations."""
    group: str = ""
    """A subject, whose scores are also averaged on their own."""

    def grade(self, answers: Sequence[Likelihood]) -> Scores:
        """1 or 0 by each way of comparing; the first of equals counts."""
        texts = self.texts or tuple(continuation for _, continuation in self.pairs)
        totals = [answer.logprob for answer in answers]
        ways = {
            "acc": totals,
            "acc_norm": [p / max(1, len(text)) for p, text in zip(totals, texts, strict=True)],
            "acc_bytes": [p / max(1, len(text.encode())) for p, text in zip(totals, texts, strict=True)],
            "acc_tokens": [p / answer.n_tokens for p, answer in zip(totals, answers, strict=True)],
        }
        return {name: float(values.index(max(values)) == self.gold) for name, values in ways.items()}


@dataclass(frozen=True, kw_only=True)
class TruthItem:
    """Probability mass of the true answers among all that are offered (TruthfulQA's MC2)."""

    context: str
    continuations: tuple[str, ...]
    truths: tuple[bool, ...]
    group: str = ""

    @property
    def pairs(self) -> tuple[tuple[str, str], ...]:
        """What the model is asked."""
        return tuple((self.context, continuation) for continuation in self.continuations)

    def grade(self, answers: Sequence[Likelihood]) -> Scores:
        """Normalised over the offered answers; the largest exponent is taken out first."""
        largest = max(answer.logprob for answer in answers)
        masses = [exp(answer.logprob - largest) for answer in answers]
        return {"mc2": sum(m for m, true in zip(masses, self.truths, strict=True) if true) / sum(masses)}


@dataclass(frozen=True, kw_only=True)
class ClozeItem:
    """A text's end that the model must find most probable, token by token."""

    context: str
    continuation: str
    group: str = ""

    @property
    def pairs(self) -> tuple[tuple[str, str], ...]:
        """What the model is asked."""
        return ((self.context, self.continuation),)

    def grade(self, answers: Sequence[Likelihood]) -> Scores:
        """Right or wrong, and how probable."""
        return {"acc": float(answers[0].greedy), "logprob": answers[0].logprob}


@dataclass(frozen=True, kw_only=True)
class TextItem:
    """A text to be scored whole."""

    text: str
    group: str = ""

    def grade(self, answer: Likelihood) -> Scores:
        """What perplexities are made of."""
        return {
            "logprob": answer.logprob,
            "words": float(len(self.text.split())),
            "bytes": float(len(self.text.encode())),
            "tokens": float(answer.n_tokens),
        }


@dataclass(frozen=True, kw_only=True)
class AnswerItem:
    """A prompt whose continuation is graded by a function of the answer."""

    prompt: str
    grader: Callable[[str], Scores] = field(repr=False)
    group: str = ""

    def grade(self, answer: str) -> Scores:
        """What the task's grader says."""
        return self.grader(answer)


@dataclass(frozen=True, kw_only=True)
class CodeItem:
    """A prompt whose continuations become programs; ``program`` puts one together with the task's tests."""

    prompt: str
    program: Callable[[str], str] = field(repr=False)
    canonical: str = ""
    """The published solution: proves the runner and the tests."""
    group: str = ""


Item = ChoiceItem | TruthItem | ClozeItem | TextItem | AnswerItem | CodeItem
