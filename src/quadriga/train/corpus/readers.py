"""Read text from JSONL (also compressed with zstd or gzip), Parquet and plain files, in chunks set by the recipe.

A chunk is the work of one task and becomes one shard: whole small files, byte ranges of a large JSONL file, or row
groups of a Parquet file. Compressed files cannot be cut and stay whole. Rows are read one at a time.
"""

from __future__ import annotations

import gzip
import io
import zlib
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, cast

import msgspec

from quadriga import runtime
from quadriga.errors import ConfigError, CorpusError
from quadriga.hub import data_sets
from quadriga.train.corpus.recipe import Recipe, Source, check_domain

SUFFIXES = (".jsonl", ".jsonl.zst", ".jsonl.gz", ".parquet", ".txt", ".md")
MAX_LINE_BYTES = 64 << 20
"""Longer rows are refused, because a compressed file could otherwise fill the memory."""


class Part(msgspec.Struct, frozen=True, kw_only=True):
    """A part of a file: a range of bytes (JSONL) or row groups (Parquet), or the whole file (stop = -1)."""

    path: str
    start: int = 0
    stop: int = -1


class Chunk(msgspec.Struct, frozen=True, kw_only=True):
    """The file parts that one task reads."""

    number: int
    source: int
    parts: list[Part]
    n_bytes: int


class Row(msgspec.Struct, frozen=True, kw_only=True):
    """A document as it was read; ``number`` is its row in the chunk, counted from 0."""

    number: int
    text: str
    domain: str


def resolve(path: str) -> Path:
    """Resolve a recipe's path on this machine; ``data:`` begins the name of a data set's file (``hub.data_sets``).

    Raises:
        CatalogueError: there is no such data here.
    """
    return data_sets.path_of(path.removeprefix("data:")) if path.startswith("data:") else Path(path).expanduser()


def expand(paths: list[str], suffixes: tuple[str, ...]) -> list[str]:
    """Expand files, folders (recursively) and globs to files, written as in a recipe; sorted within each path.

    Raises:
        CorpusError: a path leads to no file with one of the suffixes.
    """
    found: dict[str, None] = {}
    for given in paths:
        if given.startswith("data:"):
            found |= dict.fromkeys(f"data:{name}" for name in _data_files(given, suffixes))
            continue
        root = resolve(given)
        if any(c in given for c in "*?["):
            fixed = next(i for i, part in enumerate(root.parts) if set(part) & set("*?["))
            base = Path(*root.parts[:fixed])
            files = sorted(base.glob(str(root.relative_to(base))))
        elif root.is_dir():
            files = sorted(root.rglob("*"))
        else:
            files = [root]
        kept = [file for file in files if file.is_file() and file.name.endswith(suffixes)]
        if not kept:
            raise CorpusError(f"{given!r} must lead to files ending in {', '.join(suffixes)}; there is none at {root}")
        for file in kept:
            found[str(file)] = None
    return list(found)


def _data_files(given: str, suffixes: tuple[str, ...]) -> list[str]:
    pattern = given.removeprefix("data:").strip("/")
    fixed = next((i for i, c in enumerate(pattern) if c in "*?["), len(pattern))
    folder = pattern if fixed == len(pattern) else pattern[:fixed].rpartition("/")[0]
    names = [name for name in data_sets.listing(folder) if name.endswith(suffixes)]
    if fixed < len(pattern):
        names = [name for name in names if PurePosixPath(name).match(pattern)]
    if not names:
        raise CorpusError(
            f"{given!r} must lead to files ending in {', '.join(suffixes)}; there is none. "
            f"{data_sets.how_to_get(pattern)}"
        )
    return names


