"""Whole models on the runner for GPUs, of random weights in several formats: steps of many sequences, and a prompt.

What a step reads and multiplies is what ``gpu_predict`` counts, so a row's share of the bandwidth is beside the bound
that docs/gpu.md predicts. Logits stay on the device, as they do in the engine.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch
from bench.gpu_predict import step_ops
from bench.gpu_rows import Day, Row, random_weight
from tests.golden.checkpoints import config_json

from quadriga.kernels.pass_batch import PassBatch
from quadriga.kernels.triton.linear import Matrix
from quadriga.model.cache_layout import cache_layout
from quadriga.model.config import ModelConfig
from quadriga.model.cost import kv_bytes
from quadriga.model.families import PRESETS, config_from_hf
from quadriga.model.weight_map import parameter_shapes, stays_float32
from quadriga.quant.packed import BLOCK_TOKENS
from quadriga.runners.cuda.runner import CudaRunner
from quadriga.runners.cuda.weights import DeviceWeights

CONTEXT = 2048
"""Positions that every sequence has in its cache."""
BATCHES = (1, 8, 64, 256)
SPARE = 0.9
"""Share of the free memory that weights and caches may take."""


@dataclass(frozen=True)
class Asked:
    """A model in a format of weights; its tables are of eight bits beside four."""

    name: str
    form: str


ASKED = tuple(
    Asked(name, form) for name in ("dbrx-9b", "qwen3-30b-a3b", "dbrx-132b") for form in ("plain", "q4", "q4k", "mxfp4")
)
TOY = (Asked("dbrx", "q4"),)


def models(day: Day) -> Iterator[Row]:
    """Steps and a prompt of every model that fits."""
    for asked in TOY if day.dry else ASKED:
        if not day.left():
            yield Row(section="model", what=asked.name, form=asked.form, note="no time left")
            continue
        config = _toy(asked.name) if day.dry else PRESETS[asked.name]
        context = 18 if day.dry else CONTEXT
        weights = random_model(day, config, asked.form, meta=True)
        free = 2**40 if day.dry else torch.cuda.mem_get_info()[0]
        batches = [n for n in ((1, 3) if day.dry else BATCHES) if needed(config, weights, n, context) < SPARE * free]
        if not batches:
            yield Row(section="model", what=asked.name, form=asked.form, note="does not fit")
            continue
        yield from _measured(day, config, asked, context, batches)
        if not day.dry:
            torch.cuda.empty_cache()


def _toy(name: str) -> ModelConfig:
    """A golden model's first layer."""
    whole = config_from_hf(config_json(name))
    return replace(whole, layers=whole.layers[:1])


def needed(config: ModelConfig, weights: DeviceWeights, n: int, context: int) -> float:
    """Bytes of the weights and of n sequences' caches."""
    return weights.sizes().total() + n * kv_bytes(config, context + BLOCK_TOKENS)


def random_model(day: Day, config: ModelConfig, form: str, *, meta: bool = False) -> DeviceWeights:
    """Weights that leave numbers of ordinary size; with ``meta`` only their sizes."""
    device = "meta" if meta else day.device
    made: dict[str, Matrix] = {}
    for name, shape in parameter_shapes(config).items():
        own = "q8" if name in ("embed.weight", "lm_head.weight") and form != "plain" else form
        if len(shape) == 1:
            made[name] = torch.ones(shape, dtype=day.dtype, device=device)
        elif stays_float32(name) or own == "plain":
            made[name] = torch.empty(shape, dtype=day.dtype, device=device)
            if not meta:
                made[name].uniform_(-0.05, 0.05)
        else:
            n_experts = shape[0] if len(shape) == 3 else 1
            made[name] = random_weight(day, own, n_experts, *shape[-2:], meta=meta)
    return DeviceWeights(made, day.dtype)


def step_of(n: int, context: int, tokens: int = 1) -> PassBatch:
    """A pass of the last ``tokens`` tokens of n sequences of ``context`` positions, each with blocks of its own."""
    blocks = -(-context // BLOCK_TOKENS)
    of_tokens = np.arange(n * tokens, dtype=np.int32)
    slots = np.arange(n, dtype=np.int32)
    return PassBatch(
        tokens=of_tokens % 89,
        positions=np.tile(np.arange(context - tokens, context, dtype=np.int32), n),
        starts=np.arange(n + 1, dtype=np.int32) * tokens,
        tables=np.arange(n * blocks, dtype=np.int32),
        table_starts=np.arange(n + 1, dtype=np.int32) * blocks,
        rows=(slots + 1) * tokens - 1,
        before=slots,
        after=slots,
    )


def _measured(day: Day, config: ModelConfig, asked: Asked, context: int, batches: list[int]) -> Iterator[Row]:
    layout = cache_layout(config)
    assert layout.n_groups == 1, "models whose layers share one list of blocks"
    n_blocks = max(batches) * -(-context // BLOCK_TOKENS)
    runner = CudaRunner(config, random_model(day, config, asked.form), n_blocks, layout, n_slots=max(batches))
    for n in batches:
        one = step_of(n, context)
        took = day.milliseconds(lambda one=one: runner.forward(one))
        counted = step_ops(config, n, context, asked.form)
        known = day.speed(took, sum(op.n_bytes for op in counted), sum(op.flops for op in counted))
        said = "" if day.dry else f"{n / took * 1e3:.0f} tokens/s"
        yield Row(section="model", what=f"{asked.name}, a step", form=asked.form, tokens=n, note=said, **known)
    prompt = step_of(1, context, context)
    took = day.milliseconds(lambda: runner.forward(prompt))
    said = "" if day.dry else f"{context / took * 1e3:.0f} tokens/s"
    known = {"value": "" if day.dry else round(took, 3), "unit": "ms"}
    yield Row(section="model", what=f"{asked.name}, a prompt", form=asked.form, tokens=context, note=said, **known)
