"""The engine: many requests on one model, a token of each at a time.

    submit(Request) ─► scheduler ─► PassPlan ─► PassBatch ─► runner.forward ─► sample ─► scheduler.commit ─► TokenEvents
                           ▲                                                            │
                           └──────────────────────── step() ────────────────────────────┘

One thread calls :meth:`Engine.step` again and again; everything it returns is values. A request's tokens and
log-probabilities depend on the request alone: sampling state belongs to it, and the CPU's kernels give the same bits
whatever shares the batch, however the prompt was cut, and whether its prefix was cached.

A token that a grammar takes long over is chosen beside the passes, from a copy of its logits, and the answer sits out
the passes until it is there. Texts to embed go through the same passes as prompts do.

A request's own work (guessing, sampling, its grammar, its text, its log-probabilities) fails for that request alone,
whatever the exception; what all share (scheduling, the pass through the model) raises out of :meth:`Engine.step`.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import cast

import numpy as np

from quadriga.engine.blocks import BlockTable
from quadriga.engine.disk_cache import DiskCache, KeptBlocks
from quadriga.engine.dry import Breakers, Spellings
from quadriga.engine.lookup import Lookup
from quadriga.engine.pace import Pace
from quadriga.engine.permitted import bad_sequences
from quadriga.engine.pooling import Pooling
from quadriga.engine.request import (
    Embed,
    Embedding,
    FinishReason,
    PromptReport,
    Request,
    Routing,
    SamplingParams,
    TokenEvent,
)
from quadriga.engine.sampler import Sample, Sampler, Unused, require_finite, top_logprobs
from quadriga.engine.scheduler import Chunk, PassPlan, Running, Scheduler
from quadriga.engine.steering import salt_of, steering_of
from quadriga.errors import AnswerError, BusyError, ConfigError, QuadrigaError, RequestError
from quadriga.kernels.cpu.program import PassBatch
from quadriga.model.steering import router_shift
from quadriga.quant.packed import BLOCK_TOKENS
from quadriga.runners.base import Adapters, Floats, LayerRouting, PassResult, Runner
from quadriga.runtime import Lane
from quadriga.text.stream import Detokenizer
from quadriga.text.tokenizer import Tokenizer

_log = logging.getLogger(__name__)

Event = TokenEvent | Embedding | QuadrigaError
"""What a step has for a request: a token, a text's vector, or why there will be no more."""

HELD_WAIT_S = 0.01
"""A step in which everything waits for a token to be chosen waits so long for one; then it lets commands in between."""


@dataclass(eq=False)
class _Active:
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
class _Turn:
    """An answer's part of a pass, while its tokens are chosen."""

    active: _Active
    chunk: Chunk
    row: int
    """Of the logits: the first that a token is chosen from."""
    answered: list[TokenEvent] = field(default_factory=list)
    error: QuadrigaError | None = None
    going: bool = False
    """Another token is to be chosen."""

    def fail(self, raised: BaseException) -> None:
        """Its own work raised."""
        self.error, self.going = _own_failure(raised), False


@dataclass(eq=False)
class _Embedded:
    """A text in the engine."""

    running: Running
    pooling: Pooling


@dataclass(eq=False)
class _Held:
    """An answer whose next token is being chosen beside the passes."""

    active: _Active
    choice: Future[TokenEvent]
    finish: Callable[[TokenEvent], TokenEvent]
    """Puts into the event what the pass knows of it."""


@dataclass(frozen=True)
class EngineStats:
    """Counters since the engine was made, and its state now."""

    n_running: int
    n_waiting: int
    kv_blocks_used: int
    kv_blocks: int
    n_steps: int
    n_prompt_tokens: int
    n_cached_tokens: int
    n_generated_tokens: int
    n_preemptions: int
    n_guessed: int
    n_guessed_right: int


