"""What training takes: memory of a rank, time of a step, the quickest mesh of those that fit.

    step = matrix products + attention + passes over memory + all-to-all + exposed traffic of weights + optimiser

    matrix products   2 N_active tokens (3, or 4 with everything recomputed) / (peak x gemm x D / (D + 900))
                      and less for few rows an expert
    attention         the causal half of 4 L Hd T tokens x 3.5 (4.5) / (peak x attention)
    memory passes     bytes that norms, residuals, activations, rotation and routing move / HBM
    all-to-all        tokens to their experts and back, per pass (2; 3 if all is recomputed) / NVLink, or InfiniBand
                      beyond a node
    weights' traffic  gather twice, scatter once per micro-step over the shard; reduce once over replicas
    optimiser         28 bytes a parameter of the shard / HBM

Memory: float32 master weights, two moments and gradients, sharded over shard x ep (16 B a parameter); bfloat16 copies
of two layers; saved activations; one chunk of logits; what CUDA and NCCL take. A mesh is replicate x shard x ep; dense
weights are sharded over shard x ep, experts over ep and then shard (docs/plan.md). MFU counts as LLM Foundry does: no
recomputing, attention in full.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from math import prod

from quadriga.errors import ConfigError, HardwareError
from quadriga.model.config import LayerSpec, ModelConfig, MoESpec
from quadriga.model.cost import attention_flops, n_params
from quadriga.model.plan.hardware import STACKS, Gpu, Stack
from quadriga.model.weight_map import layer_shapes

RECOMPUTE = ("none", "selective", "full")
"""Nothing; norms, activations and routing; everything but each layer's input."""

_RUNTIME_BYTES = 4 * 10**9  # CUDA context, NCCL buffers
_FRAGMENTS = 1.05
_IMBALANCE = 1.15
"""The busiest rank's tokens over the mean, with a balance loss."""
_BUS = 0.80
"""Share of a link's published rate that collectives reach."""
_MEMORY = 0.85
_LOGIT_ROWS = 4096
_ROWS_HALF = 64
"""Rows of an expert at which grouped products reach half of large ones' rate (half a tile of 128)."""


@dataclass(frozen=True)
class Mesh:
    """How ranks share a model: ``replicate`` copies, each spread over ``shard`` x ``ep`` ranks."""

    replicate: int
    shard: int
    ep: int

    @property
    def ranks(self) -> int:
        """All ranks."""
        return self.replicate * self.shard * self.ep


@dataclass(frozen=True)
class Work:
    """What every step does."""

    seq_len: int
    micro_rows: int
    """Sequences of a rank's micro-step."""
    accumulate: int
    """Micro-steps of an optimiser step."""
    recompute: str

    @property
    def micro_tokens(self) -> int:
        """Tokens of a rank's micro-step."""
        return self.seq_len * self.micro_rows


@dataclass(frozen=True)
class Memory:
    """Bytes of one rank."""

    state: float
    """Master weights, moments, gradients."""
    gathered: float
    """Layers at work, in bfloat16, with their gradients."""
    activations: float
    logits: float
    runtime: float

    @property
    def total(self) -> float:
        """All of it, with what fragmentation costs."""
        return (self.state + self.gathered + self.activations + self.logits) * _FRAGMENTS + self.runtime


@dataclass(frozen=True)
class StepTime:
    """Seconds of one optimiser step."""

    matrix: float
    attention: float
    passes: float
    all_to_all: float
    exposed: float
    """Traffic of weights and gradients that nothing hides."""
    optimiser: float

    @property
    def total(self) -> float:
        """The step."""
        return self.matrix + self.attention + self.passes + self.all_to_all + self.exposed + self.optimiser


@dataclass(frozen=True)
class Plan:
    """A mesh at work."""

    mesh: Mesh
    work: Work
    memory: Memory
    time: StepTime
    mfu: float
    tokens_per_s: float
    """Of the whole cluster."""

    @property
    def batch_tokens(self) -> int:
        """Tokens of an optimiser step."""
        return self.mesh.ranks * self.work.micro_tokens * self.work.accumulate


