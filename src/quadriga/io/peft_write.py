"""An adapter of ours as files that peft reads."""

from __future__ import annotations

import json
from pathlib import Path

from quadriga.io import peft_config
from quadriga.io.adapter_extras import Floats
from quadriga.io.adapter_files import Adapter, low_rank, write_tensors
from quadriga.io.directory import write_text
from quadriga.io.peft_factors import PREFIX, by_source, fused_to_peft, stored_factors, widened
from quadriga.model.config import ModelConfig


def to_peft(adapter: Adapter, config: ModelConfig, folder: Path, *, layout: str | None = None) -> None:
    """Write peft's form for the model in one of its Hugging Face layouts.

    Args:
        layout: one of the family's; None: the one exports use. ``hf5`` of Mixtral writes fused expert stacks.

    Raises:
        ConfigError: no such layout, or one whose experts peft has no form for; an adapter with more than factors.
        CheckpointError: the folder exists with something in it, or cannot be written.
    """
    stored = by_source(config, layout)
    pairs = {
        source: stored_factors(adapter, source, pieces)
        for source, pieces in stored.items()
        if any(piece.target in low_rank(adapter) for piece in pieces)
    }
    rank = max(a.shape[-2] for a, _ in pairs.values())
    stacks = [source for source, (a, _) in pairs.items() if a.ndim == 3]
    stacks.sort(key=lambda name: name.endswith("down_proj"))  # the first parameter of a module is the innermost
    tensors: dict[str, Floats] = {}
    modules: set[str] = set()
    for source, (a, b) in pairs.items():
        a, b = widened(a, -2, rank), widened(b, -1, rank)
        name = source.removesuffix(".weight")
        if a.ndim == 3:
            owner = source.rpartition(".")[0]
            beside = [one for one in stacks if one.rpartition(".")[0] == owner]
            name = ".".join([owner, *["base_layer"] * (len(beside) - 1 - beside.index(source))])
            a, b = fused_to_peft(a, b)
        elif stored[source][0].target == "embed.weight":
            modules.add(name.rpartition(".")[2])
            tensors[f"{PREFIX}{name}.lora_embedding_A"] = b.T
            tensors[f"{PREFIX}{name}.lora_embedding_B"] = a.T
            if not config.tied_embeddings:
                continue
            # peft adapts the two uses of a tied table apart: the same factors go to both.
            name = peft_config.HEAD
        if source not in stacks:
            modules.add(name.rpartition(".")[2])
        tensors[f"{PREFIX}{name}.lora_A.weight"], tensors[f"{PREFIX}{name}.lora_B.weight"] = a, b
    write_tensors(tensors, folder, peft_config.WEIGHTS)
    parameters = list(dict.fromkeys(".".join(source.split(".")[-3:]) for source in pairs if source in stacks))
    body = _configuration(adapter, rank, sorted(modules), parameters)
    write_text(folder / peft_config.FILE, json.dumps(body, indent=1) + "\n")


def _configuration(adapter: Adapter, rank: int, modules: list[str], parameters: list[str]) -> dict[str, object]:
    return {
        "peft_type": "LORA",
        "peft_version": "0.19.0",  # whose form of fused stacks this is
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": adapter.base,
        "r": rank,
        "lora_alpha": adapter.spec.scale * rank,
        "lora_dropout": 0.0 if parameters else adapter.spec.dropout,
        "target_modules": modules,
        "target_parameters": parameters or None,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
    }
