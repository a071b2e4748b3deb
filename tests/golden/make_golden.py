"""Make the golden files with transformers 4.57.6, the last version whose DBRX is right.

    python -m venv env && env/bin/pip install torch==2.13.0 transformers==4.57.6
    env/bin/python tests/golden/make_golden.py

Writes results/MODEL.safetensors (logits, router probabilities) and golden.json (losses, versions) beside this file.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import torch
import transformers
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM

sys.path.insert(0, str(Path(__file__).parent.parent.parent))
from tests.golden.weights import MODELS, PREFILL, TOKENS, WITH_PROBABILITIES, draw, ragged

HERE = Path(__file__).parent
FORGETFUL = ("granitehybrid", "granitehybrid-dense")
"""Models whose cached steps in transformers 4.57.6 are not the rows of its own uncached pass (1.4e-3 of the range)."""


def build(config: dict[str, object]) -> torch.nn.Module:
    """The model with drawn weights, eager attention, float32."""
    options = {key: value for key, value in config.items() if key != "model_type"}
    cls = AutoConfig.for_model(str(config["model_type"]), **options)
    cls._attn_implementation = "eager"
    model = AutoModelForCausalLM.from_config(cls, torch_dtype=torch.float32).eval()
    tied = {"lm_head.weight"} if cls.tie_word_embeddings else set()
    state = {
        name: torch.from_numpy(draw(name, tuple(t.shape))) for name, t in model.state_dict().items() if name not in tied
    }
    missing = model.load_state_dict(state, strict=False)
    assert set(missing.missing_keys) <= tied, missing
    model.tie_weights()
    return model


def decoded(model: torch.nn.Module, ids: torch.Tensor) -> torch.Tensor:
    """Logits of single steps behind a prefill, with a cache."""
    cache = model(ids[:, :PREFILL], use_cache=True).past_key_values
    steps = []
    for i in range(PREFILL, len(TOKENS)):
        step = model(ids[:, i : i + 1], past_key_values=cache, use_cache=True)
        steps.append(step.logits[0])
        cache = step.past_key_values
    return torch.cat(steps)


def by_prefixes(model: torch.nn.Module, ids: torch.Tensor) -> torch.Tensor:
    """The same without a cache: what a step should give is the last row of all tokens up to it."""
    return torch.cat([model(ids[:, : i + 1], use_cache=False).logits[0, -1:] for i in range(PREFILL, len(TOKENS))])


@torch.no_grad()
def run(name: str, config: dict[str, object]) -> tuple[dict[str, torch.Tensor], dict[str, object]]:
    """Logits of the prefill, of the cached decoding and of the padded batch; router outputs of the MoE models."""
    model = build(config)
    moe = name in WITH_PROBABILITIES
    ids = torch.tensor([TOKENS])
    out = model(ids, use_cache=False, **({"output_router_logits": True} if moe else {}))
    tensors = {f"{name}.prefill": out.logits[0]}
    facts: dict[str, object] = {"logit_range": float(out.logits.max() - out.logits.min())}

    tensors[f"{name}.decode"] = by_prefixes(model, ids) if name in FORGETFUL else decoded(model, ids)

    sequences = ragged()
    longest = max(map(len, sequences))
    batch = torch.zeros((len(sequences), longest), dtype=torch.long)
    mask = torch.zeros_like(batch)
    for row, sequence in enumerate(sequences):  # padding on the right
        batch[row, : len(sequence)] = torch.tensor(sequence)
        mask[row, : len(sequence)] = 1
    options = {"attention_mask": mask, "use_cache": False}
    padded = model(batch, **options, **({"output_router_logits": True} if moe else {}))
    tensors[f"{name}.ragged"] = torch.cat([padded.logits[row, : len(s)] for row, s in enumerate(sequences)])
    if moe:
        # DBRX hands back probabilities, the others logits; stored as probabilities, layer by layer.
        raw = torch.stack([layer.float() for layer in out.router_logits])
        tensors[f"{name}.router_probs"] = raw if name == "dbrx" else raw.softmax(-1)
        facts["aux_loss"] = float(out.aux_loss)
        facts["aux_loss_ragged"] = float(padded.aux_loss)
    return {key: value.contiguous() for key, value in tensors.items()}, facts


@torch.no_grad()
def clipped_share(name: str) -> float:
    """How much of q, k and v the clamp changes: it must be a good part, or the tests would not see it."""
    model = build(MODELS[name])
    seen: list[torch.Tensor] = []
    for module_name, module in model.named_modules():
        if module_name.endswith("Wqkv"):
            module.register_forward_hook(lambda _module, _inputs, out: seen.append(out))
    model(torch.tensor([TOKENS]), use_cache=False)
    clip = MODELS[name]["attn_config"]["clip_qkv"]  # type: ignore[index]
    return float((torch.stack(seen).abs() > clip).float().mean())


def main() -> None:
    """Make all files."""
    facts: dict[str, object] = {
        "made_with": f"transformers {transformers.__version__}, torch {torch.__version__}",
        "command": "python tests/golden/make_golden.py",
        "numpy": np.__version__,
        "drawn": draw("pinned", (3,)).tolist(),
        "clipped_share": {name: clipped_share(name) for name in ("dbrx", "mpt-clipped")},
    }
    for name, config in MODELS.items():
        tensors, facts[name] = run(name, config)
        save_file(tensors, HERE / "results" / f"{name}.safetensors")
    (HERE / "golden.json").write_text(json.dumps(facts, indent=1) + "\n")
    print(json.dumps(facts, indent=1))


if __name__ == "__main__":
    main()
