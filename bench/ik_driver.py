"""Measures ik_llama.cpp through its own ctypes binding; run by a Python that has `ik-llama-cpp-python`.

Reads one measurement a line from standard input and prints tokens per second for each:

    decode N | prefill N | batch SEQUENCES N | depth POSITIONS N

    PYTHON_WITH_IK bench/ik_driver.py MODEL.gguf --threads 2
"""

from __future__ import annotations

import argparse
import ctypes
import sys
import time
from typing import Any

import ik_llama_cpp._ctypes_api as api  # type: ignore[import-not-found]

UBATCH = 512


class Driver:
    """One model and one context, repacked at load and in huge pages: its best settings for a CPU."""

    def __init__(self, path: str, threads: int, context: int, sequences: int, flash: bool) -> None:
        api.llama_backend_init()
        model = api.llama_model_default_params()
        model.use_mmap, model.repack_tensors, model.use_thp = False, True, True
        self.model = api.llama_model_load_from_file(path.encode(), model)
        params = api.llama_context_default_params()
        params.n_ctx, params.n_batch, params.n_ubatch, params.n_seq_max = context, 2048, UBATCH, sequences
        params.n_threads = params.n_threads_batch = threads
        params.flash_attn = flash
        self.context = api.llama_init_from_model(self.model, params)
        self.batch = api.llama_batch_init(2048, 0, 1)
        assert self.model and self.context, "the model loads"

    def decode(self, tokens: list[tuple[int, int, int]]) -> None:
        """One pass over (token, position, sequence)."""
        self.batch.n_tokens = len(tokens)
        for i, (token, position, sequence) in enumerate(tokens):
            self.batch.token[i], self.batch.pos[i] = token, position
            self.batch.n_seq_id[i], self.batch.seq_id[i][0] = 1, sequence
            self.batch.logits[i] = int(i == len(tokens) - 1 or tokens[i + 1][2] != sequence)
        code = api.llama_decode(self.context, self.batch)
        assert code == 0, f"llama_decode returned {code}"
        logits: Any = api.llama_get_logits_ith(self.context, len(tokens) - 1)
        assert ctypes.cast(logits, ctypes.c_void_p).value, "logits are there"

    def clear(self) -> None:
        """Forget everything."""
        api.llama_kv_cache_clear(self.context)

    def prefill(self, n: int, sequence: int = 0) -> float:
        """Tokens a second of a prompt of n tokens."""
        started = time.perf_counter()
        for start in range(0, n, 2048):
            stop = min(start + 2048, n)
            self.decode([(i * 7919 % 100000, i, sequence) for i in range(start, stop)])
        return n / (time.perf_counter() - started)

    def measure(self, kind: str, numbers: list[int]) -> float:
        """One line of standard input."""
        self.clear()
        if kind == "prefill":
            return self.prefill(numbers[0])
        if kind == "decode":
            sequences, start, n = 1, 8, numbers[0]
        elif kind == "batch":
            sequences, start, n = numbers[0], 8, numbers[1]
        else:
            sequences, start, n = 1, numbers[0], numbers[1]
        for sequence in range(sequences):
            self.prefill(start, sequence)
        self.decode([(s + 11, start, s) for s in range(sequences)])
        started = time.perf_counter()
        for step in range(1, n + 1):
            self.decode([((s * 31 + step * 7919) % 100000, start + step, s) for s in range(sequences)])
        return sequences * n / (time.perf_counter() - started)


def main() -> None:
    """Load, then answer line by line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--context", type=int, default=17408)
    parser.add_argument("--sequences", type=int, default=32)
    args = parser.parse_args()
    started = time.perf_counter()
    # Its flash attention on CPUs asserts when several sequences decode together.
    driver = Driver(args.model, args.threads, args.context, args.sequences, flash=args.sequences == 1)
    driver.measure("decode", [2])
    print(f"ready {time.perf_counter() - started:.2f}", flush=True)
    for line in sys.stdin:
        kind, *numbers = line.split()
        print(f"{driver.measure(kind, [int(n) for n in numbers]):.3f}", flush=True)


if __name__ == "__main__":
    main()
