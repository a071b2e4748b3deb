"""The training loop: it learns, depends only on the step, resumes bit for bit, and handles bad steps."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import msgspec
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from quadriga.errors import CheckpointError, ConfigError, TrainingError
from quadriga.model.config import DenseSpec, ModelConfig
from quadriga.nn.transformer import Transformer
from quadriga.train import config as sections
from quadriga.train.batch import TrainingBatch
from quadriga.train.losses import NextToken
from quadriga.train.run_directory import RunDirectory
from quadriga.train.trainer import Trainer
from quadriga.train.world import World
from tests.configs import changed
from tests.train import runs
from tests.train.runs import Record, Settings, bits, trainer

PLANS = {
    "adamw": Settings(),
    "lion": Settings(optimiser=sections.OptimiserSection(name="lion", learning_rate=3e-3)),
    "muon": Settings(optimiser=sections.OptimiserSection(name="muon", learning_rate=1e-2)),
    "bfloat16": Settings(parallel=sections.ParallelSection(dtype="bfloat16", device="cpu")),
    "micro-steps": Settings(parallel=sections.ParallelSection(micro_rows=2, device="cpu")),
    "recompute": Settings(parallel=sections.ParallelSection(recompute=True, device="cpu")),
    "everything": Settings(
        ema=sections.EmaSection(decay=0.9),
        router=sections.RouterSection(bias_rate=0.01, z_loss=1e-3),
        schedule=sections.ScheduleSection(kind="wsd", warmup_steps=2),
        checkpoint=sections.CheckpointSection(every=3, keep=2, asynchronous=False),
    ),
}


@pytest.mark.parametrize("name", PLANS)
def test_a_resumed_run_ends_with_the_same_bits(tmp_path: Path, name: str) -> None:
    """With jitter, so that random numbers matter; the run is stopped between checkpoints and after each of two."""
    config = runs.TINY.with_ffn(jitter_eps=0.1)
    settings = PLANS[name]
    whole = trainer(tmp_path / "whole", settings, config=config)
    assert whole.train()
    for pieces in ([4], [1, 6], [3, 3]):
        folder = tmp_path / str(pieces)
        for n in [*pieces, 99]:
            left = n

            def stop() -> bool:
                nonlocal left
                left -= 1
                return left <= 0

            part = trainer(folder, settings, config=config)
            part.resume()
            part.train(stop)
        assert part.step == settings.n_steps
        assert bits(part) == bits(whole)


@pytest.mark.parametrize("name", PLANS)
def test_it_learns(tmp_path: Path, name: str) -> None:
    record = Record()
    settings = msgspec.structs.replace(PLANS[name], n_steps=40)
    trainer(tmp_path, settings, record=record).train()
    assert record.losses[0] == pytest.approx(math.log(runs.VOCAB), rel=0.1)
    assert sum(record.losses[-4:]) / 4 < 0.75 * record.losses[0]


def test_micro_steps_and_recomputing_change_nothing_but_rounding(tmp_path: Path) -> None:
    """The balance loss is computed per micro-step, so it is off here."""
    losses = []
    for i, parallel in enumerate([{}, {"micro_rows": 2}, {"recompute": True}]):
        record = Record()
        settings = Settings(
            router=sections.RouterSection(balance_loss=0.0),
            parallel=sections.ParallelSection(device="cpu", **parallel),
        )
        trainer(tmp_path / str(i), settings, record=record).train()
        losses.append(record.losses)
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    assert losses[2] == pytest.approx(losses[0], rel=1e-6)


def test_the_gradient_is_that_of_the_mean_loss(tmp_path: Path) -> None:
    """One step of Lion moves every weight by the learning rate, against the sign of the reference gradient."""
    run = trainer(tmp_path)
    batch = run.batches(0)[0]
    reference = runs.model()
    loss, _ = NextToken(runs.TINY, Settings().router, World())(reference, batch)
    (loss / batch.target_weight()).backward()
    expected = dict(reference.named_parameters())
    run._backward([batch], batch.target_weight())
    square = sum(float(p.grad.double().square().sum()) for p in expected.values() if p.grad is not None)
    assert float(run._gradient_square()) == pytest.approx(square, rel=1e-5)
    for name, p in run.masters.by_name.items():
        torch.testing.assert_close(p.grad, expected[name].grad)


def test_clipping_bounds_the_step(tmp_path: Path) -> None:
    """AdamW's first moment after one step is (1 - b1) times the clipped gradient."""
    settings = Settings(optimiser=sections.OptimiserSection(clip_norm=0.01, learning_rate=1e-3), n_steps=1)
    record = Record()
    run = trainer(tmp_path, settings, record=record)
    run.train()
    moments = [value for name, value in run.optimiser.state().items() if name.endswith("/exp_avg")]
    norm = math.sqrt(sum(float(m.double().square().sum()) for m in moments)) / (1 - 0.9)
    assert record.steps[0].norm > 0.01
    assert norm == pytest.approx(0.01, rel=1e-4)


