"""Whole models on the backend "triton", interpreted, beside what transformers computed."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from quadriga.kernels import ops
from quadriga.nn.context import PackedContext
from quadriga.nn.transformer import Transformer
from tests.golden.checkpoints import results
from tests.golden.weights import TOKENS

BAR = 2e-5
"""Largest difference of a float32 logit, as a share of the logits' range; as in tests/nn/test_parity.py."""


@pytest.mark.parametrize("name", ["dbrx", "mixtral", "qwen3moe", "gpt-oss", "deepseek-v3", "phimoe"])
@torch.inference_mode()
def test_logits_equal_transformers(golden_model: Callable[..., Transformer], name: str) -> None:
    model, tokens = golden_model(name), torch.tensor(TOKENS)
    with ops.use("triton"):
        ours = model(tokens, PackedContext([len(TOKENS)])).logits
    theirs = results()[f"{name}.prefill"]
    assert float((ours - theirs).abs().max() / (theirs.max() - theirs.min())) <= BAR
