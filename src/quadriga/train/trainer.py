"""The training loop: reads batches, updates weights, reports, saves checkpoints, guards against bad steps.

    step s:  seed(seed, s, rank) ─► for each micro-step: rows of this rank ─► objective ─► backward (sums, all ranks)
             ─► one message: gradient norm, losses, expert counts (the host waits) ─► guard ─► clip ─► optimiser ─► EMA
             ─► biases ─► listeners ─► evaluate? save?

A step is a function of (state, s) alone: data, learning rate and random numbers follow from s, so a run that is stopped
and resumed ends bit for bit like an uninterrupted one. The configuration, not the number of ranks, cuts the global
batch into micro-steps, so any number of ranks computes the same sums up to rounding. The objective (``Objective``) and
the output (:class:`Listener`) are passed in: pre-training, tuning and tests share this loop.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import torch
from safetensors.torch import save
from torch import Tensor

from quadriga.errors import CheckpointError, ConfigError, TrainingError
from quadriga.model import cost
from quadriga.model.config_json import config_to_json
from quadriga.nn.transformer import Transformer
from quadriga.train import config as sections
from quadriga.train import state
from quadriga.train.balance import BiasBalancer
from quadriga.train.batch import BatchSource, Objective, TrainingBatch
from quadriga.train.changes import changes, described
from quadriga.train.flops import flops_of
from quadriga.train.guard import SpikeGuard
from quadriga.train.optim import Optimiser, local
from quadriga.train.parallel import Fill, MasterWeights, prepare
from quadriga.train.pipeline import Pipeline
from quadriga.train.run_directory import RunDirectory, newest
from quadriga.train.schedule import learning_rate_share, unreached
from quadriga.train.stage import of_table
from quadriga.train.step_report import Listener, StepReport
from quadriga.train.world import World


class Settings(Protocol):
    """The configuration sections that the loop needs; ``RunConfig`` and ``tune``'s settings have them."""

    @property
    def seed(self) -> int: ...
    @property
    def n_steps(self) -> int: ...
    @property
    def schedule(self) -> sections.ScheduleSection: ...
    @property
    def optimiser(self) -> sections.OptimiserSection: ...
    @property
    def router(self) -> sections.RouterSection: ...
    @property
    def parallel(self) -> sections.ParallelSection: ...
    @property
    def guard(self) -> sections.GuardSection: ...
    @property
    def checkpoint(self) -> sections.CheckpointSection: ...
    @property
    def ema(self) -> sections.EmaSection: ...


@runtime_checkable
class Staged(Protocol):
    """A source with stages that must not change once begun (``loader.CorpusSource``)."""

    def history(self, step: int) -> list[str]: ...
    def check_history(self, saved: Sequence[str]) -> None: ...


