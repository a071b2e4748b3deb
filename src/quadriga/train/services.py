"""What a tuning run uses and training does not have: the engine, a sandbox, models behind an address.

Training never imports the engine or the evaluation (docs/architecture.md); whoever starts a run hands these in, as
``quadriga tune`` does (``cli.tune_services``). No torch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from quadriga.model.config import ModelConfig
from quadriga.text.tokenizer import Tokenizer

Weights = Iterable[tuple[str, NDArray[np.float32]]]
"""(name, values) of parameters, named and shaped as ``model.weight_map.parameter_shapes``."""


TopTokens = Sequence[Mapping[str, float] | None]
"""Of every token of a text: text of a token -> its log-probability after the tokens before; None: not known."""


class Sampler(Protocol):
    """Draws answers from a model whose weights change."""

    def load(self, weights: Weights) -> None:
        """Compute with these weights from now on; the first call has all of them, later ones those that changed."""
        ...

    def sample(
        self, prompts: Sequence[Sequence[int]], *, n: int, seeds: Sequence[int], max_new_tokens: int, temperature: float
    ) -> list[list[list[int]]]:
        """``n`` answers to every prompt as token ids, with the end token of those that ended.

        Args:
            seeds: one for each prompt; the same seed, weights and prompt give the same answers.
            temperature: 0: the most probable tokens.
        """
        ...


@dataclass(frozen=True)
class SamplerOptions:
    """How a sampler is made."""

    format: str
    """Storage format of the matrices that it computes with."""
    max_len: int
    """Tokens of the longest prompt and answer together."""


@dataclass(frozen=True)
class Services:
    """What is handed to a run; a run that needs what is None is refused."""

    sampler: Callable[[ModelConfig, Tokenizer, SamplerOptions], Sampler] | None = None
    run_programs: Callable[[Sequence[str], float], list[bool]] | None = None
    """(programs, seconds for each) -> whether each ran to its end."""
    judge: Callable[[str, str], Callable[[Sequence[str]], list[str]]] | None = None
    """(address, model) -> what asks it: texts -> its answers."""
    teacher: Callable[[str, str], Callable[[Sequence[Sequence[int]], int], list[TopTokens]]] | None = None
    """(address, model) -> what asks it: (texts as token ids, k) -> of each text the k most probable tokens of every
    position after the tokens before it."""
