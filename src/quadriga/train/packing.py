"""Pack whole documents of different lengths into rows of equal length, as a ``BatchSource``.

    row  [ document | document | ... | padding ]        whole documents in shuffled order, first fit

A group (the two answers of a preference) stays in one row. Each epoch packs a permutation of the groups, which depends
only on (seed, epoch); a step's rows follow from the step. Rows left over at the end of an epoch are dropped, so that
every step has the same number of rows.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Sequence
from functools import lru_cache

import torch

from quadriga.errors import CorpusError
from quadriga.train.batch import IGNORE, TrainingBatch
from quadriga.train.chat_data import Example

PADDING = "padding"


class ExampleSource:
    """A :class:`~quadriga.train.batch.BatchSource` over examples in memory.

    Args:
        groups: documents that stay together in a row; a document's index in its group is its domain.
        domains: names of these indices; "padding" is appended.
        n_rows: rows per batch.
        seq_len: tokens per row.
        weigh: "tokens": every target has weight 1. "groups": the targets of a group have total weight 1.
        pad: token id of the padding.
        seed: of the shuffle.
        together: pack several groups into a row; False: each has a row of its own.
    """

    def __init__(
        self,
        groups: Sequence[tuple[Example, ...]],
        domains: Sequence[str],
        *,
        n_rows: int,
        seq_len: int,
        weigh: str = "tokens",
        pad: int = 0,
        seed: int = 0,
        together: bool = True,
    ) -> None:
        self.domains = (*domains, PADDING)
        self._groups, self._pad, self._seed, self._weigh = list(groups), pad, seed, weigh
        self._together = together
        self._n_rows, self._seq_len = n_rows, seq_len
        longest = max(sum(len(one.ids) for one in group) for group in self._groups)
        if longest > seq_len:
            raise CorpusError(f"data.seq_len must be at least the longest group's {longest} tokens, got {seq_len}")
        digest = hashlib.sha256(f"{n_rows} {seq_len} {weigh} {seed}{'' if together else ' apart'}".encode())
        for group in self._groups:
            digest.update(repr(group).encode())
        self.fingerprint = digest.hexdigest()
        self._epoch = lru_cache(maxsize=2)(self._pack)
        self.rows_per_epoch = len(self._epoch(0))

    def n_rows(self, step: int) -> int:
        """Rows per batch, the same at every step."""
        return self._n_rows

    def seq_len(self, step: int) -> int:
        """Tokens per row, the same at every step."""
        return self._seq_len

    @property
    def steps_per_epoch(self) -> int:
        """Optimiser steps per epoch (at least 1)."""
        return max(1, self.rows_per_epoch // self._n_rows)

    def rows(self, step: int, first: int, last: int) -> TrainingBatch:
        """Rows [first, last) of the batch at ``step``."""
        epoch, place = divmod(step, self.steps_per_epoch)
        packed = self._epoch(epoch)
        chosen = [packed[(place * self._n_rows + row) % len(packed)] for row in range(first, last)]
        return self._batch(chosen)

    def _pack(self, epoch: int) -> list[list[int]]:
        """An epoch's rows as lists of group indices: first fit into the few rows that are still open."""
        order = list(range(len(self._groups)))
        random.Random(f"{self._seed} {epoch}").shuffle(order)
        if not self._together:
            return [[number] for number in order]
        rows: list[list[int]] = []
        still_open: list[tuple[int, int]] = []  # (row, room left)
        for number in order:
            need = sum(len(one.ids) for one in self._groups[number])
            at = next((i for i, (_, room) in enumerate(still_open) if room >= need), None)
            if at is None:
                rows.append([number])
                still_open.append((len(rows) - 1, self._seq_len - need))
                if len(still_open) > 32:
                    still_open.pop(0)
                continue
            row, room = still_open[at]
            rows[row].append(number)
            still_open[at] = (row, room - need)
        return rows

    def _batch(self, rows: Sequence[Sequence[int]]) -> TrainingBatch:
        ids: list[int] = []
        targets: list[int] = []
        weights: list[float] = []
        bounds, domains = [0], []
        for row in rows:
            end = len(ids) + self._seq_len
            for number in row:
                group = self._groups[number]
                share = 1.0 if self._weigh == "tokens" else 1.0 / max(1, sum(one.n_targets for one in group))
                for place, one in enumerate(group):
                    ids += one.ids
                    targets += one.targets
                    weights += [share] * len(one.ids)
                    bounds.append(len(ids))
                    domains.append(place)
            if len(ids) < end:
                missing = end - len(ids)
                ids += [self._pad] * missing
                targets += [IGNORE] * missing
                weights += [0.0] * missing
                bounds.append(end)
                domains.append(len(self.domains) - 1)
        limits = torch.tensor(bounds)
        positions = torch.arange(len(ids)) - torch.repeat_interleave(limits[:-1], limits.diff())
        return TrainingBatch(
            tokens=torch.tensor(ids),
            targets=torch.tensor(targets),
            positions=positions,
            bounds=limits.int(),
            domains=torch.tensor(domains, dtype=torch.int16),
            weights=None if self._weigh == "tokens" else torch.tensor(weights),
        )
