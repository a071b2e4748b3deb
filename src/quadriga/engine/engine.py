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
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import cast

from quadriga.engine import whole_sequence
from quadriga.engine.answers import Active, Turn, choose, own_failure, score_prompt
from quadriga.engine.beside import Beside
from quadriga.engine.disk_cache import DiskCache, KeptBlocks, KeptStates, StateFiles
from quadriga.engine.dry import Breakers, Spellings
from quadriga.engine.embeds import Embeds
from quadriga.engine.lookup import Lookup
from quadriga.engine.pace import Pace
from quadriga.engine.passes import Computed, build_batch
from quadriga.engine.permitted import bad_sequences
from quadriga.engine.request import (
    Embed,
    Embedding,
    Request,
    SamplingParams,
    TokenEvent,
)
from quadriga.engine.sampler import Sampler, Unused
from quadriga.engine.scheduler import Scheduler
from quadriga.engine.sequences import PassPlan, Running
from quadriga.engine.steering import salt_of
from quadriga.errors import ConfigError, QuadrigaError, RequestError
from quadriga.kernels.pass_batch import PassBatch
from quadriga.model.steering import router_shift
from quadriga.runners.base import Adapters, Floats, LayerRouting, PassResult, Runner
from quadriga.text.stream import Detokenizer
from quadriga.text.tokenizer import Tokenizer

_log = logging.getLogger(__name__)

Event = TokenEvent | Embedding | QuadrigaError
"""What a step has for a request: a token, a text's vector, or why there will be no more."""


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
        self._find_breakers: Callable[[tuple[str, ...]], Breakers] | None = None
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
        self._active: dict[int, Active] = {}
        self._embeds = Embeds(self.config.d_model)
        self._beside = Beside(runner.row_sampler)
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
        blocks = cast(KeptBlocks, self.runner)
        self.disk = DiskCache(folder, max_bytes, blocks.identity(), blocks)
        self.scheduler.pool.backing = self.disk
        if self.scheduler.states is not None:
            self.scheduler.states.backing = StateFiles(self.disk, cast(KeptStates, self.runner))

    def close(self) -> None:
        """End the threads beside it, and write what is to be kept; nothing is computed any more."""
        self._beside.close()
        if self.disk is not None:
            self.disk.close()

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
        active = Active(
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
        if self._find_breakers is None:
            spellings = Spellings(self.tokenizer, self.config.vocab_size)
            self._find_breakers = lru_cache(maxsize=64)(spellings.breakers)  # requests nearly always give the same
        return self._find_breakers(tuple(texts))

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
        self._embeds.add(running)
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
        running += self._embeds.running()
        busy = sum(one.adapter == number for one in running)
        if busy:
            raise RequestError(f"{busy} requests use the adapter {name!r}; let them end first")
        self.adapters().remove(name)

    def cancel(self, request_id: int) -> bool:
        """Drop a request wherever it is; its blocks are free at once. False if it is not here (any more)."""
        self._active.pop(request_id, None)
        self._embeds.drop(request_id)
        self._beside.drop(request_id)
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
        if self._beside:
            events += self._chosen()
        plan = self.scheduler.schedule()
        if not plan.chunks:
            if self._beside and not events:
                self._beside.wait()
                events += self._chosen()
            return events
        batch, first_rows = build_batch(plan)
        result = self._forward(plan, batch)
        made, new_tokens, finished = self._sample(plan, result, first_rows, batch)
        if result.hidden is not None:
            vectors = self._embeds.take(plan, result.hidden)
            made += vectors
            finished |= {request_id for request_id, vector in vectors if isinstance(vector, Embedding)}
        for request_id, event in made:
            if isinstance(event, QuadrigaError):  # before the commit: nothing of it goes into the prefix cache
                self.cancel(request_id)
        self.scheduler.commit(plan, new_tokens, finished)
        if self._beside:
            for running in self._beside.running():
                self.scheduler.hold(running)
        self._steps += 1
        for request_id in finished:
            self._forget(request_id)
        if self.pace is not None:
            n_prompt = plan.n_tokens - plan.n_decode
            self.pace.record(plan.n_fluent, plan.n_decode, n_prompt, time.perf_counter() - started)
        return events + made

    def _forward(self, plan: PassPlan, batch: PassBatch) -> PassResult:
        """The pass, with what its requests want to know of it."""
        adapted = hidden = routing = False
        for chunk in plan.chunks:
            sequence = chunk.sequence
            adapted |= sequence.adapter != 0
            hidden |= sequence.embeds
            routing |= chunk.samples and self._active[sequence.request_id].request.routing
        adapters = [chunk.sequence.adapter for chunk in plan.chunks for _ in chunk.tokens] if adapted else None
        return self.runner.forward(batch, adapters=adapters, hidden=hidden, routing=routing)

    def _forget(self, request_id: int) -> None:
        """A request has ended well."""
        if not self._embeds.drop(request_id):
            running = self._active.pop(request_id).running
            self._prompt_tokens += running.n_prompt
            self._cached += running.n_cached

    # Tokens that are chosen beside the passes -------------------------------------------------------------------------

    def _chosen(self) -> list[tuple[int, Event]]:
        """The tokens that have been chosen since, and the errors of those that could not be."""
        events: list[tuple[int, Event]] = []
        for request_id, running, event in self._beside.chosen():
            events.append((request_id, event))
            if isinstance(event, QuadrigaError):
                self.cancel(request_id)
                continue
            self._generated += 1
            finished = event.finish_reason is not None
            self.scheduler.resume(running, [event.token_id], finished=finished)
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
                    failed.append((request_id, own_failure(error)))
        for request_id, _ in failed:
            self.cancel(request_id)
        return failed

    def _sample(
        self, plan: PassPlan, result: PassResult, first_rows: Sequence[int], batch: PassBatch
    ) -> tuple[list[tuple[int, Event]], dict[int, list[int]], set[int]]:
        made = Computed(batch, result, self.runner)
        turns = []
        for chunk, row in zip(plan.chunks, first_rows, strict=True):
            active = self._active.get(chunk.sequence.request_id)
            if active is not None:
                turns.append(turn := Turn(active, chunk, row))
                try:
                    self._begin(turn, made)
                except BaseException as raised:
                    turn.fail(raised)
        going = [turn for turn in turns if turn.going]
        while going:
            choose(going, made, self.runner.row_sampler)
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

    def _begin(self, turn: Turn, made: Computed) -> None:
        """Score what the pass has of a prompt; see whether a token is to be chosen."""
        active, chunk = turn.active, turn.chunk
        if chunk.sequence.all_logits:
            score_prompt(active, chunk, made, turn.row, self.unused)
            turn.row += len(chunk.tokens) - 1 - chunk.n_draft
        if not chunk.samples:
            return
        constraint = active.request.constraint
        if constraint is not None and not getattr(constraint, "ready", True):
            self._beside.hold(active, made, turn.row)
        else:
            turn.going = True

    # Whole sequences -------------------------------------------------------------------------------------------------

    def score(self, token_ids: Sequence[int], *, chunk: int = 512) -> tuple[Floats, list[LayerRouting]]:
        """Logits (T, V) float32 of every position of one sequence, and its routing per MoE layer.

        Runs beside whatever the engine is doing, in blocks of its own.

        Raises:
            BusyError: the sequence does not fit into the free blocks.
        """
        return whole_sequence.score(self.runner, self.scheduler, token_ids, chunk)
