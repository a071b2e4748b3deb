"""Two models on our engine, measured in turns within one run: what experts cost, MoE against dense.

python bench/pairs.py A B --measure decode:32 batch:32 --rounds 5
"""

from __future__ import annotations

import argparse
import statistics
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from compare import HERE, Driver


def main() -> None:
    """Parse the command line, measure in turns, print medians and their ratio."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs=2)
    parser.add_argument("--measure", nargs="+", default=["decode:32"])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--cpus", default="0,1")
    args = parser.parse_args()
    own = [sys.executable, str(HERE / "own_driver.py")]
    pin = ["taskset", "-c", args.cpus]
    drivers = [Driver([*pin, *own, model, "--threads", str(args.threads)]) for model in args.models]
    for item in args.measure:
        rounds = [[driver.measure(item.replace(":", " "))[0] for driver in drivers] for _ in range(args.rounds)]
        first, second = (statistics.median(column) for column in zip(*rounds, strict=True))
        ratio = statistics.median(a / b for a, b in rounds)
        print(f"{item}: {args.models[0]} {first:.1f}, {args.models[1]} {second:.1f} tokens/s: {ratio:.3f}x", flush=True)


if __name__ == "__main__":
    main()
