"""Corpus preparation: the steps in order, a journal of finished tasks, and the manifest at the end.

    hash inputs ─► references ─► clean ×chunks ─► pairs ×bands ─► mark ─► vocabulary ─► tokenise ×chunks ─► manifest

All work is done in OUT.part. Each finished task writes a journal entry; a killed run continues with the tasks that have
none, and ends with the same bytes. Number, machines and order of the workers make no difference: the recipe determines
the chunks, and every task is a pure function of its arguments.
"""

from __future__ import annotations

import hashlib
import logging
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from quadriga.errors import ConfigError, CorpusError
from quadriga.train.corpus import format as corpus_format
from quadriga.train.corpus import tasks, vocabulary
from quadriga.train.corpus.decontaminate import reference_files
from quadriga.train.corpus.executors import Executor, Task
from quadriga.train.corpus.format import ChunkEntry, FileEntry, InputEntry, Manifest, ShardEntry, TokenizerEntry
from quadriga.train.corpus.readers import Chunk, plan_chunks
from quadriga.train.corpus.recipe import Recipe

_logger = logging.getLogger(__name__)

PIPELINE = 1
"""Version of the pipeline; incremented when the same recipe and inputs give other bytes than before."""

Progress = Callable[[int, int, str], None]


@dataclass(frozen=True)
class Run:
    """A preparation in progress."""

    recipe: Recipe
    out: Path
    part: Path
    executor: Executor
    progress: Progress
    chunks: list[Chunk]
    reference_files: list[str]

    @property
    def work(self) -> str:
        """Folder for temporary files, as an absolute path, since workers may have another current directory."""
        return str((self.part / "work").absolute())

    def step(self, name: str, wanted: list[Task]) -> list[dict[str, Any]]:
        """Run a step's tasks, except those in the journal, and return all results in the order of the tasks."""
        results = {task.name: self._journalled(task.name) for task in wanted}
        open_tasks = [task for task in wanted if results[task.name] is None]
        total = sum(task.n_bytes for task in wanted)
        done = total - sum(task.n_bytes for task in open_tasks)
        self.progress(done, total, name)
        for task, result in self.executor.run(open_tasks):
            tasks.write_file(Path(self.work) / "journal" / f"{task.name}.json", msgspec.json.encode(result))
            results[task.name] = result
            done += task.n_bytes
            self.progress(done, total, name)
        return [result for result in results.values() if result is not None]

    def _journalled(self, name: str) -> dict[str, Any] | None:
        file = Path(self.work) / "journal" / f"{name}.json"
        return msgspec.json.decode(file.read_bytes(), type=dict[str, Any]) if file.exists() else None


def prepare(
    recipe: Recipe,
    out: Path,
    executor: Executor,
    *,
    chunk_bytes: int,
    tokenizer: Path | None = None,
    progress: Progress = lambda done, total, what: None,
    restart: bool = False,
    expected_inputs: list[InputEntry] | None = None,
) -> Manifest:
    """Prepare the corpus that a recipe describes.

    Args:
        recipe: everything that determines the result.
        out: folder to create; must not exist.
        executor: runs the tasks.
        chunk_bytes: ``recipe.chunk`` in bytes.
        tokenizer: the file or folder of ``recipe.tokenizer.path``; None if the tokenizer is trained.
        progress: called with (bytes done, bytes in total, step).
        restart: discard an interrupted run.
        expected_inputs: hashes that the inputs must have, to make a corpus again from its manifest.

    Raises:
        CorpusError: inputs cannot be read or have changed, or no document is left.
        ConfigError: ``out`` exists, or an interrupted run there had another recipe.
    """
    run = _begin(recipe, out, executor, chunk_bytes, progress, restart)
    inputs = _hash_inputs(run, expected_inputs)
    run.step(
        "benchmarks",
        [Task("references", tasks.references, (run.work, run.reference_files, recipe.decontaminate.ngram))],
    )
    cleaned = run.step(
        "clean and filter",
        [
            Task(f"clean-{chunk.number:05}", tasks.clean_chunk, (run.work, recipe, chunk), chunk.n_bytes)
            for chunk in run.chunks
        ],
    )
    sizes = [result["documents"] for result in cleaned]
    _check_what_is_left(recipe, cleaned)
    duplicates = _duplicates(run, sizes)
    _vocabulary(run, sizes, tokenizer, cleaned)
    tokenised = run.step(
        "tokenise",
        [
            Task(
                f"tokenise-{chunk.number:05}",
                tasks.tokenise_chunk,
                (run.work, str(run.part.absolute()), recipe, chunk, sizes),
                chunk.n_bytes,
            )
            for chunk in run.chunks
        ],
    )
    manifest = _manifest(run, inputs, cleaned, duplicates, tokenised)
    tasks.write_file(run.part / "manifest.json", msgspec.json.format(msgspec.json.encode(manifest), indent=1))
    run.part.rename(out)
    shutil.rmtree(out / "work")
    return manifest


