"""From any checkpoint to any other: streaming, resumable, and never half-done under its final name.

    open_checkpoint ──► plan (every byte's place) ──► [part: read ► pack ► pwrite] ... ──► fsync ──► rename

At most one part (about 64 MB; a matrix that must be transposed moves whole) is in memory. The work happens in
OUT.part beside the result; a journal there lists the tensors that are safely on disk, so a conversion that was killed
at any instant goes on where it stopped and ends with the same bytes.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import shutil
from collections import deque
from collections.abc import Callable, Collection, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from math import prod
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from quadriga.errors import CheckpointError, ConfigError
from quadriga.io import convert_options, gguf
from quadriga.io import directory as engine_file
from quadriga.io.detect import locate
from quadriga.io.file_plan import FilePlan
from quadriga.io.gguf import Typed
from quadriga.io.gguf_mixtures import MIXTURES, format_in
from quadriga.io.gguf_source import GGUFSource
from quadriga.io.json_files import read_json
from quadriga.io.mxfp4_source import of_numbers
from quadriga.io.open import Checkpoint, identity_map, open_checkpoint, without_extras
from quadriga.io.packed import Unpacked, packed_format, read_matrix
from quadriga.io.parameters import SLICE_BYTES, Progress, pack, slices
from quadriga.io.quantised import source as quantised
from quadriga.io.safetensors import INDEX, plan_shards, shard_index
from quadriga.kernels.cpu.packing import allocate
from quadriga.model import families
from quadriga.model.config import ModelConfig
from quadriga.model.families.base import pick_layout
from quadriga.model.families.rope_keys import gguf_tensors
from quadriga.model.weight_map import (
    Piece,
    Shape,
    check_cover,
    parameter_shapes,
    source_index,
    source_shapes,
    stays_float32,
    whole,
)
from quadriga.quant import codec
from quadriga.quant.dtypes import DTYPES as NUMPY
from quadriga.quant.dtypes import Array, as_float32, name_of, raw_bytes, wider
from quadriga.quant.formats import FORMATS, PLAIN
from quadriga.quant.packed import PACKED, QUANTISED
from quadriga.text import gguf_vocabulary
from quadriga.text import tokenizer as tokenizers

TOKENIZER_FILES = (*tokenizers.FILES, "cl100k_base.tiktoken")
"""What is carried over beside the weights. Nothing else is: no code, no pickles."""

_JOURNAL = "journal.jsonl"
_SYNC_BYTES = 512 << 20
"""How much may have to be done again after a crash."""
_PARTS_WAITING = 3
"""Parts made and not yet written: what the memory of a conversion is a few times of."""
_READ_AHEAD = 2
_PAGE = 4096
_MAX_PACKED_BYTES = 16 << 30
MAX_SHARD_BYTES = 4_500_000_000
"""DBRX's release has 61 files of 4.2 to 4.4 GB."""


class _Digest(Protocol):
    def update(self, data: memoryview, /) -> None: ...
    def hexdigest(self) -> str: ...


@dataclass(frozen=True)
class Plan:
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


def convert(
    source: Path,
    out: Path,
    *,
    to: str = "quadriga",
    layout: str | None = None,
    dtype: str | None = None,
    gguf_format: str | None = None,
    format: str | Mapping[str, str] | None = None,
    embeddings: str | None = None,
    importance: Mapping[str, Array] | None = None,
    max_shard_bytes: int | None = None,
    resume: bool = True,
    pickles: bool = False,
    progress: Progress | None = None,
) -> Plan:
    """Convert a checkpoint.

    What has no effect beside the other options is refused: ``io/convert_options.py`` has the table.

    Args:
        source: anything ``open_checkpoint`` opens.
        out: the directory to make (for ``gguf``: the file). Must not exist, or be an empty directory.
        to: "quadriga", "hf" (Hugging Face safetensors) or "gguf".
        layout: for "hf", one of the family's layouts; None is the family's usual one.
        dtype: of plain numbers, for "hf" and for "quadriga" without a format: float32, bfloat16, float16, or "keep",
            which None is too: each tensor as it came (block formats become float32).
        gguf_format: for "gguf": one of ``convert_options.GGUF_FORMATS``; None is bfloat16.
        format: for "quadriga": pack the matrices for the CPU's kernels: one of ``FORMATS_TO_LOAD`` for
            all (routers stay float32, embeddings and head at least q8), or a recipe: matrix -> format
            (``quant.format_choice``).
        embeddings: with ``format``, another one for the embedding table and the head.
        importance: matrix -> (cols,), how much each column's error counts in the search for scales.
        max_shard_bytes: largest safetensors file, unless one tensor alone is larger; None is MAX_SHARD_BYTES.
        resume: go on with an unfinished conversion of the same source with the same options; False starts over.
        pickles: see ``open_checkpoint``.
        progress: called after each part with (bytes written, bytes in all, tensor).

    Returns:
        the plan that was carried out.

    Raises:
        CheckpointError: a bad source, a result that exists, an unfinished conversion of something else, a full disk.
        ConfigError: an option that does not exist or would have no effect, or a model the target format cannot express.
    """
    checkpoint = open_checkpoint(source, pickles=pickles)
    try:
        return write(
            checkpoint,
            out,
            to=to,
            layout=layout,
            dtype=dtype,
            gguf_format=gguf_format,
            format=format,
            embeddings=embeddings,
            importance=importance,
            max_shard_bytes=max_shard_bytes,
            resume=resume,
            progress=progress,
        )
    finally:
        checkpoint.close()


