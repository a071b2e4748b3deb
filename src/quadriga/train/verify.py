"""Walk a layout of ranks through the trainer on a process group that only pretends: `quadriga plan --verify`.

The model is built on the meta device with one layer of each kind (each stage of a pipeline with those of the fullest)
and sharded by ``train.parallel``, as a run of so many ranks would shard it; torch's fake process group answers for the
other ranks. What FSDP2 then holds and would gather is counted, and multiplied by the number of layers. Nothing is
allocated and nothing is sent.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.fsdp import FSDPModule

from quadriga.errors import ConfigError
from quadriga.model.config import ModelConfig
from quadriga.model.parallel_spec import ParallelSpec
from quadriga.nn.moe import RouterStats
from quadriga.nn.transformer import Transformer
from quadriga.train.batch import TrainingBatch
from quadriga.train.config import ParallelSection
from quadriga.train.parallel import prepare
from quadriga.train.world import World

_STATE_BYTES = 16
"""Master weight, two moments and gradient of a parameter, float32 each."""


@dataclass(frozen=True)
class Measured:
    """What one rank holds and moves in a layout, counted on the sharded model."""

    state_bytes: int
    """Master weights, moments and gradients of the fullest rank."""
    gathered_elements: int
    """Elements that all gathers of a forward pass bring to a rank, padding included."""
    needed_elements: int
    """Elements of the weights that they are for."""

    @property
    def padding(self) -> float:
        """Elements gathered relative to those needed."""
        return self.gathered_elements / self.needed_elements


def measure(config: ModelConfig, spec: ParallelSpec) -> Measured:
    """Shard a model's shape over the ranks of a layout, and count.

    Raises:
        ConfigError: the trainer refuses the layout.
    """
    section = ParallelSection(
        replicate=spec.replicate, experts=spec.ep, tensor=spec.tp, context=spec.cp, pipeline=spec.pp
    )
    if (problem := spec.problem(config)) is not None:
        raise ConfigError(problem)
    stage = spec.fullest_stage(config)
    kinds = Counter(config.layers[i] for i in spec.layers(config.n_layers, stage))
    times_of, rank = list(kinds.values()), stage * spec.stage_ranks
    with torch.device("meta"):
        model = Transformer(replace(config, layers=tuple(kinds) * spec.pp))
    with _pretended(spec.ranks, rank):
        module = prepare(model, _NoObjective(), section, World(rank, spec.ranks, torch.device("meta")))
        held = gathered = needed = 0
        for name, part in module.named_modules():
            layer = name.split(".")[2] if name.startswith("model.layers.") else None
            times = 1 if layer is None else times_of[int(layer) % len(kinds)]
            for own, moved, whole in _groups(part):
                held, gathered, needed = held + times * own, gathered + times * moved, needed + times * whole
        if spec.ranks == 1:
            held = gathered = needed = spec.elements(config)
    return Measured(_STATE_BYTES * held, gathered, needed)


def _groups(module: torch.nn.Module) -> Iterator[tuple[int, int, int]]:
    """(elements held, gathered, needed) of each parameter that a module gathers itself."""
    if not isinstance(module, FSDPModule):
        return
    for group in module._get_fsdp_state()._fsdp_param_groups:
        for parameter in group.fsdp_params:
            padded, ranks = parameter.padded_sharded_param_size.numel(), parameter.mesh_info.shard_mesh_size
            yield padded, padded * ranks, parameter._orig_size.numel()


class _NoObjective:
    """Of a model with which nothing is computed."""

    def __call__(self, model: Transformer, batch: TrainingBatch) -> tuple[Tensor, dict[str, Tensor]]:
        raise AssertionError("nothing is computed")

    def on_the_way(self, stats: Sequence[RouterStats], batch: TrainingBatch) -> tuple[Tensor, dict[str, Tensor]]:
        raise AssertionError("nothing is computed")


@contextlib.contextmanager
def _pretended(ranks: int, rank: int) -> Iterator[None]:
    """A process group of so many ranks, of which this process is one and the others do not exist.

    Raises:
        ConfigError: this process is part of a real one.
    """
    from torch.testing._internal.distributed.fake_pg import FakeStore

    if dist.is_initialized():
        raise ConfigError("a layout is verified in one process: start it without torchrun")
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=ranks)
    try:
        yield
    finally:
        dist.destroy_process_group()
