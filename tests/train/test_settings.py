"""Configuration, schedules, guard: arithmetic and errors."""

from __future__ import annotations

import itertools
import math
import subprocess
import sys
from pathlib import Path

import pytest

from quadriga.errors import ConfigError, TrainingError
from quadriga.model.cost import n_params
from quadriga.train.architecture import model_config
from quadriga.train.changes import changes, described
from quadriga.train.config import GuardSection, RunConfig, ScheduleSection, parse_toml, read_toml
from quadriga.train.guard import SpikeGuard
from quadriga.train.schedule import bias_share, learning_rate_share, unreached

RECIPES = sorted((Path(__file__).parent.parent.parent / "recipes").glob("*.toml"))

BASE = """
run = "runs/x"
[model]
preset = "dbrx-132b"
[data]
corpora = ["c"]
[[data.stages]]
tokens = "1M"
seq_len = 128
batch_tokens = 1024
"""


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('run = "runs/x"', 'run = " "', "run must be the folder of the run, got ' '"),
        ("[data]", "d_model = 0\n[data]", "model.d_model must be a finite number above 0, got 0"),
        ("[data]", "[data]\nmax_epochs = nan", "max_epochs must be above 0, got nan"),
        ("[data]", "[data]\nmax_epochs = -1.0", "max_epochs must be above 0, got -1.0"),
        ("[data]", "[data]\nmax_epochs = inf", "data.max_epochs must be a finite number, got inf"),
    ],
)
def test_values_that_mean_nothing_are_refused(old: str, new: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_toml(BASE.replace(old, new).encode(), RunConfig)


def test_a_small_file_is_enough() -> None:
    config = parse_toml(BASE.encode(), RunConfig)
    assert config.n_steps == -(-1_000_000 // 1024)
    assert config.optimiser.name == "adamw"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[optimiser]\nlerning_rate = 1", r"\[optimiser\] has no key 'lerning_rate'. Did you mean 'learning_rate'"),
        ("[[data.stages]]\ntokens=1\nseq_len=1\nbatch_tokens=1\nmixx={}", r"'mixx'. Did you mean 'mix'"),
        ("[optimizer]\nname='adamw'", r"has no key 'optimizer'. Did you mean 'optimiser'"),
        ("[optimiser]\nname = 'adam'", "optimiser.name: invalid enum value 'adam'"),
        ("[optimiser]\nlearning_rate = -1.0", "optimiser.learning_rate must be a finite number above 0, got -1.0"),
        ("[optimiser]\nlearning_rate = nan", "learning_rate must be a finite number"),
        ("[optimiser]\nlearning_rate = 1e30", r"optimiser.learning_rate must be at most 1, got 1e\+30"),
        ("[optimiser]\nbetas = [0.9, 1.0]", r"betas must be within \[0, 1\), got 1.0"),
        ("[schedule]\nsteps = 0", "steps must be at least 1"),
        ("[schedule]\nsteps = '5'", "schedule.steps: expected"),
        ("[schedule]\nkind = 'wsd'\ndecay_share = 0.0", "decay_share must be within"),
        ("[checkpoint]\nkeep = 0", "keep must be at least 1"),
        ("[guard]\nlimit = 0", "limit must be at least 1"),
        ("[ema]\ndecay = 1.0", "ema.decay must be within"),
        ("[parallel]\nmicro_rows = 0", "micro_rows must be at least 1"),
        ("[router]\nbias_fade = 2.0", "bias_fade must be within"),
        (
            "[router]\nbalance_form = 'document'\n[parallel]\ncontext = 2",
            "'document' needs whole documents on a rank: leave parallel.tensor and parallel.context at 1, got 1 and 2",
        ),
        ("[router]\nbias_fade = 0.1", "bias_fade is used with router.bias_rate above 0 only, got 0.1: leave it out"),
        ("[optimiser]\nmuon_learning_rate = 1.0", "muon_learning_rate is used with optimiser.name 'muon' only"),
        ("[optimiser]\nmomentum = 0.5", "momentum is used with optimiser.name 'muon' only"),
        ("[optimiser]\nname = 'lion'\neps = 1e-3", "eps is used with optimiser.name 'adamw' and 'muon' only"),
        ("[schedule]\ndecay_share = 0.5", "decay_share is used with schedule.kind 'wsd' only"),
        ("[schedule]\nkind = 'constant'\nfinal_share = 0.5", "final_share is used with schedule.kind 'cosine'"),
        ("[schedule]\nfinal_share = 5.0", r"final_share must be within \[0, 1\], got 5.0"),
        ("[evaluate]\nprompts = ['a', '']", "prompts must be texts to continue, got an empty one"),
        ("[[data.stages]]\ntokens=1\nseq_len=1\nbatch_tokens=1\nmix={a=inf}", "must be finite"),
        ("x = [", "is not valid TOML"),
    ],
)
def test_mistakes_are_named(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_toml(text.encode() + b"\n" if text.startswith("x") else (BASE + text).encode(), RunConfig)


def test_model_is_a_preset_or_a_checkpoint() -> None:
    with pytest.raises(ConfigError, match="exactly one of preset"):
        parse_toml(BASE.replace('preset = "dbrx-132b"', "").encode(), RunConfig)
    with pytest.raises(ConfigError, match="leave out d_model"):
        parse_toml(BASE.replace('preset = "dbrx-132b"', 'start = "x"\nd_model = 8').encode(), RunConfig)


def test_a_missing_file_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot read"):
        read_toml(tmp_path / "x.toml", RunConfig)


def test_configuration_needs_no_torch() -> None:
    code = "import sys, quadriga.train.config, quadriga.cli.train; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_nano_and_its_dense_counterparts() -> None:
    sizes = []
    for name in ("nano.toml", "nano-dense.toml", "nano-dense-2x.toml"):
        config = read_toml(next(path for path in RECIPES if path.name == name), RunConfig)
        sizes.append(n_params(model_config(config.model, 8192)))
    moe, dense, wider = sizes
    assert moe.total > 2 * dense.total
    assert moe.active == pytest.approx(dense.active, rel=0.005)
    assert wider.active_without_input == pytest.approx(2 * dense.active_without_input, rel=0.05)


def test_schedules() -> None:
    cosine = ScheduleSection(warmup_steps=4, final_share=0.1)
    shares = [learning_rate_share(s, 100, cosine) for s in range(100)]
    assert shares[:5] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert shares[99] == pytest.approx(0.1)
    assert shares[4 + 95 // 2] == pytest.approx(0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * (95 // 2) / 95)))
    assert all(a >= b for a, b in itertools.pairwise(shares[4:]))
    wsd = ScheduleSection(kind="wsd", warmup_steps=4, decay_share=0.2, final_share=0.0)
    shares = [learning_rate_share(s, 100, wsd) for s in range(100)]
    assert shares[3:80] == [1.0] * 77
    assert shares[89] == pytest.approx(0.5)
    assert shares[99] == 0.0
    assert learning_rate_share(50, 100, ScheduleSection(kind="constant", warmup_steps=0)) == 1.0


def test_a_warm_up_that_is_cut_off_is_said() -> None:
    assert unreached(100, ScheduleSection(warmup_steps=99)) is None
    assert "ends at 12% of its peak" in str(unreached(12, ScheduleSection(warmup_steps=100)))
    assert "ends at 100% of its peak and never decays" in str(unreached(100, ScheduleSection(warmup_steps=100)))
    wsd = ScheduleSection(kind="wsd", warmup_steps=81, decay_share=0.2)
    assert "the decay begins at step 80 of 100" in str(unreached(100, wsd))
    assert unreached(101, wsd) is None
    shares = [learning_rate_share(step, 100, wsd) for step in range(79, 83)]
    assert shares[:3] == pytest.approx([80 / 81, 1.0, 0.1 + 0.9 * 0.9]), "a drop after the warm-up's last step"


def test_the_bias_fades_to_zero() -> None:
    shares = [bias_share(s, 100, 0.2) for s in range(100)]
    assert shares[:80] == [1.0] * 80
    assert shares[89] == pytest.approx(0.5)
    assert shares[99] == 0.0
    assert bias_share(99, 100, 0.0) == 1.0


def _good(guard: SpikeGuard, n: int) -> None:
    for step in range(n):
        assert guard.judge(step, 3.0 + 0.05 * (step % 3), 1.0 + 0.1 * (step % 2)) is None


def test_the_guard_distinguishes_spikes_from_noise() -> None:
    guard = SpikeGuard(GuardSection(sigmas=6, window=32))
    _good(guard, 40)
    assert guard.judge(40, 3.15, 1.3) is None
    assert "loss 4.000 after a mean of 3.0" in str(guard.judge(41, 4.0, 1.0))
    assert "gradient norm 9" in str(guard.judge(42, 3.0, 9.0))
    assert guard.judge(43, 1.0, 0.01) is None  # a value far below the mean is good


@pytest.mark.parametrize(("loss", "norm"), [(math.nan, 1.0), (3.0, math.inf), (math.inf, 1.0), (3.0, math.nan)])
def test_what_is_not_finite_is_bad_from_the_first_step(loss: float, norm: float) -> None:
    assert SpikeGuard(GuardSection()).judge(0, loss, norm) is not None


def test_bad_steps_do_not_enter_the_window_and_their_number_is_limited() -> None:
    guard = SpikeGuard(GuardSection(limit=3, window=32))
    _good(guard, 40)
    before = guard.state()["losses"]
    assert guard.judge(40, 50.0, 1.0) and guard.judge(41, 50.0, 1.0)
    assert guard.state()["losses"] == before
    with pytest.raises(TrainingError, match="3 bad steps within 32"):
        guard.judge(42, 50.0, 1.0)
    other = SpikeGuard(GuardSection(limit=3, window=32))
    other.load(guard.state())
    assert other.state() == guard.state()


def test_the_aggregate_is_chosen_by_the_recipe() -> None:
    from quadriga.train.architecture import model_config

    for kind in ("weighted_sum", "vote", "fuse"):
        config = parse_toml(
            BASE.replace('preset = "dbrx-132b"', f'preset = "dbrx-132b"\naggregate = "{kind}"').encode(), RunConfig
        )
        assert {layer.ffn.aggregate for layer in model_config(config.model, 97).layers} == {kind}
    with pytest.raises(ConfigError, match="aggregate"):
        parse_toml(BASE.replace('preset = "dbrx-132b"', 'preset = "dbrx-132b"\naggregate = "mean"').encode(), RunConfig)
    dense = parse_toml(
        BASE.replace('preset = "dbrx-132b"', 'preset = "llama2-7b"\naggregate = "vote"').encode(), RunConfig
    )
    with pytest.raises(ConfigError, match=r"model\.aggregate need a preset with experts; llama2-7b is dense"):
        model_config(dense.model, 97)


def test_a_key_that_had_no_effect_does_not_keep_a_run_of_an_earlier_version_from_going_on() -> None:
    now = described(parse_toml(BASE.encode(), RunConfig), 977)
    (change,) = changes({**now, "schedule.decay_share": 0.5}, now, 40)
    assert (change.name, change.was, change.now, change.harmful) == ("schedule.decay_share", 0.5, 0.2, False)
    (kept,) = changes({**now, "schedule.warmup_steps": 7}, now, 40)
    assert kept.harmful
