"""The configuration of a training run: frozen structs read from one TOML file. Imports no torch.

    run = "runs/nano"          the run's folder
    seed = 17
    [model]                    a preset with changes, or a checkpoint to start from
    [data]                     corpora and curriculum (train/data_config.py)
    [schedule] [optimiser]     learning rates and updates
    [router]                   load balancing
    [parallel]                 ranks, precision, memory
    [guard]                    what happens when the loss jumps
    [checkpoint] [log] [evaluate] [ema]

An unknown key is an error that suggests the nearest known one. docs/training.md lists the defaults.
"""

from __future__ import annotations

import difflib
import math
import re
from pathlib import Path
from typing import Literal, TypeVar, get_args, get_type_hints

import msgspec

from quadriga.errors import ConfigError
from quadriga.train.data_config import DataConfig
from quadriga.train.finite import refuse_not_finite

T = TypeVar("T", bound=msgspec.Struct)


class Section(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Base of the sections: frozen, keywords only, no unknown keys."""


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ConfigError(message)


def _positive(section: str, **values: float) -> None:
    for name, value in values.items():
        ok = math.isfinite(value) and value > 0
        _require(ok, f"{section}.{name} must be a finite number above 0, got {value!r}")


def _not_negative(section: str, **values: float) -> None:
    for name, value in values.items():
        ok = math.isfinite(value) and value >= 0
        _require(ok, f"{section}.{name} must be a finite number, 0 or above, got {value!r}")


def _unused(section: msgspec.Struct, unused: bool, name: str, user: str) -> None:
    """Refuse a key that would have no effect: ``user`` says what would use it."""
    default = next(field.default for field in msgspec.structs.fields(type(section)) if field.name == name)
    value = getattr(section, name)
    where = type(section).__name__.removesuffix("Section").lower()
    _require(not unused or value == default, f"{where}.{name} is used with {user} only, got {value!r}: leave it out")


def require_run(run: str) -> None:
    """Check the name of a run's folder.

    Raises:
        ConfigError: it is empty, which would be the current folder.
    """
    _require(bool(run.strip()), f"run must be the folder of the run, got {run!r}")


class ModelSection(Section, frozen=True):
    """The model: either ``preset``, with the sizes below replacing its own, or ``start``."""

    preset: str | None = None
    """A model name known to ``quadriga info``: determines the family and all sizes not given here."""
    start: str | None = None
    """A checkpoint of any format to start from, with its own configuration."""
    vocab_size: int | None = None
    """None: the size of the corpus's vocabulary, rounded up to a multiple of 64."""
    d_model: int | None = None
    n_layers: int | None = None
    n_heads: int | None = None
    n_kv_heads: int | None = None
    head_dim: int | None = None
    d_ff: int | None = None
    n_experts: int | None = None
    top_k: int | None = None
    max_seq_len: int | None = None
    rope_theta: float | None = None
    aggregate: Literal["weighted_sum", "vote", "fuse"] | None = None
    """How the chosen experts' outputs are combined; None: as the preset does (all: weighted_sum)."""
    init_std: float = 0.02
    """Standard deviation of a new model's matrices; wo and w_down get init_std / sqrt(2 n_layers)."""

    def __post_init__(self) -> None:
        _require(
            (self.preset is None) != (self.start is None),
            "model must have exactly one of preset (a new model) and start (a checkpoint to start from)",
        )
        given = [name for name in (*SIZES, "aggregate") if getattr(self, name) is not None]
        _require(
            self.start is None or not given, f"model.start has its own sizes and kinds: leave out {', '.join(given)}"
        )
        _positive("model", init_std=self.init_std)
        _positive("model", **{name: getattr(self, name) for name in SIZES if getattr(self, name) is not None})


SIZES = (
    "vocab_size", "d_model", "n_layers", "n_heads", "n_kv_heads", "head_dim", "d_ff", "n_experts", "top_k",
    "max_seq_len", "rope_theta",
)  # fmt: skip
"""The keys of [model] that replace the preset's sizes."""


class ScheduleSection(Section, frozen=True):
    """The learning-rate schedule; see ``train.schedule``."""

    kind: Literal["cosine", "wsd", "constant"] = "cosine"
    steps: int | None = None
    """Optimiser steps of the run; None: the whole curriculum."""
    warmup_steps: int = 100
    decay_share: float = 0.2
    """wsd: the fraction of the run at its end over which the rate falls."""
    final_share: float = 0.1
    """The final rate as a fraction of the peak rate."""

    def __post_init__(self) -> None:
        _unused(self, self.kind != "wsd", "decay_share", "schedule.kind 'wsd'")
        _unused(self, self.kind == "constant", "final_share", "schedule.kind 'cosine' and 'wsd'")
        _require(self.steps is None or self.steps > 0, f"schedule.steps must be at least 1, got {self.steps}")
        _not_negative("schedule", warmup_steps=self.warmup_steps)
        _require(0 <= self.final_share <= 1, f"schedule.final_share must be within [0, 1], got {self.final_share}")
        _require(0 < self.decay_share <= 1, f"schedule.decay_share must be within (0, 1], got {self.decay_share}")


class OptimiserSection(Section, frozen=True):
    """``adamw`` and ``lion`` update all parameters; ``muon`` updates the layers' matrices, and AdamW the rest."""

    name: Literal["adamw", "lion", "muon"] = "adamw"
    learning_rate: float = 1e-3
    """Peak rate of AdamW or Lion; with muon, of the AdamW for the other parameters."""
    muon_learning_rate: float = 0.02
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    momentum: float = 0.95
    """Momentum of Muon."""
    weight_decay: float = 0.1
    """Applied to matrices; norms and the router have no weight decay."""
    clip_norm: float = 1.0
    """Clip the global gradient norm (all parameters, all ranks) to this; 0: no clipping."""

    def __post_init__(self) -> None:
        _positive("optimiser", learning_rate=self.learning_rate, muon_learning_rate=self.muon_learning_rate)
        _positive("optimiser", eps=self.eps)
        for name in ("learning_rate", "muon_learning_rate"):
            _require(
                getattr(self, name) <= 1,
                f"optimiser.{name} must be at most 1, got {getattr(self, name):g}: a step moves each weight, or each "
                "matrix's singular values, by about as much",
            )
        _not_negative("optimiser", weight_decay=self.weight_decay, clip_norm=self.clip_norm)
        _unused(self, self.name != "muon", "muon_learning_rate", "optimiser.name 'muon'")
        _unused(self, self.name != "muon", "momentum", "optimiser.name 'muon'")
        _unused(self, self.name == "lion", "eps", "optimiser.name 'adamw' and 'muon'")
        for name, value in (("betas", self.betas[0]), ("betas", self.betas[1]), ("momentum", self.momentum)):
            _require(0 <= value < 1, f"optimiser.{name} must be within [0, 1), got {value}")


class RouterSection(Section, frozen=True):
    """Load balancing of the experts."""

    balance_loss: float | None = None
    """Weight of the balance loss; None: the model's own (DBRX: 0.05)."""
    balance_form: Literal["megablocks", "hf", "document"] = "megablocks"
    """Definition of the balance loss (``nn.router_loss``); with "hf" the same weight is top_k times stronger.
    "document" balances each document's own tokens, for a small weight beside ``bias_rate`` (DeepSeek-V3: 1e-4)."""
    z_loss: float = 0.0
    bias_rate: float = 0.0
    """Loss-free balancing: the change of an expert's bias per step, against its load. 0: off."""
    bias_fade: float = 0.2
    """Fraction of the run at its end over which the bias fades to 0. 0: never, for a model whose family stores such a
    bias (GLM-4.5, dots.llm1, ERNIE, MiniMax); other checkpoint formats have no place for it."""

    def __post_init__(self) -> None:
        _not_negative("router", balance_loss=self.balance_loss or 0.0, z_loss=self.z_loss, bias_rate=self.bias_rate)
        _require(0 <= self.bias_fade <= 1, f"router.bias_fade must be within [0, 1], got {self.bias_fade}")
        _unused(self, not self.bias_rate, "bias_fade", "router.bias_rate above 0")


class ParallelSection(Section, frozen=True):
    """How a step is computed and distributed. Results do not depend on it, except for rounding and ``dtype``."""

    micro_rows: int | None = None
    """Rows per micro-step over *all* ranks; None: the global batch. The balance loss is computed per micro-step."""
    replicate: int = 1
    """HSDP: number of replicas of the sharded model."""
    experts: int = 1
    """Expert parallelism: number of neighbouring ranks that the experts are divided among."""
    tensor: int = 1
    """Tensor parallelism: number of neighbouring ranks that share rows, the heads of attention and the width of dense
    networks."""
    context: int = 1
    """Context parallelism: number of parts that long rows are cut into; ``tensor`` neighbours share a part."""
    pipeline: int = 1
    """Pipeline parallelism: number of stages that the layers are divided among; micro-steps go through them in turn."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Dtype of the computation; master weights and optimiser state are always float32."""
    device: str = "auto"
    recompute: bool | Literal["none", "selective", "full"] = False
    """Activation checkpointing. full (or true): keep only each layer's input, and recompute the rest in the backward
    pass. selective: keep the results of matrix products and of attention too."""
    timeout_s: float = 600.0
    """How long a rank waits for the others before the run ends with an error that names them."""

    def __post_init__(self) -> None:
        _positive("parallel", replicate=self.replicate, experts=self.experts, timeout_s=self.timeout_s)
        _positive("parallel", tensor=self.tensor, context=self.context, pipeline=self.pipeline)
        ok = self.micro_rows is None or self.micro_rows > 0
        _require(ok, f"parallel.micro_rows must be at least 1, got {self.micro_rows}")


def require_whole_documents(router: RouterSection, parallel: ParallelSection) -> None:
    """Check that documents are not cut where they are balanced each.

    Raises:
        ConfigError: ranks would have parts of rows.
    """
    _require(
        router.balance_form != "document" or parallel.tensor * parallel.context == 1,
        "router.balance_form 'document' needs whole documents on a rank: leave parallel.tensor and "
        f"parallel.context at 1, got {parallel.tensor} and {parallel.context}",
    )


class GuardSection(Section, frozen=True):
    """What to do with a step whose loss or gradient is not finite or far above the recent ones."""

    action: Literal["skip", "rollback", "stop"] = "skip"
    """skip: skip this batch. rollback: return to the last checkpoint and skip the batch. stop: end the run."""
    sigmas: float = 8.0
    """Threshold above the window's mean, in standard deviations; 0: only NaN and infinity are bad."""
    window: int = 128
    limit: int = 10
    """This many bad steps within one window end the run, whatever the action."""

    def __post_init__(self) -> None:
        _not_negative("guard", sigmas=self.sigmas)
        _require(self.window >= 8, f"guard.window must be at least 8, got {self.window}")
        _require(self.limit >= 1, f"guard.limit must be at least 1, got {self.limit}")


class CheckpointSection(Section, frozen=True):
    """When checkpoints are saved, and how many are kept."""

    every: int = 200
    keep: int = 3
    keep_every: int = 0
    """Checkpoints of steps divisible by this are never removed; 0: none."""
    asynchronous: bool = True
    """Copy the state, then write it while training continues."""
    on_error: Literal["continue", "stop"] = "continue"
    """What to do after a failed save (full disk); it is reported, and the last good checkpoint is kept."""

    def __post_init__(self) -> None:
        _require(self.every >= 1, f"checkpoint.every must be at least 1, got {self.every}")
        _require(self.keep >= 1, f"checkpoint.keep must be at least 1, got {self.keep}")
        _not_negative("checkpoint", keep_every=self.keep_every)


class LogSection(Section, frozen=True):
    """What is logged during the run."""

    every: int = 10
    """Steps between lines on the screen; metrics.jsonl has every step."""
    routing_every: int = 10
    """Steps between rows of the expert-load heatmap."""
    tensorboard: bool = False
    """Write TensorBoard's files into the run's folder."""
    wandb: str | None = None
    """The project of Weights & Biases that the run's metrics are sent to."""
    mlflow: str | None = None
    """The experiment of MLflow that they are sent to."""
    report: bool = True
    """Write report.html at every checkpoint and at the end."""

    def __post_init__(self) -> None:
        _require(self.every >= 1 and self.routing_every >= 1, "log.every and log.routing_every must be at least 1")
        for name in ("wandb", "mlflow"):
            _require(getattr(self, name) != "", f"log.{name} must be a name, or left out")


class EvaluateSection(Section, frozen=True):
    """Held-out loss by domain, and sample texts."""

    every: int = 200
    """Steps between evaluations; 0: never."""
    rows: int = 8
    """Held-out rows per domain."""
    prompts: list[str] = []
    """Prompts that are continued at each evaluation."""
    sample_tokens: int = 48

    def __post_init__(self) -> None:
        _not_negative("evaluate", every=self.every)
        _require(self.rows >= 1 and self.sample_tokens >= 1, "evaluate.rows and sample_tokens must be at least 1")
        _require("" not in self.prompts, "evaluate.prompts must be texts to continue, got an empty one")


class EmaSection(Section, frozen=True):
    """Exponential moving average of the weights, saved with them; ``quadriga train --export`` uses it if it is on."""

    decay: float = 0.0
    """0: off; 0.999 averages about the last thousand steps."""

    def __post_init__(self) -> None:
        _require(0 <= self.decay < 1, f"ema.decay must be within [0, 1), got {self.decay}")


class RunConfig(Section, frozen=True):
    """The configuration of a pre-training run."""

    run: str
    model: ModelSection
    data: DataConfig
    seed: int = 17
    schedule: ScheduleSection = ScheduleSection()
    optimiser: OptimiserSection = OptimiserSection()
    router: RouterSection = RouterSection()
    parallel: ParallelSection = ParallelSection()
    guard: GuardSection = GuardSection()
    checkpoint: CheckpointSection = CheckpointSection()
    log: LogSection = LogSection()
    evaluate: EvaluateSection = EvaluateSection()
    ema: EmaSection = EmaSection()

    def __post_init__(self) -> None:
        require_run(self.run)
        require_whole_documents(self.router, self.parallel)

    @property
    def n_steps(self) -> int:
        """Optimiser steps of the run."""
        return self.schedule.steps or self.data.n_steps


def read_toml(path: Path, kind: type[T]) -> T:
    """Read a TOML file into a struct of type ``kind``.

    Raises:
        ConfigError: no such file, not TOML, an unknown key, or a missing or wrong value.
    """
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from None
    return parse_toml(raw, kind, path.name)


def parse_toml(raw: bytes, kind: type[T], name: str = "configuration") -> T:
    """Parse the bytes of a TOML file; see :func:`read_toml`. ``name`` is used in error messages."""
    try:
        found = msgspec.toml.decode(raw, type=kind)
        refuse_not_finite(msgspec.to_builtins(found))
        return found
    except ConfigError as error:  # raised by a section's own checks, or here
        raise ConfigError(f"{name}: {error}") from None
    except msgspec.ValidationError as error:
        raise ConfigError(f"{name}: {_explain(str(error), kind)}") from None
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{name} is not valid TOML: {error}") from None


def _explain(message: str, kind: type[msgspec.Struct]) -> str:
    """Rewrite msgspec's message: locations as in TOML, and the nearest known key for an unknown one."""
    place = re.search(r" - at `\$\.?([^`]*)`$", message)
    path = place[1] if place else ""
    message = message[: place.start()] if place else message
    unknown = re.search(r"unknown field `([^`]*)`", message)
    where = f"[{path}] " if path else ""
    if unknown is None:
        return f"{path or 'the file'}: {message[0].lower()}{message[1:]}"
    known = _fields_at(kind, path)
    near = difflib.get_close_matches(unknown[1], known, n=1, cutoff=0.4)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    return f"{where}has no key {unknown[1]!r}.{hint} It has: {', '.join(known)}"


def _fields_at(kind: type, path: str) -> list[str]:
    for name in filter(None, re.sub(r"\[[^]]*\]", "", path).split(".")):
        hint = get_type_hints(kind).get(name)
        inner = [k for k in (hint, *get_args(hint)) if isinstance(k, type) and issubclass(k, msgspec.Struct)]
        if not inner:
            return []
        kind = inner[0]
    return [field.encode_name for field in msgspec.structs.fields(kind)]