@dataclass(frozen=True)
class Sizes:
    """The numbers of a model that training's arithmetic uses."""

    total: int
    active: int
    expert: int
    """Parameters of all experts."""
    layer_dense: int
    """Of the largest layer, experts aside."""
    layer_experts: int
    """Experts of the layer with most."""
    outside: int
    """Embeddings, head, final norm."""


def sizes(config: ModelConfig) -> Sizes:
    """Count what is spread how."""
    experts = expert = dense = inside = 0
    for layer, n in config.kinds().items():
        shapes = layer_shapes(layer, config.d_model)
        stacked = sum(prod(shape) for shape in shapes.values() if len(shape) == 3)
        whole = sum(prod(shape) for shape in shapes.values())
        experts, inside = experts + n * stacked, inside + n * whole
        expert, dense = max(expert, stacked), max(dense, whole - stacked)
    count = n_params(config)
    return Sizes(count.total, count.active_without_input, experts, dense, expert, count.total - inside)


def train_flops_per_token(config: ModelConfig, seq_len: int) -> float:
    """Model FLOPs of one trained token: 3 x (2 N_active + 4 L Hd T), LLM Foundry's count (SPEC: attention in full)."""
    return 3 * (2 * n_params(config).active_without_input + attention_flops(config, seq_len))


def memory(config: ModelConfig, mesh: Mesh, work: Work) -> Memory:
    """Bytes of one rank."""
    s = sizes(config)
    state = 16 * s.total / (mesh.shard * mesh.ep)
    layer = s.layer_dense + s.layer_experts / mesh.ep
    spread = mesh.shard * mesh.ep > 1
    # Two layers' weights (one computes, one is being gathered), one layer's gradients, and both token tables.
    gathered = 2 * (3 * layer + 2 * s.outside) if spread else 2 * s.total
    tokens = work.micro_tokens
    layers = {layer: _activation_bytes(layer, config.d_model, work.recompute) for layer in config.kinds()}
    kept = sum(layers[layer][1] * n for layer, n in config.kinds().items())
    again = max(whole for whole, _ in layers.values()) if work.recompute != "none" else 0
    activations = tokens * (kept + again)
    logits = min(tokens, _LOGIT_ROWS) * config.vocab_size * 6.0
    return Memory(state, gathered, activations, logits, _RUNTIME_BYTES)


def activation_elements(layer: LayerSpec, d_model: int) -> tuple[float, float, float]:
    """Elements a layer saves for a token: (its input, what selective recomputing keeps besides, what it recomputes)."""
    d, attn, ffn = d_model, layer.mixer, layer.ffn
    k, f = (ffn.top_k, ffn.d_ff) if isinstance(ffn, MoESpec) else (1, ffn.d_ff)
    shared = ffn.shared.d_ff if isinstance(ffn, MoESpec) and ffn.shared is not None else 0  # gated, every token's
    gated = isinstance(ffn, MoESpec) or ffn.gated
    routed = k * d if isinstance(ffn, MoESpec) else 0
    rotated = attn.q_dim + attn.kv_dim
    kept = attn.qkv_dim + rotated + attn.q_dim + d + (2 if gated else 1) * k * f + 2 * shared
    # Norms' outputs; rows for the experts, their results, and those once more in tokens' order; activation and product.
    recomputed = 2 * d + 3 * routed + (2 if gated else 1) * k * f + 2 * shared
    return float(d), float(kept), float(recomputed)


def _activation_bytes(layer: LayerSpec, d_model: int, recompute: str) -> tuple[float, float]:
    """(bytes of everything a layer saves for a token, bytes it saves under ``recompute``), in bfloat16."""
    entry, kept, again = activation_elements(layer, d_model)
    uneven = _IMBALANCE if layer.moe is not None else 1.0
    whole = 2 * (entry + (kept + again) * uneven)
    return whole, {"none": whole, "selective": 2 * (entry + kept * uneven), "full": 2 * entry}[recompute]


