"""The loader: rows compared with their documents, ranks with one process; resuming; damaged files."""

from __future__ import annotations

import random
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from quadriga.errors import ConfigError, CorpusError
from quadriga.train.batch import IGNORE, TrainingBatch
from quadriga.train.corpus.format import Corpus, Stream
from quadriga.train.data_config import DataConfig, StageConfig, parse_count
from quadriga.train.loader import CorpusSource, HeldOutSource, Prefetcher, open_source
from quadriga.train.trainer import Staged
from tests.train.corpora import write_shards


def _documents(seed: int, n: int, longest: int) -> list[list[int]]:
    draw = random.Random(seed)
    return [[draw.randint(1, 96) for _ in range(draw.randint(1, longest))] for _ in range(n)]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    shards = {"aa": [_documents(1, 40, 30), _documents(2, 1, 5), _documents(3, 25, 90)], "b": [_documents(4, 60, 12)]}
    return write_shards(tmp_path_factory.mktemp("corpus") / "c", shards)


def _config(corpus: Path, *stages: StageConfig, **more: object) -> DataConfig:
    chosen = list(stages) or [
        StageConfig(tokens=600, seq_len=12, batch_tokens=84, mix={"aa": 0.7, "b": 0.3}),
        StageConfig(tokens=500, seq_len=24, batch_tokens=120),
    ]
    return DataConfig(corpora=[str(corpus)], stages=chosen, unit_tokens=48, **more)  # type: ignore[arg-type]


def _pieces(batch: TrainingBatch) -> list[tuple[list[int], list[int], list[int]]]:
    """(tokens, targets, positions) of each document of a batch."""
    bounds = batch.bounds.tolist()
    return [
        tuple(x[a:b].tolist() for x in (batch.tokens, batch.targets, batch.positions))  # type: ignore[misc]
        for a, b in pairwise(bounds)
    ]


def test_every_row_consists_of_pieces_of_documents(corpus: Path) -> None:
    source = open_source(_config(corpus))
    texts = {
        d: [list(doc) + [0] for shard in parts for doc in shard]
        for d, parts in enumerate(
            [[_documents(1, 40, 30), _documents(2, 1, 5), _documents(3, 25, 90)], [_documents(4, 60, 12)]]
        )
    }
    assert source.domains == ("aa", "b")
    n_pieces = 0
    for step in range(source.n_steps):
        rows, length = source.n_rows(step), source.seq_len(step)
        batch = source.rows(step, 0, rows)
        assert len(batch.tokens) == rows * length and batch.bounds[0] == 0 and batch.bounds[-1] == rows * length
        assert set(range(0, rows * length + 1, length)) <= set(batch.bounds.tolist())  # no document crosses a row
        assert len(batch.domains) == len(batch.bounds) - 1
        for (tokens, targets, positions), domain in zip(_pieces(batch), batch.domains.tolist(), strict=True):
            n_pieces += 1
            assert positions == list(range(len(tokens)))
            assert 0 not in tokens[:-1], "a document goes on after its end"
            expected = [*tokens[1:], targets[-1]]
            assert targets == expected
            whole = [*tokens, *([] if targets[-1] == IGNORE else [targets[-1]])]
            assert (targets[-1] == IGNORE) == (tokens[-1] == 0)
            assert any(
                document[i : i + len(whole)] == whole
                for document in texts[domain]
                for i in range(len(document) - len(whole) + 1)
            )
    assert n_pieces > 100


