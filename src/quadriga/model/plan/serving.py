"""What can serve a model: which weight format fits which box, and how many tokens a second its memory allows at best.

    seconds of a step of B sequences >= max(bytes read / bandwidth, 2 N_active B / peak)
    bytes read = everything but the experts + the distinct experts that B tokens meet + B cached contexts

A bound, not a forecast. At B = 1 a mixture reads k of its E experts, which is why it decodes faster than a dense model
of its size; at large B it reads them all, and wins by its fewer operations instead.
"""

from __future__ import annotations

from dataclasses import dataclass

from quadriga.model.config import ModelConfig
from quadriga.model.cost import (
    bytes_read_per_token,
    expected_distinct_experts,
    flops_per_token,
    kept_positions,
    kv_bytes_per_token,
    kv_bytes_read,
    weight_bytes,
)
from quadriga.model.plan.hardware import Box

SERVED_FORMATS = ("bf16", "q8", "q4")
_USABLE = 0.92
"""Share of a box's memory that weights and cache may take; the rest is the program's."""


@dataclass(frozen=True)
class Serving:
    """A model in a format on a box."""

    box: Box
    form: str
    weight_bytes: int
    cache_tokens: int
    """Positions of cache that fit beside the weights; negative if the weights do not fit."""
    tokens_per_s_alone: float
    """Bound of one sequence."""
    batch: int
    """Sequences at work for the next number: as many as fit, at most ``max_batch``."""
    tokens_per_s_batch: float
    """Bound of all of them together; 0 if not even one fits."""

    @property
    def fits(self) -> bool:
        """True if at least one sequence of the context fits."""
        return self.batch > 0


def decode_bound(config: ModelConfig, form: str, box: Box, batch: int, context: int) -> float:
    """Tokens a second of ``batch`` sequences at ``context`` positions, at the very best."""
    read = _weights_read(config, form, batch) + batch * kv_bytes_read(config, context)
    operations = batch * flops_per_token(config, context)
    return batch / max(read / box.bytes_per_s, operations / box.peak_flops)


def request_bound(config: ModelConfig, form: str, box: Box, batch: int, prompt: int, output: int) -> float:
    """Output tokens a second of ``batch`` users who send ``prompt`` tokens and get ``output``, at the very best.

    Prompts are bound by operations, where a mixture pays for its active parameters only; decoding by what is read.
    """
    prefill = prompt * flops_per_token(config, prompt // 2) / box.peak_flops
    decode = output / decode_bound(config, form, box, batch, prompt + output // 2)  # of one user's share of a step
    return output / (prefill + decode)


def _weights_read(config: ModelConfig, form: str, batch: int) -> float:
    """Bytes of weights that a step of ``batch`` tokens reads."""
    alone = bytes_read_per_token(config, form)
    # One token reads top_k experts; what all experts take beyond that is read in proportion to the experts met.
    input_rows = 0 if config.tied_embeddings else _input_table(config, form)
    beyond = weight_bytes(config, form) - input_rows - alone
    # Layers may have mixtures of different sizes: each adds by its own share of the bytes beyond.
    met = unmet = 0.0
    for _, spec in config.moe_layers:
        width = spec.d_ff
        met += width * (expected_distinct_experts(spec, batch) - spec.top_k)
        unmet += width * (spec.n_experts - spec.top_k)
    return alone + beyond * met / unmet if unmet else float(alone)


def _input_table(config: ModelConfig, form: str) -> float:
    """Bytes of the input table, of which a token reads one row."""
    width = {"f32": 4.0}.get(form, 2.0)
    return config.vocab_size * config.d_model * width


def serve(config: ModelConfig, form: str, box: Box, context: int, max_batch: int = 64) -> Serving:
    """A model in ``form`` on ``box``: does it fit, and how fast can it be."""
    weights = weight_bytes(config, form)
    room = box.memory_bytes * _USABLE - weights
    tokens = int(room // kv_bytes_per_token(config))
    batch = max(0, min(max_batch, tokens // kept_positions(config, context)))
    return Serving(
        box=box,
        form=form,
        weight_bytes=weights,
        cache_tokens=tokens,
        tokens_per_s_alone=decode_bound(config, form, box, 1, context) if batch else 0.0,
        batch=batch,
        tokens_per_s_batch=decode_bound(config, form, box, batch, context) if batch else 0.0,
    )
