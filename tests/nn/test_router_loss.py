"""Balance losses: transformers' own values, a naive statement, and what perfect balance gives."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from quadriga.errors import ConfigError
from quadriga.nn.context import PackedContext
from quadriga.nn.moe import RouterStats
from quadriga.nn.router_loss import document_balance, load_balancing_loss, router_z_loss
from quadriga.nn.transformer import Transformer
from tests.golden.checkpoints import FACTS
from tests.golden.weights import TOKENS, ragged
from tests.oracles import router_losses

E, K, L, N = 5, 3, 4, 29


def stats_of(logits: Tensor, top_k: int = K) -> RouterStats:
    probs = logits.float().softmax(-1)
    weights, ids = probs.sort(dim=-1, descending=True, stable=True)
    return RouterStats(ids[:, :top_k], weights[:, :top_k], probs, logits.float())


def random_stats(seed: int = 0) -> list[RouterStats]:
    generator = torch.Generator().manual_seed(seed)
    return [stats_of(torch.randn(N, E, generator=generator)) for _ in range(L)]


@pytest.mark.parametrize("name", ["dbrx", "mixtral"])
@torch.inference_mode()
def test_equals_transformers(golden_model: Callable[..., Transformer], name: str) -> None:
    model = golden_model(name)
    _, stats = model(torch.tensor(TOKENS), PackedContext([33]), with_stats=True)
    assert load_balancing_loss(stats, form="hf").item() == pytest.approx(FACTS[name]["aux_loss"], rel=1e-5)
    packed = torch.tensor([t for s in ragged() for t in s])
    _, stats = model(packed, PackedContext([len(s) for s in ragged()]), with_stats=True)
    # Padding has no rows here; in transformers the mask leaves it out.
    assert load_balancing_loss(stats, form="hf").item() == pytest.approx(FACTS[name]["aux_loss_ragged"], rel=1e-5)


def test_equals_the_naive_statements() -> None:
    stats = random_stats()
    probs = [layer.probs.double().numpy() for layer in stats]
    logits = [layer.logits.double().numpy() for layer in stats]
    hf, megablocks = load_balancing_loss(stats, form="hf"), load_balancing_loss(stats, form="megablocks")
    assert hf.item() == pytest.approx(router_losses.hf_balance(probs, K), rel=1e-5)
    assert megablocks.item() == pytest.approx(router_losses.megablocks_balance(probs, K), rel=1e-5)
    assert router_z_loss(stats).item() == pytest.approx(router_losses.z_loss(logits), rel=1e-5)


def test_perfect_balance_gives_k_and_one() -> None:
    # Token n prefers experts n, n+1, n+2 (mod E): every expert is chosen equally often at every place.
    logits = torch.stack([torch.linspace(2, 0, E).roll(n % E) for n in range(5 * E)])
    stats = [stats_of(logits)] * L
    assert load_balancing_loss(stats, form="hf").item() == pytest.approx(K, rel=1e-6)
    assert load_balancing_loss(stats, form="megablocks").item() == pytest.approx(1, rel=1e-6)


def test_one_layer_is_k_times_the_other_form() -> None:
    stats = random_stats()[:1]
    ratio = load_balancing_loss(stats, form="hf") / load_balancing_loss(stats, form="megablocks")
    assert ratio.item() == pytest.approx(K, rel=1e-6)


def test_layers_cannot_hide_each_other_s_imbalance_in_the_megablocks_form() -> None:
    """Two layers that each use one expert, a different one: together they look balanced, one by one they are not."""
    two = [stats_of(torch.tensor([[9.0, 0.0]] * N), 1), stats_of(torch.tensor([[0.0, 9.0]] * N), 1)]
    assert load_balancing_loss(two, form="hf").item() == pytest.approx(1, abs=0.01)
    assert load_balancing_loss(two, form="megablocks").item() == pytest.approx(2, abs=0.01)


def test_masked_rows_count_nowhere() -> None:
    stats = random_stats()
    mask = torch.arange(N) < 20
    short = [RouterStats(s.expert_ids[:20], s.expert_weights[:20], s.probs[:20], s.logits[:20]) for s in stats]
    for form in ("hf", "megablocks"):
        assert torch.equal(load_balancing_loss(stats, form=form, mask=mask), load_balancing_loss(short, form=form))
    assert torch.equal(router_z_loss(stats, mask=mask), router_z_loss(short))


def test_documents_are_balanced_each_by_its_own_tokens() -> None:
    """The mean over tokens of the loss of their document alone; what is masked counts nowhere."""
    stats, bounds = random_stats(), torch.tensor([0, 4, 5, 21, 23, N])
    mask = torch.ones(N, dtype=torch.bool)
    mask[21:23] = False  # a padding document
    mask[7] = False
    expected = 0.0
    for a, b in ((0, 4), (4, 5), (5, 21), (23, N)):
        rows = [layer.probs[a:b][mask[a:b]].double().numpy() for layer in stats]
        expected += len(rows[0]) * router_losses.megablocks_balance(rows, K)
    assert document_balance(stats, mask, bounds).item() == pytest.approx(expected, rel=1e-5)


def test_one_document_is_a_batch() -> None:
    stats = random_stats()
    found = document_balance(stats, torch.ones(N, dtype=torch.bool), torch.tensor([0, N])) / N
    assert found.item() == pytest.approx(load_balancing_loss(stats, form="megablocks").item(), rel=1e-6)


def test_documents_cannot_hide_each_other_s_imbalance() -> None:
    logits = torch.tensor([[9.0, 0.0]] * 3 + [[0.0, 9.0]] * 3, requires_grad=True)
    loss = document_balance([stats_of(logits, 1)], torch.ones(6, dtype=torch.bool), torch.tensor([0, 3, 6])) / 6
    assert loss.item() == pytest.approx(2, abs=0.01)
    (grad,) = torch.autograd.grad(loss, logits)
    assert (grad[:3, 0] > 0).all() and (grad[3:, 1] > 0).all(), "each document's favourite is pushed down"


def test_a_second_softmax_gives_another_loss() -> None:
    """The bug of DBRX's first official file (SPEC 1.3): the value changes, so it would be seen here."""
    stats = random_stats()
    twice = [RouterStats(s.expert_ids, s.expert_weights, s.probs.softmax(-1), s.logits) for s in stats]
    once = load_balancing_loss(stats, form="hf").item()
    assert abs(load_balancing_loss(twice, form="hf").item() - once) > 0.01


