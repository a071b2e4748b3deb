"""The engine's speed on this machine, and how close it is to the machine's limits.

Decoding is bound by memory: its roofline is the read bandwidth, measured in the same process with the same threads
right beside each run, because on shared machines it changes within seconds. Prompts are bound by arithmetic: their
roofline is the peak of the dot-product instruction that the format uses, measured in registers.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import cast

import numpy as np

from quadriga.bench.roofline import peak_ops_per_s, read_bytes_per_s
from quadriga.engine.blocks import BlockPool, BlockTable
from quadriga.engine.engine import Engine
from quadriga.engine.request import Request, SamplingParams
from quadriga.errors import ConfigError
from quadriga.kernels.cpu.packing import Packed, Parameter
from quadriga.kernels.pass_batch import PassBatch
from quadriga.model import cost
from quadriga.model.config import ModelConfig
from quadriga.runners.base import Runner
from quadriga.runners.compiled import CompiledModel

KINDS = ("decode", "prefill", "batch", "depth")


@dataclass(frozen=True)
class Row:
    """One measurement: medians of several rounds."""

    kind: str
    n: int
    """decode: generated tokens; prefill: prompt tokens; batch: sequences; depth: cached positions."""
    tokens_per_s: float
    spread: float
    """(slowest - fastest) / median of the rounds."""
    roofline: float
    """Tokens per second at the machine's limit; see ``limit``."""
    limit: str
    """Which limit: "read" (bytes per token / read bandwidth) or "arithmetic" (operations per token / peak)."""

    @property
    def share(self) -> float:
        """Fraction of the roofline that was reached."""
        return self.tokens_per_s / self.roofline


@dataclass(frozen=True)
class Spread:
    """How tokens were spread over experts, in the layer where it is worst."""

    visited: float
    """Experts that had a token, of all."""
    busiest: float
    """Tokens that visited the busiest expert, of all."""
    even: float
    """As many experts, of all, would be as undecided if they had equal parts: e to the entropy of the parts, over E."""


