"""The spike guard and the balancer, step by step on constructed numbers."""

from __future__ import annotations

import math

import pytest
import torch

from quadriga.errors import ConfigError, TrainingError
from quadriga.model.config import DenseSpec
from quadriga.train.balance import BiasBalancer
from quadriga.train.config import GuardSection, RouterSection, ScheduleSection
from quadriga.train.guard import SpikeGuard
from quadriga.train.schedule import bias_share, learning_rate_share
from quadriga.train.world import World
from tests.configs import changed
from tests.train import runs


def taught(n: int = 32, **section: object) -> SpikeGuard:
    """A guard that has seen losses of 2 +- 0.1 and norms of e^(+-0.2)."""
    guard = SpikeGuard(GuardSection(**section))  # type: ignore[arg-type]
    for step in range(n):
        sign = 1 if step % 2 else -1
        assert guard.judge(step, 2.0 + 0.1 * sign, math.exp(0.2 * sign)) is None
    return guard


def test_a_spike_is_six_deviations_above_the_mean() -> None:
    assert taught(sigmas=6.0).judge(40, 2.0 + 0.59, 1.0) is None
    assert "loss 2.610" in str(taught(sigmas=6.0).judge(40, 2.0 + 0.61, 1.0))
    assert taught(sigmas=6.0).judge(40, 0.1, 1.0) is None, "far below is no harm"
    assert taught(sigmas=6.0).judge(40, 2.0, math.exp(1.19)) is None
    assert "gradient norm" in str(taught(sigmas=6.0).judge(40, 2.0, math.exp(1.21)))
    assert taught(sigmas=0.0).judge(40, 1e9, 1e9) is None, "0 judges only what is not finite"


@pytest.mark.parametrize(("loss", "norm"), [(math.nan, 1.0), (math.inf, 1.0), (2.0, math.nan), (2.0, math.inf)])
def test_values_that_are_not_finite_are_bad_from_the_first_step(loss: float, norm: float) -> None:
    assert SpikeGuard(GuardSection()).judge(0, loss, norm) is not None


def test_few_steps_judge_nothing_and_bad_steps_are_not_remembered() -> None:
    early = taught(15, sigmas=6.0)
    assert early.judge(15, 99.0, 1.0) is None
    guard = taught(16, sigmas=6.0)
    assert guard.judge(16, 99.0, 1.0) is not None
    assert guard.state()["losses"] == taught(16, sigmas=6.0).state()["losses"], "the spike is not remembered as a loss"
    assert guard.judge(17, 99.0, 1.0) is not None


def test_the_deviation_has_a_lower_bound() -> None:
    """1 % of the loss, 0.1 in log(norm): ordinary noise late in a run, when deviations are tiny, is not a spike."""
    guard = SpikeGuard(GuardSection(sigmas=6.0))
    for step in range(32):
        assert guard.judge(step, 2.0, 1.0) is None
    state = guard.state()
    assert guard.judge(32, 2.0 + 6 * 0.02 - 0.001, 1.0) is None
    guard.load(state)
    assert guard.judge(32, 2.0 + 6 * 0.02 + 0.001, 1.0) is not None
    guard.load(state)
    assert guard.judge(33, 2.0, math.exp(0.59)) is None
    guard.load(state)
    assert guard.judge(33, 2.0, math.exp(0.61)) is not None


def test_too_many_bad_steps_within_a_window_end_the_run_and_old_ones_are_forgotten() -> None:
    guard = SpikeGuard(GuardSection(limit=3, window=10))
    for step in (0, 9, 19, 29):
        assert guard.judge(step, math.nan, 1.0) is not None
    assert guard.judge(37, math.nan, 1.0) is not None
    with pytest.raises(TrainingError, match="3 bad steps within 10"):
        guard.judge(38, math.nan, 1.0)