def test_z_loss_by_hand_and_gradients_reach_the_logits() -> None:
    logits = torch.tensor([[1.0, 2.0], [0.0, 0.0]], requires_grad=True)
    expected = (math.log(math.e + math.e**2) ** 2 + math.log(2) ** 2) / 2
    loss = router_z_loss([stats_of(logits, 1), stats_of(logits, 1)])
    assert loss.item() == pytest.approx(2 * expected, rel=1e-6)
    balance = load_balancing_loss([stats_of(logits, 1)], form="hf")
    (grad,) = torch.autograd.grad(loss + balance, logits)
    assert torch.isfinite(grad).all()
    assert (grad.abs() > 0).any()


def test_only_routers_and_what_feeds_them_get_a_gradient(golden_model: Callable[..., Transformer]) -> None:
    """The choice of experts is a constant: the last layer's experts are downstream of every router."""
    model = golden_model("dbrx").requires_grad_()
    _, stats = model(torch.tensor(TOKENS), PackedContext([33]), with_stats=True)
    (load_balancing_loss(stats, form="megablocks") + router_z_loss(stats)).backward()
    for layer in model.layers:
        grad = layer.moe.router.weight.grad
        assert torch.isfinite(grad).all() and (grad != 0).all()
    assert model.layers[-1].moe.w_gate.grad is None
    assert model.layers[0].moe.w_gate.grad.any()


def test_a_bfloat16_model_has_float32_losses(golden_model: Callable[..., Transformer]) -> None:
    model = golden_model("mixtral", torch.bfloat16)
    _, stats = model(torch.tensor(TOKENS), PackedContext([33]), with_stats=True)
    for loss in (load_balancing_loss(stats, form="hf"), router_z_loss(stats)):
        assert loss.dtype == torch.float32
    assert load_balancing_loss(stats, form="hf").item() == pytest.approx(FACTS["mixtral"]["aux_loss"], rel=0.05)


def test_an_unknown_form_is_an_error() -> None:
    with pytest.raises(ConfigError, match="'hf' or 'megablocks', got 'switch'"):
        load_balancing_loss(random_stats(), form="switch")  # type: ignore[arg-type]
