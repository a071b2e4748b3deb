"""How ranks share a model: one statement for the planner, the trainer and whoever checks them. Imports no torch.

    ranks = replicate x shard x ep

    dense weights     one dimension cut into shard x ep parts, in replicate copies
    experts, ep = 1   the same
    experts, ep > 1   E / ep whole experts on each rank of a group of ep neighbours, their rows or columns cut into
                      shard parts, in replicate copies

A tensor is cut along its first dimension, as FSDP2 does, unless that would leave ranks empty or pad by more than a
tenth (16 experts on 3,072 ranks: each would hold a whole expert or nothing, and a gather would move 192 times the
weights); then along another one that the number of parts divides.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from math import prod

from quadriga.errors import ConfigError
from quadriga.model.config import ModelConfig
from quadriga.model.weight_map import layer_shapes, parameter_shapes

MOST_PADDING = 1.1
"""Largest number of bytes that a gather may move, relative to those of the weights."""


@dataclass(frozen=True)
class Cut:
    """How a tensor is divided into equal parts along one dimension."""

    dim: int
    parts: int
    padded: int
    """Elements of all parts together, padding included."""

    @property
    def part(self) -> int:
        """Elements of the largest part."""
        return self.padded // self.parts


def cut(shape: tuple[int, ...], parts: int, *, after: int = 0) -> Cut | None:
    """Choose the dimension along which a tensor is cut; the module docstring has the rule.

    Args:
        after: dimensions below this one are cut already; then only one that ``parts`` divides can be taken.

    Returns:
        None if no dimension can be.
    """
    whole = prod(shape)
    exact = [dim for dim in range(after, len(shape)) if shape[dim] % parts == 0]
    if after:
        return Cut(exact[0], parts, whole) if exact else None
    padded = -(-shape[0] // parts) * parts * (whole // shape[0])
    if exact and (exact[0] == 0 or padded > MOST_PADDING * whole):
        return Cut(exact[0], parts, whole)
    return Cut(0, parts, padded)


@dataclass(frozen=True)
class ParallelSpec:
    """``replicate`` copies of a model, each cut into ``shard`` x ``ep`` parts."""

    replicate: int = 1
    shard: int = 1
    ep: int = 1

    @classmethod
    def of(cls, ranks: int, *, replicate: int = 1, experts: int = 1) -> ParallelSpec:
        """The layout of so many ranks.

        Raises:
            ConfigError: copies and expert ranks do not divide the number of ranks.
        """
        for name, value in (("replicate", replicate), ("experts", experts)):
            if ranks % value:
                raise ConfigError(f"parallel.{name} must divide the number of ranks: got {value} and {ranks} ranks")
        if ranks % (replicate * experts):
            raise ConfigError(
                f"parallel.replicate x parallel.experts must divide the number of ranks: got {replicate} x {experts} "
                f"and {ranks} ranks"
            )
        return cls(replicate, ranks // (replicate * experts), experts)

    @property
    def ranks(self) -> int:
        """Total number of ranks."""
        return self.replicate * self.shard * self.ep

    def cut(self, name: str, shape: tuple[int, ...]) -> Cut | None:
        """How a parameter is cut, by its name and shape; for spread experts, what their rank has of them.

        Returns:
            None if it cannot be (only spread experts cannot).
        """
        if self.ep > 1 and _is_expert(name, shape):
            return cut((shape[0] // self.ep, *shape[1:]), self.shard, after=1)
        return cut(shape, self.shard * self.ep)

    def problem(self, config: ModelConfig) -> str | None:
        """Why a model cannot be trained in this layout, or None."""
        if self.ep == 1:
            return None
        mixtures = [spec for _, spec in config.moe_layers]
        if not mixtures:
            return f"parallel.experts={self.ep} needs a model with experts; this one is dense"
        for spec in mixtures:
            if spec.n_experts % self.ep:
                return f"parallel.experts must divide the model's {spec.n_experts} experts: got {self.ep}"
            if spec.expert_bias:
                return "parallel.experts spreads experts without biases only; this model's have some. Leave it at 1"
            if spec.shared_gate:
                return "parallel.experts cannot be above 1 for a shared expert with a gate. Leave it at 1"
        for layer in config.kinds():
            for name, shape in layer_shapes(layer, config.d_model).items():
                if self.cut(name, shape) is None:
                    return (
                        f"{self.shard} shards must divide a dimension of the experts' {name} {list(shape)}: take other "
                        "numbers of replicas or expert ranks"
                    )
        return None

    def elements(self, config: ModelConfig) -> int:
        """Elements of all parameters that the fullest rank holds, padding included."""
        return _sums(self, config)[0]

    def padding(self, config: ModelConfig) -> float:
        """Bytes that the gathers of a pass move, relative to the weights they are for: 1 where nothing is padded."""
        return _sums(self, config)[1]


def _is_expert(name: str, shape: tuple[int, ...]) -> bool:
    return len(shape) == 3 and name.rsplit(".", 1)[-1] in ("w_gate", "w_up", "w_down")


def _counted(config: ModelConfig) -> Iterator[tuple[str, tuple[int, ...], int]]:
    """(name, shape, how often) of every parameter; layers of one kind are counted together."""
    for layer, n in config.kinds().items():
        yield from ((name, shape, n) for name, shape in layer_shapes(layer, config.d_model).items())
    outside = parameter_shapes(config).items()
    yield from ((name, shape, 1) for name, shape in outside if not name.startswith("layers."))


@lru_cache(maxsize=1 << 14)
def _sums(spec: ParallelSpec, config: ModelConfig) -> tuple[int, float]:
    own = gathered = whole = 0
    for name, shape, n in _counted(config):
        found = spec.cut(name, shape)
        assert found is not None, "problem() was asked before"
        own += n * found.part
        gathered += n * found.padded
        whole += n * prod(shape) // (spec.ep if spec.ep > 1 and _is_expert(name, shape) else 1)
    return own, gathered / whole
