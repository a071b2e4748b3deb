"""Router and sort beside the reference and torch's stable sort."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from quadriga.kernels import reference
from quadriga.kernels.ops import Choice
from quadriga.kernels.triton.router import BLOCK, Places, route, route_and_place

CHOICES = {
    "softmax": (5, Choice(top_k=3)),
    "softmax, 2-norm": (16, Choice(top_k=4, normalize_p=2.0)),
    "softmax, 3-norm, with a least": (9, Choice(top_k=4, normalize_p=3.0, normalize_min=0.3)),
    "softmax, as they are, scaled": (7, Choice(top_k=2, normalize_p=None, scale=1.5)),
    "sigmoid": (12, Choice(top_k=5, score="sigmoid", normalize_eps=1e-20)),
    "sigmoid, 2 of 3 groups": (
        12, Choice(top_k=3, score="sigmoid", normalize_eps=1e-20, scale=2.5, n_groups=3, top_k_groups=2)),
    "sigmoid, 2 of 5 groups by their best": (
        40, Choice(top_k=6, score="sigmoid", normalize_p=None, n_groups=5, top_k_groups=2, group_worth="best")),
    "softmax, 3 of 8 groups": (160, Choice(top_k=6, n_groups=8, top_k_groups=3)),
    "sparse mixer": (7, Choice(top_k=2, score="sparse_mixer", near=0.6)),
    "all experts": (6, Choice(top_k=6)),
}  # fmt: skip


def _normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def _check_places(places: Places, ids: Tensor, n_experts: int) -> None:
    flat = ids.reshape(-1)
    order = flat.argsort(stable=True)
    assert torch.equal(places.order.long(), order)
    assert torch.equal(places.home.reshape(-1).long()[order], torch.arange(len(flat)))
    assert places.starts.tolist() == [0, *torch.bincount(flat, minlength=n_experts).cumsum(0).tolist()]


@pytest.mark.parametrize("tokens", [1, BLOCK, 2 * BLOCK + 5])
@pytest.mark.parametrize("name", CHOICES)
def test_the_reference_s_choice(name: str, tokens: int) -> None:
    n_experts, how = CHOICES[name]
    x, weight, bias = _normal(tokens, 70, seed=1), _normal(n_experts, 70, seed=2), _normal(n_experts, seed=3)
    correction = None if how.score == "sparse_mixer" else 0.1 * _normal(n_experts, seed=4)
    ours, places = route_and_place(x, weight, how, bias, correction)
    truth = reference.route(x, weight, how, bias, correction)
    assert torch.equal(ours.expert_ids, truth.expert_ids)
    for ours_, truth_ in zip(ours[1:], truth[1:], strict=True):
        torch.testing.assert_close(ours_, truth_, rtol=1e-5, atol=1e-6 * float(truth_.abs().max()))
    _check_places(places, truth.expert_ids, n_experts)


@pytest.mark.parametrize("name", CHOICES)
def test_of_equal_experts_the_lower_is_chosen_first(name: str) -> None:
    """Logits of -1, 0 and 1: nearly everything is a tie, in groups and among experts."""
    n_experts, how = CHOICES[name]
    generator = torch.Generator().manual_seed(7)
    logits = torch.randint(-1, 2, (24, n_experts), generator=generator).float()
    ours = route(logits, torch.eye(n_experts), how)
    assert torch.equal(ours.logits, logits)
    assert torch.equal(ours.expert_ids, reference.route(logits, torch.eye(n_experts), how).expert_ids)


def test_all_logits_equal_and_all_experts_but_two_empty() -> None:
    routing, places = route_and_place(torch.zeros(19, 8), torch.zeros(6, 8), Choice(top_k=2))
    assert routing.expert_ids.tolist() == [[0, 1]] * 19
    assert routing.expert_weights.tolist() == [[0.5, 0.5]] * 19
    assert places.starts.tolist() == [0, 19, 38, 38, 38, 38, 38]


def test_no_tokens() -> None:
    routing, places = route_and_place(torch.zeros(0, 8), torch.ones(6, 8), Choice(top_k=2))
    assert routing.expert_ids.shape == (0, 2) and places.starts.tolist() == [0] * 7


def test_bfloat16_is_widened_before_the_sum() -> None:
    x, weight = _normal(9, 130, seed=8).bfloat16(), _normal(11, 130, seed=9).bfloat16()
    ours, truth = route(x, weight, Choice(top_k=4)), reference.route(x, weight, Choice(top_k=4))
    torch.testing.assert_close(ours.logits, truth.logits, rtol=1e-5, atol=1e-5)
    assert torch.equal(ours.expert_ids, truth.expert_ids)


def test_a_token_alone_is_what_it_is_in_a_crowd() -> None:
    x, weight = _normal(37, 70, seed=10), _normal(16, 70, seed=11)
    crowd = route(x, weight, Choice(top_k=4))
    for n in (0, 15, 16, 36):
        for alone, among in zip(route(x[n : n + 1], weight, Choice(top_k=4)), crowd, strict=True):
            assert torch.equal(alone[0], among[n])
