"""Benchmark rows: counted bytes, measured limits, and errors."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from quadriga.bench.speed import KINDS, Bench, bytes_per_token
from quadriga.cli import app
from quadriga.errors import ConfigError
from quadriga.kernels.arrays import arrays
from quadriga.nn.transformer import random_parameters
from quadriga.quant.packed import PACKED
from quadriga.runners.compiled import CompiledModel, pack_parameters
from tests.checkpoint.models import TINY
from tests.checkpoint.test_packed import write


@pytest.fixture(scope="module")
def bench() -> Bench:
    config = TINY["dbrx"]
    packed = pack_parameters(arrays(random_parameters(config, std=0.1)), "q4")
    return Bench(CompiledModel(config, packed, threads=2, n_blocks=40), rounds=2)


def test_a_token_reads_everything_but_idle_experts_and_other_embeddings() -> None:
    config = TINY["dbrx"]
    packed = pack_parameters(arrays(random_parameters(config, std=0.1)), "q8")
    q8, d, f = PACKED["q8"].nbytes_of, config.d_model, config.layers[0].ffn.d_ff
    router = PACKED["float32"].nbytes_of(config.layers[0].ffn.n_experts, d)
    expert = 2 * q8(f, d) + q8(d, f)
    attention = q8(config.layers[0].mixer.q_dim + 2 * config.layers[0].mixer.kv_dim, d) + q8(
        d, config.layers[0].mixer.q_dim
    )
    layer = attention + router + config.layers[0].ffn.top_k * expert
    assert bytes_per_token(config, packed) == pytest.approx(config.n_layers * layer + q8(config.vocab_size, d))


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_is_measured_beside_its_limit(bench: Bench, kind: str) -> None:
    row = bench.run(kind, 4)
    assert row.tokens_per_s > 0 and row.roofline > row.tokens_per_s
    assert row.limit == ("arithmetic" if kind == "prefill" else "read")


def test_the_spread_over_experts_is_that_of_the_worst_layer(bench: Bench) -> None:
    model = bench.model
    n_layers, top_k = len(model.program.routing), 3
    for layer, routing in enumerate(model.program.routing):
        routing.load[:] = [30, 30, 0, 0, 0] if layer == n_layers - 1 else [12, 12, 12, 12, 12]
    spread = bench.spread()
    assert spread is not None and model.config.layers[0].ffn.top_k == top_k
    assert (spread.visited, spread.busiest, spread.even) == pytest.approx((2 / 5, top_k / 2, 2 / 5))


@pytest.mark.parametrize(("kind", "n"), [("decode", 10_000), ("prefill", 0), ("sprint", 1)])
def test_what_cannot_be_measured_is_refused(bench: Bench, kind: str, n: int) -> None:
    with pytest.raises(ConfigError):
        bench.run(kind, n)


def test_the_command_prints_and_keeps_rows(tmp_path: Path) -> None:
    model = str(write(tmp_path / "hf", "mixtral"))
    table = tmp_path / "rows.csv"
    for _ in range(2):
        arguments = ["bench", "decode", "--n", "4", "--model", model, "--rounds", "1", "--csv", str(table)]
        result = CliRunner().invoke(app, arguments)
        assert result.exit_code == 0, result.output
        assert "tokens/s" in result.output and "% of the read limit" in result.output
    lines = table.read_text().splitlines()
    assert len(lines) == 3 and lines[0].startswith("version,cpu,isa") and ",decode,4," in lines[2]
