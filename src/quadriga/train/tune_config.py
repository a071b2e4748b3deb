"""A tuning run as frozen structs, read from one TOML file. No torch.

    run = "runs/dolly"                    where everything of the run goes
    model = "smollm2-135m-instruct"       a catalogue name, a path, hf:ORG/REPO
    objective = "sft"                     sft | text | dpo | orpo | grpo
    [lora]                                a low-rank adapter; without it every parameter is trained
    [data] [preference] [grpo]
    [schedule] [optimiser] [router] [parallel] [guard] [checkpoint] [log] [evaluate] [ema]    as in pre-training

A key that does not exist is refused with its nearest neighbour.
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
    """The adapter; see ``model.adapter_spec``."""

    rank: int = 8
    alpha: float = 16.0
    targets: tuple[str, ...] = ("attention",)
    """attention, router, experts, shared, ffn, embeddings, head."""
    dropout: float = 0.0
    start: str | None = None
    """An adapter to go on from; its own rank, alpha and targets then hold."""
    base_format: Literal["float32", "q8", "q4"] = "float32"
    """QLoRA: what the frozen matrices under attention, experts and dense networks are held as."""

    def spec(self) -> LoraSpec:
        """The adapter's spec."""
        return LoraSpec(rank=self.rank, alpha=self.alpha, targets=self.targets, dropout=self.dropout)

    def __post_init__(self) -> None:
        self.spec()


class TuneData(Section, frozen=True):
    """Rows of JSON lines in any known layout (``train.chat_data``)."""

    files: tuple[str, ...]
    held_out: tuple[str, ...] = ()
    """Files for the held-out loss; empty: every ``held_out_every``-th row of ``files``."""
    held_out_every: int = 50
    max_rows: int | None = None
    """Read no more usable rows than this."""
    max_bad_rows: int = 100
    seq_len: int = 512
    rows: int = 4
    """Packed rows of seq_len tokens in every step's batch."""
    epochs: int = 1
    template: str | None = None
    """A chat template by name, where the model brings none: chatml, instruct."""
    label: str | None = None
    """objective "text": a column to report the held-out loss by."""

    def __post_init__(self) -> None:
        if not self.files:
            raise ConfigError("data.files must name at least one file of JSON lines")
        for name in ("seq_len", "rows", "epochs", "held_out_every"):
            if getattr(self, name) < 1:
                raise ConfigError(f"data.{name} must be at least 1, got {getattr(self, name)}")


class PreferenceSection(Section, frozen=True):
    """Of dpo and orpo."""

    beta: float = 0.1
    """dpo: how strongly the model is held to where it began."""
    odds_weight: float = 0.1
    """orpo: weight of the odds-ratio term beside the chosen answer's loss."""


class GrpoSection(Section, frozen=True):
    """Of grpo. The reward is 1 where the answer's last number is the row's."""

    samples: int = 4
    max_new_tokens: int = 96
    temperature: float = 1.0
    kl_weight: float = 0.02

    def __post_init__(self) -> None:
        if self.samples < 2 or self.max_new_tokens < 1 or not 1e-5 <= self.temperature < float("inf"):
            raise ConfigError(
                "grpo needs samples of 2 or more, max_new_tokens of 1 or more, a temperature of 1e-5 or more: below it "
                f"all samples are the same; got {self.samples}, {self.max_new_tokens}, {self.temperature:g}"
            )


class TuneConfig(Section, frozen=True):
    """Everything a tuning run is made of."""

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
