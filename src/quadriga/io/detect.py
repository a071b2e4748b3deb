"""What lies at a path: which kind of checkpoint, and the model it says it is. No torch, no weights.

quadriga   a directory with quadriga.json            (``checkpoint.engine_file``)
hf         a directory with config.json              (safetensors, any of the family's layouts)
own        a directory with params.json              (Meta's and Mistral's own folders: consolidated.*)
gguf       a GGUF file, or a directory with one
grok       a directory with tensor00000_000          (Grok-1's release)
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from quadriga.errors import CheckpointError
from quadriga.io import directory as engine_file
from quadriga.io import gguf, own_files, weight_names
from quadriga.io.gguf_source import GGUFSource
from quadriga.io.json_files import read_json
from quadriga.io.quantised import config as quantised
from quadriga.io.quantised.method import KeepsBlocks, Method
from quadriga.io.suggested import not_heeded
from quadriga.model import families
from quadriga.model.config import ModelConfig
from quadriga.model.families import own_params, rope_keys
from quadriga.quant.dtypes import as_float32

Kind = Literal["quadriga", "hf", "own", "gguf", "grok"]


@dataclass(frozen=True)
class Located:
    """A checkpoint that was found but not opened."""

    kind: Kind
    path: Path
    """The GGUF file, or the directory."""
    config: ModelConfig
    notes: tuple[str, ...] = ()
    """What the files left open and how it was read, for people."""
    method: Method | None = None
    """Of a Hugging Face directory: how a quantiser packed its weights."""
    file: GGUFSource | None = None
    """A GGUF, open, for whoever asked for that: it was read as far as its weights."""


def locate(path: Path, *, keep_open: bool = False) -> Located:
    """Find out what is at ``path`` and read its configuration.

    Args:
        keep_open: leave a GGUF file open; its header, with the vocabulary, takes long to read again.

    Raises:
        CheckpointError: nothing there, or nothing that is a checkpoint.
        ConfigError: a configuration that no model of ours can have.
    """
    path = path.expanduser()
    if not path.exists():
        raise CheckpointError(f"there is nothing at {path}. Check the path, or see `quadriga models list` for names.")
    if path.is_file():
        if path.name in ("config.json", "params.json", engine_file.MANIFEST):
            return locate(path.parent, keep_open=keep_open)
        if path.suffix == ".tiktoken" or path.name in ("tokenizer.json", "tokenizer.model", "tekken.json"):
            raise CheckpointError(
                f"{path.name} is a vocabulary, not a model: it has no weights. Give the folder or the GGUF file of a "
                "model, or the name of one (`quadriga models list`)."
            )
        if not gguf.is_gguf(path):
            raise CheckpointError(
                f"{path.name} is not a GGUF file. Give the directory of a safetensors checkpoint (with its "
                "config.json), or of Meta's or Mistral's own (with its params.json), not one of its files."
            )
        return _gguf(path, keep_open)
    if (path / engine_file.MANIFEST).is_file():
        return Located("quadriga", path, engine_file.read_manifest(path).config)
    if (path / "config.json").is_file() and not _is_grok(path):
        raw, method = quantised.split(read_json(path / "config.json"), path)
        config, notes = families.read_hf(raw)
        if method is not None:
            notes = [*notes, _packed_note(method)]
        if (path / "generation_config.json").is_file():
            generation = read_json(path / "generation_config.json")
            config, notes = families.with_generation_config(config, generation), [*notes, *not_heeded(generation)]
        return Located("hf", path, config, tuple(notes), method)
    if _is_grok(path):
        return Located("grok", path, _grok_config(path))
    if (path / "ckpt-0").is_dir() and _is_grok(path / "ckpt-0"):
        return Located("grok", path / "ckpt-0", _grok_config(path / "ckpt-0"))
    if (path / own_params.FILE).is_file():
        raw = read_json(path / own_params.FILE)
        config, notes = own_params.from_params(raw, lambda d_model: own_files.table_rows(path, d_model))
        return Located("own", path, config, tuple(notes))
    models = weight_names.models(file.name for file in path.glob("*.gguf"))
    if len(models) == 1:
        return _gguf(path / models[0][0], keep_open)
    if models:
        raise CheckpointError(f"{path} has {len(models)} models. Give one: {', '.join(parts[0] for parts in models)}")
    raise CheckpointError(
        f"{path} is no checkpoint: it needs a config.json with safetensors files, a {engine_file.MANIFEST}, a GGUF "
        "file, a params.json with consolidated files (Meta, Mistral), or Grok-1's tensor files"
    )


def _packed_note(method: Method) -> str:
    kept = method.kept if isinstance(method, KeepsBlocks) else ""
    how = f"; in memory they stay as they are: {kept}" if kept else ""
    return (
        f"the weights are packed ({method.label}) and read as the numbers they stand for{how}; activations and the "
        "cache are not rounded"
    )


def _gguf(path: Path, keep_open: bool) -> Located:
    source = GGUFSource(path)
    kept = False
    try:
        kind = source.metadata.get("general.type", "model")
        if kind != "model":
            raise CheckpointError(
                f"{path.name} is no model: its general.type is {str(kind)[:40]!r}, as of adapters, imatrix files and "
                "projectors. Give the model's own file."
            )
        metadata = {**source.metadata, **_small_tensors(source)}
        config, notes = families.read_gguf(metadata, source.shapes)
        kept = keep_open
    finally:
        if not kept:
            source.close()
    return Located("gguf", path, config, tuple(notes), file=source if kept else None)


def _small_tensors(source: GGUFSource) -> dict[str, list[float]]:
    """Values of the tensors that say what the model is and not what it learned."""
    values = {}
    for name in rope_keys.VALUES_OF:
        if name in source.tensors:
            shape = source.tensors[name].shape
            if len(shape) != 1 or shape[0] > 4096:
                raise CheckpointError(f"{name} must be a vector of one factor a rotary pair, got shape {shape}")
            values[rope_keys.VALUES + name] = as_float32(source.read(name)).tolist()
    return values


def _is_grok(path: Path) -> bool:
    return (path / "tensor00000_000").is_file()


def _grok_config(path: Path) -> ModelConfig:
    """The release has no configuration file: its sizes are in its program. A config.json beside it is for others."""
    if (path / "config.json").is_file():
        return families.config_from_hf(read_json(path / "config.json"))
    return families.preset("grok-1")