def write(
    checkpoint: Checkpoint,
    out: Path,
    *,
    to: str = "quadriga",
    layout: str | None = None,
    dtype: str | None = None,
    gguf_format: str | None = None,
    format: str | Mapping[str, str] | None = None,
    embeddings: str | None = None,
    importance: Mapping[str, Array] | None = None,
    max_shard_bytes: int | None = None,
    resume: bool = True,
    progress: Progress | None = None,
) -> Plan:
    """:func:`convert` of a checkpoint that is open already, e.g. a derived one; it stays open."""
    given = {"to": to, "layout": layout, "dtype": dtype, "gguf_format": gguf_format, "format": format}
    convert_options.check(
        given | {"embeddings": embeddings, "importance": importance or None, "max_shard_bytes": max_shard_bytes}
    )
    if out.exists() and not (out.is_dir() and to != "gguf" and not any(out.iterdir())):
        raise CheckpointError(f"{out} exists; give a new name, or remove it first")
    if format is None:
        shard_bytes = max_shard_bytes or MAX_SHARD_BYTES
        plan = _plan(checkpoint, out, to, layout, dtype or "keep", gguf_format or "bfloat16", shard_bytes)
    else:
        plan = _plan_packed(checkpoint, format, embeddings)
    work = out.with_name(out.name + ".part")
    _Writer(work, plan, _fingerprint(checkpoint, plan), resume).run(checkpoint, progress, importance or {})
    try:
        if to == "gguf":
            (work / out.name).replace(out)
            (work / _JOURNAL).unlink()
            work.rmdir()
        else:
            (work / _JOURNAL).unlink()
            if out.exists():
                out.rmdir()
            work.replace(out)
        _sync_directory(out.parent)
    except OSError as error:
        raise CheckpointError(f"cannot put the finished {out} in place: {error.strerror}") from None
    return plan


# Planning ------------------------------------------------------------------------------------------------------------


def _plan(
    checkpoint: Checkpoint, out: Path, to: str, layout: str | None, dtype: str, gguf_format: str, max_shard_bytes: int
) -> Plan:
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
    return Plan(to, name, pieces, tensors, files, extra=extra)


_WIDE_ENDS = dict.fromkeys(QUANTISED, "q8")
"""What embeddings and head are where the rest has fewer bits: every token goes through them, and they are few."""


