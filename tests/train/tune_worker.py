"""Run by torchrun in tests/train/test_tune_ranks.py: every tuning run of ``CASES`` on this number of ranks.

    python -m torch.distributed.run --standalone --nproc-per-node N -m tests.train.tune_worker FOLDER

FOLDER has base/, dense/, teacher/ and rows; the runs are FOLDER/N-CASE. One that a single process has begun is ended, and one is begun
for a single process to end.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from quadriga.engine.live_sampler import LiveSampler
from quadriga.model.config import ModelConfig
from quadriga.text.tokenizer import Tokenizer
from quadriga.train.config import parse_toml
from quadriga.train.services import SamplerOptions, Services
from quadriga.train.tune import tune
from quadriga.train.tune_config import TuneConfig
from quadriga.train.world import World
from tests.train.tune_runs import DENSE_LORA, LORA, toml
from tests.waiting import HANG_S

EXPERTS = "experts = 2\n"
GRPO = """
[grpo]
samples = 4
max_new_tokens = 5
kl_weight = 0.02
updates = 2
[[grpo.rewards]]
kind = "regex"
pattern = "[aeiou]"
[checkpoint]
every = 4
"""
CASES = {
    "lora": ("sft", LORA, ""),
    "lora experts": ("sft", LORA, EXPERTS),
    "lora experts q8": ("sft", LORA + 'base_format = "q8"\n', EXPERTS),
    "full": ("sft", "", ""),
    "full experts": ("sft", "", EXPERTS),
    "dpo": ("dpo", LORA, EXPERTS),
    "dpo full": ("dpo", "", ""),
    "orpo full experts": ("orpo", "", EXPERTS),
    "distill": ("distill", LORA, EXPERTS),
    "grpo": ("grpo", LORA + GRPO, ""),
    "grpo full experts": ("grpo", GRPO, EXPERTS),
    "lora context": ("sft", LORA, "context = 2\n"),
    "lora pipeline": ("sft", LORA, "pipeline = 2\n"),
    "full tensor": ("sft", "[ema]\ndecay = 0.5\n", "tensor = 2\n"),
    "lora tensor": ("sft", LORA, "tensor = 2\n"),
    "lora tensor dense": ("sft", DENSE_LORA, "tensor = 2\n"),
    "full pipeline": ("sft", "", "pipeline = 2\n"),
}
"""Name -> (objective, its sections, [parallel] on several ranks)."""
ON_FOUR = ("lora experts", "full experts", "dpo", "lora context", "full tensor", "lora pipeline", "lora tensor")
"""Cases that four ranks run too: the layout's two times what shards them."""
N_STEPS, STOP = 6, 3
SHARED = "lora experts"


def config(folder: Path, case: str, n_ranks: int, *, run: str | None = None) -> TuneConfig:
    """The run of a case; the same but for [parallel] on any number of ranks."""
    objective, sections, parallel = CASES[case]
    own = folder / objective
    own.mkdir(exist_ok=True)
    base = folder / ("dense" if case.endswith("dense") else "base")
    text = toml(own, base, objective, run=str(folder / (run or f"{n_ranks}-{case}")))
    text = text.replace("rows = 2\n", "rows = 4\n").replace("learning_rate = 2e-2", "learning_rate = 3e-3\neps = 1e-6")
    text = text.replace("steps = 12", f"steps = {N_STEPS}").replace("every = 12", f"every = {N_STEPS}")
    if objective == "distill":
        sections += f'[distill]\nteacher = "{folder / "teacher"}"\ntemperature = 1.5\nweight = 0.7\n'
    layout = f'[parallel]\ndevice = "cpu"\ntimeout_s = {HANG_S}\n' + (parallel if n_ranks > 1 else "")
    return parse_toml((text + sections + layout).encode(), TuneConfig)


def sampler(model: ModelConfig, tokenizer: Tokenizer, options: SamplerOptions) -> LiveSampler:
    """The engine, on one thread."""
    return LiveSampler(model, tokenizer, form=options.format, max_len=options.max_len, threads=1)


def run(settings: TuneConfig) -> None:
    """The whole run."""
    assert tune(settings, services=Services(sampler=sampler)).done


def part(settings: TuneConfig) -> None:
    """Run the first ``STOP`` steps."""
    steps = iter(range(STOP))
    assert not tune(settings, stop=lambda: next(steps) == STOP - 1).done


def main() -> None:
    folder = Path(sys.argv[1])
    torch.set_num_threads(1)
    world = World.join("cpu", HANG_S)
    for case in CASES if world.size == 2 else ON_FOUR:
        run(config(folder, case, world.size))
    if world.size == 2:
        run(config(folder, SHARED, world.size, run="from-1"))
        part(config(folder, SHARED, world.size, run=f"from-{world.size}"))
    world.leave()


if __name__ == "__main__":
    main()
