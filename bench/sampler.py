"""What choosing a token costs, for one row of logits: the sampler alone, without a model.

    python bench/sampler.py
    python bench/sampler.py --vocabulary 49152 --rounds 200

Rows are normal numbers of a spread like a model's, with a head of likely tokens ("peaked") or without ("flat", which no
trained model gives: half of the vocabulary may be in the nucleus). Medians of the rounds, in milliseconds.
"""

from __future__ import annotations

import argparse
import statistics
import time

import numpy as np

from quadriga import runtime
from quadriga.engine.request import SamplingParams
from quadriga.engine.sampler import Sampler, log_sum_exp

SETTINGS = {
    "greedy": SamplingParams(),
    "temperature 0.7": SamplingParams(temperature=0.7, seed=1),
    "and top_p 0.95": SamplingParams(temperature=0.7, top_p=0.95, seed=1),
    "and top_k 40": SamplingParams(temperature=0.7, top_k=40, seed=1),
    "and min_p 0.05": SamplingParams(temperature=0.7, min_p=0.05, seed=1),
    "top_p, repetition penalty, 5 logprobs": SamplingParams(
        temperature=0.7, top_p=0.95, repetition_penalty=1.1, logprobs=5, seed=1
    ),
}


def median_ms(params: SamplingParams, row: np.ndarray, rounds: int) -> float:
    """Of one choice, with what the runner knows of the row already."""
    sampler = Sampler(params, [1, 2, 3], len(row))
    best, log_sum, times = int(row.argmax()), float(log_sum_exp(row)), []
    for _ in range(rounds + 5):
        started = time.perf_counter()
        sampler.sample(row, best, log_sum)
        times.append(time.perf_counter() - started)
    return 1e3 * statistics.median(times[5:])  # the first ones warm up


def main() -> None:
    """Measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vocabulary", type=int, default=100_352)
    parser.add_argument("--rounds", type=int, default=100)
    args = parser.parse_args()
    draw = np.random.default_rng(0)
    flat = (2.5 * draw.standard_normal(args.vocabulary)).astype(np.float32)
    peaked = flat.copy()
    peaked[:50] += 8
    print(f"{runtime.cpu_name()}, NumPy {np.__version__}, vocabulary {args.vocabulary:,}")
    print(f"{'':40}{'peaked':>10}{'flat':>10}")
    for name, params in SETTINGS.items():
        print(f"{name:40}" + "".join(f"{median_ms(params, row, args.rounds):10.3f}" for row in (peaked, flat)))


if __name__ == "__main__":
    main()
