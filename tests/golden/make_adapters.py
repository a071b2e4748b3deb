"""Make the golden adapters: what peft saves for each option, and what transformers then computes.

    python -m venv env && env/bin/pip install torch==2.13.0 transformers==4.57.6 peft==0.21.2
    env/bin/python tests/golden/make_adapters.py

Writes adapters.json (each case's adapter_config.json as peft wrote it, names and shapes of its tensors) and
adapters.safetensors (logits of the last positions) beside this file. The tensors' numbers are drawn, as the models' are.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from safetensors import safe_open
from safetensors.torch import save_file

sys.path.insert(0, str(Path(__file__).parent.parent.parent))
from tests.golden.make_golden import build
from tests.golden.weights import ADAPTER_ROWS, MODELS, TOKENS, drawn_adapter

HERE = Path(__file__).parent
_QV = ["q_proj", "v_proj"]
_FFN = ["gate_proj", "up_proj", "down_proj"]
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "plain": ("llama", {"target_modules": _QV}),
    "all-linear": ("llama", {"target_modules": "all-linear"}),
    "pattern-targets": ("llama", {"target_modules": r"model\.layers\.[\d]+\.(self_attn|mlp)\.(q|k|down)_proj"}),
    "excluded": ("llama", {"target_modules": _QV, "exclude_modules": ["layers.2.self_attn.v_proj"]}),
    "excluded-pattern": ("llama", {"target_modules": _QV, "exclude_modules": r".*\.[12]\.self_attn\.v_proj"}),
    "some-layers": ("llama", {"target_modules": _QV, "layers_to_transform": [1, 3], "layers_pattern": "layers"}),
    "one-layer": ("llama", {"target_modules": [*_QV, "model.layers.0.mlp.up_proj"], "layers_to_transform": 2}),
    "rslora": ("llama", {"target_modules": [*_QV, *_FFN], "use_rslora": True}),
    "rank-pattern": ("llama", {"target_modules": _QV, "rank_pattern": {"layers.0.self_attn.q_proj": 2, "v_proj": 5}}),
    "alpha-pattern": (
        "llama",
        {"target_modules": _QV, "alpha_pattern": {r".*[13]\.self_attn\.q_proj": 2, "v_proj": 0.5, "q_proj": 40}},
    ),
    "both-patterns-rslora": (
        "llama",
        {
            "target_modules": _QV,
            "use_rslora": True,
            "rank_pattern": {"^model.layers.1.self_attn.q_proj": 6},
            "alpha_pattern": {"self_attn.(q_proj|k_proj)": 3},
        },
    ),
    "dora": ("llama", {"target_modules": [*_QV, "o_proj", *_FFN], "use_dora": True}),
    "dora-rslora-head": ("llama", {"target_modules": ["k_proj", "lm_head"], "use_dora": True, "use_rslora": True}),
    "saved-head": ("llama", {"target_modules": _QV, "modules_to_save": ["lm_head"]}),
    "saved-norms-and-table": (
        "llama",
        {"target_modules": ["o_proj"], "modules_to_save": ["input_layernorm", "model.norm", "embed_tokens"]},
    ),
    "saved-projection": ("llama", {"target_modules": ["q_proj"], "modules_to_save": ["layers.1.self_attn.k_proj"]}),
    "table": ("llama", {"target_modules": ["q_proj", "embed_tokens"]}),
    "table-and-head": ("llama", {"target_modules": ["embed_tokens", "lm_head"]}),
    "tokens": ("llama", {"target_modules": _QV, "trainable_token_indices": [5, 96, 7]}),
    "tokens-of-both": (
        "llama",
        {"target_modules": _QV, "trainable_token_indices": {"embed_tokens": [3, 41], "lm_head": [0, 96, 2]}},
    ),
    "tokens-tied": ("llama-tied", {"target_modules": _QV, "trainable_token_indices": [5, 96, 7]}),
    "table-tied": ("llama-tied", {"target_modules": ["embed_tokens"], "ensure_weight_tying": True}),
    "gaussian": ("llama", {"target_modules": _QV, "init_lora_weights": "gaussian"}),
    "orthogonal": ("llama", {"r": 4, "target_modules": _QV, "init_lora_weights": "orthogonal"}),
    "mica": ("llama", {"target_modules": _QV, "init_lora_weights": "mica"}),
    "not-initialised": ("llama", {"target_modules": _QV, "init_lora_weights": False}),
    "experts": ("mixtral", {"target_modules": ["w1", "w2", "w3", "gate"], "layers_to_transform": [0, 2]}),
    "experts-dora": ("mixtral", {"target_modules": ["w1", "w2", "v_proj"], "use_dora": True}),
}


def saved(model: Any, folder: Path) -> tuple[dict[str, Any], dict[str, list[int]]]:
    """What peft writes: the configuration, and names and shapes of the tensors."""
    model.save_pretrained(folder, safe_serialization=True)
    config = json.loads((folder / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = "golden"
    with safe_open(str(folder / "adapter_model.safetensors"), "pt") as file:
        shapes = {name: list(file.get_slice(name).get_shape()) for name in sorted(file.keys())}
    return config, shapes


def main() -> None:
    """Make both files."""
    cases: dict[str, Any] = {}
    logits: dict[str, torch.Tensor] = {}
    for name, (base, options) in CASES.items():
        lora = peft.LoraConfig(**({"r": 3, "lora_alpha": 10, "lora_dropout": 0.05, "task_type": "CAUSAL_LM"} | options))
        model = peft.get_peft_model(build(MODELS[base]), lora)
        with tempfile.TemporaryDirectory() as folder:
            config, shapes = saved(model, Path(folder))
            tensors = drawn_adapter(shapes, tied=base.endswith("tied"))
            save_file({k: torch.from_numpy(v) for k, v in tensors.items()}, Path(folder) / "adapter_model.safetensors")
            loaded = peft.PeftModel.from_pretrained(build(MODELS[base]), folder).eval()
        with torch.no_grad():
            plain = build(MODELS[base])(torch.tensor([TOKENS])).logits[0, -ADAPTER_ROWS:]
            logits[name] = loaded(torch.tensor([TOKENS])).logits[0, -ADAPTER_ROWS:].contiguous()
        print(name, f"differs from the base by {float((logits[name] - plain).abs().max()):.2f}")
        cases[name] = {"base": base, "config": config, "tensors": shapes}
    save_file(logits, HERE / "adapters.safetensors")
    facts = {
        "made_with": f"peft {peft.__version__}, transformers {transformers.__version__}, torch {torch.__version__}"
    }
    (HERE / "adapters.json").write_text(json.dumps(facts | {"cases": cases}, indent=0, sort_keys=True) + "\n")


if __name__ == "__main__":
    main()