class Engine:
    """See the module docstring.

    Args:
        runner: the model.
        tokenizer: for text and stop strings; None where prompts and answers are token ids only.
        max_batch_tokens: tokens of one pass.
        max_sequences: requests that run at once; the others wait.
        prefix_cache: keep finished prefixes to be found again.
    """

    def __init__(
        self,
        runner: Runner,
        tokenizer: Tokenizer | None = None,
        *,
        end_ids: frozenset[int] = frozenset(),
        max_batch_tokens: int = 2048,
        max_sequences: int = 64,
        prefix_cache: bool = True,
    ) -> None:
        self.runner, self.config, self.tokenizer = runner, runner.config, tokenizer
        self.end_ids, self.max_sequences = end_ids, max_sequences
        self._spellings: Spellings | None = None
        """Of the tokenizer, once an answer asks for them."""
        rows = [] if tokenizer is None else tokenizer.unused_rows(self.config.vocab_size)
        # A checkpoint may name an end token that its vocabulary does not list: it still ends answers.
        self.unused = Unused(i for i in rows if i not in end_ids)
        self.scheduler = Scheduler(
            runner.n_blocks,
            max_batch_tokens=max_batch_tokens,
            max_sequences=max_sequences,
            prefix_cache=prefix_cache,
            windows=runner.cache.windows,
            n_slots=runner.n_slots,
        )
        self.disk: DiskCache | None = None
        self.pace: Pace | None = None
        self._active: dict[int, _Active] = {}
        self._embeds: dict[int, _Embedded] = {}
        self._held: dict[int, _Held] = {}
        self._choosers = Lane("choosers", n_threads=2)
        self._next_id = 0
        self._steps = self._prompt_tokens = self._cached = self._generated = 0
        self._guessed = self._guessed_right = 0

    def keep_prefixes(self, folder: Path, max_bytes: int) -> None:
        """Keep the blocks of known prefixes in a directory too, and find them there; see ``disk_cache``.

        Raises:
            ConfigError: the folder cannot be used, or the model does not run on the CPU's kernels with all its weights.
        """
        if not hasattr(self.runner, "identity"):
            raise ConfigError(
                "a prefix cache on disk is for models that one process has on the CPU's kernels: not on torch, and not "
                "on several ranks. Leave one of the two out"
            )
        if self.config.is_recurrent:
            raise ConfigError(
                "a prefix cache on disk keeps keys and values, and this model's recurrent layers have states besides, "
                "without which a prefix is not taken up; leave it out"
            )
        blocks = cast(KeptBlocks, self.runner)
        self.disk = DiskCache(folder, max_bytes, blocks.identity(), blocks)
        self.scheduler.pool.backing = self.disk

    # Requests --------------------------------------------------------------------------------------------------------

    def share_time(self) -> None:
        """From now on, let nobody's work keep the answers of others waiting for longer than is fair; see ``pace``."""
        self.pace = self.scheduler.beside = Pace(self.scheduler.max_batch_tokens)

    def submit(self, request: Request | Embed, *, group: int | None = None) -> int:
        """Queue a request; its id.

        Args:
            group: the id of the first of those that were asked for together; they take one turn together.

        Raises:
            RequestError: an empty prompt, ids outside the model's table, a bias on an id that no token has, a prompt
                that fills the context or the cache.
        """
        prompt = list(request.prompt)
        if not prompt:
            raise RequestError("a prompt needs at least one token")
        if min(prompt) < 0 or max(prompt) >= self.config.vocab_size:
            raise RequestError(
                f"token ids must be from 0 to {self.config.vocab_size - 1}, got {min(prompt)} to {max(prompt)}"
            )
        if isinstance(request, Embed):
            return self._submit_embed(request, prompt, group)
        params = request.params
        if len(prompt) >= self.config.max_seq_len:
            raise RequestError(
                f"the prompt has {len(prompt)} tokens and the model's context is {self.config.max_seq_len}: "
                "no room for an answer. Shorten the prompt."
            )
        bad = self._bad_sequences(request)
        number = 0 if request.adapter is None else self.adapters().number(request.adapter)
        steering = self._steering(request)
        running = Running(
            request_id=self._next_id,
            tokens=prompt,
            max_tokens=min(len(prompt) + params.max_new_tokens, self.config.max_seq_len),
            priority=request.priority,
            salt=salt_of(request.salt, number, steering),
            adapter=number,
            steering=steering,
            all_logits=params.prompt_logprobs,
            client=request.client,
            group=-1 if group is None else group,
        )
        ends = frozenset(params.stop_ids) | (frozenset() if params.ignore_eos else self.end_ids)
        active = _Active(
            request=request,
            running=running,
            sampler=Sampler(params, prompt, self.config.vocab_size, self.unused, ends, bad, self._breakers(params)),
            text=None
            if self.tokenizer is None
            else Detokenizer(self.tokenizer, stop=params.stop, after=prompt, shown=request.shown),
            ends=ends,
            # A guess is checked against the model's choice, not against a grammar's.
            lookup=Lookup() if params.speculate and request.constraint is None else None,
        )
        self.scheduler.add(running)
        self._active[running.request_id] = active
        self._next_id += 1
        return running.request_id

    def _steering(self, request: Request) -> Floats | None:
        """What the request adds to the routers' logits.

        Raises:
            RequestError: experts that cannot be steered, or a runner that cannot.
        """
        if not request.steering:
            return None
        if not self.runner.can_steer:
            raise RequestError("experts cannot be steered: what computes this model does not support it")
        return router_shift(request.steering, self.config)

    def _bad_sequences(self, request: Request) -> list[tuple[int, ...]]:
        params = request.params
        if request.constraint is not None and (params.allowed_token_ids or params.bad_words):
            raise RequestError("allowed_token_ids and bad_words do not go beside a grammar: say it in the grammar")
        if params.bad_words and self.tokenizer is None:
            raise RequestError("bad_words are texts, and this model has no tokenizer; give logit_bias for token ids")
        return [] if self.tokenizer is None else bad_sequences(params.bad_words, self.tokenizer)

    def _breakers(self, params: SamplingParams) -> Breakers | None:
        texts = params.dry_sequence_breakers
        if not params.repeats_cost or not texts:
            return None
        if self.tokenizer is None:
            raise RequestError("dry_sequence_breakers are texts, and this model has no tokenizer; give none of them")
        if self._spellings is None:
            self._spellings = Spellings(self.tokenizer, self.config.vocab_size)
        return self._spellings.breakers(texts)

    def _submit_embed(self, request: Embed, prompt: list[int], group: int | None) -> int:
        if len(prompt) > self.config.max_seq_len:
            raise RequestError(f"{len(prompt)} tokens exceed the model's context of {self.config.max_seq_len}")
        number = 0 if request.adapter is None else self.adapters().number(request.adapter)
        running = Running(
            request_id=self._next_id,
            tokens=prompt,
            max_tokens=len(prompt),
            priority=request.priority,
            embeds=True,
            client=request.client,
            adapter=number,
            group=-1 if group is None else group,
        )
        self.scheduler.add(running)
        self._embeds[running.request_id] = _Embedded(running, Pooling(self.config.d_model))
        self._next_id += 1
        return running.request_id

    def adapters(self) -> Adapters:
        """The model's adapters: add and remove them here, between steps.

        Raises:
            RequestError: the model runs on the CPU's kernels, which know no adapters.
        """
        return self.runner.adapters()

    def remove_adapter(self, name: str) -> None:
        """Forget an adapter that no request uses any more.

        Raises:
            RequestError: there is none of this name, or it is answering.
        """
        number = self.adapters().number(name)
        running = [active.running for active in self._active.values()]
        running += [embedded.running for embedded in self._embeds.values()]
        busy = sum(one.adapter == number for one in running)
        if busy:
            raise RequestError(f"{busy} requests use the adapter {name!r}; let them end first")
        self.adapters().remove(name)

    def cancel(self, request_id: int) -> bool:
        """Drop a request wherever it is; its blocks are free at once. False if it is not here (any more)."""
        self._active.pop(request_id, None)
        self._embeds.pop(request_id, None)
        self._held.pop(request_id, None)
        return self.scheduler.cancel(request_id)

    def is_active(self, request_id: int) -> bool:
        """True if a request is waiting or running."""
        return request_id in self._active or request_id in self._embeds

    @property
    def has_work(self) -> bool:
        """True if any request is not finished."""
        return self.scheduler.has_work

    def stats(self) -> EngineStats:
        """Counters for people and metrics."""
        pool = self.scheduler.pool
        return EngineStats(
            n_running=len(self.scheduler.running),
            n_waiting=len(self.scheduler.waiting),
            kv_blocks_used=pool.n_blocks - pool.n_free,
            kv_blocks=pool.n_blocks,
            n_steps=self._steps,
            n_prompt_tokens=self._prompt_tokens,
            n_cached_tokens=self._cached,
            n_generated_tokens=self._generated,
            n_preemptions=self.scheduler.n_preemptions,
            n_guessed=self._guessed,
            n_guessed_right=self._guessed_right,
        )

    # A step ----------------------------------------------------------------------------------------------------------

    def step(self) -> list[tuple[int, Event]]:
        """One pass: (request id, token) for every token made.

        A request is gone after the event with its finish_reason. One that cannot go on (logits that are not finite, a
        grammar at its limits, a mistake of ours) has an error in place of its token and is gone too: a RequestError
        where it says what was wrong, an AnswerError with its cause otherwise. The others of the pass never notice.

        Raises:
            BaseException: what all requests share has failed; the engine's state cannot be trusted any more.
        """
        started = time.perf_counter() if self.pace is not None else 0.0
        events = self._guess()
        if self._held:
            events += self._chosen()
        plan = self.scheduler.schedule()
        if not plan.chunks:
            if self._held and not events:
                wait([held.choice for held in self._held.values()], HELD_WAIT_S, FIRST_COMPLETED)
                events += self._chosen()
            return events
        batch, first_rows = build_batch(plan)
        result = self._forward(plan, batch)
        made, new_tokens, finished = self._sample(plan, result, first_rows, batch)
        if result.hidden is not None:
            made += self._embedded(plan, result.hidden, finished)
        for request_id, event in made:
            if isinstance(event, QuadrigaError):  # before the commit: nothing of it goes into the prefix cache
                self.cancel(request_id)
        self.scheduler.commit(plan, new_tokens, finished)
        for held in self._held.values():
            self.scheduler.hold(held.active.running)
        self._steps += 1
        for request_id in finished:
            self._forget(request_id)
        if self.pace is not None:
            n_prompt = plan.n_tokens - plan.n_decode
            self.pace.record(plan.n_fluent, plan.n_decode, n_prompt, time.perf_counter() - started)
        return events + made

    def _forward(self, plan: PassPlan, batch: PassBatch) -> PassResult:
        """The pass, with what its requests want to know of it."""
        adapters = None
        if any(chunk.sequence.adapter for chunk in plan.chunks):
            adapters = [chunk.sequence.adapter for chunk in plan.chunks for _ in chunk.tokens]
        ids = [chunk.sequence.request_id for chunk in plan.chunks]
        routing = any(
            chunk.samples and i in self._active and self._active[i].request.routing
            for i, chunk in zip(ids, plan.chunks, strict=True)
        )
        return self.runner.forward(
            batch, adapters=adapters, hidden=any(i in self._embeds for i in ids), routing=routing
        )

    def _forget(self, request_id: int) -> None:
        """A request has ended well."""
        if self._embeds.pop(request_id, None) is None:
            running = self._active.pop(request_id).running
            self._prompt_tokens += running.n_prompt
            self._cached += running.n_cached

    def _embedded(self, plan: PassPlan, states: Floats, finished: set[int]) -> list[tuple[int, Event]]:
        """Take the states of texts that are to be embedded; the vectors of those whose last position this is."""
        done: list[tuple[int, Event]] = []
        at = 0
        for chunk in plan.chunks:
            at += len(chunk.tokens)
            embedded = self._embeds.get(chunk.sequence.request_id)
            if embedded is None:
                continue
            embedded.pooling.add(chunk.start, states[at - len(chunk.tokens) : at])
            if chunk.start + len(chunk.tokens) == len(chunk.sequence.tokens):
                vector = embedded.pooling.vector()
                try:
                    require_finite([float(vector.sum())])
                except RequestError as error:
                    done.append((chunk.sequence.request_id, error))
                else:
                    done.append((chunk.sequence.request_id, Embedding(vector=vector)))
                    finished.add(chunk.sequence.request_id)
        return done

    # Tokens that are chosen beside the passes -------------------------------------------------------------------------

    def _hold(self, active: _Active, made: _Pass, row: int) -> None:
        """Choose a request's next token in another thread: its grammar takes so long that others would wait for it."""
        finish = made.routing_into(row) if active.request.routing else _as_it_is
        known = () if self.runner.row_sampler is not None else (made.best[row], made.log_sums[row])
        choice = self._choosers.submit(self._next_beside, active, made.logits[row].copy(), *known)
        self._held[active.running.request_id] = _Held(active, choice, finish)

    def _next_beside(
        self, active: _Active, logits: Floats, best: int | None = None, log_sum: float | None = None
    ) -> TokenEvent:
        """A request's next token, from a row of logits of its own."""
        constraint, sampler, instead = active.request.constraint, active.sampler, _instead(active, ())
        allowed = None if constraint is None else constraint.allowed()
        if self.runner.row_sampler is None:
            return _event(active, sampler.sample(logits, best, log_sum, allowed, instead), 0)
        settings = sampler.ask(allowed)
        sampled = self.runner.row_sampler.beside().sample(logits[None], [0], [settings])[0]
        return _event(active, sampler.take(sampled, logits, constrained=allowed is not None, instead=instead), 0)

    def _chosen(self) -> list[tuple[int, Event]]:
        """The tokens that have been chosen since, and the errors of those that could not be."""
        events: list[tuple[int, Event]] = []
        for request_id, held in [(i, h) for i, h in self._held.items() if h.choice.done()]:
            del self._held[request_id]
            try:
                event = held.finish(held.choice.result())
            except BaseException as raised:
                events.append((request_id, _own_failure(raised)))
                self.cancel(request_id)
                continue
            events.append((request_id, event))
            self._generated += 1
            finished = event.finish_reason is not None
            self.scheduler.resume(held.active.running, [event.token_id], finished=finished)
            if finished:
                self._forget(request_id)
        return events

    def _guess(self) -> list[tuple[int, Event]]:
        """Draft what may follow, where asked for; the errors of those whose guessing failed."""
        failed: list[tuple[int, Event]] = []
        for request_id, active in self._active.items():
            running = active.running
            if active.lookup is not None and running.n_computed == len(running.tokens) - 1:
                try:
                    running.draft = active.lookup.guess(running.tokens, active.request.params.speculate)
                except BaseException as error:
                    failed.append((request_id, _own_failure(error)))
        for request_id, _ in failed:
            self.cancel(request_id)
        return failed

    def _sample(
        self, plan: PassPlan, result: PassResult, first_rows: Sequence[int], batch: PassBatch
    ) -> tuple[list[tuple[int, Event]], dict[int, list[int]], set[int]]:
        made = _Pass(batch, result, self.runner)
        turns = []
        for chunk, row in zip(plan.chunks, first_rows, strict=True):
            active = self._active.get(chunk.sequence.request_id)
            if active is not None:
                turns.append(turn := _Turn(active, chunk, row))
                try:
                    self._begin(turn, made)
                except BaseException as raised:
                    turn.fail(raised)
        going = [turn for turn in turns if turn.going]
        while going:
            self._choose(going, made)
            going = [turn for turn in going if turn.going]
        events: list[tuple[int, Event]] = []
        new_tokens: dict[int, list[int]] = {}
        finished: set[int] = set()
        for turn in turns:
            request_id, answered = turn.active.running.request_id, turn.answered
            events += [(request_id, event) for event in answered]
            if turn.error is not None:
                events.append((request_id, turn.error))
            elif answered and answered[-1].finish_reason is not None:
                finished.add(request_id)
            if turn.chunk.samples:
                self._guessed += turn.chunk.n_draft
                self._guessed_right += max(0, len(answered) - 1)
                self._generated += len(answered)
                new_tokens[request_id] = [event.token_id for event in answered]
        return events, new_tokens, finished

    def _begin(self, turn: _Turn, made: _Pass) -> None:
        """Score what the pass has of a prompt; see whether a token is to be chosen."""
        active, chunk = turn.active, turn.chunk
        if chunk.sequence.all_logits:
            self._score_prompt(active, chunk, made, turn.row)
            turn.row += len(chunk.tokens) - 1 - chunk.n_draft
        if not chunk.samples:
            return
        constraint = active.request.constraint
        if constraint is not None and not getattr(constraint, "ready", True):
            self._hold(active, made, turn.row)
        else:
            turn.going = True

    def _choose(self, turns: Sequence[_Turn], made: _Pass) -> None:
        """The next token of each of these answers; the kernels choose all of them at once."""
        kernels = self.runner.row_sampler
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
                        made.logits[at], made.best[at], made.log_sums[at], allowed, _instead(turn.active, turn.answered)
                    )
                    self._answered(turn, chosen, made)
            except BaseException as raised:
                turn.fail(raised)
        if kernels is None or not asked:
            return
        for turn, at, sampled in zip(asked, places, kernels.sample(made.logits, places, settings), strict=True):
            active = turn.active
            constrained, instead = active.request.constraint is not None, _instead(active, turn.answered)
            try:
                chosen = active.sampler.take(sampled, made.logits[at], constrained=constrained, instead=instead)
                self._answered(turn, chosen, made)
            except BaseException as raised:
                turn.fail(raised)

    def _answered(self, turn: _Turn, chosen: Sample, made: _Pass) -> None:
        """A token was chosen; guesses go on as long as they are right."""
        active, chunk, i = turn.active, turn.chunk, len(turn.answered)
        event = _event(active, chosen, i)
        if active.request.routing:
            event = made.with_routing(event, turn.row + i)
        turn.answered.append(event)
        guesses = chunk.tokens[len(chunk.tokens) - chunk.n_draft :] if chunk.n_draft else ()
        turn.going = event.finish_reason is None and i < len(guesses) and guesses[i] == event.token_id

    def _score_prompt(self, active: _Active, chunk: Chunk, made: _Pass, row: int) -> None:
        tokens, n_prompt, n_top = chunk.sequence.tokens, chunk.sequence.n_prompt, active.sampler.n_top
        n = min(len(chunk.tokens), n_prompt - 1 - chunk.start)
        if n <= 0:
            return
        rows, log_sums = made.logits[row : row + n], made.log_sums[row : row + n]
        require_finite(log_sums)
        following = tokens[chunk.start + 1 : chunk.start + 1 + n]
        own = (rows[np.arange(n), following].astype(np.float64) - log_sums).tolist()
        top = top_logprobs(rows, log_sums, n_top, self.unused) if n_top else [()] * n
        for i in range(n):
            active.prompt_logprobs[chunk.start + i + 1] = (own[i], top[i])

    # Whole sequences -------------------------------------------------------------------------------------------------

    def score(self, token_ids: Sequence[int], *, chunk: int = 512) -> tuple[Floats, list[LayerRouting]]:
        """Logits (T, V) float32 of every position of one sequence, and its routing per MoE layer.

        Runs beside whatever the engine is doing, in blocks of its own.

        Raises:
            BusyError: the sequence does not fit into the free blocks.
        """
        logits, stats = [], []
        for result in self._passes(token_ids, chunk):
            assert result.routing is not None, "it was asked for"
            logits.append(result.logits)
            stats.append(result.routing)
        merged = [
            LayerRouting(*(np.concatenate([getattr(s, name) for s in layer]) for name in _STATS_FIELDS))
            for layer in zip(*stats, strict=True)
        ]
        return np.concatenate(logits), merged

    def _passes(self, token_ids: Sequence[int], chunk: int) -> Iterator[PassResult]:
        """Run one sequence beside everything else, in blocks of its own: logits and routing of every pass."""
        n, states = len(token_ids), self.scheduler.states
        blocks = BlockTable(self.scheduler.pool, self.scheduler.windows)
        slot = None if states is None else states.take()
        try:
            if states is not None and slot is None:
                raise BusyError("no place is free for the states of one more sequence; ask again later")
            for start in range(0, n, chunk):
                stop = min(start + chunk, n)
                blocks.let_go(start)
                while len(blocks) * BLOCK_TOKENS < stop:
                    if not blocks.extend():
                        raise BusyError(f"{n} tokens do not fit into the free part of the cache; ask again later")
                ints = (
                    token_ids[start:stop],
                    range(start, stop),
                    (0, stop - start),
                    blocks.rows,
                    (0, len(blocks)),
                    range(stop - start),
                )
                slots = () if slot is None else ((slot if start else -1,), (slot,))
                yield self.runner.forward(
                    PassBatch(*(np.array(x, dtype=np.int32) for x in (*ints, *slots))), routing=True
                )
        finally:
            if states is not None and slot is not None:
                states.give(slot)
            blocks.cut(0)


