"""The model of a tuning run: all parameters, or an adapter over a frozen base, on one rank or on many.

    one rank         read from the checkpoint, whole
    several ranks    on the meta device; once the trainer has sharded it, each rank reads its boxes (:class:`Filling`)

A quantised base (QLoRA) is read whole on every rank: packed blocks are not sharded, but for the experts that
``parallel.experts`` divides, of which each rank keeps its own.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import msgspec
import torch
from torch import Tensor

from quadriga.errors import ConfigError
from quadriga.hub import catalogue
from quadriga.io.adapter import load as load_adapter
from quadriga.io.adapter_files import low_rank
from quadriga.io.fingerprint import fingerprint
from quadriga.io.open import Checkpoint, open_checkpoint
from quadriga.io.packed import pack_parameter
from quadriga.kernels.arrays import tensor
from quadriga.model.adapter_spec import LoraSpec, target_of
from quadriga.model.config import ModelConfig
from quadriga.model.weight_map import Box, parameter_shapes
from quadriga.nn.load import load_parameters
from quadriga.nn.lora import attach, beginning, quantised
from quadriga.nn.transformer import Transformer
from quadriga.text.tokenizer import Tokenizer
from quadriga.train.batch import TrainingBatch
from quadriga.train.distill import FinalHidden, Teacher, require_same_vocabulary
from quadriga.train.objectives import Reference
from quadriga.train.parallel import DTYPES, Fill, prepare
from quadriga.train.tune_config import LoraSection, TuneConfig
from quadriga.train.world import World

_PACKABLE = ("attention", "experts", "shared", "ffn")


@dataclass(frozen=True)
class TunedModel:
    """A model to tune."""

    model: Transformer
    """On the meta device if ``fill`` is given."""
    spec: LoraSpec | None
    """The adapter on it, if there is one."""
    fill: Fill | None
    """Its initial values, for the trainer; reads from the checkpoint, which must stay open until then."""


def build_model(config: TuneConfig, checkpoint: Checkpoint, world: World) -> TunedModel:
    """Build the model to train: all parameters, or an adapter over a frozen base, which may be quantised."""
    if config.lora is None:
        if world.size > 1:
            return TunedModel(_empty(checkpoint.config), None, Filling(checkpoint))
        parameters = load_parameters(checkpoint, dtype=torch.float32)
        return TunedModel(Transformer.from_parameters(checkpoint.config, parameters), None, None)
    spec, factors = _adapter(config.lora, checkpoint.config, config.seed)
    if world.size > 1 and config.lora.base_format == "float32":
        model = _empty(checkpoint.config)
        attach(model, spec, factors)
        return TunedModel(model, spec, Filling(checkpoint, factors))
    model = _base(checkpoint, config.lora, None if world.device.type == "cpu" else world.device)
    attach(model, spec, factors)
    return TunedModel(model, spec, None)


def reference(config: TuneConfig, tuned: TunedModel, checkpoint: Checkpoint, world: World) -> Reference:
    """The model before tuning: without its adapter, or a frozen copy, sharded like the trained one.

    Raises:
        ConfigError: the adapter did not begin with zeros.
    """
    if config.lora is not None:
        if config.lora.start is not None:
            raise ConfigError(
                "dpo and grpo compare with the model without adapter: merge lora.start into the model first"
            )
        return Reference(None)
    if world.size == 1:
        return Reference(_frozen(tuned.model, config.parallel.dtype))
    model = _empty(checkpoint.config).requires_grad_(False)
    return Reference(prepare(model, _no_objective, config.parallel, world, Filling(checkpoint)).eval())


def frozen_weights(config: TuneConfig, checkpoint: Checkpoint) -> dict[str, str]:
    """Fingerprints of the models that the run computes with and does not save; a resumed run must have the same.

    They are the base under an adapter, or that dpo and grpo compare with, and the teacher that is a model here.
    """
    compared = config.objective == "dpo" or (config.objective == "grpo" and config.grpo.kl_weight)
    found = {"base": fingerprint(checkpoint)} if config.lora is not None or compared else {}
    if config.distill.teacher is not None and config.distill.url is None:
        other = open_checkpoint(catalogue.resolve(config.distill.teacher))
        try:
            found["teacher"] = fingerprint(other)
        finally:
            other.close()
    return found


def teacher(config: TuneConfig, student: Tokenizer, world: World) -> Teacher:
    """The model to learn from, computed as the student is; sharded over the ranks.

    Raises:
        ConfigError: it has no vocabulary, or another one than the student.
    """
    name = config.distill.teacher or ""
    checkpoint = open_checkpoint(catalogue.resolve(name))
    try:
        tokenizer = checkpoint.load_tokenizer(catalogue.cl100k_ranks)
        if tokenizer is None:
            raise ConfigError(f"distill.teacher must have a tokenizer; {name} has none")
        require_same_vocabulary(student, tokenizer, name)
        experts = config.parallel.experts if checkpoint.config.is_moe else 1
        section = msgspec.structs.replace(config.parallel, experts=experts, recompute=False)
        if world.size == 1:
            parameters = load_parameters(checkpoint, dtype=torch.float32)
            model = _narrowed(Transformer.from_parameters(checkpoint.config, parameters), config.parallel.dtype)
            fill = None
        else:
            model, fill = _empty(checkpoint.config).requires_grad_(False), Filling(checkpoint)
        return Teacher(prepare(model, FinalHidden(), section, world, fill).eval())
    finally:
        checkpoint.close()


class Filling:
    """The initial values of a model, by name and box: of its base from a checkpoint, of its adapter from memory.

    Args:
        factors: parameter -> (A, B) of the adapter that is on the model.
    """

    def __init__(self, checkpoint: Checkpoint, factors: Mapping[str, tuple[Tensor, Tensor]] | None = None) -> None:
        self._checkpoint, self._factors = checkpoint, factors or {}

    def __call__(self, name: str, box: Box) -> Tensor:
        """See ``parallel.Fill``."""
        adapted, _, part = name.rpartition(".delta.")
        if adapted in self._factors:
            return self._factors[adapted][("a", "b").index(part)][tuple(slice(*span) for span in box)]
        return tensor(self._checkpoint.parameters.read(name.removesuffix(".frozen"), box)).float()


def _empty(config: ModelConfig) -> Transformer:
    with torch.device("meta"):
        return Transformer(config)


def _adapter(lora: LoraSection, config: ModelConfig, seed: int) -> tuple[LoraSpec, dict[str, tuple[Tensor, Tensor]]]:
    """The adapter's spec, and the factors that it begins with."""
    if lora.start is None:
        return lora.spec(), beginning(config, lora.spec(), seed=seed)
    start = load_adapter(Path(lora.start).expanduser(), config)
    spec = replace(start.spec, dropout=lora.dropout)
    stored = {name: (tensor(a), tensor(b)) for name, (a, b) in low_rank(start).items()}
    return spec, beginning(config, spec, stored)


