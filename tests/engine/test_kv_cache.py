"""Cached decoding equals reading everything at once, for every kind of attention and for ragged batches."""

from __future__ import annotations

import pytest
import torch

from quadriga.engine.kv_cache import KVCache
from quadriga.errors import RequestError
from quadriga.model.config import AlibiSpec, AttentionSpec, DenseSpec, ModelConfig, MoESpec, NormSpec, RopeSpec
from quadriga.model.context import PackedContext
from quadriga.model.transformer import Transformer, random_parameters


def tiny(kind: str) -> ModelConfig:
    soft_cap = 3.0 if kind == "soft_cap" else None
    return ModelConfig(
        family="test",
        vocab_size=97,
        d_model=48,
        n_layers=4,
        max_seq_len=300,
        norm=NormSpec(kind="rms"),
        position=AlibiSpec() if kind == "alibi" else RopeSpec(theta=1e4),
        attn=AttentionSpec(n_heads=6, n_kv_heads=2, head_dim=8, soft_cap=soft_cap),
        ffn=DenseSpec(d_ff=80, activation="gelu")
        if kind == "dense"
        else MoESpec(d_ff=80, n_experts=5, top_k=3, activation="silu"),
    )


def build(kind: str) -> Transformer:
    config = tiny(kind)
    # float64: what differs is then a mistake, not rounding.
    return Transformer.from_parameters(config, random_parameters(config, std=0.3, dtype=torch.float64))


def whole(model: Transformer, ids: torch.Tensor) -> torch.Tensor:
    return model(ids, PackedContext([len(ids)])).logits


@pytest.mark.parametrize("kind", ["dense", "moe", "alibi", "soft_cap"])
@torch.inference_mode()
def test_chunks_and_steps_equal_one_pass(kind: str) -> None:
    model = build(kind)
    ids = torch.randint(0, 97, (279,), generator=torch.Generator().manual_seed(3))
    cache = KVCache(model.config, dtype=torch.float64)
    pieces = []
    start = 0
    for size in (1, 17, 1, 1, 239, 1, 19):  # crosses the first growth of the strips at 256
        pieces.append(model(ids[start : start + size], cache.extend([size])).logits)
        start += size
    torch.testing.assert_close(torch.cat(pieces), whole(model, ids), rtol=0, atol=1e-11)


@pytest.mark.parametrize("kind", ["dense", "moe", "alibi", "soft_cap"])
@torch.inference_mode()
def test_a_ragged_batch_equals_one_by_one(kind: str) -> None:
    model = build(kind)
    generator = torch.Generator().manual_seed(4)
    prompts = [torch.randint(0, 97, (n,), generator=generator) for n in (7, 1, 12)]
    steps = torch.randint(0, 97, (3, 5), generator=generator)
    cache = KVCache(model.config, 3, dtype=torch.float64)
    prefill = model(torch.cat(prompts), cache.extend([len(p) for p in prompts])).logits
    decoded = [model(steps[:, t], cache.extend([1, 1, 1])).logits for t in range(5)]
    start = 0
    for b, prompt in enumerate(prompts):
        alone = whole(model, torch.cat((prompt, steps[b])))
        torch.testing.assert_close(prefill[start : start + len(prompt)], alone[: len(prompt)], rtol=0, atol=1e-11)
        torch.testing.assert_close(torch.stack([d[b] for d in decoded]), alone[len(prompt) :], rtol=0, atol=1e-11)
        start += len(prompt)


@torch.inference_mode()
def test_spare_room_is_never_seen() -> None:
    """Fresh memory may hold NaN; a short sequence beside a long one must not meet it."""
    cache = KVCache(tiny("dense"), 2, dtype=torch.float64)
    cache.extend([5, 1])
    for strip in (*cache.keys, *cache.values):
        assert torch.isfinite(strip).all()


@torch.inference_mode()
def test_truncated_positions_are_forgotten() -> None:
    model = build("moe")
    ids = torch.arange(20)
    cache = KVCache(model.config, dtype=torch.float64)
    model(torch.cat((ids[:10], ids[:7])), cache.extend([17]))
    cache.truncate(0, 10)
    rest = model(ids[10:], cache.extend([10])).logits
    torch.testing.assert_close(rest, whole(model, ids)[10:], rtol=0, atol=1e-11)


def test_outgrowing_the_context_is_an_error() -> None:
    cache = KVCache(tiny("dense"), dtype=torch.float32)
    cache.extend([300])
    with pytest.raises(RequestError, match="301 tokens, the model's context is 300"):
        cache.extend([1])
