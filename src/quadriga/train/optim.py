"""Optimisers: AdamW (torch's fused version), Lion, and Muon for matrices and stacks of experts.

    AdamW   m, v = moments of g;            w -= lr (m / (sqrt(v) + eps) + decay w)
    Lion    w -= lr (sign(b1 m + (1 - b1) g) + decay w);   m = b2 m + (1 - b2) g          (Chen et al. 2023)
    Muon    m = b m + g;  u = newton_schulz(g + b m);  w -= lr (sqrt(max(1, rows / columns)) u + decay w)
                                                                                          (Jordan et al. 2024)

Muon treats each expert of a stack as a separate matrix, all of a layer in one batched product; torch.optim.Muon
accepts no stacks. A matrix that is sharded over ranks, or of which ranks have some heads each, is gathered for its
update; a stack of whole experts is not.
With Muon, norms, the router, embeddings and head are updated by AdamW. Norms and the router have no weight decay.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate, Shard

from quadriga.train.config import OptimiserSection
from quadriga.train.row_group import ALONE, RowGroup
from quadriga.train.shards import Portion

_NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
"""Coefficients of the quintic iteration (Jordan et al. 2024): steep at 0, singular values end within [0.7, 1.2]."""


def decays(name: str) -> bool:
    """True for parameters with weight decay: matrices, embeddings, head and experts."""
    vectors = (".bias", ".sinks", ".shared_gate", ".conv_bias", ".rate", ".dt", ".skip")
    small = name.endswith(("norm.weight", *vectors)) or ".b_" in name
    return not small and ".router." not in name and ".fuse." not in name


def is_hidden_matrix(name: str, parameter: Tensor) -> bool:
    """True for parameters that Muon updates: the matrices inside the layers, except the router."""
    return name.startswith("layers.") and parameter.ndim >= 2 and ".router." not in name and ".b_" not in name


@dataclass(frozen=True)
class Divided:
    """A matrix of which neighbouring ranks have a portion each."""

    portion: Portion
    group: RowGroup


class Lion(torch.optim.Optimizer):
    """Lion: updates by the sign of an interpolated momentum; needs half the state of AdamW."""

    def __init__(self, params: Iterable[dict[str, Any]], lr: float, betas: tuple[float, float]) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": 0.0})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Update all parameters that have a gradient."""
        assert closure is None, "the trainer computes gradients itself"
        for group in self.param_groups:
            b1, b2 = group["betas"]
            for p in group["params"]:
                if p.grad is None:
                    continue
                w, g = local(p), local(p.grad)
                m = local(_momentum(self.state[p], p))
                w.mul_(1 - group["lr"] * group["weight_decay"])
                w.add_(torch.lerp(g, m, b1).sign_(), alpha=-group["lr"])
                m.lerp_(g, 1 - b2)


class Muon(torch.optim.Optimizer):
    """Muon: updates by the orthogonalised momentum; for matrices (R, C) and stacks of them (E, R, C).

    Args:
        divided: of the matrices that are cut by heads (``tensor_parallel``), which portion this rank's is of the whole.
    """

    def __init__(
        self,
        params: Iterable[dict[str, Any]],
        lr: float,
        momentum: float,
        divided: Mapping[Tensor, Divided] | None = None,
    ) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": 0.0})
        self.divided = dict(divided or {})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Update all parameters that have a gradient."""
        assert closure is None, "the trainer computes gradients itself"
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                m = _momentum(self.state[p], p)
                local(m).mul_(group["momentum"]).add_(local(p.grad))
                cut = self.divided.get(p)
                update = orthogonal(p.grad.add(m, alpha=group["momentum"]), cut)
                rows, columns = (p.shape if cut is None else cut.portion.shape(tuple(p.shape)))[-2:]
                scale = max(1.0, rows / columns) ** 0.5
                w = local(p)
                w.mul_(1 - group["lr"] * group["weight_decay"])
                w.add_(local(update), alpha=-group["lr"] * scale)


def _momentum(state: dict[str, Any], parameter: Tensor) -> Tensor:
    if "exp_avg" not in state:
        state["exp_avg"] = torch.zeros_like(parameter)
    momentum: Tensor = state["exp_avg"]
    return momentum


def orthogonal(update: Tensor, cut: Divided | None = None) -> Tensor:
    """Apply :func:`newton_schulz` to every matrix; matrices that are sharded over ranks are gathered first."""
    if not isinstance(update, DTensor):
        return _orthogonal(update, cut)
    mesh, placements = update.device_mesh, update.placements
    if all(not isinstance(p, Shard) or p.dim < update.ndim - 2 for p in placements):
        own = _orthogonal(update.to_local(), cut)
        made: Tensor = DTensor.from_local(own, mesh, placements, shape=update.shape, stride=update.stride())
        return made
    # Experts that are spread stay where they are; the rows or columns of the matrices are gathered.
    gathered = [Replicate() if isinstance(p, Shard) and p.dim >= update.ndim - 2 else p for p in placements]
    whole = update.redistribute(placements=gathered)
    done = _orthogonal(whole.to_local(), cut)
    spread: DTensor = DTensor.from_local(done, mesh, gathered, shape=whole.shape, stride=whole.stride())
    back: Tensor = spread.redistribute(placements=placements)
    return back


def _orthogonal(update: Tensor, cut: Divided | None) -> Tensor:
    if cut is None:
        return newton_schulz(update)
    whole = cut.portion.joined(cut.group.portions(update))
    return cut.portion.take(newton_schulz(whole))


def newton_schulz(matrices: Tensor, steps: int = 5) -> Tensor:
    """Approximate the nearest (semi-)orthogonal matrix to each of (..., R, C): singular values become about 1."""
    a, b, c = _NEWTON_SCHULZ
    tall = matrices.shape[-2] > matrices.shape[-1]
    x: Tensor = matrices.transpose(-2, -1) if tall else matrices
    x = x / (torch.linalg.matrix_norm(x, keepdim=True) + 1e-7)
    for _ in range(steps):
        gram = x @ x.transpose(-2, -1)
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.transpose(-2, -1) if tall else x


def local(x: Tensor) -> Tensor:
    """This rank's part of a sharded tensor; the tensor itself if it is not sharded."""
    part: Tensor = x.to_local() if isinstance(x, DTensor) else x
    return part


