"""A tuning run from its configuration: the training loop with tuning data and objective, and optionally an adapter.

    TuneConfig ─► checkpoint (quantised for QLoRA) ─► adapter ─► examples ─► Trainer ─► adapter/ or model/ in the run

Checkpoints contain only trained parameters: with an adapter, a few megabytes. A stopped run resumes where it stopped.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import msgspec
import torch

from quadriga import runtime
from quadriga.errors import ConfigError
from quadriga.hub import catalogue
from quadriga.io.adapter import load as load_adapter
from quadriga.io.adapter_files import Adapter, low_rank, save
from quadriga.io.open import Checkpoint, open_checkpoint
from quadriga.io.packed import pack_parameter
from quadriga.kernels.arrays import array, tensor
from quadriga.model.adapter_spec import LoraSpec, target_of
from quadriga.model.config import ModelConfig
from quadriga.model.weight_map import parameter_shapes
from quadriga.nn import devices
from quadriga.nn.linear import Factors
from quadriga.nn.load import load_parameters
from quadriga.nn.lora import attach, quantised
from quadriga.nn.transformer import Transformer
from quadriga.text.tokenizer import Tokenizer
from quadriga.text.turn_ends import turn_ends
from quadriga.train import report
from quadriga.train.batch import Objective
from quadriga.train.export import write_hf
from quadriga.train.held_out import held_out_losses, samples
from quadriga.train.losses import NextToken
from quadriga.train.metrics import MetricsFile
from quadriga.train.objectives import DPO, GRPO, ORPO, Reference
from quadriga.train.parallel import DTYPES
from quadriga.train.rollout import number_reward
from quadriga.train.run import peak_flops
from quadriga.train.run_directory import RunDirectory
from quadriga.train.trackers import Watcher, trackers
from quadriga.train.trainer import Trainer
from quadriga.train.tune_config import LoraSection, TuneConfig
from quadriga.train.tune_data import read_data
from quadriga.train.view import Screen
from quadriga.train.world import World

_PACKABLE = ("attention", "experts", "shared", "ffn")


@dataclass(frozen=True)
class _Settings:
    """The sections that the trainer needs, with the number of steps filled in."""

    config: TuneConfig
    n_steps: int

    def __getattr__(self, name: str) -> Any:
        return getattr(self.config, name)


@dataclass(frozen=True)
class Tuned:
    """How a tuning run ended."""

    done: bool
    step: int
    n_steps: int
    result: Path | None
    """Folder of the adapter or the model; None if the run was stopped before its end."""
    rejected: str
    """Message about rows that were skipped, by reason; empty if none."""


def tune(config: TuneConfig, *, stop: Callable[[], bool] = lambda: False, allow_change: bool = False) -> Tuned:
    """Tune until the end of the run or until ``stop`` returns True; the same call resumes a stopped run.

    Args:
        allow_change: resume also with settings that would have changed the run so far (``train.changes``).

    Raises:
        ConfigError, CorpusError, CheckpointError: the configuration, data or model cannot be used.
        TrainingError: the run diverged or could not save.
    """
    runtime.keep_freed_memory()
    world = World.join(config.parallel.device, config.parallel.timeout_s)
    if world.size > 1:
        world.leave()
        raise ConfigError("quadriga tune runs in one process: start it without torchrun")
    run = RunDirectory(Path(config.run).expanduser())
    try:
        with run.locked(), devices.quick_float32(config.data.seq_len):
            run.clean()
            return _tune(config, run, world, stop, allow_change=allow_change)
    finally:
        world.leave()


def _tune(
    config: TuneConfig, run: RunDirectory, world: World, stop: Callable[[], bool], *, allow_change: bool
) -> Tuned:
    checkpoint = open_checkpoint(catalogue.resolve(config.model))
    try:
        tokenizer = checkpoint.load_tokenizer(catalogue.cl100k_ranks)
        if tokenizer is None:
            raise ConfigError(f"tuning needs a model with a tokenizer; {config.model} has none")
        source, held_out, problems, rejects = read_data(config, tokenizer)
        model, factors, spec = build_model(config, checkpoint)
        origin = checkpoint.path
    finally:
        checkpoint.close()
    end_ids = frozenset((*model.config.eos_ids, *turn_ends(tokenizer).ids))
    objective = _objective(config, model, tokenizer, problems, world, end_ids)
    n_steps = config.schedule.steps or config.data.epochs * source.steps_per_epoch
    trainer = Trainer(_Settings(config, n_steps), model, source, objective, world=world, run=run)
    if run.steps():
        trainer.resume(allow_change=allow_change)
    peak = peak_flops(config.parallel.dtype, world)
    watchers: list[Watcher] = [
        MetricsFile(
            run.path, trainer.step, peak_flops=peak, learning_rate=config.optimiser.learning_rate,
            routing_every=config.log.routing_every,
        ),
        Screen(run.path.name, n_steps, every=config.log.every, peak_flops=peak),
        *trackers(config.log, run.path, trainer.step, msgspec.to_builtins(config)),
    ]  # fmt: skip
    trainer.listen(watchers)

    def evaluate(one: Trainer) -> None:
        losses = held_out_losses(one.module, held_out, world)
        said = samples(one.module, tokenizer, config.evaluate.prompts, config.evaluate.sample_tokens, end_ids, world)
        for watcher in watchers:
            watcher.on_evaluation(one.step, losses, said)

    if config.evaluate.every and held_out and config.objective != "grpo":
        trainer.evaluate, trainer.evaluate_every = evaluate, config.evaluate.every
        if trainer.step == 0:
            evaluate(trainer)
    (run.path / "config.json").write_bytes(msgspec.json.format(msgspec.json.encode(config)))
    try:
        done = trainer.train(stop)
    finally:
        for watcher in watchers:
            watcher.close()
        if config.log.report:
            report.write(run.path)
    result = _write(run, config, trainer, factors, spec, origin) if done else None
    return Tuned(done, trainer.step, n_steps, result, str(rejects))


# Model ---------------------------------------------------------------------------------------------------------------


def build_model(config: TuneConfig, checkpoint: Checkpoint) -> tuple[Transformer, dict[str, Factors], LoraSpec | None]:
    """Build the model to train: all parameters, or an adapter over a frozen base, which may be quantised."""
    if config.lora is None:
        parameters = load_parameters(checkpoint, dtype=torch.float32)
        return Transformer.from_parameters(checkpoint.config, parameters), {}, None
    lora, start = config.lora, None
    spec = lora.spec()
    if lora.start is not None:
        start = load_adapter(Path(lora.start).expanduser(), checkpoint.config)
        spec = replace(start.spec, dropout=lora.dropout)
    model = _base(checkpoint, lora)
    begun = None
    if start is not None:
        begun = {name: (tensor(a), tensor(b)) for name, (a, b) in low_rank(start).items()}
    factors = attach(model, spec, begun, seed=config.seed)
    return model, factors, spec


def _base(checkpoint: Checkpoint, lora: LoraSection) -> Transformer:
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
    quantised(model, packed)
    return model


def _write(
    run: RunDirectory, config: TuneConfig, trainer: Trainer, factors: dict[str, Factors], spec: LoraSpec | None,
    origin: Path,
) -> Path:  # fmt: skip
    """Write the adapter, or the model with its tokenizer as a Hugging Face directory; always float32.

    With ``[ema]`` what is written is the average of the weights, as ``quadriga train --export`` writes it.
    """
    from quadriga.io.conversion_plan import tokenizer_files

    masters = {**trainer.masters.by_name, **trainer.averages}
    if spec is not None:
        out = _fresh(run.path / "adapter")
        name_of = {id(parameter): name for name, parameter in trainer.model.named_parameters()}
        pairs = {
            name: (array(masters[name_of[id(one.a)]]), array(masters[name_of[id(one.b)]]))
            for name, one in factors.items()
        }
        save(Adapter(spec=spec, factors=pairs, base=config.model), out)
        return out
    out = _fresh(run.path / "model")
    checkpoint = open_checkpoint(origin)
    try:
        files = tokenizer_files(checkpoint)
    finally:
        checkpoint.close()
    write_hf({name: master.detach().cpu() for name, master in masters.items()}, trainer.model.config, out, files)
    return out


def _fresh(folder: Path) -> Path:
    """Return the folder after removing what an earlier end of this run wrote there."""
    import shutil

    shutil.rmtree(folder, ignore_errors=True)
    return folder


def _frozen(model: Transformer, dtype: str) -> Transformer:
    """A copy of the model that computes as the trained one does: in ``dtype``, but for the router."""
    made = copy.deepcopy(model).requires_grad_(False).eval()
    for name, parameter in made.named_parameters():
        if ".router." not in name:
            parameter.data = parameter.data.to(DTYPES[dtype])
    return made


def _objective(
    config: TuneConfig,
    model: Transformer,
    tokenizer: Tokenizer,
    problems: dict[tuple[int, ...], str],
    world: World,
    end_ids: Collection[int],
) -> Objective:
    architecture: ModelConfig = model.config
    if config.objective in ("sft", "text"):
        return NextToken(architecture, config.router, world)
    if config.objective == "orpo":
        return ORPO(config.preference.odds_weight)
    # The reference is the model without its adapter, or a frozen copy if there is no adapter.
    frozen = _frozen(model, config.parallel.dtype) if config.lora is None else None
    if config.lora is not None and config.lora.start is not None:
        raise ConfigError("dpo and grpo compare with the model without adapter: merge lora.start into the model first")
    reference = Reference(frozen)
    if config.objective == "dpo":
        return DPO(reference, config.preference.beta)

    def reward(prompt: Sequence[int], answer: Sequence[int]) -> float:
        said = tokenizer.decode([token for token in answer if tokenizer.is_token(token)], after=prompt)
        return number_reward(said, problems[tuple(prompt)])

    return GRPO(
        reference, reward, n_samples=config.grpo.samples, max_new_tokens=config.grpo.max_new_tokens,
        temperature=config.grpo.temperature, kl_weight=config.grpo.kl_weight,
        end_ids=end_ids,
        unused=tokenizer.unused_rows(architecture.vocab_size),
    )  # fmt: skip
