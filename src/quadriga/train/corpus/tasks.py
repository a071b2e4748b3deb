"""The tasks of corpus preparation: functions that read files and write files, independent of the executor.

    hash_input     an input file               -> its sha256
    references     benchmark files             -> references.npy      n-grams to search for
    clean_chunk    a chunk of the input        -> texts, hashes, keys and signatures of what passes the filters
    find_pairs     one band (or exact hashes)  -> pairs of duplicate documents
    mark           all pairs                   -> marks.npy           which documents are dropped
    vocabulary     texts that stay             -> tokenizer.json
    tokenise_chunk texts that stay             -> shards

Every task writes its files atomically, and writes the same bytes when it is run again. So any executor that can reach
the folder can run the tasks of a step in any order, and a killed task is simply run again.
"""

from __future__ import annotations

import hashlib
import io
import os
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt

from quadriga import runtime
from quadriga.errors import ConfigError
from quadriga.text.language import language
from quadriga.text.tokenizer import Tokenizer
from quadriga.train.corpus import minhash, vocabulary
from quadriga.train.corpus.clean import clean
from quadriga.train.corpus.decontaminate import References, clean_pieces, load_references, reference_ngrams
from quadriga.train.corpus.format import ORIGIN, FileEntry, ShardEntry, block_sums, file_sha256
from quadriga.train.corpus.quality import broken_rule
from quadriga.train.corpus.readers import Chunk, Row, read_chunk, resolve
from quadriga.train.corpus.recipe import Recipe
from quadriga.train.corpus.words import U64, mix, words

KEEP, EXACT, NEAR = 0, 1, 2
"""Marks of a document: kept, exact duplicate, near duplicate."""
STEPS = ("read", "clean", "language", "quality", "decontaminate", "duplicates")

Counts = dict[str, Any]


class Document(msgspec.Struct, frozen=True, array_like=True):
    """A text that passed the filters, with its row in the chunk and its domain."""

    row: int
    domain: str
    text: str


class Tally:
    """Counts what each step takes in and drops, by domain; summed over chunks and stored in the manifest."""

    def __init__(self) -> None:
        self.counts: Counts = {step: {} for step in STEPS}

    def kept(self, step: str, domain: str, n_bytes: int, documents: int = 1) -> None:
        """Count documents that passed a step."""
        entry = self._entry(step, domain)
        entry["documents"] += documents
        entry["bytes"] += n_bytes

    def dropped(self, step: str, domain: str, why: str) -> None:
        """Count a document that a step dropped or changed."""
        entry = self._entry(step, domain)
        entry["dropped"][why] = entry["dropped"].get(why, 0) + 1

    def _entry(self, step: str, domain: str) -> Counts:
        entry: Counts = self.counts[step].setdefault(domain, {"documents": 0, "bytes": 0, "dropped": {}})
        return entry


def add_counts(total: Counts, part: Counts) -> Counts:
    """Add two nested tables of numbers."""
    for key, value in part.items():
        if isinstance(value, dict):
            add_counts(total.setdefault(key, {}), value)
        else:
            total[key] = total.get(key, 0) + value
    return total


# Tasks ---------------------------------------------------------------------------------------------------------------


def hash_input(path: str) -> dict[str, Any]:
    """Size and sha256 of an input file."""
    file = resolve(path)
    return {"path": path, "n_bytes": file.stat().st_size, "sha256": file_sha256(file)}


def references(work: str, files: list[str], ngram: int) -> dict[str, Any]:
    """Collect the n-grams of the benchmark files in references.npy."""
    grams = reference_ngrams(files, ngram)
    write_array(Path(work) / "references.npy", grams)
    return {"ngrams": len(grams)}


