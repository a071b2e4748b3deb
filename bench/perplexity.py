"""Perplexity of a model on a text, with the cut spelled out.

The text's first TOKENS tokens (no bos, whole file as one string) are cut into windows of WINDOW tokens. Each window is
read alone, from position 0; every token of a window but its first is predicted from the ones before it. Perplexity is
exp of the mean negative log-likelihood over all predicted tokens.

    python bench/perplexity.py smollm2-135m-instruct --text wikitext2/test.txt
"""

from __future__ import annotations

import argparse
import math
import time
from pathlib import Path

import torch

import quadriga


def main() -> None:
    """Parse the command line, measure, print one line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="catalogue name or path")
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--tokens", type=int, default=6144)
    parser.add_argument("--window", type=int, default=1024)
    parser.add_argument("--dtype", help="plain torch in this dtype; default: the CPU's kernels")
    parser.add_argument("--format", help="what the kernels pack matrices as")
    parser.add_argument("--kv-format")
    args = parser.parse_args()
    model = quadriga.load(args.model, dtype=args.dtype, format=args.format, kv_format=args.kv_format)
    assert model.tokenizer is not None, "perplexity of a text needs a tokenizer"
    ids = model.tokenizer.encode(args.text.read_text())[: args.tokens]
    total, count, started = 0.0, 0, time.perf_counter()
    for start in range(0, len(ids), args.window):
        window = ids[start : start + args.window]
        logprobs = torch.from_numpy(model.logits(window))[:-1].log_softmax(-1)
        targets = torch.tensor(window[1:])[:, None]
        total -= float(logprobs.gather(1, targets).double().sum())
        count += len(window) - 1
    elapsed = time.perf_counter() - started
    how = args.dtype or f"{args.format}, cache {args.kv_format}"
    print(
        f"{args.model} {how}: perplexity {math.exp(total / count):.4f} over {count} predicted tokens of "
        f"{len(ids)} in windows of {args.window}; {len(ids) / elapsed:.0f} tokens/s"
    )


if __name__ == "__main__":
    main()
