"""Distribute a model over ranks: FSDP2 or HSDP over a DeviceMesh, experts over neighbouring ranks.

    ranks            replicate x (shard x experts)     every parameter but these: FSDP2, or HSDP with copies
                     replicate x shard x experts       the experts: whole ones on each rank of the inner axis
                                                       (all-to-all), rows or columns sharded over the middle one
                     replicate x rest x tensor         heads and dense columns: some on each rank of the inner axis,
                                                       sharded over the middle one (``tensor_parallel``)
                     ... x context x tensor            ranks that share rows (``row_group``)

Expert parallelism uses the ranks of data parallelism (torchtitan, Megatron-LM), so every rank has its own rows.
Gradients are summed over ranks, not averaged: the trainer divides by the global batch's weight before the backward
pass. A single process has no mesh: with bfloat16 it computes on copies of the master weights (:class:`MasterWeights`);
with several ranks FSDP2 makes the copies. ``model.parallel_spec`` says which dimension of a parameter is cut. A model
on the meta device is sharded first and filled afterwards, each rank its own boxes: a whole parameter is nowhere.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.fsdp._fully_shard._fsdp_common import FSDPMeshInfo, HSDPMeshInfo, ShardPlacementResult
from torch.distributed.tensor import Shard
from torch.nn.attention import varlen as varlen  # registers its operation
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts, noop_context_fn

from quadriga.errors import ConfigError
from quadriga.model.parallel_spec import Cut, ParallelSpec, cut
from quadriga.model.weight_map import Box
from quadriga.nn.moe import MoE
from quadriga.nn.transformer import Block, Transformer
from quadriga.train.batch import Objective, StagedObjective, TrainingBatch
from quadriga.train.config import ParallelSection
from quadriga.train.expert_parallel import spread
from quadriga.train.layout import Layout
from quadriga.train.losses import through_layers
from quadriga.train.row_group import RowGroup
from quadriga.train.shards import places
from quadriga.train.stage import Stage, keep_stage
from quadriga.train.tensor_parallel import cut_heads
from quadriga.train.world import World

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class ModelWithLoss(nn.Module):
    """Model and objective as one module, because FSDP2 gathers parameters only during a module's forward."""

    def __init__(self, model: Transformer, objective: Objective, layout: Layout | None = None) -> None:
        super().__init__()
        self.model = model
        self.objective = objective
        self.layout = layout or Layout()
        self.loss_scale = torch.ones(())
        """What the pipeline multiplies losses with; without one, the trainer does."""

    def forward(self, batch: TrainingBatch) -> tuple[Tensor, dict[str, Tensor]]:
        """(summed loss, metrics) of a batch; see ``Objective``. A stage without the head: (hidden states, metrics).

        The gradient of those hidden states is also that of the routers' losses, times ``loss_scale``.
        """
        if self.layout.stage.last:
            loss, metrics = self.objective(self.model, batch)
            return loss, dict(metrics)
        hidden, stats = through_layers(self.model, batch)
        if not stats:
            return hidden, {}
        assert isinstance(self.objective, StagedObjective), "prepare asked for one"
        extra, metrics = self.objective.on_the_way(stats, batch)
        carried: Tensor = _Carry.apply(hidden, extra, self.loss_scale)  # type: ignore[no-untyped-call]
        return carried, dict(metrics)

    def sum_over_copies(self, now: bool) -> None:
        """Whether the next backward passes add up gradients over the model's copies: once a step is enough."""
        if self.layout.spec.replicate > 1:
            assert isinstance(self, FSDPModule), "copies are FSDP2's"
            self.set_requires_all_reduce(now)


class _Carry(torch.autograd.Function):
    """Hidden states that carry a loss along: when their gradient comes back, the loss gets its own."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, loss: Tensor, scale: Tensor) -> Tensor:
        ctx.scale = scale.to(loss.dtype)
        return hidden.view_as(hidden)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        (gradient,) = gradients
        return gradient, ctx.scale, None


Fill = Callable[[str, Box], Tensor]
"""(name, box) -> a box of a parameter's initial values, float32 on the host."""


def prepare(
    model: Transformer, objective: Objective, section: ParallelSection, world: World, fill: Fill | None = None
) -> ModelWithLoss:
    """Prepare a model for training: move it to its device, set up recomputation, shard it if there are several ranks.

    Args:
        fill: the initial values of a model on the meta device; None: they are loaded later, and are 0 until then.

    Raises:
        ConfigError: the number of ranks does not fit the parallel section.
    """
    spec = check_layout(model, section, world)
    if section.recompute == "selective" and world.device.type == "cpu":
        raise ConfigError(
            "parallel.recompute = 'selective' is for GPUs: a CPU's kernels write into the products that it would keep. "
            "Use 'full' or 'none'"
        )
    names = {name for name, _ in (*model.named_parameters(), *model.named_buffers())}
    stage = _stage(model, objective, spec, world)
    here = {name for name, _ in (*model.named_parameters(), *model.named_buffers())}
    empty = any(parameter.is_meta for parameter in model.parameters())
    if not empty:
        model.to(world.device)
    blocks = [layer for layer in model.layers if isinstance(layer, Block)]
    for block in blocks:
        _recompute(block, section.recompute)
    group = _row_group(spec, world)
    layout = Layout(
        spec=spec,
        rank=world.rank % spec.stage_ranks,
        stage=stage,
        absent=frozenset(names - here),
        dtype=DTYPES[section.dtype],
        group=group,
        portions=cut_heads(model, group) if spec.tp > 1 else {},
    )
    module = ModelWithLoss(model, objective, layout)
    if world.size > 1:
        _shard(module, blocks, section, spec, world)
    if empty and world.device.type != "meta":
        _materialise(module, world, fill)
    return module


