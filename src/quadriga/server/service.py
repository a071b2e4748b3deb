"""What every route needs: the model, its engine, and the way from a request's fields to running answers.

fields ─► SamplingParams ─► one engine request a choice ─► events, merged ─► collected, or sent as they come
"""

from __future__ import annotations

import asyncio
import copy
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from quadriga.engine.async_engine import STEP_TIMEOUT_S, AsyncEngine, Stream
from quadriga.engine.llm import LLM
from quadriga.engine.request import Embed, Embedding, Request, SamplingParams, TokenEvent, seed_of
from quadriga.engine.sequences import BACKGROUND
from quadriga.errors import QuadrigaError, RequestError, TemplateError
from quadriga.model.steering import ExpertFactor
from quadriga.server.answers import Answers
from quadriga.server.caller import Caller
from quadriga.server.card import Card
from quadriga.server.errors import ApiError
from quadriga.server.grammars import GrammarDesk
from quadriga.server.metrics import Metrics
from quadriga.server.probe import Probe
from quadriga.server.schema import (
    MAX_BIASES,
    MAX_CHOICES,
    MAX_LOGPROBS,
    MAX_STOP_CHARS,
    MAX_STOP_IDS,
    MAX_STOPS,
    ResponseFormat,
    Sampling,
)
from quadriga.server.work import Work
from quadriga.text.grammar import Grammars
from quadriga.text.template_abilities import Abilities, abilities
from quadriga.text.tool_calls.forms import FORMS

MIN_TOP_P = 1e-9
"""Keeps the best token only."""


