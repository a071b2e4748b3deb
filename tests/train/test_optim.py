"""Optimisers compared with the formulas of their papers, computed number by number."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from quadriga.nn.transformer import Transformer
from quadriga.train.config import OptimiserSection
from quadriga.train.optim import Optimiser, decays, is_hidden_matrix, newton_schulz
from tests.checkpoint.models import TINY


def _parameters() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = {
        "embed.weight": (7, 5),
        "layers.0.attn.wo.weight": (5, 6),
        "layers.0.moe.router.weight": (3, 5),
        "layers.0.moe.w_up": (3, 4, 5),
        "final_norm.weight": (5,),
    }
    return {name: torch.randn(shape, generator=generator).requires_grad_() for name, shape in shapes.items()}


def _steps(section: OptimiserSection, n: int) -> tuple[dict[str, Tensor], dict[str, list[Tensor]], list[float]]:
    """(parameters after n steps, their gradients, the learning rates as fractions of the peak)."""
    parameters, shares = _parameters(), [1.0, 0.5, 0.25][:n]
    optimiser = Optimiser(parameters, section)
    generator = torch.Generator().manual_seed(1)
    gradients: dict[str, list[Tensor]] = {name: [] for name in parameters}
    for share in shares:
        for name, p in parameters.items():
            p.grad = torch.randn(p.shape, generator=generator)
            gradients[name].append(p.grad.double())
        optimiser.step(share)
    return parameters, gradients, shares


def test_which_parameters_decay_and_which_muon_updates() -> None:
    names = _parameters()
    assert [name for name in names if decays(name)] == ["embed.weight", "layers.0.attn.wo.weight", "layers.0.moe.w_up"]
    assert [n for n, p in names.items() if is_hidden_matrix(n, p)] == ["layers.0.attn.wo.weight", "layers.0.moe.w_up"]
    biases = {f"layers.0.moe.b_{part}": torch.zeros(4, 8) for part in ("up", "gate", "down")}  # a row an expert
    assert not [n for n, p in biases.items() if is_hidden_matrix(n, p) or decays(n)]


@pytest.mark.parametrize("name", TINY)
def test_matrices_of_every_family_decay_and_nothing_else_does(name: str) -> None:
    """By their shapes: a vector or a single number has no decay, nor has what belongs to the router."""
    with torch.device("meta"):
        model = Transformer(TINY[name])
    for one, parameter in model.named_parameters():
        matrix = parameter.ndim >= 2 and ".router." not in one and ".moe.b_" not in one  # of those a row an expert
        assert decays(one) == matrix, one
        assert is_hidden_matrix(one, parameter) == (matrix and one.startswith("layers.")), one


def test_adamw() -> None:
    section = OptimiserSection(learning_rate=0.1, betas=(0.8, 0.9), eps=1e-6, weight_decay=0.3)
    after, gradients, shares = _steps(section, 3)
    for name, p in _parameters().items():
        w, m, v = p.detach().double(), 0.0, 0.0
        for t, (g, share) in enumerate(zip(gradients[name], shares, strict=True), 1):
            rate = 0.1 * share
            w = w * (1 - rate * (0.3 if decays(name) else 0.0))
            m, v = 0.8 * m + 0.2 * g, 0.9 * v + 0.1 * g * g
            w = w - rate * (m / (1 - 0.8**t)) / ((v / (1 - 0.9**t)) ** 0.5 + 1e-6)
        torch.testing.assert_close(after[name].double(), w, rtol=1e-5, atol=1e-6)


def test_lion() -> None:
    after, gradients, shares = _steps(OptimiserSection(name="lion", learning_rate=0.1, betas=(0.8, 0.9)), 3)
    for name, p in _parameters().items():
        w, m = p.detach().double(), torch.zeros(p.shape, dtype=torch.float64)
        for g, share in zip(gradients[name], shares, strict=True):
            w = w - 0.1 * share * ((0.8 * m + 0.2 * g).sign() + (0.1 if decays(name) else 0.0) * w)
            m = 0.9 * m + 0.1 * g
        torch.testing.assert_close(after[name].double(), w, rtol=1e-5, atol=1e-6)


def test_muon_takes_each_expert_alone() -> None:
    """Every expert of a stack is updated like a matrix by torch's Muon; embeddings, head and norms by AdamW."""
    after, gradients, shares = _steps(OptimiserSection(name="muon", muon_learning_rate=0.1, weight_decay=0.3), 3)
    stacks = [("layers.0.attn.wo.weight", None), *(("layers.0.moe.w_up", e) for e in range(3))]
    for name, expert in stacks:
        p = _parameters()[name].detach()
        p = (p if expert is None else p[expert]).clone().requires_grad_()
        theirs = torch.optim.Muon(
            [p], lr=0.1, weight_decay=0.3, momentum=0.95, nesterov=True, adjust_lr_fn="original", eps=1e-7
        )
        for g, share in zip(gradients[name], shares, strict=True):
            p.grad = (g if expert is None else g[expert]).float()
            theirs.param_groups[0]["lr"] = 0.1 * share
            theirs.step()
        ours = (after[name] if expert is None else after[name][expert]).detach()
        # torch iterates in bfloat16 and averages the momentum: directions agree to bf16 and a few steps' rounding.
        before = (_parameters()[name] if expert is None else _parameters()[name][expert]).detach()
        moved, expected = ours - before, p.detach() - before
        assert torch.nn.functional.cosine_similarity(moved.flatten(), expected.flatten(), dim=0) > 0.97
        assert moved.norm() == pytest.approx(float(expected.norm()), rel=0.1)
    adamw, _, _ = _steps(OptimiserSection(weight_decay=0.3), 3)
    for name in ("embed.weight", "layers.0.moe.router.weight", "final_norm.weight"):
        torch.testing.assert_close(after[name], adamw[name])


