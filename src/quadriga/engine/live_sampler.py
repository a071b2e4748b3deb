"""Answers drawn by the engine from a model that is being trained: many prompts at once, on the CPU's kernels.

    load(weights) ─► packed in place ─► an engine without cached prefixes ─► sample(prompts) ─► token ids

It is a ``train.services.Sampler``, which training is handed: neither imports the other.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

from quadriga import runtime
from quadriga.engine.llm import LLM
from quadriga.engine.request import SamplingParams
from quadriga.errors import ConfigError
from quadriga.kernels.cpu.packing import Parameter
from quadriga.model.cache_layout import cache_layout
from quadriga.model.config import ModelConfig
from quadriga.runners.compiled import CompiledModel
from quadriga.runners.live_weights import LiveWeights
from quadriga.text.tokenizer import Tokenizer


class LiveSampler:
    """See the module docstring.

    Args:
        config: the model.
        form: what its matrices are packed as.
        max_len: tokens of the longest prompt and answer together.
        max_sequences: answers that are made at once.
        threads: None: this rank's share of the processors.

    Raises:
        ConfigError: the model's context is shorter than ``max_len``.
    """

    def __init__(
        self,
        config: ModelConfig,
        tokenizer: Tokenizer,
        *,
        form: str = "float32",
        max_len: int,
        max_sequences: int = 64,
        threads: int | None = None,
    ) -> None:
        if max_len > config.max_seq_len:
            raise ConfigError(
                f"prompt and answer must fit the model's context of {config.max_seq_len} tokens: got {max_len} of both "
                "(data.seq_len + grpo.max_new_tokens)"
            )
        self._config, self._tokenizer = config, tokenizer
        self._max_len, self._max_sequences = max_len, max_sequences
        self._threads = runtime.threads_of_rank() if threads is None else threads
        self._weights = LiveWeights(form, self._build)
        self._llm: LLM | None = None

    def load(self, weights: Iterable[tuple[str, NDArray[np.float32]]]) -> None:
        """Compute with these weights from now on; the first call has all of them, later ones those that changed."""
        # A new engine, whose cache knows no prefix: those of the old one are of other weights.
        self._llm = LLM(self._weights.load(weights), self._tokenizer, max_sequences=self._max_sequences)

    def sample(
        self, prompts: Sequence[Sequence[int]], *, n: int, seeds: Sequence[int], max_new_tokens: int, temperature: float
    ) -> list[list[list[int]]]:
        """``n`` answers to every prompt as token ids, with the end token of those that ended.

        Args:
            seeds: one for each prompt; the same seed, weights and prompt give the same answers.
            temperature: 0: the most probable tokens.
        """
        assert self._llm is not None, "load comes first"
        params = [SamplingParams(max_new_tokens=max_new_tokens, temperature=temperature, seed=seed) for seed in seeds]
        answers = self._llm.generate_many(prompts, params, n=n)
        for answer in answers:
            if answer.error is not None:
                raise answer.error
        return [[one.token_ids for one in answers[i : i + n]] for i in range(0, len(answers), n)]

    def _build(self, parameters: dict[str, Parameter]) -> CompiledModel:
        cache = cache_layout(self._config)
        return CompiledModel(
            self._config,
            parameters,
            threads=self._threads,
            n_blocks=self._max_sequences * cache.n_blocks(self._max_len),
            n_slots=2 * self._max_sequences,
            cache=cache,
            kv_format="float32",
            activations="auto",
        )
