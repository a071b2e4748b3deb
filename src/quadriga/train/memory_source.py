"""Documents in memory as a ``BatchSource``: for tests, examples and small data.

Documents are concatenated in a random order, which depends only on (seed, epoch), and cut into rows; a document that is
cut continues in the next row as a separate document.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from functools import lru_cache

import torch

from quadriga.errors import ConfigError
from quadriga.train.batch import IGNORE, TrainingBatch


class MemorySource:
    """A :class:`~quadriga.train.batch.BatchSource` over lists of token ids.

    Args:
        documents: (domain, token ids) of each.
            n_rows: rows per batch.
            seq_len: tokens per row.
            seed: of the order.
    """

    def __init__(
        self, documents: Sequence[tuple[str, Sequence[int]]], *, n_rows: int, seq_len: int, seed: int = 0
    ) -> None:
        self.domains = tuple(sorted({domain for domain, _ in documents}))
        self._texts = [(self.domains.index(domain), torch.tensor(list(ids))) for domain, ids in documents if len(ids)]
        self._length = sum(len(ids) for _, ids in self._texts)
        if self._length < 2:
            raise ConfigError(f"documents must have at least two tokens in total, got {self._length}")
        self._n_rows, self._seq_len, self._seed = n_rows, seq_len, seed
        digest = hashlib.sha256(f"{n_rows} {seq_len} {seed}".encode())
        for domain, ids in self._texts:
            digest.update(domain.to_bytes(2, "little") + ids.numpy().tobytes())
        self.fingerprint = digest.hexdigest()
        self._epoch = lru_cache(maxsize=2)(self._lay_out)

    def n_rows(self, step: int) -> int:
        """Rows per batch, the same at every step."""
        return self._n_rows

    def seq_len(self, step: int) -> int:
        """Tokens per row, the same at every step."""
        return self._seq_len

    def rows(self, step: int, first: int, last: int) -> TrainingBatch:
        """Rows [first, last) of the batch at ``step``."""
        parts = [self._row(step * self._n_rows + row) for row in range(first, last)]
        tokens, targets, begins, domains = zip(*parts, strict=True)
        starts = [n + row * self._seq_len for row, begin in enumerate(begins) for n in begin]
        bounds = torch.tensor([*starts, len(parts) * self._seq_len])
        lengths = bounds.diff()
        positions = torch.arange(int(bounds[-1])) - torch.repeat_interleave(bounds[:-1], lengths)
        return TrainingBatch(
            tokens=torch.cat(tokens),
            targets=torch.cat(targets),
            positions=positions,
            bounds=bounds.int(),
            domains=torch.tensor([d for row in domains for d in row], dtype=torch.int16),
        )

    def _row(self, row: int) -> tuple[torch.Tensor, torch.Tensor, list[int], list[int]]:
        """(tokens, targets, first positions of documents, their domains) of row ``row``, counted over the whole run."""
        tokens, owner = [], []
        at, wanted = row * self._seq_len, self._seq_len + 1
        while wanted:
            ids, owners = self._epoch(at // self._length)
            part = slice(at % self._length, at % self._length + wanted)
            tokens.append(ids[part])
            owner.append(owners[part] + (at // self._length) * len(self._texts))
            at, wanted = at + len(tokens[-1]), wanted - len(tokens[-1])
        ids, owners = torch.cat(tokens), torch.cat(owner)
        targets = torch.where(owners[1:] == owners[:-1], ids[1:], IGNORE)
        begins = [0, *((owners[1:-1] != owners[:-2]).nonzero()[:, 0] + 1).tolist()]
        order = [int(owners[n]) for n in begins]
        return ids[:-1], targets, begins, [self._domain(number) for number in order]

    def _domain(self, number: int) -> int:
        epoch, place = divmod(number, len(self._texts))
        return self._texts[int(self._order(epoch)[place])][0]

    def _order(self, epoch: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(self._seed * 1_000_003 + epoch)
        return torch.randperm(len(self._texts), generator=generator)

    def _lay_out(self, epoch: int) -> tuple[torch.Tensor, torch.Tensor]:
        """(tokens of an epoch, for each token the place of its document in the epoch's order)."""
        texts = [self._texts[i][1] for i in self._order(epoch).tolist()]
        places = torch.repeat_interleave(torch.arange(len(texts)), torch.tensor([len(ids) for ids in texts]))
        return torch.cat(texts), places
