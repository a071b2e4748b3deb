"""The layers of Nemotron-H: each is one of four branches (see :mod:`quadriga.model.families.nemotron_h`)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Literal

from quadriga.errors import ConfigError
from quadriga.model.config import (
    AttentionSpec,
    DenseSpec,
    LayerSpec,
    Mamba2Spec,
    ModelConfig,
    MoESpec,
    NoFeedForward,
    NoMixer,
    NormSpec,
    in_order,
)
from quadriga.model.families import deepseek_moe

NAME = "nemotron_h"
Kind = Literal["mamba", "attention", "mlp", "moe"]
Branch = AttentionSpec | Mamba2Spec | DenseSpec | MoESpec


def model_of(kinds: Iterable[Kind], branches: Mapping[Kind, Branch], norm: NormSpec, **rest: Any) -> ModelConfig:
    """The model.

    Args:
        kinds: of each layer, which branch it is.
        branches: what each kind is.
        rest: the other fields of the model.
    """
    layers = in_order(_layer(branches[kind], norm) for kind in kinds)
    return ModelConfig(family=NAME, layers=layers, final_norm=norm, **rest)


def _layer(branch: Branch, norm: NormSpec) -> LayerSpec:
    if isinstance(branch, (DenseSpec, MoESpec)):
        return LayerSpec(norm=norm, mixer=NoMixer(), ffn=branch)
    return LayerSpec(norm=norm, mixer=branch, ffn=NoFeedForward())


def branches_of(config: ModelConfig, form: str) -> tuple[list[Kind], dict[Kind, Branch]]:
    """The inverse of :func:`model_of`: the kind of every layer, and what each kind is.

    Raises:
        ConfigError: a layer has two branches, one of another kind, or two layers of a kind differ.
    """
    kinds: list[Kind] = []
    branches: dict[Kind, Branch] = {}
    for layer in config.layers:
        branch = layer.ffn if layer.feeds else layer.mixer
        one: Kind | None = None
        match branch:
            case Mamba2Spec():
                one = "mamba"
            case AttentionSpec():
                one = "attention"
            case DenseSpec():
                one = "mlp"
            case MoESpec():
                one = "moe"
        if one is None or (layer.mixes and layer.feeds) or branches.get(one, branch) != branch:
            raise ConfigError(
                f"{form} cannot express this model: every layer must be a Mamba-2 layer, attention, a network or a "
                f"mixture, and all of a kind alike; got {layer}"
            )
        kinds.append(one)
        branches[one] = branch  # type: ignore[assignment]
    return kinds, branches


def network(d_ff: int) -> DenseSpec:
    """A plain network with squared ReLU."""
    return DenseSpec(d_ff=d_ff, activation="relu2", gated=False)


def experts(
    *,
    d_ff: int,
    n_experts: int,
    top_k: int,
    shared: int,
    scale: float,
    normalised: bool = True,
    groups: tuple[int, int] = (1, 1),
) -> MoESpec:
    """A mixture of such networks.

    Args:
        shared: width of the network beside them.
        scale: what weights are multiplied by at last.
        normalised: whether they are divided by their sum before that.
        groups: how many groups of experts there are, and how many of them are open.
    """
    return MoESpec(
        d_ff=d_ff,
        n_experts=n_experts,
        top_k=top_k,
        activation="relu2",
        gated=False,
        score="sigmoid",
        correction=True,
        normalize_p=1.0 if normalised else None,
        normalize_eps=deepseek_moe.EPS,
        routed_scale=scale,
        n_groups=groups[0],
        top_k_groups=groups[1],
        shared=network(shared),
    )
