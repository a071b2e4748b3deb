"""A pre-training run from its configuration: build everything, resume, train, report.

    RunConfig ─► corpora, vocabulary ─► model ─► Trainer ─► resume? ─► train ─► report.html

Under torchrun several processes run this at once; rank 0 holds the folder's lock and writes everything except the other
ranks' parts of a checkpoint.
"""

from __future__ import annotations

import contextlib
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Literal

import msgspec
import torch

from quadriga import runtime
from quadriga.errors import ConfigError, QuadrigaError
from quadriga.hub import catalogue
from quadriga.model.config import ModelConfig
from quadriga.nn import devices
from quadriga.nn.transformer import Transformer
from quadriga.text.tokenizer import Tokenizer, load_directory
from quadriga.train import report
from quadriga.train.architecture import model_config, require_exportable, require_stored_bias
from quadriga.train.branch import Branch, begin, undo
from quadriga.train.config import RunConfig
from quadriga.train.distill import same_ids
from quadriga.train.held_out import HeldOutLoss, held_out_losses, samples
from quadriga.train.initialise import NewWeights, StoredWeights
from quadriga.train.loader import HeldOutSource, Prefetcher, open_corpora, open_held_out, open_source
from quadriga.train.losses import NextToken
from quadriga.train.metrics import MetricsFile
from quadriga.train.run_directory import RunDirectory, held
from quadriga.train.trackers import Watcher, trackers
from quadriga.train.trainer import Trainer
from quadriga.train.view import Screen
from quadriga.train.world import World

Resume = Literal["auto", "never", "must"]


@dataclass(frozen=True)
class Outcome:
    """How a call of :func:`train` ended."""

    done: bool
    """False: the run was stopped and can be resumed."""
    step: int
    folder: Path


def train(
    config: RunConfig,
    *,
    resume: Resume = "auto",
    stop: Callable[[], bool] | None = None,
    allow_change: bool = False,
    branch: Branch | None = None,
) -> Outcome:
    """Train until the end of the run, or until SIGTERM, SIGINT or ``stop``.

    Args:
        resume: "auto" continues from the newest checkpoint if there is one; "never" refuses a folder with checkpoints;
            "must" refuses one without.
        stop: asked after each step; True saves and stops.
        allow_change: resume also with settings that would have changed the run so far (``train.changes``).
        branch: where a run without checkpoints begins: at one of another run's.

    Raises:
        ConfigError, CorpusError, CheckpointError: the configuration, data or checkpoints cannot be used.
        TrainingError: the run diverged, lost ranks, or could not save.
    """

    def stopped() -> bool:
        return asked() or (stop is not None and stop())

    runtime.keep_freed_memory()
    world = World.join(config.parallel.device, config.parallel.timeout_s)
    run = RunDirectory(Path(config.run).expanduser())
    try:
        with held(run, world), _signals() as asked, devices.quick_float32(512):
            return _train(config, run, world, resume, stopped, allow_change=allow_change, branch=branch)
    finally:
        world.leave()


def _train(
    config: RunConfig,
    run: RunDirectory,
    world: World,
    resume: Resume,
    stop: Callable[[], bool],
    *,
    allow_change: bool,
    branch: Branch | None,
) -> Outcome:
    has_some = _has_checkpoints(run, resume, branch)
    corpora = open_source(config.data)
    if config.n_steps > corpora.n_steps:
        raise ConfigError(
            f"schedule.steps must be at most the curriculum's {corpora.n_steps}, got {config.n_steps}: add a stage"
        )
    source = Prefetcher(corpora, config.data.prefetch)
    tokenizer = corpus_tokenizer(config)
    architecture, weights = _weights(config, tokenizer)
    require_stored_bias(architecture, config.router)
    longest = max(stage.seq_len for stage in config.data.stages)
    if longest > architecture.max_seq_len:
        raise ConfigError(
            f"model.max_seq_len must be at least the longest stage's {longest}, got {architecture.max_seq_len}"
        )
    try:
        trainer = Trainer(
            config, _model(architecture, weights, world), source, NextToken(architecture, config.router, world),
            world=world, run=run, evaluate_every=config.evaluate.every, fill=None if has_some else weights.read,
        )  # fmt: skip
    finally:
        if isinstance(weights, StoredWeights):
            weights.close()
    if has_some:
        _resume(trainer, branch, allow_change)
    peak = peak_flops(config.parallel.dtype, world)
    watchers = _listeners(config, run, trainer.step, peak) if world.first else []
    trainer.listen(watchers)
    if config.evaluate.every:
        held_out = open_held_out(
            config.data, seq_len=min(longest, config.data.stages[0].seq_len), max_rows=config.evaluate.rows
        )
        trainer.evaluate = _Evaluation(config, held_out, tokenizer, architecture, watchers)
    if world.first:
        (run.path / "config.json").write_bytes(msgspec.json.format(msgspec.json.encode(config)))
    try:
        done = trainer.train(stop)
    finally:
        source.close()
        for watcher in watchers:
            watcher.close()
        if world.first and config.log.report:
            report.write(run.path)
    return Outcome(done, trainer.step, run.path)


