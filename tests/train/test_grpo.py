"""GRPO compared with naive computations on whole logits; several updates on the same answers; rewards rise."""

from __future__ import annotations

import math
from collections.abc import Sequence
from types import SimpleNamespace

import pytest
import torch

from quadriga.model.adapter_spec import LoraSpec
from quadriga.nn.context import PackedContext
from quadriga.nn.lora import attach
from quadriga.train.batch import IGNORE
from quadriga.train.chat_data import Example, Problem
from quadriga.train.grpo import GRPO, AnswerBatch, answer_batch
from quadriga.train.model_sampler import ModelSampler
from quadriga.train.objectives import Drawing, Reference
from quadriga.train.packing import ExampleSource
from quadriga.train.rewards import Attempt
from quadriga.train.rollouts import Questions, Rollouts, advantages_of, between_rollouts
from quadriga.train.services import Weights
from quadriga.train.tune_config import GrpoSection
from quadriga.train.world import World
from tests.nn.test_lora import model_of
from tests.train.test_objectives import adapted, gradients, naive_logp, pair_batch


class Numbers:
    """A tokenizer of numbers: the text of an id is its number."""

    def is_token(self, token_id: int) -> bool:
        return True

    def decode(self, ids: Sequence[int], after: Sequence[int] = ()) -> str:
        return " ".join(map(str, ids))


def answers(advantages: Sequence[float]) -> tuple[AnswerBatch, list[tuple[list[int], int]]]:
    """Four answers, two of each of two questions; and their documents."""
    _, documents = pair_batch()
    made = answer_batch(
        [(ids[:prompt], ids[prompt:]) for ids, prompt in documents], advantages, n_questions=2, n_samples=2
    )
    return made, documents


def unsaid(documents: Sequence[tuple[list[int], int]]) -> list[int]:
    """Ids from 40 on that no answer has."""
    said = {token for ids, prompt in documents for token in ids[prompt:]}
    return [token for token in range(40, 97) if token not in said]


@pytest.mark.parametrize("with_copy", [False, True])
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_the_first_update_is_the_advantage_weighted_gradient_and_the_k3_penalty(
    temperature: float, with_copy: bool
) -> None:
    advantages = [1.5, -0.5, 0.0, 2.0]
    rolled, documents = answers(advantages)
    never = unsaid(documents)
    model, base = adapted(), model_of("mixtral")
    objective = GRPO(Reference(base if with_copy else None), Drawing(temperature, tuple(never)), kl_weight=0.4)
    loss, metrics = objective(model, rolled)
    loss.backward()
    got = [g.clone() for g in gradients(model)]
    model.zero_grad()
    wanted = torch.zeros((), dtype=torch.float64)
    policy = torch.zeros((), dtype=torch.float64)
    total = 0.0
    for (ids, prompt), a in zip(documents, advantages, strict=True):
        logp = naive_logp(model, ids, prompt, temperature, never)
        with torch.no_grad():
            reference = naive_logp(base, ids, prompt, temperature, never)
        kl = torch.exp(reference - logp) - (reference - logp) - 1
        assert (kl >= 0).all()
        wanted = wanted + (-a + 0.4 * kl.mean()) / 2
        policy = policy + (-a * logp.mean() + 0.4 * kl.mean()) / 2  # whose gradient is the policy gradient
        total += float(kl.detach().mean()) / 2
    torch.testing.assert_close(loss, wanted, rtol=1e-6, atol=1e-9)
    assert float(metrics["kl"]) == pytest.approx(total, rel=1e-6)
    policy.backward()
    for mine, theirs in zip(got, gradients(model), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-6, atol=1e-9)


