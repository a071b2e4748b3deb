"""Distribute a model over ranks: FSDP2 or HSDP over a DeviceMesh, experts over neighbouring ranks.

    ranks            replicate x shard                         every parameter but the experts: FSDP2 on this mesh
                     (replicate x shard / experts) x experts   the experts: whole ones on each rank of the inner axis
                                                               (all-to-all), their columns sharded over the outer one

Expert parallelism uses the ranks of data parallelism (torchtitan, Megatron-LM), so every rank has its own rows.
Gradients are summed over ranks, not averaged: the trainer divides by the global batch's weight before the backward
pass. A single process has no mesh: with bfloat16 it computes on copies of the master weights (:class:`MasterWeights`);
with several ranks FSDP2 makes the copies.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.utils.checkpoint import checkpoint

from quadriga.errors import ConfigError
from quadriga.nn.moe import MoE
from quadriga.nn.transformer import Block, Transformer
from quadriga.train.batch import Objective, TrainingBatch
from quadriga.train.config import ParallelSection
from quadriga.train.expert_parallel import AllToAllExperts
from quadriga.train.world import World

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class ModelWithLoss(nn.Module):
    """Model and objective as one module, because FSDP2 gathers parameters only during a module's forward."""

    def __init__(self, model: Transformer, objective: Objective) -> None:
        super().__init__()
        self.model = model
        self.objective = objective

    def forward(self, batch: TrainingBatch) -> tuple[Tensor, dict[str, Tensor]]:
        """(summed loss, metrics) of a batch; see ``Objective``."""
        loss, metrics = self.objective(self.model, batch)
        return loss, dict(metrics)


def prepare(model: Transformer, objective: Objective, section: ParallelSection, world: World) -> ModelWithLoss:
    """Prepare a model for training: move it to its device, set up recomputation, shard it if there are several ranks.

    Raises:
        ConfigError: the number of ranks does not fit the parallel section.
    """
    check_layout(model, section, world)
    model.to(world.device)
    blocks = [layer for layer in model.layers if isinstance(layer, Block)]
    for block in blocks:
        if section.recompute:
            block.forward = partial(checkpoint, block.forward, use_reentrant=False)  # type: ignore[method-assign]
    module = ModelWithLoss(model, objective)
    if world.size > 1:
        _shard(module, blocks, section, world)
    return module


def check_layout(model: Transformer, section: ParallelSection, world: World) -> None:
    """Check that ranks and experts can be divided as the parallel section says; raises ConfigError."""
    size, replicate, experts = world.size, section.replicate, section.experts
    if size % replicate:
        raise ConfigError(f"parallel.replicate must divide the number of ranks: got {replicate} and {size} ranks")
    if size % experts:
        raise ConfigError(f"parallel.experts must divide the number of ranks: got {experts} and {size} ranks")
    for moe in moe_layers(model)[:1]:
        if moe.spec.n_experts % experts:
            raise ConfigError(f"parallel.experts must divide the model's {moe.spec.n_experts} experts: got {experts}")
    if experts > 1 and not moe_layers(model):
        raise ConfigError(f"parallel.experts={experts} needs a model with experts; this one is dense")
    if experts > 1 and any(moe.spec.expert_bias for moe in moe_layers(model)):
        raise ConfigError("parallel.experts spreads experts without biases only; this model's have some. Leave it at 1")
    if experts > 1 and replicate > 1:
        raise ConfigError("parallel.experts and parallel.replicate cannot both be above 1: leave out replicate")


def moe_layers(model: Transformer) -> list[MoE]:
    """The MoE of every layer; empty for a dense model."""
    return [layer.moe for layer in model.layers if isinstance(layer, Block) and layer.moe is not None]


def _shard(module: ModelWithLoss, blocks: Iterable[Block], section: ParallelSection, world: World) -> None:
    kind = world.device.type
    mesh = init_device_mesh(
        kind, (section.replicate, world.size // section.replicate), mesh_dim_names=("replicate", "shard")
    )
    data_mesh = mesh["shard"] if section.replicate == 1 else mesh
    expert_mesh = None
    if section.experts > 1:
        expert_mesh = init_device_mesh(
            kind, (world.size // section.experts, section.experts), mesh_dim_names=("outer", "experts")
        )
    dtype = DTYPES[section.dtype]
    narrow = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    wide = MixedPrecisionPolicy(cast_forward_inputs=False)
    shard: Callable[..., FSDPModule] = partial(fully_shard, mesh=data_mesh, mp_policy=narrow)
    for block in blocks:
        if block.moe is not None:
            # The router always computes in float32.
            _sum_gradients(fully_shard(block.moe.router, mesh=data_mesh, mp_policy=wide))
            if expert_mesh is not None:
                _shard_experts(block.moe, expert_mesh, narrow)
        _sum_gradients(shard(block))
    _sum_gradients(shard(module))


def _shard_experts(moe: MoE, mesh: DeviceMesh, policy: MixedPrecisionPolicy) -> None:
    inner, outer = mesh["experts"], mesh["outer"]
    for name in ("w_gate", "w_up", "w_down"):
        whole = getattr(moe, name)
        part = distribute_tensor(whole.detach(), inner, [Shard(0)], src_data_rank=None)
        setattr(moe, name, nn.Parameter(part, requires_grad=whole.requires_grad))
    moe.dispatch = AllToAllExperts(inner.get_group())
    placement = lambda parameter: Shard(1) if parameter.ndim == 3 else Shard(0)  # noqa: E731
    _sum_gradients(fully_shard(moe, mesh=outer, mp_policy=policy, shard_placement_fn=placement))


def _sum_gradients(module: FSDPModule) -> None:
    module.set_gradient_divide_factor(1.0)
    module.set_force_sum_reduction_for_comms(True)  # gloo has no scaled sum


def replicas(parameter: Tensor, world: World) -> int:
    """Number of ranks that hold the same part of a parameter."""
    if not isinstance(parameter, DTensor):
        return world.size
    parts = 1
    for axis, placement in enumerate(parameter.placements):
        if not isinstance(placement, Replicate):
            parts *= parameter.device_mesh.size(axis)
    return world.size // parts


class MasterWeights:
    """The float32 master weights that the optimiser updates, by name.

    In one process with ``dtype`` bfloat16 the model's parameters become bfloat16 copies of them. A copy's gradient is
    added to its master's as soon as it exists, so micro-steps accumulate in float32 and no second set of gradients is
    kept. The router stays float32.
    """

    def __init__(self, model: Transformer, dtype: str, world: World) -> None:
        self.by_name: dict[str, Tensor] = {}
        self._copies: list[tuple[Tensor, Tensor]] = []
        narrow = world.size == 1 and dtype != "float32"
        for name, parameter in model.named_parameters():
            if not narrow or ".router." in name:
                if parameter.requires_grad:
                    self.by_name[name] = parameter
                continue
            master = parameter.detach().clone()
            parameter.data = master.to(DTYPES[dtype])
            if parameter.requires_grad:
                self.by_name[name] = master.requires_grad_()
                self._copies.append((master, parameter))
                parameter.register_post_accumulate_grad_hook(partial(_add_to_master, master))  # type: ignore[no-untyped-call]

    @torch.no_grad()
    def refresh(self) -> None:
        """Copy the master weights into the model's bfloat16 parameters."""
        for master, copy in self._copies:
            copy.copy_(master)


def _add_to_master(master: Tensor, copy: Tensor) -> None:
    assert copy.grad is not None, "the hook runs after a gradient was accumulated"
    if master.grad is None:
        master.grad = copy.grad.float()
    else:
        master.grad.add_(copy.grad)
    copy.grad = None
