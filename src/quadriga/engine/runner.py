"""What the engine needs of a model, and the model that runs on plain torch.

A :class:`Runner` computes one pass over a batch of packed tokens whose keys and values live in numbered blocks.
``model.compiled.CompiledModel`` is one (the CPU's kernels); :class:`TorchRunner` is the other: any device and dtype
that torch knows, CUDA included, and the reference that the first is compared with.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from quadriga import runtime
from quadriga.engine.blocks import BLOCK_TOKENS
from quadriga.model.adapter_bank import AdapterBank
from quadriga.model.config import ModelConfig
from quadriga.model.context import Scoring
from quadriga.model.moe import RouterStats
from quadriga.model.transformer import Transformer
from quadriga.ops.program import Batch


class Runner(Protocol):
    """One model and its key/value blocks."""

    config: ModelConfig
    n_blocks: int
    kv_bytes: int
    """Bytes of all blocks."""

    def forward(self, batch: Batch) -> Tensor:
        """(R, V) float32 logits of the rows asked for, on the CPU, until the next pass; stores keys and values."""
        ...

    def copy_blocks(self, pairs: Sequence[tuple[int, int]]) -> None:
        """Copy the keys and values of whole blocks, (from, to), in every layer."""
        ...

    def row_stats(self, logits: Tensor) -> tuple[list[int], list[float]]:
        """Of logits (R, V): the most probable token of every row (lowest id of equals), and log(sum(exp))."""
        ...

    def hidden(self, n_tokens: int) -> Tensor:
        """(n_tokens, D) float32: the last pass's states after the final norm, which the head reads."""
        ...

    def router_stats(self, n_tokens: int) -> list[RouterStats]:
        """The last pass's routing of its first ``n_tokens`` tokens, per MoE layer."""
        ...

    def expert_load(self) -> list[Tensor]:
        """Per MoE layer (E,) int64: tokens every expert has seen since the start."""
        ...


class TorchRunner:
    """A Transformer on plain torch ops over a paged cache.

    Args:
        model: its parameters' device and dtype are computed in.
        n_blocks: KV blocks of 16 tokens.
    """

    def __init__(self, model: Transformer, n_blocks: int) -> None:
        self.model, self.config, self.n_blocks = model.eval(), model.config, n_blocks
        weight = next(model.parameters())
        attn = self.config.attn
        shape = (n_blocks * BLOCK_TOKENS, attn.n_kv_heads, attn.head_dim)
        self._keys = [torch.zeros(shape, dtype=weight.dtype, device=weight.device) for _ in range(self.config.n_layers)]
        self._values = [torch.zeros_like(keys) for keys in self._keys]
        self.kv_bytes = sum(t.nbytes for t in (*self._keys, *self._values))
        self._stats: list[RouterStats] = []
        self._load: list[Tensor] = []
        self.bank: AdapterBank | None = None
        self._adapters: Tensor | None = None

    def adapters(self) -> AdapterBank:
        """The model's adapters; the first call makes room for them."""
        if self.bank is None:
            self.bank = AdapterBank(self.model)
        return self.bank

    def choose(self, of_token: Sequence[int]) -> None:
        """Which adapter each token of the next pass uses, 0 for none; passes not announced so use none."""
        self._adapters = torch.tensor(of_token, device=self._keys[0].device)

    @torch.inference_mode()
    def forward(self, batch: Batch) -> Tensor:
        """See :class:`Runner`."""
        device = self._keys[0].device
        tokens = torch.from_numpy(batch.tokens).long().to(device)
        rows = torch.from_numpy(batch.rows).long().to(device)
        chosen, self._adapters = self._adapters, None
        with runtime.quick_float32(len(tokens)):
            if self.bank is not None:
                self.bank.choose(chosen)
            self._hidden, self._stats = self.model.hidden(tokens, _PagedContext(self, batch, device))
            if self.bank is not None:
                self.bank.choose(None if chosen is None else chosen[rows])
            logits: Tensor = self.model.head(self._hidden[rows]).cpu()
        for layer, stats in enumerate(self._stats):
            if layer == len(self._load):
                self._load.append(torch.zeros(stats.probs.shape[-1], dtype=torch.int64, device=device))
            self._load[layer] += stats.load()
        return logits

    def copy_blocks(self, pairs: Sequence[tuple[int, int]]) -> None:
        """See :class:`Runner`."""
        source, target = zip(*pairs, strict=True)
        for stored in (*self._keys, *self._values):
            blocks = stored.view(self.n_blocks, BLOCK_TOKENS, *stored.shape[1:])
            blocks[list(target)] = blocks[list(source)]

    def row_stats(self, logits: Tensor) -> tuple[list[int], list[float]]:
        """See :class:`Runner`."""
        return logits.argmax(-1).tolist(), logits.logsumexp(-1).tolist()

    @torch.inference_mode()
    def hidden(self, n_tokens: int) -> Tensor:
        """See :class:`Runner`."""
        normed: Tensor = self.model.final_norm(self._hidden[:n_tokens])
        return normed.float().cpu()

    def router_stats(self, n_tokens: int) -> list[RouterStats]:
        """See :class:`Runner`."""
        return [
            RouterStats(*(t[:n_tokens] for t in (s.expert_ids, s.expert_weights, s.probs, s.logits)))
            for s in self._stats
        ]

    def expert_load(self) -> list[Tensor]:
        """See :class:`Runner`."""
        return [load.cpu() for load in self._load]


