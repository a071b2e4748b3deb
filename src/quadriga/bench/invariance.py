"""Whether a server's answers depend on who else asks: the same seeded requests alone, and in crowds.

    alone         one request at a time: what every later answer is compared with
    alone again   the same once more: what differs here is not its neighbours' doing (cached prompts, random numbers)
    crowd of n    n requests at any time, in another order

Of two answers to one request every place counts whose tokens differ, a missing one too; log-probabilities are compared,
to the bit, as far as the tokens before them are the same, because beyond that they are of different texts.
"""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import Awaitable, Callable, Iterable, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any, Protocol

from quadriga.bench.http_client import Connection, Target, said
from quadriga.bench.serve import prose
from quadriga.engine.request import Completion, SamplingParams
from quadriga.errors import EndpointError

DRAWN_AT = 0.8
"""Temperature of every second request; the others are greedy."""


@dataclass(frozen=True, kw_only=True)
class Question:
    """A request that has one right answer: greedy, or drawn from a seed."""

    prompt: str
    max_tokens: int
    temperature: float
    seed: int


@dataclass(frozen=True, kw_only=True)
class Reply:
    """What came back."""

    tokens: tuple[str | int, ...]
    """Ids or texts of tokens; characters, of a server that tells neither."""
    logprobs: tuple[float, ...] | None
    """Of each token; None: the server gives none."""
    finish_reason: str | None


Ask = Callable[[Question], Awaitable[Reply]]


class Generates(Protocol):
    """What is needed of a model in this process."""

    def generate(self, prompt: str, params: SamplingParams) -> Completion:
        """Continue a prompt to its end."""
        ...


@dataclass(frozen=True, kw_only=True)
class Difference:
    """How the answers of one round differ from those of requests that were alone."""

    crowd: int
    """Requests at once; 1: alone again."""
    requests: int
    requests_that_differ: int
    tokens: int
    """Of the longer answer of each pair."""
    tokens_that_differ: int
    logprobs: int
    """How many were compared; 0: the server gives none."""
    logprobs_that_differ: int
    largest_difference: float

    @property
    def found(self) -> bool:
        """True if anything differs."""
        return self.requests_that_differ > 0


def questions(
    n: int, *, prompt_tokens: int, max_tokens: int, temperature: float | None = None, seed: int = 0
) -> list[Question]:
    """``n`` different requests, the same for the same seed; their prompts have up to ``prompt_tokens`` tokens or so.

    Args:
        temperature: of all of them; None: half of them are greedy, half drawn at 0.8.
    """
    rng = random.Random(f"invariance {seed}")
    out = []
    for i in range(n):
        words = 5 * rng.randint(min(8, prompt_tokens), prompt_tokens)
        heat = temperature if temperature is not None else DRAWN_AT if i % 2 else 0.0
        out.append(
            Question(prompt=prose(rng, words), max_tokens=max_tokens, temperature=heat, seed=rng.getrandbits(31))
        )
    return out


async def measure(
    ask: Ask, asked: Sequence[Question], crowds: Iterable[int], told: Callable[[int, int, str], None]
) -> list[Difference]:
    """Ask all questions alone, alone again, and in each crowd.

    Args:
        told: called with (answers so far, answers in a round, the round).

    Raises:
        EndpointError: a request was refused, or its answer is none.
    """
    alone = await _round(ask, asked, 1, list(range(len(asked))), told, "alone")
    rows = []
    for crowd in (1, *crowds):
        order = list(range(len(asked)))
        random.Random(crowd).shuffle(order)
        replies = await _round(ask, asked, crowd, order, told, label(crowd))
        rows.append(difference(crowd, alone, replies))
    return rows


def label(crowd: int) -> str:
    """A round as tables show it."""
    return "alone again" if crowd == 1 else f"crowd of {crowd}"


async def _round(
    ask: Ask,
    asked: Sequence[Question],
    crowd: int,
    order: list[int],
    told: Callable[[int, int, str], None],
    name: str,
) -> list[Reply]:
    replies: dict[int, Reply] = {}
    left = iter(order)

    async def client() -> None:
        for i in left:
            replies[i] = await ask(asked[i])
            told(len(replies), len(asked), name)

    try:
        async with asyncio.TaskGroup() as group:
            for _ in range(min(crowd, len(asked))):
                group.create_task(client())
    except BaseExceptionGroup as errors:
        raise errors.exceptions[0] from None
    return [replies[i] for i in range(len(asked))]