def plan_chunks(recipe: Recipe, chunk_bytes: int) -> list[Chunk]:
    """Plan all chunks. Of several duplicates the first in this order is kept, so held-out sources come first.

    Raises:
        CorpusError: a source leads to no file.
    """
    if chunk_bytes < 1:
        raise ConfigError(f"chunk must be at least one byte, got {chunk_bytes}")
    chunks: list[Chunk] = []
    data_sets.log_samples(
        path.removeprefix("data:")
        for source in recipe.sources
        for path in expand(source.paths, SUFFIXES)
        if path.startswith("data:")
    )
    by_split = sorted(range(len(recipe.sources)), key=lambda i: recipe.sources[i].split != "held_out")
    for i in by_split:
        open_parts: list[Part] = []
        size = 0
        for path in expand(recipe.sources[i].paths, SUFFIXES):
            for part, n_bytes in _parts(path, chunk_bytes):
                if open_parts and size + n_bytes > chunk_bytes:
                    chunks.append(Chunk(number=len(chunks), source=i, parts=open_parts, n_bytes=size))
                    open_parts, size = [], 0
                open_parts.append(part)
                size += n_bytes
        chunks.append(Chunk(number=len(chunks), source=i, parts=open_parts, n_bytes=size))
    return chunks


def _parts(path: str, chunk_bytes: int) -> Iterator[tuple[Part, int]]:
    file = resolve(path)
    size = file.stat().st_size
    if path.endswith(".jsonl") and size > chunk_bytes:
        n = -(-size // chunk_bytes)
        cuts = [size * i // n for i in range(n + 1)]
        for start, stop in pairwise(cuts):
            yield Part(path=path, start=start, stop=stop), stop - start
    elif path.endswith(".parquet"):
        yield from _row_groups(path, chunk_bytes)
    else:
        yield Part(path=path), size


def _row_groups(path: str, chunk_bytes: int) -> Iterator[tuple[Part, int]]:
    meta = _parquet(path).metadata
    first = size = 0
    for group in range(meta.num_row_groups):
        n_bytes = meta.row_group(group).total_byte_size
        if group > first and size + n_bytes > chunk_bytes:
            yield Part(path=path, start=first, stop=group), size
            first, size = group, 0
        size += n_bytes
    yield Part(path=path, start=first, stop=meta.num_row_groups), size


def read_chunk(chunk: Chunk, source: Source, dropped: dict[str, int]) -> Iterator[Row]:
    """Read the rows of a chunk, in order. Bad rows of a source with bad_rows = "drop" are counted in ``dropped``.

    Raises:
        CorpusError: a file cannot be read, or a row is bad and the source does not allow dropping it.
    """
    number = 0
    for part in chunk.parts:
        for place, fields in _read_part(part, source):
            try:
                yield _row(fields, number, part.path, source)
            except CorpusError as error:
                if source.bad_rows == "refuse":
                    hint = 'Or set bad_rows = "drop" for this source.'
                    raise CorpusError(f"{part.path}, {place}: {error}. {hint}") from None
                dropped["bad row"] = dropped.get("bad row", 0) + 1
            number += 1


def _row(fields: Any, number: int, path: str, source: Source) -> Row:
    if isinstance(fields, CorpusError):
        raise fields
    if not isinstance(fields, dict) or not isinstance(fields.get(source.text), str):
        got = ", ".join(sorted(fields)) if isinstance(fields, dict) else type(fields).__name__
        if isinstance(fields, dict) and source.text in fields:
            got = f"a value of type {type(fields[source.text]).__name__}"
        raise CorpusError(f"a row must have its text in the string field {source.text!r}; got {got}")
    return Row(number=number, text=fields[source.text], domain=_domain(fields, path, source))


def _domain(fields: dict[str, Any], path: str, source: Source) -> str:
    if source.domain is not None:
        return source.domain
    if source.domain_field is None:
        name = "".join(c if c.isascii() and (c.isalnum() or c in "-_") else "_" for c in Path(path).name.split(".")[0])
        return check_domain(name[:64] or "text")
    value = fields.get(source.domain_field)
    if not isinstance(value, str):
        raise CorpusError(f"a row must have its domain in the string field {source.domain_field!r}; got {value!r}")
    try:
        return check_domain(value)
    except ConfigError as error:
        raise CorpusError(str(error)) from None


def _read_part(part: Part, source: Source) -> Iterator[tuple[str, Any]]:
    """Yield (location, row or an error) for each row."""
    try:
        if part.path.endswith(".parquet"):
            yield from _parquet_rows(part, source)
        elif part.path.endswith((".txt", ".md")):
            yield "the file", _decode_text(resolve(part.path).read_bytes(), source)
        else:
            yield from _json_lines(part)
    except (OSError, EOFError, zlib.error) as error:
        raise CorpusError(f"cannot read {part.path}: {getattr(error, 'strerror', None) or error}") from None


def _decode_text(raw: bytes, source: Source) -> Any:
    try:
        return {source.text: raw.decode("utf-8-sig")}
    except UnicodeDecodeError as error:
        return CorpusError(f"text must be UTF-8: {error}")


def _json_lines(part: Part) -> Iterator[tuple[str, Any]]:
    decoder = msgspec.json.Decoder()
    with _open_lines(part.path) as file:
        if part.start:
            file.seek(part.start - 1)
            file.readline()  # a line belongs to the part in which it starts
        while part.stop < 0 or file.tell() < part.stop:
            where = f"byte {file.tell()}"
            line = file.readline(MAX_LINE_BYTES + 1)
            if not line:
                return
            if len(line) > MAX_LINE_BYTES:
                raise CorpusError(f"{part.path}, {where}: a row has more than {MAX_LINE_BYTES} bytes")
            if not line.strip():
                continue
            try:
                yield where, decoder.decode(line)
            except (msgspec.DecodeError, UnicodeDecodeError) as error:
                yield where, CorpusError(f"a line must be one JSON object: {error}")


def _open_lines(path: str) -> BinaryIO:
    file = resolve(path)
    if path.endswith(".zst"):
        import zstandard

        try:
            raw = zstandard.ZstdDecompressor().stream_reader(file.open("rb"), closefd=True, read_across_frames=True)
            return cast(BinaryIO, _ZstdLines(raw, path))
        except zstandard.ZstdError as error:
            raise CorpusError(f"{path} is not a zstd file: {error}") from None
    if path.endswith(".gz"):
        return cast(BinaryIO, gzip.open(file, "rb"))
    return file.open("rb")


class _ZstdLines(io.BufferedReader):
    """Decompressed lines; damage in the stream raises CorpusError."""

    def __init__(self, raw: Any, path: str) -> None:
        super().__init__(raw, 1 << 20)
        self._path, self._place = path, 0

    def readline(self, size: int | None = -1) -> bytes:
        import zstandard

        try:
            line = super().readline(size)
        except zstandard.ZstdError as error:
            raise CorpusError(f"{self._path} is damaged: {error}") from None
        self._place += len(line)
        return line

    def tell(self) -> int:
        return self._place


def _parquet(path: str) -> Any:
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError:
        raise ConfigError(f"reading Parquet needs pyarrow: {runtime.install_hint('train')}") from None
    try:
        return pq.ParquetFile(resolve(path))
    except (pa.ArrowException, OSError) as error:
        raise CorpusError(f"{path} cannot be read as Parquet: {error}") from None


def _parquet_rows(part: Part, source: Source) -> Iterator[tuple[str, Any]]:
    file = _parquet(part.path)
    columns = [name for name in (source.text, source.domain_field) if name is not None]
    missing = [name for name in columns if name not in file.schema_arrow.names]
    if missing:
        raise CorpusError(
            f"{part.path} must have the columns {', '.join(columns)}; got {', '.join(file.schema_arrow.names)}"
        )
    row = 0
    groups = list(range(part.start, part.stop))
    for batch in file.iter_batches(batch_size=256, row_groups=groups, columns=columns) if groups else ():
        for fields in _python_rows(batch):
            yield f"row {row} of row groups {part.start} to {part.stop - 1}", fields
            row += 1


def _python_rows(batch: Any) -> Iterator[Any]:
    """The rows of an Arrow batch; one whose text is not UTF-8, which a file may hold, is an error in its place."""
    try:
        yield from batch.to_pylist()
    except UnicodeDecodeError:
        for i in range(len(batch)):
            try:
                yield batch.slice(i, 1).to_pylist()[0]
            except UnicodeDecodeError as error:
                yield CorpusError(f"text must be UTF-8: {error}")
