"""What attention can be made of beyond LLaMA's: the kernels against torch, and torch against loops over one head.

Windows are shorter than the texts, sinks and biases large enough to matter, texts longer than a chunk of 256 keys.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from quadriga.kernels import ops, training
from quadriga.model.config import (
    FactorScaling,
    LinearScaling,
    Llama3Scaling,
    LongRopeScaling,
    ModelConfig,
    NormSpec,
    QKNormSpec,
    RopeSpec,
    YarnScaling,
)
from quadriga.nn.context import PackedContext, Scoring
from tests.batches import batch, logits_of
from tests.checkpoint.models import TINY
from tests.configs import changed
from tests.runners.test_compiled import HERE, check, make, sequence

BASE = TINY["llama2"]


def rope(**fields: object) -> RopeSpec:
    return RopeSpec(theta=1e4, **fields)  # type: ignore[arg-type]


PIECES: dict[str, ModelConfig] = {
    "bias": BASE.with_mixer(qkv_bias=True, out_bias=True),
    "bias of scaled branches": changed(BASE.with_mixer(out_bias=True), residual_scale=0.6),
    "window": BASE.with_mixer(window=9),
    "window of one": BASE.with_mixer(window=1),
    "sinks": BASE.with_mixer(sinks=True),
    "window, sinks, bias, cap": BASE.with_mixer(window=21, sinks=True, qkv_bias=True, soft_cap=2.0),
    "alibi in a window": TINY["mpt"].with_mixer(window=11),
    "part of a head turns": BASE.with_mixer(head_dim=12, position=rope(dim=8)),
    "linear": BASE.with_mixer(position=rope(scaling=LinearScaling(factor=3.0))),
    "factors": BASE.with_mixer(position=rope(scaling=FactorScaling(factors=(1.0, 1.5, 4.0, 7.0)))),
    "llama3": BASE.with_mixer(
        position=rope(
            scaling=Llama3Scaling(factor=5.0, low_freq_factor=0.5, high_freq_factor=3.0, original_max_seq_len=24)
        )
    ),
    "yarn": BASE.with_mixer(
        position=rope(
            scaling=YarnScaling(factor=3.0, original_max_seq_len=24, attention_factor=1.3, beta_fast=4.0, beta_slow=0.5)
        )
    ),
    "longrope": BASE.with_mixer(
        position=rope(
            scaling=LongRopeScaling(
                short_factors=(1.0, 1.1, 1.2, 1.3),
                long_factors=(1.0, 2.0, 4.0, 9.0),
                original_max_seq_len=24,
                short_scale=1.1,
                long_scale=1.4,
            )
        )
    ),
    "norm with a bias": changed(BASE, norm=NormSpec(kind="layer", bias=True)),
    "rms norm with a bias": changed(BASE, norm=NormSpec(kind="rms", bias=True)),
    "head with a bias": replace(BASE, head_bias=True),
    "norm after the rotation": BASE.with_mixer(qk_norm=QKNormSpec(over="head", eps=1e-5, after_rotation=True)),
}


@pytest.mark.parametrize("isa", HERE)
@pytest.mark.parametrize("name", PIECES)
def test_the_kernels_compute_what_torch_computes(name: str, isa: str) -> None:
    compiled, plain = make(PIECES[name], "float32", isa=isa)
    check(compiled, sequence(5, 37), [3, 9, 0], plain, 2**-21)


@pytest.mark.parametrize("name", [name for name in PIECES if name != "window of one"])
def test_each_piece_changes_the_answer(name: str) -> None:
    """What the comparison above is worth: without its piece the same weights say something else."""
    _, with_piece = make(PIECES[name], "float32")
    without: dict[str, Callable[[ModelConfig], ModelConfig]] = {
        "norm after the rotation": lambda c: c.with_mixer(qk_norm=QKNormSpec(over="head", eps=1e-5)),
        "part of a head turns": lambda c: c.with_mixer(position=rope()),
        "alibi in a window": lambda c: c.with_mixer(window=None),
    }
    other = without.get(name, lambda c: replace(BASE, layers=BASE.layers, final_norm=BASE.final_norm))(PIECES[name])
    if name == "bias of scaled branches":
        other = changed(BASE, residual_scale=0.6)
    if name.endswith("norm with a bias"):
        other = changed(BASE, norm=replace(PIECES[name].final_norm, bias=False))
    shared = with_piece.state_dict()
    plain = type(with_piece)(other)
    plain.load_state_dict({k: shared[k] for k in plain.state_dict()})
    tokens = torch.tensor(sequence(5, 37))
    with torch.inference_mode():
        a, b = (model(tokens, PackedContext([37])).logits for model in (with_piece, plain))
    assert float((a - b).abs().max()) > 1e-3 * float(a.abs().max())


LONG = {
    "window across chunks": replace(BASE, max_seq_len=700).with_mixer(window=70),
    "wide window and sinks": replace(BASE, max_seq_len=700).with_mixer(window=300, sinks=True),
    "sinks": replace(BASE, max_seq_len=700).with_mixer(sinks=True),
}


@pytest.mark.parametrize("isa", HERE)
@pytest.mark.parametrize("name", LONG)
def test_long_texts_too(name: str, isa: str) -> None:
    compiled, plain = make(LONG[name], "float32", isa=isa)
    check(compiled, sequence(8, 600), list(range(38)), plain, 2**-20)


@pytest.mark.parametrize("isa", HERE)
@pytest.mark.parametrize("kv_format", ["float32", "bfloat16", "q8"])
@pytest.mark.parametrize("name", LONG)
def test_a_result_does_not_depend_on_how_a_text_is_cut(name: str, kv_format: str, isa: str) -> None:
    compiled, _ = make(LONG[name], "float32", isa=isa, kv_format=kv_format, n_blocks=90)
    tokens, other = sequence(8, 600), sequence(9, 300)
    blocks = list(range(38))
    whole = logits_of(compiled, batch([(tokens, 0, blocks)]))
    own = [block + 40 for block in blocks]
    pieces = []
    at = 0
    for n in (7, 100, 256, 30, *[1] * 10, 5, 192):  # few new tokens, a query block, decoding, drafts
        beside = (other[:3], 0, [80])
        got = logits_of(compiled, batch([(tokens[at : at + n], at, own), beside]))
        pieces.append(got[:n])
        at += n
    assert at == len(tokens)
    assert torch.equal(torch.cat(pieces), whole)


@pytest.mark.parametrize("isa", HERE)
@pytest.mark.parametrize("kv_format", ["float32", "bfloat16", "q8"])
def test_blocks_before_the_window_are_not_read(kv_format: str, isa: str) -> None:
    """Their places in the table hold no block any more, and what other blocks hold is no number."""
    window, n = 70, 600
    compiled, _ = make(LONG["window across chunks"], "float32", isa=isa, kv_format=kv_format, n_blocks=40)
    tokens, blocks = sequence(8, n + 12), list(range(1, 40))
    logits_of(compiled, batch([(tokens[:n], 0, blocks)]))
    wanted = [logits_of(compiled, batch([(tokens[n : n + k], n, blocks)])) for k in (1, 5, 12)]
    first = (n - window + 1) // 16
    compiled._kv[: first + 1] = 0xFF  # NaN in every format
    holes = [-1] * first + blocks[first:]
    for k, logits in zip((1, 5, 12), wanted, strict=True):
        assert torch.equal(logits_of(compiled, batch([(tokens[n : n + k], n, holes)])), logits)


def by_hand(q: Tensor, k: Tensor, v: Tensor, scale: float, window: int | None, sinks: Tensor | None) -> np.ndarray:
    """(T, H, d): one query and one head at a time, in float64."""
    q, k, v = (t.double().numpy() for t in (q, k, v))
    out = np.zeros_like(q)
    for t in range(len(q)):
        for h in range(q.shape[1]):
            keys = [s for s in range(t + 1) if window is None or t - s < window]
            kind = h // (q.shape[1] // k.shape[1])
            scores = [scale * float(q[t, h] @ k[s, kind]) for s in keys]
            weights = np.exp(np.array(scores))
            total = weights.sum() + (0.0 if sinks is None else np.exp(float(sinks[h])))
            out[t, h] = sum(w / total * v[s, kind] for w, s in zip(weights, keys, strict=True))
    return out


def drawn(n: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(2)
    q, k, v = (torch.randn(n, heads, 10, generator=generator, dtype=dtype) for heads in (6, 2, 2))
    return q, k, v, torch.randn(6, generator=generator, dtype=dtype)


@pytest.mark.parametrize("with_sinks", [False, True])
@pytest.mark.parametrize("window", [None, 1, 5, 16])
def test_torch_computes_what_loops_compute(window: int | None, with_sinks: bool) -> None:
    q, k, v, sinks = drawn(23)
    scoring = Scoring(0.4, window=window, sinks=sinks if with_sinks else None)
    expected = torch.from_numpy(by_hand(q, k, v, 0.4, window, scoring.sinks))
    torch.testing.assert_close(PackedContext([23]).attend(0, q, k, v, scoring), expected, rtol=0, atol=1e-12)
    heads = [t.transpose(0, 1)[None] for t in (q, k, v)]
    last = scoring.attention(heads[0][:, :, -3:], *heads[1:])[0].transpose(0, 1)  # the last of more keys
    torch.testing.assert_close(last, expected[-3:], rtol=0, atol=1e-12)
    one = scoring.attention(heads[0][:, :, -1:], *heads[1:])[0].transpose(0, 1)
    torch.testing.assert_close(one, expected[-1:], rtol=0, atol=1e-12)
    at = torch.tensor([[22]])  # positions given, as a padded batch gives them
    one = scoring.attention(heads[0][:, :, -1:], *heads[1:], q_positions=at)[0].transpose(0, 1)
    torch.testing.assert_close(one, expected[-1:], rtol=0, atol=1e-12)


def test_gradients_reach_the_sinks() -> None:
    q, k, v, sinks = (t.requires_grad_() for t in drawn(7))

    def attend(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor) -> Tensor:
        heads = (t.transpose(0, 1)[None] for t in (q, k, v))
        return ops.attention(*heads, scale=0.4, window=3, sinks=sinks)

    assert torch.autograd.gradcheck(attend, (q, k, v, sinks))


@pytest.mark.parametrize("window", [3, 70, 200])
def test_training_sees_the_same_window(window: int) -> None:
    """Documents beside each other, over several blocks of queries: values and gradients."""
    lengths, bounds = [150, 9, 181], [0, 150, 159, 340]
    q, k, v, _ = (t.requires_grad_() for t in drawn(340, torch.float32))
    fused = training.document_attention(q, k, v, bounds, scale=0.4, window=window)
    plain = PackedContext(lengths).attend(0, q, k, v, Scoring(0.4, window=window))
    torch.testing.assert_close(fused, plain, rtol=0, atol=2e-6)
    weight = torch.randn(fused.shape, generator=torch.Generator().manual_seed(3))
    for mine, theirs in zip(
        torch.autograd.grad((fused * weight).sum(), (q, k, v)),
        torch.autograd.grad((plain * weight).sum(), (q, k, v)),
        strict=True,
    ):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=2e-5)
