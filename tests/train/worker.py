"""Run by torchrun in tests/train/test_parallel.py: the same tiny run under every layout this number of ranks allows.

    python -m torch.distributed.run --standalone --nproc-per-node N -m tests.train.worker FOLDER

Rank 0 writes FOLDER/losses-N.json: layout -> losses and gradient norms of 20 steps, whose last ten steps follow a save
and a resume under the next layout of the list; then the held-out loss and a greedy continuation.
"""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import torch

from quadriga.errors import ConfigError
from quadriga.model.config import AttentionSpec, DenseSpec, ModelConfig, QKNormSpec, RopeSpec
from quadriga.train import config as sections
from quadriga.train.held_out import continuation, held_out_losses
from quadriga.train.trainer import Trainer
from quadriga.train.world import World
from tests.train import runs
from tests.waiting import HANG_S

N_STEPS = 20
LAYOUTS: dict[int, dict[str, dict[str, int]]] = {
    1: {"one": {}, "muon": {}, "tied": {}},
    2: {
        "fsdp": {},
        "hsdp": {"replicate": 2},
        "experts": {"experts": 2},
        "tensor": {"tensor": 2},
        "context": {"context": 2},
        "pipeline": {"pipeline": 2},
        "muon tensor": {"tensor": 2},
        "muon fsdp": {},
        "tied pipeline": {"pipeline": 2},
        "tied tensor": {"tensor": 2},
    },
    4: {
        "experts": {"experts": 4},
        "tensor x fsdp": {"tensor": 2},
        "experts x fsdp": {"experts": 2},
        "context": {"context": 4},
        "experts x hsdp": {"experts": 2, "replicate": 2},
        "experts x tensor x context": {"experts": 2, "tensor": 2, "context": 2},
        "pipeline x fsdp": {"pipeline": 2},
        "tensor x hsdp": {"tensor": 2, "replicate": 2},
        "pipeline": {"pipeline": 4},
        "pipeline x hsdp": {"pipeline": 2, "replicate": 2},
        "pipeline x tensor x experts": {"pipeline": 2, "tensor": 2, "experts": 2},
        "muon experts": {"experts": 2},
        "muon tensor x experts": {"tensor": 2, "experts": 2},
        "tied pipeline": {"pipeline": 4},
        "tied pipeline x tensor": {"pipeline": 2, "tensor": 2},
    },
}
HALVES = AttentionSpec(
    n_heads=6,
    n_kv_heads=2,
    head_dim=4,
    clip_qkv=8.0,
    position=RopeSpec(theta=10_000.0),
    qk_norm=QKNormSpec(over="head", eps=1e-5),
    qkv_bias=True,
    out_bias=True,
    window=11,
)
MODEL = replace(
    runs.TINY,
    layers=(
        replace(runs.TINY.layers[0], mixer=HALVES, ffn=DenseSpec(d_ff=28, activation="silu")),
        replace(runs.TINY.layers[0], mixer=replace(HALVES, window=None)),
        replace(runs.TINY.layers[0], mixer=HALVES),
        replace(runs.TINY.layers[0], mixer=replace(HALVES, window=None)),
    ),
)
"""Whatever is cut by heads: biases, norms of q and k, windows; a dense layer, and three with experts."""


def kind(layout: str) -> str:
    """Which of the single process's runs a layout computes, by its name in ``LAYOUTS[1]``."""
    first = layout.split()[0]
    return first if first in LAYOUTS[1] else "one"


def model(layout: str) -> ModelConfig:
    """The model of a layout: with "tied" its head is the table of embeddings."""
    return replace(MODEL, tied_embeddings=kind(layout) == "tied")


def settings(layout: str, n_ranks: int = 1, n_steps: int = N_STEPS) -> runs.Settings:
    """The settings of a layout: micro-steps of 4 rows, all kinds of balancing."""
    options = LAYOUTS[n_ranks][layout]
    return runs.Settings(
        n_steps=n_steps,
        schedule=sections.ScheduleSection(kind="constant", warmup_steps=4),
        optimiser=sections.OptimiserSection(name="muon" if kind(layout) == "muon" else "adamw", learning_rate=3e-3),
        router=sections.RouterSection(z_loss=1e-3, bias_rate=1e-3, bias_fade=0.0),
        parallel=sections.ParallelSection(device="cpu", micro_rows=4, timeout_s=HANG_S, **options),
        checkpoint=sections.CheckpointSection(every=N_STEPS // 2),
        ema=sections.EmaSection(decay=0.9),
    )


def curve(folder: Path, layout: str, then: str, world: World) -> list[float]:
    """A run of 20 steps, stopped in the middle and resumed under another layout; see :func:`results`."""
    record = runs.Record()
    config = model(layout)
    first = runs.trainer(folder, settings(layout, world.size), config=config, record=record, world=world, meta=True)
    first.train(lambda: first.step == N_STEPS // 2 - 1)
    second = runs.trainer(folder, settings(then, world.size), config=config, record=record, world=world)
    assert second.resume()
    assert second.step == N_STEPS // 2
    second.train()
    return results(second, record)


def results(run: Trainer, record: runs.Record) -> list[float]:
    """Losses, norms, held-out loss and a continuation's ids. All ranks must call this."""
    held_out = held_out_losses(run.module, {"all": runs.source(n_rows=6, seed=3)}, run.world)["all"].loss
    said = continuation(run.module, [3, 5, 7], 4, n_vocab=runs.VOCAB, end_ids=(), world=run.world)
    return [*record.losses, *record.norms, held_out, *said]


def told(world: World) -> str:
    """What this rank says when rank 0 cannot do its part: an error of ours, or any other."""

    def fail(error: Exception) -> None:
        raise error

    said = []
    for error in (ConfigError("there is no checkpoint"), ValueError("odd")):
        try:
            world.first_does(lambda: fail(error))  # noqa: B023
        except Exception as found:
            said.append(f"{type(found).__name__}: {found}")
    world.first_does(lambda: None)
    return "; ".join(said)


def main() -> None:
    folder = Path(sys.argv[1])
    torch.set_num_threads(1)
    world = World.join("cpu", HANG_S)
    saved_by_others = sorted(folder.glob("shared-*"))
    world.wait()
    found = {}
    for one in LAYOUTS[1]:
        layouts = [layout for layout in LAYOUTS[world.size] if kind(layout) == one]
        for layout, then in zip(layouts, layouts[1:] + layouts[:1], strict=True):
            found[f"{layout}, then {then}"] = curve(folder / f"{world.size}-{layout}", layout, then, world)
    # Resume from a checkpoint of another number of ranks, if there is one.
    for other in saved_by_others:
        record = runs.Record()
        run = runs.trainer(other, settings("tensor", world.size), config=MODEL, record=record, world=world)
        assert run.resume()
        run.train()
        found[f"{other.name} resumed"] = results(run, record)
    if world.size == 4:
        for reader in (1, 2):
            some = settings("experts x tensor x context", world.size, n_steps=10)
            runs.trainer(folder / f"shared-{reader}", some, config=MODEL, world=world).train()
    (folder / f"told-{world.size}-{world.rank}").write_text(told(world))
    if world.first:
        (folder / f"losses-{world.size}.json").write_text(json.dumps(found))
    world.leave()


if __name__ == "__main__":
    main()
