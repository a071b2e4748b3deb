"""Low-rank adapters on a Transformer: attach, train, and fold in; on experts as well, each with factors of its own.

    y = W x + s B A x             W frozen (or 4- and 8-bit blocks, unpacked when needed: QLoRA), A and B trained
    experts: the same for every expert's w_gate, w_up and w_down, over tokens sorted by expert: grouped products, or, in
             training on a processor, one expert at a time (ops.training.adapted_experts)

Never W + B A: that costs a product as large as a full fine-tuning's for every weight, and is why peft is slow on
experts (its ``target_parameters`` materialises the sum). What is trained of an expert that got no token has a gradient
of exactly zero. Modules are replaced, not patched: nothing in the model asks whether it is adapted. Sources: Hu et al.
2021 (arXiv 2106.09685), Dettmers et al. 2023 (arXiv 2305.14314).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from quadriga import ops
from quadriga.errors import HardwareError
from quadriga.model.adapter_spec import LoraSpec, adapted_shapes
from quadriga.model.config import DenseSpec
from quadriga.model.feedforward import FeedForward
from quadriga.model.layers import Matrix
from quadriga.model.moe import MoE, Router, RouterStats
from quadriga.model.transformer import Transformer
from quadriga.ops.packing import Packed
from quadriga.ops.training import AdaptedPart

Weight = Tensor | Packed | list[Packed]
"""A frozen weight: numbers, a packed matrix, or a packed matrix an expert."""


class Factors(nn.Module):
    """A and B of one parameter: a ([E,] r, in), b ([E,] out, r)."""

    def __init__(self, a: Tensor, b: Tensor, spec: LoraSpec) -> None:
        super().__init__()
        self.a, self.b = nn.Parameter(a), nn.Parameter(b)
        self.scale, self.dropout = spec.scale, spec.dropout

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """y + s B A x: x (N, in), y (N, out)."""
        return torch.addmm(y, F.linear(self.dropped(x), self.a.to(x.dtype)), self.b.to(x.dtype).T, alpha=self.scale)

    def grouped(self, rows: Tensor, y: Tensor, counts: Tensor, tokens: Tensor) -> Tensor:
        """The same for rows sorted by expert; ``tokens`` (R,) says whose they are, which matters to a bank only."""
        narrow = ops.grouped_linear(self.dropped(rows), self.a.to(rows.dtype), counts)
        return y + self.scale * ops.grouped_linear(narrow, self.b.to(rows.dtype), counts)

    def looked_up(self, ids: Tensor, rows: Tensor) -> Tensor:
        """The same for rows of a table: rows (N, columns) + s B[ids] A."""
        narrow = F.embedding(ids, self.b).to(rows.dtype)
        return torch.addmm(rows, narrow, self.a.to(rows.dtype), alpha=self.scale)

    def dropped(self, x: Tensor) -> Tensor:
        """The input of A in training."""
        return F.dropout(x, self.dropout, self.training) if self.dropout else x

    def delta(self) -> Tensor:
        """What the adapter adds to the weight: s B A, ([E,] out, in)."""
        return self.scale * (self.b @ self.a)


class AdaptedMatrix(nn.Module):
    """:class:`~quadriga.model.layers.Matrix` with a frozen weight and, perhaps, factors."""

    def __init__(self, frozen: Weight, lora: Factors | None) -> None:
        super().__init__()
        self.frozen: Any = frozen
        self.lora = lora

    @property
    def weight(self) -> Tensor:
        """W + s B A, for those who need it as one (a loss over the head; merging)."""
        frozen: Tensor = self.frozen.unpack() if isinstance(self.frozen, Packed) else self.frozen
        return frozen if self.lora is None else frozen + self.lora.delta().to(frozen.dtype)

    def forward(self, x: Tensor) -> Tensor:
        """x W^T + s (x A^T) B^T: (N, in) -> (N, out)."""
        y = frozen_linear(x, self.frozen)
        if self.lora is not None:
            y = self.lora(x, y)
        return y

    def look_up(self, ids: Tensor) -> Tensor:
        """Rows of the adapted table: ids (N,) -> (N, columns)."""
        assert isinstance(self.frozen, Tensor), "tables of embeddings stay plain"
        rows = F.embedding(ids, self.frozen)
        return rows if self.lora is None else self.lora.looked_up(ids, rows)


class AdaptedRouter(Router):
    """A router whose (small) weight is adapted as a whole: its arithmetic stays ``ops.route``'s."""

    def __init__(self, router: Router, lora: Factors) -> None:
        nn.Module.__init__(self)
        self.spec = router.spec
        self.frozen = router.weight
        self.lora = lora

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """W + s B A."""
        return self.frozen + self.lora.delta().to(self.frozen.dtype)


