"""Experts that are switched off or boosted, in every family with experts: both runners do what the formula says."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from numpy.typing import NDArray

from quadriga.kernels.arrays import arrays
from quadriga.kernels.pass_batch import PassBatch
from quadriga.model.config import ModelConfig
from quadriga.model.steering import ExpertFactor, router_shift
from quadriga.nn.transformer import Transformer, random_parameters
from quadriga.runners.base import LayerRouting, PassResult, Runner
from quadriga.runners.compiled import CompiledModel, pack_parameters
from quadriga.runners.steered import joined, parts_of
from quadriga.runners.torch import TorchRunner
from tests.batches import batch
from tests.checkpoint.models import TINY
from tests.mixed import PIECES

FAMILIES = {name: config for name, config in TINY.items() if config.moe_layers} | {"pieces": PIECES}
PROMPTS = ([5, 9, 31, 4, 60, 2, 77], [11, 3, 8], [90, 1, 14, 14, 2])
TABLES = ([3], [7], [1])


def runners(config: ModelConfig) -> dict[str, Runner]:
    # Large routers, so that choices are clear and a correction moves some.
    parameters = {
        name: values * (4 if "router" in name else 1) for name, values in random_parameters(config, std=0.25).items()
    }
    packed = pack_parameters(arrays(parameters), "float32")
    return {
        "torch": TorchRunner(Transformer.from_parameters(config, parameters), 12),
        "compiled": CompiledModel(config, packed, threads=2, n_blocks=12, kv_format="float32"),
    }


def passes(runner: Runner, steering: list[list[ExpertFactor]]) -> tuple[NDArray[np.float32], list[LayerRouting]]:
    """Logits and routing of the three prompts in one pass, each with what is asked of its experts."""
    one = batch(list(zip(PROMPTS, (0, 0, 0), TABLES, strict=True)))
    tables = [router_shift(asked, runner.config) for asked in steering if asked]
    if tables:
        numbers = iter(range(len(tables)))
        rows = [next(numbers) if asked else -1 for asked in steering]
        steered = np.repeat(np.array(rows, dtype=np.int32), [len(prompt) for prompt in PROMPTS])
        one = replace(one, steering=np.stack(tables), steered=steered)
    result = runner.forward(one, routing=True)
    assert result.routing is not None
    return result.logits, result.routing


def can_be_off(config: ModelConfig, row: int) -> bool:
    """Where a router opens groups by their two best, a group of two keeps both."""
    _, spec = config.moe_layers[row]
    return spec.n_groups == 1 or spec.n_experts // spec.n_groups > 2


def rows_of(prompt: int) -> slice:
    start = sum(map(len, PROMPTS[:prompt]))
    return slice(start, start + len(PROMPTS[prompt]))


@pytest.mark.parametrize("name", FAMILIES)
def test_an_expert_that_is_off_is_never_chosen_and_others_in_the_pass_see_nothing(name: str) -> None:
    config = FAMILIES[name]
    for kind, runner in runners(config).items():
        plain, before = passes(runner, [[], [], []])
        # The first prompt's favourite of every layer.
        favourites = [int(np.bincount(layer.expert_ids[rows_of(0)].reshape(-1)).argmax()) for layer in before]
        off = [ExpertFactor(row, expert, 0) for row, expert in enumerate(favourites) if can_be_off(config, row)]
        logits, after = passes(runner, [off, [], []])
        assert off
        for row, expert in ((one.layer, one.expert) for one in off):
            assert expert in before[row].expert_ids[rows_of(0)]
            assert expert not in after[row].expert_ids[rows_of(0)], (kind, row)
            assert np.isfinite(after[row].expert_weights).all()
            np.testing.assert_allclose(after[row].probs.sum(-1), 1, atol=1e-5)
            assert after[row].probs[rows_of(0), expert].max() < 1e-30
        assert np.isfinite(logits).all() and abs(logits[rows_of(0)] - plain[rows_of(0)]).max() > 1e-3, kind
        for other in (1, 2):
            if kind == "compiled":
                np.testing.assert_array_equal(logits[rows_of(other)], plain[rows_of(other)])
            np.testing.assert_allclose(logits[rows_of(other)], plain[rows_of(other)], atol=1e-4)
            for row, layer in enumerate(after):
                np.testing.assert_array_equal(layer.expert_ids[rows_of(other)], before[row].expert_ids[rows_of(other)])
        again, _ = passes(runner, [[], [], []])
        np.testing.assert_array_equal(again, plain)  # nothing of it stays


@pytest.mark.parametrize("name", FAMILIES)
def test_both_runners_steer_alike_and_by_the_logarithm(name: str) -> None:
    config = FAMILIES[name]
    last = len(config.moe_layers) - 1
    asked = [ExpertFactor(0, 1, 64.0), ExpertFactor(last, 0, 0.02)] if last else [ExpertFactor(0, 1, 64.0)]
    third = [ExpertFactor(0, 2, 0.0 if can_be_off(config, 0) else 0.01)]
    found = {kind: passes(runner, [asked, [], third]) for kind, runner in runners(config).items()}
    np.testing.assert_allclose(found["compiled"][0], found["torch"][0], rtol=2e-3, atol=3e-3)
    for compiled, torchs in zip(found["compiled"][1], found["torch"][1], strict=True):
        np.testing.assert_array_equal(compiled.expert_ids, torchs.expert_ids)
    plain = passes(runners(config)["compiled"], [[], [], []])[1][0]
    moved = found["compiled"][1][0].logits - plain.logits  # the first layer with experts reads the same states
    if config.layers[0].ffn is config.moe_layers[0][1] or config.moe_layers[0][0] <= 1:
        assert moved[rows_of(0), 1] == pytest.approx(np.full(len(PROMPTS[0]), np.log(64.0)), abs=1e-4)
        by = np.log(third[0].factor) if third[0].factor else -np.inf
        np.testing.assert_allclose(moved[rows_of(2), 2], np.full(len(PROMPTS[2]), by), atol=1e-4)
        untouched = np.delete(moved[rows_of(0)], 1, axis=1)
        assert abs(untouched).max() < 1e-5 and abs(moved[rows_of(1)]).max() == 0


def test_a_boost_makes_an_expert_chosen() -> None:
    for runner in runners(TINY["dbrx"]).values():
        _, before = passes(runner, [[], [], []])
        seldom = int(np.bincount(before[1].expert_ids.reshape(-1), minlength=5).argmin())
        assert not (before[1].expert_ids == seldom).any(axis=1).all()
        _, after = passes(runner, [[ExpertFactor(1, seldom, 1000.0)]] * 3)
        assert (after[1].expert_ids == seldom).any(axis=1).sum() > (before[1].expert_ids == seldom).any(axis=1).sum()


def test_a_pass_is_parted_by_what_is_asked_and_put_together_again() -> None:
    one = batch([([1, 2, 3], 0, [4]), ([5], 20, [6, 7]), ([8, 9], 0, [2]), ([10], 3, [1])])
    rows = np.array([2, 3, 4, 6], dtype=np.int32)
    steered = np.array([0, 0, 0, -1, 0, 0, 1], dtype=np.int32)
    one = replace(one, rows=rows, steering=np.zeros((2, 3, 5), np.float32), steered=steered)
    parts = {part.row: part for part in parts_of(one)}
    assert sorted(parts) == [-1, 0, 1]
    both = parts[0]
    assert both.batch.tokens.tolist() == [1, 2, 3, 8, 9] and both.batch.positions.tolist() == [0, 1, 2, 0, 1]
    assert both.batch.starts.tolist() == [0, 3, 5] and both.batch.tables.tolist() == [4, 2]
    assert both.batch.table_starts.tolist() == [0, 1, 2] and both.batch.rows.tolist() == [2, 3]
    assert both.tokens.tolist() == [0, 1, 2, 4, 5] and both.rows.tolist() == [0, 2]
    assert both.batch.after is not None and both.batch.after.tolist() == [4, 2] and both.batch.steering is None
    assert parts[-1].batch.tables.tolist() == [6, 7] and parts[1].batch.rows.tolist() == [0]
    made = [
        (part, PassResult(part.rows[:, None].astype(np.float32), part.tokens[:, None].astype(np.float32)))
        for part in parts.values()
    ]
    whole = joined(made, 7, 4)
    assert whole.logits.ravel().tolist() == [0, 1, 2, 3] and whole.routing is None
    assert whole.hidden is not None and whole.hidden.ravel().tolist() == [0, 1, 2, 3, 4, 5, 6]
    with pytest.raises(AssertionError, match="all tokens of a sequence"):
        parts_of(replace(one, steered=np.array([0, 0, -1, -1, 0, 0, 1], dtype=np.int32)))


def test_batches_say_both_or_neither() -> None:
    runner = runners(TINY["mixtral"])["compiled"]
    one: PassBatch = batch([(PROMPTS[0], 0, TABLES[0])])
    with pytest.raises(AssertionError, match="go together"):
        runner.forward(replace(one, steering=np.zeros((1, 3, 5), dtype=np.float32)))
