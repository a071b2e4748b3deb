"""Several adapters on one model at once, each token with its own: what serves many tunings from one set of weights.

    tokens   t0 t1 t2 t3 t4          y = W x for all tokens together, then for every adapter in the pass
    adapter   0  2  2  1  0          y[its tokens] += s B A x[its tokens]             0: none

The large products are those of the base model, whatever mix of adapters a pass has; the small ones run per adapter that
occurs. Adapters come and go while the model serves (:meth:`AdapterBank.add`, :meth:`~AdapterBank.remove`).
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from quadriga.errors import RequestError
from quadriga.kernels.arrays import tensor
from quadriga.model.adapter_spec import TARGETS, LoraSpec, adapted_shapes, targets_of
from quadriga.nn.linear import Factors, adapt
from quadriga.nn.lora import attach
from quadriga.nn.transformer import Transformer

Floats = NDArray[np.float32]


class _Choice:
    """Which adapter each token of the pass under way uses."""

    def __init__(self) -> None:
        self.of_token: Tensor | None = None
        """(N,) int64, 0: none; None: no token has one."""

    def groups(self, of_row: Tensor) -> list[tuple[int, Tensor]]:
        """(adapter, indices of its rows) of every adapter that occurs."""
        return [(int(n), (of_row == n).nonzero()[:, 0]) for n in torch.unique(of_row).tolist() if n]


class _Several(nn.Module):
    """Stands where one parameter's :class:`Factors` would, and applies each token's own."""

    def __init__(self, choice: _Choice) -> None:
        super().__init__()
        self.choice = choice
        self.factors: dict[int, Factors] = {}

    def variants(self) -> list[tuple[Tensor | None, Tensor]]:
        """See ``Delta.variants``: the tokens of every adapter in the pass."""
        if self.choice.of_token is None:
            return []
        return [(rows, one.delta()) for one, rows in self._rows(self.choice.of_token)]

    def _rows(self, of_row: Tensor) -> list[tuple[Factors, Tensor]]:
        return [(self.factors[n], rows) for n, rows in self.choice.groups(of_row) if n in self.factors]

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """See ``Delta.forward``; x may be the wanted rows of a pass only (the head's)."""
        chosen = self.choice.of_token
        if chosen is not None:
            assert len(chosen) == len(x), "every row belongs to a token of the pass"
            for one, rows in self._rows(chosen):
                y[rows] = one(x[rows], y[rows])
        return y

    def looked_up(self, ids: Tensor, rows: Tensor) -> Tensor:
        """See ``Delta.looked_up``."""
        if self.choice.of_token is not None:
            for one, own in self._rows(self.choice.of_token):
                rows[own] = one.looked_up(ids[own], rows[own])
        return rows

    def grouped(self, rows: Tensor, y: Tensor, counts: Tensor, tokens: Tensor) -> Tensor:
        """See ``Delta.grouped``: an adapter's rows of the sorted order are sorted too."""
        if self.choice.of_token is None:
            return y
        experts = torch.repeat_interleave(torch.arange(len(counts), device=counts.device), counts)
        for one, own in self._rows(self.choice.of_token[tokens]):
            share = torch.bincount(experts[own], minlength=len(counts))
            y[own] = one.grouped(rows[own], y[own], share, tokens[own])
        return y


class AdapterBank:
    """The adapters of a model; the model is changed in place and frozen.

    Attributes:
        names: adapter name -> its number.
    """

    def __init__(self, model: Transformer) -> None:
        self.model, self.names = model, dict[str, int]()
        self._choice, self._next = _Choice(), 1
        config = model.config
        here = targets_of(config)
        targets = tuple(target for target in TARGETS if target in here)
        everything = LoraSpec(rank=1, alpha=1.0, targets=targets)
        self._several = {name: _Several(self._choice) for name in adapted_shapes(config, everything)}
        attach(model, everything)
        for name, several in self._several.items():
            owner, _, part = name.rpartition(".")
            adapt(model.get_submodule(owner), part, several)

    def add(self, name: str, spec: LoraSpec, factors: Mapping[str, tuple[Floats, Floats]]) -> None:
        """Make an adapter available under a name, from the next pass on; the factors are not copied.

        Raises:
            RequestError: the name is taken.
        """
        if name in self.names:
            raise RequestError(f"an adapter called {name!r} is here already; remove it first")
        device = next(self.model.parameters()).device
        number, self._next = self._next, self._next + 1
        for parameter, (a, b) in factors.items():
            one = Factors(tensor(a).to(device), tensor(b).to(device), scale=spec.scale)
            self._several[parameter].factors[number] = one.requires_grad_(False).eval()
        self.names[name] = number

    def remove(self, name: str) -> None:
        """Forget an adapter.

        Raises:
            RequestError: there is none of this name.
        """
        number = self.number(name)
        del self.names[name]
        for several in self._several.values():
            several.factors.pop(number, None)

    def number(self, name: str) -> int:
        """The number of an adapter.

        Raises:
            RequestError: there is none of this name.
        """
        if name not in self.names:
            here = ", ".join(sorted(self.names)) or "none"
            raise RequestError(f"there is no adapter called {name[:80]!r}; loaded: {here}")
        return self.names[name]

    def choose(self, of_token: Tensor | None) -> None:
        """Say which adapter each token of the next pass uses: (N,) int64, 0 for none."""
        self._choice.of_token = None if of_token is None or not bool(of_token.any()) else of_token
