"""What formats lose: perplexity on a text and mean KL divergence from a reference's predictions, variants side by side.

The text is cut as bench/perplexity.py cuts it. KL(reference || variant) is the mean over all positions, in nats; "same"
is the share of positions where both find the same token most probable.

    python bench/formats.py --text TEXT smollm2-135m-instruct smollm2-135m-instruct:q8 q4dir q4_k_m.gguf:float32
        the first is the reference, computed in plain torch float32; then PATH[:FORMAT[:ACTIVATIONS]]
"""

from __future__ import annotations

import argparse
import csv
import math
import sys
from pathlib import Path

import torch
from torch import Tensor

import quadriga
from quadriga.bench.speed import bytes_per_token
from quadriga.runners.compiled import CompiledModel


def log_probs(model: quadriga.LLM, windows: list[list[int]]) -> list[Tensor]:
    """Log-probabilities (T, V) of every window."""
    return [torch.from_numpy(model.logits(window)).log_softmax(-1) for window in windows]


def main() -> None:
    """Parse the command line, measure every variant, print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("reference")
    parser.add_argument("variants", nargs="+")
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--tokens", type=int, default=6144)
    parser.add_argument("--window", type=int, default=1024)
    args = parser.parse_args()
    reference = quadriga.load(args.reference, dtype="float32")
    assert reference.tokenizer is not None, "a text needs a tokenizer"
    ids = reference.tokenizer.encode(args.text.read_text())[: args.tokens]
    windows = [ids[start : start + args.window] for start in range(0, len(ids), args.window)]
    expected = log_probs(reference, windows)
    table = csv.writer(sys.stdout)
    table.writerow(("variant", "weight_mb", "perplexity", "mean_kl", "same_top"))
    for variant in [args.reference, *args.variants]:
        path, form, activations = (variant + "::").split(":")[:3]
        model, nbytes = reference, 0.0
        if variant != args.reference:
            model = quadriga.load(path, format=form or "keep", activations=activations or None)
            assert isinstance(model.runner, CompiledModel)
            nbytes = bytes_per_token(model.config, dict(model.runner.parameters))
        kl = loss = same = 0.0
        for window, theirs in zip(windows, expected, strict=True):
            ours = torch.from_numpy(model.logits(window)).log_softmax(-1)
            kl += float((theirs.exp() * (theirs - ours)).sum().double())
            same += float((theirs.argmax(-1) == ours.argmax(-1)).sum())
            loss -= float(ours[:-1].gather(1, torch.tensor(window[1:])[:, None]).double().sum())
        n, predicted = len(ids), len(ids) - len(windows)
        name = Path(path).name + variant[len(path) :]
        row = (name, f"{nbytes / 1e6:.1f}", f"{math.exp(loss / predicted):.4f}", f"{kl / n:.5f}", f"{same / n:.4f}")
        table.writerow(row)
        sys.stdout.flush()


if __name__ == "__main__":
    main()