def clean_chunk(work: str, recipe: Recipe, chunk: Chunk) -> dict[str, Any]:
    """Read, clean, filter and fingerprint one chunk."""
    tally = Tally()
    known = load_references(Path(work) / "references.npy")
    documents: list[Document] = []
    hashes: list[bytes] = []
    signatures: list[minhash.Signatures] = []
    rules = recipe.duplicates
    unread: dict[str, int] = {}
    for row in read_chunk(chunk, recipe.sources[chunk.source], unread):
        for text in _pass_filters(row, recipe, known, tally):
            documents.append(Document(row.number, row.domain, text))
            hashes.append(hashlib.blake2b(text.encode(), digest_size=16).digest())
            if rules.near:
                signatures.append(minhash.signature(words(text), rules.ngram, rules.bands * rules.rows, rules.seed))
    for why, n in unread.items():
        tally.counts["read"].setdefault("(unknown)", {"documents": 0, "bytes": 0, "dropped": {}})["dropped"][why] = n
    base = Path(work) / f"{chunk.number:05}"
    whole = np.frombuffer(b"".join(hashes), dtype="<u8").reshape(-1, 2)
    keys = whole[:, :1].T
    if rules.near:
        matrix = np.array(signatures, dtype=np.uint32).reshape(len(documents), rules.bands * rules.rows)
        write_array(base.with_suffix(".signatures.npy"), matrix)
        keys = np.concatenate((keys, minhash.band_keys(matrix, rules.bands, rules.rows)))
    _write_keys(base, keys, rules.partitions)
    write_array(base.with_suffix(".hashes.npy"), whole)
    _write_documents(base.with_suffix(".documents.zst"), documents)
    return {"documents": len(documents), "counts": tally.counts}


def _write_keys(base: Path, keys: U64, partitions: int) -> None:
    """Write a chunk's keys (of whole texts, then of bands), sorted by partition so that a task reads only its own."""
    partition = keys % np.uint64(partitions)
    order = np.argsort(partition, axis=1, kind="stable")
    edges = np.arange(partitions + 1)
    starts = [np.searchsorted(row[by], edges) for row, by in zip(partition, order, strict=True)]
    write_array(base.with_suffix(".keys.npy"), np.take_along_axis(keys, order, axis=1))
    write_array(base.with_suffix(".rows.npy"), order.astype(np.int64))
    write_array(base.with_suffix(".starts.npy"), np.array(starts, dtype=np.int64))


def _pass_filters(row: Row, recipe: Recipe, known: References, tally: Tally) -> list[str]:
    """Apply all filters to a row: returns no text, the text, or its pieces after decontamination."""
    domain, rules = row.domain, recipe.rules(row.domain)
    if len(row.text) > recipe.max_chars:
        tally.dropped("read", domain, "max_chars")
        return []
    tally.kept("read", domain, _n_bytes(row.text))
    text = clean(row.text)
    if not text:
        tally.dropped("clean", domain, "empty")
        return []
    tally.kept("clean", domain, _n_bytes(text))
    if rules.languages:
        code, score = language(text)
        if code not in rules.languages or score < rules.min_language_score:
            tally.dropped("language", domain, code if score >= rules.min_language_score else "min_language_score")
            return []
    tally.kept("language", domain, _n_bytes(text))
    found = words(text)
    broken = broken_rule(text, found, rules)
    if broken is not None:
        tally.dropped("quality", domain, broken)
        return []
    tally.kept("quality", domain, _n_bytes(text))
    pieces = clean_pieces(text, found, known, recipe.decontaminate)
    if pieces is None:
        tally.dropped("decontaminate", domain, "max_pieces")
        return []
    if not pieces:
        tally.dropped("decontaminate", domain, "min_chars")
    elif pieces != [text]:
        tally.dropped("decontaminate", domain, "cut, not dropped")
    tally.kept("decontaminate", domain, sum(map(_n_bytes, pieces)), len(pieces))
    return pieces


def find_pairs(work: str, recipe: Recipe, sizes: list[int], band: int, partition: int) -> dict[str, Any]:
    """Find pairs of documents with an equal key in a band and similar signatures; band -1 compares texts by hash."""
    folder, offsets = Path(work), _offsets(sizes)
    found_keys, found_documents = [], []
    for chunk in range(len(sizes)):
        base = folder / f"{chunk:05}"
        start, stop = np.load(base.with_suffix(".starts.npy"))[band + 1, partition : partition + 2]
        keys, rows = (np.load(base.with_suffix(f".{what}.npy"), mmap_mode="r") for what in ("keys", "rows"))
        found_keys.append(np.asarray(keys[band + 1, start:stop]))
        found_documents.append(rows[band + 1, start:stop] + offsets[chunk])
    pairs = minhash.pairs_with_equal_keys(np.concatenate(found_keys), np.concatenate(found_documents))
    met = len(pairs)
    a, b = pairs[:, 0], pairs[:, 1]
    if band < 0:
        same = (_gather(folder, "hashes", offsets, a) == _gather(folder, "hashes", offsets, b)).all(axis=1)
    else:
        alike = _gather(folder, "signatures", offsets, a) == _gather(folder, "signatures", offsets, b)
        same = alike.mean(axis=1) >= recipe.duplicates.min_similarity if met else np.empty(0, dtype=bool)
    write_array(folder / f"pairs.{band}.{partition}.npy", pairs[same])
    return {"met": met, "pairs": int(same.sum())}