def difference(crowd: int, alone: Sequence[Reply], crowded: Sequence[Reply]) -> Difference:
    """Compare the replies of one round with those of the first, question by question."""
    requests = tokens = tokens_off = logprobs = logprobs_off = 0
    largest = 0.0
    for one, other in zip(alone, crowded, strict=True):
        off = sum(a != b for a, b in zip_longest(one.tokens, other.tokens))
        gaps = _gaps(one, other)
        moved = [gap for gap in gaps if gap != 0]
        tokens += max(len(one.tokens), len(other.tokens))
        tokens_off += off
        logprobs += len(gaps)
        logprobs_off += len(moved)
        largest = max([largest, *moved])
        requests += bool(off or moved or one.finish_reason != other.finish_reason)
    return Difference(
        crowd=crowd,
        requests=len(alone),
        requests_that_differ=requests,
        tokens=tokens,
        tokens_that_differ=tokens_off,
        logprobs=logprobs,
        logprobs_that_differ=logprobs_off,
        largest_difference=largest,
    )


def _gaps(one: Reply, other: Reply) -> list[float]:
    """|difference| of the log-probabilities of the tokens that both begin with."""
    if one.logprobs is None or other.logprobs is None:
        return []
    gaps = []
    for a, b, p, q in zip(one.tokens, other.tokens, one.logprobs, other.logprobs, strict=False):
        if a != b:
            break
        gaps.append(abs(p - q))
    return gaps


def model_in_process(model: Generates, threads: Executor) -> Ask:
    """Ask a model of this process, each question in a thread of its own."""

    async def ask(question: Question) -> Reply:
        params = SamplingParams(
            max_new_tokens=question.max_tokens, temperature=question.temperature, seed=question.seed
        )
        loop = asyncio.get_running_loop()
        done = await loop.run_in_executor(threads, model.generate, question.prompt, params)
        return Reply(tokens=tuple(done.token_ids), logprobs=tuple(done.logprobs), finish_reason=done.finish_reason)

    return ask


class ServerAsked:
    """Asks a server with OpenAI's interface, over connections that are kept.

    Args:
        model: what the server calls it.
        chat: /chat/completions; False: /completions.
    """

    def __init__(self, at: Target, model: str, *, chat: bool, timeout_s: float) -> None:
        self._at, self._model, self._chat, self._timeout_s = at, model, chat, timeout_s
        self._idle: list[Connection] = []

    async def __call__(self, question: Question) -> Reply:
        """The reply to a question.

        Raises:
            EndpointError: no connection, no answer in time, a refusal, or an answer of another kind.
        """
        connection = self._idle.pop() if self._idle else Connection(self._at)
        path = "/chat/completions" if self._chat else "/completions"
        try:
            async with asyncio.timeout(self._timeout_s):
                exchange = await connection.request("POST", path, self.body(question))
        except TimeoutError:
            raise EndpointError(
                f"{self._at.authority} did not answer within {self._timeout_s:g} s; give --timeout more"
            ) from None
        except OSError as error:
            raise EndpointError(f"{self._at.authority}: {error or type(error).__name__}") from None
        self._idle.append(connection)
        if exchange.status != 200:
            raise EndpointError(f"{self._at.authority} answers {exchange.status}: {said(bytes(exchange.body))}")
        return reply(bytes(exchange.body))

    def body(self, question: Question) -> bytes:
        """A question as the interface has it."""
        fields: dict[str, Any] = {"model": self._model, "max_tokens": question.max_tokens, "stream": False}
        fields |= {"temperature": question.temperature, "seed": question.seed}
        if self._chat:
            fields |= {"messages": [{"role": "user", "content": question.prompt}], "logprobs": True}
        else:
            fields |= {"prompt": question.prompt, "logprobs": 1}
        return json.dumps(fields).encode()

    def close(self) -> None:
        """Close all connections."""
        for connection in self._idle:
            connection.close()
        self._idle.clear()


def reply(body: bytes) -> Reply:
    """An answer's tokens and their log-probabilities, in either of OpenAI's two forms.

    Raises:
        EndpointError: it is no such answer.
    """
    try:
        (choice,) = json.loads(body)["choices"]
        message = choice.get("message") or {}
        parts = (message.get("reasoning_content"), message.get("content"), choice.get("text"))
        listed = choice.get("logprobs") or {}
        if listed.get("content"):
            tokens = [one["token"] for one in listed["content"]]
            logprobs = [float(one["logprob"]) for one in listed["content"]]
        else:
            tokens = list(listed.get("tokens") or ())
            logprobs = [float(p) for p in listed.get("token_logprobs") or ()]
        reason = choice.get("finish_reason")
    except (ValueError, LookupError, TypeError, AttributeError):
        raise EndpointError(f"an answer is not the API's JSON: {body[:160].decode(errors='replace')}") from None
    if not tokens or len(tokens) != len(logprobs):
        return Reply(tokens=tuple("".join(filter(None, parts))), logprobs=None, finish_reason=reason)
    return Reply(tokens=tuple(tokens), logprobs=tuple(logprobs), finish_reason=reason)