@pytest.mark.parametrize("decay", [0.9, 0.3])
def test_ema_is_the_running_mean(tmp_path: Path, decay: float) -> None:
    """mean <- decay * mean + (1 - decay) * weight after every step; with 0.5 a swap of the factors would not show."""
    run = trainer(tmp_path, Settings(ema=sections.EmaSection(decay=decay), n_steps=3))
    means = {name: p.detach().clone() for name, p in run.masters.by_name.items()}
    for _ in range(3):
        run.run_step()
        means = {name: decay * mean + (1 - decay) * run.masters.by_name[name].detach() for name, mean in means.items()}
    assert run.averages.keys() == means.keys()
    for name, mean in means.items():
        torch.testing.assert_close(run.averages[name], mean, rtol=1e-6, atol=1e-8)


def test_a_skipped_step_does_not_move_the_ema(tmp_path: Path) -> None:
    settings = Settings(ema=sections.EmaSection(decay=0.9), router=sections.RouterSection(bias_rate=0.01), n_steps=6)
    run = trainer(tmp_path, settings, objective=Poisoned(3, math.nan))
    for _ in range(3):
        run.run_step()
    before = bits(run)
    run.run_step()
    assert run.step == 4 and bits(run) == before, "averages and the routers' bias too"


def test_the_learning_rate_follows_the_schedule(tmp_path: Path) -> None:
    """Lion moves weights without weight decay by exactly the rate: warm-up from the first step on, then the decay."""
    schedule = sections.ScheduleSection(kind="wsd", warmup_steps=3, decay_share=0.25, final_share=0.1)
    optimiser = sections.OptimiserSection(name="lion", learning_rate=0.01, weight_decay=0.0)
    record = Record()
    run = trainer(tmp_path, Settings(n_steps=8, schedule=schedule, optimiser=optimiser), record=record)
    moved = []
    for _ in range(8):
        before = run.masters.by_name["final_norm.weight"].detach().clone()
        run.run_step()
        moved.append(float((run.masters.by_name["final_norm.weight"].detach() - before).abs().max()))
    assert moved == pytest.approx([0.01 * report.rate for report in record.steps], rel=1e-3)
    fall = [0.1 + 0.9 * share for share in (1.0, 0.5, 0.0)]
    assert [report.rate for report in record.steps] == pytest.approx([1 / 3, 2 / 3, 1, 1, 1, *fall])


def test_a_warm_up_longer_than_the_run_is_an_event(tmp_path: Path) -> None:
    record = Record()
    trainer(tmp_path, Settings(n_steps=2, schedule=sections.ScheduleSection(warmup_steps=5)), record=record).train()
    assert any("warning: schedule.warmup_steps is 5 in a run of 2 steps" in event for event in record.events)


@pytest.mark.parametrize("micro_rows", [None, 2])
def test_a_step_of_several_micro_steps_has_the_norm_of_the_whole_batch(tmp_path: Path, micro_rows: int | None) -> None:
    """The gradient is divided by the number of targets of all micro-steps, not of each."""
    parallel = sections.ParallelSection(device="cpu", micro_rows=micro_rows)
    record = Record()
    settings = Settings(n_steps=1, parallel=parallel, router=sections.RouterSection(balance_loss=0.0))
    trainer(tmp_path, settings, record=record).train()
    whole = runs.source().rows(0, 0, 8)
    reference = runs.model()
    loss, _ = NextToken(runs.TINY, settings.router, World())(reference, whole)
    (loss / whole.target_weight()).backward()
    square = sum(float(p.grad.double().square().sum()) for p in reference.parameters() if p.grad is not None)
    assert record.steps[0].norm == pytest.approx(math.sqrt(square), rel=1e-4)
    assert record.steps[0].loss == pytest.approx(float(loss.detach()) / whole.target_weight(), rel=1e-5)


