"""Train on a Ray cluster: python recipes/launch/ray_train.py recipes/nano.toml --workers 16

Ray Train starts the ranks and their process group, and starts them again after a failure; the run resumes from its own
checkpoints, so none are given to Ray. The folders of the run and of its corpora must be seen by all machines.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any


def work(settings: dict[str, Any]) -> None:
    """One rank: the same as `quadriga train FILE` under torchrun."""
    from quadriga.train.config import RunConfig, read_toml
    from quadriga.train.run import train

    train(read_toml(Path(settings["file"]), RunConfig))


def main() -> None:
    """Parse the command line and run until the end of the run."""
    import ray.train
    from ray.train.torch import TorchTrainer

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("file", help="the run's TOML file, at the same place on all machines")
    parser.add_argument("--workers", type=int, required=True, help="number of ranks")
    parser.add_argument("--cpu", action="store_true", help="ranks without GPUs")
    parser.add_argument("--failures", type=int, default=100, help="how often to start again")
    given = parser.parse_args()
    TorchTrainer(
        work,
        train_loop_config={"file": str(Path(given.file).resolve())},
        scaling_config=ray.train.ScalingConfig(num_workers=given.workers, use_gpu=not given.cpu),
        run_config=ray.train.RunConfig(failure_config=ray.train.FailureConfig(max_failures=given.failures)),
    ).fit()


if __name__ == "__main__":
    main()
