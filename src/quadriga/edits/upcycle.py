"""Turn a dense model into a fine-grained mixture of experts that computes the same function (`quadriga upcycle`).

The feed-forward network is cut along d_ff into g granules; the experts are n_experts / g copies of them:

    dense   y = sum_j w_down[:, j] (act(w_gate[j] x) * w_up[j] x)             j = 1..g: slices of d_ff / g units
    expert  e = copy * g + j:  w_gate[j], w_up[j], g * w_down[:, j]
    router  row e = the row of its copy: all granules of a copy have the same logit

So a token's top k experts are all granules of its best k / g copies. The k normalised weights sum to 1 and are equal
within a copy, so sum_e weight_e g y_j = y: the MoE's logits equal the dense model's, up to float32 rounding, for any
router rows. The router rows decide which copy a token visits from the first step on: random rows separate tokens by
direction, rows fitted to labelled text (``edits.fit_router``) by domain. g * w_down has w_down's dtype where g is a
power of two, which changes no digit, and is float32 where it is not.

Sources: sparse upcycling (Komatsuzaki et al. 2023: g = 1); granules and the "virtual group" router (He et al. 2024,
arXiv 2410.07524); ``drop`` is Drop-Upcycling (Nakamura et al. 2025, arXiv 2502.19261); ``noise`` as in Qwen1.5-MoE.
Both options change the function, which training must recover; in return the experts differ from the start.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from quadriga.errors import ConfigError
from quadriga.io.derive import Unchanged, derive
from quadriga.io.open import Checkpoint
from quadriga.model import families
from quadriga.model.config import DenseSpec, ModelConfig, MoESpec
from quadriga.model.weight_map import parameter_shapes
from quadriga.quant.dtypes import DTYPES, Array, as_float32

_PARTS = {"w_gate": "rows", "w_up": "rows", "w_down": "columns"}


@dataclass(frozen=True, kw_only=True)
class Upcycling:
    """The settings of upcycling."""

    n_experts: int = 16
    top_k: int = 4
    granules: int | None = None
    """Number of parts that d_ff is cut into; None: top_k, so that a token costs as much as before."""
    router_std: float = 0.02
    """Standard deviation of the random router rows, one per copy."""
    noise: float = 0.0
    """Normal noise added to every expert weight, in units of the matrix's standard deviation."""
    drop: float = 0.0
    """Fraction of each expert's hidden units to reinitialise, with the mean and deviation of those they replace."""
    aux_loss_weight: float = 0.01
    """Weight of the load-balancing loss in the result's configuration."""
    seed: int = 0

    @property
    def n_granules(self) -> int:
        """Number of granules; top_k if ``granules`` is None."""
        return self.granules or self.top_k

    @property
    def n_copies(self) -> int:
        """Number of copies of every granule."""
        return self.n_experts // self.n_granules

    def __post_init__(self) -> None:
        g = self.n_granules
        if g < 1 or self.n_experts % g or self.top_k % g:
            raise ConfigError(
                f"granules must divide n_experts and top_k, so that a token visits whole copies: got granules={g}, "
                f"n_experts={self.n_experts}, top_k={self.top_k}. Leave granules out to use top_k."
            )
        for name in ("noise", "drop", "router_std"):
            value = getattr(self, name)
            if not 0 <= value <= 1:
                raise ConfigError(f"{name} must be between 0 and 1, got {value}")


def upcycled_config(dense: ModelConfig, how: Upcycling) -> ModelConfig:
    """The configuration of the mixture that a dense model becomes.

    Raises:
        ConfigError: no supported family can describe the mixture.
    """
    layer = dense.only_layer("upcycling")
    ffn, mixture = layer.ffn, families.family_of(dense).counterpart
    if not isinstance(ffn, DenseSpec) or not ffn.gated or mixture is None:
        raise ConfigError(
            "upcycling supports dense models like LLaMA or Qwen3, which become like Mixtral or Qwen3-MoE; this one is "
            f"of the family {dense.family} with {ffn}. MPT's network has no gate, and experts must be gated."
        )
    if ffn.d_ff % how.n_granules:
        raise ConfigError(f"granules must divide d_ff: got d_ff={ffn.d_ff}, granules={how.n_granules}")
    moe = MoESpec(
        d_ff=ffn.d_ff // how.n_granules,
        n_experts=how.n_experts,
        top_k=how.top_k,
        activation=ffn.activation,
        aux_loss_weight=how.aux_loss_weight,
    )
    return replace(dense.with_layers(lambda layer: replace(layer, ffn=moe)), family=mixture)


