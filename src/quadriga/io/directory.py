"""Quadriga's own directory: parameters under their canonical names, and a manifest that can prove them.

    quadriga.json            what the model is, and for every parameter its file, format and sha256
    weights-0000i-of-N.safetensors, or .packed
    tokenizer files          as they came with the source

A plain directory holds torch dtypes in safetensors files. A packed one holds what the CPU's kernels map and use as it
lies (``quant.packed``): a matrix an entry, the experts of a layer one each (``layers.0.moe.w_up/3``), page-aligned.
Where q, k and v have formats of their own, each is an entry (``layers.0.attn.wqkv.weight/0`` and so on).
The manifest is written last, so a directory that has one is complete. No torch here.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import takewhile
from pathlib import Path

import msgspec

from quadriga.errors import CheckpointError
from quadriga.io.json_files import read_json
from quadriga.model.config import ModelConfig
from quadriga.model.config_json import config_from_json, config_to_json
from quadriga.model.weight_map import Shape, parameter_shapes
from quadriga.quant.packed import PACKED

MANIFEST = "quadriga.json"
WEIGHTS_STEM = "weights"
_VERSION = 2
"""1 had one attention, one feed-forward and one position for all layers; it is read too."""
_HASH_CHUNK = 8 << 20


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One parameter of the directory."""

    file: str
    offset: int
    """Of its first byte in the file."""
    shape: tuple[int, ...]
    format: str
    """A torch dtype name; later, a block format."""
    nbytes: int
    sha256: str


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """The content of quadriga.json."""

    config: ModelConfig
    parameters: dict[str, Entry]
    made_from: str
    """What the directory was converted from, for people."""
    packed: bool = False
    """True if the matrices are packed for the CPU's kernels."""

    def entries(self, name: str) -> list[Entry]:
        """The entries of one parameter: one, or one per expert, or per run of rows of q, k and v."""
        if name in self.parameters:
            return [self.parameters[name]]
        if name.endswith(SPLIT):
            return [self.parameters[f"{name}/{i}"] for i in range(len(self.runs()[name]))]
        moe = self.config.layers[int(name.split(".")[1])].moe
        return [self.parameters[f"{name}/{expert}"] for expert in range(moe.n_experts if moe is not None else 0)]

    def runs(self) -> dict[str, list[int]]:
        """Matrices of q, k and v in several entries -> the rows of each."""
        return _runs(self.parameters)


def write_manifest(directory: Path, manifest: Manifest) -> None:
    """Put the manifest in place, on disk before it has its name.

    Raises:
        CheckpointError: the file cannot be written.
    """
    body = {
        "quadriga": _VERSION,
        "made_from": manifest.made_from,
        "packed": manifest.packed,
        "config": config_to_json(manifest.config),
        "parameters": {name: asdict(entry) for name, entry in manifest.parameters.items()},
    }
    write_text(directory / MANIFEST, json.dumps(body, indent=1) + "\n")


def write_text(path: Path, text: str) -> None:
    """A small file, whole or not at all."""
    part = path.with_name(path.name + ".part")
    try:
        with part.open("w") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    except OSError as error:
        raise CheckpointError(f"cannot write {path}: {error.strerror}") from None


def read_manifest(directory: Path) -> Manifest:
    """Read and check quadriga.json: every parameter of its model must be there, with the right shape.

    Raises:
        CheckpointError: malformed, of another version, or incomplete.
        ConfigError: a configuration that no model can have.
    """
    body = read_json(directory / MANIFEST)
    if body.get("quadriga") not in (1, _VERSION):
        raise CheckpointError(
            f"{MANIFEST} must have version 1 or {_VERSION}, got {body.get('quadriga')!r}. "
            "It was made by another release of Quadriga; convert the original checkpoint again."
        )
    try:
        parameters = msgspec.convert(body.get("parameters"), dict[str, Entry])
        config = config_from_json(body.get("config"))
    except msgspec.ValidationError as error:
        raise CheckpointError(f"{MANIFEST} is malformed: {error}") from None
    packed = body.get("packed", False)
    if not isinstance(packed, bool):
        raise CheckpointError(f"{MANIFEST}: packed must be true or false, got {packed!r}")
    expected = packed_shapes(config, _runs(parameters)) if packed else parameter_shapes(config)
    wrong = sorted(n for n in expected.keys() | parameters.keys() if not _matches(parameters.get(n), expected.get(n)))
    if wrong:
        raise CheckpointError(f"{MANIFEST} does not describe its model: {len(wrong)} parameters differ, {wrong[:4]}")
    suffix = ".packed" if packed else ".safetensors"
    for name, entry in parameters.items():
        if entry.file != Path(entry.file).name or not entry.file.endswith(suffix):
            raise CheckpointError(f"{MANIFEST} names the file {entry.file[:80]!r}; weights lie beside it")
        if packed:
            _check_packed(directory, name, entry)
    return Manifest(config=config, parameters=parameters, made_from=str(body.get("made_from", "")), packed=packed)


