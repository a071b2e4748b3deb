"""The offline API: ask a model for logits, text or a chat answer.

    model = quadriga.load("smollm2-135m-instruct")
    model.chat("What is the capital of France?").text
    model.generate_many(["One,", "Two,", "Three,"])                       # one batch, answers as if each were alone
    model.logits(model.tokenizer.encode("The capital of France is"))      # (T, V) float32

On a CPU the model runs on the kernels of ``kernels/cpu``; with a ``dtype``, on another device, or with
QUADRIGA_OPS=reference it runs on plain torch. Both are driven by the same engine. Any number of threads may use one
:class:`LLM`: requests that run at the same time share passes (``engine/threads.py``), and each gets the answer it would
get alone.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from quadriga.engine import asked
from quadriga.engine.asked import Message, TokenIds
from quadriga.engine.engine import Engine
from quadriga.engine.inbox import Answer, Inbox, completions
from quadriga.engine.request import (
    Completion,
    Embed,
    Embedding,
    Request,
    SamplingParams,
)
from quadriga.engine.scoring import Ids, Scored, score
from quadriga.engine.threads import ThreadTurns
from quadriga.errors import EngineError, QuadrigaError, RequestError, TokenizerError
from quadriga.io.adapter import load as load_adapter
from quadriga.io.adapter_files import low_rank
from quadriga.io.suggested import Suggested
from quadriga.kernels.cpu.expert_store import ExpertStore
from quadriga.model.config import ModelConfig
from quadriga.model.steering import ExpertFactor
from quadriga.runners.base import Floats, LayerRouting, Runner
from quadriga.text.chat import render
from quadriga.text.least_tokens import LeastTokens
from quadriga.text.tokenizer import Tokenizer
from quadriga.text.turn_ends import TurnEnds, turn_ends

_ORDINARY_CHARS = 8
"""Of a token. A text below this times the context may well fit, and is encoded to find out."""


class LLM:
    """A loaded model with its tokenizer.

    Attributes:
        config: what the model is.
        tokenizer: its vocabulary, or None where the checkpoint has none (then prompts are token ids).
        engine: what runs it.
        name: how it was asked for.
        path: its folder or file; None where it was made in memory.
    """

    def __init__(
        self,
        runner: Runner,
        tokenizer: Tokenizer | None,
        *,
        name: str = "model",
        max_sequences: int = 64,
        max_batch_tokens: int = 2048,
        suggested: Suggested | None = None,
        path: Path | None = None,
    ) -> None:
        self.suggested = suggested or Suggested()
        """How the checkpoint's makers would have tokens chosen in a conversation."""
        self.runner = runner
        self.config: ModelConfig = runner.config
        self.tokenizer = tokenizer
        self.name = name
        self.path = path
        if tokenizer is not None and tokenizer.n_vocab > self.config.vocab_size:
            raise TokenizerError(
                f"the tokenizer has {tokenizer.n_vocab} tokens, the model's embedding only {self.config.vocab_size}. "
                "Check that both come from the same checkpoint."
            )
        self._ends = TurnEnds(frozenset()) if tokenizer is None else turn_ends(tokenizer)
        self.engine = Engine(
            runner,
            tokenizer,
            end_ids=frozenset(self.end_ids),
            max_batch_tokens=max_batch_tokens,
            max_sequences=max_sequences,
        )
        self._turns = ThreadTurns()
        self._inboxes: dict[int, Inbox] = {}  # by request; looked at and changed in a turn only
        self._least = None if tokenizer is None else LeastTokens(tokenizer)

    @property
    def expert_store(self) -> ExpertStore | None:
        """Where the experts are, if they stay on disk; its ``stats`` say how often the disk was needed."""
        return self.runner.store

    # Whole sequences -------------------------------------------------------------------------------------------------

    def logits(self, token_ids: TokenIds) -> Floats:
        """Logits of every position of one sequence: ids (T,) -> (T, V) float32."""
        ids = self._check_ids(token_ids)
        with self._turns.turn():
            return self.engine.score(ids)[0]

    def routing(self, token_ids: TokenIds) -> list[LayerRouting]:
        """What every layer's router decided for each token of one sequence; empty for a dense model."""
        ids = self._check_ids(token_ids)
        with self._turns.turn():
            return self.engine.score(ids)[1]

    def embed(self, text: str | Sequence[int]) -> Floats:
        """A text as one vector (D,) float32 of length 1: the mean of the last hidden states after the final norm."""
        inbox = Inbox()
        ids = self._submit([Embed(prompt=tuple(self.prompt_ids(text, parse_special=False)))], inbox)
        try:
            self._turns.run_until(inbox.has_news, self._step)
        finally:
            self._turns.soon(partial(self._forget, ids))
        event = inbox.arrived.popleft()[2]
        if isinstance(event, QuadrigaError):
            raise event
        assert isinstance(event, Embedding), "a text becomes a vector"
        return event.vector

    def score(self, pairs: Sequence[tuple[Ids, Ids]], *, done: Callable[[int], None] = lambda n: None) -> list[Scored]:
        """How probable each continuation is after its context; what contexts share is computed once.

        Other threads' answers go on when all pairs are scored.

        Args:
            pairs: (context ids, continuation ids), neither empty.
            done: called with the number of pairs that have just been scored.
        """
        checked = [(self._check_ids(context), self._check_ids(more)) for context, more in asked.pairs(pairs)]
        with self._turns.turn():
            return score(self.engine, checked, done=done)

    def loglikelihood(self, context: str | Sequence[int], continuation: str | Sequence[int]) -> tuple[float, bool]:
        """How probable a continuation is after a context.

        Two texts are encoded as one and cut where the context's own tokens end; spaces at its end belong to the
        continuation, as in training.

        Returns:
            (sum of its tokens' natural-log probabilities, True if each of them was the most probable one).

        Raises:
            RequestError: the continuation has no token of its own.
        """
        before, after = self._pair(context, continuation)
        scored = self.score([(before, after)])[0]
        return scored.logprob, scored.greedy

    def _pair(self, context: str | Sequence[int], continuation: str | Sequence[int]) -> tuple[list[int], list[int]]:
        if isinstance(continuation, str) and isinstance(context, str):
            tokenizer, bare = self._need_tokenizer(), context.rstrip() or context
            before = self._check_ids([*tokenizer.prefix_ids, *tokenizer.encode(bare)])
            after = [*tokenizer.prefix_ids, *tokenizer.encode(context + continuation)][len(before) :]
        elif isinstance(continuation, str):
            before = self.prompt_ids(context)
            after = self._need_tokenizer().encode_continuation(continuation)
        else:
            before, after = self.prompt_ids(context), self._check_ids(continuation)
        if not after:
            raise RequestError(f"the continuation {continuation!r:.80} has no token of its own after its context")
        return before, after

    # Generation ------------------------------------------------------------------------------------------------------

    def add_adapter(self, name: str, folder: str | Path) -> None:
        """Make an adapter's files (ours or peft's) available under a name; it may be done while answers run.

        Raises:
            RequestError: the name is taken, or the model runs on the CPU's kernels (load it with a dtype).
            CheckpointError: no adapter, or one of another model.
        """
        loaded = load_adapter(Path(folder), self.config)
        with self._turns.turn():
            self.engine.adapters().add(name, loaded.spec, low_rank(loaded))

    @property
    def adapters(self) -> list[str]:
        """Names of the adapters that were added."""
        return self.runner.adapter_names

    def remove_adapter(self, name: str) -> None:
        """Forget an adapter that no answer uses any more."""
        with self._turns.turn():
            self.engine.remove_adapter(asked.adapter_name(name) or "")

    def stream(
        self,
        prompt: str | Sequence[int],
        params: SamplingParams | None = None,
        *,
        adapter: str | None = None,
        steering: Sequence[ExpertFactor] = (),
    ) -> Answer:
        """Continue a prompt, yielding each token as it is made.

        Args:
            prompt: text as :meth:`prompt_ids` encodes it, or token ids taken as they are.
            adapter: the name of one that was added.
            steering: experts that are switched off or boosted.

        Raises:
            RequestError: an empty prompt, ids outside the model's table, a prompt that fills the context; or, after
                some tokens, logits that are not finite.
            AnswerError: after some tokens, a mistake of ours, which is its cause.
        """
        request = self._request(prompt, params, adapter, steering)
        inbox = Inbox()
        (request_id,) = self._submit([request], inbox)
        wait = partial(self._turns.run_until, inbox.has_news, self._step)
        return Answer(inbox, wait, end=partial(self._turns.soon, partial(self._forget, (request_id,))))

    def generate(
        self,
        prompt: str | Sequence[int],
        params: SamplingParams | None = None,
        *,
        adapter: str | None = None,
        steering: Sequence[ExpertFactor] = (),
    ) -> Completion:
        """Continue a prompt to its end; see :meth:`stream`."""
        answer = self._complete([self._request(prompt, params, adapter, steering)])[0]
        if answer.error is not None:
            raise answer.error
        return answer

    def generate_many(
        self,
        prompts: Iterable[str | Sequence[int]],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        n: int = 1,
        adapters: Sequence[str | None] | None = None,
        progress: Callable[[int, int], None] | None = None,
    ) -> list[Completion]:
        """Continue many prompts as one continuous batch; each answer is what :meth:`generate` would give.

        To the bit on the kernels; on torch products of another batch may differ in their last bits, and near ties with
        them.

        An answer that fails on its way costs none of the others: it comes back with ``finish_reason`` "error", the text
        it had, and what :meth:`generate` would have raised as its ``error``.

        Args:
            params: one for all, or one for each prompt.
            n: answers to each prompt, which come one after the other. Each has a seed of its own, made of the
                parameters' seed as the server makes it; the first has that seed itself.
            adapters: one for each prompt, None for the model itself; several may run in one batch.
            progress: called with (finished, in all).

        Raises:
            RequestError: a prompt or parameters that can never run, before anything does; or a single prompt in place
                of many.
        """
        all_ids = [tuple(self.prompt_ids(prompt)) for prompt in asked.several(prompts, "prompts")]
        each = asked.each_sampling(params, len(all_ids))
        names = [None] * len(all_ids) if adapters is None else list(asked.several(adapters, "adapters"))
        if len(names) != len(all_ids):
            raise RequestError(f"{len(all_ids)} prompts need as many adapters, got {len(names)}")
        if not isinstance(n, int) or isinstance(n, bool) or n < 1:
            raise RequestError(f"n must be a whole number of answers from 1, got {n!r:.80}")
        requests = [
            Request(prompt=ids, params=asked.of_choice(one, choice), adapter=asked.adapter_name(name))
            for ids, one, name in zip(all_ids, each, names, strict=True)
            for choice in range(n)
        ]
        return self._complete(requests, progress)

    def _request(
        self,
        prompt: str | Sequence[int],
        params: SamplingParams | None,
        adapter: str | None,
        steering: Sequence[ExpertFactor],
    ) -> Request:
        return Request(
            prompt=tuple(self.prompt_ids(prompt)),
            params=asked.sampling(params),
            adapter=asked.adapter_name(adapter),
            steering=asked.factors(steering),
        )

    def _complete(
        self, requests: Sequence[Request], progress: Callable[[int, int], None] | None = None
    ) -> list[Completion]:
        started, inbox = time.perf_counter(), Inbox()
        asked = dict(zip(self._submit(requests, inbox), requests, strict=True))
        try:
            for n in range(1, len(asked) + 1) if progress is not None else (len(asked),):
                self._turns.run_until(partial(inbox.has_finished, n), self._step)
                if progress is not None:
                    progress(n, len(asked))
        finally:
            self._turns.soon(partial(self._forget, list(asked)))
        return completions(inbox, asked, started)

    def _submit(self, requests: Sequence[Request | Embed], inbox: Inbox) -> list[int]:
        """Queue requests, all or none; their ids."""
        ids: list[int] = []
        with self._turns.turn():
            try:
                for request in requests:
                    ids.append(self.engine.submit(request))
                    self._inboxes[ids[-1]] = inbox
            except BaseException:
                self._forget(ids)
                raise
        return ids

    def _step(self) -> None:
        """One pass, in a turn; what it made goes to whoever asked for it."""
        if not self.engine.has_work:
            raise EngineError("the request is not in the engine any more: something else than this model cancelled it")
        events, now = self.engine.step(), time.perf_counter()
        for request_id, event in events:
            self._inboxes[request_id].put(request_id, now, event)

    def _forget(self, request_ids: Iterable[int]) -> None:
        """Drop requests wherever they are, in a turn; their blocks are free."""
        for request_id in request_ids:
            self.engine.cancel(request_id)
            self._inboxes.pop(request_id, None)

    # Chat ------------------------------------------------------------------------------------------------------------

    def chat_ids(self, messages: str | Sequence[Message]) -> list[int]:
        """The token ids of a conversation up to the point where the assistant answers.

        Raises:
            TemplateError: the model has no chat template, or cannot render these messages.
        """
        return render(asked.turns(messages), self._need_tokenizer(), add_generation_prompt=True).ids

    def chat_stream(self, messages: str | Sequence[Message], params: SamplingParams | None = None) -> Answer:
        """Answer a conversation (or a single user message), yielding each token as it is made."""
        return self.stream(self.chat_ids(messages), self.chat_params(params))

    def chat(
        self, messages: str | Sequence[Message], params: SamplingParams | None = None, *, adapter: str | None = None
    ) -> Completion:
        """Answer a conversation (or a single user message)."""
        return self.generate(self.chat_ids(messages), self.chat_params(params), adapter=adapter)

    def chat_params(self, params: SamplingParams | None = None) -> SamplingParams:
        """``params`` for an answer in a conversation: the texts that end its turn are stop strings too.

        There are such texts only where the template ends turns with something that is no token of the vocabulary.
        """
        params = asked.sampling(params)
        if not self._ends.texts or params.ignore_eos:
            return params
        return replace(params, stop=(*params.stop, *self._ends.texts))

    # Border checks ---------------------------------------------------------------------------------------------------

    @property
    def end_ids(self) -> set[int]:
        """Token ids that end an answer: the checkpoint's, the tokenizer's, and the template's ends of turns."""
        return {*self.config.eos_ids, *self._ends.ids}

    def prompt_ids(
        self, prompt: str | Sequence[int], *, parse_special: bool = True, add_special: bool = True
    ) -> list[int]:
        """A prompt as checked token ids.

        Args:
            prompt: text, which gets the bos token if the model wants one and it has none yet; or token ids.
            parse_special: names of special tokens in a text are those tokens: a prompt is what the model reads, and
                programs render templates themselves. False where the text is somebody's words; in a conversation
                (:meth:`chat_ids`) words always stay words.
            add_special: put the bos token before a text; False leaves it as it is.
        """
        if isinstance(prompt, str):
            self.check_length(prompt)
            tokenizer = self._need_tokenizer()
            encode = tokenizer.encode_prompt if add_special else tokenizer.encode
            prompt = encode(prompt, allow_special=parse_special)
        return self._check_ids(prompt)

    def check_length(self, text: str) -> None:
        """Refuse a text that cannot fit the context, without encoding it: megabytes would take seconds.

        Raises:
            RequestError: it certainly has more tokens than the context.
        """
        limit = self.config.max_seq_len
        if self._least is None or len(text) <= _ORDINARY_CHARS * limit:
            return
        least = self._least.of(text)
        if least > limit:
            raise RequestError(f"{len(text)} characters, {least} tokens or more, exceed the model's context of {limit}")

    def _check_ids(self, token_ids: TokenIds) -> list[int]:
        return asked.token_ids(token_ids, self.config.vocab_size, self.config.max_seq_len)

    def _need_tokenizer(self) -> Tokenizer:
        if self.tokenizer is None:
            raise TokenizerError(
                f"{self.name} came without a tokenizer, so text cannot be encoded. Give token ids, or put a "
                "tokenizer.json, a *.tiktoken, a tekken.json or a tokenizer.model beside the weights."
            )
        return self.tokenizer
