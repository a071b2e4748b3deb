"""Opening a checkpoint of any kind: its configuration, its tensors under their weight map, its tokenizer.

    locate ──► source + pieces ──► check_cover ──► ParameterView ──► load_parameters / convert

The cover check comes before any weight is read: every stored tensor is used exactly once and every parameter filled
exactly once, or one error lists both sides.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from math import prod
from pathlib import Path
from typing import Literal

import numpy as np

from quadriga.errors import CheckpointError
from quadriga.io import directory as engine_file
from quadriga.io import own_files
from quadriga.io.detect import Kind, Located, locate
from quadriga.io.gguf_source import GGUFSource
from quadriga.io.grok import GrokSource
from quadriga.io.joined import JoinedSource
from quadriga.io.mxfp4_source import with_mxfp4
from quadriga.io.packed_source import PackedSource
from quadriga.io.parameters import SLICE_BYTES, ParameterView
from quadriga.io.quantised.source import QuantisedSource
from quadriga.io.safetensors import SafetensorsSource
from quadriga.io.source import TensorSource
from quadriga.io.torch_source import TorchSource, open_bins
from quadriga.model import families
from quadriga.model.config import ModelConfig
from quadriga.model.families import own_params
from quadriga.model.families.base import Family, pick_gguf_map, pick_layout
from quadriga.model.weight_map import Piece, Shape, check_cover, parameter_shapes, source_shapes, whole
from quadriga.quant.dtypes import raw_bytes
from quadriga.text import tokenizer as tokenizers
from quadriga.text.tokenizer import Tokenizer


@dataclass
class Checkpoint:
    """An open checkpoint. Close it when done; parameters already read stay valid."""

    kind: Kind | Literal["derived"]
    path: Path
    config: ModelConfig
    layout: str
    """Which layout the tensors are in, e.g. "fused" or "gguf"."""
    source: TensorSource
    pieces: list[Piece]
    base: Checkpoint | None = None
    """Of a derived checkpoint: the one it is computed from (``io.derive``)."""
    recipe: str = ""
    """Of a derived checkpoint: what is done to its base, in words that differ whenever the numbers do."""

    def __post_init__(self) -> None:
        self.parameters = ParameterView(self.source, self.pieces)

    @property
    def origin(self) -> Checkpoint:
        """The checkpoint whose files lie on disk: this one, or what it is derived from."""
        return self if self.base is None else self.base.origin

    @property
    def tokenizer_folder(self) -> Path:
        """Where the tokenizer's files are: with the weights, or, as Meta's downloads come, one folder up."""
        path, name = self.origin.path, "tokenizer.model"
        shared = self.origin.kind == "own" and not (path / name).exists() and (path.parent / name).exists()
        return path.parent if shared else path

    def load_tokenizer(self, cl100k_ranks: Callable[[], Path]) -> Tokenizer | None:
        """The tokenizer that came with the weights, or None.

        Args:
            cl100k_ranks: where the ranks of cl100k are, asked for only if the files name that vocabulary without its
                ranks (DBRX's release); see ``hub.catalogue.cl100k_ranks``.
        """
        source = self.origin.source
        if isinstance(source, GGUFSource):
            return tokenizers.load_gguf(source.metadata)
        return tokenizers.load_directory(self.tokenizer_folder, cl100k_ranks, n_rows=self.config.vocab_size)

    def chat_template(self) -> str | None:
        """The chat template that came with the weights, or None; no vocabulary is read for it.

        Raises:
            TokenizerError: it is no text.
        """
        source = self.origin.source
        if isinstance(source, GGUFSource):
            found = source.metadata.get("tokenizer.chat_template")
            return found if isinstance(found, str) else None
        folder = self.tokenizer_folder
        if not folder.is_dir():
            return None
        return tokenizers.chat_templates(folder, tokenizers.read_json_if_there(folder / "tokenizer_config.json")).chat

    def close(self) -> None:
        """Release the files."""
        self.source.close()


def open_checkpoint(path: Path, *, pickles: bool = False) -> Checkpoint:
    """Open whatever lies at ``path`` and hold it to its configuration.

    Args:
        pickles: read a Hugging Face directory without safetensors from its ``pytorch_model*.bin`` files. They are
            walked by a machine that builds tensors and nothing else; asked for all the same, because other programs
            run what such files say.

    Raises:
        CheckpointError: nothing there, malformed files, or tensors that do not match the configuration.
        ConfigError: a configuration no model of ours can have.
    """
    found = locate(path, keep_open=True)
    config = found.config
    match found.kind:
        case "gguf":
            gguf = found.file
            assert gguf is not None, "it was to be left open"
            family = families.family_of(config)
            layout, pieces = pick_gguf_map(family, config, gguf.shapes)
            return _checked("gguf", found.path, config, layout, gguf, pieces, family)
        case "grok":
            pieces = families.family_of(config).layouts["jax"](config)
            return _checked("grok", found.path, config, "jax", GrokSource(found.path, pieces), pieces, None)
        case "quadriga":
            manifest = engine_file.read_manifest(found.path)
            if manifest.packed:
                pieces = packed_map(config, manifest.runs())
                return _checked(
                    "quadriga", found.path, config, "packed", PackedSource(found.path, manifest), pieces, None
                )
            native = SafetensorsSource(found.path)
            _match_manifest(found.path, native)
            return _checked("quadriga", found.path, config, "quadriga", native, identity_map(config), None)
        case "hf":
            plain = pickles and not any(found.path.glob("*.safetensors"))
            source = _hf_source(found, pickles=plain)
            family = families.family_of(config)
            shapes = {name: info.shape for name, info in source.tensors.items()}
            layout, pieces = pick_layout(family, config, shapes)
            if isinstance(source, QuantisedSource):
                source.without_empty_biases({piece.source for piece in pieces})
            return _checked("hf", found.path, config, layout, source, pieces, family)
        case "own":
            return _open_own(found.path, config)


def _hf_source(found: Located, *, pickles: bool) -> TensorSource:
    if found.method is not None:
        if pickles:
            raise CheckpointError(
                f"weights packed by {found.method.label} are read from safetensors, not from .bin files"
            )
        return QuantisedSource(SafetensorsSource(found.path, with_packed=True), found.method)
    return open_bins(found.path) if pickles else with_mxfp4(SafetensorsSource(found.path, with_bytes=True))


def _open_own(path: Path, config: ModelConfig) -> Checkpoint:
    """Meta's and Mistral's own folders: one file, or a part of every matrix in each of several."""
    parts: list[TensorSource] = []
    family = families.family_of(config)
    own = replace(family, layouts={name: family.layouts[name] for name in own_params.LAYOUTS[family.name]})
    try:
        for file in own_files.weight_files(path):
            parts.append(SafetensorsSource(file) if file.suffix == ".safetensors" else TorchSource(file))
        shapes = {name: info.shape for part in parts for name, info in part.tensors.items()}
        layout, pieces = pick_layout(own, config, shapes)
        source = JoinedSource(parts, source_shapes(pieces))
    except BaseException:
        for part in parts:
            part.close()
        raise
    return _checked("own", path, config, layout, source, pieces, family)


def identity_map(config: ModelConfig) -> list[Piece]:
    """The weight map of Quadriga's own directory: every parameter under its own name."""
    return [
        Piece(source=name, source_shape=shape, target=name, target_shape=shape)
        for name, shape in parameter_shapes(config).items()
    ]


def packed_map(config: ModelConfig, runs: Mapping[str, Sequence[int]] | None = None) -> list[Piece]:
    """The weight map of a packed directory: every expert of a layer is a tensor of its own, and so is every run."""
    pieces = []
    for name, shape in parameter_shapes(config).items():
        if runs and name in runs:
            ends = list(accumulate(runs[name]))
            for i, (rows, end) in enumerate(zip(runs[name], ends, strict=True)):
                box, own = ((end - rows, end), *whole(shape[1:])), (rows, *shape[1:])
                pieces.append(
                    Piece(source=f"{name}/{i}", source_shape=own, target=name, target_shape=shape, target_box=box)
                )
            continue
        if len(shape) < 3:
            pieces.append(Piece(source=name, source_shape=shape, target=name, target_shape=shape))
            continue
        for expert in range(shape[0]):
            box = ((expert, expert + 1), *whole(shape[1:]))
            pieces.append(
                Piece(
                    source=f"{name}/{expert}",
                    source_shape=shape[1:],
                    target=name,
                    target_shape=shape,
                    target_box=box,
                    view=(1, *shape[1:]),
                )
            )
    return pieces


def _checked(
    kind: Kind,
    path: Path,
    config: ModelConfig,
    layout: str,
    source: TensorSource,
    pieces: list[Piece],
    family: Family | None,
) -> Checkpoint:
    try:
        shapes = {name: info.shape for name, info in source.tensors.items()}
        if family is not None:
            shapes = without_extras(family, config, shapes, pieces, source)
        check_cover(pieces, parameter_shapes(config), shapes)
    except BaseException:
        source.close()
        raise
    return Checkpoint(kind, path, config, layout, source, pieces)


def without_extras(
    family: Family,
    config: ModelConfig,
    shapes: Mapping[str, Shape],
    pieces: list[Piece],
    source: TensorSource | None = None,
) -> dict[str, Shape]:
    """The stored tensors that carry the model: without the family's documented ignorable ones and tied copies.

    Raises:
        CheckpointError: a stored copy of a tied tensor differs from it (only checked where ``source`` is given).
    """
    used, left_out = {piece.source for piece in pieces}, family.left_out(config)
    kept = {
        name: shape
        for name, shape in shapes.items()
        if name in used
        or not (name in left_out or any(fnmatch.fnmatchcase(name, pattern) for pattern in family.ignored_tensors))
    }
    if config.tied_embeddings:
        table = next((piece.source for piece in pieces if piece.target == "embed.weight"), "")
        for copy, usual in family.tied_copies.items():
            original = usual if usual in kept else table  # which texts within larger models have under another name
            if copy in kept and copy not in used and original in kept:
                if source is not None and not _same(source, copy, original, kept[copy]):
                    raise CheckpointError(
                        f"the configuration ties {copy} to {original}, but the file stores two different tensors. "
                        "Check tie_word_embeddings in config.json."
                    )
                del kept[copy]
    return kept


def _same(source: TensorSource, a: str, b: str, shape: Shape) -> bool:
    if source.tensors[a] != source.tensors[b]:
        return False
    step = max(1, SLICE_BYTES // max(1, 4 * prod(shape[1:])))
    boxes = (((i, min(i + step, shape[0])), *whole(shape[1:])) for i in range(0, shape[0], step))
    # The bytes themselves: NaN equals NaN.
    return all(np.array_equal(raw_bytes(source.read(a, box)), raw_bytes(source.read(b, box))) for box in boxes)


def _match_manifest(path: Path, source: SafetensorsSource) -> None:
    manifest = engine_file.read_manifest(path)
    wrong = [
        name
        for name, entry in manifest.parameters.items()
        if name not in source.tensors
        or source.tensors[name].dtype != entry.format
        or source.tensors[name].shape != tuple(entry.shape)
    ]
    if wrong:
        raise CheckpointError(
            f"{len(wrong)} parameters are not stored as {engine_file.MANIFEST} says, e.g. {wrong[:4]}. Files were "
            "mixed or changed; convert the original checkpoint again."
        )
