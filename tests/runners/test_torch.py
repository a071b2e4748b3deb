"""The plain torch runner: decoding from blocks equals reading everything at once, for every kind of attention."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from quadriga.kernels.arrays import arrays
from quadriga.model.config import (
    AlibiSpec,
    AttentionSpec,
    DenseSpec,
    MoESpec,
    NormSpec,
    RopeSpec,
    uniform_model,
)
from quadriga.nn.context import PackedContext
from quadriga.nn.transformer import Transformer, random_parameters
from quadriga.runners.compiled import CompiledModel, pack_parameters
from quadriga.runners.torch import TorchRunner
from tests.batches import batch, logits_of, passed

KINDS = ["dense", "moe", "alibi", "soft_cap"]


def build(kind: str) -> TorchRunner:
    config = uniform_model(
        family="test",
        vocab_size=97,
        d_model=48,
        n_layers=4,
        max_seq_len=300,
        norm=NormSpec(kind="rms"),
        mixer=AttentionSpec(
            n_heads=6,
            n_kv_heads=2,
            head_dim=8,
            soft_cap=3.0 if kind == "soft_cap" else None,
            position=AlibiSpec() if kind == "alibi" else RopeSpec(theta=1e4),
        ),
        ffn=DenseSpec(d_ff=80, activation="gelu")
        if kind == "dense"
        else MoESpec(d_ff=80, n_experts=5, top_k=3, activation="silu"),
    )
    # float64: what differs is then a mistake, not rounding.
    return TorchRunner(Transformer.from_parameters(config, random_parameters(config, std=0.3, dtype=torch.float64)), 40)


def whole(runner: TorchRunner, ids: list[int]) -> torch.Tensor:
    with torch.inference_mode():
        return runner.model(torch.tensor(ids), PackedContext([len(ids)])).logits


def random_ids(seed: int, n: int) -> list[int]:
    return torch.randint(0, 97, (n,), generator=torch.Generator().manual_seed(seed)).tolist()


@pytest.mark.parametrize("kind", KINDS)
def test_chunks_and_steps_equal_one_pass(kind: str) -> None:
    runner, ids, blocks = build(kind), random_ids(3, 279), [7, 1, 30, *range(8, 23)]
    pieces, start = [], 0
    for size in (1, 17, 1, 1, 239, 1, 19):
        pieces.append(logits_of(runner, batch([(ids[start : start + size], start, blocks)])))
        start += size
    torch.testing.assert_close(torch.cat(pieces), whole(runner, ids), rtol=0, atol=1e-11)


@pytest.mark.parametrize("kind", KINDS)
def test_a_ragged_batch_equals_one_by_one(kind: str) -> None:
    runner = build(kind)
    prompts, answers = [random_ids(4 + n, n) for n in (7, 1, 12)], [random_ids(50 + n, 5) for n in range(3)]
    tables = [[3, 9], [0], [20, 4]]
    prefill = logits_of(runner, batch([(p, 0, table) for p, table in zip(prompts, tables, strict=True)]))
    decoded = [
        logits_of(runner, batch([([a[t]], len(p) + t, b) for p, a, b in zip(prompts, answers, tables, strict=True)]))
        for t in range(5)
    ]
    start = 0
    for i, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        alone = whole(runner, prompt + answer)
        torch.testing.assert_close(prefill[start : start + len(prompt)], alone[: len(prompt)], rtol=0, atol=1e-11)
        torch.testing.assert_close(torch.stack([d[i] for d in decoded]), alone[len(prompt) :], rtol=0, atol=1e-11)
        start += len(prompt)


def test_positions_that_were_given_up_are_forgotten() -> None:
    runner, ids = build("moe"), list(range(20))
    logits_of(runner, batch([(ids[:10] + ids[:7], 0, [5, 6])]))
    rest = logits_of(runner, batch([(ids[10:], 10, [5, 6])]))
    torch.testing.assert_close(rest, whole(runner, ids)[10:], rtol=0, atol=1e-11)


@pytest.mark.parametrize("changes", [{}, {"normalize_p": None}, {"aggregate": "vote"}, {"aggregate": "fuse"}])
def test_both_runners_say_the_same_of_the_routers(changes: dict[str, Any]) -> None:
    """Ids, weights, probabilities and the logits they come from: one meaning each, whoever computed them."""
    config = build("moe").config.with_ffn(**changes)
    parameters = random_parameters(config, std=0.3)
    for name, values in parameters.items():
        if name.endswith("fuse.weight"):
            values.normal_(generator=torch.Generator().manual_seed(2))
    torch_runner = TorchRunner(Transformer.from_parameters(config, parameters), 4)
    kernels = CompiledModel(
        config, pack_parameters(arrays(parameters), "float32"), threads=2, n_blocks=4, kv_format="float32"
    )
    one_batch = batch([(random_ids(5, 33), 0, [3, 0, 2])])
    (_, theirs), (_, mine) = passed(torch_runner, one_batch), passed(kernels, one_batch)
    assert len(theirs) == len(mine) == 4
    for a, b in zip(mine, theirs, strict=True):
        assert torch.equal(a.expert_ids, b.expert_ids)
        for field in ("expert_weights", "probs", "logits"):
            one, other = getattr(a, field), getattr(b, field)
            assert one.dtype == other.dtype == torch.float32
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4, msg=lambda text, f=field: f"{f}: {text}")
        assert float(b.logits.logsumexp(-1).abs().max()) > 0.1, "logits that are not normalised already"


def test_expert_load_counts_every_choice_of_every_pass() -> None:
    runner, ids = build("moe"), random_ids(4, 40)
    counts = [np.zeros(5, dtype=np.int64) for _ in range(4)]
    for start, stop in ((0, 25), (25, 26), (26, 40)):
        for layer, stats in enumerate(passed(runner, batch([(ids[start:stop], start, [0, 1, 2])]))[1]):
            counts[layer] += np.bincount(stats.expert_ids.numpy().reshape(-1), minlength=5)
    assert [load.tolist() for load in runner.expert_load()] == [count.tolist() for count in counts]
    assert all(count.sum() == 40 * 3 for count in counts)
