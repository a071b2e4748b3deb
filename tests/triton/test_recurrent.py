"""Recurrent layers beside the reference: whole texts, pieces of them, states in slots, several sequences."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from quadriga.kernels import reference
from quadriga.kernels.triton.recurrent import DeltaRule, Sequences, causal_conv, delta_rule, gated_norm
from tests.triton.drawn import drawn, ints


@dataclass
class Piece:
    n_tokens: int
    before: int
    after: int


# A text that begins, one token that goes on in place, more than a chunk from one slot into another, and a short one.
PIECES = [Piece(40, -1, 3), Piece(1, 1, 1), Piece(71, 0, 5), Piece(2, 4, 4)]


def sequences(pieces: list[Piece]) -> Sequences:
    starts = [0]
    for piece in pieces:
        starts.append(starts[-1] + piece.n_tokens)
    of_tokens = [i for i, piece in enumerate(pieces) for _ in range(piece.n_tokens)]
    return Sequences(
        ints(*starts), ints(*of_tokens), ints(*(p.before for p in pieces)), ints(*(p.after for p in pieces))
    )


def states(shape: tuple[int, ...]) -> Tensor:
    return drawn(6, *shape, seed=20)


@pytest.mark.parametrize("way", ["plain", "silu", "gated twice"])
def test_convolutions_of_several_sequences(way: str) -> None:
    width, taps = 20, drawn(20, 4, seed=2)
    rows, n = drawn(114, 3 * width), 114
    b, c, x = rows.chunk(3, dim=1)
    state, kept = states((3, width)), states((3, width))
    given = {"plain": {}, "silu": {"silu": True}, "gated twice": {"gates": b, "outer": c}}[way]
    out = causal_conv(x, taps, state, sequences(PIECES), **given)  # type: ignore[arg-type]
    at = 0
    for piece in PIECES:
        part = slice(at, at + piece.n_tokens)
        own = x[part] * b[part] if way == "gated twice" else x[part]
        before = torch.zeros(3, width) if piece.before < 0 else kept[piece.before]
        made = reference.causal_conv(own, taps, before)
        made = F.silu(made) if way == "silu" else made * c[part] if way == "gated twice" else made
        torch.testing.assert_close(out[part], made, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(state[piece.after], torch.cat((before, own))[-3:], rtol=0, atol=0)
        at += piece.n_tokens
    assert at == n and torch.equal(state[2], kept[2])


G, H, DK, DV = 2, 6, 12, 18


def rule(tiled: bool, log_rate: bool) -> DeltaRule:
    rate = drawn(H, seed=3).abs() * 0.5
    return DeltaRule(
        n_k_heads=G, n_v_heads=H, k_dim=DK, v_dim=DV, rate=rate.log() if log_rate else -rate, dt=drawn(H, seed=4),
        log_rate=log_rate, tiled=tiled,
    )  # fmt: skip


def expected(qkv: Tensor, ba: Tensor, by: DeltaRule, state: Tensor) -> tuple[Tensor, Tensor]:
    q, k, v = qkv.split([G * DK, G * DK, H * DV], 1)
    q, k = (t.view(-1, G, DK) for t in (q, k))
    q, k = (t.repeat(1, H // G, 1) if by.tiled else t.repeat_interleave(H // G, 1) for t in (q, k))
    rate = by.rate.exp() if by.log_rate else -by.rate
    b, a = ba.split(H, 1)
    return reference.delta_rule(q, k, v.view(-1, H, DV), -rate * F.softplus(a + by.dt), b.sigmoid(), state)


@pytest.mark.parametrize("chunked", [False, True])
@pytest.mark.parametrize(("tiled", "log_rate"), [(False, True), (True, False)])
def test_the_delta_rule_of_several_sequences(chunked: bool, tiled: bool, log_rate: bool) -> None:
    by, qkv, ba = rule(tiled, log_rate), drawn(114, 2 * G * DK + H * DV), drawn(114, 2 * H, seed=2)
    state, kept = states((H, DK, DV)), states((H, DK, DV))
    out = delta_rule(qkv, ba, by, state, sequences(PIECES), chunked=chunked)
    at = 0
    for piece in PIECES:
        part = slice(at, at + piece.n_tokens)
        before = torch.zeros(H, DK, DV) if piece.before < 0 else kept[piece.before]
        made, after = expected(qkv[part], ba[part], by, before)
        torch.testing.assert_close(out[part], made, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(state[piece.after], after, rtol=1e-5, atol=1e-5)
        at += piece.n_tokens
    assert torch.equal(state[2], kept[2])


def test_token_by_token_a_text_may_be_cut_anywhere() -> None:
    """To the bit; and a sequence alone is what it is in a crowd."""
    by, qkv, ba = rule(False, True), drawn(114, 2 * G * DK + H * DV), drawn(114, 2 * H, seed=2)
    whole = states((H, DK, DV))
    crowd = delta_rule(qkv, ba, by, whole, sequences(PIECES), chunked=False)
    state, rows = states((H, DK, DV)), slice(41, 112)
    pieces = []
    for start, stop, before in ((41, 42, 0), (42, 60, 5), (60, 112, 5)):
        part = sequences([Piece(stop - start, before, 5)])
        pieces.append(delta_rule(qkv[start:stop], ba[start:stop], by, state, part, chunked=False))
    assert torch.equal(torch.cat(pieces), crowd[rows]) and torch.equal(state[5], whole[5])


def test_heads_are_normed_and_gated() -> None:
    x, z, weight = drawn(5, H, DV), drawn(5, H * DV + 7, seed=2)[:, 7:], drawn(DV, seed=3)
    wanted = reference.norm(x, weight, "rms", 1e-3).flatten(1) * F.silu(z)
    torch.testing.assert_close(gated_norm(x, z, weight, 1e-3), wanted, rtol=1e-5, atol=1e-5)
