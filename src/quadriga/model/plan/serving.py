"""Which machine can serve a model in which weight format, and an upper bound on its tokens per second.

    seconds of a step of B sequences >= max(bytes read / bandwidth, 2 N_active B / peak)
    bytes read = all weights but the experts + the distinct experts that B tokens visit + B cached contexts

Several machines exchange every branch's sum, twice a layer: each receives the (B, D) float32 of all others, one after
the other, and the first one the others' rows of the logits besides.

This is a bound, not a forecast. At B = 1 a mixture reads k of its E experts, so it decodes faster than a dense model of
its size; at large B it reads all of them, and is faster only because it computes less.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from quadriga.model.config import ModelConfig
from quadriga.model.cost import (
    bytes_read_per_token,
    expected_distinct_experts,
    flops_per_token,
    kv_bytes,
    kv_bytes_read,
    state_bytes,
    table_bytes,
    weight_bytes,
)
from quadriga.model.plan.hardware import Box

SERVED_FORMATS = (
    *("bf16", "q8", "q4"),
    *("q6k", "q5m", "q5k", "q5", "q4m", "q4k", "iq4nl", "iq4xs", "q3k", "q2k"),
)

RunsOn = Literal["kernels", "ranks", "torch"]
"""The CPU's kernels in one process, or in one on each machine (``--parallel``); plain torch on one GPU."""
_USABLE = 0.92
"""Fraction of a machine's memory available for weights and cache; the rest is for the program."""


@dataclass(frozen=True)
class Serving:
    """The estimate for a model in one weight format on one machine."""

    box: Box
    weight_format: str
    weight_bytes: int
    cache_tokens: int
    """Positions of sequences as long as the context that fit beside the weights; negative if the weights do not."""
    tokens_per_s_alone: float
    """Upper bound for a single sequence."""
    batch: int
    """Number of sequences for ``tokens_per_s_batch``: as many as fit, at most ``max_batch``."""
    tokens_per_s_batch: float
    """Upper bound for ``batch`` sequences together; 0 if not even one fits."""
    runs_on: RunsOn | None
    """What of this engine runs it; None: nothing does."""

    @property
    def fits(self) -> bool:
        """True if at least one sequence of full context length fits."""
        return self.batch > 0


def decode_bound(config: ModelConfig, weight_format: str, box: Box, batch: int, context: int) -> float:
    """Upper bound on tokens per second of ``batch`` sequences at position ``context``, all together."""
    read = _weights_read(config, weight_format, batch) + batch * kv_bytes_read(config, context)
    operations = batch * flops_per_token(config, context)
    return batch / (max(read / box.bytes_per_s, operations / box.peak_flops) + exchange_s(config, box, batch))


def exchange_s(config: ModelConfig, box: Box, batch: int) -> float:
    """Seconds that the machines of a box need for what they tell each other in a step of ``batch`` tokens.

    latency x layers + bytes: 2 exchanges a layer, in each of which a machine hears from all others in turn; then the
    first hears logits.
    """
    if box.link is None:
        return 0.0
    others = box.link.machines - 1
    one = box.link.latency_s + 4 * batch * config.d_model / box.link.bytes_per_s
    logits = 4 * batch * config.vocab_size / box.link.machines
    last = box.link.latency_s + logits / box.link.bytes_per_s
    return others * (2 * config.n_layers * one + last)


def runs_on(weight_format: str, box: Box) -> RunsOn | None:
    """What of this engine runs weights of a format on a box; None: it has nothing for it yet."""
    if box.n_gpus:
        return "torch" if box.n_gpus == 1 and weight_format == "bf16" else None
    return "kernels" if box.link is None else "ranks"


def request_bound(config: ModelConfig, weight_format: str, box: Box, batch: int, prompt: int, output: int) -> float:
    """Upper bound on output tokens per second of ``batch`` users together, each with this prompt and output length.

    Prompts are bound by computation, which for a mixture depends only on active parameters; decoding by memory reads.
    """
    prefill = prompt * flops_per_token(config, prompt // 2) / box.peak_flops
    decode = output / decode_bound(config, weight_format, box, batch, prompt + output // 2)  # one user's share
    return output / (prefill + decode)


def _weights_read(config: ModelConfig, weight_format: str, batch: int) -> float:
    """Bytes of weights read by a step of ``batch`` tokens."""
    alone = bytes_read_per_token(config, weight_format)
    # One token reads top_k experts; the bytes of the others are read in proportion to the experts visited.
    input_rows = 0 if config.tied_embeddings else table_bytes(config, weight_format)
    beyond = weight_bytes(config, weight_format) - input_rows - alone
    # Layers may have mixtures of different sizes: each counts by its share of those bytes.
    met = unmet = 0.0
    for _, spec in config.moe_layers:
        width = spec.d_ff
        met += width * (expected_distinct_experts(spec, batch) - spec.top_k)
        unmet += width * (spec.n_experts - spec.top_k)
    return alone + beyond * met / unmet if unmet else float(alone)


def serve(config: ModelConfig, weight_format: str, box: Box, context: int, max_batch: int = 64) -> Serving:
    """Estimate serving a model on ``box``: whether it fits, and how fast it can be."""
    weights = weight_bytes(config, weight_format)
    room = box.memory_bytes * _USABLE - weights
    one = kv_bytes(config, context)
    tokens = int(room // (one / context))
    batch = max(0, min(max_batch, int(room // (one + state_bytes(config)))))
    return Serving(
        box=box,
        weight_format=weight_format,
        weight_bytes=weights,
        cache_tokens=tokens,
        tokens_per_s_alone=decode_bound(config, weight_format, box, 1, context) if batch else 0.0,
        batch=batch,
        tokens_per_s_batch=decode_bound(config, weight_format, box, batch, context) if batch else 0.0,
        runs_on=runs_on(weight_format, box),
    )
