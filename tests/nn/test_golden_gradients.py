"""Gradients of every tensor against autograd of transformers 5.24.0's own modules in float64 (golden files).

For models that the version the tests install does not know; tests/nn/test_saved_by_transformers.py has the others.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from quadriga.io.open import open_checkpoint
from quadriga.nn.context import PackedContext
from quadriga.nn.load import load_parameters
from quadriga.nn.transformer import Transformer
from tests.checkpoint.models import stored
from tests.golden import checkpoints
from tests.golden.checkpoints import results
from tests.golden.weights import FIXED, IN_TRANSFORMERS_5, TOKENS, in_directions

BAR = 1e-5
"""Of a product with a drawn direction, as a share of the gradient's norm: what float32 rotary tables explain."""


@pytest.mark.parametrize("name", IN_TRANSFORMERS_5)
def test_gradients_of_every_tensor(name: str, tmp_path: Path) -> None:
    checkpoints.write(name, tmp_path)
    checkpoint = open_checkpoint(tmp_path)
    model = Transformer.from_parameters(checkpoint.config, load_parameters(checkpoint, dtype=torch.float64))
    ids = torch.tensor(TOKENS)
    logits = model(ids, PackedContext([len(ids)])).logits
    torch.nn.functional.cross_entropy(logits[:-1], ids[1:]).backward()
    gradients = {place: torch.zeros_like(values) for place, values in model.state_dict().items()}
    gradients |= {place: p.grad for place, p in model.named_parameters() if p.grad is not None}
    found = stored(checkpoint.pieces, gradients)

    prefix = f"{name}.gradient."
    wanted = {key.removeprefix(prefix): values for key, values in results().items() if key.startswith(prefix)}
    learned = {tensor for tensor in found if not tensor.endswith(FIXED)}
    assert wanted.keys() == learned, wanted.keys() ^ learned
    moved = 0
    for tensor, directions in wanted.items():
        ours, theirs = in_directions(tensor, found[tensor].numpy()), directions.numpy()
        assert np.abs(ours - theirs).max() <= BAR * theirs[-1], tensor
        moved += theirs[-1] > 0
    assert moved > 0.9 * len(wanted), "few tensors without a gradient: experts that no token visits"
