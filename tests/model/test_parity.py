"""Our one Transformer against transformers 4.57.6 (golden files) and against plain NumPy, for every family.

Checkpoints go all the way: config.json and safetensors under Hugging Face names are written, opened and read by the
package, so that configuration, names, layouts and mathematics are proven together.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from quadriga.checkpoint.open import load_parameters, open_checkpoint
from quadriga.engine.kv_cache import KVCache
from quadriga.model import families
from quadriga.model.config import ModelConfig, MoESpec, RopeSpec
from quadriga.model.context import PackedContext
from quadriga.model.transformer import Transformer
from quadriga.model.weight_map import source_shapes
from tests.checkpoint.models import TINY
from tests.golden.weights import MODELS, PREFILL, TOKENS, draw, ragged
from tests.oracles import numpy_models
from tests.tolerance import logit_bound

GOLDEN = Path(__file__).parent.parent / "golden"
FACTS: dict[str, Any] = json.loads((GOLDEN / "golden.json").read_text())
BAR = 2e-5
"""Largest difference of a float32 logit, as a share of the logits' range."""


@cache
def golden() -> dict[str, Tensor]:
    return load_file(GOLDEN / "golden.safetensors")


def hf_weights(raw: dict[str, object]) -> tuple[ModelConfig, dict[str, np.ndarray[Any, Any]]]:
    config = families.config_from_hf(raw)
    layout = next(iter(families.family_of(config).layouts.values()))(config)
    return config, {name: draw(name, shape) for name, shape in source_shapes(layout).items()}


@pytest.fixture(scope="module")
def load(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Transformer]:
    """A function that writes a golden model as a checkpoint and loads it."""
    folders: dict[str, Path] = {}

    def open_model(name: str, dtype: torch.dtype = torch.float32) -> Transformer:
        if name not in folders:
            folders[name] = tmp_path_factory.mktemp(name)
            raw = full_config(MODELS[name])
            _, weights = hf_weights(raw)
            (folders[name] / "config.json").write_text(json.dumps(raw))
            save_file({k: torch.from_numpy(v) for k, v in weights.items()}, folders[name] / "model.safetensors")
        checkpoint = open_checkpoint(folders[name])
        return Transformer.from_parameters(checkpoint.config, load_parameters(checkpoint, dtype=dtype)).eval()

    return open_model


def full_config(raw: dict[str, object]) -> dict[str, object]:
    """A golden model's config.json as transformers would save it: nothing left to defaults."""
    if raw["model_type"] == "mpt":
        attn = dict(raw["attn_config"])  # type: ignore[call-overload]
        return {**raw, "attn_config": {**attn, "attn_type": "multihead_attention", "softmax_scale": None}}
    if raw["model_type"] in ("llama", "mixtral"):
        return {**raw, "attention_bias": False} if raw["model_type"] == "llama" else dict(raw)
    return dict(raw)


def error(ours: Tensor, theirs: Tensor) -> float:
    return float((ours - theirs).abs().max() / (theirs.max() - theirs.min()))


@pytest.mark.parametrize("name", MODELS)
@torch.inference_mode()
def test_prefill_decode_and_ragged_batches_equal_transformers(load: Callable[..., Transformer], name: str) -> None:
    model = load(name)
    tokens = torch.tensor(TOKENS)
    assert error(model(tokens, PackedContext([33])).logits, golden()[f"{name}.prefill"]) <= BAR

    cache = KVCache(model.config, dtype=torch.float32)
    pieces = [model(tokens[:PREFILL], cache.extend([PREFILL])).logits]
    pieces += [model(tokens[i : i + 1], cache.extend([1])).logits for i in range(PREFILL, 33)]
    assert error(torch.cat(pieces), golden()[f"{name}.decode"]) <= BAR

    lengths = [len(s) for s in ragged()]
    packed = torch.tensor([t for s in ragged() for t in s])
    batch = KVCache(model.config, len(lengths), dtype=torch.float32)
    for context in (PackedContext(lengths), batch.extend(lengths)):
        assert error(model(packed, context).logits, golden()[f"{name}.ragged"]) <= BAR


@pytest.mark.parametrize("name", ["dbrx", "mixtral"])
@torch.inference_mode()
def test_router_probabilities_equal_transformers(load: Callable[..., Transformer], name: str) -> None:
    _, stats = load(name)(torch.tensor(TOKENS), PackedContext([33]), with_stats=True)
    theirs = golden()[f"{name}.router_probs"]
    assert torch.stack([layer.probs for layer in stats]).sub(theirs).abs().max() < 1e-5
    assert torch.equal(stats[0].expert_ids, theirs[0].topk(3).indices)
    for layer in stats:
        torch.testing.assert_close(layer.expert_weights.sum(-1), torch.ones(33))


def test_the_golden_dbrx_really_clips() -> None:
    assert 0.2 < FACTS["dbrx_clipped_share"] < 0.6
    assert FACTS["made_with"].startswith("transformers 4.57.6")