def _begin(recipe: Recipe, out: Path, executor: Executor, chunk_bytes: int, progress: Progress, restart: bool) -> Run:
    if out.exists():
        raise ConfigError(f"{out} must not exist already. Choose another folder, or remove it.")
    part = out.with_name(out.name + ".part")
    if restart and part.exists():
        shutil.rmtree(part)
    files = reference_files(recipe.decontaminate.paths)
    run = Run(recipe, out, part, executor, progress, plan_chunks(recipe, chunk_bytes), files)
    (Path(run.work) / "journal").mkdir(parents=True, exist_ok=True)
    plan = hashlib.sha256(msgspec.json.encode([recipe, run.chunks, files, PIPELINE])).hexdigest()
    begun = Path(run.work) / "plan"
    if begun.exists() and begun.read_text() != plan:
        raise ConfigError(
            f"{part} was begun with another recipe, other inputs or another version. Finish it with those, or start "
            "over with --restart."
        )
    tasks.write_file(begun, plan.encode())
    return run


def _hash_inputs(run: Run, expected: list[InputEntry] | None) -> list[InputEntry]:
    """Hash the inputs and the benchmark files."""
    paths = list(dict.fromkeys(part.path for chunk in run.chunks for part in chunk.parts)) + run.reference_files
    hashed = run.step("hash inputs", [Task(f"hash-{i:06}", tasks.hash_input, (path,)) for i, path in enumerate(paths)])
    entries = [msgspec.convert(entry, InputEntry) for entry in hashed]
    was = {entry.path: entry.sha256 for entry in expected or []}
    changed = [entry.path for entry in entries if was and was.get(entry.path) != entry.sha256]
    if changed:
        raise CorpusError(f"inputs must have the hashes in the manifest; these have changed: {', '.join(changed[:5])}")
    return entries


def _check_what_is_left(recipe: Recipe, cleaned: list[dict[str, Any]]) -> None:
    """Refuse to go on with nothing, and say which domains' rules no row had a use for."""
    counts: tasks.Counts = {}
    for result in cleaned:
        tasks.add_counts(counts, result["counts"])
    if not any(result["documents"] for result in cleaned):
        steps = [{"step": name, "domains": counts.get(name, {})} for name in tasks.STEPS[:-1]]
        raise CorpusError(f"nothing is left of the text: every document was dropped. Counts by step: {steps}")
    met = sorted(set(counts["read"]))
    for name in sorted(set(recipe.domains) - set(met)):
        _logger.warning("the recipe's rules for domain %r are unused: the rows have %s", name, ", ".join(met))


def _duplicates(run: Run, sizes: list[int]) -> dict[str, Any]:
    rules = run.recipe.duplicates
    bands = [-1] * rules.exact + list(range(rules.bands)) * rules.near
    found = run.step(
        "find duplicates",
        [
            Task(f"pairs-{band}-{p}", tasks.find_pairs, (run.work, run.recipe, sizes, band, p))
            for band in bands
            for p in range(rules.partitions)
        ],
    )
    (marked,) = run.step("mark duplicates", [Task("mark", tasks.mark, (run.work, run.recipe, sizes))])
    return {**marked, "pairs_met": sum(f["met"] for f in found), "pairs_joined": sum(f["pairs"] for f in found)}


def _vocabulary(run: Run, sizes: list[int], given: Path | None, cleaned: list[dict[str, Any]]) -> None:
    if run.recipe.tokenizer.train is None:
        assert given is not None, "a recipe either trains a tokenizer or names one"
        vocabulary.copy_vocabulary(given, run.part)
        return
    n_bytes = sum(entry["bytes"] for result in cleaned for entry in result["counts"]["decontaminate"].values())
    work_args = (run.work, run.recipe, sizes, n_bytes, str(run.part.absolute()))
    run.step("train a vocabulary", [Task("vocabulary", tasks.train_vocabulary, work_args)])


def _manifest(
    run: Run,
    inputs: list[InputEntry],
    cleaned: list[dict[str, Any]],
    duplicates: dict[str, Any],
    tokenised: list[dict[str, Any]],
) -> Manifest:
    counts: tasks.Counts = {}
    for result in [*cleaned, *tokenised]:
        tasks.add_counts(counts, result["counts"])
    steps = [{"step": name, "domains": counts.get(name, {})} for name in tasks.STEPS]
    steps[-1].update(duplicates)
    shards = [msgspec.convert(entry, ShardEntry) for result in tokenised for entry in result["shards"]]
    shards.sort(key=lambda shard: shard.name)
    if not shards:
        raise CorpusError(f"nothing is left of the text: every document was dropped. Counts by step: {steps}")
    loaded = vocabulary.load(run.part)
    files = [_file_entry(run.part, name) for name in vocabulary.vocabulary_files(run.part)]
    end = vocabulary.end_id(loaded, run.recipe.tokenizer.end_token)
    tokenizer = TokenizerEntry(files=files, n_vocab=loaded.n_vocab, end_id=end, dtype=tasks.token_dtype(loaded))
    n_references = len(run.reference_files)
    return Manifest(
        version=corpus_format.VERSION,
        pipeline=PIPELINE,
        recipe=msgspec.to_builtins(run.recipe),
        inputs=inputs[: len(inputs) - n_references],
        chunks=[
            ChunkEntry(source=chunk.source, path=part.path, start=part.start, stop=part.stop)
            for chunk in run.chunks
            for part in chunk.parts
        ],
        references=inputs[len(inputs) - n_references :],
        tokenizer=tokenizer,
        steps=steps,
        shards=shards,
        fingerprint=corpus_format.fingerprint(tokenizer, shards),
    )


def _file_entry(root: Path, name: str) -> FileEntry:
    file = root / name
    return FileEntry(path=name, n_bytes=file.stat().st_size, sha256=corpus_format.file_sha256(file))
