"""The file that says what each expert of a model does, stored beside it; ``evaluate.expert_labels`` makes it.

my-model/expert-labels.json        a folder's
my-model.gguf.expert-labels.json   a single file's
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from quadriga import runtime
from quadriga.errors import CheckpointError, ConfigError
from quadriga.model.config import ModelConfig

FORMAT, VERSION = "quadriga-expert-labels", 1
NAME = "expert-labels.json"
PACKAGE = Path(__file__).resolve().parent.parent


def place_of(model: Path) -> Path:
    """Where the labels of a model lie; those of one that came with the package, in the cache."""
    if model.resolve().is_relative_to(PACKAGE):
        return runtime.cache_dir() / "labels" / f"{model.name}.{NAME}"
    return model / NAME if model.is_dir() else model.with_name(f"{model.name}.{NAME}")


def write(labels: dict[str, Any], path: Path) -> None:
    """Write labels, whole or not at all.

    Raises:
        ConfigError: nothing can be written there.
    """
    whole = {"format": FORMAT, "version": VERSION, **labels}
    part = path.with_name(f".{path.name}.part")
    try:
        if path.parent == runtime.cache_dir() / "labels":
            path.parent.mkdir(parents=True, exist_ok=True)
        part.write_text(json.dumps(whole, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
        part.replace(path)
    except OSError as error:
        part.unlink(missing_ok=True)
        raise ConfigError(
            f"cannot write labels to {path}: {error.strerror}. Give another place with --labels-file"
        ) from None


def read(path: Path, config: ModelConfig) -> dict[str, Any] | None:
    """The labels of a model; None where there are none.

    Raises:
        CheckpointError: the file is none of labels, or one of another model's.
    """
    labels: dict[str, Any]
    try:
        labels = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read as labels of experts: {error}") from None
    kind = (labels.get("format"), labels.get("version")) if isinstance(labels, dict) else None
    if kind != (FORMAT, VERSION):
        raise CheckpointError(
            f"{path} must be a file of {FORMAT} {VERSION}, got {kind}. Make it anew: quadriga experts label"
        )
    try:
        sizes = [(layer["layer"], len(layer["experts"])) for layer in labels["layers"]]
    except (KeyError, TypeError) as error:
        raise CheckpointError(f"{path} is damaged: {error!r}. Make it anew: quadriga experts label") from None
    wanted = [(index, spec.n_experts) for index, spec in config.moe_layers]
    if sizes != wanted:
        raise CheckpointError(
            f"{path} labels {sum(n for _, n in sizes)} experts in {len(sizes)} layers; this model has "
            f"{sum(n for _, n in wanted)} in {len(wanted)}. Make it anew: quadriga experts label"
        )
    return labels