def step_time(config: ModelConfig, gpu: Gpu, mesh: Mesh, work: Work, stack: Stack) -> StepTime:
    """Seconds of an optimiser step, by the formulas above."""
    s, tokens = sizes(config), work.micro_tokens
    forwards = 2 if work.recompute == "full" else 1
    experts_share = _expert_flops_share(config)
    # The layer with fewest rows an expert sets the rate of the grouped products.
    shares = [spec.top_k / spec.n_experts for _, spec in config.moe_layers]
    rows = tokens * mesh.ep * min(shares, default=1.0)
    grouped = rows / (rows + _ROWS_HALF) if shares else 1.0
    rate = gpu.peak_flops * gpu.gemm * config.d_model / (config.d_model + stack.width_half)
    matrix = 2 * s.active * tokens * (2 + forwards) / rate * (1 - experts_share + experts_share / grouped)
    causal = attention_flops(config, work.seq_len) / 2 * tokens
    attention = causal * (2.5 + forwards) / (gpu.peak_flops * gpu.attention * stack.attention)
    passes = _pass_bytes(config) * tokens * (1 + forwards + (work.recompute == "selective") * 0.5)
    moved = passes / (gpu.hbm_bytes_per_s * _MEMORY)
    exchange = _all_to_all(config, gpu, mesh, tokens) * (1 + forwards)
    compute = work.accumulate * (matrix + attention + moved)
    traffic = _weight_traffic(s, gpu, mesh, work.accumulate)
    shard = s.total / (mesh.shard * mesh.ep)
    return StepTime(
        matrix=work.accumulate * matrix,
        attention=work.accumulate * attention,
        passes=work.accumulate * moved,
        all_to_all=work.accumulate * exchange,
        exposed=max(traffic - compute, (1 - stack.hidden) * traffic),
        optimiser=28 * shard / (gpu.hbm_bytes_per_s * _MEMORY),
    )


def _expert_flops_share(config: ModelConfig) -> float:
    used = 0.0
    for layer, n in config.kinds().items():
        if layer.moe is not None:
            stacked = sum(prod(shape) for shape in layer_shapes(layer, config.d_model).values() if len(shape) == 3)
            used += n * stacked * layer.moe.top_k / layer.moe.n_experts
    return used / sizes(config).active


def _pass_bytes(config: ModelConfig) -> float:
    """Bytes a layer-by-layer forward pass moves for a token besides its matrix products, over all layers."""
    d, elements = config.d_model, 0
    for layer, n in config.kinds().items():
        k = layer.moe.top_k if layer.moe is not None else 1
        routed = 4 * k * d if layer.moe is not None else 0  # into experts' order and back
        # Norms, residuals, rotation and clip, activation.
        shared = layer.moe.shared.d_ff if layer.moe is not None and layer.moe.shared is not None else 0
        widths = k * layer.ffn.d_ff + shared
        elements += n * (4 * d + 6 * d + 2 * layer.mixer.qkv_dim + 3 * widths + routed)
    return 2.0 * elements


def _all_to_all(config: ModelConfig, gpu: Gpu, mesh: Mesh, tokens: int) -> float:
    """Seconds to send a micro-step's tokens to their experts and back, over all layers."""
    if mesh.ep == 1:
        return 0.0
    visits = sum(spec.top_k for _, spec in config.moe_layers)
    sent = 2 * visits * config.d_model * 2.0 * tokens * _IMBALANCE
    within = min(mesh.ep, gpu.per_node)
    inside = sent * (within - 1) / mesh.ep / (gpu.node_bytes_per_s * _BUS)
    outside = sent * (mesh.ep - within) / mesh.ep / (gpu.network_bytes_per_s * _BUS)
    return max(inside, outside)


