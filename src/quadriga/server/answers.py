"""Answers under way: several choices as one stream of events, with their counts and times."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from quadriga.engine.async_engine import Made, Stream
from quadriga.engine.request import PromptReport, TokenEvent
from quadriga.server.errors import ApiError
from quadriga.server.sse import EventSender


@dataclass
class Choice:
    """One answer as far as it has come."""

    index: int
    events: list[TokenEvent] = field(default_factory=list)
    finish_reason: str | None = None
    prompt: PromptReport | None = None

    @property
    def text(self) -> str:
        """What has come of it."""
        return "".join(event.text for event in self.events)


class Answers:
    """Some requests under way, as one stream of (choice, event).

    Args:
        streams: one for each answer.
        n_prompt_tokens: of all prompts.
        deadline_s: when they are given up.
        ended: called once, when all of it is over.
    """

    def __init__(
        self,
        streams: Sequence[Stream],
        n_prompt_tokens: int,
        deadline_s: float | None,
        ended: Callable[[Answers], None] = lambda _: None,
    ) -> None:
        self._streams, self._inbox, self.n_prompt_tokens = streams, streams[0].inbox, n_prompt_tokens
        self._ended: Callable[[Answers], None] | None = ended
        self.choices = [Choice(i) for i in range(len(streams))]
        self._choice_of = dict(zip(streams, self.choices, strict=True))
        self.started = time.perf_counter()
        self.first: float | None = None
        late = ApiError(504, "the answer was not complete at its deadline", code="deadline_exceeded")
        self._alarm = None
        if deadline_s is not None:
            self._alarm = asyncio.get_running_loop().call_later(deadline_s, self._inbox.fail, late)

    async def batches(self) -> AsyncIterator[list[tuple[Choice, TokenEvent]]]:
        """Whatever has come, as soon as something has; ends with the last answer.

        Raises:
            QuadrigaError: an answer failed, or was not complete at its deadline.
        """
        try:
            while any(choice.finish_reason is None for choice in self.choices):
                yield self._noted(await self._inbox.take())
        finally:
            self.close()

    def _noted(self, items: Sequence[tuple[Stream, Made]]) -> list[tuple[Choice, TokenEvent]]:
        """What has come, put down to the choices that it belongs to."""
        if self.first is None:
            self.first = time.perf_counter()
        batch: list[tuple[Choice, TokenEvent]] = []
        for stream, event in items:
            assert isinstance(event, TokenEvent), "an answer is made of tokens"
            choice = self._choice_of[stream]
            choice.events.append(event)
            choice.prompt = choice.prompt or event.prompt
            choice.finish_reason = event.finish_reason
            batch.append((choice, event))
        return batch

    async def send(self, sender: EventSender, write: Callable[[Choice, TokenEvent], None]) -> None:
        """Every event as it comes, to the last; see :meth:`batches` for what it raises.

        What comes between an answer's ends goes to the client in the turn of the loop that brings it, without waking
        this task, as long as the client keeps up.

        Args:
            sender: what is written leaves through it, all of a step at once.
            write: writes one event into it.
        """

        def at_once(items: Sequence[tuple[Stream, Made]]) -> bool:
            ends = any(isinstance(event, TokenEvent) and event.finish_reason is not None for _, event in items)
            if ends or not sender.is_open:
                return False
            for choice, event in self._noted(items):
                write(choice, event)
            sender.push()
            return True

        self._inbox.at_once = at_once
        async for batch in self.batches():
            for choice, event in batch:
                write(choice, event)
            await sender.flush()

    async def collect(self) -> None:
        """Run all of them to their end; see :meth:`batches` for what it raises."""
        async for _ in self.batches():
            pass

    def close(self) -> None:
        """Drop whatever still runs."""
        self._inbox.at_once = None
        if self._alarm is not None:
            self._alarm.cancel()
        for stream in self._streams:
            stream.close()
        ended, self._ended = self._ended, None
        if ended is not None:
            ended(self)

    @property
    def n_made(self) -> int:
        """Tokens made so far."""
        return sum(len(choice.events) for choice in self.choices)

    def n_bytes(self, n_logprobs: int = 0) -> int:
        """About how many bytes the answers are as JSON, with so many log-probabilities (or their like) a token."""
        prompts = sum(len(choice.prompt.logprobs) for choice in self.choices if choice.prompt is not None)
        return (8 + 64 * n_logprobs) * (prompts + sum(len(choice.events) for choice in self.choices))

    def usage(self) -> dict[str, Any]:
        """Token counts as OpenAI writes them."""
        made = self.n_made
        reports = [choice.prompt for choice in self.choices if choice.prompt is not None]
        return {
            "prompt_tokens": self.n_prompt_tokens,
            "completion_tokens": made,
            "total_tokens": self.n_prompt_tokens + made,
            "prompt_tokens_details": {"cached_tokens": reports[0].n_cached_tokens if reports else 0, "audio_tokens": 0},
            "completion_tokens_details": {
                "reasoning_tokens": 0,
                "audio_tokens": 0,
                "accepted_prediction_tokens": 0,
                "rejected_prediction_tokens": 0,
            },
        }

    def timings(self) -> dict[str, Any]:
        """How fast it went, in llama-server's words."""
        now, first = time.perf_counter(), self.first or time.perf_counter()
        made = self.n_made
        decode = now - first
        return {
            "prompt_n": self.n_prompt_tokens,
            "prompt_ms": round(1000 * (first - self.started), 3),
            "prompt_per_second": round(self.n_prompt_tokens / max(first - self.started, 1e-6), 3),
            "predicted_n": made,
            "predicted_ms": round(1000 * decode, 3),
            "predicted_per_second": round((made - 1) / decode, 3) if made > 1 and decode > 0 else 0.0,
        }