# What a test of parity is worth is what it can see: each change below must break it.
MUTATIONS: dict[str, tuple[str, Callable[[ModelConfig], ModelConfig]]] = {
    "rope theta 10000, as transformers 5.15-5.23 loads DBRX": (
        "dbrx",
        lambda c: replace(c, position=RopeSpec(theta=10_000.0)),
    ),
    "no clipping": ("dbrx", lambda c: replace(c, attn=replace(c.attn, clip_qkv=None))),
    "weights not renormalised": ("dbrx", lambda c: replace(c, ffn=replace(c.ffn, normalize_p=None))),
    "one expert fewer": ("mixtral", lambda c: replace(c, ffn=replace(c.ffn, top_k=2))),
    "vote": ("mixtral", lambda c: replace(c, ffn=replace(c.ffn, aggregate="vote"))),
    "layer norm for rms norm": ("llama", lambda c: replace(c, norm=replace(c.norm, kind="layer"))),
    "epsilon 1e-6": ("llama", lambda c: replace(c, norm=replace(c.norm, eps=3e-5))),
    "tanh gelu": ("mpt", lambda c: replace(c, ffn=replace(c.ffn, activation="gelu_tanh"))),
    "alibi bias 6": ("mpt", lambda c: replace(c, position=replace(c.position, max_bias=6.0))),
}


@pytest.mark.parametrize("what", MUTATIONS)
@torch.inference_mode()
def test_a_wrong_model_is_seen(load: Callable[..., Transformer], what: str) -> None:
    name, change = MUTATIONS[what]
    right = load(name)
    wrong = Transformer.from_parameters(change(right.config), right.state_dict())
    assert error(wrong(torch.tensor(TOKENS), PackedContext([33])).logits, golden()[f"{name}.prefill"]) > BAR


@pytest.mark.parametrize("name", MODELS)
@torch.inference_mode()
def test_bfloat16_is_within_its_rounding(load: Callable[..., Transformer], name: str) -> None:
    """Against float32 with the same bf16 weights; where rounding changes an expert choice, a row may differ more."""
    half = load(name, torch.bfloat16)
    full = Transformer.from_parameters(half.config, {k: v.float() for k, v in half.state_dict().items()})
    # Eleven sequences of three: a changed choice disturbs the later tokens of its own sequence only.
    tokens, context = torch.tensor(TOKENS), PackedContext([3] * 11)
    ours, our_stats = half(tokens, context, with_stats=True)
    theirs, their_stats = full(tokens, context, with_stats=True)
    same = torch.ones(11, 3, dtype=torch.bool)
    for a, b in zip(our_stats, their_stats, strict=True):
        same &= (a.expert_ids == b.expert_ids).all(-1).view(11, 3).long().cummin(1).values.bool()
    assert int(same.sum()) >= 5
    bound = logit_bound(torch.bfloat16, half.config.n_layers, float(theirs.max() - theirs.min()))
    worst = float((ours - theirs)[same.view(-1)].abs().max())
    assert bound / 20 <= worst <= bound, f"{worst} against {bound} over {int(same.sum())} rows"


@torch.inference_mode()
def test_dbrx_equals_the_numpy_statement_and_so_does_transformers() -> None:
    raw = full_config(MODELS["dbrx"])
    _, weights = hf_weights(raw)
    logits, probs = numpy_models.dbrx({k: v.astype(np.float64) for k, v in weights.items()}, raw, TOKENS)
    assert error(golden()["dbrx.prefill"].double(), torch.from_numpy(logits)) <= BAR
    assert np.abs(golden()["dbrx.router_probs"].numpy() - probs).max() < 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@torch.inference_mode()
def test_grok1_equals_the_numpy_statement(tmp_path: Path, dtype: torch.dtype) -> None:
    config = TINY["grok1"]
    family = families.FAMILIES["grok1"]
    weights = {name: draw(name, shape) for name, shape in source_shapes(family.layouts["hpcai"](config)).items()}
    (tmp_path / "config.json").write_text(json.dumps(family.config_to_hf(config)))
    save_file({k: torch.from_numpy(v) for k, v in weights.items()}, tmp_path / "model.safetensors")
    checkpoint = open_checkpoint(tmp_path)
    assert checkpoint.config == config
    model = Transformer.from_parameters(config, load_parameters(checkpoint, dtype=dtype))
    assert isinstance(config.ffn, MoESpec)
    sizes = {
        "d_model": config.d_model,
        "n_layers": config.n_layers,
        "n_heads": config.attn.n_heads,
        "n_kv_heads": config.attn.n_kv_heads,
        "head_dim": config.attn.head_dim,
        "n_experts": config.ffn.n_experts,
        "top_k": config.ffn.top_k,
    }
    expected = torch.from_numpy(
        numpy_models.grok1({k: v.astype(np.float64) for k, v in weights.items()}, sizes, TOKENS)
    )
    tokens = torch.tensor(TOKENS)
    bar = BAR if dtype == torch.float32 else 1e-12
    # float64 shows the mathematics is the same; float32 rotary tables (by design) bound it.
    bar = max(bar, 2e-6)
    assert error(model(tokens, PackedContext([33])).logits, expected) <= bar
    cache = KVCache(config, dtype=dtype)
    pieces = [model(tokens[:PREFILL], cache.extend([PREFILL])).logits]
    pieces += [model(tokens[i : i + 1], cache.extend([1])).logits for i in range(PREFILL, 33)]
    assert error(torch.cat(pieces), expected) <= bar
    for change in (
        lambda c: replace(c, ffn=replace(c.ffn, activation="gelu")),
        lambda c: replace(c, attn=replace(c.attn, soft_cap=None)),
        lambda c: replace(c, logit_scale=1.0),
        lambda c: replace(c, embedding_scale=1.0),
    ):
        wrong = Transformer.from_parameters(change(config), model.state_dict())
        assert error(wrong(tokens, PackedContext([33])).logits, expected) > BAR
