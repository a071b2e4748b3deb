"""Fitted routers send labelled tokens to their label's copy, and the regression is at its minimum."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from quadriga.edits.fit_router import _RIDGE, _regression, fit_routers
from quadriga.edits.upcycle import Upcycling, upcycle
from quadriga.errors import RequestError
from quadriga.nn.context import PackedContext
from quadriga.nn.load import load_parameters
from quadriga.nn.transformer import Transformer
from tests.checkpoint.test_upcycle import opened


def _texts() -> dict[str, list[int]]:
    generator = torch.Generator().manual_seed(1)
    # Two languages over one vocabulary: low ids and high ids, with a shared middle.
    return {
        "low": torch.randint(0, 52, (960,), generator=generator).tolist(),
        "high": torch.randint(45, 97, (960,), generator=generator).tolist(),
    }


def test_tokens_go_to_the_copy_of_their_label(tmp_path: Path) -> None:
    dense = opened(tmp_path / "dense")
    found = fit_routers(dense, _texts(), window=32)
    assert found.labels == ("high", "low")
    assert all(accuracy > 0.7 for accuracy in found.accuracy.values()), "six sevenths of the ids tell the label"
    moe = upcycle(dense, Upcycling(n_experts=4, top_k=2), routers=found.rows)
    model = Transformer.from_parameters(moe.config, load_parameters(moe)).eval()
    for copy, label in enumerate(found.labels):
        tokens = torch.tensor(_texts()[label])[:64]
        stats = model(tokens, PackedContext([32, 32]), with_stats=True).router_stats
        for layer in stats:
            assert float((layer.expert_ids // 2 == copy).float().mean()) > 0.7


def test_the_regression_ends_where_its_gradient_is_zero() -> None:
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(90, 7, generator=generator) * torch.tensor([1.0, 2, 3, 0.5, 4, 1, 1])
    labels = (x[:, 0] + 0.3 * torch.randn(90, generator=generator) > 0.5).long() + (x[:, 4] > 3).long()
    w = _regression(x, labels, 3)
    size = x.square().mean(0).sqrt()
    v = (w * size).requires_grad_()
    weight = (1 / torch.bincount(labels).float())[labels]
    nll = torch.nn.functional.cross_entropy((x / size) @ v.T, labels, reduction="none")
    loss = (weight * nll).sum() / weight.sum() + _RIDGE / 2 * v.square().sum()
    (gradient,) = torch.autograd.grad(loss, v)
    assert gradient.abs().max() < 1e-3


def test_too_little_text_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match=r"160 tokens of each; got \['a', 'b'\], too little of \['b'\]"):
        fit_routers(opened(tmp_path / "dense"), {"a": [1] * 200, "b": [2] * 30}, window=32)
