"""Estimate training: memory per rank, time per step, and the fastest mesh that fits.

    step = matrix products + attention + passes over memory + all-to-all + shared rows + waiting for other stages
           + exposed traffic of weights + optimiser

    matrix products   2 N_active tokens (3, or 4 with everything recomputed) / (peak x gemm x D / (D + 900))
                      and less for few rows per expert
    attention         the causal half of 4 L Hd T tokens x 3.5 (4.5) / (peak x attention); ranks that share a row have
                      equal parts of it, early and late tokens alike
    memory passes     bytes moved by norms, residuals, activations, rotation and routing / HBM
    all-to-all        tokens to their experts and back, per pass (2; 3 if all is recomputed) / NVLink, or InfiniBand
                      beyond a node
    shared rows       inputs and results of attention and dense networks over tp ranks, keys and values over cp ranks,
                      per pass, as above
    waiting           all of the above / pp on a stage, pp - 1 times in as many micro-steps as a step has
    weights' traffic  gather twice, scatter once per micro-step over the shard; reduce once over replicas
    optimiser         28 bytes per parameter of the shard / HBM

Memory: float32 master weights, two moments and gradients, sharded over shard x ep (16 B a parameter); bfloat16 copies
of two layers; saved activations; one chunk of logits; CUDA and NCCL. A mesh is replicate x shard x ep; dense weights
are sharded over shard x ep, experts over ep and then shard; tp x cp ranks share rows; pp stages have 1 / pp of the
layers, and the first one holds the activations of pp micro-steps (docs/plan.md). MFU is counted as in LLM Foundry:
without recomputation, with full attention.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from math import prod

from quadriga.errors import ConfigError, HardwareError
from quadriga.model.config import (
    AttentionSpec,
    DeltaNetSpec,
    LayerSpec,
    Mamba2Spec,
    ModelConfig,
    MoESpec,
    NoFeedForward,
    NoMixer,
    ShortConvSpec,
)
from quadriga.model.cost import attention_flops, n_params
from quadriga.model.parallel_spec import MOST_PADDING, ParallelSpec, head_dim_of
from quadriga.model.plan.hardware import STACKS, Gpu, Stack
from quadriga.model.weight_map import layer_shapes

RECOMPUTE = ("none", "selective", "full")
"""What is recomputed: nothing; norms, activations and routing; everything except each layer's input."""

_RUNTIME_BYTES = 4 * 10**9  # CUDA context, NCCL buffers
_FRAGMENTS = 1.05
_IMBALANCE = 1.15
"""Tokens of the busiest rank relative to the mean, with a balance loss."""
_BUS = 0.80
"""Fraction of a link's published rate that collectives reach."""
_MEMORY = 0.85
_LOGIT_ROWS = 4096
_STAGES = (1, 2, 4, 8, 16)
"""Numbers of pipeline stages that are planned."""
_STAGE_NODES = 4
"""Nodes that a copy of a stage is spread over at most: a pipeline is to keep gathers of weights narrow."""
_LEAST_PART = 1024
"""Tokens of a row that a rank must have to be planned: with fewer, collectives take longer than what they are for."""
_ROWS_HALF = 64
"""Rows per expert at which grouped products reach half the rate of large ones (half a tile of 128)."""


@dataclass(frozen=True)
class Work:
    """The settings of a step: row length, micro-steps, recomputation."""

    seq_len: int
    micro_rows: int
    """Sequences per rank, or per group of ranks that share rows, and micro-step."""
    accumulate: int
    """Micro-steps per optimiser step."""
    recompute: str
    sharing: int = 1
    """Ranks that share those sequences."""

    @property
    def micro_tokens(self) -> int:
        """Tokens per rank and micro-step."""
        return self.seq_len * self.micro_rows // self.sharing


@dataclass(frozen=True)
class Memory:
    """Memory of one rank, in bytes."""

    state: float
    """Master weights, moments and gradients."""
    gathered: float
    """The currently gathered layers in bfloat16, with their gradients."""
    activations: float
    logits: float
    runtime: float

    @property
    def total(self) -> float:
        """Total, including fragmentation."""
        return (self.state + self.gathered + self.activations + self.logits) * _FRAGMENTS + self.runtime


