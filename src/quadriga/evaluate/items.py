"""One question of a benchmark: the requests it makes to a model, and how the answer is graded. Plain values.

    ChoiceItem    several (context, continuation) pairs, one of them right      acc, acc_norm, acc_bytes, acc_tokens
    TruthItem     several continuations, each right or wrong                    mc2
    ClozeItem     one continuation that must be the most probable one           acc, logprob
    TextItem      a whole text                                                  logprob, words, bytes, tokens
    AnswerItem    a prompt whose generated answer is compared                   what its grader returns
    CodeItem      a prompt whose generated program is run                       passed of n samples
    TalkItem      a conversation of one or more answers, perhaps judged         what its grader returns

Continuations of different lengths can be compared in four ways, and published tables differ in which one they use, so
all are reported: by total log-probability (acc), per character (acc_norm, as in EleutherAI's harness), per UTF-8 byte
(acc_bytes; differs from acc_norm for Chinese) and per token (acc_tokens, as in the Gauntlet).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from math import exp

from quadriga.evaluate.model import Likelihood, Message

Scores = dict[str, float]


@dataclass(frozen=True, kw_only=True)
class ChoiceItem:
    """Choose the most probable of several pairs; a "schema" has one continuation after different contexts."""

    pairs: tuple[tuple[str, str], ...]
    gold: int
    texts: tuple[str, ...] = ()
    """The texts whose lengths normalise the scores; default: the continuations (which may include a delimiter)."""
    group: str = ""
    """A subject; the scores of each group are also averaged separately."""

    def grade(self, answers: Sequence[Likelihood]) -> Scores:
        """1 or 0 for each way to compare; of equal choices the first counts as chosen."""
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
    """Several answers, each true or false; the score is the probability mass on the true ones (TruthfulQA's MC2)."""

    context: str
    continuations: tuple[str, ...]
    truths: tuple[bool, ...]
    group: str = ""

    @property
    def pairs(self) -> tuple[tuple[str, str], ...]:
        """What the model is asked."""
        return tuple((self.context, continuation) for continuation in self.continuations)

    def grade(self, answers: Sequence[Likelihood]) -> Scores:
        """mc2: p summed over true answers / p summed over all, after subtracting the largest log-probability."""
        largest = max(answer.logprob for answer in answers)
        masses = [exp(answer.logprob - largest) for answer in answers]
        return {"mc2": sum(m for m, true in zip(masses, self.truths, strict=True) if true) / sum(masses)}


@dataclass(frozen=True, kw_only=True)
class ClozeItem:
    """The end of a text, which must be the model's greedy continuation token by token."""

    context: str
    continuation: str
    group: str = ""

    @property
    def pairs(self) -> tuple[tuple[str, str], ...]:
        """What the model is asked."""
        return ((self.context, self.continuation),)

    def grade(self, answers: Sequence[Likelihood]) -> Scores:
        """acc: 1 if every token was the most probable one, else 0; logprob: of the continuation."""
        return {"acc": float(answers[0].greedy), "logprob": answers[0].logprob}


@dataclass(frozen=True, kw_only=True)
class TextItem:
    """A whole text, scored for perplexity."""

    text: str
    group: str = ""

    def grade(self, answer: Likelihood) -> Scores:
        """Total log-probability, and the counts of words, bytes and tokens it is divided by."""
        return {
            "logprob": answer.logprob,
            "words": float(len(self.text.split())),
            "bytes": float(len(self.text.encode())),
            "tokens": float(answer.n_tokens),
        }


@dataclass(frozen=True, kw_only=True)
class AnswerItem:
    """A prompt whose generated answer is graded by ``grader``."""

    prompt: str
    grader: Callable[[str], Scores] = field(repr=False)
    group: str = ""

    def grade(self, answer: str) -> Scores:
        """The scores that ``grader`` gives the answer."""
        return self.grader(answer)


@dataclass(frozen=True, kw_only=True)
class CodeItem:
    """A prompt whose answers are run as programs; ``program`` joins an answer with the task's tests."""

    prompt: str
    program: Callable[[str], str] = field(repr=False)
    canonical: str = ""
    """The published solution; used to check that runner and tests work."""
    group: str = ""


@dataclass(frozen=True, kw_only=True)
class TalkItem:
    """A conversation in a chat model's turns, graded by a rule or by a judge's verdicts.

    Attributes:
        turns: the messages before each answer: a system's and a user's, then the next user's...
        grader: (the model's answers, the judge's verdicts) -> scores.
        asks: the model's answers -> what the judge is asked, a conversation for each verdict; None: no judge.
        temperature: of the model's answers.
    """

    turns: tuple[tuple[Message, ...], ...]
    grader: Callable[[Sequence[str], Sequence[str]], Scores] = field(repr=False)
    asks: Callable[[Sequence[str]], Sequence[Sequence[Message]]] | None = field(default=None, repr=False)
    temperature: float = 0.0
    group: str = ""


Item = ChoiceItem | TruthItem | ClozeItem | TextItem | AnswerItem | CodeItem | TalkItem
