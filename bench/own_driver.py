"""Measures our engine, in the protocol of ik_driver.py: one measurement a line in, tokens per second and limit out.

python bench/own_driver.py MODEL --threads 2

A mixture whose tokens crowd into a few experts is refused: its prompts and batches read less than a trained one's.
"""

from __future__ import annotations

import argparse
import sys
import time

import quadriga
from quadriga.bench.speed import Bench
from quadriga.runners.compiled import CompiledModel

EVEN = 0.5
"""Trained mixtures stand above it: a balance loss, or a correction of the scores, keeps parts near equal."""


def main() -> None:
    """Load, then answer line by line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--format", default="keep")
    parser.add_argument("--activations")
    args = parser.parse_args()
    started = time.perf_counter()
    llm = quadriga.load(args.model, threads=args.threads, format=args.format, activations=args.activations)
    assert isinstance(llm.runner, CompiledModel), "the CPU's kernels"
    bench = Bench(llm.runner, rounds=1)
    bench.run("prefill", 256)
    bench.run("decode", 2)
    spread = bench.spread()
    if spread is not None:
        shown = f"{spread.visited:.0%} of the experts visited, {spread.busiest:.0%} of the tokens at the busiest"
        assert spread.even >= EVEN, f"routing must be spread, got {shown}. Make the model with bench/synthetic.py."
        print(f"{shown}; as {spread.even:.0%} of them with equal parts", file=sys.stderr, flush=True)
    print(f"ready {time.perf_counter() - started:.2f}", flush=True)
    for line in sys.stdin:
        kind, n = line.split()[:2]
        row = bench.run(kind, int(n))
        print(f"{row.tokens_per_s:.3f} {row.roofline:.3f}", flush=True)


if __name__ == "__main__":
    main()