@dataclass(frozen=True)
class StepTime:
    """Seconds of one optimiser step."""

    matrix: float
    attention: float
    passes: float
    all_to_all: float
    sharing: float
    """Collectives among ranks that share rows, and hidden states from stage to stage."""
    waiting: float
    """For other stages of the pipeline, at a step's beginning and end."""
    exposed: float
    """Traffic of weights and gradients that does not overlap with computation."""
    optimiser: float

    @property
    def total(self) -> float:
        """Seconds of the whole step."""
        computed = self.matrix + self.attention + self.passes + self.optimiser
        return computed + self.all_to_all + self.sharing + self.waiting + self.exposed


@dataclass(frozen=True)
class TrainingPlan:
    """The estimate for one mesh: memory, time, MFU."""

    mesh: ParallelSpec
    work: Work
    memory: Memory
    time: StepTime
    mfu: float
    tokens_per_s: float
    """Tokens per second of the whole cluster."""

    @property
    def batch_tokens(self) -> int:
        """Tokens per optimiser step."""
        return self.mesh.stage_ranks * self.work.micro_tokens * self.work.accumulate


@dataclass(frozen=True)
class Sizes:
    """Parameter counts of a model, grouped by how they are sharded."""

    total: int
    active: int
    expert: int
    """Parameters of all experts."""
    layer_dense: int
    """Parameters of the largest layer, without experts."""
    layer_experts: int
    """Parameters of the experts of the layer with most of them."""
    heads: int
    """Parameters that tensor parallelism cuts."""
    layer_heads: int
    """The same of the layer with most of them."""
    outside: int
    """Parameters of embeddings, head and final norm."""


@lru_cache(maxsize=16)
def sizes(config: ModelConfig) -> Sizes:
    """Count a model's parameters by how they are sharded."""
    experts = expert = dense = inside = heads = most_heads = 0
    for layer, n in config.kinds().items():
        shapes = layer_shapes(layer, config.d_model)
        stacked = sum(prod(shape) for shape in shapes.values() if len(shape) == 3)
        whole = sum(prod(shape) for shape in shapes.values())
        experts, inside = experts + n * stacked, inside + n * whole
        expert, dense = max(expert, stacked), max(dense, whole - stacked)
        cut = sum(prod(shape) for name, shape in shapes.items() if head_dim_of(name) is not None)
        heads, most_heads = heads + n * cut, max(most_heads, cut)
    count = n_params(config)
    outside = count.total - inside
    return Sizes(count.total, count.active_without_input, experts, dense, expert, heads, most_heads, outside)


def train_flops_per_token(config: ModelConfig, seq_len: int) -> float:
    """Model FLOPs per trained token, as LLM Foundry counts: 3 x (2 N_active + 4 L Hd T), with full attention."""
    return 3 * (2 * sizes(config).active + attention_flops(config, seq_len))


