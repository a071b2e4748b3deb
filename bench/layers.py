"""Where the time of one layer goes: every op of it by itself, for a prompt and for answers side by side.

    python bench/layers.py qwen3.6-35b-a3b --prompt 512 --answers 1 8
    python bench/layers.py qwen3-30b-a3b --answers 1 8 --layers 2 --isa avx2

Random weights in one format, tokens that differ from round to round, so that experts come from memory and not from a
cache. Medians of the rounds, in microseconds, and what each op has of them; a prompt's rate is that of these layers
alone.
"""

from __future__ import annotations

import argparse
import ctypes
import statistics
import time
from dataclasses import replace

import numpy as np

from quadriga import runtime
from quadriga.bench.claim import random_packed
from quadriga.kernels.cpu import bindings
from quadriga.kernels.pass_batch import PassBatch
from quadriga.model import families
from quadriga.model.config import in_order
from quadriga.quant.packed import BLOCK_TOKENS
from quadriga.runners.compiled import CompiledModel

VOCABULARY = 1024


class Timed:
    """Runs the ops of a model one by one and keeps their times."""

    def __init__(self, model: CompiledModel) -> None:
        self._model, program = model, model.program
        self._run = program.context.run
        self._ops = program._ops
        self.names = [bindings.Op(kind).name for kind, _ in self._ops]
        self.rounds: list[list[float]] = []
        program.context.run = self._one_by_one  # type: ignore[method-assign]

    def _one_by_one(self, steps: object, batch: bindings.Batch) -> None:
        spent = []
        for kind, op in self._ops:
            step = (bindings.Step * 1)(bindings.Step(kind, ctypes.addressof(op)))
            started = time.perf_counter()
            self._run(step, batch)
            spent.append(1e6 * (time.perf_counter() - started))
        self.rounds.append(spent)

    def medians(self, batches: list[PassBatch]) -> dict[str, float]:
        """Microseconds of every op, those of one kind together."""
        self.rounds = []
        for batch in batches:
            self._model.forward(batch)
        total = dict.fromkeys(self.names, 0.0)
        for i, name in enumerate(self.names):
            total[name] += statistics.median(spent[i] for spent in self.rounds[2:])  # the first ones warm up
        return total


def batches(n_sequences: int, n_tokens: int, rounds: int, groups: int) -> list[PassBatch]:
    """Passes over sequences of n_tokens tokens each; nothing is before them."""
    draw, blocks = np.random.default_rng(0), -(-n_tokens // BLOCK_TOKENS)
    starts = np.arange(0, n_sequences * n_tokens + 1, n_tokens)
    made = []
    for _ in range(rounds + 2):
        lists = (
            draw.integers(0, VOCABULARY, n_sequences * n_tokens),
            np.tile(np.arange(n_tokens), n_sequences),
            starts,
            np.tile(np.arange(n_sequences * blocks), (groups, 1)),
            np.arange(0, n_sequences * blocks + 1, blocks),
            starts[1:] - 1,
            np.full(n_sequences, -1),
            np.arange(n_sequences),
        )
        made.append(PassBatch(*(np.ascontiguousarray(x, dtype=np.int32) for x in lists)))
    return made


def main() -> None:
    """Measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shape", choices=families.PRESETS)
    parser.add_argument("--format", default="q4")
    parser.add_argument("--layers", type=int, default=1, help="the first ones of the shape")
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--answers", type=int, nargs="*", default=[1, 8])
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--isa", default=None)
    args = parser.parse_args()
    whole = families.PRESETS[args.shape]
    config = replace(whole, layers=in_order(whole.layers[: args.layers]), vocab_size=VOCABULARY)
    most = max(args.prompt, *args.answers, 1)
    model = CompiledModel(
        config,
        random_packed(config, args.format),
        threads=args.threads,
        n_blocks=most,
        max_tokens=most,
        isa=args.isa,
        activations="int8",
    )
    timed = Timed(model)
    isa = model.program.context.isa
    print(f"{runtime.cpu_name()}, {isa}, {args.threads} threads, {args.shape}, {args.layers} layers")
    cases = [(f"a prompt of {args.prompt}", 1, args.prompt)] if args.prompt else []
    for name, n_sequences, n_tokens in [*cases, *((f"{n} answers", n, 1) for n in args.answers)]:
        spent = timed.medians(batches(n_sequences, n_tokens, args.rounds, model.program._n_groups))
        layers = sum(us for op, us in spent.items() if op not in ("EMBED", "HEAD"))
        print(f"{name}: {1e6 * n_sequences * n_tokens / layers:,.0f} tokens/s through the layers")
        for op, us in spent.items():
            print(f"  {op:12}{us:10.0f} us{100 * us / layers:7.1f} %")


if __name__ == "__main__":
    main()
