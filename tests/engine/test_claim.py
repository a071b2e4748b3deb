"""The speed claim: its arithmetic by hand at full size, and its measurement on tiny layers."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from quadriga.bench import claim
from quadriga.bench.claim import ClaimResult, Layer, head_bytes, layer_bytes, random_packed, ratio
from quadriga.cli import bench_claim
from quadriga.errors import ConfigError
from quadriga.kernels.cpu.packing import Packed
from quadriga.model import families
from quadriga.model.config import ModelConfig
from tests.checkpoint.models import TINY


def test_bytes_of_a_dbrx_layer_by_hand() -> None:
    dbrx = families.preset("dbrx-132b")
    attention, expert, router = 6144 * 8192 + 6144 * 6144, 3 * 6144 * 10752, 16 * 6144
    for n, visited in ((1, 4.0), (2, 16 * (1 - 0.75**2)), (64, 16 * (1 - 0.75**64))):
        expected = (attention + visited * expert) * 4.5 / 8 + router * 4
        assert layer_bytes(dbrx, "q4", n) == pytest.approx(expected)
    assert head_bytes(dbrx, "q4") == 100352 * 6144 * 4.5 / 8


def test_a_dense_layer_reads_the_same_whatever_the_batch() -> None:
    llama = families.preset("llama2-70b")
    assert layer_bytes(llama, "q8", 1) == layer_bytes(llama, "q8", 64)


def test_arithmetic_expects_the_launchs_two_times_of_one_user() -> None:
    dbrx, llama = families.preset("dbrx-132b"), families.preset("llama2-70b")
    times = [m.n_layers * layer_bytes(m, "q4", 1) + head_bytes(m, "q4") for m in (dbrx, llama)]
    assert 1.85 < times[1] / times[0] < 1.95


def test_every_expert_has_memory_of_its_own() -> None:
    parameters = random_packed(TINY["dbrx"].with_n_layers(1), "q4")
    experts = parameters["layers.0.moe.w_gate"]
    assert isinstance(experts, list)
    assert len({expert.data.ctypes.data for expert in experts}) == 5
    assert all((expert.unpack() == experts[0].unpack()).all() for expert in experts)
    head, table = parameters["lm_head.weight"], parameters["embed.weight"]
    assert isinstance(head, Packed)
    assert head is table


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    """The four systems, tiny."""
    small: dict[str, ModelConfig] = {
        "dbrx-132b": TINY["dbrx"],
        "llama2-70b": TINY["llama2"],
        "mixtral-8x7b": TINY["mixtral"],
        "grok-1": TINY["grok1"],
    }
    monkeypatch.setattr(claim.families, "preset", lambda name: replace(small[name], max_seq_len=512))
    monkeypatch.setattr(claim, "PROMPT", 40)
    monkeypatch.setattr(claim, "DEPTH", 20)


@pytest.mark.usefixtures("tiny")
def test_every_system_is_measured_at_every_size(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = claim.run(packed_format="q8", threads=1, batches=(1, 3), rounds=2)
    assert [(row.kind, row.n) for row in rows[::4]] == [("decode", 1), ("decode", 3), ("prefill", 40)]
    assert [row.system for row in rows[:4]] == list(claim.SYSTEMS)
    for row in rows:
        n_layers = 3
        assert row.tokens_per_s > 0
        assert row.layer_s > 0
        assert row.expected_tokens_per_s > row.tokens_per_s / 100
        assert row.n / row.tokens_per_s == pytest.approx(n_layers * row.layer_s + row.head_s, rel=2.0)
        assert row.experts == 1 if row.system == "LLaMA2-70B" else 1 <= row.experts <= 5
        over = ratio(rows, row)
        assert over is not None
        assert (over == (1.0, 1.0)) == (row.system == "LLaMA2-70B")
    pytest.importorskip("matplotlib")
    bench_claim.picture(tmp_path / "claim.svg", rows)
    assert (tmp_path / "claim.svg").stat().st_size > 5000


@pytest.mark.usefixtures("tiny")
def test_the_whole_model_is_its_layers_and_its_head(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Layer, "decode", lambda self, batch: (0.5 * batch, 0.25))
    monkeypatch.setattr(Layer, "prefill", lambda self, n: (2.0, 0.0))
    rows = claim.run(packed_format="q4", threads=1, batches=(2,), rounds=1)
    assert rows[0].tokens_per_s == pytest.approx(2 / (3 * 1.0 + 0.25))
    assert rows[4].tokens_per_s == pytest.approx(40 / 6.0)


def test_a_ratio_needs_its_base() -> None:
    row = ClaimResult("DBRX", "decode", 1, 1.0, 1.0, 1.0, 0.0, 4.0, 1.0, "avx2")
    assert ratio([row], row) is None


def test_what_is_refused() -> None:
    with pytest.raises(ConfigError, match="format must be one of"):
        claim.run(packed_format="q3", threads=1)
    with pytest.raises(ConfigError, match="batches from 1 to 512"):
        claim.run(threads=1, batches=(0,))
    with pytest.raises(ConfigError, match="systems must be among"):
        claim.run(threads=1, systems=("GPT-4",))