def memory(config: ModelConfig, mesh: ParallelSpec, work: Work) -> Memory:
    """Estimate the memory of one rank."""
    s = sizes(config)
    state = 16 * mesh.elements(config)
    layer = s.layer_dense - s.layer_heads * (1 - 1 / mesh.tp) + s.layer_experts / mesh.ep
    spread = mesh.shard * mesh.ep > 1
    # Weights of two layers (one computes, one is being gathered), gradients of one, embeddings and head.
    outside = s.outside if mesh.pp == 1 else s.outside / 2  # embeddings in the first stage, the head in the last
    gathered = 2 * (3 * layer + 2 * outside) if spread else 2 * s.total / mesh.pp
    tokens = work.micro_tokens
    layers = {layer: _activation_bytes(layer, config.d_model, work.recompute, mesh) for layer in config.kinds()}
    kept = sum(layers[layer][1] * n for layer, n in config.kinds().items())
    if mesh.pp > 1:  # of the largest stage, for all micro-steps under way
        kept *= -(-config.n_layers // mesh.pp) / config.n_layers * min(mesh.pp, work.accumulate)
    again = max(whole for whole, _ in layers.values()) if work.recompute != "none" else 0
    activations = tokens * (kept + again)
    logits = min(tokens, _LOGIT_ROWS) * config.vocab_size * 6.0
    return Memory(state, gathered, activations, logits, _RUNTIME_BYTES)


def activation_elements(layer: LayerSpec, d_model: int) -> tuple[float, float, float]:
    """Elements saved per token: (a layer's input, the rest that "selective" also keeps, what it recomputes)."""
    d, ffn = d_model, layer.ffn
    k, f = (ffn.top_k, ffn.d_ff) if isinstance(ffn, MoESpec) else (1, ffn.d_ff)
    shared = ffn.shared if isinstance(ffn, MoESpec) else None  # every token's
    beside = 0 if shared is None else (2 if shared.gated else 1) * shared.d_ff
    kinds = 0 if isinstance(ffn, NoFeedForward) else 2 if ffn.gated else 1  # of rows as wide as the network
    halves = layer.mixes + layer.feeds
    routed = k * d if isinstance(ffn, MoESpec) else 0
    match layer.mixer:
        case AttentionSpec() as attn:
            mixed = attn.qkv_dim + attn.q_dim + attn.kv_dim + attn.q_dim  # projected, rotated, attended
        case ShortConvSpec(width=width):
            mixed = 3 * width + 3 * width  # thirds, and the three products of which the last is projected
        case DeltaNetSpec() as delta:  # projected, convolved, made of unit length, read and gated
            mixed = 4 * (delta.width + delta.value_dim)
        case Mamba2Spec() as mamba:  # projected, convolved, read, gated and normed
            mixed = 2 * mamba.width + 4 * mamba.inner_dim
        case NoMixer():
            mixed = 0
    kept = mixed + (halves - 1) * d + kinds * k * f + beside
    # Outputs of norms; rows for the experts, their results, the same in token order; activation and product.
    recomputed = halves * d + 3 * routed + kinds * k * f + beside
    return float(d), float(kept), float(recomputed)


def _activation_bytes(layer: LayerSpec, d_model: int, recompute: str, mesh: ParallelSpec) -> tuple[float, float]:
    """Bytes per token in bfloat16: (everything a layer could save, what it saves under ``recompute``)."""
    entry, kept, again = activation_elements(layer, d_model)
    again += sum(_gathered_elements(layer, d_model, mesh))
    uneven = _IMBALANCE if layer.moe is not None else 1.0
    whole = 2 * (entry + (kept + again) * uneven)
    return whole, {"none": whole, "selective": 2 * (entry + kept * uneven), "full": 2 * entry}[recompute]


def _gathered_elements(layer: LayerSpec, d_model: int, mesh: ParallelSpec) -> tuple[float, float]:
    """Elements per own token that reach a rank from those that share its rows: (inputs of halves, keys and values)."""
    halves = int(layer.mixes) + (layer.feeds and layer.moe is None)  # experts are where they are
    keys = 2 * layer.mixer.kv_dim if isinstance(layer.mixer, AttentionSpec) else 0
    return float((mesh.tp - 1) * halves * d_model), float((mesh.cp - 1) * keys)


def _shared_rows(config: ModelConfig, gpu: Gpu, mesh: ParallelSpec, tokens: int) -> float:
    """Seconds of one pass's collectives among ranks that share rows: results go back as wide as inputs came."""
    moved = 0.0
    for layer, n in config.kinds().items():
        inputs, keys = _gathered_elements(layer, config.d_model, mesh)
        moved += n * 2.0 * (2 * inputs + keys) * tokens
    link = gpu.node_bytes_per_s if mesh.sharing <= gpu.per_node else gpu.network_bytes_per_s
    return moved / (link * _BUS)


def step_time(config: ModelConfig, gpu: Gpu, mesh: ParallelSpec, work: Work, stack: Stack) -> StepTime:
    """Estimate the time of an optimiser step with the formulas in the module docstring."""
    s, tokens = sizes(config), work.micro_tokens
    forwards = 2 if work.recompute == "full" else 1
    experts_share = _expert_flops_share(config)
    # The layer with the fewest rows per expert determines the rate of the grouped products.
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
    sharing = _shared_rows(config, gpu, mesh, tokens) * (1 + forwards)
    if mesh.pp > 1:  # of the last stage, which has the head besides its layers
        share, head = -(-config.n_layers // mesh.pp) / config.n_layers, config.vocab_size * config.d_model / s.active
        matrix *= share * (1 - head) + head
        attention, moved, exchange, sharing = (share * part for part in (attention, moved, exchange, sharing))
        sharing += 2 * 2.0 * config.d_model * tokens / (gpu.network_bytes_per_s * _BUS)
    compute = work.accumulate * (matrix + attention + moved)
    traffic = _weight_traffic(s, gpu, mesh, work.accumulate) / mesh.pp
    shard = s.total / (mesh.shard * mesh.ep * mesh.pp)
    return StepTime(
        matrix=work.accumulate * matrix,
        attention=work.accumulate * attention,
        passes=work.accumulate * moved,
        all_to_all=work.accumulate * exchange,
        sharing=work.accumulate * sharing,
        waiting=(mesh.pp - 1) * (matrix + attention + moved + exchange + sharing),
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
    """Bytes moved per token in the forward pass outside matrix products, over all layers."""
    d, elements = config.d_model, 0
    for layer, n in config.kinds().items():
        k = layer.moe.top_k if layer.moe is not None else 1
        routed = 4 * k * d if layer.moe is not None else 0  # into expert order and back
        # Norms, residuals, rotation and clip, activation.
        shared = layer.moe.shared.d_ff if layer.moe is not None and layer.moe.shared is not None else 0
        widths = k * layer.ffn.d_ff + shared
        mixer = layer.mixer
        match mixer:
            case AttentionSpec():
                projected = mixer.qkv_dim
            case NoMixer():
                projected = 0
            case _:
                projected = 3 * mixer.width
        if isinstance(mixer, DeltaNetSpec):
            projected += 2 * mixer.n_v_heads * mixer.k_dim * mixer.v_dim  # S read and written
        halves = layer.mixes + layer.feeds
        elements += n * (5 * halves * d + 2 * projected + 3 * widths + routed)
    return 2.0 * elements


def _all_to_all(config: ModelConfig, gpu: Gpu, mesh: ParallelSpec, tokens: int) -> float:
    """Seconds to send a micro-step's tokens to their experts and back, over all layers."""
    if mesh.ep == 1:
        return 0.0
    visits = sum(spec.top_k for _, spec in config.moe_layers)
    sent = 2 * visits * config.d_model * 2.0 * tokens * _IMBALANCE
    within = min(mesh.ep, gpu.per_node)
    inside = sent * (within - 1) / mesh.ep / (gpu.node_bytes_per_s * _BUS)
    outside = sent * (mesh.ep - within) / mesh.ep / (gpu.network_bytes_per_s * _BUS)
    return max(inside, outside)


def _weight_traffic(s: Sizes, gpu: Gpu, mesh: ParallelSpec, accumulate: int) -> float:
    """Seconds of a step's all-gathers, reduce-scatters and all-reduces on the busiest link.

    A ring over whole nodes uses all network cards of a node together; within a node the rate is NVLink's. Each rank
    gathers only its part of the experts.
    """
    n = mesh.shard * mesh.ep
    seconds = 0.0
    if n > 1:
        link = gpu.node_bytes_per_s if n <= gpu.per_node else gpu.network_bytes_per_s * gpu.per_node
        dense = (s.total - s.expert - s.heads * (1 - 1 / mesh.tp)) * (n - 1) / n
        experts = s.expert / mesh.ep * (mesh.shard - 1) / mesh.shard
        if n > gpu.per_node and mesh.ep > 1:
            experts *= min(mesh.ep, gpu.per_node)  # ranks of a node gather different experts, each through its own card
        seconds += accumulate * 3 * 2 * (dense + experts) / (link * _BUS)
    if mesh.replicate > 1:
        copies = 2 * 4 * s.total / n * (mesh.replicate - 1) / mesh.replicate
        link = gpu.network_bytes_per_s if n >= gpu.per_node else gpu.node_bytes_per_s
        seconds += copies / (link * _BUS)
    return seconds


def evaluate(
    config: ModelConfig, gpu: Gpu, mesh: ParallelSpec, work: Work, stack: Stack = STACKS["tuned"]
) -> TrainingPlan:
    """Estimate memory, time and MFU of one mesh."""
    return _estimate(config, gpu, mesh, work, stack, memory(config, mesh, work))


def _estimate(
    config: ModelConfig, gpu: Gpu, mesh: ParallelSpec, work: Work, stack: Stack, needed: Memory
) -> TrainingPlan:
    time = step_time(config, gpu, mesh, work, stack)
    tokens = mesh.stage_ranks * work.micro_tokens * work.accumulate
    rate = tokens / time.total
    mfu = rate * train_flops_per_token(config, work.seq_len) / (mesh.ranks * gpu.peak_flops)
    return TrainingPlan(mesh, work, needed, time, mfu, rate)


def meshes(config: ModelConfig, ranks: int, gpu: Gpu, seq_len: int = 1) -> Iterator[ParallelSpec]:
    """Yield every mesh of ``ranks`` that the trainer accepts and whose groups are whole nodes or fit into one node.

    Left out are those whose gathers would move more than a tenth of padding (``model.parallel_spec``). Ranks share rows
    of ``seq_len`` tokens by powers of two, of a node or with one of another size that divides them.
    """
    for pp in (n for n in _STAGES if n <= config.n_layers and ranks % n == 0):
        for shard, ep in _copies(config, ranks // pp, gpu):
            if pp > 1 and shard * ep > _STAGE_NODES * gpu.per_node:
                continue
            for tp, cp in _sharings(gpu, shard * ep, seq_len):
                mesh = ParallelSpec(ranks // pp // (shard * ep), shard, ep, tp, cp, pp)
                if mesh.problem(config) is None and mesh.padding(config) <= MOST_PADDING:
                    yield mesh


def _copies(config: ModelConfig, ranks: int, gpu: Gpu) -> Iterator[tuple[int, int]]:
    """(shard, ep) of every copy of a model on some of so many ranks."""
    n_experts = math.gcd(*(spec.n_experts for _, spec in config.moe_layers)) or 1
    for ep in (n for n in range(1, n_experts + 1) if n_experts % n == 0 and ranks % n == 0):
        for shard in (n for n in range(1, ranks // ep + 1) if ranks // ep % n == 0):
            if shard * ep <= gpu.per_node or shard * ep % gpu.per_node == 0:
                yield shard, ep


def _sharings(gpu: Gpu, group: int, seq_len: int) -> Iterator[tuple[int, int]]:
    """(tp, cp) of ranks that share rows: heads within a node, parts of at least :data:`_LEAST_PART` tokens."""
    for tp in (1, 2, 4, 8):
        for cp in (1, 2, 4, 8, 16, 32):
            small = tp * cp > 1 and seq_len < _LEAST_PART * tp * cp
            if not small and tp <= gpu.per_node and group % (tp * cp) == 0 and seq_len % (tp * cp) == 0:
                yield tp, cp


def search(
    config: ModelConfig, ranks: int, gpu: Gpu, seq_len: int, batch_tokens: int, stack: Stack = STACKS["tuned"]
) -> list[TrainingPlan]:
    """All plans that fit into memory, the fastest first.

    Args:
        config: the model.
        ranks: number of accelerators.
        gpu: their type.
        seq_len: tokens per row.
        batch_tokens: most tokens per optimiser step; rounded down to whole rows on every rank.
        stack: how well the program uses the hardware.

    Raises:
        ConfigError: the batch is too small for the cluster.
        HardwareError: no mesh fits.
    """
    plans, least, most_rows = [], float("inf"), 0
    for mesh in meshes(config, ranks, gpu, seq_len):
        rows = batch_tokens // seq_len // (mesh.stage_ranks // mesh.sharing)
        most_rows = max(most_rows, rows)
        for micro in (n for n in range(1, rows + 1) if rows % n == 0):
            works = [Work(seq_len, micro, rows // micro, recompute, mesh.sharing) for recompute in RECOMPUTE]
            needed = [(work, memory(config, mesh, work)) for work in works]
            least = min(least, *(bytes_.total for _, bytes_ in needed))
            fitting = [(work, bytes_) for work, bytes_ in needed if bytes_.total <= gpu.memory_bytes]
            plans += [_estimate(config, gpu, mesh, work, stack, bytes_) for work, bytes_ in fitting]
            if not fitting:
                break  # more rows at once need more
    if most_rows == 0:
        raise ConfigError(
            f"a batch must have at least one row of {seq_len} tokens for each of {ranks} ranks, {ranks * seq_len:,} "
            "tokens, or for the ranks of a stage, or for those that share rows; got "
            f"{batch_tokens:,}. Use fewer ranks, shorter rows or a larger batch."
        )
    if not plans:
        raise HardwareError(
            f"{ranks} x {gpu.name} cannot train this model: the smallest mesh needs {least / 1e9:.0f} GB per "
            f"accelerator, which has {gpu.memory_bytes / 1e9:.0f} GB. Use more accelerators or shorter rows."
        )
    return sorted(plans, key=lambda plan: (-plan.tokens_per_s, plan.memory.total))