SPLIT = "attn.wqkv.weight"
"""Ends the names of matrices that may be entries of several formats, one run of rows after the other."""


def _runs(parameters: Mapping[str, Entry]) -> dict[str, list[int]]:
    """Of every matrix that lies in runs of rows, how many each has."""
    found: dict[str, list[int]] = {}
    for first in (name for name in parameters if name.endswith(f"{SPLIT}/0")):
        matrix = first.removesuffix("/0")
        parts = (f"{matrix}/{i}" for i in range(len(parameters)))
        found[matrix] = [parameters[part].shape[0] for part in takewhile(parameters.__contains__, parts)]
    return found


def packed_shapes(config: ModelConfig, runs: Mapping[str, Sequence[int]] | None = None) -> dict[str, Shape]:
    """The matrices and vectors of a packed directory, every expert by itself.

    Args:
        runs: matrices of q, k and v that lie in runs of rows, and the rows of each run.
    """
    shapes: dict[str, Shape] = {}
    for name, shape in parameter_shapes(config).items():
        if runs and name in runs and sum(runs[name]) == shape[0]:
            shapes.update({f"{name}/{i}": (rows, *shape[1:]) for i, rows in enumerate(runs[name])})
        elif len(shape) == 3:
            shapes.update({f"{name}/{expert}": shape[1:] for expert in range(shape[0])})
        else:
            shapes[name] = shape
    return shapes


def packed_bytes(shape: Shape, form: str) -> int:
    """Bytes of a matrix or vector in a packed directory; vectors are plain float32."""
    return 4 * shape[0] if len(shape) == 1 else PACKED[form].nbytes_of(*shape)


def _check_packed(directory: Path, name: str, entry: Entry) -> None:
    """A packed file is mapped and used as it lies, so nothing may point outside it."""
    if entry.format not in PACKED or (len(entry.shape) == 1 and entry.format != "float32"):
        raise CheckpointError(f"{MANIFEST}: {name} has the format {entry.format!r}; known: {', '.join(PACKED)}")
    try:
        size = (directory / entry.file).stat().st_size
    except OSError as error:
        raise CheckpointError(f"{entry.file} cannot be read: {error.strerror}. Convert again.") from None
    if entry.nbytes != packed_bytes(entry.shape, entry.format) or entry.offset % 64 or entry.offset < 0:
        raise CheckpointError(f"{MANIFEST}: {name} has impossible bytes or offset")
    if entry.offset + entry.nbytes > size:
        raise CheckpointError(
            f"{entry.file} is cut short: {name} ends at {entry.offset + entry.nbytes}, the file at {size}"
        )


def _matches(entry: Entry | None, shape: Shape | None) -> bool:
    return entry is not None and shape is not None and tuple(entry.shape) == shape


def verify(directory: Path, progress: Callable[[int, int, str], None] | None = None) -> list[str]:
    """Hash every parameter again.

    Returns:
        names of the parameters whose bytes are not what the manifest says; empty if all is well.
    """
    manifest = read_manifest(directory)
    total = sum(entry.nbytes for entry in manifest.parameters.values())
    done, broken = 0, []
    for name, entry in manifest.parameters.items():
        digest = hashlib.sha256()
        try:
            with (directory / entry.file).open("rb") as file:
                file.seek(entry.offset)
                left = entry.nbytes
                while left and (chunk := file.read(min(left, _HASH_CHUNK))):
                    digest.update(chunk)
                    left -= len(chunk)
        except OSError:
            left = entry.nbytes
        if left or digest.hexdigest() != entry.sha256:
            broken.append(name)
        done += entry.nbytes
        if progress is not None:
            progress(done, total, name)
    return broken