@given(step=st.integers(0, 12), cuts=st.sets(st.integers(1, 4), max_size=3), order=st.randoms())
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_ranks_share_the_batch_that_one_process_reads(
    corpus: Path, step: int, cuts: set[int], order: random.Random
) -> None:
    source = open_source(_config(corpus))
    step %= source.n_steps
    rows = source.n_rows(step)
    edges = [0, *sorted(cut for cut in cuts if cut < rows), rows]
    parts = list(pairwise(edges))
    order.shuffle(parts)  # ranks read in any order, each in its own process
    read = {part: open_source(_config(corpus)).rows(step, *part) for part in parts}
    whole = source.rows(step, 0, rows)
    for name in ("tokens", "targets", "positions", "domains"):
        assert torch.equal(torch.cat([getattr(read[part], name) for part in sorted(read)]), getattr(whole, name)), name
    starts = [read[part].bounds[:-1] + part[0] * source.seq_len(step) for part in sorted(read)]
    assert torch.equal(torch.cat([*starts, whole.bounds[-1:]]), whole.bounds)


def test_all_tokens_of_an_epoch_are_read(corpus: Path) -> None:
    config = _config(corpus, StageConfig(tokens=48 * 12, seq_len=12, batch_tokens=48 * 12, mix={"aa": 1.0}))
    source = open_source(config)
    n = source.streams[0].n_tokens
    assert source.streams[0].read(n - 3, 7)[0].tolist() == [
        *source.streams[0].read(n - 3, 3)[0].tolist(),
        *source.streams[0].read(0, 4)[0].tolist(),
    ]
    whole, ends = source.streams[0].read(0, n)
    assert np.array_equal(np.flatnonzero(whole == 0) + 1, ends)


def test_a_run_resumes_by_its_step_alone(corpus: Path) -> None:
    source = open_source(_config(corpus))
    seen = [source.rows(step, 0, source.n_rows(step)).tokens for step in range(source.n_steps)]
    again = open_source(_config(corpus))
    for step in (source.n_steps - 1, 3, 0):  # in any order: there is no state to restore
        assert torch.equal(again.rows(step, 0, again.n_rows(step)).tokens, seen[step])
    assert again.fingerprint == source.fingerprint
    other = open_source(_config(corpus, seed=18))
    assert other.fingerprint != source.fingerprint
    assert not torch.equal(other.rows(0, 0, 7).tokens, seen[0])


def test_begun_stages_must_not_change_and_later_ones_may(corpus: Path) -> None:
    first = StageConfig(tokens=600, seq_len=12, batch_tokens=84, mix={"aa": 0.7, "b": 0.3})
    second, third = (StageConfig(tokens=500, seq_len=24, batch_tokens=n) for n in (120, 240))
    source = open_source(_config(corpus, first, second))
    steps = first.n_steps
    assert len(source.history(0)) == 0 and len(source.history(steps)) == 1 and len(source.history(steps + 1)) == 2
    open_source(_config(corpus, first, third)).check_history(source.history(steps))  # the second had not begun
    open_source(_config(corpus, first, second, third)).check_history(source.history(steps + 1))
    for stages in ((first, third), (first,), (second, first)):
        with pytest.raises(ConfigError, match="has begun in this run and must not change"):
            open_source(_config(corpus, *stages)).check_history(source.history(steps + 1))


def test_prefetching_changes_nothing(corpus: Path) -> None:
    plain = open_source(_config(corpus))
    ahead = Prefetcher(open_source(_config(corpus)))
    for step in [0, 1, 2, 7, 8, 3, *range(4, plain.n_steps)]:
        assert torch.equal(ahead.rows(step, 1, 4).tokens, plain.rows(step, 1, 4).tokens)
        assert all(step < key[0] <= step + 2 for key in ahead._ahead), "what a jump passes over is let go"
    assert ahead.n_rows(0) == plain.n_rows(0) and ahead.seq_len(0) == plain.seq_len(0)
    assert isinstance(ahead, Staged) and ahead.history(1) == plain.history(1) != []
    with pytest.raises(ConfigError, match="has begun in this run and must not change"):
        ahead.check_history(["another"])
    ahead.close()
    with pytest.raises(ConfigError, match="prefetch must be 0 or above, got -1"):
        msgspec.structs.replace(_config(corpus), prefetch=-1)


