"""What a decode step costs outside the kernels, and what guessing from the text (speculate) gives.

    python bench/step.py smollm2-135m-instruct --threads 1

Overhead: seconds of whole engine steps less the seconds inside the compiled program, over the whole; one answer, and
eight at once, greedy. Speculation: the same answers with and without, in turns, where the answer repeats the prompt
and where it does not; both must be the same tokens.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import quadriga
from quadriga.engine.request import SamplingParams
from quadriga.kernels.cpu import library as cpu

PASSAGE = (
    "def area(width, height):\n    return width * height\n\n\ndef volume(width, height, depth):\n"
    "    return area(width, height) * depth\n\n\nprint(area(3, 4))\nprint(volume(3, 4, 5))\n"
)
PROMPTS = {"repeats": PASSAGE * 3, "new text": "The history of the lighthouse begins in the year"}


def overhead(model: quadriga.LLM, n_answers: int, n_tokens: int) -> float:
    """Share of the decoding steps' time that is not in the kernels."""
    inside = [0.0]
    plain = cpu.Context.run

    def timed(self: cpu.Context, *args: object) -> None:
        started = time.perf_counter()
        plain(self, *args)  # type: ignore[arg-type]
        inside[0] += time.perf_counter() - started

    prompts = [f"{i} is a number that" for i in range(n_answers)]
    params = SamplingParams(max_new_tokens=n_tokens, temperature=0.0, ignore_eos=True)
    model.generate_many(prompts, params)
    cpu.Context.run = timed  # type: ignore[method-assign, assignment]
    try:
        started = time.perf_counter()
        model.generate_many(prompts, params)
        return 1 - inside[0] / (time.perf_counter() - started)
    finally:
        cpu.Context.run = plain  # type: ignore[method-assign]


def seconds(work: Callable[[], list[int]]) -> tuple[float, list[int]]:
    """(time, result)."""
    started = time.perf_counter()
    result = work()
    return time.perf_counter() - started, result


def main() -> None:
    """Measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--tokens", type=int, default=96)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    model = quadriga.load(args.model, threads=args.threads)
    for n in (1, 8):
        shares = [overhead(model, n, args.tokens) for _ in range(args.rounds)]
        print(
            f"{n} answers: {statistics.median(shares):.1%} outside the kernels ({min(shares):.1%} to {max(shares):.1%})"
        )
    for name, prompt in PROMPTS.items():
        ratios = []
        for _ in range(args.rounds):
            plain, guessed = (
                seconds(
                    lambda k=k, p=prompt: (
                        model.generate(  # type: ignore[misc]
                            p, SamplingParams(max_new_tokens=args.tokens, temperature=0.0, ignore_eos=True, speculate=k)
                        ).token_ids
                    )
                )
                for k in (0, 8)
            )
            assert list(plain[1]) == list(guessed[1]), "guessing changes nothing"
            ratios.append(plain[0] / guessed[0])
        median, low, high = statistics.median(ratios), min(ratios), max(ratios)
        print(f"speculate=8, {name}: {median:.2f} times as fast ({low:.2f} to {high:.2f})")


if __name__ == "__main__":
    main()