class Service:
    """The model and its engine, for the routes.

    Args:
        llm: what is served; its engine belongs to the service from now on.
        name: what clients call the model.
        max_waiting: requests that may wait.
        step_timeout_s: a step of the engine that takes longer counts as hung; 0 lets it take any time.
        aliases: further names of the model.
        tool_form: how the model writes calls of tools, a name of ``text.tool_calls.forms``; "auto": by its template.
        reasoning: tell thoughts from answers, where the template marks them.
    """

    def __init__(
        self,
        llm: LLM,
        *,
        name: str,
        aliases: Sequence[str] = (),
        max_waiting: int = 256,
        step_timeout_s: float = STEP_TIMEOUT_S,
        tool_form: str = "auto",
        reasoning: bool = True,
    ) -> None:
        self.llm, self.name, self.aliases, self.created = llm, name, tuple(aliases), int(time.time())
        self.tool_form = None if tool_form == "auto" else FORMS[tool_form]
        self.reasoning = reasoning
        self._abilities: Abilities | None = None
        self.engine = AsyncEngine(llm.engine, max_waiting=max_waiting, step_timeout_s=step_timeout_s)
        self.work = Work()
        self.metrics = Metrics()
        self.metrics.add(llm, name)
        self.neighbours: Callable[[], list[str]] = lambda: self.names
        """All names that the server serves."""
        self.draining = False
        self.probe = Probe(self.engine, prompt=(min(1, llm.config.vocab_size - 1),))
        # Now, not with the first request: it holds the interpreter's lock for up to a second.
        self._grammars: GrammarDesk | QuadrigaError
        try:
            self._grammars = GrammarDesk(_grammars_of(llm))
        except QuadrigaError as error:
            self._grammars = error

    @property
    def card(self) -> Card:
        """What lists say of it."""
        llm = self.llm
        form, nbytes = llm.runner.weights()
        return Card(
            name=self.name,
            config=llm.config,
            created=self.created,
            template=None if llm.tokenizer is None else llm.tokenizer.chat_template,
            format=form,
            nbytes=nbytes,
            path=llm.path,
        )

    async def end(self, timeout_s: float | None) -> None:
        """Stop the engine, and the threads and helpers beside it; see ``AsyncEngine.stop``."""
        await self.engine.stop(timeout_s)
        if isinstance(self._grammars, GrammarDesk):
            await asyncio.to_thread(self._grammars.grammars.close)  # it waits for a grammar under way
        await asyncio.to_thread(self.llm.engine.close)

    def serves(self, model: str | None) -> bool:
        """True if a request may call this model so, or one of its adapters."""
        return model in self.names

    def check_model(self, model: str | None) -> None:
        """Refuse a request for another model.

        Raises:
            ApiError: 404.
        """
        self.adapter_of(model)

    def adapter_of(self, model: str | None) -> str | None:
        """The adapter a request asks for by calling the model NAME:ADAPTER; None: the model itself.

        Raises:
            ApiError: 404.
        """
        if not model or model == self.name or model in self.aliases:
            return None
        base, _, adapter = model.rpartition(":")
        if (base == self.name or base in self.aliases) and adapter in self.llm.adapters:
            return adapter
        raise not_served(model, self.neighbours())

    @property
    def names(self) -> list[str]:
        """What a request may call the model: its names, and NAME:ADAPTER for every adapter."""
        return [self.name, *self.aliases, *(f"{self.name}:{adapter}" for adapter in self.llm.adapters)]

    def shown_name(self, model: str | None) -> str:
        """What an answer calls the model: as the request did."""
        return model or self.name

    async def abilities(self) -> Abilities:
        """What the model's chat template can write; found out once."""
        if self._abilities is None:
            tokenizer = self.llm.tokenizer
            try:
                self._abilities = Abilities() if tokenizer is None else await asyncio.to_thread(abilities, tokenizer)
            except TemplateError:  # whoever chats is told
                self._abilities = Abilities()
        return self._abilities

    @property
    def _control_tokens(self) -> list[str]:
        return [] if self.llm.tokenizer is None else list(self.llm.tokenizer.special_ids)

    def _ids_of(self, names: Sequence[str]) -> frozenset[int]:
        special = self.llm.tokenizer.special_ids if self.llm.tokenizer is not None else {}
        return frozenset(special[name] for name in names if name in special)

    def params(self, body: Sampling, *, max_tokens: int | None, logprobs: int, echo: bool = False) -> SamplingParams:
        """A request's fields as sampling parameters.

        Raises:
            RequestError: a value outside its range.
        """
        if not 0 <= logprobs <= MAX_LOGPROBS:
            raise RequestError(f"logprobs must be a whole number from 0 to {MAX_LOGPROBS}, got {logprobs}")
        stops = [body.stop] if isinstance(body.stop, str) else body.stop or []
        if len(stops) > MAX_STOPS:
            raise ApiError(400, f"stop takes at most {MAX_STOPS} strings, got {len(stops)}", param="stop")
        longest = max(map(len, stops), default=0)
        if longest > MAX_STOP_CHARS:
            raise ApiError(400, f"a stop string has at most {MAX_STOP_CHARS} characters, got {longest}", param="stop")
        given_bias, stop_ids = body.logit_bias or {}, body.stop_token_ids or []
        if len(given_bias) > MAX_BIASES:
            message = f"logit_bias takes at most {MAX_BIASES} token ids, got {len(given_bias)}"
            raise ApiError(400, message, param="logit_bias")
        if len(stop_ids) > MAX_STOP_IDS:
            message = f"stop_token_ids takes at most {MAX_STOP_IDS}, got {len(stop_ids)}"
            raise ApiError(400, message, param="stop_token_ids")
        bias = {}
        for key, value in given_bias.items():
            if not (key.isascii() and key.isdecimal() and len(key) < 10):
                raise ApiError(400, f"logit_bias keys are token ids, got {key[:40]!r}", param="logit_bias")
            if int(key) in bias:
                raise ApiError(400, f"logit_bias names the token id {int(key)} twice", param="logit_bias")
            bias[int(key)] = value
        given = {
            "temperature": 1.0 if body.temperature is None else body.temperature,
            "top_p": MIN_TOP_P if body.top_p == 0 else body.top_p,  # as peers take it: the best token
            "top_k": 0 if body.top_k == -1 else body.top_k,  # -1: all, as vLLM writes it
            "min_p": body.min_p,
            "typical_p": body.typical_p,
            "xtc_probability": body.xtc_probability,
            "xtc_threshold": body.xtc_threshold,
            "dry_multiplier": body.dry_multiplier,
            "dry_base": body.dry_base,
            "dry_allowed_length": body.dry_allowed_length,
            "dry_penalty_last_n": body.dry_penalty_last_n,
            "dry_sequence_breakers": body.dry_sequence_breakers,
            "presence_penalty": body.presence_penalty,
            "frequency_penalty": body.frequency_penalty,
            "repetition_penalty": body.repetition_penalty,
            "max_new_tokens": max_tokens,
            "min_new_tokens": body.min_tokens,
        }
        return SamplingParams(
            **{name: value for name, value in given.items() if value is not None},  # type: ignore[arg-type]
            logit_bias=bias,
            stop=tuple(stops),
            stop_ids=tuple(stop_ids),
            ignore_eos=body.ignore_eos,
            seed=None if body.seed == -1 else body.seed,  # -1: any
            logprobs=logprobs,
            prompt_logprobs=echo and logprobs > 0,
            speculate=body.speculate or 0,
        )

    def constraint(self, form: ResponseFormat | None) -> tuple[str, Any] | None:
        """What a response format asks of a grammar: (kind, source), or None for free text."""
        if form is None or form.type == "text":
            return None
        if form.schema is not None and form.type != "json_object":
            raise ApiError(400, f"schema belongs to json_object, not {form.type}", param="response_format.schema")
        if form.type == "json_object":
            return "json", {"type": "object"} if form.schema is None else form.schema
        if form.type == "json_schema":
            if form.json_schema is None or form.json_schema.schema is None:
                raise ApiError(400, "json_schema needs a schema", param="response_format.json_schema")
            return "json", form.json_schema.schema
        source = form.regex if form.type == "regex" else form.grammar
        if not source:
            raise ApiError(400, f"{form.type} is missing", param=f"response_format.{form.type}")
        return ("regex" if form.type == "regex" else "lark"), source

    async def run(
        self,
        prompts: Sequence[Sequence[int]],
        params: SamplingParams,
        body: Any,
        caller: Caller,
        *,
        constraint: tuple[str, Any] | None = None,
        closes: bool = False,
        shown: Sequence[str] = (),
    ) -> Answers:
        """Start n answers to every prompt; choice i of prompt p is number p * n + i.

        Args:
            closes: the constraint is JSON that is to be complete before the budget of tokens ends.
            shown: names of control tokens that are part of the answer's text.

        Raises:
            ApiError, RequestError, BusyError: it cannot be served.
        """
        n = 1 if body.n is None else body.n
        if not 1 <= n <= MAX_CHOICES or n * len(prompts) > MAX_CHOICES:
            raise ApiError(
                400, f"n times the prompts must be from 1 to {MAX_CHOICES}, got {n * len(prompts)}", param="n"
            )
        if body.deadline_ms is not None and not 1 <= body.deadline_ms <= 86_400_000:
            raise ApiError(400, "deadline_ms must be from 1 to 86400000", param="deadline_ms")
        self._check(n * len(prompts), body.priority, "n times the prompts")
        adapter = self.adapter_of(body.model)
        steering = tuple(ExpertFactor(one.layer, one.expert, one.factor) for one in body.experts or ())
        caller.usage.model = self.shown_name(body.model)
        visible = self._ids_of(self._control_tokens if body.skip_special_tokens is False else shown)
        await caller.enter(n * len(prompts))
        try:
            grammar = None
            if constraint is not None:
                if isinstance(self._grammars, QuadrigaError):
                    raise self._grammars
                grammar = await self._grammars.compile(*constraint, client=caller.queue_name, salt=caller.salt)
            requests = [
                Request(
                    prompt=tuple(prompt),
                    params=params if params.seed is None or i == 0 else _with_seed(params, seed_of(params.seed, i)),
                    priority=BACKGROUND if caller.background else body.priority,
                    routing=body.routing,
                    steering=steering,
                    constraint=None if grammar is None else grammar.copy(closes=closes),
                    salt=caller.salt,
                    adapter=adapter,
                    shown=visible,
                    client=caller.client,
                )
                for prompt in prompts
                for i in range(n)
            ]
            streams = await self.engine.submit_all(requests, background=caller.background)
        except BaseException:
            caller.leave(n * len(prompts), 0)
            raise
        n_read = sum(len(p) for p in prompts)
        began = caller.usage.began
        deadline = None if body.deadline_ms is None else body.deadline_ms / 1000

        def ended(answers: Answers) -> None:
            caller.leave(len(streams), n_read, answers.n_made)
            if answers.first is not None:
                caller.usage.first_s = answers.first - began
            aborted = sum(len(choice.events) for choice in answers.choices if choice.finish_reason is None)
            self.metrics.ended(caller.key_name, n_read, answers.n_made, aborted)

        return Answers(streams, n_read, deadline, ended)

    async def embed(
        self, prompts: Sequence[Sequence[int]], caller: Caller, *, priority: int = 0, model: str | None = None
    ) -> list[NDArray[np.float32]]:
        """Texts as vectors (D,) float32, in their order.

        Args:
            model: what the request calls the model, or one of its adapters.

        Raises:
            ApiError, RequestError, BusyError: it cannot be served.
        """
        self._check(len(prompts), priority, "the inputs")
        await caller.enter(len(prompts))
        streams: list[Stream] = []
        try:
            adapter = self.adapter_of(model)
            caller.usage.model = self.shown_name(model)
            priority = BACKGROUND if caller.background else priority
            requests = [
                Embed(prompt=tuple(p), priority=priority, client=caller.client, adapter=adapter) for p in prompts
            ]
            streams = await self.engine.submit_all(requests, background=caller.background)
            vectors: dict[Stream, NDArray[np.float32]] = {}
            while len(vectors) < len(streams):
                for stream, made in await streams[0].inbox.take():
                    assert isinstance(made, Embedding), "a text becomes a vector"
                    vectors[stream] = made.vector
            self.metrics.texts(len(streams))
            self.metrics.ended(caller.key_name, sum(len(p) for p in prompts), 0)
            return [vectors[stream] for stream in streams]
        finally:
            for stream in streams:
                stream.close()
            caller.leave(len(prompts), sum(len(p) for p in prompts) if streams else 0)

    def _check(self, n_sequences: int, priority: int, what: str) -> None:
        """Refuse what the server cannot do for anybody."""
        if self.draining:
            raise ApiError(503, "the server is shutting down", code="shutting_down", retry_after_s=5)
        if not BACKGROUND <= priority <= -BACKGROUND:
            message = f"priority must be from {BACKGROUND} to {-BACKGROUND}, got {priority}"
            raise ApiError(400, message, param="priority")
        if n_sequences > self.engine.capacity:
            raise ApiError(400, f"{what} must be at most {self.engine.capacity} on this server", param="n")

    def token_text(self, token_id: int) -> str:
        """A token as text; bytes that are no whole characters as OpenAI writes them; ids without a token by number."""
        tokenizer = self.llm.tokenizer
        assert tokenizer is not None
        if not tokenizer.is_token(token_id):
            return f"<unused {token_id}>"
        raw = tokenizer.token_bytes(token_id)
        if not raw:
            return tokenizer.token_text(token_id)
        try:
            return raw.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)

    def token_bytes(self, token_id: int) -> list[int]:
        """A token's bytes; none where no token has the id."""
        tokenizer = self.llm.tokenizer
        assert tokenizer is not None
        return list(tokenizer.token_bytes(token_id)) if tokenizer.is_token(token_id) else []

    def routing(self, event: TokenEvent) -> list[dict[str, Any]]:
        """Which experts a token came from, and how sure each router was, for the lens. Empty layers: a dense model."""
        layers = [[[expert, round(weight, 4)] for expert, weight in layer] for layer in event.routing or ()]
        entropy = [round(part, 3) for part in event.router_entropy]
        text = self.token_text(event.token_id)
        return [{"id": event.token_id, "text": text, "layers": layers, "entropy": entropy}]


def not_served(model: str, names: Sequence[str]) -> ApiError:
    """What a request for a model is told that this server has not."""
    served = ", ".join(map(repr, names))
    text = f"the model {model[:100]!r} is not served here; {served} is"
    return ApiError(404, text, param="model", code="model_not_found")


def _with_seed(params: SamplingParams, seed: int) -> SamplingParams:
    """The same with another seed. What has been checked is not checked again for each of 128 answers."""
    other = copy.copy(params)
    object.__setattr__(other, "seed", seed)
    return other


def _grammars_of(llm: LLM) -> Grammars:
    if llm.tokenizer is None or not llm.end_ids:
        raise RequestError("this model has no vocabulary with an end token, so no grammar can guide it")
    return Grammars(llm.tokenizer, llm.config.vocab_size, frozenset(llm.end_ids))