def test_later_updates_clip_the_ratio_on_the_side_that_would_go_on() -> None:
    """Token by token: min(A r, A clip(r)); a clipped token has no gradient, an answer of A < 0 is clipped below."""
    advantages = [1.0, -2.0, 0.5, -1.0]
    rolled, documents = answers(advantages)
    model, old = adapted(), adapted(seed=3)
    objective = GRPO(Reference(None), Drawing(0.8), kl_weight=0.0, clip=(0.1, 0.3))
    objective(old, rolled)  # as they were sampled
    loss, metrics = objective(model, rolled)
    loss.backward()
    got = [g.clone() for g in gradients(model)]
    model.zero_grad()
    wanted = torch.zeros((), dtype=torch.float64)
    n_clipped, share = 0, 0.0
    for (ids, prompt), a in zip(documents, advantages, strict=True):
        now = naive_logp(model, ids, prompt, 0.8)
        with torch.no_grad():
            before = naive_logp(old, ids, prompt, 0.8)
        terms = []
        for one, other in zip(now, before, strict=True):
            ratio = torch.exp(one - other)
            beyond = ratio > 1.3 if a > 0 else ratio < 0.9
            terms.append(torch.tensor(a * (1.3 if a > 0 else 0.9), dtype=torch.float64) if beyond else a * ratio)
            n_clipped += bool(beyond)
            share += float(beyond) / (len(ids) - prompt) / 2  # of an answer's tokens, a mean over the samples
        wanted = wanted - torch.stack(terms).mean() / 2
    assert 0 < n_clipped < sum(len(ids) - prompt for ids, prompt in documents)
    assert float(metrics["clipped"]) == pytest.approx(share)
    torch.testing.assert_close(loss, wanted, rtol=1e-6, atol=1e-9)
    wanted.backward()
    for mine, theirs in zip(got, gradients(model), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("temperature", [1.0, 0.6, 1.7])
def test_it_follows_the_gradient_of_the_expected_reward_of_what_is_drawn(temperature: float) -> None:
    """Every answer of one token, weighted by the probability with which ``sample`` draws it: no estimate is left."""
    model = adapted()
    prompt, end = [5, 9, 11], 80
    never = [token for token in range(70, 97) if token != end]
    drawn = [token for token in range(97) if token not in never]
    rewards = torch.tensor([((7 * token) % 13) / 13 for token in drawn], dtype=torch.float64)
    logits = model(torch.tensor(prompt), PackedContext([3])).logits[-1, drawn]
    probabilities = (logits / temperature).softmax(-1)
    (probabilities * rewards).sum().backward()
    wanted = [g.clone() for g in gradients(model)]
    model.zero_grad()
    objective = GRPO(Reference(None), Drawing(temperature, tuple(never)), kl_weight=0.0)
    weights = len(drawn) * probabilities.detach() * rewards
    rolled = answer_batch(
        [(prompt, [token]) for token in drawn], [0.0] * len(drawn), n_questions=1, n_samples=len(drawn)
    )
    object.__setattr__(rolled, "advantages", weights)  # float64
    objective(model, rolled)[0].backward()
    for mine, theirs in zip(gradients(model), wanted, strict=True):
        torch.testing.assert_close(mine, -theirs, rtol=1e-6, atol=1e-12)


def test_advantages_are_what_stands_out_of_a_group() -> None:
    found = advantages_of([1.0, 0.0, 0.0, 1.0])
    assert found == pytest.approx([1.0, -1.0, -1.0, 1.0], rel=1e-3)
    assert advantages_of([0.1] * 3) == [0.0] * 3, "not 1e-13: that would be divided by 1e-4"


def test_several_updates_raise_the_reward() -> None:
    torch.manual_seed(0)
    model = model_of("mixtral", torch.float32, std=0.08)
    attach(model, LoraSpec(rank=4, alpha=8.0, targets=("embeddings", "head", "experts")))
    prompt = (5, 9, 11)

    def even(attempts: Sequence[Attempt]) -> list[float]:
        assert all(one.wanted == "even" and one.row == {"x": 1} and not one.finished for one in attempts)
        assert all(one.prompt == "5 9 11" for one in attempts)
        return [sum(int(word) % 2 == 0 for word in one.answer.split()) / 6 for one in attempts]

    problem = Problem(prompt, "even", {"x": 1})
    questions = Questions({prompt: problem}, Numbers(), even, frozenset())  # type: ignore[arg-type]
    section = GrpoSection(samples=8, max_new_tokens=6, kl_weight=0.0, updates=2, sampler="model")
    rollouts = Rollouts(model, ModelSampler(model, ()), questions, section, seed=3)
    source = ExampleSource(
        [(Example(prompt, (IGNORE, IGNORE, 11)),)], ("prompt",), n_rows=1, seq_len=8, weigh="groups", together=False
    )
    objective = GRPO(Reference(None), Drawing(), kl_weight=0.0)
    optimiser = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.02)
    rewards, clipped = [], 0.0
    for step in range(40):
        (batch,) = rollouts(step, [source.rows(step, 0, 1)])
        optimiser.zero_grad()
        loss, metrics = objective(model, batch)
        loss.backward()
        optimiser.step()
        rewards.append(float(metrics["reward"]))
        clipped += float(metrics["clipped"])
        if step % 2:
            assert rewards[-1] == rewards[-2], "the second update is on the same answers"
    # Half of the tokens are even: an untrained policy gets 0.5 +- 0.07 in 48 draws; ten steps' mean +- 0.03.
    assert sum(rewards[-10:]) / 10 > 0.8 > 0.65 > sum(rewards[:4]) / 4
    assert clipped > 0
    reward, said = rollouts.held_out([problem], World())
    assert reward.n == 1 and reward.reward > 0.8 and len(said) == 1