def mark(work: str, recipe: Recipe, sizes: list[int]) -> dict[str, Any]:
    """Mark all documents; of each group of duplicates the first is kept."""
    folder, n = Path(work), sum(sizes)
    none = np.empty((0, 2), dtype=np.int64)
    load = [np.load(file) for file in sorted(folder.glob("pairs.-1.*.npy"))]
    exact = np.concatenate([none, *load])
    near = [np.load(file) for file in sorted(folder.glob("pairs.[0-9]*.npy"))]
    marks = np.where(minhash.clusters(exact, n) == np.arange(n), KEEP, EXACT).astype(np.uint8)
    both = minhash.clusters(np.concatenate([exact, *near]), n) == np.arange(n)
    marks[(marks == KEEP) & ~both] = NEAR
    write_array(folder / "marks.npy", marks)
    return {"exact": int((marks == EXACT).sum()), "near": int((marks == NEAR).sum())}


def train_vocabulary(work: str, recipe: Recipe, sizes: list[int], n_bytes: int, folder: str) -> dict[str, Any]:
    """Train a tokenizer on an even sample of the kept documents of the training split."""
    assert recipe.tokenizer.train is not None, "the recipe trains a tokenizer"
    share = min(1.0, recipe.tokenizer.train_bytes / max(1, n_bytes))
    used = {"documents": 0, "bytes": 0}

    def texts() -> Iterator[str]:
        for chunk in range(len(sizes)):
            for document, _, mark_, number in _marked(work, chunk, sizes):
                if mark_ == KEEP and not _held_out(number, recipe) and _fraction(number, 1) < share:
                    used["documents"] += 1
                    used["bytes"] += _n_bytes(document.text)
                    yield document.text

    vocabulary.train_bpe(texts(), recipe.tokenizer.train, Path(folder))
    return used


def tokenise_chunk(work: str, root: str, recipe: Recipe, chunk: Chunk, sizes: list[int]) -> dict[str, Any]:
    """Encode the kept documents of a chunk into shards, one per split and domain."""
    tokenizer = _tokenizer(root)
    end = vocabulary.end_id(tokenizer, recipe.tokenizer.end_token)
    tally = Tally()
    split_of_source = recipe.sources[chunk.source].split
    shards: dict[tuple[str, str], _OpenShard] = {}
    for document, _, mark_, number in _marked(work, chunk.number, sizes):
        n_bytes = _n_bytes(document.text)
        if mark_ != KEEP:
            tally.dropped("duplicates", document.domain, "exact" if mark_ == EXACT else "near")
            continue
        tally.kept("duplicates", document.domain, n_bytes)
        split = "held_out" if split_of_source == "held_out" or _held_out(number, recipe) else "train"
        shard = shards.setdefault((split, document.domain), _OpenShard([], [], []))
        shard.ids.append(np.array([*tokenizer.encode(document.text), end], dtype=np.uint32))
        shard.rows.append(document.row)
        shard.n_bytes.append(n_bytes)
    entries = [
        shard.write(Path(root), split, domain, chunk.number, token_dtype(tokenizer))
        for (split, domain), shard in sorted(shards.items())
    ]
    return {"shards": msgspec.to_builtins(entries), "counts": tally.counts}