def _plan_packed(checkpoint: Checkpoint, form: str | Mapping[str, str], embeddings: str | None) -> Plan:
    """Matrices packed for the kernels, each at a page of its own so that it can be mapped and read directly."""
    config, formats = checkpoint.config, dict[str, str]()
    for name, shape in parameter_shapes(config).items():
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
    shapes = engine_file.packed_shapes(config)
    places: dict[str, tuple[str, int]] = {}
    sizes: list[int] = [0]
    for name, one in formats.items():
        nbytes = engine_file.packed_bytes(shapes[name], one)
        if sizes[-1] and sizes[-1] + nbytes > _MAX_PACKED_BYTES:
            sizes.append(0)
        places[name] = (str(len(sizes)), sizes[-1])
        sizes[-1] += -(-nbytes // _PAGE) * _PAGE
    files = {str(i): f"{engine_file.WEIGHTS_STEM}-{i:05d}-of-{len(sizes):05d}.packed" for i in range(1, len(sizes) + 1)}
    return Plan(
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


def _plan_gguf(checkpoint: Checkpoint, file: str, form: str) -> Plan:
    config = checkpoint.config
    family = families.family_of(config)
    if family.gguf_map is None or family.config_to_gguf is None:
        raise ConfigError(f"GGUF has no architecture for the family {family.name}")
    pieces = family.gguf_map(config)
    tensors, narrow = {}, []
    wide = {piece.source for piece in pieces if stays_float32(piece.target)}
    tables = {piece.source for piece in pieces if piece.target in ("embed.weight", "lm_head.weight")}
    if form == "mxfp4" and config.is_moe:  # llama.cpp's MXFP4_MOE: what is no expert is stored as the tables are
        tables |= {piece.source for piece in pieces if len(piece.target_shape) < 3}
    for name, shape in source_shapes(pieces).items():
        # The router stays wide: its rounding changes which experts a token visits, not just by how much.
        wanted = gguf.TABLES.get(form, form) if name in tables else form
        if form in MIXTURES:
            wanted = format_in(form, name, config)
        stored = "float32" if name in wide else gguf.storable_format(shape, wanted)
        tensors[name] = (shape, stored)
        if stored not in (wanted, "float32"):
            narrow.append(name)
    metadata, notes = _gguf_metadata(checkpoint, family.config_to_gguf, form)
    constants = {name: np.array(values, dtype=np.float32) for name, values in gguf_tensors(config).items()}
    tensors |= {name: (values.shape, "float32") for name, values in constants.items()}
    if narrow:
        instead = " or ".join(sorted({tensors[name][1] for name in narrow}))
        notes.append(
            f"{len(narrow)} tensors whose rows are no whole {form} blocks are stored as {instead}: {narrow[:3]}"
        )
    files = gguf.plan_gguf(file, metadata, tensors)
    return Plan("gguf", form, pieces, tensors, files, constants=constants, notes=notes)


_FILE_TYPE = {
    "float32": 0, "float16": 1, "q4_0": 2, "q8_0": 7, "q2_k": 10, "q3_k": 11, "q4_k": 14, "q5_k": 16, "q6_k": 18,
    "q3_k_s": 11, "q3_k_m": 12, "q3_k_l": 13, "q4_k_s": 14, "q4_k_m": 15, "q5_k_s": 16, "q5_k_m": 17,
    "iq4_nl": 25, "iq4_xs": 30, "bfloat16": 32, "mxfp4": 38,
}  # fmt: skip
"""GGUF's general.file_type, for people and file browsers; the K formats' are those called S."""


def _gguf_metadata(
    checkpoint: Checkpoint, to_gguf: Callable[[ModelConfig], dict[str, object]], form: str
) -> tuple[dict[str, Typed], list[str]]:
    config = checkpoint.config
    metadata = {
        "general.architecture": Typed("string", families.family_of(config).gguf_archs[0]),
        "general.name": Typed("string", checkpoint.path.stem),
        "general.file_type": Typed("uint32", _FILE_TYPE[form]),
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
            notes.append("the checkpoint has no tokenizer, so the GGUF file has none: llama.cpp needs one to chat")
        else:
            vocabulary = {key: Typed(kind, value) for key, (kind, value) in found.items()}
    # The vocabulary's eos token comes first (templates name it); the configuration's other ends stay beside it.
    eos = vocabulary.get("tokenizer.ggml.eos_token_id")
    if eos is not None:
        config = replace(config, eos_ids=tuple(dict.fromkeys((eos.value, *config.eos_ids))))
    keys = to_gguf(config)
    translated = {key: Typed(_gguf_type(value), value) for key, value in keys.items()}
    return {**metadata, **translated, **vocabulary}, notes


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


# Writing -------------------------------------------------------------------------------------------------------------


class _Writer:
    """Fills the planned files inside the work folder, tensor by tensor, remembering which are safe."""

    def __init__(self, work: Path, plan: Plan, fingerprint: str, resume: bool) -> None:
        self.work, self.plan, self.fingerprint = work, plan, fingerprint
        self.hashes: dict[str, str] = {}
        self._open: dict[str, int] = {}
        self._unsafe: list[str] = []
        self._unsafe_bytes = 0
        self._broken = False
        self._syncing: Future[None] | None = None
        if work.exists() and resume:
            self.hashes = self._finished()
        else:
            shutil.rmtree(work, ignore_errors=True)
        try:
            work.mkdir(parents=True, exist_ok=True)
            for file, size in plan.files.sizes.items():
                fd = os.open(work / file, os.O_RDWR | os.O_CREAT, 0o644)
                self._open[file] = fd
                os.ftruncate(fd, size)
                _write_all(fd, plan.files.headers[file], 0)
            if not (work / _JOURNAL).exists():
                self._append([{"fingerprint": fingerprint}])
        except OSError as error:
            raise self._failed(error) from None

    def _finished(self) -> dict[str, str]:
        """Tensors an earlier run has put safely on disk, or an error if that run was of something else."""
        journal = self.work / _JOURNAL
        if not journal.is_file():
            return {}
        lines = []
        for line in journal.read_text().splitlines():
            try:
                lines.append(json.loads(line))
            except ValueError:
                break  # the crash tore the last line; that tensor is done again
        if not lines:
            journal.unlink()
            return {}
        if lines[0].get("fingerprint") != self.fingerprint:
            raise CheckpointError(
                f"{self.work} holds an unfinished conversion of another source or with other options. "
                "Remove it, or start over with --restart."
            )
        return {line["tensor"]: line["sha256"] for line in lines[1:]}

    def run(self, checkpoint: Checkpoint, progress: Progress | None, importance: Mapping[str, Array]) -> None:
        """Write what is missing, then the small files. One thread hashes and writes while the others make the next."""
        total = sum(_nbytes(self.plan, name) for name in self.plan.tensors)
        done = sum(_nbytes(self.plan, name) for name in self.hashes)
        try:
            with ThreadPoolExecutor(1) as self._syncer, ThreadPoolExecutor(1) as background:
                writing: deque[Future[tuple[str, int]]] = deque()
                for name, parts in self._missing(checkpoint, importance):
                    # A tensor of one part is written while the next is made; longer ones part by part, as they come.
                    digest = hashlib.sha256()
                    for raw, at in parts:
                        writing.append(background.submit(self._in_order, self._write, name, raw, at, digest))
                        while len(writing) > _PARTS_WAITING:
                            done += self._written(writing.popleft(), total, done, progress)
                    writing.append(background.submit(self._in_order, self._finish, name, digest))
                while writing:
                    done += self._written(writing.popleft(), total, done, progress)
                self._start_sync()
                self._wait_for_sync()
            self._small_files(checkpoint)
        except OSError as error:
            raise self._failed(error) from None
        finally:
            for fd in self._open.values():
                os.close(fd)

    def _missing(
        self, checkpoint: Checkpoint, importance: Mapping[str, Array]
    ) -> Iterator[tuple[str, Iterator[tuple[memoryview, int]]]]:
        """The tensors that are not on disk yet, and the parts of each."""
        if self.plan.packed:
            yield from _packed_parts(checkpoint, self.plan, importance, self.hashes)
            return
        by_tensor: dict[str, list[Piece]] = {}
        for piece in self.plan.pieces:
            by_tensor.setdefault(piece.source, []).append(piece)
        for name, pieces in by_tensor.items():
            if name not in self.hashes:
                yield name, _named(name, _encoded(checkpoint, self.plan, name, pieces, importance))
        for name, values in self.plan.constants.items():
            if name not in self.hashes:
                yield name, iter([(encode(values, "float32"), 0)])

    def _in_order(self, task: Callable[..., tuple[str, int]], *args: object) -> tuple[str, int]:
        """Run in the background, but nothing after a failure: a tensor with a lost part must not count as finished."""
        if self._broken:
            return "", 0
        try:
            return task(*args)
        except BaseException:
            self._broken = True
            raise

    def _write(self, name: str, raw: memoryview, at: int, digest: _Digest) -> tuple[str, int]:
        file, offset = self.plan.files.places[name]
        _write_all(self._open[file], raw, offset + at)
        digest.update(raw)
        return name, len(raw)

    def _written(self, future: Future[tuple[str, int]], total: int, done: int, progress: Progress | None) -> int:
        name, nbytes = future.result()
        if progress is not None and nbytes:
            progress(done + nbytes, total, name)
        return nbytes

    def _finish(self, name: str, digest: _Digest) -> tuple[str, int]:
        self.hashes[name] = digest.hexdigest()
        self._unsafe.append(name)
        self._unsafe_bytes += _nbytes(self.plan, name)
        if self._unsafe_bytes >= _SYNC_BYTES:
            self._start_sync()
        return name, 0

    def _start_sync(self) -> None:
        """Put the finished tensors on disk, while the next are made and written; one such round at a time."""
        self._wait_for_sync()
        names, self._unsafe, self._unsafe_bytes = self._unsafe, [], 0
        self._syncing = self._syncer.submit(self._sync, names)

    def _wait_for_sync(self) -> None:
        if self._syncing is not None:
            self._syncing.result()

    def _sync(self, names: list[str]) -> None:
        """Data first, then the journal that vouches for it."""
        for fd in self._open.values():
            os.fsync(fd)
        self._append([{"tensor": name, "sha256": self.hashes[name]} for name in names])

    def _append(self, lines: list[dict[str, str]]) -> None:
        with (self.work / _JOURNAL).open("a") as journal:
            journal.writelines(json.dumps(line) + "\n" for line in lines)
            journal.flush()
            os.fsync(journal.fileno())

    def _small_files(self, checkpoint: Checkpoint) -> None:
        for name, content in self.plan.extra.items():
            with (self.work / name).open("wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
        if self.plan.to == "quadriga":
            entries = {
                name: engine_file.Entry(
                    file=self.plan.files.places[name][0],
                    offset=self.plan.files.places[name][1],
                    shape=shape,
                    format=form,
                    nbytes=_nbytes(self.plan, name),
                    sha256=self.hashes[name],
                )
                for name, (shape, form) in self.plan.tensors.items()
            }
            engine_file.write_manifest(
                self.work,
                engine_file.Manifest(
                    config=checkpoint.config,
                    parameters=entries,
                    made_from=checkpoint.path.name + (f", {checkpoint.recipe}" if checkpoint.recipe else ""),
                    packed=bool(self.plan.packed),
                ),
            )
        _sync_directory(self.work)

    def _failed(self, error: OSError) -> CheckpointError:
        return CheckpointError(
            f"cannot write to {self.work}: {error.strerror}. What was finished is kept: free some space or fix the "
            "cause and run the same command again, it goes on from there."
        )


def _packed_parts(
    checkpoint: Checkpoint, plan: Plan, importance: Mapping[str, Array], finished: Collection[str]
) -> Iterator[tuple[str, Iterator[tuple[memoryview, int]]]]:
    """Packed matrices and vectors: one thread reads ahead while the others pack."""
    missing = [
        (part, name, expert)
        for name, shape in parameter_shapes(checkpoint.config).items()
        for expert, part in enumerate([f"{name}/{e}" for e in range(shape[0])] if len(shape) == 3 else [name])
        if part not in finished
    ]
    # Fresh memory costs a page fault every 4 kB, a third of the time: results take turns in a few buffers.
    buffers = [allocate(max(_nbytes(plan, part) for part in plan.tensors)) for _ in range(_PARTS_WAITING + 2)]

    def read(part: str, name: str, expert: int) -> Unpacked | Array:
        shape, form = plan.tensors[part]
        if len(shape) == 1:
            return np.ascontiguousarray(as_float32(checkpoint.parameters.read(name)))
        return read_matrix(checkpoint, name, expert, form)

    with ThreadPoolExecutor(1) as reader:
        ahead = deque(reader.submit(read, *one) for one in missing[:_READ_AHEAD])
        for index, (part, _, _) in enumerate(missing):
            got = ahead.popleft().result()
            if index + _READ_AHEAD < len(missing):
                ahead.append(reader.submit(read, *missing[index + _READ_AHEAD]))
            if not isinstance(got, Unpacked):
                yield part, iter([(raw_bytes(got).data, 0)])
                continue
            out = buffers[index % len(buffers)][: _nbytes(plan, part)]
            packed = got.pack(plan.tensors[part][1], out=out, importance=importance.get(part))
            yield part, iter([(packed.data.data, 0)])


def _encoded(
    checkpoint: Checkpoint, plan: Plan, name: str, pieces: list[Piece], importance: Mapping[str, Array]
) -> Iterator[tuple[memoryview, int]]:
    """The bytes of one result tensor in parts, each with its place inside the tensor."""
    shape, form = plan.tensors[name]
    if not importance and _is_there_already(checkpoint, name, form, pieces):
        yield from _as_stored(checkpoint, name, shape, form)
        return
    if any(piece.stride is not None for piece in pieces):
        yield from _taking_turns(checkpoint, shape, form, pieces)
        return
    for piece in pieces:
        for cut in slices(piece, SLICE_BYTES // 4):
            values = pack(checkpoint.parameters.read(cut.target, cut.target_box), cut)
            box = cut.source_box or whole(shape)
            # A run of rows is one run of bytes; where the box leaves out part of axis 1 (gate and up of every expert
            # in one tensor), each index of axis 0 is a run of its own.
            split = len(shape) > 1 and box[1] != (0, shape[1])
            assert all(r == (0, n) for r, n in zip(box[2:], shape[2:], strict=True)), "parts are runs of rows"
            by_expert = len(cut.target_shape) == 3 and len(shape) == 3 and any("/" in part for part in importance)
            for start, run in enumerate(values, box[0][0]) if split or by_expert else ((box[0][0], values),):
                encoded = encode(run, form, _importance_of(cut, importance, start - box[0][0]))
                yield encoded, FORMATS[form].nbytes_of((_first_element(((start, 0), *box[1:]), shape),))


def _is_there_already(checkpoint: Checkpoint, name: str, form: str, pieces: list[Piece]) -> bool:
    """True if the source is a GGUF file with this very tensor in this very format."""
    source = checkpoint.source
    if not isinstance(source, GGUFSource) or name not in source.tensors or source.tensors[name].dtype != form:
        return False
    theirs = [piece for piece in checkpoint.pieces if piece.source == name]
    return sorted(map(repr, theirs)) == sorted(map(repr, pieces))


def _as_stored(checkpoint: Checkpoint, name: str, shape: Shape, form: str) -> Iterator[tuple[memoryview, int]]:
    """A tensor's own bytes: to round its numbers once more would only lose some."""
    assert isinstance(checkpoint.source, GGUFSource), "bytes of a GGUF file"
    row_bytes, rows = FORMATS[form].nbytes_of(shape[-1:]), prod(shape[:-1])
    step = max(1, SLICE_BYTES // row_bytes)
    for start in range(0, rows, step):
        yield checkpoint.source.raw(name, start, min(start + step, rows)).data, start * row_bytes


def _importance_of(cut: Piece, importance: Mapping[str, Array], index: int) -> Array | None:
    """The importance of the columns of a run that starts at the cut's first axis' ``index``; None: nothing is known."""
    columns = (cut.target_box or whole(cut.target_shape))[-1]
    if cut.transpose or columns != (0, cut.target_shape[-1]):
        return None
    if len(cut.target_shape) < 3:
        return importance.get(cut.target)
    first = (cut.target_box or whole(cut.target_shape))[0][0]
    return importance.get(f"{cut.target}/{first + index}")


def _taking_turns(
    checkpoint: Checkpoint, shape: Shape, form: str, pieces: list[Piece]
) -> Iterator[tuple[memoryview, int]]:
    """The parts of a tensor whose pieces lie between each other: cut alike, and put together before writing."""
    for cuts in zip(*(slices(piece, SLICE_BYTES // 4) for piece in pieces), strict=True):
        spans = {(cut.source_box or whole(shape))[0] for cut in cuts}
        assert len(spans) == 1, "pieces that take turns are cut at the same rows"
        start, stop = next(iter(spans))
        parts = [pack(checkpoint.parameters.read(cut.target, cut.target_box), cut) for cut in cuts]
        together = np.empty((stop - start, *shape[1:]), dtype=functools.reduce(wider, (part.dtype for part in parts)))
        for cut, part in zip(cuts, parts, strict=True):
            _, *inner = source_index(cut)
            together[(slice(None), *inner)] = part
        yield encode(together, form), FORMATS[form].nbytes_of((start, *shape[1:]))


def _named(name: str, parts: Iterator[tuple[memoryview, int]]) -> Iterator[tuple[memoryview, int]]:
    """The parts; an error about their numbers says which tensor they are of."""
    try:
        yield from parts
    except CheckpointError as error:
        raise CheckpointError(f"{name}: {error}") from None


def _first_element(box: tuple[tuple[int, int], ...], shape: Shape) -> int:
    index = 0
    for (start, _), size in zip(box, shape, strict=True):
        index = index * size + start
    return index


def encode(values: Array, form: str, importance: Array | None = None) -> memoryview:
    """An array's numbers in a stored format, as bytes.

    Args:
        values: whole rows, (..., columns).
        importance: (columns,), for formats that are searched; see ``quant.codec.quantize``.

    Raises:
        CheckpointError: a finite number is beyond float16's largest, 65504: it would become infinite in silence.
    """
    if form in PLAIN:
        with np.errstate(over="ignore"):  # what became infinite is refused below
            plain = values.astype(NUMPY[form], copy=False)
        if form == "float16" and plain.dtype != values.dtype and not np.array_equal(np.isinf(plain), np.isinf(values)):
            raise CheckpointError(
                f"a weight of {float(np.abs(as_float32(values)).max()):g} does not fit float16, whose largest number "
                "is 65504. Choose bfloat16 or float32."
            )
        return raw_bytes(plain).data
    return codec.quantize(np.ascontiguousarray(as_float32(values)), form, importance).data


def _write_all(fd: int, raw: bytes | memoryview, offset: int) -> None:
    view = memoryview(raw)
    while len(view):
        written = os.pwrite(fd, view[: 1 << 30], offset)
        view, offset = view[written:], offset + written


def _sync_directory(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _nbytes(plan: Plan, name: str) -> int:
    shape, form = plan.tensors[name]
    if plan.packed:
        return engine_file.packed_bytes(shape, form)
    return FORMATS[form].nbytes_of(shape)


def _fingerprint(checkpoint: Checkpoint, plan: Plan) -> str:
    """Changes whenever the source's files, what is done to them, or the planned bytes do."""
    path = checkpoint.origin.path
    files = [path] if path.is_file() else sorted(f for f in path.iterdir() if f.is_file())
    seen: list[Any] = [(f.name, f.stat().st_size, f.stat().st_mtime_ns) for f in files]
    digest = hashlib.sha256(json.dumps([str(path.resolve()), seen]).encode())
    for file, header in sorted(plan.files.headers.items()):
        digest.update(file.encode() + header)
    digest.update(json.dumps([plan.packed, checkpoint.recipe] if checkpoint.recipe else plan.packed).encode())
    return digest.hexdigest()


# Dry run -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class DryRun:
    """What a conversion of a checkpoint would read, from its configuration and index alone."""

    layout: str
    n_tensors: int
    n_parameters: int
    n_numbers: int
    n_files: int
    files_present: int
    source_of: dict[str, list[str]]
    """Parameter -> the stored tensors that fill it."""


def dry_run(path: Path, *, pickles: bool = False) -> DryRun:
    """Map a checkpoint by name and shape without its weights: config.json and an index are enough.

    Where the shards are missing, shapes are those the configuration demands; where they are there, the stored ones.

    Raises:
        CheckpointError: names (or, with shards, shapes) that do not match, with both lists.
        ConfigError: a configuration no model of ours can have.
    """
    table: dict[str, str] = {}
    if (path / INDEX).is_file() and (path / "config.json").is_file():
        table = read_json(path / INDEX).get("weight_map") or {}
        if not isinstance(table, dict) or not all(isinstance(f, str) for f in table.values()):
            raise CheckpointError(f"{INDEX} must have a 'weight_map' from tensor names to file names")
    files = set(table.values())
    if all((path / file).is_file() for file in files):
        checkpoint = open_checkpoint(path, pickles=pickles)
        checkpoint.close()
        return _report(checkpoint.layout, checkpoint.pieces, len(files) or 1, len(files) or 1)
    found = locate(path)
    config = found.config
    family = families.family_of(config)
    names = of_numbers(table) if found.method is None else quantised.of_numbers(table, found.method)
    layout, pieces = pick_layout(family, config, dict.fromkeys(names, ()))
    demanded = source_shapes(pieces)
    named = {name: demanded.get(name, ()) for name in names}
    check_cover(pieces, parameter_shapes(config), without_extras(family, config, named, pieces))
    return _report(layout, pieces, len(files), sum((path / file).is_file() for file in files))


def _report(layout: str, pieces: list[Piece], n_files: int, present: int) -> DryRun:
    source_of: dict[str, list[str]] = {}
    for piece in pieces:
        source_of.setdefault(piece.target, []).append(piece.source)
    stored = source_shapes(pieces)
    n_numbers = sum(prod(shape) for shape in stored.values())
    return DryRun(layout, len(stored), len(source_of), n_numbers, n_files, present, source_of)