class Bench:
    """Measures one model on the kernels.

    Args:
        model: the model.
        rounds: number of measurements, of which the median is reported.
        part: rank 0's part of a model that ranks share, and how many of them compute at the same time.
    """

    def __init__(self, model: Runner, *, rounds: int = 5, part: tuple[CompiledModel, int] | None = None) -> None:
        self.model, self.config, self.rounds = model, model.config, rounds
        own, self._at_once = (cast("CompiledModel", model), 1) if part is None else part
        self.context, self._own = own.program.context, own
        parameters = dict(own.parameters)
        self._stages = self.config.n_layers / own.config.n_layers  # which come one after the other
        self.bytes_per_token = self._stages * bytes_per_token(own.config, parameters)
        self._format = _main_format(parameters)
        self._random = np.random.default_rng(0)

    def run(self, kind: str, n: int) -> Row:
        """Measure ``kind`` (one of KINDS) at ``n``.

        Raises:
            ConfigError: unknown kind, or more tokens than fit into the cache.
        """
        if kind not in KINDS:
            raise ConfigError(f"the measurement must be one of {', '.join(KINDS)}; got {kind!r}")
        n_sequences, each = {"decode": (1, n + 16), "prefill": (1, n + 1), "batch": (n, 80), "depth": (1, n + 64)}[kind]
        needed, n_blocks = n_sequences * self.model.cache.n_blocks(each), self.model.n_blocks
        if n < 1 or needed > n_blocks:
            raise ConfigError(f"{kind} {n} needs a cache of {needed} blocks of 16 tokens, it has {n_blocks}")
        return {"decode": self._decode, "prefill": self._prefill, "batch": self._batch, "depth": self._depth}[kind](n)

    def spread(self) -> Spread | None:
        """How the experts' work was shared out since the model was loaded; None: it has no experts.

        A model whose tokens all go to a few experts reads less in batches than one that was trained.
        """
        loads = [load.astype(np.float64) for load in self.model.expert_load()]
        if not loads or not all(load.sum() for load in loads):
            return None
        parts = [load / load.sum() for load in loads]
        even = [float(np.exp(-(p[p > 0] * np.log(p[p > 0])).sum())) / len(p) for p in parts]
        top_k = [spec.top_k for _, spec in self.config.moe_layers]
        busiest = [float(p.max()) * k for p, k in zip(parts, top_k, strict=True)]
        return Spread(min(float((p > 0).mean()) for p in parts), max(busiest), min(even))

    def _tokens(self, n: int) -> tuple[int, ...]:
        return tuple(self._random.integers(0, self.config.vocab_size, n).tolist())

    def _decode(self, n: int) -> Row:
        def once() -> float:
            return self._engine_decode(1, n)

        return self._by_bandwidth("decode", n, once, self.bytes_per_token, 1)

    def _batch(self, n: int) -> Row:
        def once() -> float:
            return self._engine_decode(n, 24)

        return self._by_bandwidth("batch", n, once, self._bytes_of_batch(n), n)

    def _engine_decode(self, n_sequences: int, n_tokens: int) -> float:
        """Tokens per second of ``n_sequences`` answers after their first tokens, through the whole engine."""
        engine = Engine(self.model, prefix_cache=False, max_sequences=max(64, n_sequences))
        params = SamplingParams(max_new_tokens=n_tokens + 1, ignore_eos=True)
        for _ in range(n_sequences):
            engine.submit(Request(prompt=self._tokens(8), params=params))
        engine.step()
        started, made = time.perf_counter(), 0
        while engine.has_work:
            made += len(engine.step())
        return made / (time.perf_counter() - started)

    def _depth(self, n: int) -> Row:
        """Time a step at position n over a cache of zeros; the cached values do not affect the time."""
        blocks = BlockTable(BlockPool(self.model.n_blocks), self.model.cache.windows)
        for column in range(-(-(n + 64) // 16)):
            blocks.let_go(min(n, 16 * column))
            assert blocks.extend(), "the cache has room for it"

        def once() -> float:
            started = time.perf_counter()
            for i in range(8):
                ints = (
                    [int(self._random.integers(self.config.vocab_size))],
                    [n + i],
                    [0, 1],
                    blocks.rows,
                    [0, len(blocks)],
                    [0],
                )
                self.model.forward(PassBatch(*(np.array(x, dtype=np.int32) for x in ints)))
            return 8 / (time.perf_counter() - started)

        seen = sum(min(n, window or n) for window in self.model.cache.windows)
        kv = self.model.kv_bytes / (self.model.n_blocks * 16) * seen
        return self._by_bandwidth("depth", n, once, self.bytes_per_token + kv, 1)

    def _prefill(self, n: int) -> Row:
        def once() -> float:
            engine = Engine(self.model, prefix_cache=False)
            engine.submit(Request(prompt=self._tokens(n), params=SamplingParams(max_new_tokens=1)))
            started = time.perf_counter()
            while engine.has_work:
                engine.step()
            return n / (time.perf_counter() - started)

        rates = [once() for _ in range(self.rounds)]
        peak = self._at_once * peak_ops_per_s(self.context, self._format)
        per_token = 2.0 * cost.n_params(self.config).active  # counts embeddings and head per token: 1 % too many
        per_token -= 2.0 * self.config.vocab_size * self.config.d_model * (1 if self.config.tied_embeddings else 2)
        return _row("prefill", n, rates, [peak / per_token], "arithmetic")

    def _by_bandwidth(self, kind: str, n: int, once: Callable[[], float], nbytes: float, tokens: int) -> Row:
        once()
        rates, limits = [], []
        for _ in range(self.rounds):
            before = read_bytes_per_s(self.context)
            rates.append(once())
            limits.append((before + read_bytes_per_s(self.context)) / 2 / nbytes * tokens)
        return _row(kind, n, rates, limits, "read")

    def _bytes_of_batch(self, n: int) -> float:
        """Bytes read by a step of n sequences if each chooses its experts at random."""
        total = self.bytes_per_token
        for i, spec in self._own.config.moe_layers:
            used = spec.top_k / spec.n_experts
            total += self._stages * _stacked_bytes(self._own.parameters, i) * (1 - (1 - used) ** n - used)
        return total


def bytes_per_token(config: ModelConfig, parameters: dict[str, Parameter]) -> float:
    """Bytes of weights read to decode one token: all except unused embedding rows and experts."""
    total = 0.0
    for name, value in parameters.items():
        whole = [value] if isinstance(value, Packed) else value if name.endswith("attn.wqkv.weight") else []
        if name != "embed.weight" or config.tied_embeddings:
            total += sum(one.data.nbytes for one in whole if isinstance(one, Packed))
    for i, spec in config.moe_layers:
        total += spec.top_k / spec.n_experts * _stacked_bytes(parameters, i)
    return total


def _stacked_bytes(parameters: Mapping[str, Parameter], layer: int) -> float:
    """Bytes of all experts of a layer."""
    names = (f"layers.{layer}.moe.{part}" for part in ("w_gate", "w_up", "w_down"))  # no gate where experts are plain
    return float(sum(p.data.nbytes for name in names for p in parameters.get(name, ())))  # type: ignore


def _main_format(parameters: dict[str, Parameter]) -> str:
    """The packed format that most bytes have."""
    count: dict[str, int] = {}
    for value in parameters.values():
        for p in value if isinstance(value, list) else [value]:
            if isinstance(p, Packed):
                count[p.format] = count.get(p.format, 0) + p.rows * p.cols
    return max(count, key=lambda name: count[name])


def _row(kind: str, n: int, rates: list[float], limits: list[float], limit: str) -> Row:
    middle = statistics.median(rates)
    return Row(kind, n, middle, (max(rates) - min(rates)) / middle, statistics.median(limits), limit)
