"""Layers of different kinds in one model: shapes, costs, torch and the CPU's kernels, alone and in the engine."""

from __future__ import annotations

from math import prod

import numpy as np
import pytest
import torch

from quadriga.engine.engine import Engine
from quadriga.engine.request import Request, SamplingParams
from quadriga.errors import ConfigError
from quadriga.kernels.arrays import arrays
from quadriga.model import cost, families
from quadriga.model.plan.training import sizes
from quadriga.model.weight_map import parameter_shapes
from quadriga.nn.context import PackedContext
from quadriga.nn.transformer import Transformer, random_parameters
from quadriga.runners.compiled import CompiledModel, pack_parameters
from quadriga.runners.torch import TorchRunner
from tests.batches import batch, passed
from tests.mixed import MIXED

PARAMETERS = random_parameters(MIXED, std=0.2)
IDS = torch.randint(0, 97, (71,), generator=torch.Generator().manual_seed(4))


def test_shapes_follow_each_layer() -> None:
    shapes = parameter_shapes(MIXED)
    assert shapes["layers.0.ffn.w_gate"] == (112, 48) and "layers.0.moe.router.weight" not in shapes
    assert shapes["layers.2.attn.wqkv.weight"] == ((4 + 2) * 16, 48)
    assert shapes["layers.3.moe.w_down"] == (7, 48, 72) and shapes["layers.3.ffn_post_norm.weight"] == (48,)
    assert "layers.4.ffn.w_gate" not in shapes and shapes["layers.4.attn.wo.weight"] == (48, 60)


def test_costs_add_up_over_the_layers() -> None:
    shapes = parameter_shapes(MIXED)
    total = sum(prod(shape) for shape in shapes.values())
    idle = 2 * (5 - 3) * 3 * 80 * 48 + (7 - 2) * 3 * 72 * 48
    count = cost.n_params(MIXED)
    assert (count.total, count.active) == (total, total - idle)
    assert cost.kv_bytes_per_token(MIXED, "float32") == 4 * 2 * (2 * 8 + 2 * 16 + 3 * 8 + 6 * 10)
    assert cost.attention_flops(MIXED, 10) == 40 * (6 * 8 + 2 * 4 * 16 + 6 * 8 + 6 * 10)
    assert sizes(MIXED).expert == 2 * 5 * 3 * 80 * 48 + 7 * 3 * 72 * 48


def test_the_kernels_compute_what_torch_computes() -> None:
    model = Transformer.from_parameters(MIXED, PARAMETERS).eval()
    with torch.inference_mode():
        expected, stats = model(IDS, PackedContext([len(IDS)]), with_stats=True)
    compiled = CompiledModel(
        MIXED, pack_parameters(arrays(PARAMETERS), "float32"), threads=1, n_blocks=8, kv_format="float32"
    )
    logits, routed = passed(compiled, batch([(IDS.tolist(), 0, list(range(5)))]))
    scale = float(expected.abs().max())
    assert float((logits - expected).abs().max()) < 2e-5 * scale
    assert len(routed) == len(stats) == 3
    for mine, theirs in zip(routed, stats, strict=True):
        assert np.array_equal(np.asarray(mine.expert_ids), theirs.expert_ids.numpy())


def test_the_engine_runs_it_on_both_runners_with_one_answer() -> None:
    compiled = CompiledModel(
        MIXED, pack_parameters(arrays(PARAMETERS), "float32"), threads=1, n_blocks=24, kv_format="float32"
    )
    torch_runner = TorchRunner(Transformer.from_parameters(MIXED, PARAMETERS), 24)
    answers = []
    for runner in (compiled, torch_runner):
        engine = Engine(runner, max_batch_tokens=24, max_sequences=4)  # prompts go in chunks
        numbers = [
            engine.submit(Request(prompt=tuple(IDS[:n].tolist()), params=SamplingParams(max_new_tokens=12)))
            for n in (41, 7, 30)
        ]
        made: dict[int, list[int]] = {number: [] for number in numbers}
        while engine.has_work:
            for number, event in engine.step():
                made[number].append(event.token_id)  # type: ignore[union-attr]
        answers.append(list(made.values()))
    assert answers[0] == answers[1]
    assert [len(tokens) for tokens in answers[0]] == [12, 12, 12]


def test_a_format_of_equal_layers_says_that_it_cannot_hold_it() -> None:
    with pytest.raises(ConfigError, match="whose layers are all alike; this one has 4 kinds"):
        families.FAMILIES["dbrx"].config_to_hf(MIXED)
    with pytest.raises(ConfigError, match="this model has 2"):
        MIXED.only_moe("a test")
