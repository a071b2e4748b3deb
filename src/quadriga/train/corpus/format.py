"""The on-disk format of a prepared corpus, and how to read it; ``corpus.pipeline`` writes it.

    OUT/
      manifest.json                 written last: recipe, tokenizer, steps with their counts, files with their sha256
      tokenizer.json | *.tiktoken   the tokenizer of the ids, with its configuration
      train/en/00003.tokens.npy     ids, uint16 or uint32; every document ends with the end token
      train/en/00003.ends.npy       int64: where each document ends in it
      train/en/00003.origin.npy     (row of the input, bytes of text) of each document
      train/en/00003.sums.npy       uint32: CRC-32 of every 64 KiB of ids
      held_out/en/...               the same, for documents that are never trained on

A shard has the documents of one input chunk, one split and one domain. A domain is the concatenation of its shards, and
any token of it is found by two binary searches, without a table in memory that grows with the corpus.

What is read is checked: a shard's ends and sums against their sha256 when it is opened, and ids block by block when a
process first reads them. A corpus of an earlier version has no sums; the whole file of ids is then hashed instead.

All files are plain .npy: other programs can read them with ``numpy.load(file, mmap_mode="r")``.
"""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Iterator
from itertools import accumulate
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt

from quadriga import runtime
from quadriga.errors import CorpusError
from quadriga.train.corpus.object_store import Recent, StoredFolder, is_address

VERSION = 1
SPLITS = ("train", "held_out")
ORIGIN = np.dtype([("row", "<u4"), ("n_bytes", "<u4")])
PARTS = ("tokens", "ends", "origin", "sums")
READ_PARTS = ("tokens", "ends", "sums")
"""The parts of a shard that a run reads."""
CACHE_BYTES = 20 * 10**9
"""Most bytes of shards that a process keeps of a corpus in an object store."""
_BLOCK_BYTES = 1 << 16

Tokens = npt.NDArray[np.uint16] | npt.NDArray[np.uint32]


class FileEntry(msgspec.Struct, frozen=True, kw_only=True):
    """A file of the corpus, with its size and sha256."""

    path: str
    n_bytes: int
    sha256: str


class ShardEntry(msgspec.Struct, frozen=True, kw_only=True):
    """One shard: a chunk's documents of one split and domain."""

    name: str
    """``train/en/00003``: its files are ``name.tokens.npy`` and so on."""
    split: str
    domain: str
    chunk: int
    n_documents: int
    n_tokens: int
    n_text_bytes: int
    files: list[FileEntry]


class TokenizerEntry(msgspec.Struct, frozen=True, kw_only=True):
    """The tokenizer that the corpus was encoded with."""

    files: list[FileEntry]
    n_vocab: int
    end_id: int
    """Id of the token that ends every document."""
    dtype: str


class InputEntry(msgspec.Struct, frozen=True, kw_only=True):
    """An input file, with its size and sha256 when it was read."""

    path: str
    n_bytes: int
    sha256: str


class ChunkEntry(msgspec.Struct, frozen=True, kw_only=True):
    """The parts of the input that a chunk consists of: byte ranges of JSONL, row groups of Parquet."""

    source: int
    path: str
    start: int
    stop: int


class Manifest(msgspec.Struct, frozen=True, kw_only=True):
    """Everything needed to make the corpus again and to check that it is the same."""

    version: int
    pipeline: int
    """``corpus.pipeline.PIPELINE`` of the version that wrote it."""
    recipe: dict[str, Any]
    inputs: list[InputEntry]
    chunks: list[ChunkEntry]
    references: list[InputEntry]
    """Benchmark files that were removed from the text."""
    tokenizer: TokenizerEntry
    steps: list[dict[str, Any]]
    """Counts of each step: what came in, what was kept, what was dropped and why."""
    shards: list[ShardEntry]
    fingerprint: str
    """sha256 over tokenizer and shards: corpora with equal fingerprints have equal tokens."""


def fingerprint(tokenizer: TokenizerEntry, shards: list[ShardEntry]) -> str:
    """Hash of the tokenizer and of the order and content of all shards."""
    digest = hashlib.sha256(f"quadriga corpus {VERSION} {tokenizer.end_id}".encode())
    files = [*tokenizer.files, *(file for shard in shards for file in shard.files)]
    for file in (file for file in files if not file.path.endswith(".sums.npy")):  # they follow from the ids
        digest.update(f"\n{file.path} {file.sha256}".encode())
    return digest.hexdigest()