class Optimiser:
    """One or two torch optimisers over named parameters, with a common schedule of their learning rates.

    Args:
        parameters: name -> float32 master parameter, for the parameters to train.
        section: which optimiser, and its settings.
        portions: of the parameters that are cut by heads; their neighbours are those of ``group``.
    """

    def __init__(
        self,
        parameters: Mapping[str, Tensor],
        section: OptimiserSection,
        portions: Mapping[str, Portion] | None = None,
        group: RowGroup = ALONE,
    ) -> None:
        self.names = {parameter: name for name, parameter in parameters.items()}
        rest = dict(parameters)
        self.parts: list[torch.optim.Optimizer] = []
        if section.name == "muon":
            hidden = {name: p for name, p in rest.items() if is_hidden_matrix(name, p)}
            rest = {name: p for name, p in rest.items() if name not in hidden}
            if hidden:
                groups = _groups(hidden, section.weight_decay)
                divided = {
                    hidden[name]: Divided(one, group) for name, one in (portions or {}).items() if name in hidden
                }
                self.parts.append(Muon(groups, section.muon_learning_rate, section.momentum, divided))
        if rest:
            groups = _groups(rest, section.weight_decay)
            if section.name == "lion":
                self.parts.append(Lion(groups, section.learning_rate, section.betas))
            else:
                self.parts.append(
                    torch.optim.AdamW(
                        groups, lr=section.learning_rate, betas=section.betas, eps=section.eps, fused=True
                    )
                )
        self._peaks = [part.defaults["lr"] for part in self.parts]
        self._zero_state()

    def step(self, share: float) -> None:
        """Update every parameter that has a gradient; ``share`` is the learning rate as a fraction of its peak."""
        for part, peak in zip(self.parts, self._peaks, strict=True):
            for group in part.param_groups:
                group["lr"] = peak * share
            part.step()

    def state(self) -> dict[str, Tensor]:
        """``name/key`` -> state tensor, for the checkpoint; not copies."""
        return {
            f"{self.names[p]}/{key}": value
            for part in self.parts
            for p, entries in part.state.items()
            for key, value in entries.items()
        }

    def _zero_state(self) -> None:
        """Create the state tensors, all zero as before the first step, so that a checkpoint can be loaded into them."""
        for part in self.parts:
            adamw = isinstance(part, torch.optim.AdamW)
            for p in (p for group in part.param_groups for p in group["params"]):
                part.state[p] = {key: torch.zeros_like(p) for key in ("exp_avg", "exp_avg_sq")[: 1 + adamw]}
                if adamw:
                    part.state[p]["step"] = torch.zeros((), dtype=torch.float32, device=local(p).device)


def _groups(parameters: Mapping[str, Tensor], weight_decay: float) -> list[dict[str, Any]]:
    groups = []
    for wanted, decay in ((True, weight_decay), (False, 0.0)):
        chosen = [p for name, p in parameters.items() if decays(name) is wanted]
        if chosen:
            groups.append({"params": chosen, "weight_decay": decay})
    return groups
