"""What a conversion will write: every tensor's format and place, known before the first byte is read."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from quadriga.errors import ConfigError
from quadriga.io import directory as engine_file
from quadriga.io import gguf
from quadriga.io.file_plan import FilePlan
from quadriga.io.gguf import Typed
from quadriga.io.gguf_mixtures import MIXTURES, format_in
from quadriga.io.gguf_source import GGUFSource
from quadriga.io.open import Checkpoint, identity_map
from quadriga.io.packed import packed_format, rows_of, runs_of_rows
from quadriga.io.restate import restated
from quadriga.io.safetensors import INDEX, plan_shards, shard_index
from quadriga.model import families
from quadriga.model.config import ModelConfig
from quadriga.model.families.rope_keys import gguf_tensors
from quadriga.model.weight_map import (
    Piece,
    Shape,
    parameter_shapes,
    qkv_rows,
    source_shapes,
    stays_float32,
)
from quadriga.quant import codec
from quadriga.quant.dtypes import Array, name_of
from quadriga.quant.formats import FORMATS
from quadriga.quant.packed import FROM_GGUF, PACKED, QUANTISED
from quadriga.text import gguf_spec, gguf_vocabulary
from quadriga.text import tokenizer as tokenizers

TOKENIZER_FILES = (*tokenizers.FILES, tokenizers.TOOL_TEMPLATE, "cl100k_base.tiktoken")
"""What is carried over beside the weights. Nothing else is: no code, no pickles."""

_PAGE = 4096
_MAX_PACKED_BYTES = 16 << 30


@dataclass(frozen=True)
class ConversionPlan:
    """Everything a conversion will write."""

    to: str
    layout: str
    pieces: list[Piece]
    """The result's weight map: ``source`` names the result's tensors."""
    tensors: dict[str, tuple[Shape, str]]
    """Result tensor -> (shape, format)."""
    files: FilePlan
    packed: dict[str, str] = field(default_factory=dict)
    """For a packed directory: parameter (experts by number) -> packed format. Empty for all others."""
    constants: dict[str, Array] = field(default_factory=dict)
    """Result tensors that no parameter fills: what the configuration says, where the format says it in tensors."""
    extra: dict[str, bytes] = field(default_factory=dict)
    """Small files: configuration, index, tokenizer."""
    notes: list[str] = field(default_factory=list)
    """What the caller should be told, e.g. tensors that had to take another format."""

    def nbytes(self, name: str) -> int:
        """Bytes of a result tensor."""
        shape, form = self.tensors[name]
        if self.packed:
            return engine_file.packed_bytes(shape, form)
        return FORMATS[form].nbytes_of(shape)


def plan_conversion(
    checkpoint: Checkpoint,
    out: Path,
    to: str,
    layout: str | None,
    dtype: str,
    gguf_format: str | Mapping[str, str],
    max_shard_bytes: int,
) -> ConversionPlan:
    config = checkpoint.config
    extra = tokenizer_files(checkpoint)
    if to == "gguf":
        return _plan_gguf(checkpoint, out.name, gguf_format)
    if to == "quadriga":
        pieces, name = identity_map(config), "quadriga"
    else:
        family = families.family_of(config)
        name = layout or next(iter(family.layouts))
        if name not in family.layouts:
            raise ConfigError(f"layout must be one of {', '.join(family.layouts)}; got {name!r}")
        if name in family.read_only:
            raise ConfigError(f"the layout {name} is read and not written: {family.read_only[name]}")
        pieces = family.layouts[name](config)
        extra["config.json"] = _json(family.config_to_hf(config) | {"torch_dtype": _common_dtype(checkpoint, dtype)})
        if config.eos_ids and "generation_config.json" not in extra:
            ends = {"bos_token_id": config.bos_id, "eos_token_id": list(config.eos_ids), "pad_token_id": config.pad_id}
            extra["generation_config.json"] = _json({k: v for k, v in ends.items() if v is not None})
    formats = {p.source: _stored(checkpoint, p, dtype) for p in pieces}
    tensors = {name: (shape, formats[name]) for name, shape in source_shapes(pieces).items()}
    files = plan_shards(tensors, max_shard_bytes, "weights" if to == "quadriga" else "model")
    if to == "hf" and len(files.sizes) > 1:
        extra[INDEX] = _json(shard_index(files))
    return ConversionPlan(to, name, pieces, tensors, files, extra=extra)


_WIDE_ENDS = dict.fromkeys(QUANTISED, "q8")
"""What embeddings and head are where the rest has fewer bits: every token goes through them, and they are few."""


def plan_packed(checkpoint: Checkpoint, form: str | Mapping[str, str], embeddings: str | None) -> ConversionPlan:
    """Matrices packed for the kernels, each at a page of its own so that it can be mapped and read directly."""
    config, formats = checkpoint.config, dict[str, str]()
    runs: dict[str, list[int]] = {}
    for name, shape in parameter_shapes(config).items():
        if split := _formats_of_rows(checkpoint, name, form):
            formats |= {f"{name}/{i}": one for i, (one, _) in enumerate(split)}
            runs[name] = [rows for _, rows in split]
            continue
        for part in [f"{name}/{e}" for e in range(shape[0])] if len(shape) == 3 else [name]:
            if len(shape) == 1:
                formats[part] = "float32"
            elif not isinstance(form, str):
                if part not in form or form[part] not in PACKED:
                    raise ConfigError(
                        f"the recipe gives {part} the format {form.get(part)!r}; known: {', '.join(PACKED)}"
                    )
                formats[part] = form[part]
            else:
                end = name in ("embed.weight", "lm_head.weight")
                wanted = (embeddings or _WIDE_ENDS.get(form, form)) if end else form
                formats[part] = packed_format(checkpoint, name, wanted)
    shapes = engine_file.packed_shapes(config, runs)
    places: dict[str, tuple[str, int]] = {}
    sizes: list[int] = [0]
    for name, one in formats.items():
        nbytes = engine_file.packed_bytes(shapes[name], one)
        if sizes[-1] and sizes[-1] + nbytes > _MAX_PACKED_BYTES:
            sizes.append(0)
        places[name] = (str(len(sizes)), sizes[-1])
        sizes[-1] += -(-nbytes // _PAGE) * _PAGE
    files = {str(i): f"{engine_file.WEIGHTS_STEM}-{i:05d}-of-{len(sizes):05d}.packed" for i in range(1, len(sizes) + 1)}
    return ConversionPlan(
        "quadriga",
        "packed",
        checkpoint.pieces,
        {name: (shapes[name], one) for name, one in formats.items()},
        FilePlan(
            headers=dict.fromkeys(files.values(), b""),
            sizes={files[str(i)]: size for i, size in enumerate(sizes, 1)},
            places={name: (files[number], offset) for name, (number, offset) in places.items()},
        ),
        packed=formats,
        extra=tokenizer_files(checkpoint),
    )


def _formats_of_rows(checkpoint: Checkpoint, name: str, form: str | Mapping[str, str]) -> list[tuple[str, int]]:
    """Formats and numbers of rows of q, k and v, where they differ; none: the matrix has one format."""
    if not name.endswith(engine_file.SPLIT):
        return []
    if form == "keep":
        return [(FROM_GGUF.get(block, "q8"), rows_of(run)) for block, run in runs_of_rows(checkpoint, name)]
    if isinstance(form, str) or name in form:
        return []
    heights = qkv_rows(checkpoint.config, name)
    given = [form.get(f"{name}/{i}", "") for i in range(len(heights))]
    return [] if any(one not in PACKED for one in given) else list(zip(given, heights, strict=True))


def _plan_gguf(checkpoint: Checkpoint, file: str, form: str | Mapping[str, str]) -> ConversionPlan:
    config = checkpoint.config
    family = families.family_of(config)
    if family.gguf_map is None or family.config_to_gguf is None:
        raise ConfigError(f"GGUF has no architecture for the family {family.name}")
    pieces = family.gguf_map(config)
    tensors, narrow = {}, []
    # A vector stays wide even where GGUF keeps it as a matrix, a tensor that also holds other matrices' rows does not.
    narrow_parts = {p.source for p in pieces if len(p.target_shape) > 1 and not stays_float32(p.target)}
    wide = {piece.source for piece in pieces} - narrow_parts
    tables = {piece.source for piece in pieces if piece.target in ("embed.weight", "lm_head.weight")}
    if form == "mxfp4" and config.is_moe:  # llama.cpp's MXFP4_MOE: what is no expert is stored as the tables are
        tables |= {piece.source for piece in pieces if len(piece.target_shape) < 3}
    for name, shape in source_shapes(pieces).items():
        # The router stays wide: its rounding changes which experts a token visits, not just by how much.
        wanted = "float32" if name in wide else _wanted(form, name, config, name in tables)
        stored = "float32" if name in wide else gguf.storable_format(shape, wanted)
        tensors[name] = (shape, stored)
        if stored not in (wanted, "float32"):
            narrow.append(name)
    metadata, notes = _gguf_metadata(checkpoint, family.config_to_gguf, form)
    constants = {name: np.array(values, dtype=np.float32) for name, values in gguf_tensors(config).items()}
    tensors |= {name: (values.shape, "float32") for name, values in constants.items()}
    if narrow:
        instead = " or ".join(sorted({tensors[name][1] for name in narrow}))
        notes.append(f"{len(narrow)} tensors whose rows are no whole blocks are stored as {instead}: {narrow[:3]}")
    files = gguf.plan_gguf(file, metadata, tensors)
    label = form if isinstance(form, str) else "mixed"
    return ConversionPlan("gguf", label, pieces, tensors, files, constants=constants, notes=notes)


def _wanted(form: str | Mapping[str, str], tensor: str, config: ModelConfig, is_table: bool) -> str:
    """What a matrix is to be stored as."""
    if not isinstance(form, str):
        if form.get(tensor) not in RECIPE_FORMATS:
            raise ConfigError(
                f"the recipe gives {tensor} the format {form.get(tensor)!r}; known: {', '.join(RECIPE_FORMATS)}"
            )
        return form[tensor]
    if form in MIXTURES:
        return format_in(form, tensor, config)
    return gguf.TABLES.get(form, form) if is_table else form


FILE_TYPE = {
    "float32": 0, "float16": 1, "q4_0": 2, "q8_0": 7, "q2_k": 10, "q3_k": 11, "q4_k": 14, "q5_k": 16, "q6_k": 18,
    "q3_k_s": 11, "q3_k_m": 12, "q3_k_l": 13, "q4_k_s": 14, "q4_k_m": 15, "q5_k_s": 16, "q5_k_m": 17,
    "q4_1": 3, "q5_0": 8, "q5_1": 9, "iq4_nl": 25, "iq4_xs": 30, "bfloat16": 32, "mxfp4": 38,
}  # fmt: skip
"""GGUF's general.file_type, for people and file browsers; the K formats' are those called S."""


RECIPE_FORMATS = (*codec.WRITTEN, "float32", "float16", "bfloat16")
"""What a recipe may give a tensor of a GGUF file."""


def _main_type(recipe: Mapping[str, str]) -> int:
    """general.file_type of a mixture that has no name: that of most of its tensors."""
    common = Counter(form for form in recipe.values() if form in FILE_TYPE).most_common(1)
    return FILE_TYPE[common[0][0]] if common else FILE_TYPE["float32"]


def recipe_rest(checkpoint: Checkpoint, to: str) -> tuple[dict[str, str], int]:
    """What a budget has no choice in.

    Args:
        to: "quadriga", packed, or "gguf".

    Returns:
        matrices that stay wide, with their format, and the bytes of all that no choice changes.

    Raises:
        ConfigError: GGUF has no architecture for the model.
    """
    config = checkpoint.config
    if to == "gguf":
        family = families.family_of(config)
        if family.gguf_map is None:
            raise ConfigError(f"GGUF has no architecture for the family {family.name}")
        pieces = family.gguf_map(family.gguf_form(config))
        recipe = {piece.source: "bfloat16" for piece in pieces}
        plan = _plan_gguf(restated(checkpoint, "gguf"), "", recipe)
        chosen = sum(plan.nbytes(name) for name, (_, form) in plan.tensors.items() if form == "bfloat16")
        return {}, plan.files.sizes[""] - chosen + gguf.ALIGNMENT * len(recipe)
    fixed = {
        name: 4 * shape[0] if len(shape) == 1 else engine_file.packed_bytes(shape, "float32")
        for name, shape in engine_file.packed_shapes(config).items()
        if len(shape) == 1 or stays_float32(name)
    }
    return {name: "float32" for name in fixed if stays_float32(name)}, sum(fixed.values())


def _gguf_metadata(
    checkpoint: Checkpoint, to_gguf: Callable[[ModelConfig], dict[str, object]], form: str | Mapping[str, str]
) -> tuple[dict[str, Typed], list[str]]:
    config = checkpoint.config
    metadata = {
        "general.name": Typed("string", checkpoint.path.stem),
        "general.file_type": Typed("uint32", FILE_TYPE[form] if isinstance(form, str) else _main_type(form)),
        "general.quantization_version": Typed("uint32", 2),
    }
    notes = []
    vocabulary: dict[str, Typed] = {}
    checkpoint = checkpoint.origin
    if isinstance(checkpoint.source, GGUFSource):
        vocabulary = checkpoint.source.header.typed("tokenizer.")
    else:
        found = gguf_vocabulary.from_directory(checkpoint.tokenizer_folder, config.vocab_size)
        if found is None:
            vocabulary = {"tokenizer.ggml.model": Typed("string", gguf_spec.NO_VOCABULARY[0])}
            notes.append("the checkpoint has no tokenizer, so the GGUF file has none: llama.cpp needs one to chat")
        else:
            vocabulary = {key: Typed(kind, value) for key, (kind, value) in found.items()}
    # The vocabulary's eos token comes first (templates name it); the configuration's other ends stay beside it.
    eos = vocabulary.get("tokenizer.ggml.eos_token_id")
    if eos is not None:
        config = replace(config, eos_ids=tuple(dict.fromkeys((eos.value, *config.eos_ids))))
    keys = to_gguf(config)
    arch = next(iter(keys)).partition(".")[0]  # of a family with several, the one that this model needs
    assert arch in families.family_of(config).gguf_archs, "the first key is an architecture's"
    translated = {key: Typed(_gguf_type(value), value) for key, value in keys.items()}
    return {"general.architecture": Typed("string", arch), **metadata, **translated, **vocabulary}, notes


def _gguf_type(value: object) -> str:
    match value:
        case bool():
            return "bool"
        case int():
            return "uint32"
        case float():
            return "float32"
        case str():
            return "string"
        case list() if value and all(type(one) is int for one in value):
            return "int32"  # of an array's elements, as llama.cpp's converter writes them
        case list() if value and all(type(one) is bool for one in value):
            return "bool"
    raise AssertionError(f"config_to_gguf gives numbers and strings, got {value!r}")


def _stored(checkpoint: Checkpoint, piece: Piece, dtype: str) -> str:
    if dtype != "keep" and not piece.target.endswith("router.correction"):  # whose rounding would change choices
        return dtype
    return name_of(checkpoint.parameters.dtype(piece.target))


def _common_dtype(checkpoint: Checkpoint, dtype: str) -> str:
    """What config.json calls the checkpoint's dtype: that of its largest parameters."""
    if dtype != "keep":
        return dtype
    return name_of(checkpoint.parameters.dtype("embed.weight"))


def tokenizer_files(checkpoint: Checkpoint) -> dict[str, bytes]:
    checkpoint = checkpoint.origin
    if isinstance(checkpoint.source, GGUFSource):
        return gguf_vocabulary.to_files(checkpoint.source.metadata)
    found = {name: checkpoint.tokenizer_folder / name for name in TOKENIZER_FILES}
    return {name: path.read_bytes() for name, path in found.items() if path.is_file()}


def _json(value: object) -> bytes:
    return (json.dumps(value, indent=2) + "\n").encode()


def fingerprint(checkpoint: Checkpoint, plan: ConversionPlan) -> str:
    """Changes whenever the source's files, what is done to them, or the planned bytes do."""
    path = checkpoint.origin.path
    files = [path] if path.is_file() else sorted(f for f in path.iterdir() if f.is_file())
    seen: list[Any] = [(f.name, f.stat().st_size, f.stat().st_mtime_ns) for f in files]
    digest = hashlib.sha256(json.dumps([str(path.resolve()), seen]).encode())
    for file, header in sorted(plan.files.headers.items()):
        digest.update(file.encode() + header)
    digest.update(json.dumps([plan.packed, checkpoint.recipe] if checkpoint.recipe else plan.packed).encode())
    return digest.hexdigest()
