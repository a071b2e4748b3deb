"""What a mixture gained over its base: loss by domain, where each domain's tokens go, how even the load is.

    python recipes/quadriga-smol/measure.py smollm2-135m-instruct quadriga-smol mix.val.domains.jsonl --svg routing.svg

Loss: nats a token over the first TOKENS tokens of each domain, in windows of 256, each read alone. Routing: shares of
(token, slot) pairs. Mutual information of domain and expert in bits, domains weighted equally, mean over layers; at
most log2 of the number of domains. Load: the busiest expert's share over the even one, mean and worst over layers.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path

import torch
from torch import Tensor

import quadriga
from quadriga.text.tokenizer import Tokenizer

WINDOW = 256


def texts(path: Path, tokenizer: Tokenizer, n_tokens: int) -> dict[str, list[int]]:
    """Domain -> token ids."""
    found: dict[str, list[int]] = {}
    with path.open(encoding="utf-8") as lines:
        for line in lines:
            row = json.loads(line)
            ids = found.setdefault(row["domain"], [])
            if len(ids) < n_tokens:
                ids += tokenizer.encode(row["text"])[: n_tokens - len(ids)]
    return found


def losses(model: quadriga.LLM, ids: list[int]) -> tuple[float, list[Tensor]]:
    """(mean loss, per layer the counts of (token, slot) pairs an expert got) of a text."""
    total, count, loads = 0.0, 0, None
    for start in range(0, len(ids) - 1, WINDOW):
        window = ids[start : start + WINDOW]
        if len(window) < 2:
            break
        logprobs = model.logits(window)[:-1].log_softmax(-1)
        total -= float(logprobs.gather(1, torch.tensor(window[1:])[:, None]).double().sum())
        count += len(window) - 1
        counts = [stats.load().double() for stats in model.routing(window)]
        loads = counts if loads is None else [a + b for a, b in zip(loads, counts, strict=True)]
    return total / count, loads or []


def mutual_information(joint: Tensor) -> float:
    """Bits, of a (domains, experts) table whose rows weigh the same."""
    p = joint / joint.sum(1, keepdim=True) / len(joint)
    independent = p.sum(1, keepdim=True) * p.sum(0, keepdim=True)
    return float((p * (p / independent).clamp(min=1e-30).log2()).sum())


def draw(tables: list[Tensor], domains: list[str], path: Path) -> None:
    """A picture: for every domain, layers downwards and experts across, darker where more of its tokens go."""
    import matplotlib as mpl

    mpl.use("svg")
    mpl.rcParams["svg.hashsalt"] = "quadriga"
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, len(domains), figsize=(2.4 * len(domains), 3.6), sharey=True)
    for i, (axis, domain) in enumerate(zip(axes, domains, strict=True)):
        axis.imshow(
            torch.stack([t[i] / t[i].sum() for t in tables]).numpy(), aspect="auto", cmap="Blues", vmin=0, vmax=0.25
        )
        axis.set_title(domain)
        axis.set_xlabel("expert")
    axes[0].set_ylabel("layer")
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})


def main() -> None:
    """Parse, measure, print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base")
    parser.add_argument("mixture")
    parser.add_argument("text", type=Path)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--svg", type=Path)
    args = parser.parse_args()
    base, mixture = quadriga.load(args.base), quadriga.load(args.mixture)
    assert base.tokenizer is not None, "a model with a vocabulary"
    by_domain = texts(args.text, base.tokenizer, args.tokens)
    domains, tables = sorted(by_domain), []
    for domain in domains:
        before, _ = losses(base, by_domain[domain])
        after, loads = losses(mixture, by_domain[domain])
        tables.append(loads)
        print(
            f"{domain}: {before:.4f} -> {after:.4f} nats a token ({math.exp(after - before) - 1:+.1%} perplexity), "
            f"{len(by_domain[domain])} tokens"
        )
    joint = [torch.stack([loads[layer] for loads in tables]) for layer in range(mixture.config.n_layers)]
    information = [mutual_information(table) for table in joint]
    even = [(t / t.sum(1, keepdim=True)).mean(0) for t in joint]
    busiest = [float(load.max() * len(load)) for load in even]
    print(
        f"domain and expert: {sum(information) / len(information):.2f} bits of {math.log2(len(domains)):.2f} "
        f"({min(information):.2f} to {max(information):.2f} by layer)\n"
        f"busiest expert: {sum(busiest) / len(busiest):.2f} times an even share, {max(busiest):.2f} in the worst layer"
    )
    if args.svg:
        draw(joint, domains, args.svg)


if __name__ == "__main__":
    main()
