"""How ranks share a model: one statement for the planner, the trainer and whoever checks them. Imports no torch.

    ranks = pp x replicate x shard x ep     shard x ep ranks hold a copy; every cp x tp neighbours of them share rows

    dense weights     one dimension cut into shard x ep parts, in replicate copies
    experts, ep = 1   the same
    experts, ep > 1   E / ep whole experts on each rank of a group of ep neighbours, their rows or columns cut into
                      shard parts, in replicate copies
    heads, tp > 1     1 / tp of the heads (of attention) and of the width (of dense networks) on each rank of a group of
                      tp neighbours, cut into shard x ep / tp parts, in replicate copies

With pp > 1 all this is said of a stage, which has an even part of the layers; the first one has the embeddings, the
last one the head. Stages are the outermost count, as what they exchange is the least. A table that is the head
too is in both.

Ranks that share rows have an equal part of their tokens each, and outside attention and dense networks they are ranks
of data parallelism like all others: so tp and cp say nothing of ep, and the other way round. With tp, the inputs of
attention are gathered and its results summed over neighbours; with cp, keys and values are gathered, and a rank's
queries are its own.

A tensor is cut along its first dimension, as FSDP2 does, unless that would leave ranks empty or pad by more than a
tenth (16 experts on 3,072 ranks: each would hold a whole expert or nothing, and a gather would move 192 times the
weights); then along another one that the number of parts divides.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from math import prod

from quadriga.errors import ConfigError
from quadriga.model.config import AttentionSpec, DenseSpec, LatentAttentionSpec, LayerSpec, ModelConfig
from quadriga.model.rank_mesh import even_part
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
    """``replicate`` copies of a model, each cut into ``shard`` x ``ep`` parts; the module docstring has the rest."""

    replicate: int = 1
    shard: int = 1
    ep: int = 1
    tp: int = 1
    cp: int = 1
    pp: int = 1

    @classmethod
    def of(
        cls, ranks: int, *, replicate: int = 1, experts: int = 1, tensor: int = 1, context: int = 1, pipeline: int = 1
    ) -> ParallelSpec:
        """The layout of so many ranks, by the names of the [parallel] section.

        Raises:
            ConfigError: copies, expert ranks, or ranks that share rows do not divide the number of ranks.
        """
        given = {"replicate": replicate, "experts": experts, "tensor": tensor, "context": context}
        for name, value in {"pipeline": pipeline, **given}.items():
            if ranks % value:
                raise ConfigError(f"parallel.{name} must divide the number of ranks: got {value} and {ranks} ranks")
        ranks //= pipeline
        of = "number of ranks" if pipeline == 1 else "ranks of a stage"
        for names in (("replicate", "experts"), ("replicate", "tensor", "context")):
            if ranks % prod(given[name] for name in names):
                product = " x ".join(f"parallel.{name}" for name in names)
                raise ConfigError(
                    f"{product} must divide the {of}: got {' x '.join(str(given[name]) for name in names)} "
                    f"and {ranks} ranks"
                )
        return cls(replicate, ranks // (replicate * experts), experts, tensor, context, pipeline)

    @property
    def ranks(self) -> int:
        """Total number of ranks."""
        return self.stage_ranks * self.pp

    @property
    def stage_ranks(self) -> int:
        """Ranks of one stage of the pipeline; without one, all."""
        return self.replicate * self.shard * self.ep

    def layers(self, n_layers: int, stage: int) -> range:
        """A stage's layers."""
        return range(*even_part(n_layers, self.pp, stage))

    @property
    def sharing(self) -> int:
        """Ranks that share rows."""
        return self.tp * self.cp

    def cut(self, name: str, shape: tuple[int, ...]) -> Cut | None:
        """How a parameter is cut, by its name and shape; for spread experts and heads, what their rank has of them.

        Returns:
            None if it cannot be (only spread experts cannot).
        """
        if self.ep > 1 and _is_expert(name, shape):
            return cut((shape[0] // self.ep, *shape[1:]), self.shard, after=1)
        if self.tp > 1 and (dim := head_dim_of(name)) is not None:
            own = (*shape[:dim], shape[dim] // self.tp, *shape[dim + 1 :])
            return cut(own, self.shard * self.ep // self.tp)
        return cut(shape, self.shard * self.ep)

    def problem(self, config: ModelConfig) -> str | None:
        """Why a model cannot be trained in this layout, or None."""
        return self._pipeline_problem(config) or self._sharing_problem(config) or self._experts_problem(config)

    def _pipeline_problem(self, config: ModelConfig) -> str | None:
        if self.pp > config.n_layers:
            return f"parallel.pipeline must be at most the model's {config.n_layers} layers, got {self.pp}"
        return None

    def _sharing_problem(self, config: ModelConfig) -> str | None:
        for layer in config.kinds():
            if self.sharing > 1 and not isinstance(layer.mixer, (AttentionSpec, LatentAttentionSpec)):
                return (
                    "parallel.tensor and parallel.context cut rows into parts, over which only attention can look: "
                    "this model has recurrent layers. Leave both at 1"
                )
            if self.tp > 1 and (found := _heads_problem(layer, self.tp)) is not None:
                return found
        return None

    def _experts_problem(self, config: ModelConfig) -> str | None:
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
        """Elements of all parameters that the fullest rank, of all stages, holds; padding included."""
        return _sums(self, config)[0]

    def padding(self, config: ModelConfig) -> float:
        """Bytes that the gathers of a pass move, relative to the weights they are for: 1 where nothing is padded.

        In a pipeline, of the stage with the fullest rank.
        """
        return _sums(self, config)[1]

    def fullest_stage(self, config: ModelConfig) -> int:
        """The stage whose ranks hold most."""
        return _sums(self, config)[2]


_OF_ROWS = re.compile(
    r"(layers\.\d+\.)?(attn\.(wqkv\.weight|wqkv\.bias|sinks|w[qkv]_b\.weight|wq\.weight)|ffn\.w_(gate|up))"
)
_OF_COLUMNS = re.compile(r"(layers\.\d+\.)?(attn\.wo\.weight|ffn\.w_down)")


def head_dim_of(name: str) -> int | None:
    """The dimension along which tensor parallelism cuts a parameter, by its name; None: it does not cut it."""
    if _OF_ROWS.fullmatch(name):
        return 0
    return 1 if _OF_COLUMNS.fullmatch(name) else None


def _heads_problem(layer: LayerSpec, tp: int) -> str | None:
    """Why a layer's heads and width cannot be shared by ``tp`` ranks, or None."""
    mixer, ffn = layer.mixer, layer.ffn
    counts = {}
    match mixer:
        case LatentAttentionSpec(n_heads=n):
            counts["heads"] = n
        case AttentionSpec(n_heads=n, n_kv_heads=n_kv):
            counts |= {"heads": n, "key/value heads": n_kv}
            if mixer.qk_norm is not None and mixer.qk_norm.over != "head":
                return "parallel.tensor cannot share a norm of all heads together, which this model has. Leave it at 1"
    if isinstance(ffn, DenseSpec):
        counts["columns of a dense network"] = ffn.d_ff
    for what, n in counts.items():
        if n % tp:
            return f"parallel.tensor must divide the model's {n} {what}: got {tp}"
    return None


def _is_expert(name: str, shape: tuple[int, ...]) -> bool:
    return len(shape) == 3 and name.rsplit(".", 1)[-1] in ("w_gate", "w_up", "w_down")


def _counted(config: ModelConfig, layers: range) -> Iterator[tuple[str, tuple[int, ...], int]]:
    """(name, shape, how often) of every parameter of a stage; layers of one kind are counted together."""
    for layer, n in Counter(config.layers[i] for i in layers).items():
        yield from ((name, shape, n) for name, shape in layer_shapes(layer, config.d_model).items())
    for name, shape in parameter_shapes(config).items():
        first, last = layers.start == 0, layers.stop == config.n_layers
        here = first or (last and config.tied_embeddings) if name.startswith("embed.") else last
        if here and not name.startswith("layers."):
            yield name, shape, 1


@lru_cache(maxsize=1 << 14)
def _sums(spec: ParallelSpec, config: ModelConfig) -> tuple[int, float, int]:
    """(elements of a rank, padding, stage) of the stage with most."""
    stages = [_stage_sums(spec, config, spec.layers(config.n_layers, stage)) for stage in range(spec.pp)]
    own, padding = max(stages)
    return own, padding, stages.index((own, padding))


def _stage_sums(spec: ParallelSpec, config: ModelConfig, layers: range) -> tuple[int, float]:
    own = gathered = whole = 0
    for name, shape, n in _counted(config, layers):
        found = spec.cut(name, shape)
        assert found is not None, "problem() was asked before"
        own += n * found.part
        gathered += n * found.padded
        held_by = spec.ep if _is_expert(name, shape) else spec.tp if head_dim_of(name) is not None else 1
        whole += n * prod(shape) // held_by
    return own, gathered / whole