class AdaptedFeedForward(nn.Module):
    """:class:`~quadriga.model.feedforward.FeedForward` over frozen weights."""

    def __init__(self, spec: DenseSpec, weights: Mapping[str, Weight], lora: Mapping[str, Factors]) -> None:
        super().__init__()
        self.activation = spec.activation
        parts = ("w_gate", "w_up", "w_down") if spec.gated else ("w_up", "w_down")
        self.parts = nn.ModuleDict({part: AdaptedMatrix(weights[part], lora.get(part)) for part in parts})

    def forward(self, x: Tensor) -> Tensor:
        """(N, D) -> (N, D)."""
        hidden: Tensor = self.parts["w_up"](x)
        if "w_gate" in self.parts:
            hidden = ops.activate(self.parts["w_gate"](x), self.activation) * hidden
        else:
            hidden = ops.activate(hidden, self.activation)
        out: Tensor = self.parts["w_down"](hidden)
        return out


class AdaptedCompute(Protocol):
    """Whoever computes adapted experts in training, see ``ops.training.adapted_experts``."""

    def __call__(
        self, x: Tensor, routing_ids: Tensor, combine: Tensor, parts: dict[str, AdaptedPart], activation: str
    ) -> Tensor:
        """(N, D) -> (N, D)."""
        ...


class AdaptedMoE(nn.Module):
    """:class:`~quadriga.model.moe.MoE` over frozen experts, each with factors of its own.

    Attributes:
        compute: computes experts whose factors are the same for all tokens and see no dropout; None: grouped products.
    """

    compute: AdaptedCompute | None = None

    def __init__(self, moe: MoE, weights: Mapping[str, Weight], lora: Mapping[str, Factors]) -> None:
        super().__init__()
        self.spec, self.router, self.fuse = moe.spec, moe.router, moe.fuse
        self._weights: dict[str, Weight] = dict(weights)
        self.lora = nn.ModuleDict(dict(lora))
        for name, weight in weights.items():  # plain ones move and are saved with the model
            if isinstance(weight, Tensor):
                self.register_parameter(name, weight)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> tuple[Tensor, RouterStats]:
        """(N, D) -> ((N, D), this layer's routing)."""
        ids, weights, probs, logits = self.router(x)
        combine = MoE.aggregation_weights(self, ids, weights)  # type: ignore[arg-type]
        stats = RouterStats(ids, combine, probs, logits)
        if self.compute is not None and (parts := self._plain_parts(x.dtype)) is not None:
            return self.compute(x, ids, combine, parts, self.spec.activation), stats
        k = self.spec.top_k
        flat = ids.reshape(-1)
        order = flat.argsort(stable=True)  # (N k,) slots, all of expert 0 first
        counts = torch.bincount(flat, minlength=self.spec.n_experts)
        tokens = order // k
        rows = x[tokens]
        gate = self._part("w_gate", rows, counts, tokens)
        hidden = ops.activate(gate, self.spec.activation) * self._part("w_up", rows, counts, tokens)
        y = self._part("w_down", hidden, counts, tokens)
        slots = torch.empty_like(y).index_copy(0, order, y).view(len(x), k, -1)
        out = torch.bmm(combine.to(x.dtype)[:, None], slots).squeeze(1)
        return out, stats

    def _weight(self, name: str) -> Weight:
        found = self._parameters.get(name)
        return self._weights[name] if found is None else found

    def _plain_parts(self, dtype: torch.dtype) -> dict[str, AdaptedPart] | None:
        """What ``compute`` takes; None where an adapter is no mere pair of factors, or drops inputs."""
        made, factors = {}, dict(self.lora.items())
        for name in self._weights:
            weight, lora = self._weight(name), factors.get(name)
            assert not isinstance(weight, Packed), "one matrix an expert"
            if lora is None:
                made[name] = AdaptedPart(weight)
            elif isinstance(lora, Factors) and not (lora.dropout and self.training):
                made[name] = AdaptedPart(weight, lora.a.to(dtype), lora.b.to(dtype), lora.scale)
            else:
                return None
        return made

    def _part(self, name: str, rows: Tensor, counts: Tensor, tokens: Tensor) -> Tensor:
        y = frozen_grouped(rows, self._weight(name), counts)
        return self.lora[name].grouped(rows, y, counts, tokens) if name in self.lora else y  # type: ignore[operator]


