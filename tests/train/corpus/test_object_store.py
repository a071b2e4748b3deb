"""A corpus in an object store: the rows of a local one, a bounded folder, and errors that name the file."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch

from quadriga.errors import ConfigError, CorpusError
from quadriga.train.corpus.format import Corpus
from quadriga.train.corpus.object_store import Recent
from quadriga.train.data_config import DataConfig, StageConfig
from quadriga.train.loader import open_source
from tests.train.corpora import write_shards

ADDRESS = "memory://bucket/mix"
N_SHARDS = 7


@pytest.fixture
def stored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A corpus of seven shards, on disk and at ADDRESS; the cache is a folder of the test."""
    monkeypatch.setenv("QUADRIGA_CACHE", str(tmp_path / "cache"))
    shards = [[[1 + (7 * s + i * j) % 90 for j in range(40 + s)] for i in range(6)] for s in range(N_SHARDS)]
    folder = write_shards(tmp_path / "corpus", {"aa": shards})
    memory = fsspec.filesystem("memory")
    memory.put(str(folder), "/bucket/mix", recursive=True)
    yield folder
    memory.rm("/bucket", recursive=True)


def _config(where: str | Path, cache_bytes: int = 10**9) -> DataConfig:
    stage = StageConfig(tokens=3200, seq_len=16, batch_tokens=64)
    return DataConfig(corpora=[str(where)], stages=[stage], unit_tokens=32, cache_bytes=cache_bytes)


def _all_tokens(config: DataConfig) -> torch.Tensor:
    source = open_source(config)
    return torch.cat([source.rows(step, 0, source.n_rows(step)).tokens for step in range(config.n_steps)])


def _cached(tmp_path: Path) -> list[Path]:
    return list((tmp_path / "cache").rglob("*.npy"))


def test_its_rows_are_those_of_the_folder(stored: Path, tmp_path: Path) -> None:
    assert torch.equal(_all_tokens(_config(ADDRESS)), _all_tokens(_config(stored)))
    assert open_source(_config(ADDRESS)).fingerprint == open_source(_config(stored)).fingerprint
    kinds = {file.name.split(".")[1] for file in _cached(tmp_path)}
    assert kinds == {"tokens", "ends", "sums"}, "the origin of documents is not read"


def test_no_more_than_the_bound_is_kept(stored: Path, tmp_path: Path) -> None:
    """With room for two shards every row is still right, and what an earlier run left counts."""
    whole = _all_tokens(_config(stored))
    _all_tokens(_config(ADDRESS))
    assert len(_cached(tmp_path)) == 3 * N_SHARDS
    entries = Corpus(stored).manifest.shards
    bound = 2 * max(sum(file.n_bytes for file in entry.files) for entry in entries)
    corpus = Corpus(ADDRESS, bound)
    for entry in (*entries, *entries[::-1]):
        tokens = corpus.shard(entry.name).read(0, entry.n_tokens)
        assert (tokens == Corpus(stored).shard(entry.name).tokens).all()
        opened = [file for file in _cached(tmp_path) if file.name.endswith("tokens.npy")]
        assert sum(file.stat().st_size for file in _cached(tmp_path)) <= bound and 1 <= len(opened) <= 2
    assert torch.equal(_all_tokens(_config(ADDRESS, bound)), whole)


def test_a_copy_that_broke_off_is_made_again(stored: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    memory = type(fsspec.filesystem("memory"))
    whole = memory.get_file

    def broken(self: Any, path: str, local: str, **options: Any) -> None:
        if not path.endswith("tokens.npy"):
            return whole(self, path, local, **options)
        Path(local).write_bytes(b"half")
        raise ConnectionError("the store hung up")

    name = Corpus(stored).manifest.shards[0].name
    with monkeypatch.context() as patched:
        patched.setattr(memory, "get_file", broken)
        with pytest.raises(CorpusError, match=r"00000.tokens.npy cannot be read: the store hung up"):
            Corpus(ADDRESS).shard(name)
    assert not list((tmp_path / "cache").rglob("*.part"))
    assert len(Corpus(ADDRESS).shard(name).tokens) == Corpus(stored).manifest.shards[0].n_tokens


def test_what_was_changed_or_lost_in_the_store_is_named(stored: Path, tmp_path: Path) -> None:
    memory = fsspec.filesystem("memory")
    name = Corpus(stored).manifest.shards[2].name
    place = f"/bucket/mix/{name}.tokens.npy"
    raw = bytearray(memory.cat_file(place))
    raw[-2] ^= 1
    memory.pipe_file(place, bytes(raw))
    corpus = Corpus(ADDRESS)
    assert corpus.verify() == [f"{name}.tokens.npy"]
    with pytest.raises(CorpusError, match=f"{name}.tokens.npy was changed"):
        corpus.shard(name).read(0, 5)
    memory.rm(place)
    with pytest.raises(CorpusError, match=f"{ADDRESS}/{name}.tokens.npy is missing"):
        Corpus(ADDRESS)
    with pytest.raises(CorpusError, match=r"memory://bucket/other/manifest.json is not there"):
        Corpus("memory://bucket/other")


def test_another_corpus_at_the_same_address_is_not_mistaken_for_it(stored: Path, tmp_path: Path) -> None:
    _all_tokens(_config(ADDRESS))
    memory = fsspec.filesystem("memory")
    memory.rm("/bucket", recursive=True)
    shutil.rmtree(stored)
    shards = [[[2 + (5 * s + i * j) % 90 for j in range(40 + s)] for i in range(6)] for s in range(N_SHARDS)]
    memory.put(str(write_shards(stored, {"aa": shards})), "/bucket/mix", recursive=True)
    assert torch.equal(_all_tokens(_config(ADDRESS)), _all_tokens(_config(stored)))


def test_a_store_without_its_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(address: str) -> None:
        raise ImportError("Install s3fs to access S3")

    monkeypatch.setattr(fsspec.core, "url_to_fs", missing)
    with pytest.raises(ConfigError, match=r"needs Install s3fs to access S3: pip install '.\[stores\]'"):
        Corpus("s3://bucket/mix")


def test_a_kind_of_store_that_nobody_knows() -> None:
    with pytest.raises(ConfigError, match="nope://x/y is in no kind of store that fsspec knows: Protocol not known"):
        Corpus("nope://x/y")


def test_what_was_used_last_is_kept() -> None:
    made, gone = [], []
    sizes = {"a": 4, "b": 3, "c": 5, "d": 20}

    def make(name: str) -> str:
        made.append(name)
        return name.upper()

    recent = Recent(make, size=sizes.__getitem__, let_go=gone.append, most_bytes=10, there=["b"])
    assert [recent(name) for name in "acacd"] == ["A", "C", "A", "C", "D"]
    assert made == ["a", "c", "d"] and gone == ["b", "a", "c"], "one that alone is too large is still opened"