_PRODUCTS = [
    *(getattr(torch.ops.aten, name).default for name in ("mm", "addmm", "_grouped_mm")),
    *(
        getattr(torch.ops.aten, f"_scaled_dot_product_{kind}_attention").default
        for kind in ("flash", "efficient", "cudnn")
    ),
    torch.ops.torch_attn._varlen_attn.default,
]
"""What recompute = "selective" keeps the results of; the rest costs memory traffic and hardly any arithmetic."""


def _recompute(block: Block, how: bool | str) -> None:
    """Let a block forget what it computed, and compute it again in the backward pass."""
    if how in (False, "none"):
        return
    kept: Any = partial(create_selective_checkpoint_contexts, _PRODUCTS) if how == "selective" else noop_context_fn
    again = partial(checkpoint, block.forward, use_reentrant=False, context_fn=kept)
    block.forward = again  # type: ignore[method-assign]


def check_layout(model: Transformer, section: ParallelSection, world: World) -> ParallelSpec:
    """The layout of the ranks that the parallel section asks for.

    Raises:
        ConfigError: ranks, experts or a parameter's dimensions cannot be divided so.
    """
    spec = ParallelSpec.of(
        world.size, replicate=section.replicate, experts=section.experts, tensor=section.tensor,
        context=section.context, pipeline=section.pipeline,
    )  # fmt: skip
    problem = spec.problem(model.config) or _problem_of_factors(model, spec)
    if problem is not None:
        raise ConfigError(problem)
    return spec


