"""The launch's claim, "up to 2x faster than LLaMA2-70B", measured on one machine without 260 GB of weights.

    step(system, B) = n_layers * layer(B) + head(B)            layer, head: measured on real-width random weights

A DBRX layer is 3.26 billion parameters, 1.8 GB at 4.5 bits: one fits where forty do not, and all forty are alike. So
one layer of each system is made, a pass over it is timed with and without the head, and the model's time is put
together by its number of layers. What this leaves out is what the sum leaves out: memory that does not fit, and caches
that one layer could keep (all layers here are larger than any).

Beside every figure stands what arithmetic expects of a perfect machine with this one's measured bandwidth and peak:

    bytes(B)  = n_layers * (shared weights + distinct(B) * one expert) + head      distinct(B) = E (1 - (1 - k/E)^B)
    time(B)   = max(bytes / bandwidth, B * 2 * active / peak)

Random weights route evenly; a trained router is less even, which favours a batch.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from quadriga.bench.roofline import peak_ops_per_s, read_bytes_per_s
from quadriga.errors import ConfigError
from quadriga.kernels.cpu.packing import Packed, Parameter, allocate, pack
from quadriga.kernels.cpu.program import Batch
from quadriga.model import cost, families
from quadriga.model.config import ModelConfig
from quadriga.model.weight_map import layer_shapes, parameter_shapes, stays_float32
from quadriga.quant.packed import PACKED
from quadriga.runners.compiled import CompiledModel

SYSTEMS = {
    "DBRX": "dbrx-132b",
    "LLaMA2-70B": "llama2-70b",
    "Mixtral 8x7B": "mixtral-8x7b",
    "Grok-1": "grok-1",
}
"""What the claim compares: name -> preset."""

BASE = "LLaMA2-70B"
"""What ratios are to."""

BATCHES = (1, 2, 4, 8, 16, 32, 64)
PROMPT = 128
DEPTH = 256
"""Positions already in the cache when a token is decoded."""


@dataclass(frozen=True)
class Measured:
    """One system at one size of batch, or one prompt."""

    system: str
    kind: str
    """decode or prefill."""
    n: int
    """Sequences, or tokens of the prompt."""
    layer_s: float
    head_s: float
    tokens_per_s: float
    """Of the whole model, put together."""
    spread: float
    """(slowest - fastest) / median of the rounds."""
    experts: float
    """Distinct experts that the layer visited; 1 in a dense one."""
    expected_tokens_per_s: float
    isa: str
    """Instruction set of the kernels."""


class Layer:
    """One real-width layer of a system, and its head.

    Args:
        name: of SYSTEMS.
        form: of ``quant.packed.PACKED``.
        threads: computing threads.
        most: sequences of the largest batch.
    """

    def __init__(self, name: str, form: str, *, threads: int, most: int) -> None:
        self.name, self.form = name, form
        self.whole = families.preset(SYSTEMS[name])
        self.config = self.whole.with_n_layers(1)
        self._blocks_each = -(-(max(DEPTH + 1, PROMPT)) // 16)
        parameters = random_packed(self.config, form)
        self.model = CompiledModel(
            self.config, parameters, threads=threads, n_blocks=self._blocks_each * most, activations="int8"
        )
        self._random = np.random.default_rng(0)

    def decode(self, batch: int) -> tuple[float, float]:
        """Seconds of (the layer, the head) for one token of each of ``batch`` sequences."""
        layer = self._once([DEPTH] * batch, [1] * batch, [])
        return layer, max(0.0, self._once([DEPTH] * batch, [1] * batch, list(range(batch))) - layer)

    def prefill(self, n: int) -> tuple[float, float]:
        """Seconds of (the layer, the head) for a prompt of ``n`` tokens; its head is that of one decoded token."""
        head = self.decode(1)[1]
        return max(0.0, self._once([0], [n], [n - 1]) - head), head

    def distinct_experts(self, n_tokens: int) -> float:
        """Experts that the last pass visited."""
        stats = self.model.router_stats(n_tokens)
        return float(len(set(stats[0].expert_ids.flatten().tolist()))) if stats else 1.0

    def _once(self, starts: Sequence[int], lengths: Sequence[int], rows: list[int]) -> float:
        """Seconds of one pass over random tokens, with the logits of ``rows``."""
        tokens = self._random.integers(0, self.config.vocab_size, sum(lengths)).tolist()
        positions = [p for start, n in zip(starts, lengths, strict=True) for p in range(start, start + n)]
        each = self._blocks_each
        tables, table_starts = list(range(each * len(starts))), [each * i for i in range(len(starts) + 1)]
        ints = (tokens, positions, np.cumsum([0, *lengths]), tables, table_starts, rows)
        batch = Batch(*(np.array(x, dtype=np.int32) for x in ints))
        started = time.perf_counter()
        self.model.forward(batch)
        return time.perf_counter() - started

    def expected(self, kind: str, n: int, bandwidth: float, peak: float) -> float:
        """Tokens a second of the whole model on a perfect machine; see the module docstring."""
        layers, head = layer_bytes(self.whole, self.form, n), head_bytes(self.whole, self.form)
        active = cost.n_params(self.whole).active_without_input
        head_params = self.whole.vocab_size * self.whole.d_model
        operations = 2.0 * (n * active if kind == "decode" else n * (active - head_params) + head_params)
        return n / max((self.whole.n_layers * layers + head) / bandwidth, operations / peak)


def random_packed(config: ModelConfig, form: str) -> dict[str, Parameter]:
    """Packed random weights: of every shape one matrix is made, every expert has its own copy of it in memory."""
    generator = np.random.default_rng(0)
    made: dict[tuple[tuple[int, ...], str], Packed] = {}

    def matrix(shape: tuple[int, ...], kind: str) -> Packed:
        if (shape, kind) not in made:
            block = 0.02 * generator.standard_normal((min(shape[0], 1024), shape[1]), dtype=np.float32)
            values = np.tile(block, (-(-shape[0] // len(block)), 1))[: shape[0]]
            made[shape, kind] = pack(np.ascontiguousarray(values), kind)
            return made[shape, kind]
        first = made[shape, kind]
        data = allocate(first.data.nbytes)
        np.copyto(data, first.data)
        return Packed(kind, first.rows, first.cols, data)

    parameters: dict[str, Parameter] = {}
    for name, shape in parameter_shapes(config).items():
        if name == "lm_head.weight":
            parameters[name] = parameters["embed.weight"]  # a row of one and all of the other are read
        elif len(shape) == 1:
            parameters[name] = np.ones(shape, dtype=np.float32)
        elif len(shape) == 2:
            parameters[name] = matrix(shape, "float32" if stays_float32(name) else form)
        else:
            parameters[name] = [matrix(shape[1:], form) for _ in range(shape[0])]
    return parameters


def layer_bytes(config: ModelConfig, form: str, n_tokens: int) -> float:
    """Bytes of weights that one layer reads for ``n_tokens`` independent tokens."""
    total, layer = 0.0, config.only_layer("the speed claim")
    for name, shape in layer_shapes(layer, config.d_model).items():
        if len(shape) == 3:
            assert layer.moe is not None, "stacked matrices are experts"
            visited = cost.expected_distinct_experts(layer.moe, n_tokens)
            total += visited * PACKED[form].nbytes_of(*shape[1:])
        elif len(shape) == 2:
            total += PACKED["float32" if stays_float32(name) else form].nbytes_of(*shape)
    return total


def head_bytes(config: ModelConfig, form: str) -> float:
    """Bytes of the head."""
    return float(PACKED[form].nbytes_of(config.vocab_size, config.d_model))


def run(
    *,
    form: str = "q4",
    threads: int,
    batches: Sequence[int] = BATCHES,
    rounds: int = 3,
    systems: Sequence[str] = tuple(SYSTEMS),
    tell: Callable[[str], None] = lambda text: None,
) -> list[Measured]:
    """Measure every system at every batch, in turn, so that a slow minute of the machine hits all of them alike.

    Raises:
        ConfigError: an unknown format or system, or a batch or round below 1.
    """
    if form not in PACKED:
        raise ConfigError(f"the claim's format must be one of {', '.join(PACKED)}; got {form!r}")
    if rounds < 1 or not batches or min(batches) < 1 or max(batches) > 512:
        raise ConfigError(f"rounds must be at least 1 and batches from 1 to 512; got {rounds} and {list(batches)}")
    layers = []
    for name in systems:
        if name not in SYSTEMS:
            raise ConfigError(f"systems must be among {', '.join(SYSTEMS)}; got {name!r}")
        tell(f"making a layer of {name}")
        layers.append(Layer(name, form, threads=threads, most=max(batches)))
    sizes = [("decode", b) for b in batches] + [("prefill", PROMPT)]
    times: dict[tuple[str, str, int], list[tuple[float, float]]] = {}
    visited: dict[tuple[str, str, int], float] = {}
    context = layers[0].model.program.context
    bandwidths, peaks = [], []
    for kind, n in sizes:
        tell(f"{kind} {n}")
        for turn in range(rounds + 1):
            bandwidths.append(read_bytes_per_s(context))
            peaks.append(peak_ops_per_s(context, form))
            for layer in layers:
                seconds = layer.decode(n) if kind == "decode" else layer.prefill(n)
                if turn:  # the first one warms
                    times.setdefault((layer.name, kind, n), []).append(seconds)
                    visited[layer.name, kind, n] = layer.distinct_experts(n)
    bandwidth, peak = statistics.median(bandwidths), statistics.median(peaks)
    tell(f"bandwidth {bandwidth / 1e9:.1f} GB/s, peak {peak / 1e9:.0f} Gop/s (medians)")
    return [
        _measured(layer, kind, n, times[layer.name, kind, n], visited[layer.name, kind, n], bandwidth, peak)
        for kind, n in sizes
        for layer in layers
    ]


def _measured(
    layer: Layer, kind: str, n: int, times: list[tuple[float, float]], visited: float, bandwidth: float, peak: float
) -> Measured:
    wholes = [layer.whole.n_layers * one + head for one, head in times]
    middle = statistics.median(wholes)
    return Measured(
        system=layer.name,
        kind=kind,
        n=n,
        layer_s=statistics.median(one for one, _ in times),
        head_s=statistics.median(head for _, head in times),
        tokens_per_s=n / middle,
        spread=(max(wholes) - min(wholes)) / middle,
        experts=visited,
        expected_tokens_per_s=layer.expected(kind, n, bandwidth, peak),
        isa=layer.model.program.context.isa,
    )


def ratio(rows: Sequence[Measured], row: Measured) -> tuple[float, float] | None:
    """(measured, expected) speed of a row over BASE's at the same size; None if that was not measured."""
    for one in rows:
        if (one.system, one.kind, one.n) == (BASE, row.kind, row.n):
            return row.tokens_per_s / one.tokens_per_s, row.expected_tokens_per_s / one.expected_tokens_per_s
    return None
