"""Small corpora for tests: generated texts, recipes that keep them, and shards without preparation."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from quadriga.train.corpus import format as corpus_format
from quadriga.train.corpus.format import FileEntry, Manifest, ShardEntry, TokenizerEntry
from quadriga.train.corpus.recipe import Recipe, from_table
from quadriga.train.corpus.tasks import write_array, write_file

WORDS = [
    "river",
    "stone",
    "garden",
    "window",
    "teacher",
    "summer",
    "engine",
    "paper",
    "silver",
    "mountain",
    "letter",
    "market",
    "winter",
    "bridge",
    "forest",
    "music",
    "island",
    "number",
    "camera",
    "village",
    "question",
    "answer",
    "morning",
    "evening",
    "shadow",
    "doctor",
    "library",
    "harbour",
    "copper",
    "valley",
]


def prose(seed: int, n_words: int = 90) -> str:
    """Sentences of random words, which pass every rule for prose and differ from those of other seeds."""
    draw = random.Random(seed)
    words = [draw.choice(WORDS) + draw.choice(["", "s", "ed", "ing", "less", "ful"]) for _ in range(n_words)]
    return ". ".join(" ".join(words[i : i + 9]).capitalize() for i in range(0, n_words, 9)) + "."


def write_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    """Write rows as JSONL."""
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    return path


def recipe(path: Path, **changes: Any) -> Recipe:
    """A recipe over one file whose rows name their domain."""
    table: dict[str, Any] = {
        "sources": [{"paths": [str(path)], "domain_field": "domain"}],
        "tokenizer": {"train": 300},
        "chunk": "4kB",
    }
    return from_table(table | changes, Recipe, "test")


def write_shards(root: Path, documents: dict[str, list[list[list[int]]]], n_vocab: int = 97, sums: bool = True) -> Path:
    """Write a corpus of given ids (domain -> shards -> documents); the end id 0 is added to each document."""
    tokenizer_files = [FileEntry(path="tokenizer.json", n_bytes=2, sha256=write_tokenizer(root))]
    tokenizer = TokenizerEntry(files=tokenizer_files, n_vocab=n_vocab, end_id=0, dtype="<u2")
    shards = []
    for domain, parts in documents.items():
        for number, part in enumerate(parts):
            name = f"train/{domain}/{number:05}"
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            ids = [np.array([*document, 0], dtype="<u2") for document in part]
            ends = np.cumsum([len(document) for document in ids]).astype("<i8")
            origin = np.zeros(len(ids), dtype=corpus_format.ORIGIN)
            files = []
            tokens = np.concatenate(ids)
            arrays = {"tokens": tokens, "ends": ends, "origin": origin, "sums": corpus_format.block_sums(tokens)}
            for what, array in list(arrays.items())[: 3 + sums]:
                size, digest = write_array(root / f"{name}.{what}.npy", array)
                files.append(FileEntry(path=f"{name}.{what}.npy", n_bytes=size, sha256=digest))
            entry = ShardEntry(
                name=name,
                split="train",
                domain=domain,
                chunk=number,
                n_documents=len(ids),
                n_tokens=int(ends[-1]),
                n_text_bytes=0,
                files=files,
            )
            shards.append(entry)
    manifest = Manifest(
        version=corpus_format.VERSION,
        pipeline=0,
        recipe={},
        inputs=[],
        chunks=[],
        references=[],
        tokenizer=tokenizer,
        steps=[],
        shards=shards,
        fingerprint=corpus_format.fingerprint(tokenizer, shards),
    )
    write_file(root / "manifest.json", msgspec.json.encode(manifest))
    return root


def write_tokenizer(root: Path) -> str:
    """A placeholder for a tokenizer that is never read."""
    root.mkdir(parents=True, exist_ok=True)
    (root / "tokenizer.json").write_bytes(b"{}")
    return corpus_format.file_sha256(root / "tokenizer.json")
