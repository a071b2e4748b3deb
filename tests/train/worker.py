"""Run by torchrun in tests/train/test_parallel.py: the same tiny run under every layout this number of ranks allows.

    python -m torch.distributed.run --standalone --nproc-per-node N -m tests.train.worker FOLDER

Rank 0 writes FOLDER/losses-N.json: layout -> losses of 20 steps, whose last ten steps follow a save and a resume.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch

from quadriga.train import config as sections
from quadriga.train.world import World
from tests.train import runs
from tests.waiting import HANG_S

N_STEPS = 20
LAYOUTS: dict[int, dict[str, dict[str, int]]] = {
    1: {"one": {}},
    2: {"fsdp": {}, "hsdp": {"replicate": 2}, "experts": {"experts": 2}},
    4: {
        "fsdp": {},
        "hsdp": {"replicate": 2},
        "experts": {"experts": 4},
        "experts x fsdp": {"experts": 2},
        "experts x hsdp": {"experts": 2, "replicate": 2},
        "muon": {"experts": 2},
    },
}


def settings(layout: str, n_steps: int = N_STEPS, *, alone: bool = False) -> runs.Settings:
    """The settings for any number of ranks: micro-steps of 4 rows, all kinds of balancing. ``alone``: for one rank."""
    options = {} if alone else next((table[layout] for table in LAYOUTS.values() if layout in table), {})
    return runs.Settings(
        n_steps=n_steps,
        schedule=sections.ScheduleSection(kind="constant", warmup_steps=4),
        optimiser=sections.OptimiserSection(name="muon" if layout == "muon" else "adamw", learning_rate=3e-3),
        router=sections.RouterSection(z_loss=1e-3, bias_rate=1e-3, bias_fade=0.0),
        parallel=sections.ParallelSection(device="cpu", micro_rows=4, timeout_s=HANG_S, **options),
        checkpoint=sections.CheckpointSection(every=N_STEPS // 2),
        ema=sections.EmaSection(decay=0.9),
    )


def losses(folder: Path, layout: str, world: World) -> list[float]:
    """A run of 20 steps, stopped and resumed in the middle."""
    record = runs.Record()
    first = runs.trainer(folder, settings(layout), record=record, world=world, meta=True)
    first.train(lambda: first.step == N_STEPS // 2 - 1)
    second = runs.trainer(folder, settings(layout), record=record, world=world)
    assert second.resume()
    assert second.step == N_STEPS // 2
    second.train()
    return record.losses


def main() -> None:
    folder = Path(sys.argv[1])
    torch.set_num_threads(1)
    world = World.join("cpu", HANG_S)
    saved_by_others = sorted(folder.glob("shared-*"))
    world.wait()
    found = {}
    for layout in LAYOUTS[world.size]:
        found[layout] = losses(folder / f"{world.size}-{layout}", layout, world)
    # Resume from a checkpoint of another number of ranks, if there is one.
    for other in saved_by_others:
        record = runs.Record()
        run = runs.trainer(other, settings("fsdp"), record=record, world=world)
        assert run.resume()
        run.train()
        found[f"{other.name} resumed"] = record.losses
    if world.size == 4:
        for reader in (1, 2):
            first = runs.trainer(folder / f"shared-{reader}", settings("experts x fsdp", n_steps=10), world=world)
            first.train()
    if world.first:
        (folder / f"losses-{world.size}.json").write_text(json.dumps(found))
    world.leave()


if __name__ == "__main__":
    main()