def upcycle(
    dense: Checkpoint, how: Upcycling | None = None, *, routers: Mapping[int, Array] | None = None
) -> Checkpoint:
    """Upcycle a dense model; returns a derived checkpoint, which ``convert.write`` stores.

    Args:
        dense: an open checkpoint; keep it open while the result is read.
        how: the settings; None: the defaults.
        routers: layer -> (copies, D), one row per copy, instead of random rows.

    Raises:
        ConfigError: sizes that do not divide, or no supported family can describe the mixture.
    """
    return derive(dense, _Upcycle(dense, how or Upcycling(), routers))


class _Upcycle(Unchanged):
    def __init__(self, dense: Checkpoint, how: Upcycling, routers: Mapping[int, Array] | None) -> None:
        config = upcycled_config(dense.config, how)
        description = f"upcycled with {how}"
        if routers is not None:
            wanted = (how.n_copies, config.d_model)
            for layer in range(config.n_layers):
                got = tuple(routers[layer].shape) if layer in routers else None
                if got != wanted:
                    raise ConfigError(f"layer {layer} needs router rows {wanted}, one per copy; got {got}")
            description += f" and routers {_digest(routers)}"
        super().__init__(dense, config, description)
        self.how, self.routers = how, routers

    def dtype(self, name: str) -> np.dtype[Any]:
        part = name.rsplit(".", 1)[-1]
        if name.endswith("router.weight"):
            return DTYPES["float32"]
        if name.endswith("moe.w_down") and self.how.n_granules & (self.how.n_granules - 1):
            return DTYPES["float32"]  # 3 * x has more digits than bfloat16 keeps
        return super().dtype(name.replace(".moe.", ".ffn.") if part in _PARTS else name)

    def rows(self, name: str, expert: int | None, first: int, last: int) -> Array:
        if name.endswith("router.weight"):
            rows = np.repeat(self._router(int(name.split(".")[1])), self.how.n_granules, axis=0)
            return rows[first:last]
        if expert is None:
            return super().rows(name, None, first, last)
        return self._expert(name, expert)[first:last].astype(self.dtype(name), copy=False)

    def _router(self, layer: int) -> Array:
        if self.routers is not None:
            return as_float32(self.routers[layer])
        generator = _generator(self.how.seed, f"router {layer}")
        shape = (self.how.n_copies, self.config.d_model)
        return self.how.router_std * generator.standard_normal(shape, dtype=np.float32)

    def _expert(self, name: str, expert: int) -> Array:
        part, g = name.rsplit(".", 1)[-1], self.how.n_granules
        source, width = name.replace(".moe.", ".ffn."), self.config.layers[0].ffn.d_ff
        start = expert % g * width
        units = (start, start + width)
        dense_shape = parameter_shapes(self.base.config)[source]
        if _PARTS[part] == "rows":
            matrix = as_float32(self.base.parameters.read(source, (units, (0, dense_shape[1]))))
        else:
            matrix = as_float32(self.base.parameters.read(source, ((0, dense_shape[0]), units))) * np.float32(g)
        if self.how.drop:
            matrix = self._redrawn(matrix, name, expert)
        if self.how.noise:
            generator = _generator(self.how.seed, f"noise {name} {expert}")
            noise = generator.standard_normal(matrix.shape, dtype=np.float32)
            matrix = matrix + np.float32(self.how.noise) * matrix.std() * noise
        return matrix

    def _redrawn(self, matrix: Array, name: str, expert: int) -> Array:
        """Reinitialise some hidden units, the same ones in gate, up and down, from each matrix's own distribution."""
        layer, width = name.split(".")[1], self.config.layers[0].ffn.d_ff
        chosen = _generator(self.how.seed, f"drop {layer} {expert}").permutation(width)
        chosen = chosen[: int(self.how.drop * width)]
        units = np.array(matrix if name.endswith(("w_gate", "w_up")) else matrix.T)
        if len(chosen):
            old = units[chosen]
            fresh = _generator(self.how.seed, f"fresh {name} {expert}").standard_normal(old.shape, dtype=np.float32)
            units[chosen] = old.mean() + old.std() * fresh
        return units if name.endswith(("w_gate", "w_up")) else units.T


def _generator(seed: int, what: str) -> np.random.Generator:
    """A generator that depends only on the seed and the purpose, not on the order in which parts are computed."""
    digest = hashlib.sha256(f"{seed} {what}".encode()).digest()
    return np.random.Generator(np.random.Philox(int.from_bytes(digest[:8], "little")))


def _digest(routers: Mapping[int, Array]) -> str:
    digest = hashlib.sha256()
    for layer in sorted(routers):
        digest.update(np.ascontiguousarray(as_float32(routers[layer])).tobytes())
    return digest.hexdigest()[:16]
