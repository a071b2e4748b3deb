"""A checkpoint with the same model said in other numbers, where a format keeps some of them differently.

    norm's weight w  <->  1 + w        log rate r  <->  -exp(r)        heads of v: by their head of k  <->  by turns

llama.cpp's files of Qwen3-Next and Qwen3.5 have the right-hand sides, Hugging Face directories the left-hand sides
(:attr:`Family.gguf_form`, :attr:`Family.hf_form`); of Granite 4 only the rates differ. Heads move without a bit
changing. Sums and exponentials are taken in float64 and rounded once, to float32.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, TypeVar

import numpy as np

from quadriga.errors import CheckpointError
from quadriga.io.derive import Unchanged, derive
from quadriga.io.open import Checkpoint
from quadriga.model import families
from quadriga.model.config import AttentionSpec, DeltaNetSpec, LayerSpec, Mamba2Spec, ModelConfig
from quadriga.quant.dtypes import Array, as_float32
from quadriga.quant.feedback import Importance, Moments


def restated(checkpoint: Checkpoint, to: str) -> Checkpoint:
    """The checkpoint as a format keeps its numbers; itself where the format keeps them as they are.

    Args:
        checkpoint: stays open; keep it open while the result is read.
        to: "quadriga", "hf" or "gguf".
    """
    family = families.family_of(checkpoint.config)
    form = {"gguf": family.gguf_form, "hf": family.hf_form}.get(to)
    config = checkpoint.config if form is None else form(checkpoint.config)
    return checkpoint if config == checkpoint.config else derive(checkpoint, _Restated(checkpoint, config, to))


_Kind = TypeVar("_Kind", Array, Importance)


def restated_columns(importance: Mapping[str, _Kind], old: ModelConfig, new: ModelConfig) -> dict[str, _Kind]:
    """Importance of the columns of matrices of ``old`` in the order that the columns have in ``new``."""
    orders = {name: order for name, (axis, order) in _moved(old, new).items() if axis == 1}
    moved = dict(importance)
    for name in orders.keys() & moved.keys():
        one, order = moved[name], orders[name]
        moved[name] = one.reordered(order) if isinstance(one, Moments) else one[order]
    return moved


class _Restated(Unchanged):
    def __init__(self, base: Checkpoint, config: ModelConfig, to: str) -> None:
        super().__init__(base, config, f"restated for {to}")
        self._added = dict(_added(base.config, config))
        self._orders = _moved(base.config, config)
        self._rates: dict[str, bool] = {}
        """Rate -> whether the result is its logarithm."""
        for i, (old, new) in enumerate(zip(base.config.layers, config.layers, strict=True)):
            before, after = _log_rate(old), _log_rate(new)
            if after is not None and before != after:
                self._rates[f"layers.{i}.{'mamba' if isinstance(new.mixer, Mamba2Spec) else 'delta'}.rate"] = after

    def dtype(self, name: str) -> np.dtype[Any]:
        """See :class:`~quadriga.io.derive.Edit`."""
        return np.dtype(np.float32) if name in self._added or name in self._rates else super().dtype(name)

    def rows(self, name: str, expert: int | None, first: int, last: int) -> Array:
        """See :class:`~quadriga.io.derive.Edit`."""
        values = self._ordered(name, expert, first, last)
        if name in self._added:
            return (as_float32(values).astype(np.float64) + self._added[name]).astype(np.float32)
        return self._rate(name, values) if name in self._rates else values

    def _ordered(self, name: str, expert: int | None, first: int, last: int) -> Array:
        axis, order = self._orders.get(name, (0, None))
        if order is None:
            return super().rows(name, expert, first, last)
        if axis == 1:
            return super().rows(name, expert, first, last)[:, order]
        wanted = order[first:last]
        runs = np.split(wanted, np.flatnonzero(np.diff(wanted) != 1) + 1)
        return np.concatenate(
            [super(_Restated, self).rows(name, expert, int(run[0]), int(run[-1]) + 1) for run in runs]
        )

    def _rate(self, name: str, values: Array) -> Array:
        wide = as_float32(values).astype(np.float64)
        with np.errstate(all="ignore"):  # what is no number is refused below
            found: Array = (np.log(-wide) if self._rates[name] else -np.exp(wide)).astype(np.float32)
        if not np.isfinite(found).all():
            what = "negative numbers" if self._rates[name] else "logarithms of float32 numbers"
            raise CheckpointError(f"{name} must hold {what}, got {wide[~np.isfinite(found)][0]:g}")
        return found


def _log_rate(layer: LayerSpec) -> bool | None:
    """Whether a layer's rates are stored as logarithms; None: it has none."""
    return layer.mixer.log_rate if isinstance(layer.mixer, (DeltaNetSpec, Mamba2Spec)) else None


def _added(old: ModelConfig, new: ModelConfig) -> Iterator[tuple[str, float]]:
    """Norms' weights, and what is added to each."""
    for i, (before, after) in enumerate(zip(old.layers, new.layers, strict=True)):
        for name, more in _plus(before).items():
            if more != _plus(after)[name]:
                yield f"layers.{i}.{name}.weight", more - _plus(after)[name]
    if old.final_norm.plus_one != new.final_norm.plus_one:
        yield "final_norm.weight", float(old.final_norm.plus_one) - float(new.final_norm.plus_one)


def _plus(layer: LayerSpec) -> dict[str, float]:
    """A layer's norms, and what its arithmetic adds to their weights."""
    names = ["attn_norm", "ffn_norm"] if layer.pre_norms else []
    names += ["attn_post_norm", "ffn_post_norm"] if layer.post_norms else []
    both = dict.fromkeys(names, float(layer.norm.plus_one))
    if isinstance(layer.mixer, AttentionSpec) and layer.mixer.qk_norm is not None:
        both |= dict.fromkeys(("attn.q_norm", "attn.k_norm"), float(layer.mixer.qk_norm.plus_one))
    return both


def _moved(old: ModelConfig, new: ModelConfig) -> dict[str, tuple[int, Array]]:
    """Parameters whose heads of v lie elsewhere -> (axis, which of the old indices comes where)."""
    return {
        f"layers.{i}.delta.{name}": order
        for i, (before, after) in enumerate(zip(old.layers, new.layers, strict=True))
        if isinstance(before.mixer, DeltaNetSpec) and isinstance(after.mixer, DeltaNetSpec)
        if before.mixer.tiled != after.mixer.tiled
        for name, order in _orders(after.mixer)
    }


def _orders(new: DeltaNetSpec) -> Iterator[tuple[str, tuple[int, Array]]]:
    """Parameters with heads of v -> (axis, which of the base's indices comes where)."""
    n_v, n_k = new.n_v_heads, new.n_k_heads
    grid = (n_k, n_v // n_k) if new.tiled else (n_v // n_k, n_k)
    heads = np.arange(n_v).reshape(grid).T.reshape(-1)
    channels = (heads[:, None] * new.v_dim + np.arange(new.v_dim)).reshape(-1)
    keys = np.arange(2 * new.qk_dim)
    convolved = np.concatenate((keys, len(keys) + channels))
    yield "w_in.weight", (0, np.concatenate((convolved, new.width + channels)))
    yield "w_ba.weight", (0, np.concatenate((heads, n_v + heads)))
    yield "taps", (0, convolved)
    yield "rate", (0, heads)
    yield "dt", (0, heads)
    yield "w_out.weight", (1, channels)
