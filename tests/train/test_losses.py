"""The pre-training objective: naive computations of its parts, padding, and sums over ranks."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from quadriga.nn.context import PackedContext
from quadriga.nn.router_loss import Usage, balance_loss, document_balance, load_balancing_loss, router_z_loss
from quadriga.train.batch import IGNORE, TrainingBatch
from quadriga.train.config import RouterSection
from quadriga.train.losses import NextToken
from quadriga.train.world import World
from tests.train import runs


@pytest.mark.parametrize("form", ["megablocks", "hf", "document"])
def test_the_objective_equals_a_naive_computation(form: str) -> None:
    model, batch = runs.model(), runs.source().rows(0, 0, 8)
    section = RouterSection(balance_loss=0.3, balance_form=form, z_loss=0.01)  # type: ignore[arg-type]
    loss, metrics = NextToken(runs.TINY, section, World())(model, batch)
    out = model(batch.tokens, PackedContext(batch.bounds.diff().tolist()), with_stats=True)
    plain = F.cross_entropy(out.logits, batch.targets, reduction="sum")
    mask = batch.real()
    if form == "document":
        balance = document_balance(out.router_stats, mask, batch.bounds) / mask.sum()
    else:
        balance = load_balancing_loss(out.router_stats, form=form, mask=mask)  # type: ignore[arg-type]
    z = router_z_loss(out.router_stats, mask=mask)
    n = batch.target_weight()
    assert float(metrics["loss"]) == pytest.approx(float(plain), rel=1e-5)
    assert float(loss) == pytest.approx(float(plain + n * (0.3 * balance + 0.01 * z)), rel=1e-5)


@pytest.mark.parametrize(("given", "weight"), [(None, 0.05), (0.0, 0.0), (0.7, 0.7)])
def test_the_balance_weight_comes_from_the_run_or_the_model(given: float | None, weight: float) -> None:
    """None: the checkpoint's own weight; 0 is a given weight. Logits are scaled as in the model."""
    config = replace(runs.TINY, logit_scale=0.37)
    assert config.only_moe("this test").aux_loss_weight == 0.05
    model, batch = runs.model(config), runs.source().rows(0, 0, 8)
    section = RouterSection(balance_loss=given, balance_form="megablocks", z_loss=0.0)
    loss, metrics = NextToken(config, section, World())(model, batch)
    out = model(batch.tokens, PackedContext(batch.bounds.diff().tolist()), with_stats=True)
    plain = F.cross_entropy(out.logits, batch.targets, reduction="sum")
    balance = load_balancing_loss(out.router_stats, form="megablocks", mask=batch.real())
    assert float(metrics["loss"]) == pytest.approx(float(plain), rel=1e-5)
    assert float(loss) == pytest.approx(float(plain + batch.target_weight() * weight * balance), rel=1e-5)


def test_padding_affects_nothing() -> None:
    """A document without targets changes no loss, no balance, no count."""
    model, objective = runs.model(), NextToken(runs.TINY, RouterSection(z_loss=0.01), World())
    one = runs.source(n_rows=1).rows(0, 0, 1)
    n = len(one.tokens)
    padded = TrainingBatch(
        tokens=torch.cat([one.tokens, torch.zeros(n, dtype=torch.int64)]),
        targets=torch.cat([one.targets, torch.full((n,), IGNORE)]),
        positions=torch.cat([one.positions, torch.arange(n)]),
        bounds=torch.cat([one.bounds, torch.tensor([2 * n], dtype=torch.int32)]),
        domains=torch.cat([one.domains, torch.zeros(1, dtype=torch.int16)]),
    )
    assert padded.real().tolist() == [bool(one.real()[i]) for i in range(n)] + [False] * n
    alone, with_padding = (objective(model, batch) for batch in (one, padded))
    torch.testing.assert_close(alone[0], with_padding[0])
    assert torch.equal(alone[1]["expert_counts"], with_padding[1]["expert_counts"])


