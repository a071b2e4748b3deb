"""Preparation end to end: which documents are kept, equal bytes in every case, kills at every write, Ray, commands."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from typer.testing import CliRunner

from quadriga.cli import app
from quadriga.errors import ConfigError, CorpusError, InputError
from quadriga.train.corpus import tasks, vocabulary
from quadriga.train.corpus.executors import Executor, LocalExecutor, RayExecutor, Task
from quadriga.train.corpus.format import Corpus, Manifest, Stream
from quadriga.train.corpus.pipeline import prepare
from quadriga.train.corpus.recipe import Recipe, load_recipe
from quadriga.train.data_config import DataConfig, StageConfig
from quadriga.train.loader import open_held_out, open_source
from tests.train.corpora import prose, recipe, write_rows

BENCH = "A baker sells twelve loaves every morning and keeps three of them for his own family and four friends"
CODE = "\n".join(f"def area_{i}(width, height):\n    return width * height * {i}" for i in range(30))


def _rows() -> list[dict[str, Any]]:
    rows = [{"text": prose(i), "domain": "news"} for i in range(40)]
    rows[7]["text"] = rows[3]["text"]  # exact
    rows[11]["text"] = rows[5]["text"].replace("stone", "rock", 1) + " Nearly."  # near
    rows[13]["text"] = "short"
    rows[17]["text"] = f"{prose(100, 150)}\n{BENCH}.\n{prose(101, 150)}"
    rows[19]["text"] = prose(19).replace("\n", "\r\n") + "\x00\ufeff"
    return [*rows, *({"text": CODE.replace("area", f"area{i}x"), "domain": "code"} for i in range(3))]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("inputs")
    write_rows(folder / "rows.jsonl", _rows())
    write_rows(folder / "val.jsonl", [{"text": _rows()[21]["text"], "domain": "news"}])
    write_rows(folder / "bench.jsonl", [{"question": BENCH}])
    return folder


@pytest.fixture(scope="module")
def plan(inputs: Path) -> Recipe:
    sources = [
        {"paths": [str(inputs / "rows.jsonl")], "domain_field": "domain"},
        {"paths": [str(inputs / "val.jsonl")], "domain_field": "domain", "split": "held_out"},
    ]
    domains = {"code": {"kind": "code"}, "news": {"languages": ["en"], "min_language_score": 0.1}}
    bench = {"paths": [str(inputs / "bench.jsonl")], "min_chars": 100}
    return recipe(
        inputs, sources=sources, domains=domains, decontaminate=bench, held_out=0.1, duplicates={"partitions": 2}
    )


def _prepare(plan: Recipe, out: Path, executor: Executor | None = None, **more: Any) -> Manifest:
    return prepare(plan, out, executor or LocalExecutor(1), chunk_bytes=4000, **more)


@pytest.fixture(scope="module")
def corpus(plan: Recipe, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("corpus") / "out"
    _prepare(plan, out)
    return out


def _files(root: Path) -> dict[str, bytes]:
    return {str(file.relative_to(root)): file.read_bytes() for file in sorted(root.rglob("*")) if file.is_file()}


def _texts(corpus: Path, split: str) -> list[str]:
    tokenizer = vocabulary.load(corpus)
    found = []
    opened = Corpus(corpus)
    for domain in opened.domains:
        stream = Stream([opened], domain, split)
        ids, ends = stream.read(0, stream.n_tokens) if stream.n_tokens else (np.empty(0, int), np.empty(0, int))
        assert len(ends) == stream.n_documents
        for start, end in zip([0, *ends], ends, strict=False):
            assert ids[end - 1] == opened.manifest.tokenizer.end_id
            found.append(tokenizer.decode(ids[start : end - 1].tolist()))
    return found


def test_exactly_the_right_documents_are_kept(corpus: Path) -> None:
    train, held_out = _texts(corpus, "train"), _texts(corpus, "held_out")
    rows = [row["text"] for row in _rows()]
    both = train + held_out
    assert len(both) == len(set(both))
    assert rows[3] in both and rows[5] in both and rows[11] not in both and "short" not in both
    assert rows[21] in held_out and rows[21] not in train  # of two copies the held-out one is kept
    assert prose(19) in both
    assert not any(BENCH in text for text in both)
    assert any(text in prose(100, 150) and len(text) > 300 for text in both)  # the text before the question is kept
    expected = {*rows} - {rows[11], rows[13], rows[17], rows[19]} | {prose(19)}
    assert set(both) - {t for t in both if t in prose(100, 150) or t in prose(101, 150)} == expected
    assert 2 <= len(held_out) <= 12  # 10 % of 40 by hash, and the source


def test_the_manifest_counts_every_document(corpus: Path) -> None:
    manifest = Corpus(corpus).manifest
    steps = {step["step"]: step for step in manifest.steps}
    assert list(steps) == list(tasks.STEPS)
    news = {name: step["domains"]["news"] for name, step in steps.items()}
    assert news["read"]["documents"] == 41 and news["quality"]["dropped"] == {"min_words": 1}
    assert news["decontaminate"]["dropped"] == {"cut, not dropped": 1} and news["decontaminate"]["documents"] == 41
    assert news["duplicates"]["dropped"] == {"exact": 2, "near": 1}
    assert steps["duplicates"]["exact"] == 2 and steps["duplicates"]["near"] == 1
    assert sum(shard.n_documents for shard in manifest.shards) == 41 - 3 + 3
    assert len(manifest.inputs) == 2 and len(manifest.references) == 1
    assert len({shard.chunk for shard in manifest.shards}) > 5
    assert msgspec.convert(manifest.recipe, Recipe) == load_recipe(corpus / "manifest.json")
    text_bytes = sum(len(text.encode()) for split in ("train", "held_out") for text in _texts(corpus, split))
    assert sum(shard.n_text_bytes for shard in manifest.shards) == text_bytes


def test_any_number_of_workers_writes_the_same_bytes(corpus: Path, plan: Recipe, tmp_path: Path) -> None:
    executor = LocalExecutor(3)
    _prepare(plan, tmp_path / "again", executor)
    executor.close()
    assert _files(tmp_path / "again") == _files(corpus)


class _Backwards:
    """Runs the tasks of a step in reverse order, and stops after ``limit`` tasks in total."""

    def __init__(self, limit: int) -> None:
        self.left = limit

    def run(self, wanted: Sequence[Task]) -> Iterator[tuple[Task, dict[str, Any]]]:
        for task in reversed(wanted):
            if self.left == 0:
                raise KeyboardInterrupt
            self.left -= 1
            yield task, task.call(*task.args)

    def close(self) -> None:
        pass


class _Killed(BaseException):
    pass


def test_a_run_killed_at_any_write_resumes_to_the_same_bytes(
    corpus: Path, plan: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One run, killed before and after each rename and resumed each time: every write is interrupted twice."""
    real, kills = Path.replace, 0
    armed = {"before": True}

    def replace(self: Path, target: Path) -> Path:
        nonlocal kills
        if str(tmp_path) in str(self) and (str(target), armed["before"]) not in seen:
            seen.add((str(target), armed["before"]))
            kills += 1
            if armed["before"]:
                armed["before"] = False
                raise _Killed
            armed["before"] = True
            real(self, target)
            raise _Killed
        return real(self, target)

    seen: set[tuple[str, bool]] = set()
    monkeypatch.setattr(Path, "replace", replace)
    for _ in range(2000):
        try:
            _prepare(plan, tmp_path / "out")
            break
        except _Killed:
            assert not (tmp_path / "out").exists()
    assert kills > 100
    assert _files(tmp_path / "out") == _files(corpus)


