"""Shared-prefix scoring: the same numbers as one sequence at a time, whatever is shared, cut or packed."""

from __future__ import annotations

import random

import pytest
import torch

from quadriga import LLM
from quadriga.engine import scoring
from quadriga.engine.scoring import Scored, score
from quadriga.errors import RequestError
from quadriga.kernels.arrays import arrays
from quadriga.nn.transformer import Transformer, random_parameters
from quadriga.runners.base import PassResult
from quadriga.runners.compiled import CompiledModel, pack_parameters
from quadriga.runners.torch import TorchRunner
from tests.checkpoint.models import TINY

Pair = tuple[list[int], list[int]]

EACH = 6e-5
"""Of a token's log-probability of about -8, float32, from products of other shapes; a sum of n has n times as much."""


def compiled(n_blocks: int = 64, kv_format: str = "float32") -> LLM:
    """A tiny DBRX on the CPU's kernels."""
    torch.manual_seed(0)
    config = TINY["dbrx"]
    parameters = pack_parameters(arrays(random_parameters(config, std=0.4)), "float32")
    return LLM(CompiledModel(config, parameters, threads=1, n_blocks=n_blocks, kv_format=kv_format), None)


@pytest.fixture(scope="module", params=["kernels", "torch"])
def llm(request: pytest.FixtureRequest) -> LLM:
    if request.param == "kernels":
        return compiled()
    torch.manual_seed(0)
    config = TINY["dbrx"]
    return LLM(TorchRunner(Transformer.from_parameters(config, random_parameters(config, std=0.4))), None)


def alone(llm: LLM, context: list[int], continuation: list[int]) -> Scored:
    """One pair from all logits of its own sequence."""
    logits = torch.from_numpy(llm.logits([*context, *continuation])[len(context) - 1 : -1])
    own = logits.log_softmax(-1).gather(1, torch.tensor(continuation)[:, None])[:, 0]
    return Scored(tuple(own.tolist()), bool((logits.argmax(-1) == torch.tensor(continuation)).all()))


def check(llm: LLM, pairs: list[Pair]) -> None:
    free = llm.engine.scheduler.pool.n_free
    finished: list[int] = []
    found = score(llm.engine, pairs, done=finished.append)
    for pair, one in zip(pairs, found, strict=True):
        expected = alone(llm, *pair)
        assert one.logprobs == pytest.approx(expected.logprobs, abs=EACH)
        assert (one.greedy, one.n_tokens) == (expected.greedy, len(pair[1]))
        assert one.logprob == pytest.approx(sum(expected.logprobs), abs=EACH * max(2, len(pair[1])))
    assert sum(finished) == len(pairs)
    assert llm.engine.scheduler.pool.n_free == free, "every block came back"
    llm.engine.scheduler.check()


def ids(n: int, seed: int) -> list[int]:
    chosen = random.Random(seed)
    return [chosen.randrange(97) for _ in range(n)]


def test_shared_contexts_of_every_length_around_a_block(llm: LLM) -> None:
    pairs = [
        (ids(n, 1), ids(m, 100 * n + m + c)) for n in (1, 15, 16, 17, 31, 32, 33) for m in (1, 2, 18) for c in range(3)
    ]
    check(llm, pairs)


def test_contexts_that_are_prefixes_of_others_and_repeats(llm: LLM) -> None:
    base = ids(40, 2)
    pairs = [(base[:20], base[20:25]), (base[:25], base[25:26]), (base[:20], base[20:25]), (base[:39], [base[39]])]
    pairs += [(base[:20], [7]), (base[:20], [7]), (base, [1, 2, 3])]
    check(llm, pairs)


def test_contexts_that_part_anywhere_within_a_block(llm: LLM) -> None:
    base = ids(40, 5)
    parted = [[*base[:i], (base[i] + 1) % 97, *base[i + 1 :]] for i in (0, 1, 7, 8, 15, 16, 17, 23, 24, 31, 32, 39)]
    check(llm, [(context, [3, 4]) for context in [base, *parted]])