def test_answers_of_no_advantage_are_left_out_where_there_is_no_penalty() -> None:
    model = model_of("mixtral", torch.float32)
    one, two = (5, 9), (7, 3, 8)
    worth = iter([1.0, 1.0, 1.0, 0.0, 1.0, 0.0])
    questions = Questions(
        {ids: Problem(ids, "", {}) for ids in (one, two)},
        Numbers(),  # type: ignore[arg-type]
        lambda some: [next(worth) for _ in some],
        frozenset(),
    )
    section = GrpoSection(samples=3, max_new_tokens=2, kl_weight=0.0, sampler="model")
    rollouts = Rollouts(model, ModelSampler(model, ()), questions, section, seed=3)
    groups = [(Example(ids, (*[IGNORE] * (len(ids) - 1), ids[-1])),) for ids in (one, two)]
    source = ExampleSource(groups, ("prompt",), n_rows=2, seq_len=8, weigh="groups", together=False)
    batch = source.rows(0, 0, 2)
    (rolled,) = rollouts(0, [batch])
    assert isinstance(rolled, AnswerBatch) and rolled.target_weight() == 2
    assert len(rolled.bounds) == 4 and sorted(rolled.advantages.tolist())[0] < 0
    assert float(rolled.totals["reward"]) == pytest.approx(1 + 1 / 3)
    assert float(rolled.totals["mixed"]) == 1.0 and float(rolled.totals["answer_tokens"]) == 4.0
    assert math.isclose(sum(rolled.advantages.tolist()), 0.0, abs_tol=1e-5)


class Recorded:
    """A ``Sampler`` whose answers are the question's last id and the end; what it is asked is kept."""

    def __init__(self) -> None:
        self.asked: list[tuple[list[list[int]], dict[str, object]]] = []

    def load(self, weights: Weights) -> None:
        for _ in weights:
            pass

    def sample(self, prompts: Sequence[Sequence[int]], *, n: int, **how: object) -> list[list[list[int]]]:
        self.asked.append(([list(prompt) for prompt in prompts], {"n": n, **how}))
        return [[[prompt[-1], 2]] * n for prompt in prompts]


def test_seeds_of_answers_follow_from_run_rollout_and_question_alone() -> None:
    """So any number of ranks, and a resumed run, draw the same answers, and no two rollouts do."""
    first, second = (5, 9), (7, 3, 8)
    groups = [(Example(ids, (*[IGNORE] * (len(ids) - 1), ids[-1])),) for ids in (first, second)]

    def seeds(run: int, rollout: int, order: Sequence[int]) -> dict[tuple[int, ...], int]:
        sampler = Recorded()
        questions = Questions(
            {ids: Problem(ids, "", {}) for ids in (first, second)},
            Numbers(),  # type: ignore[arg-type]
            lambda some: [float(i) for i in range(len(some))],
            frozenset({2}),
        )
        section = GrpoSection(samples=3, max_new_tokens=4, temperature=0.7, sampler="model", updates=2)
        rollouts = Rollouts(model_of("mixtral", torch.float32), sampler, questions, section, seed=run)
        batches = [
            ExampleSource([groups[i]], ("prompt",), n_rows=1, seq_len=8, together=False).rows(0, 0, 1) for i in order
        ]
        made = rollouts(2 * rollout, batches)
        assert rollouts(2 * rollout + 1, batches) is made, "the second update is on the same answers"
        ((prompts, how),) = sampler.asked
        assert (how["n"], how["max_new_tokens"], how["temperature"]) == (3, 4, 0.7)
        return {tuple(ids): seed for ids, seed in zip(prompts, how["seeds"], strict=True)}  # type: ignore[call-overload]

    found = seeds(1, 0, (0, 1))
    assert seeds(1, 0, (1, 0)) == found and seeds(1, 0, (1,)) == {second: found[second]}
    every = [*found.values(), *seeds(1, 1, (0, 1)).values(), *seeds(2, 0, (0, 1)).values()]
    assert len(set(every)) == 6


def test_a_run_that_is_to_stop_goes_on_to_the_last_update_on_its_answers() -> None:
    trainer = SimpleNamespace(step=0)
    asked = iter([False, False, True])
    heeded = between_rollouts(lambda: next(asked), trainer, 3)  # type: ignore[arg-type]
    stops = []
    for trainer.step in range(6):
        stops.append(heeded())
    assert stops == [False, False, True, False, False, True], "asked once, it is not asked again"
    asked = iter([True])
    heeded = between_rollouts(lambda: next(asked), trainer, 3)  # type: ignore[arg-type]
    stops = []
    for trainer.step in range(3, 6):
        stops.append(heeded())
    assert stops == [False, False, True]
