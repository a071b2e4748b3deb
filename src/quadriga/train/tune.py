"""A tuning run from its configuration: the training loop with tuning data and objective, and optionally an adapter.

    TuneConfig ─► checkpoint (quantised for QLoRA) ─► adapter ─► examples ─► Trainer ─► adapter/ or model/ in the run

Checkpoints contain only trained parameters: with an adapter, a few megabytes. A stopped run resumes where it stopped,
on any number of ranks. Under torchrun every process runs this; rank 0 holds the folder's lock and writes the result.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from quadriga import runtime
from quadriga.errors import ConfigError
from quadriga.hub import catalogue
from quadriga.io.adapter_files import Adapter, save
from quadriga.io.conversion_plan import tokenizer_files
from quadriga.io.open import Checkpoint, open_checkpoint
from quadriga.kernels.arrays import array
from quadriga.model.adapter_spec import LoraSpec, adapted_shapes
from quadriga.model.weight_map import parameter_shapes
from quadriga.nn import devices
from quadriga.text.tokenizer import Tokenizer
from quadriga.text.turn_ends import turn_ends
from quadriga.train import report
from quadriga.train.architecture import require_exportable
from quadriga.train.batch import BatchSource, Objective
from quadriga.train.distill import Distillation, ServedDistillation, TaughtSource
from quadriga.train.export import trained, write_hf
from quadriga.train.grpo import GRPO
from quadriga.train.held_out import HeldOut, held_out_losses, samples
from quadriga.train.losses import NextToken
from quadriga.train.metrics import MetricsFile
from quadriga.train.model_sampler import ModelSampler
from quadriga.train.objectives import DPO, ORPO, Drawing, Reference
from quadriga.train.rewards import reward_of
from quadriga.train.rollouts import Questions, Repeated, Rollouts, RolloutTrainer, between_rollouts
from quadriga.train.run import peak_flops
from quadriga.train.run_directory import RunDirectory, held, read_manifest
from quadriga.train.services import Sampler, SamplerOptions, Services
from quadriga.train.shards import ShardReader
from quadriga.train.trackers import Watcher, trackers
from quadriga.train.trainer import Trainer
from quadriga.train.tune_config import TuneConfig
from quadriga.train.tune_data import TuneRows, read_data
from quadriga.train.tune_model import TunedModel, build_model, frozen_weights, reference, teacher
from quadriga.train.view import Screen
from quadriga.train.world import World


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


def tune(
    config: TuneConfig,
    *,
    stop: Callable[[], bool] = lambda: False,
    allow_change: bool = False,
    services: Services | None = None,
) -> Tuned:
    """Tune until the end of the run or until ``stop`` returns True; the same call resumes a stopped run.

    Args:
        services: what samples, runs programs and asks judges, for the runs that need it; `quadriga tune` has all.
        allow_change: resume also with settings that would have changed the run so far (``train.changes``).

    Raises:
        ConfigError, CorpusError, CheckpointError: the configuration, data or model cannot be used.
        TrainingError: the run diverged or could not save.
    """
    runtime.keep_freed_memory()
    world = World.join(config.parallel.device, config.parallel.timeout_s)
    run = RunDirectory(Path(config.run).expanduser())
    try:
        with held(run, world), devices.quick_float32(config.data.seq_len):
            return _tune(config, run, world, stop, services or Services(), allow_change=allow_change)
    finally:
        world.leave()


def _tune(
    config: TuneConfig,
    run: RunDirectory,
    world: World,
    stop: Callable[[], bool],
    services: Services,
    *,
    allow_change: bool,
) -> Tuned:
    checkpoint = open_checkpoint(catalogue.resolve(config.model))
    try:
        tokenizer = checkpoint.load_tokenizer(catalogue.cl100k_ranks)
        if tokenizer is None:
            raise ConfigError(f"tuning needs a model with a tokenizer; {config.model} has none")
        if config.lora is None:
            require_exportable(checkpoint.config)
        rows = read_data(config, tokenizer)
        _refuse_too_long(config, rows, checkpoint.config.max_seq_len)
        tuned = build_model(config, checkpoint, world)
        parts = _Parts(config, tuned, rows, tokenizer, world)
        trainer = parts.trainer(run, checkpoint, services)
        files = tokenizer_files(checkpoint)
    finally:
        checkpoint.close()
    if run.steps():
        trainer.resume(allow_change=allow_change)
    watchers = _watchers(config, run, trainer, peak_flops(config.parallel.dtype, world))
    trainer.listen(watchers)
    if config.evaluate.every and not (rows.held_out or rows.questions):
        for watcher in watchers:
            watcher.on_event(trainer.step, "warning: nothing is held out: fewer rows than data.held_out_every")
    evaluate = parts.evaluation(watchers)
    if config.evaluate.every and evaluate is not None:
        trainer.evaluate, trainer.evaluate_every = evaluate, config.evaluate.every
        if trainer.step == 0:
            evaluate(trainer)
    if isinstance(trainer, RolloutTrainer):
        stop = between_rollouts(stop, trainer, config.grpo.updates)
    done = _train(config, run, trainer, watchers, stop)
    result = _write(run, config, trainer, tuned.spec, files) if done else None
    return Tuned(done, trainer.step, trainer.settings.n_steps, result, str(rows.rejects))


def _refuse_too_long(config: TuneConfig, rows: TuneRows, most: int) -> None:
    """Refuse documents beyond the positions that a model was made for.

    Args:
        most: the model's ``max_seq_len``.
    """
    longest = config.data.seq_len
    if config.objective == "grpo":
        longest = max(map(len, rows.problems)) + config.grpo.max_new_tokens
        what = "the longest question and grpo.max_new_tokens together"
    else:
        what = "data.seq_len"
    if longest > most:
        raise ConfigError(f"{what} must be at most the model's {most} positions, got {longest}")


@dataclass(frozen=True)
class _Parts:
    """What a run is put together from."""

    config: TuneConfig
    tuned: TunedModel
    rows: TuneRows
    tokenizer: Tokenizer
    world: World

    @property
    def end_ids(self) -> frozenset[int]:
        """Tokens that end an answer."""
        return frozenset((*self.tuned.model.config.eos_ids, *turn_ends(self.tokenizer).ids))

    def trainer(self, run: RunDirectory, checkpoint: Checkpoint, services: Services) -> Trainer:
        """The trainer with the run's objective; of grpo it samples what it learns from."""
        config, model, fill, world = self.config, self.tuned.model, self.tuned.fill, self.world
        source: BatchSource = self.rows.train
        n_steps = (config.data.epochs or 1) * self.rows.train.steps_per_epoch
        if config.objective == "grpo":
            return self._rollout_trainer(run, checkpoint, services, n_steps * config.grpo.updates)
        settings = _Settings(config, config.schedule.steps or n_steps)
        objective = self._objective(checkpoint)
        if isinstance(objective, ServedDistillation):
            source = self._taught(source, services)
            self.rows.held_out.update({name: self._taught(one, services) for name, one in self.rows.held_out.items()})
        frozen = frozen_weights(config, checkpoint)
        return Trainer(settings, model, source, objective, world=world, run=run, fill=fill, frozen=frozen)

    def _rollout_trainer(
        self, run: RunDirectory, checkpoint: Checkpoint, services: Services, n_steps: int
    ) -> RolloutTrainer:
        config, section, world = self.config, self.config.grpo, self.world
        before = reference(config, self.tuned, checkpoint, world) if section.kl_weight else Reference(None)
        high = section.clip if section.clip_high is None else section.clip_high
        objective = GRPO(before, self._drawing(), kl_weight=section.kl_weight, clip=(section.clip, high))
        settings = _Settings(config, config.schedule.steps or n_steps)
        source = Repeated(self.rows.train, section.updates)
        rollouts = self._rollouts(services)
        trainer = RolloutTrainer(
            settings, self.tuned.model, source, objective, world=world, run=run, fill=self.tuned.fill,
            frozen=frozen_weights(config, checkpoint),
        )  # fmt: skip
        trainer.rollouts = rollouts
        return trainer

    def evaluation(self, watchers: Sequence[Watcher]) -> Callable[[Trainer], None] | None:
        """What tells the watchers the held-out loss or reward; None if nothing is held out."""
        rows, world = self.rows, self.world

        def evaluate(trainer: Trainer) -> None:
            found: Mapping[str, HeldOut]
            if isinstance(trainer, RolloutTrainer):
                reward, said = trainer.rollouts.held_out(rows.questions, world)
                found = {"held out": reward}
            else:
                found = held_out_losses(trainer.module, rows.held_out, world)
                section = self.config.evaluate
                said = samples(
                    trainer.module, self.tokenizer, section.prompts, section.sample_tokens, self.end_ids, world
                )
            for watcher in watchers:
                watcher.on_evaluation(trainer.step, found, said)

        return evaluate if rows.held_out or rows.questions or self.config.evaluate.prompts else None

    def _objective(self, checkpoint: Checkpoint) -> Objective:
        config = self.config
        if config.objective == "orpo":
            return ORPO(config.preference.odds_weight)
        if config.objective == "dpo":
            return DPO(reference(config, self.tuned, checkpoint, self.world), config.preference.beta)
        if config.objective == "distill":
            how = config.distill
            if how.url is not None:
                return ServedDistillation(self.tokenizer.n_vocab, weight=how.weight)
            return Distillation(
                teacher(config, self.tokenizer, self.world), self.tokenizer.n_vocab, top_k=how.top_k,
                temperature=how.temperature, weight=how.weight,
            )  # fmt: skip
        return NextToken(checkpoint.config, config.router, self.world)

    def _taught(self, source: BatchSource, services: Services) -> TaughtSource:
        how = self.config.distill
        if services.teacher is None:
            raise ConfigError("distill.url needs a client: start the run by `quadriga tune`, or hand one to tune()")
        return TaughtSource(source, services.teacher(how.url or "", how.teacher or ""), self.tokenizer, how.top_k)

    def _drawing(self) -> Drawing:
        unused = set(self.tokenizer.unused_rows(self.tuned.model.config.vocab_size)) - self.end_ids
        return Drawing(self.config.grpo.temperature, tuple(sorted(unused)))

    def _rollouts(self, services: Services) -> Rollouts:
        config, section, model = self.config, self.config.grpo, self.tuned.model
        packed = config.lora is not None and config.lora.base_format != "float32"
        if packed and config.parallel.experts > 1:
            raise ConfigError(
                "grpo needs all experts of a quantised base on every rank, to sample with: leave parallel.experts at "
                "1, or take lora.base_format = 'float32'"
            )
        if section.sampler == "model":
            if self.world.size > 1:
                raise ConfigError("grpo.sampler = 'model' samples on one rank: take 'engine' under torchrun")
            sampler: Sampler = ModelSampler(model, self.end_ids, self._drawing().never)
        elif services.sampler is None:
            raise ConfigError(
                "grpo samples with the engine: start the run by `quadriga tune`, hand a sampler to tune(), or take "
                "grpo.sampler = 'model'"
            )
        else:
            longest = max(len(ids) for ids in self.rows.problems) + section.max_new_tokens
            options = SamplerOptions(format=section.sampler_format, max_len=longest)
            sampler = services.sampler(model.config, self.tokenizer, options)
        reward = reward_of(section.rewards, services, self.tokenizer, model.config.vocab_size, self.end_ids)
        questions = Questions(self.rows.problems, self.tokenizer, reward, self.end_ids)
        return Rollouts(model, sampler, questions, section, seed=config.seed)


