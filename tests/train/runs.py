"""Tiny runs for the tests of training: all sizes differ pairwise, a second or less each."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import torch

from quadriga.model.config import AttentionSpec, ModelConfig, MoESpec, NormSpec, RopeSpec, uniform_model
from quadriga.nn.transformer import Transformer
from quadriga.train import config as sections
from quadriga.train.initialise import NewWeights, new_parameters
from quadriga.train.losses import NextToken
from quadriga.train.memory_source import MemorySource
from quadriga.train.run_directory import RunDirectory
from quadriga.train.step_report import StepReport
from quadriga.train.storage import Files
from quadriga.train.trainer import Trainer
from quadriga.train.world import World

VOCAB, D_MODEL, N_EXPERTS = 97, 24, 8

TINY = uniform_model(
    family="dbrx",
    vocab_size=VOCAB,
    d_model=D_MODEL,
    n_layers=2,
    max_seq_len=64,
    norm=NormSpec(kind="layer"),
    mixer=AttentionSpec(n_heads=6, n_kv_heads=3, head_dim=4, clip_qkv=8.0, position=RopeSpec(theta=10_000.0)),
    ffn=MoESpec(d_ff=20, n_experts=N_EXPERTS, top_k=2, activation="silu", aux_loss_weight=0.05, jitter_eps=0.0),
)


class Settings(msgspec.Struct, frozen=True, kw_only=True):
    """The sections a Trainer needs, without corpora."""

    n_steps: int = 8
    seed: int = 5
    schedule: sections.ScheduleSection = sections.ScheduleSection(warmup_steps=2)
    optimiser: sections.OptimiserSection = sections.OptimiserSection(learning_rate=1e-2)
    router: sections.RouterSection = sections.RouterSection(z_loss=1e-3)
    parallel: sections.ParallelSection = sections.ParallelSection(device="cpu")
    guard: sections.GuardSection = sections.GuardSection()
    checkpoint: sections.CheckpointSection = sections.CheckpointSection(every=3, keep=2)
    ema: sections.EmaSection = sections.EmaSection()


def source(n_rows: int = 8, seq_len: int = 16, seed: int = 1) -> MemorySource:
    """Documents of 1 to 40 tokens, each counting upwards by its own stride: a pattern that can be learned."""
    generator = torch.Generator().manual_seed(seed)
    documents = []
    for i in range(60):
        length, start, stride = (int(torch.randint(1, n, (), generator=generator)) for n in (41, VOCAB, 5))
        documents.append((("even", "odd")[i % 2], [(start + stride * t) % VOCAB for t in range(length)]))
    return MemorySource(documents, n_rows=n_rows, seq_len=seq_len, seed=seed)


class Record:
    """A Listener that records its calls."""

    def __init__(self) -> None:
        self.steps: list[StepReport] = []
        self.events: list[str] = []
        self.rollbacks: list[int] = []

    def on_step(self, report: StepReport) -> None:
        self.steps.append(report)

    def on_event(self, step: int, text: str) -> None:
        self.events.append(text)

    def on_rollback(self, step: int) -> None:
        self.rollbacks.append(step)

    @property
    def losses(self) -> list[float]:
        return [report.loss for report in self.steps]

    @property
    def norms(self) -> list[float]:
        return [report.norm for report in self.steps]


def model(config: ModelConfig = TINY, seed: int = 0) -> Transformer:
    return Transformer.from_parameters(config, new_parameters(config, seed=seed, std=0.1))


def trainer(
    folder: Path,
    settings: Settings | None = None,
    *,
    config: ModelConfig = TINY,
    files: Files | None = None,
    record: Record | None = None,
    world: World | None = None,
    meta: bool = False,
    **changes: Any,
) -> Trainer:
    """A trainer of a tiny model, built on the meta device or not; ``changes`` go to Trainer (source=, objective=)."""
    settings = settings or Settings()
    world = world or World()
    parts: dict[str, Any] = {
        "source": source(),
        "objective": NextToken(config, settings.router, world),
        "world": world,
        "run": RunDirectory(folder, files),
        "listeners": [record] if record is not None else [],
        **changes,
    }
    parts["run"].checkpoints.mkdir(parents=True, exist_ok=True)
    if meta:
        with torch.device("meta"):
            empty = Transformer(config)
        return Trainer(settings, empty, fill=NewWeights(config, seed=0, std=0.1).read, **parts)
    return Trainer(settings, model(config), **parts)


def bits(run: Trainer) -> dict[str, bytes]:
    """Every tensor of a run's state as bytes."""
    return {
        name: value.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes()
        for name, value in run.tensors().items()
    }
