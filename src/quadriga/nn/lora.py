"""Low-rank adapters on a Transformer: attach and train; on experts as well, each with factors of its own.

    y = W x + s B A x             W frozen (or 4- and 8-bit blocks, unpacked when needed: QLoRA), A and B trained

The arithmetic is ``nn.linear``'s; here weights become adapted or quantised ones, in place. What is trained of an expert
that got no token has a gradient of exactly zero.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from quadriga.kernels.cpu.packing import Packed
from quadriga.model.adapter_spec import LoraSpec, adapted_shapes
from quadriga.model.config import ModelConfig
from quadriga.nn.device_packed import DevicePacked
from quadriga.nn.linear import Blocks, Factors, Quantised, adapt, hold
from quadriga.nn.transformer import Transformer


def beginning(
    config: ModelConfig, spec: LoraSpec, factors: Mapping[str, tuple[Tensor, Tensor]] | None = None, *, seed: int = 0
) -> dict[str, tuple[Tensor, Tensor]]:
    """The factors that an adapter begins with, float32 on the host: parameter -> (A, B); arguments as :func:`attach`.

    Raises:
        ConfigError: a target the model has not.
    """
    shapes = adapted_shapes(config, spec)
    if factors is not None:
        assert shapes.keys() == factors.keys(), "the file's factors are of the spec's targets"
    made: dict[str, tuple[Tensor, Tensor]] = {}
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
        made[name] = a, b
    return made


def attach(
    model: Transformer, spec: LoraSpec, factors: Mapping[str, tuple[Tensor, Tensor]] | None = None, *, seed: int = 0
) -> dict[str, Factors]:
    """Freeze a model and put an adapter on it, in place.

    Args:
        model: its parameters become frozen; matrices under an adapter are replaced by adapted ones.
        factors: parameter -> (A, B), e.g. of a file (``io.adapter``); None starts a new adapter: A drawn
            uniformly within 1 / sqrt(in), B zero, so that the model's function does not change.

    Returns:
        parameter -> its factors, whose ``a`` and ``b`` are all there is to train (in the model's dtype if that is
        float32, else float32).

    Raises:
        ConfigError: a target the model has not.
    """
    device = next(model.parameters()).device
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    made: dict[str, Factors] = {}
    for name, (a, b) in beginning(model.config, spec, factors, seed=seed).items():
        made[name] = Factors(a.to(device), b.to(device), scale=spec.scale, dropout=spec.dropout)
    for name, one in made.items():
        owner, _, part = name.rpartition(".")
        adapt(model.get_submodule(owner), part, one)
    return made


def quantised(
    model: Transformer, parameters: Mapping[str, Packed | list[Packed]], device: torch.device | None = None
) -> None:
    """Let a model compute over packed matrices, in place: QLoRA's base.

    Args:
        parameters: the packed ones among its parameters: attention, dense feed-forward, experts. Tables, heads,
            routers and norms stay plain. Their plain originals may lie on the meta device: they are let go.
        device: where they are to lie, if it is not the host; then they must be q8 or q4.
    """
    for name, packed in parameters.items():
        owner, _, part = name.rpartition(".")
        hold(model.get_submodule(owner), part, Quantised(_placed(packed, device)))


def _placed(packed: Packed | list[Packed], device: torch.device | None) -> Blocks | list[Blocks]:
    if device is None:
        return packed if isinstance(packed, Packed) else list(packed)
    return DevicePacked(packed, device) if isinstance(packed, Packed) else [DevicePacked(one, device) for one in packed]