def test_held_out_rows_are_the_held_out_text_from_its_beginning(tmp_path: Path) -> None:
    corpus = write_shards(tmp_path / "c", {"aa": [_documents(1, 40, 30)]})
    stream = Stream([Corpus(corpus)], "aa", "train")
    source = HeldOutSource(stream, 12, None, "x")
    n = source.n_rows(0)
    assert n == stream.n_tokens // 12 > 20 and HeldOutSource(stream, 12, 5, "x").n_rows(0) == 5
    whole = source.rows(0, 0, n)
    assert whole.tokens.tolist() == stream.read(0, 12 * n)[0].tolist()
    assert torch.equal(source.rows(0, 3, 7).tokens, whole.tokens[36:84])


def test_rows_follow_the_mix(corpus: Path) -> None:
    source = open_source(
        _config(corpus, StageConfig(tokens=12 * 500, seq_len=12, batch_tokens=120, mix={"aa": 3, "b": 1}))
    )
    domain_rows = [0, 0]
    for step in range(source.n_steps):
        batch = source.rows(step, 0, 10)
        row_starts = torch.isin(batch.bounds[:-1], torch.arange(0, 120, 12))
        for domain in batch.domains[row_starts].tolist():
            domain_rows[domain] += 1
    assert sum(domain_rows) == 500 and abs(domain_rows[0] - 375) <= 2


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda c: (c / "train/aa/00001.tokens.npy").unlink(), "is missing"),
        (lambda c: (c / "train/aa/00001.ends.npy").write_bytes(b"x"), "must have .* bytes, got 1"),
        (lambda c: (c / "manifest.json").write_text("{}"), "is not a corpus manifest"),
        (lambda c: (c / "manifest.json").unlink(), "must be a corpus"),
        (
            lambda c: (c / "manifest.json").write_text(
                (c / "manifest.json").read_text().replace("tokenizer.json", "../t")
            ),
            "outside the corpus",
        ),
    ],
)
def test_a_damaged_corpus_is_refused_when_it_is_opened(
    tmp_path: Path, damage: Callable[[Path], None], message: str
) -> None:
    corpus = write_shards(tmp_path / "c", {"aa": [_documents(1, 40, 30), _documents(2, 9, 5)]})
    damage(corpus)
    with pytest.raises(CorpusError, match=message):
        open_source(_config(corpus, StageConfig(tokens=96, seq_len=12, batch_tokens=24)))


def test_a_flipped_byte_is_found(tmp_path: Path) -> None:
    corpus = write_shards(tmp_path / "c", {"aa": [_documents(1, 40, 30)]})
    file = corpus / "train/aa/00000.tokens.npy"
    raw = bytearray(file.read_bytes())
    raw[-1] ^= 0x80  # the high byte of the last id
    file.write_bytes(bytes(raw))
    source = open_source(_config(corpus, StageConfig(tokens=96, seq_len=12, batch_tokens=24)))
    with pytest.raises(CorpusError, match="was changed: ids from 0 on"):
        source.streams[0].read(0, source.streams[0].n_tokens)
    assert Corpus(corpus).verify() == ["train/aa/00000.tokens.npy"]


def test_a_changed_corpus_has_another_fingerprint(corpus: Path, tmp_path: Path) -> None:
    other = write_shards(
        tmp_path / "c", {"aa": [_documents(1, 40, 30), _documents(9, 30, 90)], "b": [_documents(4, 60, 12)]}
    )
    assert open_source(_config(other)).fingerprint != open_source(_config(corpus)).fingerprint