def test_a_loaded_guard_judges_as_the_saved_one() -> None:
    guard, again = taught(sigmas=6.0), SpikeGuard(GuardSection(sigmas=6.0))
    guard.judge(32, math.nan, 1.0)
    again.load(guard.state())
    assert again.state() == guard.state()
    assert again.judge(40, 2.61, 1.0) is not None and again.judge(41, 2.59, 1.0) is None


def test_a_run_that_ends_in_steps_that_are_not_finite_has_no_result() -> None:
    """One bad step may be the batch's, if steps were good before; two with no good one behind them are the weights'."""
    young = SpikeGuard(GuardSection())
    assert young.judge(0, 2.0, 1.0) is None and young.ruined() is None
    young.judge(1, math.nan, 1.0)
    assert "ends with 1 steps whose loss or gradient was not finite" in str(young.ruined())
    assert young.judge(2, 2.0, 1.0) is None and young.ruined() is None, "the weights were good"
    guard = taught(sigmas=6.0)
    for step in (32, 33):
        assert guard.ruined() is None
        assert guard.judge(step, 2.0, math.inf) is not None
    again = SpikeGuard(GuardSection(sigmas=6.0))
    again.load(guard.state())
    assert again.ruined() == guard.ruined() is not None
    assert again.judge(34, 9.0, 1.0) is not None and again.ruined() is not None, "a spike is no good step"


# Balancing -----------------------------------------------------------------------------------------------------------


def test_the_bias_moves_against_the_load_and_sums_to_zero() -> None:
    balancer = BiasBalancer(runs.model(), RouterSection(bias_rate=0.01), World())
    counts = torch.tensor([[8.0, 0, 4, 4, 4, 4, 4, 4], [9.0, 3, 4, 4, 4, 4, 4, 0]])
    balancer.update(counts)
    first = torch.tensor([-1.0, 1, 0, 0, 0, 0, 0, 0]) * 0.01
    second = torch.tensor([-1.0, 1, 0, 0, 0, 0, 0, 1]) * 0.01
    torch.testing.assert_close(balancer.bias, torch.stack([first, second - second.mean()]))
    balancer.update(counts)
    torch.testing.assert_close(balancer.bias[0], 2 * first)


def test_the_applied_bias_fades_to_zero_at_the_end() -> None:
    model = runs.model()
    balancer = BiasBalancer(model, RouterSection(bias_rate=0.01, bias_fade=0.5), World())
    balancer.bias += 1.0
    shares = []
    for step in range(8):
        balancer.apply(step, 8)
        bias = model.layers[1].moe.router.balancing
        shares.append(0.0 if bias is None else float(bias[0]))
    assert shares == [1.0, 1.0, 1.0, 1.0, 0.75, 0.5, 0.25, 0.0]
    assert float(balancer.bias[0, 0]) == 1.0, "what is learned does not fade"
    assert [bias_share(step, 8, 0.0) for step in (0, 7)] == [1.0, 1.0]
    dense = runs.model(changed(runs.TINY, ffn=DenseSpec(d_ff=40, activation="silu")))
    with pytest.raises(ConfigError, match="needs a model with experts"):
        BiasBalancer(dense, RouterSection(bias_rate=0.01), World())


def test_the_rate_of_every_kind_of_schedule_by_hand() -> None:
    def shares(**section: object) -> list[float]:
        chosen = ScheduleSection(warmup_steps=2, **section)  # type: ignore[arg-type]
        return [learning_rate_share(step, 7, chosen) for step in range(8)]

    cosine = [0.2 + 0.8 * 0.5 * (1 + math.cos(math.pi * i / 4)) for i in range(5)]
    assert shares(kind="cosine", final_share=0.2) == pytest.approx([0.5, 1.0, *cosine, 0.2])
    assert shares(kind="constant") == [0.5, *[1.0] * 7]
    assert shares(kind="wsd", decay_share=0.43, final_share=0.2) == pytest.approx(
        [0.5, 1, 1, 1, 0.2 + 0.8 * 2 / 3, 0.2 + 0.8 / 3, 0.2, 0.2]
    )
