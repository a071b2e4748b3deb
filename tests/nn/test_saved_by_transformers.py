"""Checkpoints that transformers 4.57.6 itself wrote: read by the package, run on the CPU's kernels, taken through GGUF, and
trained a step. What the golden files cannot show: the files and keys that ``save_pretrained`` makes, and gradients.
"""

from __future__ import annotations

import copy
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from quadriga import load
from quadriga.io.convert import convert
from quadriga.io.open import open_checkpoint
from quadriga.nn.context import PackedContext
from quadriga.nn.load import load_parameters
from quadriga.nn.transformer import Transformer
from tests.checkpoint.models import stored
from tests.golden.make_golden import build
from tests.golden.weights import MODELS, TOKENS

FAMILIES: dict[str, dict[str, object]] = {
    "glm4moe": {"use_qk_norm": False},  # GLM-4.5-Air
    "dots1": {"attention_bias": False},  # which llama.cpp does not add in this architecture
    "ernie4_5-moe": {"moe_layer_end_index": -1},  # for which GGUF has no key
    "hunyuan-moe": {},
    "qwen2moe": {"mlp_only_layers": []},  # GGUF has no place for a dense layer
    # A padding token's row of the table gets no gradient there: it is one that the text does not have.
    "olmo2": {"pad_token_id": 0},
    "olmo3": {
        "pad_token_id": 0,
        "attention_bias": False,
        "layer_types": ["sliding_attention"] * 3 + ["full_attention"],
    },
    "flex_olmo": {"pad_token_id": 0},
    "phimoe": {},
    "deepseek-v3": {  # GGUF has one number for both of YaRN's
        "rope_scaling": {
            "rope_type": "yarn",
            "factor": 4.0,
            "mscale": 0.7,
            "mscale_all_dim": 0.7,
            "original_max_position_embeddings": 16,
        }
    },
    "lfm2": {},
    "qwen3next": {},
    "granitehybrid": {},
    "granitehybrid-dense": {},
    "gemma2": {"query_pre_attn_scalar": 10},  # GGUF has no key for it
    "gemma3": {},
}
"""Golden models, and what is different here."""
BAR = 2e-5
"""Largest difference of a float32 logit, as a share of the logits' range."""
GRADIENT_BAR = 3e-6
"""Norm of a gradient's difference, as a share of the gradient's: what the rotary tables, which are float32, explain."""


@pytest.fixture(scope="module", params=FAMILIES)
def theirs(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[torch.nn.Module, Path]:
    """A model of transformers, and the directory that it wrote."""
    model = build(MODELS[request.param] | FAMILIES[request.param])
    folder = tmp_path_factory.mktemp(request.param)
    model.save_pretrained(folder, safe_serialization=True)
    return model, folder


NOT_IN_GGUF = ("flex_olmo", "phimoe")


def test_logits_of_the_directory_and_of_a_gguf_file(theirs: tuple[torch.nn.Module, Path], tmp_path: Path) -> None:
    model, folder = theirs
    with torch.no_grad():
        wanted = model(torch.tensor([TOKENS]), use_cache=False).logits[0].numpy()
    paths = [folder]
    if folder.name.rstrip("0123456789") not in NOT_IN_GGUF:  # pytest numbers folders
        paths.append(tmp_path / "x.gguf")
        convert(folder, paths[1], to="gguf", gguf_format="float32")
    for path in paths:
        logits = load(path, format="float32", kv_format="float32", threads=1).logits(TOKENS)
        assert np.abs(logits - wanted).max() / np.ptp(wanted) <= BAR, path


class Wide:
    """torch, as a module of transformers sees it that is to compute in float64 where it says float32."""

    float = float32 = torch.float64

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)


def loss_in_float64(model: torch.nn.Module, ids: torch.Tensor) -> torch.Tensor:
    """The loss of transformers' module, without a float32 in it but the rotary frequencies."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys.modules[type(model).__module__], "torch", Wide())
        patch.setattr(torch.Tensor, "float", torch.Tensor.double)
        loss: torch.Tensor = model(ids[None], labels=ids[None], use_cache=False).loss
    return loss


def test_gradients_of_every_tensor(theirs: tuple[torch.nn.Module, Path]) -> None:
    """In float64: in float32 the rounding of four layers alone comes to 1e-5."""
    model, folder = copy.deepcopy(theirs[0]).double(), theirs[1]
    ids = torch.tensor(TOKENS)
    loss_in_float64(model, ids).backward()

    checkpoint = open_checkpoint(folder)
    ours = Transformer.from_parameters(checkpoint.config, load_parameters(checkpoint, dtype=torch.float64))
    logits = ours(ids, PackedContext([len(ids)])).logits
    torch.nn.functional.cross_entropy(logits[:-1], ids[1:]).backward()
    gradients = {name: torch.zeros_like(value) for name, value in ours.state_dict().items()}
    gradients |= {name: p.grad for name, p in ours.named_parameters() if p.grad is not None}
    found = stored(checkpoint.pieces, gradients)

    wanted = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    assert wanted.keys() <= found.keys()
    for name, gradient in wanted.items():
        if gradient is None:
            assert ".experts." in name and not found[name].any(), "an expert that no token visits"
            continue
        assert gradient.norm() > 0, name
        assert (found[name] - gradient).norm() <= GRADIENT_BAR * gradient.norm(), name
