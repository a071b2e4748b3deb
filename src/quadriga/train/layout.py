"""What a rank of a run has: which rows it reads, which of their tokens are its own, which portions of parameters.

Ranks are numbered so that neighbours share rows:

    ranks in order        pipeline x replicate x ... x context x tensor      the last count fastest: neighbours share
    rank r of a stage     row group r // sharing, part r % sharing of its rows                               rows
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate

from quadriga.errors import ConfigError
from quadriga.model.parallel_spec import ParallelSpec
from quadriga.train.batch import TrainingBatch
from quadriga.train.row_group import ALONE, RowGroup
from quadriga.train.shards import Portion, local_parts
from quadriga.train.stage import Stage, of_table


@dataclass(frozen=True, kw_only=True)
class Layout:
    """See the module docstring; by default that of a single process."""

    spec: ParallelSpec = field(default_factory=ParallelSpec)
    rank: int = 0
    """In its stage."""
    stage: Stage = field(default_factory=Stage)
    absent: frozenset[str] = frozenset()
    """Parameters and buffers that other stages have."""
    dtype: torch.dtype = torch.float32
    """Of the computation."""
    group: RowGroup = ALONE
    portions: Mapping[str, Portion] = field(default_factory=dict)
    """Of the parameters of which this rank and those that shard them with it have only some heads."""

    @property
    def n_row_groups(self) -> int:
        """Groups of ranks that read rows of their own."""
        return self.spec.stage_ranks // self.spec.sharing

    @property
    def row_group(self) -> int:
        """This rank's group."""
        return self.rank // self.spec.sharing

    def check_rows(self, n_rows: int, micro_rows: int, seq_len: int) -> None:
        """Check that a batch can be divided.

        Raises:
            ConfigError: its rows, among micro-steps and row groups, or a row's tokens, among ranks, cannot.
        """
        if n_rows % micro_rows or micro_rows % self.n_row_groups:
            raise ConfigError(
                "parallel.micro_rows must divide the rows of a batch and be a multiple of the number of ranks, or of "
                f"groups of ranks that share rows: got micro_rows={micro_rows}, {n_rows} rows, {self.n_row_groups} "
                f"{'ranks' if self.spec.sharing == 1 else 'groups'}"
            )
        if seq_len % self.spec.sharing:
            raise ConfigError(
                f"parallel.tensor x parallel.context must divide a row's {seq_len} tokens: got {self.spec.tp} x "
                f"{self.spec.cp}"
            )

    def own(self, rows: TrainingBatch) -> TrainingBatch:
        """This rank's part of its group's rows."""
        return self._staged(rows if self.group.size == 1 else rows.part(self.group))

    def copied(self, rows: TrainingBatch) -> TrainingBatch:
        """Rows that every rank computes whole."""
        return self._staged(rows if self.group.size == 1 else rows.copied(self.group))

    def _staged(self, rows: TrainingBatch) -> TrainingBatch:
        return rows if self.stage.count == 1 else replace(rows, stage=self.stage)

    def copies(self, name: str, parameter: Tensor) -> int:
        """Number of ranks that hold the same part of a parameter."""
        twins = 2 if of_table(name) and self.stage.shares_table else 1
        parts = self.group.n_tensor if name in self.portions else 1
        if isinstance(parameter, DTensor):
            for axis, placement in enumerate(parameter.placements):
                if not isinstance(placement, Replicate):
                    parts *= parameter.device_mesh.size(axis)
        return twins * self.spec.stage_ranks // parts

    def portions_of(self, state: Mapping[str, Tensor]) -> dict[str, Portion]:
        """The same by the names of the saved state: ``parameter/NAME``, ``ema/NAME``, ``optimiser/NAME/KEY``."""
        found = {}
        for name, tensor in state.items():
            if tensor.ndim and (parameter := parameter_of(name)) in self.portions:
                found[name] = self.portions[parameter]
        return found

    def parts(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The parts of the state that this rank saves, copied to the host."""
        own = {name: x for name, x in state.items() if self.stage.first or self._saved_here(name)}
        return local_parts(own, self.rank, self.portions_of(own))

    def _saved_here(self, name: str) -> bool:
        """Whether a stage behind the first saves this: what all stages have is saved by the first."""
        return "/" in name and not (of_table(parameter_of(name)) and self.stage.shares_table)

    def elsewhere(self, name: str) -> bool:
        """True for a saved tensor that belongs to another stage."""
        return parameter_of(name) in self.absent


def parameter_of(name: str) -> str:
    """The parameter that a tensor of the saved state belongs to."""
    kind, _, of = name.partition("/")
    return of.rpartition("/")[0] if kind == "optimiser" else of