def _problem_of_factors(model: Transformer, spec: ParallelSpec) -> str | None:
    """Why an adapter's factors of experts cannot be divided, or None."""
    for name, parameter in model.named_parameters():
        if spec.ep > 1 and parameter.ndim == 3 and name.endswith((".delta.a", ".delta.b")):
            own = (parameter.shape[0] // spec.ep, *parameter.shape[1:])
            if cut(own, spec.shard, after=1) is None:
                return (
                    f"{spec.shard} shards must divide a dimension of the adapter's {name} {list(parameter.shape)}: "
                    "take another lora.rank, or other numbers of replicas or expert ranks"
                )
    return None


@torch.no_grad()
def _materialise(module: ModelWithLoss, world: World, fill: Fill | None) -> None:
    """Allocate this rank's parts of a model on the meta device, and fill them parameter by parameter."""
    module.to_empty(device=world.device)
    for name, values in (*module.model.named_parameters(), *module.model.named_buffers()):
        for box, own in places(values, module.layout.portions.get(name)):
            if fill is None:
                own.zero_()
            else:
                own.copy_(fill(name, box))


def moe_layers(model: Transformer) -> list[MoE]:
    """The MoE of every layer that is here; empty for a dense model."""
    return [layer.moe for layer in model.layers if isinstance(layer, Block) and layer.moe is not None]


def _kind(world: World) -> str:
    """The device type of the ranks' meshes; the meta device has none."""
    return "cpu" if world.device.type == "meta" else world.device.type


def _stage(model: Transformer, objective: Objective, spec: ParallelSpec, world: World) -> Stage:
    """This rank's stage of the pipeline; what other stages have is removed from the model.

    Raises:
        ConfigError: the objective cannot be computed in stages.
    """
    if spec.pp == 1:
        return Stage()
    if not isinstance(objective, StagedObjective) or getattr(objective, "balance_form", None) == "hf":
        raise ConfigError(
            "parallel.pipeline is for pre-training, 'sft' and 'text' with router.balance_form = 'megablocks' or "
            "'document': other losses do not add up over layers. Leave it at 1"
        )
    for number in range(spec.pp):
        if not _is_trained(model, spec.layers(model.config.n_layers, number)):
            raise ConfigError(
                f"parallel.pipeline = {spec.pp} leaves stage {number} nothing to train: take fewer stages, or an "
                "adapter with targets in all layers"
            )
    mesh = init_device_mesh(_kind(world), (spec.pp, spec.stage_ranks), mesh_dim_names=("stages", "ranks"))
    index = world.rank // spec.stage_ranks
    layers = spec.layers(model.config.n_layers, index)
    mixtures = [i for i, _ in model.config.moe_layers]
    keep_stage(model, layers, first=index == 0, last=index == spec.pp - 1)
    return Stage(
        index=index,
        count=spec.pp,
        mixtures=range(sum(i < layers.start for i in mixtures), sum(i < layers.stop for i in mixtures)),
        n_mixtures=len(mixtures),
        ranks=mesh["ranks"].get_group(),
        line=mesh["stages"].get_group(),
        tied=model.config.tied_embeddings,
    )


def _is_trained(model: Transformer, layers: range) -> bool:
    return any(parameter.requires_grad for i in layers for parameter in model.layers[i].parameters())


def _row_group(spec: ParallelSpec, world: World) -> RowGroup:
    """This rank's neighbours that share its rows."""
    if spec.sharing == 1:
        return RowGroup()
    axes = {"groups": spec.ranks // spec.sharing, "context": spec.cp, "tensor": spec.tp}
    mesh = init_device_mesh(_kind(world), tuple(axes.values()), mesh_dim_names=tuple(axes))
    groups = {name: mesh[name].get_group() if axes[name] > 1 else None for name in ("tensor", "context")}
    return RowGroup(n_tensor=spec.tp, n_context=spec.cp, part=world.rank % spec.sharing, **groups)


def _shard(
    module: ModelWithLoss, blocks: Iterable[Block], section: ParallelSection, spec: ParallelSpec, world: World
) -> None:
    kind = _kind(world)
    sizes = (spec.pp, spec.replicate, spec.shard * spec.ep)
    mesh = init_device_mesh(kind, sizes, mesh_dim_names=("stage", "replicate", "shard"))
    data_mesh = mesh["shard"] if spec.replicate == 1 else mesh["replicate", "shard"]
    expert_mesh = None
    if spec.ep > 1:
        expert_mesh = init_device_mesh(
            kind, (spec.pp, spec.replicate, spec.shard, spec.ep),
            mesh_dim_names=("stage", "replicate", "shard", "experts"),
        )  # fmt: skip
    dtype = DTYPES[section.dtype]
    narrow = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    wide = MixedPrecisionPolicy(cast_forward_inputs=False)
    shard: Callable[..., FSDPModule] = partial(
        fully_shard, mesh=data_mesh, mp_policy=narrow, shard_placement_fn=_Placements(module, kind)
    )
    for block in blocks:
        if block.moe is not None:
            # The router always computes in float32.
            _sum_gradients(shard(block.moe.router, mp_policy=wide))
            if expert_mesh is not None:
                for whole in (block.moe.shared, block.moe.fuse):
                    if whole is not None:
                        _sum_gradients(shard(whole))
                _shard_experts(block.moe, expert_mesh, spec, narrow)
        _sum_gradients(shard(block))
    _sum_gradients(shard(module))


class _Placements:
    """Where a parameter goes, for ``fully_shard``: over all ranks of a copy, or over those that have its heads."""

    def __init__(self, module: ModelWithLoss, kind: str) -> None:
        spec, portions = module.layout.spec, module.layout.portions
        self._parts, self._of_heads = spec.shard * spec.ep, spec.shard * spec.ep // spec.tp
        self._cut_heads = {parameter for name, parameter in module.model.named_parameters() if name in portions}
        self._mesh: FSDPMeshInfo | None = None
        if portions:
            mesh = init_device_mesh(
                kind, (spec.pp, spec.replicate, self._of_heads, spec.tp),
                mesh_dim_names=("stage", "replicate", "shard", "tensor"),
            )  # fmt: skip
            if spec.replicate == 1:
                self._mesh = FSDPMeshInfo(mesh["shard"], shard_mesh_dim=0)
            else:
                self._mesh = HSDPMeshInfo(mesh["replicate", "shard"], shard_mesh_dim=1, replicate_mesh_dim=0)

    def __call__(self, parameter: nn.Parameter) -> Shard | ShardPlacementResult:
        if parameter not in self._cut_heads:
            return _placement(cut(tuple(parameter.shape), self._parts))
        assert self._mesh is not None, "where heads are cut there is a mesh for them"
        return ShardPlacementResult(_placement(cut(tuple(parameter.shape), self._of_heads)), self._mesh)


def _placement(found: Cut | None) -> Shard:
    assert found is not None, "check_layout asked for a problem"
    return Shard(found.dim)


def _shard_experts(moe: MoE, mesh: DeviceMesh, spec: ParallelSpec, policy: MixedPrecisionPolicy) -> None:
    inner, outer = mesh["experts"], mesh["shard"] if spec.replicate == 1 else mesh["replicate", "shard"]
    spread(moe, inner)
    by_size = lambda p: _placement(cut(tuple(p.shape), spec.shard, after=1))  # noqa: E731
    _sum_gradients(fully_shard(moe, mesh=outer, mp_policy=policy, shard_placement_fn=by_size))


def _sum_gradients(module: FSDPModule) -> None:
    module.set_gradient_divide_factor(1.0)
    module.set_force_sum_reduction_for_comms(True)  # gloo has no scaled sum


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
