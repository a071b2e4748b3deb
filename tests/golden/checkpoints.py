"""The golden models as checkpoints on disk, and the results stored for them."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from quadriga.model import families
from quadriga.model.weight_map import source_shapes
from tests.golden.weights import BESIDE_TRANSFORMERS, MODELS, TOKENS, draw
from tests.oracles import numpy_models

_HERE = Path(__file__).parent
FACTS: dict[str, Any] = json.loads((_HERE / "golden.json").read_text())
NAMES = [*MODELS, *BESIDE_TRANSFORMERS]
_LAYOUTS = {"qwen3_vl": "vl", "qwen3_vl_moe": "vl"}
"""Of models that are not in the first layout of their family."""


@cache
def results() -> dict[str, Tensor]:
    """What transformers computed: "{model}.prefill", ".decode" (single steps), ".ragged", ".router_probs"."""
    files = sorted((_HERE / "results").glob("*.safetensors"))
    return {name: values for file in files for name, values in load_file(file).items()}


def config_json(name: str) -> dict[str, Any]:
    """A model's config.json with nothing left to transformers' defaults."""
    raw: dict[str, Any] = dict((MODELS | BESIDE_TRANSFORMERS)[name])
    if raw["model_type"] == "mpt":
        attn = {"attn_type": "multihead_attention", "softmax_scale": None}
        return {**raw, "attn_config": {**raw["attn_config"], **attn}}
    if raw["model_type"] == "llama":
        return {"attention_bias": False, **raw}
    return raw


def weights(name: str) -> dict[str, np.ndarray[Any, Any]]:
    """A model's float32 weights under their Hugging Face names."""
    config = families.config_from_hf(config_json(name))
    layouts = families.family_of(config).layouts
    layout = layouts[_LAYOUTS.get(name) or next(iter(layouts))](config)
    return {tensor: draw(tensor, shape) for tensor, shape in source_shapes(layout).items()}


@cache
def oracle(name: str) -> Tensor:
    """The NumPy statement's logits (T, V), float64."""
    w, raw = {k: v.astype(np.float64) for k, v in weights(name).items()}, config_json(name)
    if name != "grok1":
        return torch.from_numpy(numpy_models.ORACLES[raw["model_type"]](w, raw, TOKENS))
    sizes = {
        "d_model": raw["hidden_size"],
        "n_layers": raw["num_hidden_layers"],
        "n_heads": raw["num_attention_heads"],
        "n_kv_heads": raw["num_key_value_heads"],
        "top_k": raw["num_experts_per_tok"],
    }
    return torch.from_numpy(numpy_models.grok1(w, sizes, TOKENS))


def write(name: str, folder: Path) -> None:
    """A Hugging Face directory: config.json and one safetensors file."""
    (folder / "config.json").write_text(json.dumps(config_json(name)))
    save_file({k: torch.from_numpy(v) for k, v in weights(name).items()}, folder / "model.safetensors")
