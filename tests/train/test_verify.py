"""Each layout that the planner prints is one that the trainer accepts, holds and gathers as planned: pretended ranks."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from math import prod
from typing import Any

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from quadriga.cli import app
from quadriga.errors import ConfigError, HardwareError
from quadriga.kernels.dispatch import use
from quadriga.model.config import AttentionSpec, DenseSpec, ModelConfig, MoESpec, NormSpec, RopeSpec, uniform_model
from quadriga.model.families import PRESETS
from quadriga.model.parallel_spec import MOST_PADDING, ParallelSpec, cut
from quadriga.model.plan.hardware import GPUS
from quadriga.model.plan.training import meshes, search
from quadriga.train import parallel
from quadriga.train.config import ParallelSection, RouterSection
from quadriga.train.initialise import NewWeights, normal
from quadriga.train.losses import NextToken
from quadriga.train.verify import measure
from quadriga.train.world import World
from tests.train import runs

QWEN3_235B = uniform_model(
    family="qwen3moe",
    vocab_size=151_936,
    d_model=4096,
    n_layers=94,
    max_seq_len=32_768,
    norm=NormSpec(kind="rms"),
    mixer=AttentionSpec(n_heads=64, n_kv_heads=4, head_dim=128, position=RopeSpec(theta=1e6)),
    ffn=MoESpec(d_ff=1536, n_experts=128, top_k=8, activation="silu"),
)
"""The shape of Qwen3-235B-A22B."""


def walked(config: ModelConfig, specs: Sequence[ParallelSpec]) -> None:
    """Each layout through the trainer; what is counted there is what the plan says."""
    for spec in specs:
        found = measure(config, spec)
        assert found.state_bytes == 16 * spec.elements(config), spec
        assert found.padding <= MOST_PADDING and found.padding == pytest.approx(spec.padding(config)), spec


@pytest.mark.parametrize("ranks", [8, 512, 3072])
@pytest.mark.parametrize("model", ["dbrx-132b", "dbrx-9b", "qwen3-235b"])
def test_the_rows_that_plan_prints_are_rows_that_train(model: str, ranks: int) -> None:
    config = QWEN3_235B if model == "qwen3-235b" else PRESETS[model]
    try:
        plans = search(config, ranks, GPUS["H100"], 4096, 4096 * ranks)
    except HardwareError:
        assert ranks == 8, "eight H100 are too few for the large ones"
        return
    rows = list(dict.fromkeys(plan.mesh for plan in plans))[:4]  # the command prints five rows, often of fewer meshes
    walked(config, rows)
    for plan in plans[:5]:
        assert plan.memory.state == 16 * plan.mesh.elements(config) < GPUS["H100"].memory_bytes


def test_a_table_that_is_the_head_too_is_counted_in_the_first_and_the_last_stage() -> None:
    tied = replace(PRESETS["dbrx-9b"], tied_embeddings=True)
    specs = [ParallelSpec.of(32, pipeline=2), ParallelSpec.of(32, pipeline=4, tensor=2)]
    walked(tied, specs)
    alone = replace(tied, layers=tied.layers[:2])
    table = alone.vocab_size * alone.d_model
    both = 2 * ParallelSpec(pp=2).elements(alone) - ParallelSpec().elements(alone)
    assert both == table + alone.d_model, "two stages of equal layers; the last one has the final norm too"


def test_sixteen_experts_on_3072_ranks_are_cut_elsewhere() -> None:
    """One dimension of 16 for 3,072 ranks would gather 192 times the weights and leave most ranks without any."""
    config, spec = PRESETS["dbrx-132b"], ParallelSpec(1, 3072, 1)
    gate = spec.cut("layers.0.moe.w_gate", (16, 10752, 6144))
    assert gate is not None and (gate.dim, gate.part) == (2, 16 * 10752 * 2)
    walked(config, [spec])
    assert 16 * spec.elements(config) < 1.02 * 16 * 131_596_523_520 / 3072
    assert spec in set(meshes(config, 3072, GPUS["H100"]))
    assert ParallelSpec(1, 3072, 1) not in set(meshes(QWEN3_235B, 3072, GPUS["H100"])), (
        "nothing there is a multiple of 3,072"
    )


def test_a_tensor_is_cut_along_its_first_dimension_unless_that_pads() -> None:
    assert [cut(shape, 8).dim for shape in ((16, 3), (17, 3), (100, 8))] == [0, 0, 0]  # type: ignore[union-attr]
    assert cut((9, 8), 8).dim == 1 and cut((9, 7), 8).padded == 16 * 7  # type: ignore[union-attr]
    assert cut((4, 9, 8), 8, after=1).dim == 2 and cut((4, 9, 7), 8, after=1) is None  # type: ignore[union-attr]


def test_the_trainer_refuses_what_it_cannot_do() -> None:
    for spec, config, message in (
        (ParallelSpec(1, 1, 16), runs.TINY, "must divide the model's 8 experts"),
        (ParallelSpec(1, 7, 8), runs.TINY, "7 shards must divide a dimension"),
        (ParallelSpec(1, 1, 2), replace(runs.TINY).with_ffn(expert_bias=True), "without biases only"),
    ):
        assert message in str(spec.problem(config))
        with pytest.raises(ConfigError, match=message):
            measure(config, spec)


@pytest.mark.parametrize(
    "layout",
    [(1, 6, 16, 8, 4), (3, 64, 1, 2, 1), (2, 1, 8, 1, 8), (1, 8, 1, 8, 1), (2, 2, 8, 2, 1, 4), (1, 1, 1, 1, 1, 8)],
)
@pytest.mark.parametrize("model", ["dbrx-132b", "qwen3-235b", "dense"])
def test_ranks_that_share_rows_hold_and_gather_as_planned(model: str, layout: tuple[int, ...]) -> None:
    config = {"dbrx-132b": PRESETS["dbrx-132b"], "qwen3-235b": QWEN3_235B}.get(model, PRESETS["llama2-70b"])
    spec = ParallelSpec(*layout)
    if spec.tp > 4 and model == "qwen3-235b":
        with pytest.raises(ConfigError, match="must divide the model's 4 key/value heads: got 8"):
            measure(config, spec)
    elif spec.ep == 1 or config.is_moe:
        walked(config, [spec])


def test_long_rows_on_few_ranks_are_shared() -> None:
    """A row of 32,768 tokens for each of 64 ranks does not fit; where ranks share rows, it does."""
    config, ranks = PRESETS["dbrx-132b"], 64
    plans = search(config, ranks, GPUS["H100"], 32_768, 32_768 * 16)
    assert all(plan.mesh.sharing * plan.mesh.pp >= 4 for plan in plans), "16 rows are fewer than 64 ranks"
    assert {plan.mesh.cp > 1 for plan in plans} == {True, False} and any(plan.mesh.tp > 1 for plan in plans)
    assert all(plan.batch_tokens <= 32_768 * 16 and plan.work.micro_tokens % 1024 == 0 for plan in plans)
    walked(config, list(dict.fromkeys(plan.mesh for plan in plans))[:4])


@pytest.mark.parametrize("layout", [(3, 2, 4), (2, 4, 1), (1, 2, 8)])
def test_shared_networks_are_cut_like_the_rest(layout: tuple[int, int, int]) -> None:
    config = runs.TINY.with_ffn(shared=DenseSpec(d_ff=12, activation="silu"))
    spec = ParallelSpec(*layout)
    assert measure(config, spec).state_bytes == 16 * spec.elements(config)


def test_selective_recomputation_changes_no_gradient_and_is_refused_where_kernels_write_in_place() -> None:
    gradients = []
    for how in ("none", "selective", "full"):
        model = runs.model()
        for layer in model.layers:
            parallel._recompute(layer, how)
        with use("reference"):
            loss, _ = NextToken(runs.TINY, RouterSection(), World())(model, runs.source().rows(0, 0, 4))
            loss.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    for other in gradients[1:]:
        torch.testing.assert_close(other, gradients[0], rtol=0, atol=0)
    section = ParallelSection(device="cpu", recompute="selective")
    with pytest.raises(ConfigError, match="is for GPUs"):
        parallel.prepare(runs.model(), NextToken(runs.TINY, RouterSection(), World()), section, World())


def _plan(*words: str) -> Any:
    return CliRunner().invoke(app, ["plan", *words], env={"COLUMNS": "120", "TERM": "dumb"})


def test_plan_verify_prints_what_it_counted_and_fails_where_the_trainer_would(monkeypatch: pytest.MonkeyPatch) -> None:
    words = ("dbrx-9b", "--gpus", "64xH100", "--tokens", "100B", "--top", "1", "--verify")
    shown = _plan(*words)
    assert shown.exit_code == 0 and "accepted" in shown.output and "[parallel] replicate = " in shown.output
    facts = json.loads(_plan(*words, "--json").output)["training"]["plans"][0]
    assert facts["verified"]["state_bytes"] == facts["memory_parts_bytes"]["state"]
    monkeypatch.setattr(ParallelSpec, "elements", lambda *_: 10**9)
    assert _plan(*words).exit_code == 1


# Initial weights -----------------------------------------------------------------------------------------------------


def test_any_box_of_new_weights_is_that_part_of_the_whole() -> None:
    weights = NewWeights(runs.TINY, seed=3, std=0.1)
    whole = weights.parameters()
    for name, box in (
        ("layers.1.moe.w_down", ((2, 5), (3, 24), (7, 8))),
        ("embed.weight", ((90, 97), (0, 24))),
        ("final_norm.weight", ((1, 3),)),
    ):
        assert torch.equal(weights.read(name, box), whole[name][tuple(slice(*span) for span in box)])
    assert not torch.equal(whole["layers.0.moe.w_gate"], whole["layers.0.moe.w_up"])
    assert not torch.equal(
        whole["layers.0.moe.w_gate"], NewWeights(runs.TINY, seed=4, std=0.1).parameters()["layers.0.moe.w_gate"]
    )


def test_new_weights_are_normal_numbers() -> None:
    """Moments, tails and neighbours of 2^18 numbers, within five standard errors; and the formula, number by number."""
    shape = (64, 64, 64)
    x = normal(12345, shape, tuple((0, n) for n in shape), 2.0).astype(np.float64).ravel() / 2
    n = prod(shape)
    for power, mean, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):
        assert abs((x**power).mean() - mean) < 5 * (variance / n) ** 0.5, power
    for lag in (1, 64, 4096):
        assert abs((x[lag:] * x[:-lag]).mean()) < 5 / n**0.5, lag
    assert abs((np.abs(x) > 2).mean() - 0.0455) < 5 * (0.0455 * 0.9545 / n) ** 0.5
    index, mask = 54321, (1 << 64) - 1
    z = (12345 + (index + 1) * 0x9E3779B97F4A7C15) & mask
    z = ((z ^ z >> 30) * 0xBF58476D1CE4E5B9) & mask
    z = ((z ^ z >> 27) * 0x94D049BB133111EB) & mask
    z ^= z >> 31
    expected = np.sqrt(-2 * np.log(((z >> 32) + 0.5) / 2**32)) * np.cos(2 * np.pi * (z & 0xFFFFFFFF) / 2**32)
    assert x[index] == pytest.approx(expected, rel=1e-6)