def test_finished_tasks_are_not_run_again(corpus: Path, plan: Recipe, tmp_path: Path) -> None:
    for limit in (1, 6, 30):
        with pytest.raises(KeyboardInterrupt):
            _prepare(plan, tmp_path / "out", _Backwards(limit))
    total = len(list((tmp_path / "out.part/work/journal").iterdir()))
    assert total == 1 + 6 + 30
    _prepare(plan, tmp_path / "out", _Backwards(10**6))
    assert _files(tmp_path / "out") == _files(corpus)


def test_an_interrupted_run_refuses_another_recipe(plan: Recipe, tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        _prepare(plan, tmp_path / "out", _Backwards(3))
    other = msgspec.structs.replace(plan, held_out=0.2)
    with pytest.raises(ConfigError, match="was begun with another recipe"):
        _prepare(other, tmp_path / "out")
    assert _prepare(other, tmp_path / "out", restart=True).recipe["held_out"] == 0.2
    with pytest.raises(ConfigError, match="must not exist already"):
        _prepare(plan, tmp_path / "out")


def test_changed_inputs_are_refused_when_a_corpus_is_made_again(
    corpus: Path, plan: Recipe, inputs: Path, tmp_path: Path
) -> None:
    manifest = Corpus(corpus).manifest
    expected = [*manifest.inputs, *manifest.references]
    expected[1] = msgspec.structs.replace(expected[1], sha256="0" * 64)
    with pytest.raises(CorpusError, match=r"inputs must have the hashes in the manifest.*rows\.jsonl"):
        _prepare(plan, tmp_path / "out", expected_inputs=expected)


def test_a_corpus_without_documents_is_an_error(tmp_path: Path) -> None:
    rows = write_rows(tmp_path / "a.jsonl", [{"text": "short", "domain": "x"}] * 3)
    given = tmp_path / "vocabulary"
    vocabulary.train_bpe([prose(i) for i in range(30)], 300, given)
    with pytest.raises(CorpusError, match="nothing is left"):
        _prepare(recipe(rows, tokenizer={"path": str(given)}), tmp_path / "out", tokenizer=given)


def test_a_corpus_feeds_the_loader(corpus: Path) -> None:
    stage = StageConfig(tokens=2048, seq_len=64, batch_tokens=512, mix={"news": 0.8, "code": 0.2})
    config = DataConfig(corpora=[str(corpus)], stages=[stage], unit_tokens=64)
    source = open_source(config)
    assert source.domains == ("code", "news")
    text = vocabulary.load(corpus).decode(source.rows(1, 0, 8).tokens.tolist())
    assert "river" in text and "width" in text
    held_out = open_held_out(config)
    assert set(held_out) <= {"code", "news"} and held_out["news"].n_rows(0) >= 1
    batch = held_out["news"].rows(0, 0, 1)
    assert len(batch.tokens) == 64 and 0.2 < held_out["news"].n_tokens / held_out["news"].n_text_bytes < 1


def test_an_unknown_key_suggests_the_nearest_one(tmp_path: Path) -> None:
    (tmp_path / "r.toml").write_text('[[sources]]\npaths = ["a"]\n[tokenizer]\ntrain = 300\n[duplicates]\nbandz = 3\n')
    with pytest.raises(ConfigError, match=r"r\.toml: .*`bandz`.*Did you mean 'bands'"):
        load_recipe(tmp_path / "r.toml")
    (tmp_path / "r.toml").write_text('[[sources]]\npaths = ["a"]\n[tokenizer]\ntrain = 3\n')
    with pytest.raises(ConfigError, match="from 300 to"):
        load_recipe(tmp_path / "r.toml")
    (tmp_path / "r.toml").write_text("[[sources]\n")
    with pytest.raises(ConfigError, match="is not a recipe"):
        load_recipe(tmp_path / "r.toml")


def test_the_recipes_of_the_project_are_valid() -> None:
    found = [load_recipe(file) for file in Path("recipes").glob("mix*.toml")]
    assert found and all(isinstance(each, Recipe) for each in found)


@pytest.mark.dist
@pytest.mark.slow
def test_a_ray_cluster_of_two_nodes_writes_the_same_bytes(corpus: Path, plan: Recipe, tmp_path: Path) -> None:
    ray = pytest.importorskip("ray")
    from ray.cluster_utils import Cluster

    cluster = Cluster()
    for _ in range(2):
        cluster.add_node(num_cpus=1, object_store_memory=100_000_000)
    try:
        cluster.wait_for_nodes()
        executor = RayExecutor(cluster.address)
        try:
            assert executor.nodes() == 2
            _prepare(plan, tmp_path / "out", executor)
            bad = write_rows(tmp_path / "bad.jsonl", [{"nothing": 1}])
            with pytest.raises(CorpusError, match="string field 'text'"):  # an error keeps its type across the cluster
                _prepare(recipe(bad), tmp_path / "bad", executor)
        finally:
            executor.close()
    finally:
        cluster.shutdown()
        assert not ray.is_initialized()
    assert _files(tmp_path / "out") == _files(corpus)


# Vocabulary ----------------------------------------------------------------------------------------------------------


def test_a_trained_vocabulary_is_exact_complete_and_repeatable(tmp_path: Path) -> None:
    texts = [prose(i) for i in range(60)]
    for name in ("a", "b"):
        vocabulary.train_bpe(iter(texts), 500, tmp_path / name)
    assert _files(tmp_path / "a") == _files(tmp_path / "b")
    tokenizer = vocabulary.load(tmp_path / "a")
    assert tokenizer.n_vocab == 500 and vocabulary.end_id(tokenizer, None) == tokenizer.special_ids["<|endoftext|>"]
    hostile = "Zürich 你好 \x00\x7f 🙂 <|endoftext|> tab\tend\n\n"
    assert tokenizer.decode(tokenizer.encode(hostile)) == hostile
    assert len(tokenizer.encode(texts[0])) < len(texts[0]) / 3
    assert max(tokenizer.encode(hostile)) < 500 and 0 not in tokenizer.encode(hostile)
    with pytest.raises(CorpusError, match="take a smaller vocabulary"):
        vocabulary.train_bpe(["too little"], 5000, tmp_path / "c")
    with pytest.raises(ConfigError, match=r"no '<\|stop\|>'"):
        vocabulary.end_id(tokenizer, "<|stop|>")


def test_its_template_is_chatml(tmp_path: Path) -> None:
    from quadriga.text.chat import render

    vocabulary.train_bpe([prose(i) for i in range(60)], 400, tmp_path / "a")
    tokenizer = vocabulary.load(tmp_path / "a")
    assert tokenizer.eos_ids == (tokenizer.special_ids["<|endoftext|>"], tokenizer.special_ids["<|im_end|>"])
    prompt = render([{"role": "user", "content": "Hi"}], tokenizer)
    assert prompt.text.endswith("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")
    assert prompt.ids.count(tokenizer.special_ids["<|im_start|>"]) >= 2


# Commands ------------------------------------------------------------------------------------------------------------


def _run(*words: str) -> Any:
    return CliRunner().invoke(app, ["data", *words], env={"COLUMNS": "160", "TERM": "dumb"})


def test_the_commands_prepare_inspect_and_mix(corpus: Path, plan: Recipe, inputs: Path, tmp_path: Path) -> None:
    out = tmp_path / "again"
    made = _run("prepare", str(corpus / "manifest.json"), "--out", str(out), "--workers", "1")
    assert made.exit_code == 0, made.output
    assert _files(out) == _files(corpus)  # a manifest is also a recipe
    shown = _run("inspect", str(corpus), "--verify")
    assert "files are as the manifest says" in shown.output and "train / news" in shown.output
    facts = json.loads(_run("inspect", str(corpus), "--json").output)
    assert facts["fingerprint"] == Corpus(corpus).manifest.fingerprint
    text = _run("inspect", str(corpus), "--domain", "code", "--document", "1").output
    assert text.startswith("# train/code/") and "def area" in text
    mix = json.loads(_run("mix", str(corpus), "--tokens", "100k", "--power", "0", "--json").output)
    shares = [n / mix["stages"][0]["tokens"] for n in mix["stages"][0]["by_domain"].values()]
    assert shares == pytest.approx([0.5, 0.5], abs=0.02)  # 49 rows
    run = tmp_path / "run.toml"
    run.write_text(
        f'[data]\ncorpora = ["{corpus}"]\nunit_tokens = 64\n'
        '[[data.stages]]\ntokens = "64k"\nseq_len = 64\nbatch_tokens = 512\nmix = {news = 3, code = 1}\n'
    )
    table = _run("mix", str(run)).output
    assert "75.0%" in table and "repeated text is worth clearly less" in table
    made = _run("tokenizer", str(inputs / "rows.jsonl"), "--vocab-size", "320", "--out", str(tmp_path / "bpe"))
    assert made.exit_code == 0 and "320 tokens" in made.output


def test_the_commands_refuse_impossible_options(corpus: Path, inputs: Path, tmp_path: Path) -> None:
    for words, message in (
        (("prepare", str(inputs / "rows.jsonl"), "--out", str(tmp_path / "x")), "text needs a vocabulary"),
        (("prepare", "r.toml", "--out", "x", "--domain", "d"), "for plain text inputs"),
        (("inspect", str(tmp_path)), "must be a corpus"),
        (("inspect", str(corpus), "--document", "0"), "--domain must be one of code, news"),
        (("inspect", str(corpus), "--document", "10000", "--domain", "news"), "got 10000"),
        (("mix", str(corpus), "--tokens", "lots"), "must look like"),
        (("prepare", "a", "--out", "x", "--tokenizer", "t", "--train-tokenizer", "300"), "not both"),
    ):
        result = _run(*words)
        assert isinstance(result.exception, InputError) and message in str(result.exception), (words, result)
    damaged = tmp_path / "damaged"
    shutil.copytree(corpus, damaged)
    file = next((damaged / "train/news").glob("*.tokens.npy"))
    raw = bytearray(file.read_bytes())
    raw[-2] ^= 1
    file.write_bytes(bytes(raw))
    result = _run("inspect", str(damaged), "--verify")
    assert isinstance(result.exception, CorpusError) and file.name in str(result.exception)
    assert os.environ.get("QUADRIGA_DEBUG") != "1"
