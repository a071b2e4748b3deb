"""What docs/gpu.md predicts is what the command says, and the command's counts are right."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

from quadriga.model.cost import bytes_read_per_token, flops_per_token
from quadriga.model.families import PRESETS

SCRIPT = Path(__file__).parents[2] / "bench" / "gpu_predict.py"


@pytest.fixture(scope="module")
def predict() -> ModuleType:
    spec = importlib.util.spec_from_file_location("gpu_predict", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["gpu_predict"] = module  # its dataclasses look themselves up
    spec.loader.exec_module(module)
    return module


def test_the_page_has_what_the_command_says(predict: ModuleType) -> None:
    page = predict.DOCS.read_text()
    between = page.partition(predict.BEGIN)[2].partition(predict.END)[0]
    assert between.strip() == predict.text(), "run python bench/gpu_predict.py --write"


@pytest.mark.parametrize("name", ["dbrx-132b", "qwen3-30b-a3b"])
def test_bytes_and_operations_of_one_token_are_the_models(predict: ModuleType, name: str) -> None:
    """Beside ``model.cost``, which walks parameters: weights to a percent, the rest is activations."""
    config = PRESETS[name]
    ops = predict.step_ops(config, 1, 16, "plain")
    assert sum(op.n_bytes for op in ops) == pytest.approx(bytes_read_per_token(config, "bf16"), rel=0.01)
    # Tiles of 16 rows hold one token's: 16 times its operations, and the attention's are few here.
    assert sum(op.flops for op in ops) == pytest.approx(16 * flops_per_token(config, 16), rel=0.02)


def test_a_machine_of_eight_is_eight_times_one_less_what_it_exchanges(predict: ModuleType) -> None:
    config, one = PRESETS["qwen3-30b-a3b"], predict.Device("one", 80e9, 3e12, 1e15)
    eight = predict.Device("eight", 80e9, 3e12, 1e15, 8)
    alone, together = (predict.tokens_per_s(config, device, "q4", 4, 2048) for device in (one, eight))
    assert together == pytest.approx(8 * alone)
    linked = predict.Device("linked", 80e9, 3e12, 1e15, 8, 450e9)
    lost = 4 / predict.tokens_per_s(config, linked, "q4", 4, 2048) - 4 / together
    assert lost == pytest.approx(48 * 2 * (2 * 7 / 8 * 4 * 2048 * 2) / 450e9)
    small = predict.Device("small", 16e9, 3e12, 1e15)
    assert predict.tokens_per_s(config, small, "q4", 1, 2048) is None
