"""A loaded model as texts in and out: what benchmarks ask for. It meets ``evaluate.model.LanguageModel``.

A context and its continuation are tokenised together and cut where the context's own tokens end, after moving the
context's trailing spaces to the continuation: the convention of EleutherAI's harness, so that numbers compare. A pair
longer than the model's context loses its beginning; an empty context is the bos (or end) token.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path

from quadriga.engine.asked import several
from quadriga.engine.llm import LLM
from quadriga.engine.request import SamplingParams
from quadriga.engine.scoring import Scored
from quadriga.errors import CatalogueError, RequestError, TokenizerError
from quadriga.hub import catalogue
from quadriga.io import weight_names

Done = Callable[[int], None]


class TextModel:
    """See the module docstring.

    Args:
        llm: the model.
        chat: put every prompt into the model's chat template as a user's message, and let the assistant answer; its
            log-likelihoods are then those of an assistant's turn.
        options: how it was loaded, for the record.
    """

    def __init__(self, llm: LLM, *, chat: bool = False, options: Mapping[str, str] | None = None) -> None:
        if llm.tokenizer is None:
            raise TokenizerError(f"{llm.name} came without a tokenizer, so it cannot be evaluated on text")
        self.llm, self.chat, self._tokenizer = llm, chat, llm.tokenizer
        self._options = dict(options or {})
        self._contexts: dict[str, list[int]] = {}

    @property
    def name(self) -> str:
        """The model's last name."""
        return Path(self.llm.name).name

    @property
    def context(self) -> int:
        """Tokens that prompt and answer may have together."""
        return self.llm.config.max_seq_len

    @cached_property
    def identity(self) -> dict[str, str]:
        """Name, hash of the weight files, and how they were loaded."""
        return {"model": self.llm.name, "weights": weights_hash(self.llm.name), "chat": str(self.chat), **self._options}

    def loglikelihoods(self, requests: Sequence[tuple[str, str]], *, done: Done = lambda n: None) -> list[Scored]:
        """How probable each continuation is after its context."""
        self._contexts.clear()
        return self.llm.score([self.pair(*request) for request in several(requests, "requests")], done=done)

    def rolling(self, texts: Sequence[str], *, done: Done = lambda n: None) -> list[Scored]:
        """How probable each whole text is, in the windows of EleutherAI's harness.

        Every token is predicted once, in windows as long as the model's context; the first begins after the
        vocabulary's first token, each next one after one token of context, and the last, which has fewer to predict,
        after as many as fit. 300 tokens at a context of 128: (1, 128), (1, 128), (85, 44).
        """
        windows: list[tuple[list[int], list[int]]] = []
        owner: list[int] = []
        size = self.llm.config.max_seq_len
        for i, text in enumerate(several(texts, "texts")):
            ids = self._tokenizer.encode(text)
            if not ids:
                raise RequestError("a text to score needs at least one token")
            for start in range(0, len(ids), size):
                stop = min(start + size, len(ids))
                before = [self._first_id] if start == 0 else ids[stop - size - 1 : start]
                windows.append((before, ids[start:stop]))
                owner.append(i)
        merged: list[list[Scored]] = [[] for _ in texts]
        for i, scored in zip(owner, self.llm.score(windows), strict=True):
            merged[i].append(scored)
        done(len(texts))
        return [Scored(tuple(p for s in parts for p in s.logprobs), all(s.greedy for s in parts)) for parts in merged]

    def generate(
        self,
        prompts: Sequence[str],
        *,
        max_new_tokens: int,
        stop: Sequence[str] = (),
        temperature: float = 0.0,
        seed: int | None = None,
        done: Done = lambda n: None,
    ) -> list[str]:
        """Continue each prompt; one that leaves no room for the answer loses its beginning.

        Raises:
            QuadrigaError: an answer failed on its way; the others have run to their ends.
        """
        ids = [self._prompt(prompt) for prompt in several(prompts, "prompts")]
        params = SamplingParams(
            max_new_tokens=max_new_tokens, stop=tuple(several(stop, "stop")), temperature=temperature, seed=seed or 0
        )
        return self._answers(ids, self.llm.chat_params(params) if self.chat else params, done)

    def converse(
        self,
        conversations: Sequence[Sequence[Mapping[str, str]]],
        *,
        max_new_tokens: int,
        temperature: float = 0.0,
        seed: int | None = None,
        done: Done = lambda n: None,
    ) -> list[str]:
        """The assistant's next turn of each conversation, in the model's chat template.

        Raises:
            TemplateError: the model has none.
            QuadrigaError: an answer failed on its way; the others have run to their ends.
        """
        ids = [self.llm.chat_ids([dict(one) for one in messages]) for messages in conversations]
        params = SamplingParams(max_new_tokens=max_new_tokens, temperature=temperature, seed=seed or 0)
        return self._answers(ids, self.llm.chat_params(params), done)

    def _answers(self, prompts: Sequence[list[int]], params: SamplingParams, done: Done) -> list[str]:
        """Answers to prompts, each with its own seed, counted from that of ``params``."""
        most = self.llm.config.max_seq_len - params.max_new_tokens
        if most < 1:
            raise RequestError(
                f"an answer of {params.max_new_tokens} tokens fills the model's context of "
                f"{self.llm.config.max_seq_len}: allow fewer"
            )
        ids = [prompt[-most:] for prompt in prompts]
        base = params.seed or 0
        each = [replace(params, seed=base + i) for i in range(len(ids))]
        seen = 0

        def finished(n: int, _: int) -> None:
            nonlocal seen
            done(n - seen)
            seen = n

        answers = self.llm.generate_many(ids, each, progress=finished)
        for answer in answers:
            if answer.error is not None:  # a score of half an answer would be a wrong score
                raise answer.error
        return [answer.text for answer in answers]

    def count_tokens(self, text: str) -> int:
        """Tokens of a text."""
        return len(self._tokenizer.encode(text))

    def pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """A context and its continuation as ids; see the module docstring for where they are cut."""
        n_spaces = len(context) - len(context.rstrip())
        if n_spaces and not self.chat:
            context, continuation = context[:-n_spaces], context[-n_spaces:] + continuation
        if self.chat:
            before, after = self._prompt(context), self._tokenizer.encode_continuation(continuation.lstrip())
        elif not context:
            before, after = [self._first_id], self._tokenizer.encode(continuation)
        else:
            before = self._contexts.get(context) or self._prompt(context)
            self._contexts[context] = before
            whole = self._prompt(context + continuation)
            before, after = whole[: len(before)], whole[len(before) :]
        if not after:
            raise RequestError(f"the continuation {continuation!r} has no token of its own after its context")
        too_many = len(before) + len(after) - 1 - self.llm.config.max_seq_len
        return (before[max(0, too_many) :], after) if too_many < len(before) else ([], after)

    def _prompt(self, text: str) -> list[int]:
        if self.chat:
            return self.llm.chat_ids(text)
        return [*self._tokenizer.prefix_ids, *self._tokenizer.encode(text)]

    @property
    def _first_id(self) -> int:
        """What stands before a text that has nothing before it."""
        bos = [] if self._tokenizer.bos_id is None else [self._tokenizer.bos_id]
        ids = [*bos, *self._tokenizer.eos_ids, *sorted(self.llm.end_ids)]
        if not ids:
            raise TokenizerError("the vocabulary has neither a bos nor an end token to stand before a text")
        return ids[0]


def weights_hash(name_or_path: str) -> str:
    """16 hex digits that change with the weights: a hash over names, sizes and first and last megabyte of each file.

    Reading 260 GB to name a model would take longer than most tasks; a catalogue model's whole hash is known anyway.
    """
    if name_or_path in catalogue.CATALOGUE:
        return catalogue.CATALOGUE[name_or_path].sha256[:16]
    try:
        path = catalogue.resolve(name_or_path)
    except CatalogueError:
        return "made in memory"
    parts = weight_names.parts_here(path) if path.is_file() else []
    files = parts or sorted(f for f in path.rglob("*") if f.is_file() and f.name != "entry.json")
    digest, edge = hashlib.sha256(), 1 << 20
    for file in files:
        size = file.stat().st_size
        digest.update(f"{file.name if path.is_file() else file.relative_to(path)}\0{size}\0".encode())
        with file.open("rb") as stream:
            digest.update(stream.read(edge))
            if size > 2 * edge:
                stream.seek(size - edge)
                digest.update(stream.read(edge))
    return digest.hexdigest()[:16]
