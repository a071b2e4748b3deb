"""DPO, ORPO and GRPO compared with naive computations on whole logits; samples with the model's probabilities."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

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
from quadriga.train.model_sampler import sample
from quadriga.train.objectives import DPO, ORPO, Reference, without_adapter
from quadriga.train.packing import ExampleSource
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
