"""What comes for requests of the offline API: events in an inbox, read one by one or gathered into whole answers."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Mapping
from types import TracebackType

from quadriga.engine.engine import Event
from quadriga.engine.request import Completion, PromptReport, Request, TokenEvent
from quadriga.errors import QuadrigaError


class Inbox:
    """What has come for one call's requests: filled in any thread's turn, emptied by the thread that made the call."""

    def __init__(self) -> None:
        self.arrived: deque[tuple[int, float, Event]] = deque()
        """(request, when, what); an error is the last that comes for its request."""
        self.n_finished = 0
        self.closed = False

    def put(self, request_id: int, now: float, event: Event) -> None:
        """The next event of one of the requests."""
        self.arrived.append((request_id, now, event))
        self.n_finished += not isinstance(event, TokenEvent) or event.finish_reason is not None

    def has_finished(self, n: int) -> bool:
        """True if so many requests are done or have failed."""
        return self.n_finished >= n

    def has_news(self) -> bool:
        """True if whoever reads event by event has not to wait."""
        return bool(self.arrived) or self.closed


class Answer(Generator[TokenEvent, None, None]):
    """Tokens as they are made. Closing it, or letting it go, ends the answer and frees its blocks, begun or not.

    A generator by its methods, not by its making: one that was never begun would not run its end.

    Args:
        inbox: where its events come.
        wait: takes part in passes until the inbox has news.
        end: called once, when nobody wants more of it.
    """

    def __init__(self, inbox: Inbox, wait: Callable[[], None], end: Callable[[], None]) -> None:
        self._inbox, self._wait, self._end = inbox, wait, end

    def send(self, value: None) -> TokenEvent:
        """The next token; the last one carries its finish_reason.

        Raises:
            StopIteration: that was the last one, or the answer was closed.
            RequestError, AnswerError: the answer cannot go on.
        """
        inbox = self._inbox
        while not inbox.closed:
            if inbox.arrived:
                event = inbox.arrived.popleft()[2]
                if isinstance(event, QuadrigaError):
                    self.close()
                    raise event
                assert isinstance(event, TokenEvent), "an answer is made of tokens"
                if event.finish_reason is not None:
                    self.close()
                return event
            try:
                self._wait()
            except BaseException:
                self.close()
                raise
        raise StopIteration

    def throw(
        self,
        kind: type[BaseException] | BaseException,
        value: object = None,
        traceback: TracebackType | None = None,
        /,
    ) -> TokenEvent:
        """End the answer with an exception, as a generator does."""
        self.close()
        raise value if isinstance(value, BaseException) else kind

    def close(self) -> None:
        """End the answer; its blocks are free before the engine's next pass."""
        if not self._inbox.closed:
            self._inbox.closed = True
            self._end()

    def __del__(self) -> None:
        self.close()


def completions(inbox: Inbox, asked: Mapping[int, Request], started: float) -> list[Completion]:
    """The answers to requests that are done or have failed, in the order in which they were asked.

    Args:
        asked: request id -> request.
        started: when, on time.perf_counter's clock.
    """
    made: dict[int, list[tuple[float, TokenEvent]]] = {request_id: [] for request_id in asked}
    failed: dict[int, QuadrigaError] = {}
    for request_id, now, event in inbox.arrived:
        if isinstance(event, TokenEvent):
            made[request_id].append((now, event))
        elif isinstance(event, QuadrigaError):
            failed[request_id] = event
    answers = []
    for request_id, events in made.items():
        first, last = (events[0][0], events[-1][0]) if events else (started, started)
        tokens, n_prompt = [event for _, event in events], len(asked[request_id].prompt)
        answers.append(_completion(tokens, n_prompt, first - started, last - first, failed.get(request_id)))
    return answers


def _completion(
    made: list[TokenEvent], n_prompt_tokens: int, first_s: float, decode_s: float, error: QuadrigaError | None = None
) -> Completion:
    finish = made[-1].finish_reason if error is None else "error"
    report = made[0].prompt if made else PromptReport(n_cached_tokens=0)
    assert finish is not None and report is not None, "the first event reports the prompt, the last why it ended"
    return Completion(
        text="".join(event.text for event in made),
        token_ids=[event.token_id for event in made],
        logprobs=[event.logprob for event in made],
        top_logprobs=[event.top_logprobs for event in made] if any(event.top_logprobs for event in made) else [],
        finish_reason=finish,
        error=error,
        n_prompt_tokens=n_prompt_tokens,
        prompt_logprobs=list(report.logprobs),
        n_cached_tokens=report.n_cached_tokens,
        time_to_first_token_s=first_s,
        decode_s=decode_s,
    )
