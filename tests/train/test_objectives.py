"""DPO, ORPO and GRPO compared with naive computations on whole logits; samples with the model's probabilities."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

from quadriga.model.adapter_spec import LoraSpec
from quadriga.nn.context import PackedContext
from quadriga.nn.lora import attach
from quadriga.nn.transformer import Transformer
from quadriga.train.batch import IGNORE, TrainingBatch
from quadriga.train.chat_data import Example
from quadriga.train.config import RouterSection
from quadriga.train.losses import NextToken
from quadriga.train.objectives import DPO, GRPO, ORPO, Reference, _answers, without_adapter
from quadriga.train.packing import ExampleSource
from quadriga.train.rollout import number_reward, sample
from quadriga.train.world import World
from tests.nn.test_lora import ALL, model_of, random_factors

SPEC = LoraSpec(rank=4, alpha=6.0, targets=("attention", "experts", "router"))


def pair_batch() -> tuple[TrainingBatch, list[tuple[list[int], int]]]:
    """(a batch of two pairs and padding, each document's ids with the start of its answer)."""
    generator = torch.Generator().manual_seed(4)
    documents = []
    groups = []
    for prompt, chosen, rejected in ((5, 4, 7), (3, 6, 2)):
        start = torch.randint(3, 97, (prompt,), generator=generator).tolist()
        group = []
        for size in (chosen, rejected):
            ids = start + torch.randint(3, 97, (size,), generator=generator).tolist()
            targets = (*[IGNORE] * (prompt - 1), *ids[prompt:], IGNORE)
            group.append(Example(tuple(ids), targets))
            documents.append((ids, prompt))
        groups.append(tuple(group))
    source = ExampleSource(groups, ("chosen", "rejected"), n_rows=1, seq_len=48, weigh="groups")
    batch = source.rows(0, 0, 1)
    if batch.tokens[0] != documents[0][0][0]:
        documents = documents[2:] + documents[:2]
    return batch, documents


def naive_logp(
    model: Transformer, ids: list[int], prompt: int, temperature: float = 1.0, never: Sequence[int] = ()
) -> Tensor:
    """Log-probabilities of an answer's tokens, with the document run alone."""
    logits = model(torch.tensor(ids), PackedContext([len(ids)])).logits / temperature
    logits = logits.index_fill(1, torch.tensor(never, dtype=torch.int64), -math.inf)
    return logits[:-1].log_softmax(-1).gather(1, torch.tensor(ids[1:])[:, None])[prompt - 1 :, 0]


def adapted(seed: int = 0) -> Transformer:
    model = model_of("mixtral")
    made = attach(model, SPEC, random_factors(model.config, SPEC, seed))
    for one in made.values():
        one.double()
    return model.eval()


def gradients(model: Transformer) -> list[Tensor]:
    return [p.grad for p in model.parameters() if p.requires_grad and p.grad is not None]


@pytest.mark.parametrize("lora", [True, False])
@pytest.mark.parametrize("name", ["dbrx", "mixtral", "llama2-tied"])
def test_a_packed_step_is_the_sum_over_documents_read_alone(name: str, lora: bool) -> None:
    generator = torch.Generator().manual_seed(6)
    documents = []
    for prompt, answer in ((5, 4), (3, 9), (7, 2), (4, 4), (2, 12)):
        ids = torch.randint(3, 97, (prompt + answer,), generator=generator).tolist()
        documents.append((ids, prompt))
    groups = [(Example(tuple(i), (*[IGNORE] * (n - 1), *i[n:], IGNORE)),) for i, n in documents]
    source = ExampleSource(groups, ("conversation",), n_rows=2, seq_len=32)
    models = []
    for _ in range(2):
        model = model_of(name)
        if lora:
            spec = LoraSpec(rank=4, alpha=6.0, targets=ALL[name])
            for one in attach(model, spec, random_factors(model.config, spec)).values():
                one.double()
        models.append(model.train())
    objective = NextToken(models[0].config, RouterSection(balance_loss=0.0), World())
    total = torch.zeros((), dtype=torch.float64)
    weight = 0.0
    for row in range(2):  # accumulation: one row per micro-step
        batch = source.rows(0, row, row + 1)
        loss, _ = objective(models[0], batch)
        loss.backward()
        total, weight = total + loss.detach(), weight + batch.target_weight()
    assert weight == sum(len(ids) - prompt for ids, prompt in documents)
    wanted = -sum((naive_logp(models[1], *d).sum() for d in documents), torch.zeros((), dtype=torch.float64))
    wanted.backward()
    torch.testing.assert_close(total, wanted.detach(), rtol=1e-9, atol=0)
    theirs = dict(models[1].named_parameters())
    for parameter, mine in models[0].named_parameters():
        if mine.requires_grad:
            torch.testing.assert_close(mine.grad, theirs[parameter].grad, rtol=1e-6, atol=1e-11, msg=parameter)


@pytest.mark.parametrize("with_copy", [False, True])
def test_dpo_and_its_gradient_are_the_papers(with_copy: bool) -> None:
    batch, documents = pair_batch()
    model, base = adapted(), model_of("mixtral")
    loss, metrics = DPO(Reference(base if with_copy else None), 0.3)(model, batch)
    loss.backward()
    got = [g.clone() for g in gradients(model)]
    model.zero_grad()
    ours = [naive_logp(model, *d).sum() for d in documents]
    with torch.no_grad():
        before = [naive_logp(base, *d).sum() for d in documents]
    margins = [(ours[i] - before[i]) - (ours[i + 1] - before[i + 1]) for i in (0, 2)]
    wanted = sum(-torch.log(1 / (1 + torch.exp(-0.3 * m))) for m in margins)
    torch.testing.assert_close(loss, wanted, rtol=1e-9, atol=0)
    assert metrics["accuracy"] == sum(m > 0 for m in margins)
    wanted.backward()
    for mine, theirs in zip(got, gradients(model), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-6, atol=1e-12)
    assert math.isclose(batch.target_weight(), 2.0, rel_tol=1e-6), "the trainer divides by the number of pairs"


def test_orpo_and_its_gradient_are_the_papers() -> None:
    batch, documents = pair_batch()
    model = adapted()
    loss, _ = ORPO(0.7)(model, batch)
    loss.backward()
    got = [g.clone() for g in gradients(model)]
    model.zero_grad()
    means = [naive_logp(model, *d).mean() for d in documents]
    odds = [m.exp() / (1 - m.exp()) for m in means]
    wanted = sum(-means[i] - 0.7 * torch.log(torch.sigmoid(torch.log(odds[i] / odds[i + 1]))) for i in (0, 2))
    torch.testing.assert_close(loss, wanted, rtol=1e-9, atol=0)
    wanted.backward()
    for mine, theirs in zip(got, gradients(model), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize("with_copy", [False, True])
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_grpo_is_the_advantage_weighted_gradient_and_the_k3_penalty(temperature: float, with_copy: bool) -> None:
    _, documents = pair_batch()
    model, base = adapted(), model_of("mixtral")
    said = {token for ids, prompt in documents for token in ids[prompt:]}
    never = [token for token in range(40, 97) if token not in said]
    objective = GRPO(
        Reference(base if with_copy else None), lambda *_: 0.0, n_samples=2, max_new_tokens=1, temperature=temperature,
        kl_weight=0.4, end_ids=(), unused=never,
    )  # fmt: skip
    rolled = _answers([(ids[:prompt], ids[prompt:]) for ids, prompt in documents], torch.device("cpu"))
    advantages = torch.tensor([1.5, -0.5, 0.0, 2.0], dtype=torch.float64)
    loss = objective.loss(model, rolled, advantages)
    loss.backward()
    got = [g.clone() for g in gradients(model)]
    model.zero_grad()
    wanted = torch.zeros((), dtype=torch.float64)
    policy = torch.zeros((), dtype=torch.float64)
    for (ids, prompt), a in zip(documents, advantages, strict=True):
        logp = naive_logp(model, ids, prompt, temperature, never)
        with torch.no_grad():
            reference = naive_logp(base, ids, prompt, temperature, never)
        kl = torch.exp(reference - logp) - (reference - logp) - 1
        assert (kl >= 0).all()
        wanted = wanted + (-a + 0.4 * kl.mean()) / 2
        policy = policy + (-a * logp.mean() + 0.4 * kl.mean()) / 2  # whose gradient is the policy gradient
    torch.testing.assert_close(loss, wanted, rtol=1e-9, atol=1e-12)
    policy.backward()
    for mine, theirs in zip(got, gradients(model), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize("temperature", [1.0, 0.6, 1.7])
def test_grpo_follows_the_gradient_of_the_expected_reward_of_what_is_drawn(temperature: float) -> None:
    """Every answer of one token, weighted by the probability with which ``sample`` draws it: no estimate is left."""
    model = adapted()
    prompt, unused, end = [5, 9, 11], list(range(70, 97)), 80
    drawn = [token for token in range(97) if token not in unused or token == end]
    rewards = torch.tensor([((7 * token) % 13) / 13 for token in drawn], dtype=torch.float64)
    logits = model(torch.tensor(prompt), PackedContext([3])).logits[-1, drawn]
    probabilities = (logits / temperature).softmax(-1)
    (probabilities * rewards).sum().backward()
    wanted = [g.clone() for g in gradients(model)]
    model.zero_grad()
    objective = GRPO(
        Reference(None), lambda *_: 0.0, n_samples=len(drawn), max_new_tokens=1, temperature=temperature, kl_weight=0.0,
        end_ids={end}, unused=unused,
    )  # fmt: skip
    rolled = _answers([(prompt, [token]) for token in drawn], torch.device("cpu"))
    weights = len(drawn) * probabilities.detach() * rewards
    objective.loss(model, rolled, weights).backward()
    for mine, theirs in zip(gradients(model), wanted, strict=True):
        torch.testing.assert_close(mine, -theirs, rtol=1e-6, atol=1e-12)


def test_grpo_raises_the_reward(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = model_of("mixtral", torch.float32, std=0.08)
    attach(model, LoraSpec(rank=4, alpha=8.0, targets=("embeddings", "head", "experts")))
    liked = set(range(0, 97, 2))
    objective = GRPO(
        Reference(None), lambda _, answer: sum(t in liked for t in answer) / len(answer),
        n_samples=8, max_new_tokens=6, temperature=1.0, kl_weight=0.0, end_ids=(),
    )  # fmt: skip
    ids = (5, 9, 11)
    source = ExampleSource([(Example(ids, (IGNORE, IGNORE, 11)),)], ("prompt",), n_rows=1, seq_len=8, weigh="groups")
    optimiser = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.02)
    rewards = []
    for step in range(25):
        optimiser.zero_grad()
        loss, metrics = objective(model, source.rows(step, 0, 1))
        loss.backward()
        optimiser.step()
        rewards.append(float(metrics["reward"]))
    # 48 of 97 tokens are liked: an untrained policy gets 0.5 +- 0.07 in 48 draws; five steps' mean +- 0.03.
    assert sum(rewards[-5:]) / 5 > 0.8 > 0.65 > sum(rewards[:2]) / 2


def test_samples_follow_the_models_probabilities() -> None:
    model = model_of("mixtral", torch.float32, std=0.3)
    prompt = [3, 1, 4, 1, 5]
    generator = torch.Generator().manual_seed(1)
    drawn = sample(model, prompt, 4000, max_new_tokens=2, temperature=0.7, end_ids=(), generator=generator)
    with torch.no_grad():
        first = (model(torch.tensor(prompt), PackedContext([5])).logits[-1] / 0.7).softmax(-1)
    counts = Counter(answer[0] for answer in drawn)
    likely = int(first.argmax())
    # 4000 draws: five standard errors.
    spread = 5 * math.sqrt(float(first[likely] * (1 - first[likely])) / 4000)
    assert abs(counts[likely] / 4000 - float(first[likely])) < spread
    # The second token comes from the cache: compare with a pass over everything.
    with torch.no_grad():
        second = (model(torch.tensor([*prompt, likely]), PackedContext([6])).logits[-1] / 0.7).softmax(-1)
    after = [answer[1] for answer in drawn if answer[0] == likely]
    top = int(second.argmax())
    spread = 5 * math.sqrt(float(second[top] * (1 - second[top])) / len(after))
    assert abs(after.count(top) / len(after) - float(second[top])) < spread


def test_samples_end_with_an_end_token() -> None:
    model = model_of("mixtral", torch.float32)
    drawn = sample(model, [3, 4], 16, max_new_tokens=12, temperature=1.0, end_ids=set(range(40)))
    assert all(all(t >= 40 for t in answer[:-1]) for answer in drawn)
    assert any(len(answer) < 12 for answer in drawn)


def test_samples_never_contain_unused_ids() -> None:
    model = model_of("mixtral", torch.float32)
    unused = set(range(10, 90))  # chance alone would draw one in every second token
    drawn = sample(model, [3, 4, 50], 16, max_new_tokens=12, temperature=1.0, end_ids={80}, unused=unused)
    said = {token for answer in drawn for token in answer}
    assert said and not said & (unused - {80}), "an end token is one, whatever the vocabulary lists"


def test_without_adapter_gives_the_base_model_and_restores_the_adapter() -> None:
    model, base = adapted(), model_of("mixtral")
    ids = torch.arange(9)
    before = model(ids, PackedContext([9])).logits
    with without_adapter(model):
        torch.testing.assert_close(model(ids, PackedContext([9])).logits, base(ids, PackedContext([9])).logits)
    assert torch.equal(model(ids, PackedContext([9])).logits, before)


@pytest.mark.parametrize(
    ("text", "answer", "reward"),
    [
        ("so 3 * 24 = 72.", "... #### 72", 1.0),
        ("it is 1,234 in all", "#### 1234", 1.0),
        ("The answer is -5", "#### 5", 0.0),
        ("72 at first, then 73", "#### 72", 0.0),
        ("no idea", "#### 72", 0.0),
        ("3.50 dollars", "#### 3.5", 1.0),
    ],
)
def test_the_reward_reads_the_last_number(text: str, answer: str, reward: float) -> None:
    assert number_reward(text, answer) == reward