def test_target_weights_scale_the_loss() -> None:
    model, objective = runs.model(), NextToken(runs.TINY, RouterSection(balance_loss=0.0), World())
    dense = replace(runs.source().rows(0, 0, 2), weights=torch.linspace(0, 2, 32))
    out = model(dense.tokens, PackedContext(dense.bounds.diff().tolist()))
    each = F.cross_entropy(out.logits, dense.targets, reduction="none")
    _, metrics = objective(model, dense)
    assert dense.weights is not None
    assert float(metrics["loss"]) == pytest.approx(float((each * dense.weights).sum()), rel=1e-5)
    assert dense.target_weight() == pytest.approx(float(dense.weights[dense.targets != IGNORE].sum()))


@pytest.mark.parametrize("form", ["megablocks", "hf"])
def test_ranks_parts_of_the_balance_loss_add_up(form: str) -> None:
    """With the counts of all tokens and the probabilities of a part, values and gradients of the parts sum to the whole's."""
    model, batch = runs.model(), runs.source().rows(0, 0, 8)
    stats = model(batch.tokens, PackedContext(batch.bounds.diff().tolist()), with_stats=True).router_stats
    leaves = [layer.probs.detach().requires_grad_() for layer in stats]
    stats = [replace(layer, probs=p) for layer, p in zip(stats, leaves, strict=True)]
    whole = Usage.of(stats)
    balance_loss(whole.counts, whole.probs, whole.n_tokens, 2, form).backward()  # type: ignore[arg-type]
    expected = [p.grad for p in leaves]
    total = 0.0
    gradients = [torch.zeros_like(p) for p in leaves]
    for mask in (torch.arange(len(batch.tokens)) < 50, torch.arange(len(batch.tokens)) >= 50):
        for p in leaves:
            p.grad = None
        part = Usage.of(stats, mask)
        loss = balance_loss(whole.counts, part.probs, whole.n_tokens, 2, form)  # type: ignore[arg-type]
        total += float(loss.detach())
        loss.backward()
        for g, p in zip(gradients, leaves, strict=True):
            assert p.grad is not None
            g += p.grad
    assert total == pytest.approx(float(load_balancing_loss(stats, form=form).detach()), rel=1e-6)  # type: ignore[arg-type]
    for g, e in zip(gradients, expected, strict=True):
        torch.testing.assert_close(g, e)


# Routers in trouble --------------------------------------------------------------------------------------------------


def _with_router(weight: Tensor) -> float:
    model = runs.model()
    with torch.no_grad():
        for layer in model.layers:
            layer.moe.router.weight.copy_(weight)  # type: ignore[union-attr]
    loss, metrics = NextToken(runs.TINY, RouterSection(), World())(model, runs.source().rows(0, 0, 4))
    loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    return float(metrics["balance"]) / runs.source().rows(0, 0, 4).target_weight()


def test_tied_routers_take_the_lowest_experts() -> None:
    """All logits equal: every token goes to experts 0 and 1, four times the mean load; P is uniform, so balance is 1."""
    assert _with_router(torch.zeros(runs.N_EXPERTS, runs.D_MODEL)) == pytest.approx(1.0)


def test_all_tokens_to_one_pair_of_experts() -> None:
    weight = torch.zeros(runs.N_EXPERTS, runs.D_MODEL)
    weight[3:5] = 1e4  # logits of +-large: the softmax is 0 or 1 in float32
    assert _with_router(weight) > 0.9


def test_k_is_all_experts_and_k_is_one() -> None:
    for top_k in (1, runs.N_EXPERTS):
        config = runs.TINY.with_ffn(top_k=top_k)
        model = runs.model(config)
        loss, metrics = NextToken(config, RouterSection(), World())(model, runs.source().rows(0, 0, 2))
        loss.backward()
        assert metrics["expert_counts"].sum(1).tolist() == [32.0 * top_k] * 2
        if top_k == runs.N_EXPERTS:
            assert float(metrics["balance"]) / runs.source().rows(0, 0, 2).target_weight() == pytest.approx(1.0)


def test_a_router_of_nan_is_a_loss_of_nan_for_the_guard_to_see() -> None:
    model = runs.model()
    with torch.no_grad():
        model.layers[0].moe.router.weight.fill_(float("nan"))  # type: ignore[union-attr]
    _, metrics = NextToken(runs.TINY, RouterSection(), World())(model, runs.source().rows(0, 0, 2))
    assert metrics["loss"].isnan()
