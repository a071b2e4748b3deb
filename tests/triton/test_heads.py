"""What becomes of a projection before it attends, beside the steps of ``nn.attention``."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from quadriga.kernels import reference
from quadriga.kernels.triton.heads import Heads, prepare, rotation_table
from quadriga.kernels.triton.latent import prepare_latent
from quadriga.kernels.triton.norm import NormWeights
from tests.triton.drawn import drawn, ints

FREQUENCIES = torch.tensor([1.0, 0.31, 0.02, 0.0007])
PLAIN = Heads(n_heads=6, n_kv_heads=2, head_dim=8)
TABLE = rotation_table(FREQUENCIES, 1.3, 4001)
TURNED = replace(PLAIN, rotation=TABLE)
KINDS = {
    "as they are": PLAIN,
    "bias": replace(PLAIN, bias=drawn(80, seed=9)),
    "clip": replace(PLAIN, clip=0.8),
    "rotated": TURNED,
    "a part is rotated": replace(TURNED, head_dim=12),
    "norm of heads": replace(TURNED, q_norm=drawn(8, seed=3), k_norm=drawn(8, seed=4), norm_eps=1e-3, clip=0.9),
    "norm of all heads": replace(
        TURNED, q_norm=drawn(48, seed=3), k_norm=drawn(16, seed=4), norm_eps=1e-3, clip=0.9, bias=drawn(80, seed=9)
    ),
    "norm of all heads, not rotated": replace(PLAIN, q_norm=drawn(48, seed=3), k_norm=drawn(16, seed=4), norm_eps=1e-3),
    "late norm": replace(
        TURNED, q_norm=drawn(8, seed=3), k_norm=drawn(8, seed=4), norm_eps=1e-3, norm_late=True, clip=0.9
    ),
    "gates": replace(TURNED, gated=True, bias=drawn(128, seed=9)),
}


def turned(x: Tensor, positions: Tensor, heads: Heads) -> Tensor:
    if heads.rotation is None:
        return x
    n, angles = 2 * len(FREQUENCIES), positions[:, None, None].float() * FREQUENCIES
    cos, sin = angles.cos() * 1.3, angles.sin() * 1.3
    return torch.cat((reference.rope(x[..., :n], cos, sin), x[..., n:]), dim=-1)


def expected(qkv: Tensor, positions: Tensor, heads: Heads) -> list[Tensor]:
    h, k, d = heads.n_heads, heads.n_kv_heads, heads.head_dim
    x = qkv if heads.bias is None else qkv + heads.bias
    out = []
    for part, weight in zip(
        x[:, : (h + 2 * k) * d].split([h * d, k * d, k * d], 1), (heads.q_norm, heads.k_norm, None), strict=True
    ):
        is_value = len(out) == 2

        def normed(y: Tensor, weight: Tensor | None = weight) -> Tensor:
            return (
                y
                if weight is None
                else reference.norm(y.reshape(len(y), -1, len(weight)), weight, "rms", heads.norm_eps).reshape(y.shape)
            )

        y = part if heads.norm_late else normed(part)
        y = (y if heads.clip is None else y.clamp(-heads.clip, heads.clip)).reshape(len(y), -1, d)
        y = y if is_value else turned(y, positions, heads)
        out.append(normed(y) if heads.norm_late else y)
    return out


@pytest.mark.parametrize("name", KINDS)
def test_heads_are_prepared_as_the_model_says(name: str) -> None:
    heads = KINDS[name]
    qkv, positions, slots = drawn(5, heads.width), ints(0, 3, 129, 4000, 7), ints(20, 3, -1, 0, 47)
    keys, values = torch.zeros(48, 2, heads.head_dim), torch.zeros(48, 2, heads.head_dim)
    q = prepare(qkv, heads, positions, slots, keys, values)
    stored = slots[slots >= 0].long()
    wanted_q, wanted_k, wanted_v = expected(qkv, positions, heads)
    for got, wanted in ((q, wanted_q), (keys[stored], wanted_k[slots >= 0]), (values[stored], wanted_v[slots >= 0])):
        torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)
    others = [i for i in range(48) if i not in stored.tolist()]
    assert not keys[others].any() and not values[others].any()


def test_each_step_changes_something() -> None:
    qkv, positions = drawn(5, PLAIN.width), ints(5, 3, 129, 4000, 7)
    results = [
        torch.cat(expected(drawn(5, heads.width) if heads.gated else qkv, positions, heads), 1)
        for heads in KINDS.values()
        if heads.head_dim == 8
    ]
    for i, one in enumerate(results):
        assert all(not torch.equal(one, other) for other in results[:i])


def test_latents_are_normed_and_the_shared_key_is_rotated() -> None:
    n, h, nope, rank = 5, 3, 10, 24
    q, latent, positions, slots = (
        drawn(n, h, nope + 8),
        drawn(n, rank + 8, seed=2),
        ints(0, 3, 129, 40, 7),
        ints(20, 3, -1, 0, 47),
    )
    queries, keys = torch.zeros(n, h, rank + 8), torch.zeros(48, 1, rank + 8)
    weight = drawn(rank, seed=3)
    prepare_latent(q, latent, queries, TABLE, NormWeights(weight, "rms", 1e-3), positions, slots, keys)
    turn = replace(TURNED, head_dim=8)
    torch.testing.assert_close(queries[..., rank:], turned(q[..., nope:], positions, turn), rtol=1e-5, atol=1e-5)
    assert not queries[..., :rank].any()
    key = torch.cat(
        (reference.norm(latent[:, :rank], weight, "rms", 1e-3), turned(latent[:, None, rank:], positions, turn)[:, 0]),
        1,
    )
    stored = slots[slots >= 0].long()
    torch.testing.assert_close(keys[stored, 0], key[slots >= 0], rtol=1e-5, atol=1e-5)
    assert not keys[[i for i in range(48) if i not in stored.tolist()]].any()