def _instead(active: _Active, answered: Sequence[TokenEvent]) -> Callable[[int], int] | None:
    """What a constraint takes in place of a chosen token, as it knows how many more may come; None: it never does."""
    choose = getattr(active.request.constraint, "choose", None)
    if choose is None:
        return None
    left = active.running.max_tokens - len(active.running.tokens) - len(answered)
    return lambda token: int(choose(token, left))


def _event(active: _Active, chosen: Sample, n_before: int) -> TokenEvent:
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


class _Pass:
    """What a pass has computed: logits (R, V), and the routing."""

    def __init__(self, batch: PassBatch, result: PassResult, runner: Runner) -> None:
        self._batch, self._routing, self._runner = batch, result.routing, runner
        self.logits = result.logits

    @cached_property
    def _stats(self) -> tuple[list[int], list[float]]:
        return self._runner.row_stats(self.logits)

    @property
    def best(self) -> list[int]:
        """Of every row the most probable token."""
        return self._stats[0]

    @property
    def log_sums(self) -> list[float]:
        """Of every row log(sum(exp))."""
        return self._stats[1]

    def with_routing(self, event: TokenEvent, row: int) -> TokenEvent:
        """The event with the experts that predicted it."""
        return self.routing_into(row)(event)

    def routing_into(self, row: int) -> Callable[[TokenEvent], TokenEvent]:
        """Puts the experts that predicted a row's token into its event, also after the pass."""
        assert self._routing is not None, "asked for where a request wants it"
        token = int(self._batch.rows[row])
        routing, entropy = _routing_of(self._routing, token), _entropy_of(self._routing, token)
        return lambda event: replace(event, routing=routing, router_entropy=entropy)


