"""Plain torch against transformers: decode and prefill of SmolLM2, side by side in one alternating run.

Both sides load the same safetensors (the catalogue's GGUF, dequantised by `quadriga convert --to hf`), get the same
prompts and use the same number of threads. Greedy tokens are compared in the same run. Rounds alternate; medians,
spread and ratios are printed.

    pip install '.[bench]'
    python bench/decode_transformers.py --threads 2
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from itertools import count
from pathlib import Path

import torch
import transformers
from transformers import AutoModelForCausalLM

import quadriga
from quadriga.engine.request import SamplingParams
from quadriga.hub import catalogue
from quadriga.io.convert import convert

PROMPT = 32
"""Tokens read before the decoding that is timed."""


def ours(path: Path, dtype: str) -> tuple[Callable[[list[int], int], list[int]], Callable[[list[int]], None]]:
    """(greedy decoding, prefill) with our plain-torch model, through the engine."""
    llm, firsts = quadriga.load(path, dtype=dtype), count(1000)

    def decode(prompt: list[int], n: int) -> list[int]:
        params = SamplingParams(temperature=0.0, max_new_tokens=n, ignore_eos=True)
        return [event.token_id for event in llm.stream(prompt, params)]

    def prefill(prompt: list[int]) -> None:
        # Another first token each time: nothing of it is in the prefix cache.
        decode([next(firsts), *prompt[1:]], 1)

    return decode, prefill


def theirs(path: Path, dtype: str) -> tuple[Callable[[list[int], int], list[int]], Callable[[list[int]], None]]:
    """The same with transformers (SDPA attention, dynamic cache), its model called directly, without generate()."""
    model = AutoModelForCausalLM.from_pretrained(path, dtype=getattr(torch, dtype)).eval()

    @torch.inference_mode()
    def decode(prompt: list[int], n: int) -> list[int]:
        made: list[int] = []
        cache, step = None, prompt
        for _ in range(n):
            out = model(torch.tensor([step]), past_key_values=cache, use_cache=True, logits_to_keep=1)
            made.append(int(out.logits[0, -1].argmax()))
            cache, step = out.past_key_values, made[-1:]
        return made

    @torch.inference_mode()
    def prefill(prompt: list[int]) -> None:
        model(torch.tensor([prompt]), use_cache=True, logits_to_keep=1)

    return decode, prefill


def timed(work: Callable[[], object]) -> float:
    """Seconds ``work`` takes."""
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def main() -> None:
    """Parse the command line, run all rounds, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--tokens", type=int, default=64, help="decoded per round")
    parser.add_argument("--prefill", type=int, default=512)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    print(f"torch {torch.__version__}, transformers {transformers.__version__}, {args.threads} threads")
    print("| dtype | work | ours tok/s (min-max) | transformers tok/s (min-max) | ratio of medians |")
    print("|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / "hf"
        convert(catalogue.resolve("smollm2-135m-instruct"), path, to="hf")
        generator = torch.Generator().manual_seed(0)
        long = torch.randint(1000, 40_000, (args.prefill,), generator=generator).tolist()
        for dtype in ("float32", "bfloat16"):
            (a_decode, a_prefill), (b_decode, b_prefill) = ours(path, dtype), theirs(path, dtype)
            short = long[:PROMPT]
            same = a_decode(short, args.tokens) == b_decode(short, args.tokens)  # also the warm-up
            if dtype == "float32" and not same:
                raise SystemExit("the two sides do not decode the same tokens")
            a_prefill(long), b_prefill(long)
            rows: dict[str, tuple[list[float], list[float]]] = {"decode": ([], []), "prefill": ([], [])}
            for _ in range(args.rounds):
                for side, (decode, prefill) in enumerate(((a_decode, a_prefill), (b_decode, b_prefill))):
                    rows["decode"][side].append(args.tokens / timed(partial(decode, short, args.tokens)))
                    rows["prefill"][side].append(args.prefill / timed(partial(prefill, long)))
            for work, (a, b) in rows.items():
                cells = [f"{statistics.median(x):.1f} ({min(x):.1f}-{max(x):.1f})" for x in (a, b)]
                ratio = statistics.median(a) / statistics.median(b)
                print(f"| {dtype} | {work} | {cells[0]} | {cells[1]} | {ratio:.2f} |", flush=True)


if __name__ == "__main__":
    main()
