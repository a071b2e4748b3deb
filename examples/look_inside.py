"""Which experts does each token of a text visit? A table per layer, for any MoE checkpoint.

python examples/look_inside.py MODEL "some text"
"""

from __future__ import annotations

import sys

import quadriga


def main(path: str, text: str) -> None:
    """Print the chosen experts of every token, layer by layer, and each layer's load."""
    model = quadriga.load(path)
    if not model.config.is_moe:
        raise SystemExit(f"{path} is a dense model: it has no experts to look into")
    ids = model.prompt_ids(text)
    names = [model.tokenizer.token_text(i) if model.tokenizer else str(i) for i in ids]
    for layer, stats in enumerate(model.routing(ids)):
        print(f"layer {layer}: tokens per expert {stats.load().tolist()}")
        for name, chosen, weights in zip(names, stats.expert_ids, stats.expert_weights, strict=True):
            experts = "  ".join(f"{e}: {w:.2f}" for e, w in zip(chosen.tolist(), weights.tolist(), strict=True))
            print(f"  {name!r:16} {experts}")


if __name__ == "__main__":
    if len(sys.argv) != 3:
        raise SystemExit(__doc__)
    main(sys.argv[1], sys.argv[2])