class _PagedContext:
    """A ForwardContext over the runner's blocks for one batch."""

    def __init__(self, runner: TorchRunner, batch: Batch, device: torch.device) -> None:
        self._runner = runner
        self.positions = torch.from_numpy(batch.positions).long().to(device)
        self._spans = list(zip(batch.starts[:-1].tolist(), batch.starts[1:].tolist(), strict=True))
        slots, self._past = [], []
        for s, (start, stop) in enumerate(self._spans):
            blocks = batch.tables[batch.table_starts[s] : batch.table_starts[s + 1]].astype(np.int64)
            length = int(batch.positions[stop - 1]) + 1
            places = np.arange(length)
            place = blocks[places // BLOCK_TOKENS] * BLOCK_TOKENS + places % BLOCK_TOKENS
            self._past.append(torch.from_numpy(place).to(device))
            slots.append(place[batch.positions[start:stop]])
        self._slots = torch.from_numpy(np.concatenate(slots)).to(device)
        self._decode = None
        if len(self._spans) > 1 and all(stop - start == 1 for start, stop in self._spans):
            # All sequences decode: one padded attention for all of them.
            longest = max(len(past) for past in self._past)
            padded = torch.empty(len(self._spans), longest, dtype=torch.int64, device=device)
            for row, past in zip(padded, self._past, strict=True):
                # The rest repeats its own first place: a weight of 0 times another's NaN would be NaN.
                row[: len(past)], row[len(past) :] = past, past[0]
            self._decode = padded

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, scoring: Scoring) -> Tensor:
        """Store k and v, then attend; see ``model.context.ForwardContext``."""
        keys, values = self._runner._keys[layer], self._runner._values[layer]
        keys[self._slots], values[self._slots] = k, v
        if self._decode is not None:
            past_keys, past_values = (t[self._decode].transpose(1, 2) for t in (keys, values))  # (B, K, S, d)
            positions = self.positions[:, None]
            return scoring.attention(q[:, :, None], past_keys, past_values, q_positions=positions)[:, :, 0]
        out = torch.empty_like(q)
        for (start, stop), past in zip(self._spans, self._past, strict=True):
            stored = (t[past].transpose(0, 1)[None] for t in (keys, values))
            out[start:stop] = scoring.attention(q[start:stop].transpose(0, 1)[None], *stored)[0].transpose(0, 1)
        return out