def _weight_traffic(s: Sizes, gpu: Gpu, mesh: Mesh, accumulate: int) -> float:
    """Seconds that gathers, scatters and reductions of a step take on the busiest link.

    A ring over whole nodes crosses each node's edge once on all its network cards together, so its rate is that of a
    node's cards; within a node it is NVLink's. Each rank gathers its part of the experts only.
    """
    n = mesh.shard * mesh.ep
    seconds = 0.0
    if n > 1:
        link = gpu.node_bytes_per_s if n <= gpu.per_node else gpu.network_bytes_per_s * gpu.per_node
        dense = (s.total - s.expert) * (n - 1) / n
        experts = s.expert / mesh.ep * (mesh.shard - 1) / mesh.shard
        if n > gpu.per_node and mesh.ep > 1:
            experts *= min(mesh.ep, gpu.per_node)  # the node's ranks pull different experts through their own cards
        seconds += accumulate * 3 * 2 * (dense + experts) / (link * _BUS)
    if mesh.replicate > 1:
        copies = 2 * 4 * s.total / n * (mesh.replicate - 1) / mesh.replicate
        link = gpu.network_bytes_per_s if n >= gpu.per_node else gpu.node_bytes_per_s
        seconds += copies / (link * _BUS)
    return seconds


def evaluate(config: ModelConfig, gpu: Gpu, mesh: Mesh, work: Work, stack: Stack = STACKS["tuned"]) -> Plan:
    """A mesh at work: memory, time, MFU."""
    time = step_time(config, gpu, mesh, work, stack)
    tokens = mesh.ranks * work.micro_tokens * work.accumulate
    rate = tokens / time.total
    mfu = rate * train_flops_per_token(config, work.seq_len) / (mesh.ranks * gpu.peak_flops)
    return Plan(mesh, work, memory(config, mesh, work), time, mfu, rate)


def meshes(config: ModelConfig, ranks: int, gpu: Gpu) -> Iterator[Mesh]:
    """Every replicate x shard x ep of ``ranks`` whose parts are whole nodes or parts of one."""
    n_experts = math.gcd(*(spec.n_experts for _, spec in config.moe_layers)) or 1
    for ep in (n for n in range(1, n_experts + 1) if n_experts % n == 0 and ranks % n == 0):
        for shard in (n for n in range(1, ranks // ep + 1) if ranks // ep % n == 0):
            group = shard * ep
            if group <= gpu.per_node or group % gpu.per_node == 0:
                yield Mesh(ranks // group, shard, ep)


def search(
    config: ModelConfig, ranks: int, gpu: Gpu, seq_len: int, batch_tokens: int, stack: Stack = STACKS["tuned"]
) -> list[Plan]:
    """All plans that fit, the quickest first.

    Args:
        config: the model.
        ranks: accelerators.
        gpu: which.
        seq_len: tokens of a row.
        batch_tokens: tokens of an optimiser step, at most; rounded down to whole rows of every rank.
        stack: how well the program uses the hardware.

    Raises:
        ConfigError: the batch is too small for the cluster.
        HardwareError: nothing fits.
    """
    rows = batch_tokens // seq_len // ranks
    if rows < 1:
        raise ConfigError(
            f"a batch must have a row of {seq_len} tokens for each of {ranks} ranks, {ranks * seq_len:,} tokens; got "
            f"{batch_tokens:,}. Take fewer ranks, shorter rows or a larger batch."
        )
    plans, least = [], float("inf")
    for mesh in meshes(config, ranks, gpu):
        for micro in (n for n in range(1, rows + 1) if rows % n == 0):
            for recompute in RECOMPUTE:
                work = Work(seq_len, micro, rows // micro, recompute)
                needed = memory(config, mesh, work).total
                least = min(least, needed)
                if needed <= gpu.memory_bytes:
                    plans.append(evaluate(config, gpu, mesh, work, stack))
    if not plans:
        raise HardwareError(
            f"{ranks} x {gpu.name} cannot train this model: the leanest mesh needs {least / 1e9:.0f} GB of each "
            f"accelerator's {gpu.memory_bytes / 1e9:.0f} GB. Take more of them, or shorter rows."
        )
    return sorted(plans, key=lambda plan: (plan.time.total, plan.memory.total))
