"""Keys and values of what a model has read, one contiguous strip per sequence.

    keys, values: per layer (B, K, S, d);  sequence b has lengths[b] valid positions, the rest is spare room

:class:`CacheContext` is the model's view of it for one forward pass: it says where the new tokens stand, stores their
keys and values, and attends over everything stored. Strips grow by doubling up to the model's context, so a short chat
does not pay for 32k positions.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from quadriga.errors import RequestError
from quadriga.model.config import ModelConfig
from quadriga.model.context import Scoring

_FIRST_CAPACITY = 256


class KVCache:
    """Room for the keys and values of ``n_sequences`` sequences; see the module docstring for the layout."""

    def __init__(
        self, config: ModelConfig, n_sequences: int = 1, *, dtype: torch.dtype, device: torch.device | str = "cpu"
    ) -> None:
        self.config = config
        self.lengths = [0] * n_sequences
        self.dtype, self.device = dtype, torch.device(device)
        self._capacity = 0
        self.keys: list[Tensor] = [self._strip(0) for _ in range(config.n_layers)]
        self.values: list[Tensor] = [self._strip(0) for _ in range(config.n_layers)]

    def _strip(self, capacity: int) -> Tensor:
        attn = self.config.attn
        shape = (len(self.lengths), attn.n_kv_heads, capacity, attn.head_dim)
        # Zeros, not empty: in a ragged batch the spare room of a shorter sequence is read with weight 0, and 0 times
        # the NaN that fresh memory may hold is NaN.
        return torch.zeros(shape, dtype=self.dtype, device=self.device)

    def truncate(self, sequence: int, length: int) -> None:
        """Forget the positions of one sequence from ``length`` on."""
        assert 0 <= length <= self.lengths[sequence], "a cache is only ever cut back"
        self.lengths[sequence] = length

    def extend(self, new_tokens: Sequence[int]) -> CacheContext:
        """Make room for new_tokens[b] more tokens of each sequence b and return the context of their forward pass.

        Raises:
            RequestError: a sequence would outgrow the model's context.
        """
        assert len(new_tokens) == len(self.lengths), "one count per sequence"
        needed = max(have + new for have, new in zip(self.lengths, new_tokens, strict=True))
        if needed > self.config.max_seq_len:
            raise RequestError(
                f"the sequence would have {needed} tokens, the model's context is {self.config.max_seq_len}. "
                "Shorten the prompt or ask for fewer new tokens."
            )
        if needed > self._capacity:
            self._grow(min(self.config.max_seq_len, max(_FIRST_CAPACITY, 2 * self._capacity, needed)))
        starts = list(self.lengths)
        self.lengths = [have + new for have, new in zip(self.lengths, new_tokens, strict=True)]
        return CacheContext(self, starts, list(new_tokens))

    def _grow(self, capacity: int) -> None:
        for strips in (self.keys, self.values):
            for layer, old in enumerate(strips):
                strips[layer] = self._strip(capacity)
                strips[layer][:, :, : old.shape[2]] = old
        self._capacity = capacity

    @property
    def nbytes(self) -> int:
        """Bytes held, spare room included."""
        return sum(t.nbytes for t in (*self.keys, *self.values))


class CacheContext:
    """A ForwardContext over a KVCache: tokens packed sequence after sequence, new_tokens[b] of them for sequence b."""

    def __init__(self, cache: KVCache, starts: list[int], new_tokens: list[int]) -> None:
        self.cache = cache
        device = cache.device
        spans = [torch.arange(start, start + n) for start, n in zip(starts, new_tokens, strict=True)]
        self.positions = torch.cat(spans).to(device)
        self._single = len(new_tokens) == 1
        self._start = starts[0]
        if not self._single:
            counts = torch.tensor(new_tokens)
            self._sequence = torch.repeat_interleave(torch.arange(len(counts)), counts).to(device)  # (N,)
            self._column = torch.cat([torch.arange(n) for n in new_tokens]).to(device)  # (N,) index among the new
            self._query_positions = torch.full((len(counts), int(counts.max())), -1, device=device)  # (B, T), -1 pads
            self._query_positions[self._sequence, self._column] = self.positions

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, scoring: Scoring) -> Tensor:
        """Store k and v, then attend over all stored positions; see ``model.context.ForwardContext``."""
        keys, values = self.cache.keys[layer], self.cache.values[layer]
        if self._single:
            stop = self._start + q.shape[0]
            keys[0, :, self._start : stop] = k.transpose(0, 1)
            values[0, :, self._start : stop] = v.transpose(0, 1)
            out = scoring.attention(q.transpose(0, 1)[None], keys[:, :, :stop], values[:, :, :stop])
            return out[0].transpose(0, 1)
        keys[self._sequence, :, self.positions] = k
        values[self._sequence, :, self.positions] = v
        stop = max(self.cache.lengths)
        padded = q.new_zeros((*self._query_positions.shape, *q.shape[1:]))  # (B, T, H, d)
        padded[self._sequence, self._column] = q
        out = scoring.attention(
            padded.transpose(1, 2), keys[:, :, :stop], values[:, :, :stop], q_positions=self._query_positions
        )
        return out.transpose(1, 2)[self._sequence, self._column]