@pytest.mark.parametrize("limit", [0.0, 0.01, 1e6])
def test_only_gradients_beyond_the_limit_are_clipped(tmp_path: Path, limit: float) -> None:
    settings = Settings(optimiser=sections.OptimiserSection(clip_norm=limit, learning_rate=1e-3), n_steps=1)
    record = Record()
    run = trainer(tmp_path, settings, record=record)
    run.train()
    moments = [value for name, value in run.optimiser.state().items() if name.endswith("/exp_avg")]
    norm = math.sqrt(sum(float(m.double().square().sum()) for m in moments)) / (1 - 0.9)
    expected = min(limit, record.steps[0].norm) if limit else record.steps[0].norm
    assert norm == pytest.approx(expected, rel=1e-4)


def test_random_numbers_follow_from_seed_and_step(tmp_path: Path) -> None:
    """Jitter draws other numbers in every step, and the same ones in another run of the seed."""
    config = runs.TINY.with_ffn(jitter_eps=0.3)
    still = Settings(n_steps=2, optimiser=sections.OptimiserSection(learning_rate=1e-30, weight_decay=0.0))

    class Same(runs.MemorySource):
        def rows(self, step: int, first: int, last: int) -> TrainingBatch:
            return super().rows(0, first, last)

    documents = [("a", [(7 * i * i + 3 * k) % 97 for i in range(30)]) for k in range(20)]
    losses = []
    for name, seed in (("a", 5), ("b", 5), ("c", 6)):
        record = Record()
        source = Same(documents, n_rows=8, seq_len=16, seed=1)
        settings = msgspec.structs.replace(still, seed=seed)
        trainer(tmp_path / name, settings, config=config, record=record, source=source).train()
        losses.append(record.losses)
    assert losses[0] == losses[1] != losses[2]
    assert losses[0][0] != losses[0][1], "the same rows and weights, other jitter"


def test_dense_models_train_too(tmp_path: Path) -> None:
    ffn, norm = DenseSpec(d_ff=40, activation="silu"), replace(runs.TINY.final_norm, kind="rms")
    dense = changed(runs.TINY, family="llama2", ffn=ffn, norm=norm)
    record = Record()
    trainer(tmp_path, config=dense, record=record).train()
    assert record.steps[0].expert_counts is None
    assert record.losses[-1] < record.losses[0]


def test_frozen_parameters_stay(tmp_path: Path) -> None:
    run = trainer(tmp_path)
    before = run.model.embed.weight.detach().clone()
    model = runs.model()
    for name, p in model.named_parameters():
        p.requires_grad_("moe" in name)
    part = Trainer(
        Settings(), model, runs.source(), NextToken(runs.TINY, Settings().router, World()), world=World(),
        run=RunDirectory(tmp_path / "part"),
    )  # fmt: skip
    part.run.checkpoints.mkdir(parents=True)
    assert part.train()
    assert torch.equal(model.embed.weight, before)
    assert all(".moe." in name for name in part.masters.by_name)


# Bad steps -----------------------------------------------------------------------------------------------------------


class Poisoned:
    """NextToken, with a NaN or huge loss at a chosen step."""

    def __init__(self, bad: int, factor: float) -> None:
        self.inner = NextToken(runs.TINY, Settings().router, World())
        self.bad, self.factor, self.calls = bad, factor, 0
        self.seen: list[Tensor] = []

    def __call__(self, model: Transformer, batch: TrainingBatch) -> tuple[Tensor, dict[str, Tensor]]:
        loss, metrics = self.inner(model, batch)
        bad = torch.equal(batch.tokens, runs.source().rows(self.bad, 0, 8).tokens)
        self.calls += 1
        factor = self.factor if bad else 1.0
        return loss * factor, {**metrics, "loss": metrics["loss"] * factor}


@pytest.mark.parametrize("factor", [float("nan"), float("inf"), 1e6])
def test_a_bad_step_is_skipped_and_its_batch_saved(tmp_path: Path, factor: float) -> None:
    record = Record()
    settings = Settings(n_steps=24, checkpoint=sections.CheckpointSection(every=100))
    run = trainer(tmp_path, settings, record=record, objective=Poisoned(20, factor))
    while run.step < 20:
        run.run_step()
    before = bits(run)
    run.run_step()
    assert bits(run) == before
    assert record.steps[20].verdict is not None
    assert [report.verdict for report in record.steps[:20]] == [None] * 20
    saved = list((tmp_path / "spikes").iterdir())
    assert torch.equal(load_file(saved[0])["0/tokens"], runs.source().rows(20, 0, 8).tokens)
    run.train()
    assert math.isfinite(record.losses[-1])


