"""What runners on torch's tensors have in common, wherever those lie: copied blocks, counts, rows' statistics."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from quadriga.kernels.cpu.sampling import Logits
from quadriga.model.config import ModelConfig
from quadriga.nn.moe import RouterStats
from quadriga.quant.packed import BLOCK_TOKENS


class TensorRunner(ABC):
    """The part of ``runners.base.Runner`` that asks nothing of how a pass is computed.

    Args:
        stored: everything that lies in blocks, each (n_blocks * 16, ...).
    """

    def __init__(self, config: ModelConfig, n_blocks: int, stored: Sequence[Tensor], device: torch.device) -> None:
        self.config, self.n_blocks = config, n_blocks
        self.kv_bytes = sum(t.nbytes for t in stored)
        self._stored, self._device = list(stored), device
        self._widths = [(spec.n_experts, spec.top_k) for _, spec in config.moe_layers]
        most = max((n for n, _ in self._widths), default=0)
        # The last column takes what pads a layer that chooses fewer experts than another.
        self._load = torch.zeros(len(self._widths), most + 1, dtype=torch.int64, device=device)
        self._one = torch.ones(1, 1, dtype=torch.int64, device=device)

    def copy_blocks(self, pairs: Sequence[tuple[int, int]]) -> None:
        """See :class:`Runner`."""
        source, target = zip(*pairs, strict=True)
        for stored in self._stored:
            blocks = stored.view(self.n_blocks, BLOCK_TOKENS, *stored.shape[1:])
            blocks[list(target)] = blocks[list(source)]

    def row_stats(self, logits: Logits) -> tuple[list[int], list[float]]:
        """See :class:`Runner`."""
        rows = self._rows_of(logits)
        return rows.argmax(-1).tolist(), rows.logsumexp(-1).tolist()

    def weights(self) -> tuple[str, int]:
        """See :class:`Runner`."""
        n_bytes = self._sizes()
        return n_bytes.most_common(1)[0][0], n_bytes.total()

    def expert_load(self) -> list[NDArray[np.int64]]:
        """See :class:`Runner`."""
        counts = self._load.cpu().numpy()
        return [row[:n].copy() for row, (n, _) in zip(counts, self._widths, strict=True)]

    def _count(self, routing: Sequence[RouterStats], n_tokens: int) -> None:
        """Count what a pass's first tokens chose in every layer: two kernels, and nothing waits."""
        if not routing:
            return
        most, nobody = max(k for _, k in self._widths), self._load.shape[1] - 1
        chosen = [stats.expert_ids[:n_tokens] for stats in routing]
        padded = [ids if ids.shape[1] == most else F.pad(ids, (0, most - ids.shape[1]), value=nobody) for ids in chosen]
        every = torch.stack(padded).flatten(1)  # (layers, N k)
        self._load.scatter_add_(1, every, self._one.expand_as(every))

    def _rows_of(self, logits: Logits) -> Tensor:
        """Logits (R, V) as a tensor, where they are."""
        return torch.from_numpy(np.asarray(logits))

    @abstractmethod
    def _sizes(self) -> Counter[str]:
        """Bytes of the weights in every format or dtype."""


def dtype_sizes(parameters: Sequence[Tensor]) -> Counter[str]:
    """Bytes of tensors of every dtype."""
    n_bytes: Counter[str] = Counter()
    for parameter in parameters:
        n_bytes[str(parameter.dtype).removeprefix("torch.")] += parameter.nbytes
    return n_bytes
