"""Adapters in memory, and as files of our own form (``io/adapter.py`` draws it)."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import msgspec
import numpy as np

from quadriga.errors import CheckpointError, ConfigError
from quadriga.io.adapter_extras import Extras, Floats
from quadriga.io.directory import write_text
from quadriga.io.json_files import read_json
from quadriga.io.safetensors import SafetensorsSource
from quadriga.model.adapter_spec import LoraSpec, adapted_shapes
from quadriga.model.config import ModelConfig
from quadriga.model.weight_map import parameter_shapes
from quadriga.quant.dtypes import as_float32

Factors = dict[str, tuple[Floats, Floats]]
"""Parameter -> (A, B), float32: ([E,] r, in) and ([E,] out, r)."""

MANIFEST = "quadriga_adapter.json"
WEIGHTS = "adapter.safetensors"
_VERSION = 1


@dataclass(frozen=True, kw_only=True)
class Adapter:
    """A low-rank adapter with its numbers."""

    spec: LoraSpec
    factors: Factors
    base: str = ""
    """The model it was trained on, for people."""
    extras: Extras | None = None
    """What it has beyond factors; see :func:`low_rank`."""


def low_rank(adapter: Adapter) -> Factors:
    """The factors of an adapter that has nothing else.

    Raises:
        ConfigError: it has more, which would be left out.
    """
    if adapter.extras is not None:
        raise ConfigError(
            f"this adapter has more than low-rank factors ({', '.join(adapter.extras.reasons())}): it can only be "
            "folded into its model. Write the result with `quadriga adapter merge` and use that."
        )
    return adapter.factors


def save(adapter: Adapter, folder: Path) -> None:
    """Write our form; the manifest comes last, so a folder that has one is complete.

    Raises:
        CheckpointError: the folder exists with something in it, or cannot be written.
        ConfigError: an adapter with more than factors.
    """
    tensors = {f"{name}.{part}": t for name, ab in low_rank(adapter).items() for part, t in zip("ab", ab, strict=True)}
    digest = write_tensors(tensors, folder, WEIGHTS)
    body = {"quadriga_adapter": _VERSION, "base": adapter.base, "lora": asdict(adapter.spec), "sha256": digest}
    write_text(folder / MANIFEST, json.dumps(body, indent=1) + "\n")


def load_own(folder: Path, config: ModelConfig) -> Adapter:
    body = read_json(folder / MANIFEST)
    if body.get("quadriga_adapter") != _VERSION:
        raise CheckpointError(
            f"{MANIFEST} must have version {_VERSION}, got {body.get('quadriga_adapter')!r}: another release wrote it"
        )
    try:
        spec = msgspec.convert(body.get("lora"), LoraSpec)
    except msgspec.ValidationError as error:
        raise CheckpointError(f"{MANIFEST} is malformed: {error}") from None
    tensors = read_tensors(folder / WEIGHTS)
    if _sha256(folder / WEIGHTS) != body.get("sha256"):
        raise CheckpointError(f"{folder / WEIGHTS} is not what {MANIFEST} describes: it changed since it was written")
    names = sorted({name.rpartition(".")[0] for name in tensors})
    try:
        factors = {name: (tensors[f"{name}.a"], tensors[f"{name}.b"]) for name in names}
    except KeyError as error:
        raise CheckpointError(f"{folder / WEIGHTS} lacks {error}") from None
    check(factors, spec, config, folder)
    return Adapter(spec=spec, factors=in_order(factors, config), base=str(body.get("base", "")))


def in_order(factors: Factors, config: ModelConfig) -> Factors:
    return {name: factors[name] for name in parameter_shapes(config) if name in factors}


def check(factors: Factors, spec: LoraSpec, config: ModelConfig, folder: Path) -> None:
    """Every factor fits its parameter, and all parameters of the targets have some."""
    shapes = parameter_shapes(config)
    wrong = []
    for name, (a, b) in factors.items():
        shape = shapes.get(name, ())
        fits = len(shape) > 1 and a.shape[:-2] == shape[:-2] == b.shape[:-2]
        if not fits or a.shape[-1] != shape[-1] or b.shape[-2] != shape[-2] or a.shape[-2] != b.shape[-1]:
            wrong.append(f"{name}: A {list(a.shape)}, B {list(b.shape)} for {list(shape)}")
    missing = sorted(set(adapted_shapes(config, spec)) - factors.keys())
    if wrong or missing:
        raise CheckpointError(
            f"{folder} does not fit this model: {len(wrong)} factors of other shapes {wrong[:3]}, {len(missing)} "
            f"missing {missing[:3]}. Give the model it was trained on."
        )


def write_tensors(tensors: Mapping[str, Floats], folder: Path, file: str) -> str:
    from safetensors.numpy import save_file

    if folder.exists() and any(folder.iterdir()):
        raise CheckpointError(f"{folder} exists and is not empty; give a new name, or remove it first")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        part = folder / (file + ".part")
        save_file({name: np.ascontiguousarray(t, dtype=np.float32) for name, t in tensors.items()}, part)
        part.replace(folder / file)
    except OSError as error:
        raise CheckpointError(f"cannot write {folder / file}: {error.strerror}") from None
    return _sha256(folder / file)


def read_tensors(path: Path) -> dict[str, Floats]:
    source = SafetensorsSource(path)
    try:
        return {name: as_float32(source.read(name)) for name in source.tensors}
    finally:
        source.close()


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