class _OpenShard(msgspec.Struct):
    ids: list[npt.NDArray[np.uint32]]
    rows: list[int]
    n_bytes: list[int]

    def write(self, root: Path, split: str, domain: str, chunk: int, dtype: str) -> ShardEntry:
        name = f"{split}/{domain}/{chunk:05}"
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        ends = np.cumsum([len(ids) for ids in self.ids]).astype("<i8")
        origin = np.array(list(zip(self.rows, self.n_bytes, strict=True)), dtype=ORIGIN)
        tokens = np.concatenate(self.ids).astype(dtype)
        arrays = {"tokens": tokens, "ends": ends, "origin": origin, "sums": block_sums(tokens)}
        files = []
        for part, array in arrays.items():
            size, digest = write_array(root / f"{name}.{part}.npy", array)
            files.append(FileEntry(path=f"{name}.{part}.npy", n_bytes=size, sha256=digest))
        return ShardEntry(
            name=name,
            split=split,
            domain=domain,
            chunk=chunk,
            n_documents=len(ends),
            n_tokens=int(ends[-1]),
            n_text_bytes=sum(self.n_bytes),
            files=files,
        )


def token_dtype(tokenizer: Tokenizer) -> str:
    """The smallest little-endian dtype that can hold the tokenizer's ids."""
    return "<u2" if tokenizer.n_vocab <= 1 << 16 else "<u4"


# Files ---------------------------------------------------------------------------------------------------------------


def write_file(path: Path, raw: bytes) -> None:
    """Write a file atomically: it is complete or absent, also after a power cut."""
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    with part.open("wb") as file:
        file.write(raw)
        file.flush()
        os.fsync(file.fileno())
    part.replace(path)


def write_array(path: Path, array: npt.NDArray[Any]) -> tuple[int, str]:
    """Write a .npy file like :func:`write_file`; returns its size and sha256."""
    buffer = io.BytesIO()
    np.save(buffer, np.ascontiguousarray(array), allow_pickle=False)
    raw = buffer.getvalue()
    write_file(path, raw)
    return len(raw), hashlib.sha256(raw).hexdigest()


def _zstd() -> Any:
    try:
        import zstandard
    except ImportError:
        raise ConfigError(f"preparing a corpus needs zstandard: {runtime.install_hint('train')}") from None
    return zstandard


def _write_documents(path: Path, documents: list[Document]) -> None:
    write_file(path, _zstd().ZstdCompressor(level=3).compress(msgspec.msgpack.encode(documents)))


def read_documents(work: str | Path, chunk: int) -> list[Document]:
    """Read the documents of a chunk that passed the filters."""
    raw = (Path(work) / f"{chunk:05}.documents.zst").read_bytes()
    return msgspec.msgpack.decode(_zstd().ZstdDecompressor().decompress(raw), type=list[Document])


def _marked(work: str, chunk: int, sizes: list[int]) -> Iterator[tuple[Document, int, int, int]]:
    """Yield (document, its number in the corpus, its mark, 64 bits of its hash) for a chunk."""
    offset = sum(sizes[:chunk])
    marks = np.load(Path(work) / "marks.npy", mmap_mode="r")
    hashes = np.load(Path(work) / f"{chunk:05}.hashes.npy")
    for i, document in enumerate(read_documents(work, chunk)):
        yield document, offset + i, int(marks[offset + i]), int(hashes[i, 0])


@lru_cache(maxsize=1)
def _tokenizer(root: str) -> Tokenizer:
    return vocabulary.load(Path(root))


def _offsets(sizes: list[int]) -> npt.NDArray[np.int64]:
    return np.concatenate(([0], np.cumsum(sizes))).astype(np.int64)


def _gather(folder: Path, what: str, offsets: npt.NDArray[np.int64], documents: npt.NDArray[np.int64]) -> Any:
    """Gather rows of the chunks' arrays ``what`` by the documents' numbers in the corpus."""
    chunk_of = np.searchsorted(offsets, documents, side="right") - 1
    rows: Any = None
    for chunk in np.unique(chunk_of):
        stored = np.load(folder / f"{chunk:05}.{what}.npy", mmap_mode="r")
        mine = chunk_of == chunk
        if rows is None:
            rows = np.empty((len(documents), *stored.shape[1:]), dtype=stored.dtype)
        rows[mine] = stored[documents[mine] - offsets[chunk]]
    return np.empty((0, 1), dtype=np.uint64) if rows is None else rows


def _fraction(number: int, salt: int) -> float:
    """A number in [0, 1) determined by a document's hash."""
    return float(mix(np.array([number ^ salt], dtype=np.uint64))[0]) / 2**64


def _held_out(number: int, recipe: Recipe) -> bool:
    return _fraction(number, 0) < recipe.held_out


def _n_bytes(text: str) -> int:
    return len(text.encode("utf-8", "surrogatepass"))
