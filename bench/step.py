"""What a decode step costs outside the kernels, and what guessing from the text (speculate) gives.

    python bench/step.py smollm2-135m-instruct --threads 1

Overhead: seconds of whole engine steps less the seconds inside the compiled program, over the whole, and the part of
it in which the kernels choose tokens; one answer, eight and 32 at once, greedy and with the chat page's settings. Of
the latter also the speed beside greedy's, in turns. Speculation: the same answers with and without, in turns, where the
answer repeats the prompt and where it does not; both must be the same tokens.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import quadriga
from quadriga.engine.request import SamplingParams
from quadriga.kernels.cpu import library as cpu

PASSAGE = (
    "def area(width, height):\n    return width * height\n\n\ndef volume(width, height, depth):\n"
    "    return area(width, height) * depth\n\n\nprint(area(3, 4))\nprint(volume(3, 4, 5))\n"
)
GREEDY = {"temperature": 0.0}
CHAT = {"temperature": 0.7, "top_p": 0.95, "seed": 1}
PROMPTS = {"repeats": PASSAGE * 3, "new text": "The history of the lighthouse begins in the year"}


@dataclass
class Measured:
    """Seconds of some steps: all of it, in the program, in the choice of tokens."""

    whole: float = 0.0
    program: float = 0.0
    choice: float = 0.0


def measure(model: quadriga.LLM, n_answers: int, n_tokens: int, how: dict[str, float]) -> Measured:
    """The steps of some answers."""
    spent = Measured()
    plain = cpu.Context.call

    def timed(self: cpu.Context, function: cpu.Function, *args: object) -> None:
        started = time.perf_counter()
        plain(self, function, *args)
        taken = time.perf_counter() - started
        if function is self.lib.qd_run:
            spent.program += taken
        else:
            spent.choice += taken

    prompts = [f"{i} is a number that" for i in range(n_answers)]
    params = SamplingParams(max_new_tokens=n_tokens, ignore_eos=True, **how)  # type: ignore[arg-type]
    cpu.Context.call = timed  # type: ignore[method-assign]
    try:
        started = time.perf_counter()
        model.generate_many(prompts, params)
        spent.whole = time.perf_counter() - started
        return spent
    finally:
        cpu.Context.call = plain  # type: ignore[method-assign]


def report(model: quadriga.LLM, n: int, n_tokens: int, rounds: int) -> None:
    """Measure and print some answers at once, greedy and as in a chat, in turns."""
    measure(model, n, n_tokens, GREEDY)
    greedy, chat = [], []
    for _ in range(rounds):
        greedy.append(measure(model, n, n_tokens, GREEDY))
        chat.append(measure(model, n, n_tokens, CHAT))
    for name, runs in (("greedy", greedy), ("temperature 0.7, top_p 0.95", chat)):
        outside = [1 - run.program / run.whole for run in runs]
        choice = statistics.median(run.choice / run.whole for run in runs)
        print(
            f"{n} answers, {name}: {statistics.median(outside):.1%} outside the program ({min(outside):.1%} to "
            f"{max(outside):.1%}), {choice:.1%} of all is choosing tokens"
        )
    speeds = [a.whole / b.whole for a, b in zip(greedy, chat, strict=True)]
    print(
        f"{n} answers: as in a chat {statistics.median(speeds):.2f} of greedy ({min(speeds):.2f} to {max(speeds):.2f})"
    )


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
    for n in (1, 8, 32):
        report(model, n, args.tokens, args.rounds)
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