def attach(
    model: Transformer, spec: LoraSpec, factors: Mapping[str, tuple[Tensor, Tensor]] | None = None, *, seed: int = 0
) -> dict[str, Factors]:
    """Freeze a model and put an adapter on it, in place.

    Args:
        model: its parameters become frozen; matrices under an adapter are replaced by adapted ones.
        factors: parameter -> (A, B), e.g. of a file (``checkpoint.adapter``); None starts a new adapter: A drawn
            uniformly within 1 / sqrt(in), B zero, so that the model's function does not change.

    Returns:
        parameter -> its factors, whose ``a`` and ``b`` are all there is to train (in the model's dtype if that is
        float32, else float32).

    Raises:
        ConfigError: a target the model has not.
    """
    shapes = adapted_shapes(model.config, spec)
    if factors is not None:
        assert shapes.keys() == factors.keys(), "the file's factors are of the spec's targets"
    device = next(model.parameters()).device
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    made: dict[str, Factors] = {}
    generator = torch.Generator().manual_seed(seed)
    for name, (a_shape, b_shape) in shapes.items():
        if factors is None:
            bound = 1.0 / math.sqrt(a_shape[-1])
            a = torch.empty(a_shape).uniform_(-bound, bound, generator=generator)
            b = torch.zeros(b_shape)
        else:
            a, b = (t.detach().float().clone() for t in factors[name])
            fits = (*a.shape[:-2], a.shape[-1]) == (*a_shape[:-2], a_shape[-1]) and b.shape[:-1] == b_shape[:-1]
            assert fits and a.shape[-2] == b.shape[-1], "checked where the file was read"
        made[name] = Factors(a.to(device), b.to(device), spec)
    by_module: dict[str, dict[str, Factors]] = {}
    for name, one in made.items():
        module, _, part = name.rpartition(".")
        by_module.setdefault(module, {})[part] = one
    # Routers first: an adapted mixture keeps the router it finds.
    for path in sorted(by_module, key=lambda module_path: not module_path.endswith("router")):
        replace_module(model, path, _adapted(model.get_submodule(path), by_module[path]))
    return made


def _adapted(module: nn.Module, lora: dict[str, Factors]) -> nn.Module:
    match module:
        case Matrix():
            return AdaptedMatrix(module.weight, lora["weight"])
        case AdaptedMatrix():
            return AdaptedMatrix(module.frozen, lora["weight"])
        case Router():
            return AdaptedRouter(module, lora["weight"])
        case FeedForward():
            weights = {name: w for name in ("w_gate", "w_up", "w_down") if (w := getattr(module, name)) is not None}
            spec = DenseSpec(d_ff=len(module.w_up), activation=module.activation, gated=module.w_gate is not None)
            return AdaptedFeedForward(spec, weights, lora)
        case AdaptedFeedForward():
            for part, one in lora.items():
                module.parts[part].lora = one
            return module
        case MoE():
            return AdaptedMoE(module, {n: getattr(module, n) for n in ("w_gate", "w_up", "w_down")}, lora)
        case AdaptedMoE():
            module.lora.update(lora)
            return module
    raise AssertionError(f"adapted_shapes names parameters of known modules, got {type(module).__name__}")


def replace_module(model: nn.Module, path: str, module: nn.Module) -> None:
    """Put ``module`` where ``path`` is."""
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, module.train(model.training))


def quantised(model: Transformer, parameters: Mapping[str, Packed | list[Packed]]) -> None:
    """Let a model compute over packed matrices, in place: QLoRA's base. CPU only.

    Args:
        parameters: the packed ones among its parameters: attention, dense feed-forward, experts. Tables, heads,
            routers and norms stay plain. Their plain originals may lie on the meta device: they are let go.
    """
    by_module: dict[str, dict[str, Packed | list[Packed]]] = {}
    for name, packed in parameters.items():
        module, _, part = name.rpartition(".")
        by_module.setdefault(module, {})[part] = packed
    for path, parts in by_module.items():
        old = model.get_submodule(path)
        match old:
            case Matrix():
                replace_module(model, path, AdaptedMatrix(parts["weight"], None))
            case FeedForward():
                spec = DenseSpec(d_ff=len(old.w_up), activation=old.activation, gated=old.w_gate is not None)
                replace_module(model, path, AdaptedFeedForward(spec, parts, {}))
            case MoE():
                replace_module(model, path, AdaptedMoE(old, parts, {}))
            case _:
                raise AssertionError(f"{path} holds no matrices to pack")


# Frozen products -----------------------------------------------------------------------------------------------------


class _PackedLinear(torch.autograd.Function):
    """x W^T where W is unpacked when needed, forwards and backwards, and never kept."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, packed: Packed) -> Tensor:
        ctx.packed = packed
        return F.linear(x, packed.unpack().to(x.dtype))

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        (gradient,) = gradients
        return gradient @ ctx.packed.unpack().to(gradient.dtype), None


def frozen_linear(x: Tensor, weight: Weight) -> Tensor:
    """x W^T for a weight that gets no gradient."""
    if isinstance(weight, Tensor):
        return F.linear(x, weight)
    assert isinstance(weight, Packed), "one matrix"
    if x.device.type != "cpu":
        raise HardwareError(f"packed weights are unpacked by the CPU's kernels; the input is on {x.device}")
    out: Tensor = _PackedLinear.apply(x, weight)  # type: ignore[no-untyped-call]
    return out


def frozen_grouped(rows: Tensor, weight: Weight, counts: Tensor) -> Tensor:
    """Rows of expert e times W[e]^T, for rows sorted by expert."""
    if isinstance(weight, Tensor):
        return ops.grouped_linear(rows, weight, counts)
    assert isinstance(weight, list), "one matrix an expert"
    parts = zip(torch.split(rows, counts.tolist()), weight, strict=True)
    return torch.cat([frozen_linear(part, packed) for part, packed in parts if len(part)])