def test_a_run_that_ends_with_ruined_weights_is_not_done(tmp_path: Path) -> None:
    """Neither at once nor when it is resumed at its end."""
    ruin = sections.OptimiserSection(name="lion", learning_rate=1.0, weight_decay=0.0, clip_norm=0.0)
    settings = Settings(n_steps=3, optimiser=ruin)
    run = trainer(tmp_path, settings)
    run.run_step()
    with torch.no_grad():
        run.masters.by_name["final_norm.weight"].mul_(1e38)
    with pytest.raises(TrainingError, match="ends with 2 steps whose loss or gradient was not finite"):
        run.train()
    again = trainer(tmp_path, settings)
    assert again.resume() and again.step == 3
    with pytest.raises(TrainingError, match="its weights are no result"):
        again.train()


def test_a_rollback_continues_without_the_bad_batch(tmp_path: Path) -> None:
    """After the rollback the run equals one that skipped this step from the start."""
    record = Record()
    rollback = Settings(n_steps=9, guard=sections.GuardSection(action="rollback"))
    run = trainer(tmp_path / "a", rollback, record=record, objective=Poisoned(5, float("nan")))
    assert run.train()
    assert record.rollbacks == [3]
    skipping = trainer(tmp_path / "b", Settings(n_steps=9), objective=Poisoned(5, float("nan")))
    skipping.train()
    assert bits(run) == bits(skipping)


def test_a_rollback_to_before_an_allowed_change_goes_on(tmp_path: Path) -> None:
    rollback = Settings(n_steps=9, guard=sections.GuardSection(action="rollback"))
    first = trainer(tmp_path, rollback, objective=Poisoned(5, float("nan")))
    first.train(lambda: first.step == 3)
    other = msgspec.structs.replace(rollback, optimiser=sections.OptimiserSection(learning_rate=2e-2))
    record = Record()
    again = trainer(tmp_path, other, record=record, objective=Poisoned(5, float("nan")))
    assert again.resume(allow_change=True)
    assert again.train() and record.rollbacks == [4]


def test_a_resumed_run_still_skips_the_bad_batch(tmp_path: Path) -> None:
    """The rollback is part of the saved state, and so is the number of tokens read."""
    rollback = Settings(n_steps=9, guard=sections.GuardSection(action="rollback"))
    first = trainer(tmp_path / "a", rollback, objective=Poisoned(5, float("nan")))
    first.train(lambda: first.step == 6)
    assert first.skipped_steps == {5} and first.step == 7
    record = Record()
    again = trainer(tmp_path / "a", rollback, record=record, objective=Poisoned(5, float("nan")))
    assert again.resume()
    assert (again.step, again.tokens_seen, again.skipped_steps) == (7, 7 * 8 * 16, {5})
    assert again.train() and record.rollbacks == []
    assert record.steps[-1].tokens_seen == 9 * 8 * 16
    skipping = trainer(tmp_path / "b", Settings(n_steps=9), objective=Poisoned(5, float("nan")))
    skipping.train()
    assert bits(again) == bits(skipping)


def test_stop_ends_the_run(tmp_path: Path) -> None:
    settings = Settings(guard=sections.GuardSection(action="stop"))
    with pytest.raises(TrainingError, match=r"step 5: loss nan.*spikes"):
        trainer(tmp_path, settings, objective=Poisoned(5, float("nan"))).train()


def test_too_many_bad_steps_end_the_run(tmp_path: Path) -> None:
    class Always(Poisoned):
        def __call__(self, model: Transformer, batch: TrainingBatch) -> tuple[Tensor, dict[str, Tensor]]:
            loss, metrics = self.inner(model, batch)
            return loss * math.nan, {**metrics, "loss": metrics["loss"] * math.nan}

    with pytest.raises(TrainingError, match="3 bad steps"):
        trainer(tmp_path, Settings(guard=sections.GuardSection(limit=3)), objective=Always(0, 1.0)).train()


# Refusals ------------------------------------------------------------------------------------------------------------


