"""The launch's claim, "up to 2x faster than LLaMA2-70B", tested on one machine without 260 GB of weights.

    step(system, B) = n_layers * layer(B) + head(B)            layer, head: measured on real-width random weights

A DBRX layer has 3.26 billion parameters, 1.8 GB at 4.5 bits: one layer fits into memory where all forty do not, and all
are alike. So one layer of each system is built, a pass is timed with and without the head, and the model's time is the
sum over its layers. This ignores what a sum cannot show: models that do not fit into memory, and layers small enough to
stay in a cache (all layers here are larger than any cache).

Every figure is compared with the expectation for a perfect machine with this one's measured bandwidth and peak:

    bytes(B)  = n_layers * (shared weights + distinct(B) * one expert) + head      distinct(B) = E (1 - (1 - k/E)^B)
    time(B)   = max(bytes / bandwidth, B * 2 * active / peak)

Random weights route evenly; a trained router is less even, so a batch visits fewer experts and runs faster.
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
from quadriga.kernels.pass_batch import PassBatch
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
"""The systems that the claim compares: name -> preset."""

BASE = "LLaMA2-70B"
"""The system that speeds are compared with."""

BATCHES = (1, 2, 4, 8, 16, 32, 64)
PROMPT = 128
DEPTH = 256
"""Cached positions when a token is decoded."""


@dataclass(frozen=True)
class ClaimResult:
    """The result for one system at one batch size or prompt length."""

    system: str
    kind: str
    """decode or prefill."""
    n: int
    """Sequences, or tokens of the prompt."""
    layer_s: float
    head_s: float
    tokens_per_s: float
    """Tokens per second of the whole model, from the times of layer and head."""
    spread: float
    """(slowest - fastest) / median of the rounds."""
    experts: float
    """Distinct experts that the layer visited; 1 for a dense layer."""
    expected_tokens_per_s: float
    isa: str
    """Instruction set of the kernels."""


class Layer:
    """One full-width layer of a system, and its head.

    Args:
        name: a key of SYSTEMS.
        packed_format: of the weights; a key of ``quant.packed.PACKED``.
        threads: computing threads.
        most: largest batch, in sequences.
    """

    def __init__(self, name: str, packed_format: str, *, threads: int, most: int) -> None:
        self.name, self.packed_format = name, packed_format
        self.whole = families.preset(SYSTEMS[name])
        self.config = self.whole.with_n_layers(1)
        self._blocks_each = -(-(max(DEPTH + 1, PROMPT)) // 16)
        parameters = random_packed(self.config, packed_format)
        self.model = CompiledModel(
            self.config, parameters, threads=threads, n_blocks=self._blocks_each * most, activations="int8"
        )
        self._random = np.random.default_rng(0)

    def decode(self, batch: int) -> tuple[float, float]:
        """Seconds for (the layer, the head) to decode one token of each of ``batch`` sequences."""
        layer = self._once([DEPTH] * batch, [1] * batch, [])
        return layer, max(0.0, self._once([DEPTH] * batch, [1] * batch, list(range(batch))) - layer)

    def prefill(self, n: int) -> tuple[float, float]:
        """Seconds for (the layer, the head) on a prompt of ``n`` tokens; the head runs for one token only."""
        head = self.decode(1)[1]
        return max(0.0, self._once([0], [n], [n - 1]) - head), head

    def distinct_experts(self, n_tokens: int) -> float:
        """Distinct experts that the last pass visited."""
        routing = self.model.program.routing  # where the kernels wrote it: asking for copies would be timed
        return float(len(np.unique(routing[0].ids[:n_tokens]))) if routing else 1.0

    def _once(self, starts: Sequence[int], lengths: Sequence[int], rows: list[int]) -> float:
        """Seconds for one pass over random tokens that computes the logits of ``rows``."""
        tokens = self._random.integers(0, self.config.vocab_size, sum(lengths)).tolist()
        positions = [p for start, n in zip(starts, lengths, strict=True) for p in range(start, start + n)]
        each = self._blocks_each
        tables, table_starts = list(range(each * len(starts))), [each * i for i in range(len(starts) + 1)]
        ints = (tokens, positions, np.cumsum([0, *lengths]), tables, table_starts, rows)
        batch = PassBatch(*(np.array(x, dtype=np.int32) for x in ints))
        started = time.perf_counter()
        self.model.forward(batch)
        return time.perf_counter() - started

    def expected(self, kind: str, n: int, bandwidth: float, peak: float) -> float:
        """Expected tokens per second of the whole model on a perfect machine; see the module docstring."""
        layers, head = layer_bytes(self.whole, self.packed_format, n), head_bytes(self.whole, self.packed_format)
        active = cost.n_params(self.whole).active_without_input
        head_params = self.whole.vocab_size * self.whole.d_model
        operations = 2.0 * (n * active if kind == "decode" else n * (active - head_params) + head_params)
        return n / max((self.whole.n_layers * layers + head) / bandwidth, operations / peak)


def random_packed(config: ModelConfig, packed_format: str) -> dict[str, Parameter]:
    """Random packed weights: one matrix per shape is generated, and every expert gets its own copy in memory."""
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
            parameters[name] = parameters["embed.weight"]  # one is read by row, the other as a whole
        elif len(shape) == 1:
            parameters[name] = np.ones(shape, dtype=np.float32)
        elif len(shape) == 2:
            parameters[name] = matrix(shape, "float32" if stays_float32(name) else packed_format)
        else:
            parameters[name] = [matrix(shape[1:], packed_format) for _ in range(shape[0])]
    return parameters


def layer_bytes(config: ModelConfig, packed_format: str, n_tokens: int) -> float:
    """Bytes of weights read by one layer for ``n_tokens`` independent tokens."""
    total, layer = 0.0, config.only_layer("the speed claim")
    for name, shape in layer_shapes(layer, config.d_model).items():
        if len(shape) == 3:
            assert layer.moe is not None, "stacked matrices are experts"
            visited = cost.expected_distinct_experts(layer.moe, n_tokens)
            total += visited * PACKED[packed_format].nbytes_of(*shape[1:])
        elif len(shape) == 2:
            total += PACKED["float32" if stays_float32(name) else packed_format].nbytes_of(*shape)
    return total


def head_bytes(config: ModelConfig, packed_format: str) -> float:
    """Bytes of the packed head."""
    return float(PACKED[packed_format].nbytes_of(config.vocab_size, config.d_model))


def run(
    *,
    packed_format: str = "q4",
    threads: int,
    batches: Sequence[int] = BATCHES,
    rounds: int = 3,
    systems: Sequence[str] = tuple(SYSTEMS),
    tell: Callable[[str], None] = lambda text: None,
) -> list[ClaimResult]:
    """Measure every system at every batch size, alternating, so that a slow phase of the machine affects all alike.

    Args:
        packed_format: of the weights; a key of ``quant.packed.PACKED``.
        tell: called with a line of progress.

    Raises:
        ConfigError: unknown format or system, or a batch or number of rounds out of range.
    """
    if packed_format not in PACKED:
        raise ConfigError(f"the claim's format must be one of {', '.join(PACKED)}; got {packed_format!r}")
    if rounds < 1 or not batches or min(batches) < 1 or max(batches) > 512:
        raise ConfigError(f"rounds must be at least 1 and batches from 1 to 512; got {rounds} and {list(batches)}")
    layers = []
    for name in systems:
        if name not in SYSTEMS:
            raise ConfigError(f"systems must be among {', '.join(SYSTEMS)}; got {name!r}")
        tell(f"building a layer of {name}")
        layers.append(Layer(name, packed_format, threads=threads, most=max(batches)))
    sizes = [("decode", b) for b in batches] + [("prefill", PROMPT)]
    times: dict[tuple[str, str, int], list[tuple[float, float]]] = {}
    visited: dict[tuple[str, str, int], float] = {}
    context = layers[0].model.program.context
    bandwidths, peaks = [], []
    for kind, n in sizes:
        tell(f"{kind} {n}")
        for turn in range(rounds + 1):
            bandwidths.append(read_bytes_per_s(context))
            peaks.append(peak_ops_per_s(context, packed_format))
            for layer in layers:
                seconds = layer.decode(n) if kind == "decode" else layer.prefill(n)
                if turn:  # the first round only warms up
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
) -> ClaimResult:
    wholes = [layer.whole.n_layers * one + head for one, head in times]
    middle = statistics.median(wholes)
    return ClaimResult(
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


def ratio(rows: Sequence[ClaimResult], row: ClaimResult) -> tuple[float, float] | None:
    """(measured, expected) speed of a row relative to BASE at the same size; None if BASE was not measured."""
    for one in rows:
        if (one.system, one.kind, one.n) == (BASE, row.kind, row.n):
            return row.tokens_per_s / one.tokens_per_s, row.expected_tokens_per_s / one.expected_tokens_per_s
    return None
