"""What rounding costs, in nats: beside the divergence that errors really make, and in what a budget chooses."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from typer.testing import CliRunner

from quadriga.cli import app
from quadriga.edits.block_trace import embed, load_block, through
from quadriga.edits.calibrate import calibrate
from quadriga.edits.format_errors import GGUF_FORMATS, PACKED_FORMATS, GGUFErrors, PackedErrors, row_errors
from quadriga.errors import ConfigError
from quadriga.io.conversion_plan import recipe_rest
from quadriga.io.convert import convert
from quadriga.io.directory import packed_bytes, packed_shapes
from quadriga.io.open import open_checkpoint
from quadriga.kernels.arrays import tensor
from quadriga.model.weight_map import qkv_rows, stays_float32
from quadriga.nn.context import PackedContext
from quadriga.nn.load import load_parameters
from quadriga.nn.rope import Rotations
from quadriga.nn.transformer import Transformer
from quadriga.quant.feedback import Importance, Moments
from quadriga.quant.format_choice import choose
from tests.checkpoint.models import TINY
from tests.checkpoint.test_calibrate import IDS, checkpoint
from tests.checkpoint.test_gguf_searched import DENSE, MOE, stored, write


class Kept:
    """Errors that only remember what they were told."""

    def __init__(self) -> None:
        self.told: dict[str, tuple[Tensor, Tensor, Importance]] = {}

    def add(self, name: str, weight: Tensor, cost: Tensor, how: Importance, judge: Importance) -> None:
        self.told[name] = weight, cost, judge

    def candidates(self) -> dict[str, list[object]]:
        return {}


@pytest.mark.parametrize("name", ["llama2", "mixtral", "deepseek_v2"])
def test_a_layer_s_pass_is_the_layer(tmp_path: Path, name: str) -> None:
    opened, tokens = checkpoint(tmp_path, name), torch.tensor(IDS[:50])
    context = PackedContext([20, 30])
    with torch.no_grad():
        h = embed(opened, tokens)
        rotations = Rotations(context.positions, h.dtype, TINY[name].max_seq_len)
        for index in range(TINY[name].n_layers):
            block, seen = load_block(opened, TINY[name], index), []
            got, routed = through(block, index, h, context, rotations, seen.append)
            expected, stats = block(h, context, rotations)
            torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
            for met in (m for m in seen if m.output.ndim == 2):
                torch.testing.assert_close(met.output, met.inputs @ met.weight.T, rtol=1e-4, atol=1e-4)
            assert (routed is None) == (stats is None)
            if routed is not None and stats is not None:
                assert routed.visits == stats.load().tolist()
            h = got


def test_costs_are_the_divergence_that_errors_make(tmp_path: Path) -> None:
    """Random errors in one matrix at a time: what was said beforehand, and the KL divergence of the whole model."""
    opened, tokens = checkpoint(tmp_path, "llama2"), torch.tensor(IDS)
    kept = Kept()
    calibrate(opened, IDS, errors=kept)
    parameters = {n: v.float() for n, v in load_parameters(opened).items()}
    lengths = [64, 64, 64, 64, 44]

    @torch.no_grad()
    def logs(changed: dict[str, Tensor]) -> Tensor:
        model = Transformer.from_parameters(TINY["llama2"], parameters | changed).eval()
        return model(tokens, PackedContext(lengths)).logits.log_softmax(-1).double()

    before = logs({})
    generator, ratios = torch.Generator().manual_seed(1), []
    for matrix in ("layers.0.attn.wqkv.weight", "layers.1.ffn.w_up", "layers.2.ffn.w_down", "lm_head.weight"):
        weight, cost, judge = kept.told[matrix]
        size = 0.02 * float(weight.std())
        actual = []
        for _ in range(6):
            noise = size * torch.randn(parameters[matrix].shape, generator=generator)
            after = logs({matrix: parameters[matrix] + noise})
            actual.append(float((before.exp() * (before - after)).sum(-1).mean()))
        said = size**2 * float(cost.sum()) * float(tensor(np.asarray(judge)).sum())
        ratios.append(said / np.mean(actual))
    assert all(0.6 < ratio < 1.6 for ratio in ratios), ratios


def test_row_errors_of_moments_are_those_of_outputs() -> None:
    rng = np.random.default_rng(0)
    x = (rng.normal(size=(4000, 12)) @ rng.normal(size=(12, 32))).astype(np.float32)
    difference = torch.from_numpy(rng.normal(size=(5, 32)).astype(np.float32))
    expected = (torch.from_numpy(x) @ difference.T).square().mean(0)
    got = row_errors(difference, Moments.of(x.T @ x / len(x), len(x)))
    torch.testing.assert_close(got, expected, rtol=0.05, atol=0.01 * float(expected.mean()))
    torch.testing.assert_close(
        row_errors(difference, np.arange(32, dtype=np.float32)), difference.square() @ torch.arange(32.0)
    )


@pytest.mark.parametrize("name", ["dbrx", "llama2-tied"])
def test_wider_formats_cost_less_and_every_matrix_is_measured(tmp_path: Path, name: str) -> None:
    errors = PackedErrors(TINY[name])
    calibrate(checkpoint(tmp_path, name), IDS, errors=errors, moments=True)
    matrices = [f"layers.{i}.attn.wqkv.weight" for i in range(3)]
    shapes = packed_shapes(TINY[name], {matrix: qkv_rows(TINY[name], matrix) for matrix in matrices})
    candidates = errors.candidates()
    assert set(candidates) == {n for n, shape in shapes.items() if len(shape) == 2 and not stays_float32(n)}
    for matrix, options in candidates.items():
        error = {c.format: c.error for c in options}
        assert tuple(error) == PACKED_FORMATS
        assert error["q2k"] > error["q4"] > error["q8"] > error["bfloat16"] >= 0, matrix
        assert all(c.nbytes == packed_bytes(shapes[matrix], c.format) for c in options)


@pytest.mark.parametrize("config", [DENSE, MOE], ids=["dense", "experts"])
def test_a_gguf_file_keeps_its_budget(tmp_path: Path, config: object) -> None:
    """Tensors of several types; q, k and v apart, the experts of a layer alike."""
    source = open_checkpoint(write(tmp_path / "hf", config, std=0.2))  # type: ignore[arg-type]
    errors = GGUFErrors(source.config)
    found = calibrate(source, [t % source.config.vocab_size for t in IDS], errors=errors, moments=True)
    candidates = errors.candidates()
    rest, fixed = recipe_rest(source, "gguf")
    assert not rest
    wide = {c.format for c in candidates["blk.1.attn_q.weight"]}
    assert wide == set(GGUF_FORMATS)  # rows of 256
    sizes = []
    for part in (0.0, 0.3, 1.0):
        least, most = (sum(f(c.nbytes for c in options) for options in candidates.values()) for f in (min, max))
        budget = int(fixed + least + part * (most - least))
        recipe = choose(candidates, budget, fixed)
        path = tmp_path / f"{part}.gguf"
        convert(source.path, path, to="gguf", gguf_format=recipe, importance=found.importance)
        kinds = {n: t.tensor_type.name.lower() for n, t in stored(path).items()}
        assert all(kinds[n] == {"bfloat16": "bf16"}.get(form, form) for n, form in recipe.items())
        sizes.append(path.stat().st_size)
        assert sizes[-1] <= budget
    assert sizes[0] < sizes[1] < sizes[2] and len(set(recipe.values())) <= len(GGUF_FORMATS)
    with pytest.raises(ConfigError, match="the budget must be at least"):
        choose(candidates, fixed, fixed)
    with pytest.raises(ConfigError, match=r"the recipe gives blk\.0.* the format 'q9'"):
        convert(source.path, tmp_path / "x.gguf", to="gguf", gguf_format=recipe | {"blk.0.attn_k.weight": "q9"})


def test_convert_chooses_for_gguf(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("The capital of France is Paris. " * 9)
    words = [
        "convert",
        "quadriga-nano",
        str(tmp_path / "m.gguf"),
        "--to",
        "gguf",
        "--calibrate",
        str(tmp_path / "text.txt"),
    ]
    result = CliRunner().invoke(app, [*words, "--budget", "7.5MB", "--calibrate-tokens", "60"])
    assert result.exit_code == 0, result.output
    assert "nats a token" in result.output
    assert (tmp_path / "m.gguf").stat().st_size <= 7_500_000
    refused = CliRunner().invoke(app, [*words, "--budget", "1MB"])
    assert "must be at least 0.00743" in str(refused.exception)