class Trainer:
    """Trains a model.

    Args:
        settings: the configuration sections.
        model: float32 parameters, or none yet (the meta device); those that require a gradient are trained.
        source: the data.
        objective: the loss to minimise.
        world: the ranks.
        run: folder for checkpoints and the batches of bad steps.
        listeners: receive the run's events on rank 0.
        evaluate: called as evaluate(trainer) every ``evaluate_every`` steps and at the end.
        fill: the initial values of a model on the meta device; None: a checkpoint has them (:meth:`resume`).
        frozen: of each model whose weights the run uses and does not save, a name that is another one for other weights
            (``io.fingerprint``).
    """

    def __init__(
        self,
        settings: Settings,
        model: Transformer,
        source: BatchSource,
        objective: Objective,
        *,
        world: World,
        run: RunDirectory,
        listeners: Sequence[Listener] = (),
        evaluate: Callable[[Trainer], None] | None = None,
        evaluate_every: int = 0,
        fill: Fill | None = None,
        frozen: Mapping[str, str] | None = None,
    ) -> None:
        self.settings, self.model, self.source, self.world, self.run = settings, model, source, world, run
        self.frozen = dict(frozen or {})
        self.listeners = list(listeners) if world.first else []
        self._untold: list[tuple[int, str]] = []
        self.evaluate, self.evaluate_every = evaluate, evaluate_every
        self.module = prepare(model, objective, settings.parallel, world, fill)
        self.layout = self.module.layout
        self.masters = MasterWeights(model, settings.parallel.dtype, world)
        if not self.masters.by_name:
            raise ConfigError("at least one parameter must require a gradient to train, got none")
        portions, group = self.layout.portions, self.layout.group
        self.optimiser = Optimiser(self.masters.by_name, settings.optimiser, portions, group)
        self.averages = {name: p.detach().clone() for name, p in self.masters.by_name.items() if settings.ema.decay}
        stage, dtype = self.layout.stage, self.layout.dtype
        self.balancer = BiasBalancer(model, settings.router, world, stage) if settings.router.bias_rate else None
        self.pipeline = Pipeline(self.module, dtype, world.device) if stage.count > 1 else None
        self.guard = SpikeGuard(settings.guard)
        self.saver = state.Saver(run, world, settings.checkpoint)
        self.step = 0
        self.tokens_seen = 0
        self.skipped_steps: set[int] = set()
        self._rollbacks = 0
        self._may_change = False
        self._saved = -1
        self._active = cost.n_params(model.config).active_without_input

    def listen(self, listeners: Sequence[Listener]) -> None:
        """Report to ``listeners`` from now on, on rank 0; what happened while nobody listened is told first."""
        self.listeners = list(listeners) if self.world.first else []
        untold, self._untold = self._untold, []
        for step, text in untold:
            for listener in self.listeners:
                listener.on_event(step, text)

    # State -----------------------------------------------------------------------------------------------------------

    def tensors(self) -> dict[str, Tensor]:
        """The state that is saved as tensors, by name; not copies."""
        found: dict[str, Tensor] = {}
        found |= {f"parameter/{name}": p for name, p in self.masters.by_name.items()}
        found |= {f"parameter/{name}": buffer for name, buffer in self.model.named_buffers()}  # corrections of routers
        found |= {f"optimiser/{name}": value for name, value in self.optimiser.state().items()}
        found |= {f"ema/{name}": value for name, value in self.averages.items()}
        if self.balancer is not None:
            found["router_bias"] = self.balancer.bias
        return found

    def position(self) -> dict[str, Any]:
        """The rest of the state that is saved, as plain values."""
        return {
            "tokens_seen": self.tokens_seen,
            "left_out": sorted(self.skipped_steps),
            "guard": self.guard.state(),
            "data": self.source.fingerprint,
            "stages": self.source.history(self.step) if isinstance(self.source, Staged) else [],
            "seed": self.settings.seed,
            "model": config_to_json(self.model.config),
            "settings": self._described(),
        }

    def _described(self) -> dict[str, Any]:
        weights = {f"weights.{name}": hashed for name, hashed in self.frozen.items()}
        return {**described(getattr(self.settings, "config", self.settings), self.settings.n_steps), **weights}

    def resume(self, *, allow_change: bool = False) -> bool:
        """Continue from the newest intact checkpoint of the run; False if the run has no checkpoint.

        Args:
            allow_change: go on with settings under which the run so far would have been another (``train.changes``).

        Raises:
            CheckpointError: all checkpoints are damaged, or were saved with other settings.
            ConfigError: the data changed, or a stage that had begun, or settings without ``allow_change``.
        """
        self.saver.finish()
        self._may_change = allow_change
        found = newest(self.run, self.world)
        if found is None:
            return False
        folder, manifest, complaints = found
        saved = manifest.state
        if saved["data"] != self.source.fingerprint:
            raise ConfigError(
                f"the data have changed since {folder} was saved: fingerprint {saved['data'][:12]} then, "
                f"{self.source.fingerprint[:12]} now. Restore the corpora, or start a new run."
            )
        if isinstance(self.source, Staged):
            self.source.check_history(saved["stages"])
        if saved["seed"] != self.settings.seed:
            raise ConfigError(f"seed must be the run's {saved['seed']}, got {self.settings.seed}")
        if saved["model"] != _plain(config_to_json(self.model.config)):
            raise CheckpointError(f"{folder} has another model than the configuration: the [model] sections differ")
        changed = changes(saved["settings"], _plain(self._described()), manifest.step) if "settings" in saved else []
        harmful = [str(change) for change in changed if change.harmful]
        if harmful and not allow_change:
            raise ConfigError(
                f"the settings differ from those of {folder}: {'; '.join(harmful)}. Restore them, or go on with the "
                "new ones by --allow-change"
            )
        with torch.no_grad():
            state.load(folder, manifest, self.tensors(), self.layout)
        self.masters.refresh()
        self.step, self.tokens_seen = manifest.step, saved["tokens_seen"]
        self.skipped_steps |= set(saved["left_out"])
        self.guard.load(saved["guard"])
        self._saved = self.step
        for complaint in complaints:
            self._tell(f"warning: a newer checkpoint was skipped: {complaint}")
        for change in changed:
            self._tell(f"setting changed: {change}")
        return True

    def save(self) -> None:
        """Save a checkpoint of the current state, unless there is one already."""
        if self._saved != self.step:
            self._check_save()
            self.saver.save(self.step, self.tensors(), self.position(), self.layout)
            self._saved = self.step

    def _check_save(self) -> None:
        """Check whether the last save failed; then another one is due, or the run ends (checkpoint.on_error)."""
        wrong = self.saver.finish()
        self._tell_news()
        if wrong is None:
            return
        self._saved = -1
        if self.settings.checkpoint.on_error == "stop":
            raise TrainingError(f"a checkpoint could not be saved: {wrong}")

    def _tell_news(self) -> None:
        """Report what the thread that saves had to say."""
        for text in self.saver.news():
            self._tell(text)

    # The loop --------------------------------------------------------------------------------------------------------

    def train(self, stop: Callable[[], bool] = lambda: False) -> bool:
        """Train to the last step, or until ``stop`` returns True on any rank; then save.

        Returns:
            True if the run is complete.

        Raises:
            TrainingError: the guard ended the run, it ended in steps that are not finite, ranks were lost, or the
                final state could not be saved.
        """
        if self.step == 0 and (warning := unreached(self.settings.n_steps, self.settings.schedule)) is not None:
            self._tell(f"warning: {warning}")
        if self.settings.guard.action == "rollback" and self.step == 0:
            self.save()
        stopping = False
        while self.step < self.settings.n_steps and not stopping:
            try:
                stopping = self.run_step(stop())
            except RuntimeError as error:
                if self.world.size > 1 and World.is_lost(error):
                    raise self.world.lost(error) from error
                raise
            if self.evaluate is not None and self.evaluate_every and self.step % self.evaluate_every == 0:
                self.evaluate(self)
            if self.step % self.settings.checkpoint.every == 0:
                self.save()
        done = self.step >= self.settings.n_steps
        if done and self.evaluate is not None and not (self.evaluate_every and self.step % self.evaluate_every == 0):
            self.evaluate(self)
        self.save()
        wrong = self.saver.finish()
        self._tell_news()
        if wrong is not None:
            raise TrainingError(f"the final state could not be saved: {wrong}")
        if done and (ruined := self.guard.ruined()) is not None:
            raise TrainingError(ruined)
        return done

    def run_step(self, stop: bool = False) -> bool:
        """Run one optimiser step. Returns True if any rank wants to stop."""
        started = time.perf_counter()
        step = self.step
        torch.manual_seed(((self.settings.seed * 1_000_003 + step) * 65_537 + self.world.rank) % 2**63)
        batches = self.batches(step)
        own = sum(b.target_weight() for b in batches) if self.layout.stage.first else 0.0
        own_weight = torch.tensor(own, dtype=torch.float64).to(self.world.device)
        divisor = self.world.sum(own_weight).clamp(min=1.0).float()
        if self.balancer is not None:
            self.balancer.apply(step, self.settings.n_steps)
        sums = self._backward(batches, divisor)
        asked = {"_square": self._gradient_square(), "_stop": torch.tensor(float(stop)), "_weight": own_weight}
        asked["_tokens"] = torch.tensor(sum(len(b.tokens) for b in batches) if self.layout.stage.first else 0)
        totals = _sum_all(self.world, {**sums, **asked})
        weight = max(float(totals.pop("_weight")), 1.0)
        loss, norm = float(totals.pop("loss")) / weight, float(totals.pop("_square")) ** 0.5
        stopping, n_tokens = bool(totals.pop("_stop")), int(totals.pop("_tokens"))
        counts = totals.pop("expert_counts", None)
        verdict = "skipped after a rollback" if step in self.skipped_steps else self.guard.judge(step, loss, norm)
        if verdict is not None and step not in self.skipped_steps and self._bad_step(step, verdict, batches):
            return stopping
        rate = learning_rate_share(step, self.settings.n_steps, self.settings.schedule)
        if verdict is None:
            self._update(rate, norm)
            if self.balancer is not None and counts is not None:
                self.balancer.update(counts)
        self._clear_gradients()
        self.tokens_seen += n_tokens
        self.step += 1
        report = StepReport(
            step=step,
            loss=loss,
            norm=norm,
            rate=rate,
            tokens=n_tokens,
            tokens_seen=self.tokens_seen,
            flops=flops_of(self.model.config, self._active, batches) * self.layout.n_row_groups,
            seconds=time.perf_counter() - started,
            verdict=verdict,
            extra={name: float(value) / weight for name, value in totals.items()},
            expert_counts=counts,
        )
        for listener in self.listeners:
            listener.on_step(report)
        self._tell_news()
        return stopping

    def batches(self, step: int) -> list[TrainingBatch]:
        """This rank's rows of a step, one batch per micro-step.

        Raises:
            ConfigError: rows or their tokens cannot be divided evenly among micro-steps and ranks.
        """
        rows, layout = self.source.n_rows(step), self.layout
        micro = min(self.settings.parallel.micro_rows or rows, rows)
        layout.check_rows(rows, micro, self.source.seq_len(step))
        share = micro // layout.n_row_groups
        first = [start + layout.row_group * share for start in range(0, rows, micro)]
        return [layout.own(self.source.rows(step, a, a + share)).to(self.world.device) for a in first]

    def _backward(self, batches: Sequence[TrainingBatch], weight: Tensor) -> dict[str, Tensor]:
        """Accumulate the gradient of the mean loss in the master weights; returns metrics summed over micro-steps."""
        self.module.train()
        if self.pipeline is not None:
            found = self.pipeline.backward(batches, weight)
            for name, p in self.masters.by_name.items():
                if self.layout.stage.shares_table and of_table(name) and p.grad is not None:
                    self.layout.stage.sum_with_twin(local(p.grad))
            return found
        sums: dict[str, Tensor] = {}
        for number, batch in enumerate(batches, 1):
            self.module.sum_over_copies(number == len(batches))
            loss, metrics = self.module(batch)
            (loss / weight).backward()
            for name, value in metrics.items():
                sums[name] = sums[name] + value if name in sums else value
        return sums

    def _gradient_square(self) -> Tensor:
        """This rank's share of the squared gradient norm; the shares of all ranks add up to the whole."""
        held = [(p.grad, self.layout.copies(name, p)) for name, p in self.masters.by_name.items()]
        gradients = [(gradient, copies) for gradient, copies in held if gradient is not None]
        if not gradients:
            return torch.zeros((), dtype=torch.float64)
        norms = torch.stack(torch._foreach_norm([local(g) for g, _ in gradients])).double()
        copies = torch.tensor([n for _, n in gradients], dtype=torch.float64).to(norms.device)
        return (norms.square() / copies).sum()

    @torch.no_grad()
    def _update(self, rate: float, norm: float) -> None:
        limit = self.settings.optimiser.clip_norm
        if limit and norm > limit:
            gradients = [local(p.grad) for p in self.masters.by_name.values() if p.grad is not None]
            torch._foreach_mul_(gradients, limit / norm)
        self.optimiser.step(rate)
        self.masters.refresh()
        if self.averages:
            averages = [local(value) for value in self.averages.values()]
            weights = [local(p.detach()) for p in self.masters.by_name.values()]
            torch._foreach_lerp_(averages, weights, 1 - self.settings.ema.decay)

    def _clear_gradients(self) -> None:
        for p in self.masters.by_name.values():
            p.grad = None

    def _bad_step(self, step: int, verdict: str, batches: Sequence[TrainingBatch]) -> bool:
        """Skip a bad step, roll back or stop, as guard.action says; True if the run was rolled back."""
        self._save_batches(step, batches)
        action = self.settings.guard.action
        self._tell(f"{verdict}; {action}, its batch is saved in spikes/")
        if action == "stop":
            raise TrainingError(
                f"step {step}: {verdict}. guard.action is 'stop'; the batch is in {self.run.path}/spikes"
            )
        if action == "skip":
            return False
        self._rollbacks += 1
        if self._rollbacks >= self.settings.guard.limit:
            raise TrainingError(f"step {step}: {verdict}, after {self._rollbacks} rollbacks. Lower the learning rate.")
        self._clear_gradients()
        self._check_save()
        if not self.resume(allow_change=self._may_change):
            raise TrainingError(f"step {step}: {verdict}, and there is no checkpoint to roll back to")
        self.skipped_steps.add(step)
        for listener in self.listeners:
            listener.on_rollback(self.step)
        return True

    def _save_batches(self, step: int, batches: Sequence[TrainingBatch]) -> None:
        tensors: dict[str, Tensor] = {}
        for i, batch in enumerate(batches):
            kept = {"tokens": batch.tokens, "targets": batch.targets, "bounds": batch.bounds, "domains": batch.domains}
            tensors |= {f"{i}/{name}": value.cpu() for name, value in kept.items()}
        rank = f"-rank{self.world.rank}" if self.world.size > 1 else ""
        try:
            self.run.files.make_folder(self.run.path / "spikes")
            self.run.files.write(self.run.path / "spikes" / f"step-{step:08d}{rank}.safetensors", [save(tensors)])
        except OSError as error:
            self._tell(f"warning: the batch of step {step} could not be saved: {error}")

    def _tell(self, text: str) -> None:
        if not self.listeners and self.world.first:
            self._untold.append((self.step, text))
        for listener in self.listeners:
            listener.on_event(self.step, text)


def _sum_all(world: World, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Sum several tensors over ranks in one message; results are float64 on the host."""
    flat = torch.cat(
        [value.detach().to(device=world.device, dtype=torch.float64).flatten() for value in values.values()]
    )
    total = world.sum(flat).cpu()
    parts = torch.split(total, [value.numel() for value in values.values()])
    return {name: part.view(value.shape) for (name, value), part in zip(values.items(), parts, strict=True)}


def _plain(value: Any) -> Any:
    """The value as it would be after a round trip through JSON: tuples become lists."""
    if isinstance(value, dict):
        return {key: _plain(inner) for key, inner in value.items()}
    return [_plain(inner) for inner in value] if isinstance(value, (list, tuple)) else value
