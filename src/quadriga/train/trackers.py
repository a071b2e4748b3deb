"""Metrics for programs that keep and draw them: TensorBoard, Weights & Biases, MLflow; each a switch in ``[log]``.

metrics.jsonl has everything in any case. Where a server is found, and the password for it, the packages themselves read
from their own environment variables and files (WANDB_*, MLFLOW_*). A resumed run goes on under the name it had.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from quadriga import runtime
from quadriga.errors import ConfigError
from quadriga.train.config import LogSection
from quadriga.train.held_out import HeldOut
from quadriga.train.step_report import StepReport


class Watcher(Protocol):
    """A ``Listener`` that is also told of evaluations, and closed at the end."""

    def on_step(self, report: StepReport) -> None: ...
    def on_evaluation(self, step: int, found: Mapping[str, HeldOut], samples: dict[str, str]) -> None: ...
    def on_event(self, step: int, text: str) -> None: ...
    def on_rollback(self, step: int) -> None: ...
    def close(self) -> None: ...


def trackers(section: LogSection, folder: Path, step: int, settings: Mapping[str, Any]) -> list[Watcher]:
    """What ``[log]`` switches on.

    Args:
        folder: the run's folder.
        step: the run's next step.
        settings: the configuration, kept beside the metrics where there is a place for it.

    Raises:
        ConfigError: a package is not installed, or its server refuses.
    """
    found: list[Watcher] = [TensorBoard(folder, step)] if section.tensorboard else []
    if section.wandb is not None:
        found.append(WeightsAndBiases(section.wandb, folder, settings))
    if section.mlflow is not None:
        found.append(MLflow(section.mlflow, folder, settings))
    return found


def _scalars(report: StepReport) -> dict[str, float]:
    values = {"loss": report.loss, "norm": report.norm, "rate": report.rate}
    return {
        f"train/{name}": value
        for name, value in {**values, "tokens_per_s": report.tokens / report.seconds, **report.extra}.items()
    }


def _held_out(found: Mapping[str, HeldOut]) -> dict[str, float]:
    return {f"held_out/{domain}": one.shown for domain, one in found.items()}


def _own_id(folder: Path, name: str) -> Path:
    """The file in which a run keeps what another program calls it."""
    return folder / f"{name}-id"


class TensorBoard:
    """TensorBoard's event files in the run's folder. Needs the ``train`` extra.

    Raises:
        ConfigError: tensorboard is not installed.
    """

    def __init__(self, folder: Path, step: int) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            raise ConfigError(
                f"log.tensorboard needs the tensorboard package: {runtime.install_hint('train')}, or turn it off"
            ) from None
        self._writer = SummaryWriter(str(folder / "tensorboard"), purge_step=step)

    def on_step(self, report: StepReport) -> None:
        """Write the step's metrics as scalars."""
        for name, value in _scalars(report).items():
            self._writer.add_scalar(name, value, report.step)

    def on_evaluation(self, step: int, found: Mapping[str, HeldOut], samples: dict[str, str]) -> None:
        """Write held-out losses as scalars and samples as text."""
        for name, value in _held_out(found).items():
            self._writer.add_scalar(name, value, step)
        for prompt, text in samples.items():
            self._writer.add_text(prompt[:60], text, step)

    def on_event(self, step: int, text: str) -> None:
        """Write an event as text."""
        self._writer.add_text("event", text, step)

    def on_rollback(self, step: int) -> None:
        """Nothing to do: TensorBoard shows both histories."""

    def close(self) -> None:
        """Flush and close the writer."""
        self._writer.close()


class WeightsAndBiases:
    """Weights & Biases (wandb); ``project`` is made there if it does not exist.

    Raises:
        ConfigError: wandb is not installed.
    """

    def __init__(self, project: str, folder: Path, settings: Mapping[str, Any]) -> None:
        try:
            import wandb
        except ImportError:
            raise ConfigError("log.wandb needs the wandb package: pip install wandb, or leave the key out") from None
        place = _own_id(folder, "wandb")
        name = place.read_text() if place.exists() else None
        self._run: Any = wandb.init(
            project=project, name=folder.name, id=name, resume="allow", dir=str(folder), config=dict(settings)
        )
        place.write_text(self._run.id)
        # A step of our own: wandb's never goes back, ours does after a rollback.
        self._run.define_metric("*", step_metric="step")

    def on_step(self, report: StepReport) -> None:
        """Send the step's metrics."""
        self._run.log({"step": report.step, **_scalars(report)})

    def on_evaluation(self, step: int, found: Mapping[str, HeldOut], samples: dict[str, str]) -> None:
        """Send held-out losses, and samples as texts of the run."""
        self._run.log({"step": step, **_held_out(found)})
        self._run.summary.update({f"sample/{prompt[:60]}": text for prompt, text in samples.items()})

    def on_event(self, step: int, text: str) -> None:
        """Send an event as an alert."""
        self._run.alert(title=f"step {step}", text=text)

    def on_rollback(self, step: int) -> None:
        """Nothing to do: steps that run again are sent again."""

    def close(self) -> None:
        """Send the rest and end the run there."""
        self._run.finish()


class MLflow:
    """MLflow; ``experiment`` is made there if it does not exist. Metrics are sent beside the training.

    Raises:
        ConfigError: mlflow is not installed.
    """

    def __init__(self, experiment: str, folder: Path, settings: Mapping[str, Any]) -> None:
        try:
            import mlflow
        except ImportError:
            raise ConfigError(
                "log.mlflow needs the mlflow-skinny package: pip install mlflow-skinny, or leave the key out"
            ) from None
        self._mlflow: Any = mlflow
        mlflow.set_experiment(experiment)
        place = _own_id(folder, "mlflow")
        known = place.read_text() if place.exists() else None
        run = mlflow.start_run(run_id=known) if known else mlflow.start_run(run_name=folder.name)
        self._id: str = run.info.run_id
        if known is None:
            mlflow.log_dict(dict(settings), "config.json")
        place.write_text(self._id)

    def on_step(self, report: StepReport) -> None:
        """Send the step's metrics."""
        self._send(_scalars(report), report.step)

    def on_evaluation(self, step: int, found: Mapping[str, HeldOut], samples: dict[str, str]) -> None:
        """Send held-out losses, and samples as a file."""
        self._send(_held_out(found), step)
        if samples:
            self._mlflow.log_dict(samples, f"samples/step-{step:08d}.json")

    def on_event(self, step: int, text: str) -> None:
        """Send an event as a tag of its step."""
        self._mlflow.set_tag(f"step {step}", text[:5000])

    def on_rollback(self, step: int) -> None:
        """Nothing to do: steps that run again are sent again."""

    def close(self) -> None:
        """Wait for what is being sent and end the run there."""
        self._mlflow.flush_async_logging()
        self._mlflow.end_run()

    def _send(self, values: Mapping[str, float], step: int) -> None:
        named = {name.replace(" ", "_"): value for name, value in values.items()}
        self._mlflow.log_metrics(named, step=step, synchronous=False)
