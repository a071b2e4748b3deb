"""The offline API: load a model by name or path, ask it for logits, text or a chat answer.

    model = quadriga.load("smollm2-135m-instruct")
    model.chat("What is the capital of France?").text
    model.logits(model.tokenizer.encode("The capital of France is"))      # (T, V) float32

One :class:`LLM` holds one model and serves one caller at a time; serving many at once is the server's engine.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from quadriga import runtime
from quadriga.checkpoint import catalogue
from quadriga.checkpoint.open import load_parameters, open_checkpoint
from quadriga.engine.kv_cache import KVCache
from quadriga.engine.request import Completion, SamplingParams, TokenEvent
from quadriga.engine.sampler import Sampler
from quadriga.errors import RequestError, TokenizerError
from quadriga.model.config import ModelConfig
from quadriga.model.context import PackedContext
from quadriga.model.moe import RouterStats
from quadriga.model.transformer import Transformer
from quadriga.text.chat import render
from quadriga.text.stream import Detokenizer
from quadriga.text.tokenizer import Tokenizer

Message = Mapping[str, str]
"""One turn: {"role": "system" | "user" | "assistant", "content": text}."""

Progress = Callable[[int, int, str], None]
"""Called with (bytes done, bytes in all, what is being read)."""

Answer = Generator[TokenEvent, None, None]
"""Tokens as they are made; closing it ends the answer."""

PREFILL_CHUNK = 2048
"""Prompt tokens per forward pass: bounds the activations of a long prompt without costing speed."""


def load(
    path_or_name: str | Path,
    *,
    dtype: str = "float32",
    device: str = "cpu",
    threads: int | None = None,
    progress: Progress | None = None,
) -> LLM:
    """Load a model.

    Args:
        path_or_name: a catalogue name (`quadriga models list`), a Hugging Face or Quadriga directory, a GGUF file, or
            the folder of Grok-1's release.
        dtype: what the model computes in: float32, bfloat16, float16, float64, or auto.
        device: a torch device, or auto.
        threads: CPU threads; None leaves torch's setting as it is.
        progress: called while weights are downloaded and read.

    Raises:
        CatalogueError: no model of that name or no file at that path, or the download failed.
        CheckpointError, ConfigError: the files are malformed, incomplete or of an unsupported kind.
        HardwareError: the device does not exist here.
    """
    if threads is not None:
        runtime.set_threads(threads)
    target = runtime.resolve_device(device)
    opened = open_checkpoint(catalogue.resolve(str(path_or_name), progress=progress))
    parameters = load_parameters(
        opened, dtype=runtime.resolve_dtype(dtype, target.type), device=target, progress=progress
    )
    model = Transformer.from_parameters(opened.config, parameters).eval()
    return LLM(model, opened.load_tokenizer(), name=str(path_or_name))


class LLM:
    """A loaded model with its tokenizer.

    Attributes:
        config: what the model is.
        tokenizer: its vocabulary, or None where the checkpoint has none (then prompts are token ids).
        name: how it was asked for.
    """

    def __init__(self, model: Transformer, tokenizer: Tokenizer | None, *, name: str = "model") -> None:
        self.model = model
        self.config: ModelConfig = model.config
        self.tokenizer = tokenizer
        self.name = name
        self.device = model.embed.weight.device
        self.dtype = model.embed.weight.dtype
        if tokenizer is not None and tokenizer.n_vocab > self.config.vocab_size:
            raise TokenizerError(
                f"the tokenizer has {tokenizer.n_vocab} tokens, the model's embedding only {self.config.vocab_size}. "
                "Check that both come from the same checkpoint."
            )

    # Whole sequences -------------------------------------------------------------------------------------------------

    @torch.inference_mode()
    def logits(self, token_ids: Sequence[int] | Tensor) -> Tensor:
        """Logits of every position of one sequence: ids (T,) -> (T, V) float32."""
        ids = self._check_ids(token_ids)
        with runtime.quick_float32(len(ids)):
            logits: Tensor = self.model(ids, PackedContext([len(ids)], self.device)).logits
        return logits.float()

    @torch.inference_mode()
    def routing(self, token_ids: Sequence[int] | Tensor) -> list[RouterStats]:
        """What every layer's router decided for each token of one sequence; empty for a dense model."""
        ids = self._check_ids(token_ids)
        _, stats = self.model.hidden(ids, PackedContext([len(ids)], self.device))
        return stats

    # Generation ------------------------------------------------------------------------------------------------------

    def stream(self, prompt: str | Sequence[int], params: SamplingParams | None = None) -> Answer:
        """Continue a prompt, yielding each token as it is made.

        Args:
            prompt: text (encoded with the model's bos token if it wants one; typed special tokens stay text), or
                token ids taken as they are.

        Raises:
            RequestError: an empty prompt, ids outside the vocabulary, or a prompt that fills the context.
        """
        params = params or SamplingParams()
        ids = self.prompt_ids(prompt)
        if len(ids) >= self.config.max_seq_len:
            raise RequestError(
                f"the prompt has {len(ids)} tokens and the model's context is {self.config.max_seq_len}: "
                "no room for an answer. Shorten the prompt."
            )
        return self._decode(ids, params)

    def _decode(self, prompt: list[int], params: SamplingParams) -> Answer:
        sampler = Sampler(params, prompt, self.config.vocab_size)
        text = Detokenizer(self.tokenizer, stop=params.stop) if self.tokenizer is not None else None
        ends = set(params.stop_ids) | (set() if params.ignore_eos else self.end_ids)
        cache = KVCache(self.config, dtype=self.dtype, device=self.device)
        logits = self._prefill(cache, prompt)
        room = min(params.max_new_tokens, self.config.max_seq_len - len(prompt))
        for n_made in range(1, room + 1):
            chosen = sampler.sample(logits)
            ended = chosen.token_id in ends
            piece, hit_stop = ("", False) if text is None or ended else text.push(chosen.token_id)
            last = ended or hit_stop or n_made == room
            if last and not hit_stop and text is not None:
                piece += text.finish()
            yield TokenEvent(
                token_id=chosen.token_id,
                text=piece,
                logprob=chosen.logprob,
                top_logprobs=chosen.top_logprobs,
                finish_reason=("stop" if ended or hit_stop else "length") if last else None,
            )
            if last:
                return
            logits = self._step(cache, [chosen.token_id])

    @torch.inference_mode()
    def _prefill(self, cache: KVCache, ids: list[int]) -> Tensor:
        for start in range(0, len(ids), PREFILL_CHUNK):
            logits = self._step(cache, ids[start : start + PREFILL_CHUNK])
        return logits

    @torch.inference_mode()
    def _step(self, cache: KVCache, ids: list[int]) -> Tensor:
        """Read ids into the cache; the logits (V,) after the last of them."""
        tokens = torch.tensor(ids, device=self.device)
        last = torch.tensor([len(ids) - 1], device=self.device)
        with runtime.quick_float32(len(ids)):
            logits: Tensor = self.model(tokens, cache.extend([len(ids)]), rows=last).logits[0]
        return logits

    def generate(self, prompt: str | Sequence[int], params: SamplingParams | None = None) -> Completion:
        """Continue a prompt to its end; see :meth:`stream`."""
        ids = self.prompt_ids(prompt)
        return _collect(self.stream(ids, params), n_prompt_tokens=len(ids))

    # Chat ------------------------------------------------------------------------------------------------------------

    def chat_ids(self, messages: str | Sequence[Message]) -> list[int]:
        """The token ids of a conversation up to the point where the assistant answers.

        Raises:
            TemplateError: the model has no chat template, or cannot render these messages.
        """
        turns = [{"role": "user", "content": messages}] if isinstance(messages, str) else list(messages)
        return render(turns, self._need_tokenizer(), add_generation_prompt=True).ids

    def chat_stream(self, messages: str | Sequence[Message], params: SamplingParams | None = None) -> Answer:
        """Answer a conversation (or a single user message), yielding each token as it is made."""
        return self.stream(self.chat_ids(messages), params)

    def chat(self, messages: str | Sequence[Message], params: SamplingParams | None = None) -> Completion:
        """Answer a conversation (or a single user message)."""
        return self.generate(self.chat_ids(messages), params)

    # Border checks ---------------------------------------------------------------------------------------------------

    @property
    def end_ids(self) -> set[int]:
        """Token ids that end an answer: the checkpoint's and the tokenizer's."""
        return {*self.config.eos_ids, *(self.tokenizer.eos_ids if self.tokenizer is not None else ())}

    def prompt_ids(self, prompt: str | Sequence[int]) -> list[int]:
        """A prompt as checked token ids; text is encoded with special tokens off, after bos if the model wants it."""
        if isinstance(prompt, str):
            tokenizer = self._need_tokenizer()
            prompt = [*tokenizer.prefix_ids, *tokenizer.encode(prompt)]
        ids: list[int] = self._check_ids(prompt).tolist()
        return ids

    def _check_ids(self, token_ids: Sequence[int] | Tensor) -> Tensor:
        ids = torch.as_tensor(token_ids, device=self.device)
        if ids.ndim != 1 or ids.numel() == 0:
            raise RequestError("a prompt needs at least one token")
        if ids.dtype.is_floating_point or ids.dtype == torch.bool:
            raise RequestError(f"token ids must be whole numbers, got {ids.dtype}")
        if int(ids.min()) < 0 or int(ids.max()) >= self.config.vocab_size:
            raise RequestError(
                f"token ids must be from 0 to {self.config.vocab_size - 1}, got {int(ids.min())} to {int(ids.max())}"
            )
        if len(ids) > self.config.max_seq_len:
            raise RequestError(f"{len(ids)} tokens exceed the model's context of {self.config.max_seq_len}")
        return ids.long()

    def _need_tokenizer(self) -> Tokenizer:
        if self.tokenizer is None:
            raise TokenizerError(
                f"{self.name} came without a tokenizer, so text cannot be encoded. Give token ids, or put a "
                "tokenizer.json, a *.tiktoken or a tokenizer.model beside the weights."
            )
        return self.tokenizer


def _collect(events: Iterator[TokenEvent], n_prompt_tokens: int) -> Completion:
    started = first = time.perf_counter()
    made: list[TokenEvent] = []
    for event in events:
        if not made:
            first = time.perf_counter()
        made.append(event)
    finish = made[-1].finish_reason
    assert finish is not None, "the last event carries the finish reason"
    return Completion(
        text="".join(event.text for event in made),
        token_ids=[event.token_id for event in made],
        logprobs=[event.logprob for event in made],
        finish_reason=finish,
        n_prompt_tokens=n_prompt_tokens,
        time_to_first_token_s=first - started,
        decode_s=time.perf_counter() - first,
    )
