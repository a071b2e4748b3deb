"""Export a training checkpoint as safetensors in the family's usual Hugging Face layout.

    runs/nano/checkpoints/step-N ─► weights (or their EMA) ─► the family's weight map in reverse ─► directory

The result is an ordinary checkpoint that `quadriga chat`, `quadriga convert` and transformers can open.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from quadriga.errors import CheckpointError, ConfigError
from quadriga.io.parameters import to_stored
from quadriga.kernels.arrays import array, tensor
from quadriga.model import families
from quadriga.model.config import ModelConfig
from quadriga.model.config_json import config_from_json
from quadriga.model.weight_map import check_cover, parameter_shapes, source_index, source_shapes, whole
from quadriga.train.architecture import stores_bias
from quadriga.train.run_directory import RunDirectory, chosen
from quadriga.train.schedule import bias_share
from quadriga.train.shards import ShardReader

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def export(
    run: Path, out: Path, *, step: int | None = None, dtype: str = "float32", tokenizer_files: Mapping[str, bytes]
) -> int:
    """Write a run's checkpoint as a Hugging Face directory; the EMA of the weights if the run keeps one.

    Args:
        run: the run's folder.
        out: the directory to create; must not exist.
        step: which checkpoint; None: the newest complete one.
        dtype: of the written weights.
        tokenizer_files: name -> bytes, written beside the weights.

    Returns:
        the checkpoint's step.

    Raises:
        CheckpointError: no such checkpoint, damaged files, or ``out`` exists.
        ConfigError: unknown dtype, a router bias that has not faded, or a model the family's format cannot express.
    """
    if dtype not in DTYPES:
        raise ConfigError(f"dtype must be one of {', '.join(DTYPES)}; got {dtype!r}")
    if out.exists():
        raise CheckpointError(f"{out} must not exist: give another name, or remove it first")
    found = chosen(RunDirectory(run), step)
    if found is None:
        raise CheckpointError(f"{run} has no checkpoint")
    folder, manifest = found
    config = config_from_json(manifest.state["model"])
    reader = ShardReader([folder / name for name in manifest.files])
    balancing = _balancing(reader, config, manifest.state, folder)
    whole_of = trained(reader)
    parameters = {
        # A router's correction keeps its float32.
        name: whole_of(name) if name.endswith("router.correction") else whole_of(name).to(DTYPES[dtype])
        for name in parameter_shapes(config)
    }
    for name, bias in balancing.items():
        parameters[name] = parameters[name] + bias
    write_hf(parameters, config, out, tokenizer_files)
    return int(folder.name.removeprefix("step-"))


def trained(reader: ShardReader) -> Callable[[str], Tensor]:
    """Name of a parameter -> what a checkpoint has of it: its average where it is averaged, else the parameter.

    A router's correction is trained by no gradient, so it has no average.
    """
    averaged = {name for name in reader.names() if name.startswith("ema/")}
    return lambda name: reader.whole(f"ema/{name}" if f"ema/{name}" in averaged else f"parameter/{name}")


def _balancing(reader: ShardReader, config: ModelConfig, state: Mapping[str, Any], folder: Path) -> dict[str, Tensor]:
    """Name of a router's stored correction -> what loss-free balancing adds to it; empty where the bias is 0.

    Raises:
        ConfigError: the bias is not 0, and the model's family stores none.
    """
    if "router_bias" not in reader.names():
        return {}
    settings = state.get("settings", {})
    n_steps, fade = settings.get("n_steps", 0), settings.get("router.bias_fade", 0.0)
    bias = reader.whole("router_bias") * bias_share(int(folder.name.removeprefix("step-")), n_steps, fade)
    if not bias.any():
        return {}
    if not stores_bias(config):
        raise ConfigError(
            f"{folder} chooses experts with a bias (router.bias_rate), which this family's checkpoints cannot store. "
            "Export the run's last checkpoint, with router.bias_fade above 0: the bias is 0 there."
        )
    names = [f"layers.{layer}.moe.router.correction" for layer, _ in config.moe_layers]
    return dict(zip(names, bias, strict=True))


def write_hf(
    parameters: Mapping[str, Tensor], config: ModelConfig, out: Path, extra: Mapping[str, bytes] | None = None
) -> None:
    """Write a model as a Hugging Face directory in its family's usual layout: complete or not at all."""
    family = families.family_of(config)
    build = next(iter(family.layouts.values()))
    pieces = build(config)
    check_cover(pieces, parameter_shapes(config), source_shapes(pieces))
    dtype = next(iter(parameters.values())).dtype
    dtypes = {piece.source: parameters[piece.target].dtype for piece in pieces}  # a router's correction has its own
    tensors = {name: torch.empty(shape, dtype=dtypes[name]) for name, shape in source_shapes(pieces).items()}
    for piece in pieces:
        target = piece.target_box or whole(piece.target_shape)
        values = parameters[piece.target][tuple(slice(*span) for span in target)]
        tensors[piece.source][source_index(piece)] = tensor(to_stored(array(values), piece))
    work = out.with_name(out.name + ".part")
    work.mkdir(parents=True, exist_ok=True)
    raw = {**family.config_to_hf(config), "torch_dtype": str(dtype).removeprefix("torch.")}
    (work / "config.json").write_text(json.dumps(raw, indent=2) + "\n")
    for name, content in (extra or {}).items():
        (work / name).write_bytes(content)
    save_file(tensors, work / "model.safetensors", metadata={"format": "pt"})
    work.replace(out)
