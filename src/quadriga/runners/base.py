"""What the engine needs of a model: a runner computes one pass over a batch of packed tokens whose keys and values live
in numbered blocks. No torch: values that cross this seam are NumPy arrays.

    Batch ──► Runner.forward ──► logits (R, V)

``runners.compiled.CompiledModel`` is one (the CPU's kernels), ``runners.torch.TorchRunner`` the other: any device and
dtype that torch knows, CUDA included, and the reference that the first is compared with.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from quadriga.kernels.cpu.program import Batch
from quadriga.model.config import ModelConfig

Floats = NDArray[np.float32]


@dataclass(frozen=True)
class RouterStats:
    """One layer's routing of N tokens."""

    expert_ids: NDArray[np.int64]
    """(N, k), in the order they were chosen in."""
    expert_weights: Floats
    """(N, k), what each chosen expert's output was multiplied by."""
    probs: Floats
    """(N, E), the router's distribution over all experts: their softmax, or sigmoid scores divided by their sum."""
    logits: Floats
    """(N, E), what the scores were taken of."""

    def load(self) -> NDArray[np.int64]:
        """(E,): how many (token, slot) pairs each expert got."""
        return np.bincount(self.expert_ids.reshape(-1), minlength=self.probs.shape[-1])


class Runner(Protocol):
    """One model and its key/value blocks."""

    config: ModelConfig
    n_blocks: int
    kv_bytes: int
    """Bytes of all blocks."""

    def forward(self, batch: Batch) -> Floats:
        """(R, V) logits of the rows asked for, valid until the next pass; stores keys and values."""
        ...

    def copy_blocks(self, pairs: Sequence[tuple[int, int]]) -> None:
        """Copy the keys and values of whole blocks, (from, to), in every layer."""
        ...

    def row_stats(self, logits: Floats) -> tuple[list[int], list[float]]:
        """Of logits (R, V): the most probable token of every row (lowest id of equals), and log(sum(exp))."""
        ...

    def hidden(self, n_tokens: int) -> Floats:
        """(n_tokens, D): the last pass's states after the final norm, which the head reads."""
        ...

    def router_stats(self, n_tokens: int) -> list[RouterStats]:
        """The last pass's routing of its first ``n_tokens`` tokens, per MoE layer."""
        ...

    def weights(self) -> tuple[str, int]:
        """(the format that most of the weights in memory are in, their bytes)."""
        ...

    def expert_load(self) -> list[NDArray[np.int64]]:
        """Per MoE layer (E,): tokens every expert has seen since the start."""
        ...
