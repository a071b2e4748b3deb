"""Answers while their tokens are chosen: what belongs to one, the choice for a whole pass, and what a token means.

What raises in here is one request's own work, and ends that request alone (:func:`own_failure`).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from quadriga.engine.lookup import Lookup
from quadriga.engine.passes import Computed
from quadriga.engine.request import FinishReason, PromptReport, Request, TokenEvent
from quadriga.engine.sampler import Sample, Sampler, Unused, require_finite, top_logprobs
from quadriga.engine.sequences import Chunk, Running
from quadriga.errors import AnswerError, QuadrigaError, RequestError
from quadriga.kernels.cpu.sampling import TokenSampler
from quadriga.text.stream import Detokenizer

_log = logging.getLogger(__name__)


@dataclass(eq=False)
class Active:
    """A request in the engine."""

    request: Request
    running: Running
    sampler: Sampler
    text: Detokenizer | None
    ends: frozenset[int]
    lookup: Lookup | None
    prompt_logprobs: dict[int, tuple[float, tuple[tuple[int, float], ...]]] = field(default_factory=dict)
    """Prompt position -> log-probability of the token there, and the most probable tokens."""


@dataclass(eq=False)
class Turn:
    """An answer's part of a pass, while its tokens are chosen."""

    active: Active
    chunk: Chunk
    row: int
    """Of the logits: the first that a token is chosen from."""
    answered: list[TokenEvent] = field(default_factory=list)
    error: QuadrigaError | None = None
    going: bool = False
    """Another token is to be chosen."""

    def fail(self, raised: BaseException) -> None:
        """Its own work raised."""
        self.error, self.going = own_failure(raised), False


def instead_of(active: Active, answered: Sequence[TokenEvent]) -> Callable[[int], int] | None:
    """What a constraint takes in place of a chosen token, as it knows how many more may come; None: it never does."""
    choose = getattr(active.request.constraint, "choose", None)
    if choose is None:
        return None
    left = active.running.max_tokens - len(active.running.tokens) - len(answered)
    return lambda token: int(choose(token, left))


def event_of(active: Active, chosen: Sample, n_before: int) -> TokenEvent:
    """What a request's next token means for its text and its end; it is the ``n_before``-th of this pass."""
    running, constraint = active.running, active.request.constraint
    ended = chosen.token_id in active.ends
    complete = constraint is not None and not ended and constraint.accept(chosen.token_id)
    n_made = len(running.tokens) + n_before + 1
    may_stop = n_made - running.n_prompt >= active.request.params.min_new_tokens
    piece, hit_stop = "", False
    if active.text is not None and not ended:
        piece, hit_stop = active.text.push(chosen.token_id, may_stop=may_stop)
    full = n_made >= running.max_tokens
    last = ended or hit_stop or full or complete
    if last and not hit_stop and active.text is not None:
        piece += active.text.finish(whole_characters=True)
    reason: FinishReason | None = None
    if last:
        reason = "stop" if ended or hit_stop or complete else "length"
    report = None
    if len(running.tokens) + n_before == running.n_prompt:
        scored = active.prompt_logprobs
        in_order = [scored[position] for position in sorted(scored)]
        report = PromptReport(
            n_cached_tokens=running.n_cached,
            logprobs=tuple(logprob for logprob, _ in in_order),
            top_logprobs=tuple(top for _, top in in_order),
        )
    return TokenEvent(
        token_id=chosen.token_id,
        text=piece,
        logprob=chosen.logprob,
        top_logprobs=chosen.top_logprobs,
        finish_reason=reason,
        prompt=report,
    )


def own_failure(error: BaseException) -> QuadrigaError:
    """What a request is told when its own work raised, whatever it raised: a panic in a Rust library is no Exception.

    Raises:
        KeyboardInterrupt: if it is one; somebody at the keyboard means the whole process.
    """
    if isinstance(error, KeyboardInterrupt):
        raise error
    if isinstance(error, RequestError):
        return error
    kind = type(error).__name__
    _log.error("an answer failed with %s; the others go on", kind, exc_info=error)
    failure = AnswerError(
        f"this answer failed by a mistake of ours ({kind}); the log says more. Others are not affected."
    )
    failure.__cause__ = error
    return failure


def choose(turns: Sequence[Turn], made: Computed, kernels: TokenSampler | None) -> None:
    """The next token of each of these answers; the kernels choose all of them at once."""
    asked, settings, places = [], [], []
    for turn in turns:
        constraint, sampler, at = turn.active.request.constraint, turn.active.sampler, turn.row + len(turn.answered)
        try:
            allowed = None if constraint is None else constraint.allowed()
            if kernels is not None:
                settings.append(sampler.ask(allowed))
                asked.append(turn)
                places.append(at)
            else:
                chosen = sampler.sample(
                    made.logits[at], made.best[at], made.log_sums[at], allowed, instead_of(turn.active, turn.answered)
                )
                _answered(turn, chosen, made)
        except BaseException as raised:
            turn.fail(raised)
    if kernels is None or not asked:
        return
    for turn, at, sampled in zip(asked, places, kernels.sample(made.logits, places, settings), strict=True):
        active = turn.active
        constrained, instead = active.request.constraint is not None, instead_of(active, turn.answered)
        try:
            chosen = active.sampler.take(sampled, made.logits[at], constrained=constrained, instead=instead)
            _answered(turn, chosen, made)
        except BaseException as raised:
            turn.fail(raised)


def _answered(turn: Turn, chosen: Sample, made: Computed) -> None:
    """A token was chosen; guesses go on as long as they are right."""
    active, chunk, i = turn.active, turn.chunk, len(turn.answered)
    event = event_of(active, chosen, i)
    if active.request.routing:
        event = made.with_routing(event, turn.row + i)
    turn.answered.append(event)
    guesses = chunk.tokens[len(chunk.tokens) - chunk.n_draft :] if chunk.n_draft else ()
    turn.going = event.finish_reason is None and i < len(guesses) and guesses[i] == event.token_id


def score_prompt(active: Active, chunk: Chunk, made: Computed, row: int, unused: Unused) -> None:
    """Note what the pass says of a prompt's tokens."""
    tokens, n_prompt, n_top = chunk.sequence.tokens, chunk.sequence.n_prompt, active.sampler.n_top
    n = min(len(chunk.tokens), n_prompt - 1 - chunk.start)
    if n <= 0:
        return
    rows, log_sums = made.logits[row : row + n], made.log_sums[row : row + n]
    require_finite(log_sums)
    following = tokens[chunk.start + 1 : chunk.start + 1 + n]
    own = (rows[np.arange(n), following].astype(np.float64) - log_sums).tolist()
    top = top_logprobs(rows, log_sums, n_top, unused) if n_top else [()] * n
    for i in range(n):
        active.prompt_logprobs[chunk.start + i + 1] = (own[i], top[i])