def file_sha256(path: Path) -> str:
    """sha256 of a file, as hex digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def block_sums(tokens: Tokens) -> npt.NDArray[np.uint32]:
    """CRC-32 of every 64 KiB of ids, the last block shorter."""
    n = _BLOCK_BYTES // tokens.itemsize
    return np.array([zlib.crc32(tokens[a : a + n].data) for a in range(0, len(tokens), n)], dtype=np.uint32)


class Shard:
    """One shard, memory-mapped.

    Raises:
        CorpusError: a file is damaged.
    """

    def __init__(self, root: Path, entry: ShardEntry, tokenizer: TokenizerEntry) -> None:
        self.entry = entry
        digests = {file.path.removeprefix(f"{entry.name}."): file.sha256 for file in entry.files}
        for part in ("ends.npy", "sums.npy" if "sums.npy" in digests else "tokens.npy"):
            if part in digests and file_sha256(root / f"{entry.name}.{part}") != digests[part]:
                raise _damaged(f"{entry.name}.{part}", "its sha256 is not the manifest's")
        self.tokens: Tokens = _map(root / f"{entry.name}.tokens.npy", np.dtype(tokenizer.dtype), entry.n_tokens)
        self.ends: npt.NDArray[np.int64] = _map(root / f"{entry.name}.ends.npy", np.dtype("<i8"), entry.n_documents)
        if len(self.ends) == 0 or self.ends[-1] != entry.n_tokens:
            raise CorpusError(
                f"{entry.name}.ends.npy must end at {entry.n_tokens}; the shard is damaged. Run `quadriga data inspect "
                "--verify`, then prepare the corpus again."
            )
        self._block = _BLOCK_BYTES // self.tokens.itemsize
        self._sums: npt.NDArray[np.uint32] | None = None
        if "sums.npy" in digests:
            n_blocks = -(-entry.n_tokens // self._block)
            self._sums = _map(root / f"{entry.name}.sums.npy", np.dtype(np.uint32), n_blocks)
            self._unread = np.ones(n_blocks, dtype=bool)

    def read(self, first: int, last: int) -> Tokens:
        """Ids [first, last) of the shard; blocks that this process has not read yet are checked.

        Raises:
            CorpusError: a block is not what was written.
        """
        if self._sums is not None and last > first:
            blocks = range(first // self._block, (last - 1) // self._block + 1)
            for block in (b for b in blocks if self._unread[b]):
                start = block * self._block
                if zlib.crc32(self.tokens[start : start + self._block].data) != self._sums[block]:
                    raise _damaged(f"{self.entry.name}.tokens.npy", f"ids from {start} on are not those written")
                self._unread[block] = False
        return self.tokens[first:last]


def _damaged(name: str, why: str) -> CorpusError:
    return CorpusError(
        f"{name} was changed: {why}. Find what else was by `quadriga data inspect --verify`, and prepare the corpus "
        "again."
    )


class Stream:
    """All documents of one domain and split, as one sequence of tokens."""

    def __init__(self, corpora: list[Corpus], domain: str, split: str) -> None:
        self.domain = domain
        self._shards = [
            (corpus, entry)
            for corpus in corpora
            for entry in corpus.manifest.shards
            if entry.domain == domain and entry.split == split
        ]
        self._starts = np.array([0, *accumulate(entry.n_tokens for _, entry in self._shards)], dtype=np.int64)
        self.n_tokens = int(self._starts[-1])
        self.n_documents = sum(entry.n_documents for _, entry in self._shards)
        self.n_text_bytes = sum(entry.n_text_bytes for _, entry in self._shards)

    def read(self, start: int, n: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """Read tokens [start, start + n) of the stream, which repeats endlessly.

        Returns:
            (ids, ends): n token ids, and the offsets in (0, n] at which documents end.
        """
        tokens = np.empty(n, dtype=np.int64)
        ends = []
        done = 0
        while done < n:
            place = (start + done) % self.n_tokens
            which = int(np.searchsorted(self._starts, place, side="right")) - 1
            corpus, entry = self._shards[which]
            shard = corpus.shard(entry.name)
            first = place - int(self._starts[which])
            last = min(entry.n_tokens, first + n - done)
            tokens[done : done + last - first] = shard.read(first, last)
            inside = slice(*np.searchsorted(shard.ends, (first, last), side="right"))
            ends.append(shard.ends[inside] - first + done)
            done += last - first
        if len(tokens) and tokens.max() >= self._shards[0][0].manifest.tokenizer.n_vocab:
            raise CorpusError(
                f"a token of domain {self.domain!r} near position {start} is outside the vocabulary: a shard is "
                "damaged. Find it with `quadriga data inspect --verify`."
            )
        return tokens, np.concatenate(ends) if ends else np.empty(0, dtype=np.int64)


class Corpus:
    """A prepared corpus, opened for reading.

    Args:
        path: its folder, or its address in an object store.
        cache_bytes: most bytes of shards that are kept of one in an object store.

    Raises:
        CorpusError: nothing prepared at ``path``, another version, or a file that is missing or of another size.
        ConfigError: an object store that cannot be reached from here (``corpus.object_store``).
    """

    def __init__(self, path: Path | str, cache_bytes: int = CACHE_BYTES) -> None:
        self.where = str(path)
        self._store = StoredFolder(str(path)) if is_address(path) else None
        if self._store is None:
            self.path = Path(path).expanduser()
            self.manifest = read_manifest(self.path)
        else:
            self.manifest = parse_manifest(self._store.read("manifest.json"), f"{path}/manifest.json")
            self.path = runtime.cache_dir() / "corpora" / self.manifest.fingerprint[:16]
        self._check_sizes()
        self._entries = {entry.name: entry for entry in self.manifest.shards}
        stored = self._store is not None
        self.shard = Recent(
            self._open_shard, size=self._bytes_of, let_go=self._remove if stored else lambda name: None,
            most_bytes=cache_bytes if stored else None,
            there=[name for name in self._entries if self._copied(name, "tokens").exists()] if stored else (),
        )  # fmt: skip
        """Open a shard by name, memory-mapped; recent ones are cached."""

    def _check_sizes(self) -> None:
        """Compare what is there with the manifest; a stored corpus's tokenizer is copied here."""
        sizes = None if self._store is None else self._store.sizes()
        for file in self.files():
            size = _size_of(self.path / file.path) if sizes is None else sizes.get(file.path)
            if size is None:
                raise CorpusError(f"{self.where}/{file.path} is missing or unreadable. Prepare it again.")
            if size != file.n_bytes:
                raise CorpusError(
                    f"{self.where}/{file.path} must have {file.n_bytes} bytes, got {size}. Prepare the corpus again."
                )
        if self._store is not None:
            for file in self.manifest.tokenizer.files:
                self._store.fetch(file.path, self.path)

    def _open_shard(self, name: str) -> Shard:
        entry = self._entries[name]
        wanted = [f"{name}.{part}.npy" for part in READ_PARTS]
        there = [file.path for file in entry.files if file.path in wanted]
        for file in there if self._store is not None else ():
            self.local(file)
        try:
            return Shard(self.path, entry, self.manifest.tokenizer)
        except CorpusError:
            if self._store is None or all((self.path / file).exists() for file in there):
                raise
        return self._open_shard(name)  # another process made room between the copy and the opening

    def _copied(self, name: str, part: str) -> Path:
        return self.path / f"{name}.{part}.npy"

    def _bytes_of(self, name: str) -> int:
        return sum(file.n_bytes for file in self._entries[name].files)

    def _remove(self, name: str) -> None:
        for part in READ_PARTS:
            self._copied(name, part).unlink(missing_ok=True)

    def local(self, name: str) -> Path:
        """A file of the corpus on this machine."""
        return self.path / name if self._store is None else self._store.fetch(name, self.path)

    @property
    def domains(self) -> tuple[str, ...]:
        """Names of the domains, sorted."""
        return tuple(sorted({shard.domain for shard in self.manifest.shards}))

    def files(self) -> Iterator[FileEntry]:
        """All files except the manifest."""
        yield from self.manifest.tokenizer.files
        for shard in self.manifest.shards:
            yield from shard.files

    def verify(self) -> list[str]:
        """Hash all files; returns the paths of those that differ from the manifest."""
        return [file.path for file in self.files() if self._digest(file.path) != file.sha256]

    def _digest(self, name: str) -> str:
        if self._store is None:
            return file_sha256(self.path / name)
        with self._store.open(name) as file:
            digest = hashlib.sha256()
            while block := file.read(1 << 24):
                digest.update(block)
        return digest.hexdigest()