def test_vocabularies_must_agree(corpus: Path, tmp_path: Path) -> None:
    other = write_shards(tmp_path / "c", {"aa": [_documents(1, 40, 30)]})
    both = DataConfig(
        corpora=[str(corpus), str(other)], stages=[StageConfig(tokens=96, seq_len=12, batch_tokens=24)], unit_tokens=48
    )
    assert isinstance(open_source(both), CorpusSource)
    manifest = other / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"end_id":0', '"end_id":1'))
    with pytest.raises(CorpusError, match="must share one vocabulary"):
        open_source(both)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seq_len": 0}, "seq_len must be at least 1"),
        ({"batch_tokens": 25}, "multiple of seq_len=12, got 25: use 24"),
        ({"mix": {"aa": -1.0}}, "must be finite and not negative"),
        ({"mix": {"aa": 0.0}}, "at least one domain"),
    ],
)
def test_impossible_stages_are_refused(change: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        StageConfig(**({"tokens": 96, "seq_len": 12, "batch_tokens": 24} | change))  # type: ignore[arg-type]


def test_impossible_runs_are_refused(corpus: Path) -> None:
    stage = StageConfig(tokens=96, seq_len=12, batch_tokens=24)
    with pytest.raises(ConfigError, match="at least one directory"):
        DataConfig(corpora=[], stages=[stage])
    with pytest.raises(ConfigError, match="multiple of every stage's seq_len"):
        DataConfig(corpora=["x"], stages=[stage], unit_tokens=50)
    with pytest.raises(ConfigError, match=r"reads domain 'aa' \d.*max_epochs.*is 0.5"):
        open_source(_config(corpus, max_epochs=0.5))
    source = open_source(_config(corpus, stage))
    with pytest.raises(ConfigError, match="got step 4"):
        source.n_rows(4)
    with pytest.raises(ConfigError, match="rows must be within"):
        source.rows(0, 1, 3)


def test_counts_of_tokens() -> None:
    assert [parse_count(x) for x in ("12T", "1.5k", "30_000_000", 7, "2e9", "3B")] == [
        12 * 10**12,
        1500,
        30_000_000,
        7,
        2 * 10**9,
        3 * 10**9,
    ]
    for bad in ("", "many", "-3", 0, "0", "1KiB", True):
        with pytest.raises(ConfigError, match="must look like"):
            parse_count(bad)


def test_ids_are_checked_as_they_are_read(tmp_path: Path) -> None:
    """64 KiB at a time: a changed byte is found when its block is read, whatever was read before."""
    documents = {"a": [[[1 + i % 96 for i in range(100)] for _ in range(900)]]}
    root = write_shards(tmp_path / "sums", documents)
    plain = write_shards(tmp_path / "none", documents, sums=False)
    assert Corpus(root).manifest.fingerprint == Corpus(plain).manifest.fingerprint, "sums follow from the ids"
    for folder in (root, plain):
        file = folder / "train/a/00000.tokens.npy"
        raw = bytearray(file.read_bytes())
        raw[len(raw) - 2 * (90900 - 70000)] ^= 2  # a bit of token 70,000, in the third block of 32,768
        file.write_bytes(raw)
    stream = Stream([Corpus(root)], "a", "train")
    assert stream.read(0, 65536)[0][:3].tolist() == [1, 2, 3]
    for start in (65536, 90000):
        with pytest.raises(CorpusError, match=r"00000\.tokens\.npy was changed: ids from 65536 on"):
            stream.read(start, 5)
    with pytest.raises(CorpusError, match=r"00000\.tokens\.npy was changed: its sha256"):
        Stream([Corpus(plain)], "a", "train").read(0, 5)


@pytest.mark.parametrize("part", ["ends", "sums"])
def test_a_shards_ends_and_sums_are_checked_when_it_is_opened(tmp_path: Path, part: str) -> None:
    root = write_shards(tmp_path, {"a": [[[1, 2, 3], [4, 5]]]})
    file = root / f"train/a/00000.{part}.npy"
    raw = bytearray(file.read_bytes())
    raw[128] ^= 1
    file.write_bytes(raw)
    with pytest.raises(CorpusError, match=rf"00000\.{part}\.npy was changed"):
        Stream([Corpus(root)], "a", "train").read(0, 3)
