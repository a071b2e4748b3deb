"""The configuration of a tuning run: frozen structs read from one TOML file. Imports no torch.

    run = "runs/dolly"                    the run's folder
    model = "smollm2-135m-instruct"       a catalogue name, a path, hf:ORG/REPO
    objective = "sft"                     sft | text | dpo | orpo | grpo
    [lora]                                a low-rank adapter; without it every parameter is trained
    [data] [preference] [grpo]
    [schedule] [optimiser] [router] [parallel] [guard] [checkpoint] [log] [evaluate] [ema]    as in pre-training

An unknown key is an error that suggests the nearest known one.
"""

from __future__ import annotations

from typing import Literal

from quadriga.errors import ConfigError
from quadriga.model.adapter_spec import LoraSpec
from quadriga.train.config import (
    CheckpointSection,
    EmaSection,
    EvaluateSection,
    GuardSection,
    LogSection,
    OptimiserSection,
    ParallelSection,
    RouterSection,
    ScheduleSection,
    Section,
)

Objectives = Literal["sft", "text", "dpo", "orpo", "grpo"]


class LoraSection(Section, frozen=True):
    """The LoRA adapter; see ``model.adapter_spec``."""

    rank: int = 8
    alpha: float = 16.0
    targets: tuple[str, ...] = ("attention",)
    """Which matrices get an adapter: attention, router, experts, shared, ffn, embeddings, head."""
    dropout: float = 0.0
    start: str | None = None
    """An adapter to start from; its rank, alpha and targets then replace those given here."""
    base_format: Literal["float32", "q8", "q4"] = "float32"
    """QLoRA: storage format of the frozen matrices in attention, experts and dense networks."""

    def spec(self) -> LoraSpec:
        """The section as a ``LoraSpec``."""
        return LoraSpec(rank=self.rank, alpha=self.alpha, targets=self.targets, dropout=self.dropout)

    def __post_init__(self) -> None:
        self.spec()


class TuneData(Section, frozen=True):
    """Rows of JSON lines in any known layout (``train.chat_data``)."""

    files: tuple[str, ...]
    held_out: tuple[str, ...] = ()
    """Files for the held-out loss; empty: hold out every ``held_out_every``-th row of ``files``."""
    held_out_every: int = 50
    max_rows: int | None = None
    """Stop reading after this many usable rows; None: read all."""
    max_bad_rows: int = 100
    seq_len: int = 512
    rows: int = 4
    """Rows of seq_len tokens per batch; several examples are packed into a row."""
    epochs: int = 1
    template: str | None = None
    """Name of a chat template (chatml, instruct), for models without one."""
    label: str | None = None
    """objective "text": the column by whose values the held-out loss is reported."""

    def __post_init__(self) -> None:
        if not self.files:
            raise ConfigError("data.files must name at least one file of JSON lines")
        for name in ("seq_len", "rows", "epochs", "held_out_every"):
            if getattr(self, name) < 1:
                raise ConfigError(f"data.{name} must be at least 1, got {getattr(self, name)}")


class PreferenceSection(Section, frozen=True):
    """Settings of dpo and orpo."""

    beta: float = 0.1
    """dpo: how strongly the model is kept close to the reference."""
    odds_weight: float = 0.1
    """orpo: weight of the odds-ratio term beside the chosen answer's loss."""


class GrpoSection(Section, frozen=True):
    """Settings of grpo. The reward is 1 if the answer's last number equals that of the row's answer, else 0."""

    samples: int = 4
    max_new_tokens: int = 96
    temperature: float = 1.0
    kl_weight: float = 0.02

    def __post_init__(self) -> None:
        if self.samples < 2 or self.max_new_tokens < 1 or not 1e-5 <= self.temperature < float("inf"):
            raise ConfigError(
                "grpo needs samples >= 2, max_new_tokens >= 1 and temperature >= 1e-5, below which "
                f"all samples are equal; got {self.samples}, {self.max_new_tokens}, {self.temperature:g}"
            )


class TuneConfig(Section, frozen=True):
    """The configuration of a tuning run."""

    run: str
    model: str
    data: TuneData
    objective: Objectives = "sft"
    seed: int = 17
    lora: LoraSection | None = None
    preference: PreferenceSection = PreferenceSection()
    grpo: GrpoSection = GrpoSection()
    schedule: ScheduleSection = ScheduleSection(warmup_steps=10)
    optimiser: OptimiserSection = OptimiserSection(learning_rate=2e-4, weight_decay=0.0)
    router: RouterSection = RouterSection()
    parallel: ParallelSection = ParallelSection()
    guard: GuardSection = GuardSection()
    checkpoint: CheckpointSection = CheckpointSection(keep=1)
    log: LogSection = LogSection()
    evaluate: EvaluateSection = EvaluateSection(every=100)
    ema: EmaSection = EmaSection()

    def __post_init__(self) -> None:
        router = self.router
        given = {"balance_loss": router.balance_loss, "z_loss": router.z_loss, "bias_rate": router.bias_rate}
        used = self.objective in ("sft", "text")
        for name, value in given.items():
            if value and not used:
                raise ConfigError(
                    f"router.{name} must be 0 with objective {self.objective!r}, which balances no experts; "
                    f"got {value:g}"
                )
        if router.bias_rate and not router.bias_fade:
            raise ConfigError(
                "router.bias_fade must be above 0 with bias_rate: no checkpoint format can store the bias, so the "
                "model that is written would not be the one that was tuned"
            )
