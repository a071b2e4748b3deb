"""Attention over the paged cache, beside the reference over the same keys in a row; one token alone, and in a crowd."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from quadriga.kernels import reference
from quadriga.kernels.triton.attention import Attend, Tiles, attend_prompts
from quadriga.kernels.triton.attention_tokens import Meeting, attend_tokens, prepares_itself
from quadriga.kernels.triton.heads import Heads, prepare, rotation_table
from tests.triton.drawn import drawn, ints

PLAIN = Attend(n_heads=6, n_kv_heads=2, key_dim=8, value_dim=8, scale=0.4, max_seq_len=1300)
SINKS, SLOPES = drawn(6, seed=11), torch.tensor([0.5, 0.3, 0.1, 0.05, 0.02, 0.2])
KINDS = {
    "plain": PLAIN,
    "soft cap": replace(PLAIN, soft_cap=1.5),
    "slopes": replace(PLAIN, slopes=SLOPES),
    "sinks": replace(PLAIN, sinks=SINKS),
    "window": replace(PLAIN, window=70),
    "window of one": replace(PLAIN, window=1, sinks=SINKS),
    "wide window, all else": replace(PLAIN, window=600, soft_cap=2.0, slopes=SLOPES, sinks=SINKS),
    "every head its own keys": replace(PLAIN, n_kv_heads=6, key_dim=10, value_dim=10),
    "one key head": replace(PLAIN, n_kv_heads=1, key_dim=24, value_dim=24),
    "more heads than a tile": replace(PLAIN, n_heads=68, n_kv_heads=1),
    "latent": replace(PLAIN, n_kv_heads=1, key_dim=40, value_dim=32),
    "latent, more heads than a tile": replace(PLAIN, n_heads=20, n_kv_heads=1, key_dim=144, value_dim=136, scale=0.08),
}
N_BLOCKS = 110


def cache(attend: Attend) -> tuple[Tensor, Tensor | None]:
    keys = drawn(N_BLOCKS * 16, attend.n_kv_heads, attend.key_dim, seed=2)
    is_latent = attend.value_dim < attend.key_dim
    return keys, None if is_latent else drawn(N_BLOCKS * 16, attend.n_kv_heads, attend.value_dim, seed=3)


def tables(*lengths: int) -> Tensor:
    """Blocks of sequences so long, no block twice."""
    order = torch.randperm(N_BLOCKS, generator=torch.Generator().manual_seed(4)).tolist()
    rows = []
    for length in lengths:
        n = -(-length // 16)
        assert n <= len(order)
        rows.append(order[:n])
        order = order[n:]
    width = max(map(len, rows))
    return torch.tensor([row + [-1] * (width - len(row)) for row in rows], dtype=torch.int32)


def tiles(attend: Attend, counts: list[int]) -> Tiles:
    rows, tokens, sequences, start = [], [], [], 0
    for sequence, count in enumerate(counts):
        for first in range(0, count, attend.tile_tokens):
            rows.append(start + first)
            tokens.append(min(attend.tile_tokens, count - first))
            sequences.append(sequence)
        start += count
    return Tiles(ints(*rows), ints(*tokens), ints(*sequences))


def prompts(q: Tensor, attend: Attend, table: Tensor, spans: list[tuple[int, int]]) -> Tensor:
    """Tokens from ``start`` up to before ``stop`` of each sequence; q (N, H, key_dim)."""
    keys, values = cache(attend)
    positions = ints(*(p for start, stop in spans for p in range(start, stop)))
    return attend_prompts(q, keys, values, attend, table, positions, tiles(attend, [b - a for a, b in spans]))


def expected(q: Tensor, attend: Attend, table: Tensor, spans: list[tuple[int, int]]) -> Tensor:
    keys, values = cache(attend)
    out, at = [], 0
    for row, (start, stop) in zip(table, spans, strict=True):
        places = (row.long()[:, None] * 16 + torch.arange(16)).flatten()[:stop]
        k, v = keys[places], keys[places][..., : attend.value_dim] if values is None else values[places]
        heads = (t.transpose(0, 1)[None] for t in (q[at : at + stop - start], k, v))
        out.append(
            reference.attention(
                *heads, scale=attend.scale, soft_cap=attend.soft_cap, alibi_slopes=attend.slopes, window=attend.window,
                sinks=attend.sinks,
            )[0].transpose(0, 1)
        )  # fmt: skip
        at += stop - start
    return torch.cat(out)


@pytest.mark.parametrize("name", KINDS)
def test_prompts_equal_the_reference(name: str) -> None:
    """Ragged: a whole text, one token behind two splits, the end of one, and a text of one token."""
    attend = KINDS[name]
    spans = [(0, 37), (1040, 1041), (520, 534), (0, 1)]
    table, q = tables(*(stop for _, stop in spans)), drawn(53, attend.n_heads, attend.key_dim)
    torch.testing.assert_close(
        prompts(q, attend, table, spans), expected(q, attend, table, spans), rtol=1e-5, atol=2e-6
    )


@pytest.mark.parametrize("name", ["plain", "window", "wide window, all else", "latent, more heads than a tile"])
def test_a_token_is_the_same_read_or_written_alone_or_in_a_crowd(name: str) -> None:
    """To the bit: in a prompt, in pieces of it, and as one of several single tokens; page, tile and split edges."""
    attend = KINDS[name]
    places = [0, 64, 511, 512, 1100]
    length, keys, values = 1101, *cache(attend)
    table = tables(length)
    q = drawn(len(places), attend.n_heads, attend.key_dim)
    positions, slots = ints(*places), ints(*[-1] * len(places))
    meeting = Meeting([attend], len(places) + 1, "cpu")
    crowd = attend_tokens(
        q.flatten(1), keys, values, attend, table.expand(len(places), -1).contiguous(), positions, slots, meeting
    )
    assert not meeting.arrived.any(), "nobody waits for the next pass"
    for i, place in enumerate(places):
        one = q[i : i + 1]
        alone = attend_tokens(one.flatten(1), keys, values, attend, table, positions[i : i + 1], slots[:1], meeting)
        assert torch.equal(alone[0], crowd[i])
        # The last of a piece of the prompt, and its first.
        before = min(place, 9)
        piece = torch.cat((drawn(before, attend.n_heads, attend.key_dim, seed=7), one))
        assert torch.equal(prompts(piece, attend, table, [(place - before, place + 1)])[-1], crowd[i])
        behind = torch.cat((one, drawn(3, attend.n_heads, attend.key_dim, seed=8)))
        if place + 4 <= length:
            assert torch.equal(prompts(behind, attend, table, [(place, place + 4)])[0], crowd[i])


@pytest.mark.parametrize("name", ["plain", "window", "wide window, all else"])
def test_rows_that_nobody_has_are_zeros_and_blocks_that_nobody_sees_are_not_read(name: str) -> None:
    attend = KINDS[name]
    keys, values = cache(attend)
    assert values is not None
    table, q = tables(1100), drawn(2, 48)
    meeting = Meeting([attend], 2, "cpu")
    wanted = attend_tokens(q[1:], keys, values, attend, table, ints(1090), ints(-1), meeting)
    if attend.window is not None:
        given_up = (1090 - attend.window + 1) // 16
        for block in table[0, :given_up].tolist():
            keys[block * 16 : block * 16 + 16] = values[block * 16 : block * 16 + 16] = float("nan")
        table[0, :given_up] = -1
    out = attend_tokens(q, keys, values, attend, torch.cat((table, table)), ints(-1, 1090), ints(-1, -1), meeting)
    assert not out[0].any() and torch.equal(out[1:], wanted)


HEADS = Heads(
    n_heads=6, n_kv_heads=2, head_dim=8, rotation=rotation_table(torch.tensor([1.0, 0.31, 0.02, 0.0007]), 1.3, 1300),
    bias=drawn(128, seed=9), q_norm=drawn(8, seed=3), k_norm=drawn(8, seed=4), norm_eps=1e-3, clip=0.9, gated=True,
)  # fmt: skip


@pytest.mark.parametrize(
    "heads",
    [
        HEADS,
        replace(HEADS, q_norm=drawn(48, seed=3), k_norm=drawn(16, seed=4)),
        replace(HEADS, norm_late=True, gated=False, bias=None),
    ],
)
@pytest.mark.parametrize("name", ["plain", "wide window, all else"])
def test_single_tokens_prepare_themselves_as_prompts_are_prepared(heads: Heads, name: str) -> None:
    """To the bit, gates included: q, the keys and values that are stored, and the result."""
    attend, places = KINDS[name], [0, 33, 1039, 16]
    keys, values = cache(attend)
    assert values is not None and prepares_itself(attend)
    table, qkv = tables(*(p + 1 for p in places)), drawn(4, heads.width)
    positions = ints(*places)
    slots = ints(*(int(row[p // 16]) * 16 + p % 16 for row, p in zip(table, places, strict=True)))
    own_keys, own_values = keys.clone(), values.clone()
    out = attend_tokens(qkv, own_keys, own_values, attend, table, positions, slots, Meeting([attend], 4, "cpu"), heads)
    q = prepare(qkv, heads, positions, slots, keys, values)
    assert torch.equal(own_keys, keys) and torch.equal(own_values, values)
    gates = heads.gates(qkv)
    wanted = attend_prompts(q, keys, values, attend, table, positions, tiles(attend, [1] * 4), gates)
    assert torch.equal(out, wanted)
    ready = attend_tokens(
        q.flatten(1), keys, values, attend, table, positions, slots, Meeting([attend], 4, "cpu"), gates=gates
    )
    assert torch.equal(ready, wanted)
    if gates is not None:
        plain = attend_prompts(q, keys, values, attend, table, positions, tiles(attend, [1] * 4))
        opened = plain * (gates[0] + (0 if gates[1] is None else gates[1])).sigmoid().view(4, 6, 8)
        torch.testing.assert_close(out, opened, rtol=1e-5, atol=1e-6)


def test_splits_depend_on_the_model_alone() -> None:
    short, long = replace(PLAIN, max_seq_len=40), replace(PLAIN, max_seq_len=131072)
    assert (short.split, short.most_splits) == (512, 1)
    assert (long.split, long.most_splits) == (4096, 32)
    assert replace(long, window=4096).most_splits == 3
    assert replace(long, window=4096).split == 4096