def test_other_data_other_seeds_other_models_are_refused(tmp_path: Path) -> None:
    trainer(tmp_path).train()
    with pytest.raises(ConfigError, match="data have changed"):
        trainer(tmp_path, source=runs.source(seed=2)).resume()
    with pytest.raises(ConfigError, match="seed must be the run's 5"):
        trainer(tmp_path, Settings(seed=6)).resume()
    other: ModelConfig = replace(runs.TINY, max_seq_len=65)
    with pytest.raises(CheckpointError, match="another model"):
        trainer(tmp_path, config=other).resume()
    with pytest.raises(CheckpointError, match="tensors are missing"):
        trainer(tmp_path, Settings(ema=sections.EmaSection(decay=0.9))).resume(allow_change=True)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"optimiser": sections.OptimiserSection(learning_rate=2e-2)}, "optimiser.learning_rate was 0.01, is 0.02"),
        ({"router": sections.RouterSection(z_loss=0.0)}, "router.z_loss was 0.001, is 0.0"),
        ({"parallel": sections.ParallelSection(device="cpu", micro_rows=4)}, "parallel.micro_rows was None, is 4"),
        ({"n_steps": 16}, "n_steps was 8, is 16"),  # a cosine's past changes with its end
        ({"schedule": sections.ScheduleSection(warmup_steps=3)}, "schedule.warmup_steps was 2, is 3"),
    ],
)
def test_settings_that_change_the_past_are_refused_unless_that_is_wanted(
    tmp_path: Path, change: dict[str, object], message: str
) -> None:
    first = trainer(tmp_path)
    first.train(lambda: first.step == 4)
    record = Record()
    settings = msgspec.structs.replace(Settings(), **change)
    with pytest.raises(ConfigError, match=rf"settings differ .*{message}.* --allow-change"):
        trainer(tmp_path, settings).resume()
    run = trainer(tmp_path, settings, record=record)
    assert run.resume(allow_change=True) and record.events == [f"setting changed: {message}"]
    assert run.train()


def test_settings_that_change_no_step_so_far_are_recorded(tmp_path: Path) -> None:
    """Also a longer run of a schedule that has not begun to fall."""
    wsd = sections.ScheduleSection(kind="wsd", warmup_steps=2, decay_share=0.25)
    fading = sections.RouterSection(bias_rate=0.01, bias_fade=0.25)
    before = Settings(schedule=wsd, router=fading)
    first = trainer(tmp_path, before)
    first.train(lambda: first.step == 4)
    record = Record()
    after = msgspec.structs.replace(
        before, n_steps=16, guard=sections.GuardSection(sigmas=9.0), checkpoint=sections.CheckpointSection(every=5),
        parallel=sections.ParallelSection(device="cpu", recompute=True),
    )  # fmt: skip
    run = trainer(tmp_path, after, record=record)
    assert run.resume()
    assert [event.partition(" was")[0] for event in record.events] == [
        f"setting changed: {name}"
        for name in ("checkpoint.every", "checkpoint.keep", "guard.sigmas", "n_steps", "parallel.recompute")
    ]
    fallen = trainer(tmp_path / "b", before)
    fallen.train(lambda: fallen.step == 6)
    with pytest.raises(ConfigError, match="n_steps was 8, is 16"):
        trainer(tmp_path / "b", msgspec.structs.replace(before, n_steps=16)).resume()


def test_rows_that_cannot_be_divided_among_ranks_are_refused(tmp_path: Path) -> None:
    settings = Settings(parallel=sections.ParallelSection(micro_rows=3, device="cpu"))
    with pytest.raises(ConfigError, match="micro_rows must divide"):
        trainer(tmp_path, settings).run_step()


def test_reports_add_up(tmp_path: Path) -> None:
    record = Record()
    trainer(tmp_path, record=record).train()
    report = record.steps[-1]
    assert report.tokens == 8 * 16
    assert report.tokens_seen == 8 * 8 * 16
    assert report.expert_counts is not None
    assert report.expert_counts.shape == (2, runs.N_EXPERTS)
    real = int(runs.source().rows(7, 0, 8).real().sum())  # a document of one token has no target
    assert report.expert_counts.sum(1).tolist() == [2 * real] * 2
    assert 0.9 < report.extra["balance"] < 4


def test_the_work_of_a_step_is_three_times_a_forward_pass(tmp_path: Path) -> None:
    """Two operations per active weight, four per visible key and dimension; backward is twice forward."""
    record = Record()
    trainer(tmp_path, Settings(n_steps=1), record=record).train()
    config, moe, attn = runs.TINY, runs.TINY.only_moe("this test"), runs.TINY.layers[0].mixer
    attention = config.d_model * (attn.qkv_dim + attn.q_dim)
    experts = 3 * config.d_model * moe.d_ff * moe.top_k + config.d_model * moe.n_experts
    norms = 2 * config.d_model
    weights = config.n_layers * (attention + experts + norms) + config.d_model + config.vocab_size * config.d_model
    batch = runs.source().rows(0, 0, 8)
    seen = sum(n * (n + 1) // 2 for n in batch.bounds.diff().tolist())
    expected = 3 * (2 * weights * 128 + 4 * config.n_layers * attn.q_dim * seen)
    assert record.steps[0].flops == pytest.approx(expected, rel=1e-9)