def test_what_is_shared_is_computed_once() -> None:
    """Counted in tokens: a context and its continuations' ends, not a context for each."""
    llm = compiled()
    seen: list[int] = []
    forward = llm.runner.forward
    llm.runner.forward = lambda batch, **wanted: seen.append(len(batch.tokens)) or forward(batch, **wanted)  # type: ignore[func-returns-value, method-assign]
    base = ids(48, 6)
    score(llm.engine, [(base, [1]), (base, [2]), (base, [3])])
    assert sum(seen) == 48, "one context; a last token is never read"
    seen.clear()
    score(llm.engine, [(base, [1, 5, 6]), ([*base[:32], 9, 9], [2, 7])])
    assert sum(seen) == 34 + 16 + 2 + 1, "what they share in whole blocks once, the ends of both"


def test_a_greedy_continuation_is_marked(llm: LLM) -> None:
    context = ids(21, 3)
    best: list[int] = []
    for _ in range(4):
        best.append(int(llm.logits([*context, *best])[-1].argmax()))
    wrong = [*best[:3], (best[3] + 1) % 97]
    first, second = score(llm.engine, [(context, best), (context, wrong)])
    assert (first.greedy, second.greedy) == (True, False)


@pytest.mark.parametrize(("tokens", "rows"), [(5, 512), (1024, 3), (7, 2)])
def test_small_passes_change_nothing(llm: LLM, monkeypatch: pytest.MonkeyPatch, tokens: int, rows: int) -> None:
    monkeypatch.setattr(scoring, "PASS_TOKENS", tokens)
    monkeypatch.setattr(scoring, "MOST_ROWS", rows)
    shared = ids(18, 4)
    check(llm, [([*shared, *ids(n, n)], ids(m, n + m)) for n in (0, 3, 13) for m in (1, 4, 20)])


def test_kernels_give_the_same_bits_in_any_packing(monkeypatch: pytest.MonkeyPatch) -> None:
    llm, shared = compiled(), ids(30, 5)
    pairs = [([*shared, *ids(n, n)], ids(m, m)) for n in (0, 1, 9) for m in (1, 3, 6)]
    together = score(llm.engine, pairs)
    monkeypatch.setattr(scoring, "PASS_TOKENS", 6)
    assert score(llm.engine, list(reversed(pairs)))[::-1] == together
    assert [score(llm.engine, [pair])[0] for pair in pairs] == together


@pytest.mark.parametrize("kv_format", ["bfloat16", "q8"])
def test_copied_blocks_keep_their_format(kv_format: str) -> None:
    llm = compiled(kv_format=kv_format)
    check(llm, [(ids(21, 6), ids(3, i)) for i in range(4)])


def test_shared_prefixes_are_computed_once(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    forward = llm.runner.forward

    def counting(batch: object) -> PassResult:
        seen.append(len(batch.tokens))  # type: ignore[attr-defined]
        return forward(batch)  # type: ignore[arg-type]

    monkeypatch.setattr(llm.runner, "forward", counting)
    context = ids(35, 7)
    score(llm.engine, [(context, [i]) for i in range(4)])
    assert seen == [35], "four one-token choices cost their context once"
    seen.clear()
    score(llm.engine, [(context, [i, 1, 2]) for i in range(4)])
    assert seen == [35, 8], "and longer ones their own tokens but the last"
    seen.clear()
    score(llm.engine, [([*context[:32], 1], [2]), ([*context[:32], 2], [2])])
    assert seen == [34], "another question after the same 32 shots: one token more"


def test_a_cache_that_is_nearly_too_small_is_enough() -> None:
    llm = compiled(n_blocks=4)
    check(llm, [([*ids(33, 8), i], [*ids(4, i)]) for i in range(6)])


def test_what_is_refused() -> None:
    llm = compiled(n_blocks=2)
    with pytest.raises(RequestError, match="at least one token each"):
        score(llm.engine, [([1], [])])
    with pytest.raises(RequestError, match="from 0 to 96, got 1 to 97"):
        score(llm.engine, [([1], [97])])
    with pytest.raises(RequestError, match="do not fit into the free part"):
        score(llm.engine, [(ids(40, 9), [1])])
    assert llm.engine.scheduler.pool.n_free == 2
    most = llm.config.max_seq_len
    with pytest.raises(RequestError, match=f"a context of {most} scores at most {most + 1}"):
        score(llm.engine, [([1] * most, [1, 2])])