def test_muon_number_by_number() -> None:
    """Nesterov momentum, separate experts however small their gradients, and the scale of tall matrices."""
    shapes = {"layers.0.moe.w_up": (3, 9, 4), "layers.0.moe.w_down": (3, 4, 9), "layers.0.attn.wo.weight": (5, 5)}
    generator = torch.Generator().manual_seed(3)
    parameters = {name: torch.randn(shape, generator=generator).requires_grad_() for name, shape in shapes.items()}
    truth = {name: (p.detach().clone(), torch.zeros(p.shape)) for name, p in parameters.items()}
    section = OptimiserSection(name="muon", muon_learning_rate=0.1, weight_decay=0.3, momentum=0.9)
    optimiser = Optimiser(parameters, section)
    for share in (1.0, 0.5, 0.25):
        for name, p in parameters.items():
            g = torch.randn(p.shape, generator=generator)
            g = g * torch.tensor([1.0, 1e-3, 30.0])[:, None, None] if p.ndim == 3 else g
            p.grad = g.clone()
            w, m = truth[name]
            m = 0.9 * m + g
            steps = [newton_schulz(one) for one in (g + 0.9 * m).reshape(-1, *p.shape[-2:])]
            update = torch.stack(steps).view(p.shape) * max(1.0, p.shape[-2] / p.shape[-1]) ** 0.5
            truth[name] = (w * (1 - 0.1 * share * 0.3) - 0.1 * share * update, m)
        optimiser.step(share)
    for name, p in parameters.items():
        torch.testing.assert_close(p.detach(), truth[name][0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("shape", [(9, 4), (4, 9), (3, 6, 5)])
def test_newton_schulz_makes_singular_values_about_one(shape: tuple[int, ...]) -> None:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    u, _, v = torch.linalg.svd(x, full_matrices=False)
    made = newton_schulz(x)
    values = torch.linalg.svdvals(made)
    assert values.min() > 0.6 and values.max() < 1.3
    overlap = (made * (u @ v)).sum((-2, -1)) / (made.norm(dim=(-2, -1)) * (u @ v).norm(dim=(-2, -1)))
    assert overlap.min() > 0.97
