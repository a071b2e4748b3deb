"""Attention within packed documents on a GPU: one call a layer, with the arguments that torch's operation asks for."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from quadriga.nn.context import Scoring
from quadriga.train import context
from quadriga.train.batch import TrainingBatch
from quadriga.train.context import DocumentContext
from quadriga.train.row_group import RowGroup
from tests.train import runs


def varlen_attn(
    q: Tensor, k: Tensor, v: Tensor, ends_q: Tensor, ends_k: Tensor, most_q: int, most_k: int, **how: Any
) -> Tensor:
    """What ``torch.nn.attention.varlen.varlen_attn`` says it computes: the last queries see the last key."""
    (left, right), group = how["window_size"], q.shape[1] // k.shape[1]
    assert how["enable_gqa"] is (group > 1) and ends_q.dtype == ends_k.dtype == torch.int32
    assert (int(ends_q.diff().max()), int(ends_k.diff().max())) == (most_q, most_k)
    assert int(ends_q[-1]) == len(q) and int(ends_k[-1]) == len(k) == len(v)
    out = []
    for (a, b), (c, d) in zip(pairwise(ends_q.tolist()), pairwise(ends_k.tolist()), strict=True):
        for i in range(a, b):
            at = i - b + d  # the query's own key
            keys = [j for j in range(c, d) if j <= at + right and (left < 0 or j >= at - left)]
            heads = []
            for head in range(q.shape[1]):
                scores = torch.stack([q[i, head] @ k[j, head // group] for j in keys]) * how["scale"]
                heads.append(scores.softmax(0) @ v[keys, head // group])
            out.append(torch.stack(heads))
    return torch.stack(out)


def parts() -> list[tuple[TrainingBatch, Tensor]]:
    """Rows, whole and of two ranks that share them, with the numbers of the own tokens."""
    whole = runs.source(n_rows=3).rows(0, 0, 3)
    n, found = len(whole.tokens), [(whole, torch.arange(len(whole.tokens)))]
    for part in range(2):
        group = RowGroup(n_context=2, part=part)
        found.append((whole.part(group), torch.cat([torch.arange(*span) for span in group.spans(n)])))
    return found


@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("n_kv_heads", [2, 6])
def test_one_call_computes_what_a_call_for_each_document_does(
    monkeypatch: pytest.MonkeyPatch, window: int | None, n_kv_heads: int
) -> None:
    monkeypatch.setattr(context.varlen, "varlen_attn", varlen_attn)
    generator = torch.Generator().manual_seed(3)
    scoring = Scoring(0.31, window=window)
    for batch, own in parts():
        n = int(batch.bounds[-1])
        q, k, v = (torch.randn(n, heads, 8, generator=generator) for heads in (6, n_kv_heads, n_kv_heads))
        found = []
        for at_once in (True, False):
            monkeypatch.setattr(context, "_fits_varlen", lambda *_, fits=at_once: fits)
            made = DocumentContext(batch)
            made._fused = False
            found.append(made.attend(0, q[own], k, v, scoring))
        made._fused = True
        torch.testing.assert_close(found[0], found[1], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(found[0], made.attend(0, q[own], k, v, scoring), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("change", "fits"),
    [
        ({}, True),
        ({"dtype": torch.float32}, False),
        ({"head_dim": 12}, False),
        ({"head_dim": 264}, False),
        ({"value_dim": 24}, False),
        ({"soft_cap": 30.0}, False),
        ({"sinks": torch.zeros(6)}, False),
        ({"alibi_slopes": torch.ones(6)}, False),
        ({"window": 7}, True),
        ({"device": "cpu"}, False),
    ],
)
def test_what_flash_attention_does_not_compute_stays_a_call_for_each_document(
    change: dict[str, Any], fits: bool
) -> None:
    given: dict[str, Any] = {"dtype": torch.bfloat16, "head_dim": 16, "value_dim": 16, "device": "meta", **change}
    if "head_dim" in change:
        given["value_dim"] = given["head_dim"]
    how = {"dtype": given.pop("dtype"), "device": given.pop("device")}
    q, v = torch.empty(5, 6, given.pop("head_dim"), **how), torch.empty(5, 2, given.pop("value_dim"), **how)
    assert context._fits_varlen(q, v, Scoring(0.3, **given)) is fits
