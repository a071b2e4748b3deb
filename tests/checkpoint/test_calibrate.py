"""Calibration: its layer-by-layer measurements equal the whole model's, and using them reduces the error."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from quadriga.edits.calibrate import calibrate, moment_bytes
from quadriga.errors import RequestError
from quadriga.io.directory import packed_shapes
from quadriga.io.open import Checkpoint, open_checkpoint
from quadriga.kernels.arrays import tensor
from quadriga.model.weight_map import stays_float32
from quadriga.nn.context import PackedContext
from quadriga.nn.load import load_parameters
from quadriga.nn.transformer import Transformer, random_parameters
from quadriga.quant.feedback import Moments
from tests.checkpoint.models import TINY, write_hf

IDS = torch.randint(0, 97, (300,), generator=torch.Generator().manual_seed(2)).tolist()


def checkpoint(folder: Path, name: str) -> Checkpoint:
    torch.manual_seed(0)
    values = {n: v.bfloat16() for n, v in random_parameters(TINY[name], std=0.3, dtype=torch.float32).items()}
    write_hf(folder, TINY[name], parameters=values)
    return open_checkpoint(folder)


@pytest.mark.parametrize("name", TINY)
@torch.inference_mode()
def test_inputs_are_those_of_the_whole_model(tmp_path: Path, name: str) -> None:
    opened = checkpoint(tmp_path, name)
    found = calibrate(opened, IDS)
    parameters = {n: v.float() for n, v in load_parameters(opened).items()}
    model = Transformer.from_parameters(TINY[name], parameters).eval()
    seen: dict[str, Tensor] = {}

    def watch(module: nn.Linear, name: str) -> None:
        module.register_forward_pre_hook(
            lambda _, inputs: seen.update({name: seen.get(name, 0) + square_of_rows(inputs[0])})
        )

    def square_of_rows(x: Tensor) -> Tensor:
        """Summed over the rows; of a matrix a head, the mean of the heads' sums."""
        return x.double().square().sum(0) if x.ndim == 2 else x.double().square().mean(1).sum(0)

    for i, layer in enumerate(model.layers):
        for part in ("wqkv", "wo", "wq", "wq_a", "wq_b", "wkv_a", "wk_b", "wv_b"):
            if getattr(layer.attn, part, None) is not None:
                watch(getattr(layer.attn, part), f"layers.{i}.attn.{part}.weight")
    counts: list[list[int]] = []
    length = min(1024, TINY[name].max_seq_len)
    for start in range(0, len(IDS), length):
        part = IDS[start : start + length]
        stats = model(torch.tensor(part), PackedContext([len(part)]), with_stats=True).router_stats
        counts.append([s.load().tolist() for s in stats])
    for matrix, square in seen.items():
        mean = square / len(IDS)
        torch.testing.assert_close(
            tensor(np.asarray(found.importance[matrix])).double(), mean + mean.mean() * 1e-3, rtol=1e-3, atol=1e-9
        )
    for i, tokens in enumerate(found.expert_tokens.values()):
        assert tokens == torch.tensor([part[i] for part in counts]).sum(0).tolist()
    weights = {n for n, shape in packed_shapes(TINY[name]).items() if len(shape) == 2 and not stays_float32(n)}
    assert weights <= set(found.importance)


def test_moments_are_those_of_the_inputs(tmp_path: Path) -> None:
    """Their diagonal is the mean squares; what is kept is of the size that was said."""
    opened = checkpoint(tmp_path, "dbrx")
    vectors, both = calibrate(opened, IDS), calibrate(opened, IDS, moments=True)
    assert set(both.importance) == set(vectors.importance)
    kept = {}
    for name, moments in both.importance.items():
        if not isinstance(moments, Moments):
            assert name == "embed.weight"
            continue
        kept[id(moments)] = moments.upper.nbytes
        alone = vectors.importance[name]
        assert not isinstance(alone, Moments)
        np.testing.assert_allclose(moments.diagonal, alone, rtol=2e-2, atol=2e-3 * alone.mean(), err_msg=name)
    assert sum(kept.values()) <= moment_bytes(opened) <= 1.2 * sum(kept.values())


@pytest.mark.parametrize("ids", [[], [97], [-1]])
def test_ids_outside_the_vocabulary_are_refused(tmp_path: Path, ids: list[int]) -> None:
    with pytest.raises(RequestError, match="from 0 to 96"):
        calibrate(checkpoint(tmp_path, "dbrx"), ids)