def _watchers(config: TuneConfig, run: RunDirectory, trainer: Trainer, peak: float) -> list[Watcher]:
    """What shows and records the run; on rank 0 only."""
    if not trainer.world.first:
        return []
    return [
        MetricsFile(
            run.path, trainer.step, peak_flops=peak, learning_rate=config.optimiser.learning_rate,
            routing_every=config.log.routing_every,
        ),
        Screen(run.path.name, trainer.settings.n_steps, every=config.log.every, peak_flops=peak),
        *trackers(config.log, run.path, trainer.step, msgspec.to_builtins(config)),
    ]  # fmt: skip


def _train(
    config: TuneConfig, run: RunDirectory, trainer: Trainer, watchers: Sequence[Watcher], stop: Callable[[], bool]
) -> bool:
    """Train to the end or until ``stop``; True if the run is complete."""
    if trainer.world.first:
        (run.path / "config.json").write_bytes(msgspec.json.format(msgspec.json.encode(config)))
    try:
        return trainer.train(stop)
    finally:
        for watcher in watchers:
            watcher.close()
        if trainer.world.first and config.log.report:
            report.write(run.path)


def _write(
    run: RunDirectory, config: TuneConfig, trainer: Trainer, spec: LoraSpec | None, files: Mapping[str, bytes]
) -> Path:
    """Write the adapter, or the model with its tokenizer as a Hugging Face directory; always float32.

    With ``[ema]`` what is written is the average of the weights, as ``quadriga train --export`` writes it. The first
    rank reads the run's last checkpoint, where the parts of all ranks and stages are; the others wait for it.
    """
    out = run.path / ("model" if spec is None else "adapter")
    if trainer.world.first:
        shutil.rmtree(out, ignore_errors=True)  # what an earlier end of this run wrote there
        folder = run.at(trainer.step)
        reader = ShardReader([folder / name for name in read_manifest(folder).files])
        whole, architecture = trained(reader), trainer.model.config
        if spec is None:
            write_hf({name: whole(name) for name in parameter_shapes(architecture)}, architecture, out, files)
        else:
            pairs = {
                name: (array(whole(f"{name}.delta.a")), array(whole(f"{name}.delta.b")))
                for name in adapted_shapes(architecture, spec)
            }
            save(Adapter(spec=spec, factors=pairs, base=config.model), out)
    trainer.world.wait()
    return out
