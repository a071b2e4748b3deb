"""What choosing a token costs, for one row of logits: the sampler alone, without a model.

    python bench/sampler.py
    python bench/sampler.py --vocabulary 49152 --rounds 200

The kernels' sampler on one thread, and NumPy's, in turns. Rows are normal numbers of a spread
like a model's, with a head of likely tokens ("peaked") or without ("flat", which no trained model gives: half of the
vocabulary may be in the nucleus). Medians of the rounds, in microseconds.
"""

from __future__ import annotations

import argparse
import statistics
import time

import numpy as np

from quadriga import runtime
from quadriga.engine.request import SamplingParams
from quadriga.engine.sampler import Sampler, log_sum_exp
from quadriga.kernels.cpu.library import Context
from quadriga.kernels.cpu.sampling import RowSampler

SETTINGS = {
    "greedy": SamplingParams(),
    "temperature 0.7": SamplingParams(temperature=0.7, seed=1),
    "and top_p 0.95": SamplingParams(temperature=0.7, top_p=0.95, seed=1),
    "and top_k 40": SamplingParams(temperature=0.7, top_k=40, seed=1),
    "and min_p 0.05": SamplingParams(temperature=0.7, min_p=0.05, seed=1),
    "and typical_p 0.9": SamplingParams(temperature=0.7, typical_p=0.9, seed=1),
    "top_p, repetition penalty, 5 logprobs": SamplingParams(
        temperature=0.7, top_p=0.95, repetition_penalty=1.1, logprobs=5, seed=1
    ),
}


def medians_us(kernels: RowSampler, params: SamplingParams, row: np.ndarray, rounds: int) -> tuple[float, float]:
    """Of one choice by the kernels and by NumPy, which is told the best token and log(sum(exp))."""
    one, other = (Sampler(params, [1, 2, 3], len(row)) for _ in range(2))
    best, log_sum, whole = int(row.argmax()), float(log_sum_exp(row)), row[None]
    times: tuple[list[float], list[float]] = [], []
    for _ in range(rounds + 5):
        started = time.perf_counter()
        one.take(kernels.sample(whole, [0], [one.ask()])[0], row)
        between = time.perf_counter()
        other.sample(row, best, log_sum)
        times[0].append(between - started)
        times[1].append(time.perf_counter() - between)
    compiled, numpy = (1e6 * statistics.median(each[5:]) for each in times)  # the first ones warm up
    return compiled, numpy


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
    kernels = Context(1)
    print(f"{runtime.cpu_name()}, {kernels.isa}, NumPy {np.__version__}, vocabulary {args.vocabulary:,}")
    print(f"{'':40}{'peaked':>10}{'NumPy':>10}{'flat':>10}{'NumPy':>10}")
    for name, params in SETTINGS.items():
        pairs = [medians_us(RowSampler(kernels), params, row, args.rounds) for row in (peaked, flat)]
        print(f"{name:40}" + "".join(f"{compiled:10.0f}{numpy:10.0f}" for compiled, numpy in pairs))


if __name__ == "__main__":
    main()