def _base(checkpoint: Checkpoint, lora: LoraSection, device: torch.device | None) -> Transformer:
    if lora.base_format == "float32":
        return Transformer.from_parameters(checkpoint.config, load_parameters(checkpoint, dtype=torch.float32))
    shapes = parameter_shapes(checkpoint.config)
    packed: dict[str, Any] = {}
    plain: dict[str, torch.Tensor] = {}
    for name, shape in shapes.items():
        if target_of(name) in _PACKABLE:
            matrices = list(pack_parameter(checkpoint, name, shape, lora.base_format))
            packed[name] = matrices if len(shape) == 3 else matrices[0]
            plain[name] = torch.empty(shape, device="meta")
        else:
            plain[name] = tensor(checkpoint.parameters.read(name)).float()
    model = Transformer.from_parameters(checkpoint.config, plain)
    quantised(model, packed, device)
    return model


def _frozen(model: Transformer, dtype: str) -> Transformer:
    """A copy of the model that computes as the trained one does."""
    return _narrowed(copy.deepcopy(model), dtype)


def _narrowed(made: Transformer, dtype: str) -> Transformer:
    """The model, frozen, in ``dtype`` but for the router."""
    made.requires_grad_(False).eval()
    for name, parameter in made.named_parameters():
        if ".router." not in name:
            parameter.data = parameter.data.to(DTYPES[dtype])
    return made


def _no_objective(model: Transformer, batch: TrainingBatch) -> tuple[Tensor, dict[str, Tensor]]:
    raise AssertionError("a reference puts what it computes in this place")