def _as_it_is(event: TokenEvent) -> TokenEvent:
    return event


def _own_failure(error: BaseException) -> QuadrigaError:
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


def _routing_of(stats: list[LayerRouting], token: int) -> Routing:
    """One position's experts in every layer, heaviest first."""
    layers = []
    for layer in stats:
        pairs = zip(layer.expert_ids[token].tolist(), layer.expert_weights[token].tolist(), strict=True)
        layers.append(tuple(sorted(pairs, key=lambda pair: -pair[1])))
    return tuple(layers)


def _entropy_of(stats: list[LayerRouting], token: int) -> tuple[float, ...]:
    """One position's router entropies, each as a part of the largest possible, ln(E)."""
    if not stats:
        return ()
    entropies = []
    for layer in stats:
        probs, n_experts = layer.probs[token].astype(np.float64), layer.probs.shape[-1]
        entropy = -float((probs * np.log(np.maximum(probs, 1e-300))).sum())
        entropies.append(min(1.0, max(0.0, entropy / math.log(n_experts))) if n_experts > 1 else 0.0)
    return tuple(entropies)


_STATS_FIELDS = ("expert_ids", "expert_weights", "probs", "logits")


def build_batch(plan: PassPlan) -> tuple[PassBatch, list[int]]:
    """A plan as arrays, and the index of every chunk's first wanted row among the rows of logits."""
    tokens: list[int] = []
    positions: list[int] = []
    starts, table_starts = [0], [0]
    tables = [list[int]() for _ in plan.chunks[0].sequence.blocks.rows]
    rows: list[int] = []
    first_rows: list[int] = []
    for chunk in plan.chunks:
        n = len(chunk.tokens)
        first_rows.append(len(rows))
        if chunk.sequence.all_logits:
            rows.extend(range(len(tokens), len(tokens) + n))
        elif chunk.samples:
            rows.extend(range(len(tokens) + n - 1 - chunk.n_draft, len(tokens) + n))
        tokens.extend(chunk.tokens)
        positions.extend(range(chunk.start, chunk.start + n))
        starts.append(len(tokens))
        for table, row in zip(tables, chunk.sequence.blocks.rows, strict=True):
            table.extend(row)
        table_starts.append(len(tables[0]))
    ints: list[object] = [tokens, positions, starts, tables, table_starts, rows]
    if any(chunk.after >= 0 for chunk in plan.chunks):
        ints += [[chunk.before for chunk in plan.chunks], [chunk.after for chunk in plan.chunks]]
    steering, steered = steering_of([(chunk.sequence.steering, len(chunk.tokens)) for chunk in plan.chunks])
    arrays = (np.array(x, dtype=np.int32) for x in ints)
    return PassBatch(*arrays, steering=steering, steered=steered), first_rows