def _has_checkpoints(run: RunDirectory, resume: Resume, branch: Branch | None) -> bool:
    """Whether the run goes on from a checkpoint, its own or a trunk's.

    Raises:
        ConfigError: that is not what ``resume`` wants.
    """
    has_some = bool(run.steps())
    if resume == "never" and has_some:
        raise ConfigError(
            f"{run.path} already has checkpoints: resume with --resume auto, or choose another run folder"
        )
    if resume == "must" and not has_some:
        raise ConfigError(f"{run.path} has no checkpoint to resume from: start it with --resume auto")
    return has_some or branch is not None


def _resume(trainer: Trainer, branch: Branch | None, allow_change: bool) -> None:
    """Continue from the run's newest checkpoint, which a branch gets here; a refused one leaves nothing behind."""
    begun = False

    def start() -> None:
        nonlocal begun
        begun = branch is not None and begin(branch, trainer.run)

    trainer.world.first_does(start)
    try:
        trainer.resume(allow_change=allow_change)
    except QuadrigaError:
        if begun:
            undo(trainer.run)
        raise


class _Evaluation:
    """Computes a trainer's held-out losses and samples and passes them to the listeners."""

    def __init__(
        self,
        config: RunConfig,
        sources: Mapping[str, HeldOutSource],
        tokenizer: Tokenizer,
        architecture: ModelConfig,
        watchers: list[Watcher],
    ) -> None:
        self.section, self.sources, self.tokenizer, self.watchers = config.evaluate, sources, tokenizer, watchers
        self.end_ids = architecture.eos_ids

    def __call__(self, trainer: Trainer) -> None:
        losses: dict[str, HeldOutLoss] = held_out_losses(trainer.module, self.sources, trainer.world)
        found = samples(
            trainer.module,
            self.tokenizer,
            self.section.prompts,
            self.section.sample_tokens,
            self.end_ids,
            trainer.world,
        )
        for watcher in self.watchers:
            watcher.on_evaluation(trainer.step, losses, found)


def _listeners(config: RunConfig, run: RunDirectory, step: int, peak: float) -> list[Watcher]:
    metrics = MetricsFile(
        run.path, step, peak_flops=peak, learning_rate=config.optimiser.learning_rate,
        routing_every=config.log.routing_every,
    )  # fmt: skip
    screen = Screen(run.path.name, config.n_steps, every=config.log.every, peak_flops=peak)
    return [metrics, screen, *trackers(config.log, run.path, step, msgspec.to_builtins(config))]


def corpus_tokenizer(config: RunConfig) -> Tokenizer:
    """The tokenizer that the run's corpora were prepared with."""
    corpus = open_corpora(config.data)[0]
    tokenizer = load_directory(corpus.path, cl100k_ranks=lambda: catalogue.resolve("cl100k_base"))
    if tokenizer is None:
        raise ConfigError(f"{corpus.path} has no tokenizer: prepare it again with `quadriga data prepare`")
    return tokenizer


def _weights(config: RunConfig, tokenizer: Tokenizer) -> tuple[ModelConfig, NewWeights | StoredWeights]:
    if config.model.start is not None:
        stored = StoredWeights(config.model.start)
        its = stored.tokenizer()
        fits = tokenizer.n_vocab <= stored.config.vocab_size if its is None else same_ids(tokenizer, its)
        if not fits:
            stored.close()
            raise ConfigError(
                f"the corpora must be tokenised with the vocabulary of model.start, {config.model.start}; theirs is "
                f"another one, of {tokenizer.n_vocab} tokens. Prepare them again with `--tokenizer` and its tokenizer"
            )
        require_exportable(stored.config)
        return stored.config, stored
    vocabulary = open_corpora(config.data)[0].manifest.tokenizer
    architecture = model_config(config.model, vocabulary.n_vocab, (vocabulary.end_id,))
    return architecture, NewWeights(architecture, seed=config.seed, std=config.model.init_std)


def _model(architecture: ModelConfig, weights: NewWeights | StoredWeights, world: World) -> Transformer:
    """The model in memory; one of several ranks gets none of it yet, and fills its own part when that is known."""
    if world.size > 1:
        with torch.device("meta"):
            return Transformer(architecture)
    parameters = weights.parameters()
    return Transformer.from_parameters(architecture, parameters)


def peak_flops(dtype: str, world: World) -> float:
    """Peak FLOP/s of all ranks' devices together, measured with large matrix products in ``dtype`` for 0.3 s."""
    n = 1536 if world.device.type == "cpu" else 8192
    a = torch.randn(n, n, device=world.device).to(getattr(torch, dtype))
    best, spent = float("inf"), 0.0
    while spent < 0.3:  # the first product includes compilation; where bfloat16 is emulated, it is the only one
        started = time.perf_counter()
        (a @ a)[0, 0].item()
        seconds = time.perf_counter() - started
        best, spent = min(best, seconds), spent + seconds
    own = torch.tensor(2.0 * n**3 / best, dtype=torch.float64, device=world.device)
    return float(world.sum(own))


@contextlib.contextmanager
def _signals() -> Iterator[Callable[[], bool]]:
    """Turn SIGTERM and the first SIGINT into a request to save and stop; a second SIGINT interrupts at once."""
    asked = False

    def ask(number: int, frame: FrameType | None) -> None:
        nonlocal asked
        if asked and number == signal.SIGINT:
            raise KeyboardInterrupt
        asked = True

    try:
        before = {number: signal.signal(number, ask) for number in (signal.SIGTERM, signal.SIGINT)}
    except ValueError:  # not the main thread, which alone may handle signals
        before = {}
    try:
        yield lambda: asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
