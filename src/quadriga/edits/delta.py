"""Deltas: small files that turn a public dense model into one of our mixtures (upcycling, fitted routers, adapter).

    base ──upcycle(how, routers)──► same function, 16 experts ──merge(adapter)──► the model

    delta.safetensors   router/LAYER (copies, D) float32;  factor/NAME.a|b as q8_0 blocks;  metadata: everything else

The factors take 8.5 bits per number. The delta contains the sha256 of its base, so the result is one exact model.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict
from math import prod
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from quadriga.edits.upcycle import Upcycling, upcycle
from quadriga.errors import CheckpointError
from quadriga.io.adapter import merge
from quadriga.io.adapter_files import Adapter, low_rank
from quadriga.io.open import Checkpoint
from quadriga.model.adapter_spec import LoraSpec
from quadriga.quant import codec
from quadriga.quant.dtypes import Array, as_float32
from quadriga.quant.formats import FORMATS

_VERSION = "1"
_FORM = "q8_0"


def write(path: Path, *, base_sha256: str, how: Upcycling, routers: Mapping[int, Array], adapter: Adapter) -> str:
    """Write a delta.

    Args:
        base_sha256: sha256 of the base's file.
        how: the upcycling.
        routers: layer -> (copies, D), one row per copy.
        adapter: the adapter to merge after upcycling.

    Returns:
        the sha256 of the written file.

    Raises:
        CheckpointError: factors that do not fill whole blocks, or are not finite.
    """
    from safetensors.numpy import save_file

    tensors: dict[str, Array] = {
        f"router/{layer}": np.ascontiguousarray(as_float32(rows)) for layer, rows in routers.items()
    }
    shapes: dict[str, list[int]] = {}
    for name, factors in low_rank(adapter).items():
        for part, values in zip("ab", factors, strict=True):
            key = f"factor/{name}.{part}"
            if values.size % FORMATS[_FORM].block:
                raise CheckpointError(f"{key} must have whole {_FORM} blocks, got {values.size} numbers")
            shapes[key] = list(values.shape)
            tensors[key] = codec.quantize(as_float32(values).reshape(-1), _FORM)
    metadata = {
        "quadriga_delta": _VERSION,
        "base_sha256": base_sha256,
        "upcycling": json.dumps(asdict(how)),
        "lora": json.dumps(asdict(adapter.spec)),
        "shapes": json.dumps(shapes),
    }
    save_file(tensors, path, metadata=metadata)
    return sha256(path)


def apply(base: Checkpoint, path: Path) -> Checkpoint:
    """Apply a delta to its base; returns a derived checkpoint. Keep the base open while the result is read.

    Raises:
        CheckpointError: not a delta, or a delta for another base.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="np") as file:
            metadata = file.metadata() or {}
            if (version := metadata.get("quadriga_delta")) != _VERSION:
                raise CheckpointError(f"{path} must be a delta of version {_VERSION}, got {version!r}")
            tensors: dict[str, Array] = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"cannot read {path}: {error}") from None
    if sha256(base.path) != metadata.get("base_sha256"):
        raise CheckpointError(f"{base.path} must be the file that {path.name} was made for, but its sha256 differs")
    try:
        how = msgspec.json.decode(metadata["upcycling"], type=Upcycling)
        spec = msgspec.json.decode(metadata["lora"], type=LoraSpec)
        shapes = msgspec.json.decode(metadata["shapes"], type=dict[str, tuple[int, ...]])
    except (KeyError, msgspec.ValidationError, msgspec.DecodeError) as error:
        raise CheckpointError(f"{path} is malformed: {error}") from None
    routers = {int(name.split("/")[1]): rows for name, rows in tensors.items() if name.startswith("router/")}
    values = {key: _factor(tensors, key, shape, path) for key, shape in shapes.items()}
    names = sorted({key.removeprefix("factor/")[:-2] for key in values})
    factors: dict[str, Any] = {name: (values[f"factor/{name}.a"], values[f"factor/{name}.b"]) for name in names}
    return merge(upcycle(base, how, routers=routers), Adapter(spec=spec, factors=factors))


def _factor(tensors: dict[str, Array], key: str, shape: tuple[int, ...], path: Path) -> Array:
    raw = tensors.get(key)
    if raw is None or raw.size != FORMATS[_FORM].nbytes_of((prod(shape),)):
        raise CheckpointError(f"{path} is malformed: {key} is missing or cut short")
    return codec.dequantize(raw, _FORM).reshape(shape)


def sha256(path: Path) -> str:
    """sha256 of a file, as hex digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
