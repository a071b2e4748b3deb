"""What the engine needs of a model: a runner computes one pass over a batch of packed tokens whose keys and values live
in numbered blocks. No torch: values that cross this seam are NumPy arrays.

    PassBatch ──► Runner.forward ──► PassResult: logits (R, V), where asked for hidden (N, D) and routing per MoE layer

A result is a value: no later pass changes it, and a runner remembers nothing of a pass but keys, values and counts.

``runners.compiled.CompiledModel`` is one (the CPU's kernels), ``runners.torch.TorchRunner`` the other: any device and
dtype that torch knows, CUDA included, and the reference that the first is compared with.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from quadriga.kernels.cpu.expert_store import ExpertStore
from quadriga.kernels.cpu.sampling import Logits, TokenSampler
from quadriga.kernels.pass_batch import PassBatch
from quadriga.model.adapter_spec import LoraSpec
from quadriga.model.cache_layout import CacheLayout
from quadriga.model.config import ModelConfig

Floats = NDArray[np.float32]


@dataclass(frozen=True)
class LayerRouting:
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


@dataclass(frozen=True)
class PassResult:
    """What a pass computed of its N tokens."""

    logits: Logits
    """(R, V), of the rows that the batch asked for. They may be on a device: reading them waits for it."""
    hidden: Floats | None = None
    """(N, D), the states after the final norm, which the head reads; None where they were not asked for."""
    routing: list[LayerRouting] | None = None
    """Per MoE layer; None where it was not asked for."""


@dataclass(frozen=True)
class CacheSize:
    """How much of sequences a runner has room for."""

    n_blocks: int
    """Blocks of 16 positions of keys and values."""
    n_slots: int
    """States of recurrent layers; 0 for a model without one."""


class Adapters(Protocol):
    """The adapters of a model by name, to be chosen per request. They come and go between passes."""

    @property
    def names(self) -> Mapping[str, int]:
        """Adapter name -> its number, from 1 on; none is used twice."""
        ...

    def add(self, name: str, spec: LoraSpec, factors: Mapping[str, tuple[Floats, Floats]]) -> None:
        """Make an adapter available: parameter -> (A, B), ([E,] r, in) and ([E,] out, r).

        Raises:
            RequestError: the name is taken.
        """
        ...

    def remove(self, name: str) -> None:
        """Forget an adapter.

        Raises:
            RequestError: there is none of this name.
        """
        ...

    def number(self, name: str) -> int:
        """The number of an adapter.

        Raises:
            RequestError: there is none of this name.
        """
        ...


class Runner(Protocol):
    """One model, its key/value blocks, and the slots in which recurrent layers keep their states.

    A pass reads each sequence's states from one slot and leaves them in another or the same (``PassBatch.before`` and
    ``after``). A slot that one sequence of a pass writes no other may read or write.
    """

    config: ModelConfig
    n_blocks: int
    cache: CacheLayout
    """How the layers share the blocks."""
    kv_bytes: int
    """Bytes of all blocks."""
    n_slots: int
    """Places for the states of recurrent layers, each of one sequence at one position; 0: the model has none."""
    state_bytes: int
    """Bytes of all of them."""
    store: ExpertStore | None
    """Where the experts are, if they stay on disk."""
    row_sampler: TokenSampler | None
    """What chooses tokens from logits; None: the engine does, in NumPy."""
    can_steer: bool
    """True if passes heed ``PassBatch.steering``."""

    @property
    def adapter_names(self) -> list[str]:
        """Names of the adapters that were added."""
        ...

    def adapters(self) -> Adapters:
        """Where adapters are added and removed.

        Raises:
            RequestError: this runner computes without adapters.
        """
        ...

    def forward(
        self, batch: PassBatch, *, adapters: Sequence[int] | None = None, hidden: bool = False, routing: bool = False
    ) -> PassResult:
        """Compute a pass and store its keys and values.

        Args:
            adapters: of each of the N tokens, the number of its adapter, 0 for none; None: no token has one.
            hidden, routing: return them too.
        """
        ...

    def copy_blocks(self, pairs: Sequence[tuple[int, int]]) -> None:
        """Copy the keys and values of whole blocks, (from, to)."""
        ...

    def row_stats(self, logits: Logits) -> tuple[list[int], list[float]]:
        """Of logits (R, V): the most probable token of every row (lowest id of equals), and log(sum(exp))."""
        ...

    def weights(self) -> tuple[str, int]:
        """(the format that most of the weights in memory are in, their bytes)."""
        ...

    def expert_load(self) -> list[NDArray[np.int64]]:
        """Per MoE layer (E,): tokens every expert has seen since the start."""
        ...