def read_manifest(path: Path) -> Manifest:
    """Read the manifest of the corpus at ``path``.

    Raises:
        CorpusError: it is missing or malformed, or has another version.
    """
    file = path / "manifest.json"
    try:
        raw = file.read_bytes()
    except OSError as error:
        raise CorpusError(
            f"{path} must be a corpus that `quadriga data prepare` finished; its manifest.json cannot be read "
            f"({error.strerror})"
        ) from None
    return parse_manifest(raw, str(file))


def parse_manifest(raw: bytes, file: str) -> Manifest:
    """Parse a manifest's bytes; see :func:`read_manifest`. ``file`` is used in error messages."""
    try:
        manifest = msgspec.json.decode(raw, type=Manifest)
    except msgspec.DecodeError as error:
        raise CorpusError(f"{file} is not a corpus manifest: {error}") from None
    if manifest.version != VERSION:
        raise CorpusError(f"{file} must have version {VERSION}, got {manifest.version}. Prepare the corpus again.")
    paths = [entry.path for entry in manifest.tokenizer.files]
    for shard in manifest.shards:
        paths += [shard.name, *(entry.path for entry in shard.files)]
    for path_inside in paths:
        if Path(path_inside).is_absolute() or ".." in Path(path_inside).parts:
            raise CorpusError(f"{file} names {path_inside!r}, which is outside the corpus's folder")
    return manifest


def _size_of(file: Path) -> int | None:
    try:
        return file.stat().st_size
    except OSError:
        return None


def _map(path: Path, dtype: np.dtype[Any], length: int) -> Any:
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError) as error:
        raise CorpusError(f"{path} cannot be read as an array: {error}. Prepare the corpus again.") from None
    if array.dtype != dtype or array.shape != (length,):
        raise CorpusError(f"{path} must have {length} x {dtype}, got {array.shape} x {array.dtype}")
    return array
