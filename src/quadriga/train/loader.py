"""The training data of a run: packed rows as a pure function of (step, row).

    step -> stage -> mix -> domain -> unit -> tokens          (the arithmetic is train/order.py's)

So a run's position in its data is one integer, the step. Resuming needs no state, any number of ranks can read parts of
the same global batch, and any row can be read again later. There are no loader workers: reading a row takes two binary
searches and a copy from memory-mapped files; ``Prefetcher`` reads the next steps in a thread, for slow disks.

Packing: the documents of a domain are concatenated, each followed by its end token, and cut into rows. Every piece of a
document in a row is one document of the batch: its positions start at 0, it attends only to itself, and the token after
its end is not a target. Every row is full; nothing is padded or dropped.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import msgspec
import numpy as np
import numpy.typing as npt
import torch

from quadriga.errors import ConfigError, CorpusError
from quadriga.train.batch import IGNORE, BatchSource, TrainingBatch
from quadriga.train.corpus.format import Corpus, Stream
from quadriga.train.data_config import DataConfig
from quadriga.train.order import Curriculum, DomainShape, StageShape


class CorpusSource:
    """A :class:`BatchSource` over prepared corpora, in the order of a DataConfig's curriculum.

    Attributes:
        domains: names, in the order of ``TrainingBatch.domains``.
        fingerprint: hash of the corpora and of everything but the stages that determines the order.
        n_steps: steps of the whole curriculum; later steps raise ConfigError.
    """

    def __init__(self, config: DataConfig, corpora: Sequence[Corpus]) -> None:
        self.config = config
        self.n_steps = config.n_steps
        self.domains = tuple(sorted({domain for corpus in corpora for domain in _trained(corpus)}))
        self.streams = [Stream(list(corpora), domain, "train") for domain in self.domains]
        self.curriculum = Curriculum(
            [DomainShape(stream.domain, stream.n_tokens) for stream in self.streams],
            [StageShape(stage.seq_len, stage.n_rows, stage.n_steps, stage.mix) for stage in config.stages],
            config.unit_tokens,
            config.seed,
        )
        self._refuse_too_many_epochs()
        identity = [corpus.manifest.fingerprint for corpus in corpora] + [str(config.seed), str(config.unit_tokens)]
        self.fingerprint = hashlib.sha256("\n".join(identity).encode()).hexdigest()

    def _refuse_too_many_epochs(self) -> None:
        if self.config.max_epochs is None:
            return
        for d, name in enumerate(self.domains):
            if self.curriculum.epochs(d) > self.config.max_epochs:
                raise ConfigError(
                    f"the curriculum reads domain {name!r} {self.curriculum.epochs(d):.1f} times, but data.max_epochs "
                    f"is {self.config.max_epochs:g}. Lower its weights, shorten the stages, or prepare more text."
                )

    def n_rows(self, step: int) -> int:
        """Rows of the global batch (all ranks) at ``step``."""
        return self.config.stages[self.config.stage_at(step)[0]].n_rows

    def seq_len(self, step: int) -> int:
        """Tokens per row at ``step``."""
        return self.config.stages[self.config.stage_at(step)[0]].seq_len

    def rows(self, step: int, first: int, last: int) -> TrainingBatch:
        """Rows [first, last) of the global batch at ``step``: a pure function of its arguments."""
        number, first_step = self.config.stage_at(step)
        stage = self.config.stages[number]
        if not 0 <= first < last <= stage.n_rows:
            raise ConfigError(f"rows must be within 0 .. {stage.n_rows} at step {step}, got {first} .. {last}")
        start = (step - first_step) * stage.n_rows
        places = [self.curriculum.place(number, start + row) for row in range(first, last)]
        return build_batch([(self.streams[d], d, token) for d, token in places], stage.seq_len)

    def history(self, step: int) -> list[str]:
        """The fingerprints of the stages that began before ``step``; saved in checkpoints."""
        begun = self.config.stage_at(max(0, step - 1))[0] + 1 if step else 0
        return [_stage_fingerprint(stage) for stage in self.config.stages[:begun]]

    def check_history(self, saved: Sequence[str]) -> None:
        """Check that the stages a checkpoint has already begun are unchanged.

        Raises:
            ConfigError: such a stage was removed or changed.
        """
        now = [_stage_fingerprint(stage) for stage in self.config.stages]
        for number, fingerprint in enumerate(saved):
            if number >= len(now) or now[number] != fingerprint:
                raise ConfigError(
                    f"data.stages[{number}] has begun in this run and must not change, but it was changed or removed. "
                    "Restore it, and add further stages after it."
                )


class HeldOutSource:
    """A :class:`BatchSource` of one domain's held-out documents: step 0 has all the rows, in order.

    Attributes:
        n_text_bytes: bytes of the held-out text; bits per byte = loss_nats / ln 2 * tokens / bytes.
        n_tokens: tokens of the whole held-out text, of which the rows contain the first n_rows * seq_len.
    """

    def __init__(self, stream: Stream, seq_len: int, max_rows: int | None, fingerprint: str) -> None:
        self.domains = (stream.domain,)
        self.fingerprint = fingerprint
        self.n_tokens, self.n_text_bytes = stream.n_tokens, stream.n_text_bytes
        self._stream, self._seq_len = stream, seq_len
        whole = stream.n_tokens // seq_len
        self._n_rows = whole if max_rows is None else min(whole, max_rows)

    def n_rows(self, step: int) -> int:
        """Number of rows, the same at every step."""
        return self._n_rows

    def seq_len(self, step: int) -> int:
        """Tokens per row, the same at every step."""
        return self._seq_len

    def rows(self, step: int, first: int, last: int) -> TrainingBatch:
        """Rows [first, last) of the held-out text."""
        if not 0 <= first < last <= self._n_rows:
            raise ConfigError(f"rows must be within 0 .. {self._n_rows} of the held-out text, got {first} .. {last}")
        return build_batch([(self._stream, 0, row * self._seq_len) for row in range(first, last)], self._seq_len)


def open_source(config: DataConfig) -> CorpusSource:
    """Open the training data of a run.

    Raises:
        CorpusError: a corpus is missing, damaged, empty, or tokenised with another vocabulary than the first.
        ConfigError: the curriculum does not fit the corpora.
    """
    source = CorpusSource(config, open_corpora(config))
    assert _is_source(source)
    return source


def open_held_out(
    config: DataConfig, *, seq_len: int | None = None, max_rows: int | None = None
) -> Mapping[str, HeldOutSource]:
    """Open the held-out text of a run's corpora, by domain; domains with less than one row of it are left out.

    Args:
        config: the run's data.
        seq_len: tokens per row; None: that of the stage with the longest rows.
        max_rows: at most this many rows per domain.
    """
    corpora = open_corpora(config)
    length = seq_len or max(stage.seq_len for stage in config.stages)
    identity = hashlib.sha256("\n".join(corpus.manifest.fingerprint for corpus in corpora).encode()).hexdigest()
    domains = sorted(
        {shard.domain for corpus in corpora for shard in corpus.manifest.shards if shard.split == "held_out"}
    )
    sources = {
        domain: HeldOutSource(Stream(corpora, domain, "held_out"), length, max_rows, identity) for domain in domains
    }
    return {domain: source for domain, source in sources.items() if source.n_rows(0)}


def open_corpora(config: DataConfig) -> list[Corpus]:
    """Open a run's corpora and check that they share one vocabulary.

    Raises:
        CorpusError: see :func:`open_source`.
    """
    corpora = [Corpus(path, config.n_cache_bytes) for path in config.corpora]
    for corpus in corpora:
        ours, first = corpus.manifest.tokenizer, corpora[0].manifest.tokenizer
        if [file.sha256 for file in ours.files] != [file.sha256 for file in first.files] or ours.end_id != first.end_id:
            raise CorpusError(
                f"corpora of a run must share one vocabulary, but {corpus.where} was tokenised with another one than "
                f"{corpora[0].where}. Prepare it again with `--tokenizer {corpora[0].path}`."
            )
    if not any(_trained(corpus) for corpus in corpora):
        raise CorpusError(f"{', '.join(config.corpora)} has no documents to train on; see `quadriga data inspect`")
    return corpora


def build_batch(rows: Sequence[tuple[Stream, int, int]], seq_len: int) -> TrainingBatch:
    """Build a batch from rows given as (stream, index of the domain, first token)."""
    n = len(rows) * seq_len
    tokens, targets = np.empty(n, dtype=np.int64), np.empty(n, dtype=np.int64)
    starts: list[npt.NDArray[np.int64]] = []
    domains: list[npt.NDArray[np.int16]] = []
    for r, (stream, domain, first) in enumerate(rows):
        row = slice(r * seq_len, (r + 1) * seq_len)
        ids, ends = stream.read(first, seq_len + 1)  # one more token: the target of the last one
        tokens[row], targets[row] = ids[:-1], ids[1:]
        closed = ends[ends <= seq_len] + r * seq_len
        targets[closed - 1] = IGNORE  # the next token belongs to another document
        begins = np.concatenate(([r * seq_len], closed[closed < row.stop]))
        starts.append(begins)
        domains.append(np.full(len(begins), domain, dtype=np.int16))
    begins = np.concatenate(starts)
    bounds = np.append(begins, n)
    positions = np.arange(n) - np.repeat(begins, np.diff(bounds))
    return TrainingBatch(
        tokens=torch.from_numpy(tokens),
        targets=torch.from_numpy(targets),
        positions=torch.from_numpy(positions),
        bounds=torch.from_numpy(bounds.astype(np.int32)),
        domains=torch.from_numpy(np.concatenate(domains)),
    )


class Prefetcher:
    """Wraps a source and reads the same rows of the next ``depth`` steps in a thread, for slow disks.

    Reading is a pure function, so only the timing changes.
    """

    def __init__(self, source: CorpusSource, depth: int = 2) -> None:
        self.domains, self.fingerprint = source.domains, source.fingerprint
        self._source, self._depth = source, depth
        self._pool = ThreadPoolExecutor(1, "prefetch")
        self._ahead: dict[tuple[int, int, int], Future[TrainingBatch]] = {}

    def n_rows(self, step: int) -> int:
        """Rows of the wrapped source's batch at ``step``."""
        return self._source.n_rows(step)

    def seq_len(self, step: int) -> int:
        """Tokens per row of the wrapped source at ``step``."""
        return self._source.seq_len(step)

    def history(self, step: int) -> list[str]:
        """See ``CorpusSource.history``."""
        return self._source.history(step)

    def check_history(self, saved: Sequence[str]) -> None:
        """See ``CorpusSource.check_history``."""
        self._source.check_history(saved)

    def rows(self, step: int, first: int, last: int) -> TrainingBatch:
        """Rows of the wrapped source; starts reading the same rows of the next steps."""
        waiting = self._ahead.pop((step, first, last), None)
        batch = waiting.result() if waiting is not None else self._source.rows(step, first, last)
        for later in range(step + 1, step + 1 + self._depth):
            wanted = (later, first, last)
            if wanted not in self._ahead and self._has(later, last):
                self._ahead[wanted] = self._pool.submit(self._source.rows, *wanted)
        for passed in [key for key in self._ahead if not step < key[0] <= step + self._depth]:
            self._ahead.pop(passed).cancel()
        return batch

    def _has(self, step: int, last: int) -> bool:
        try:
            return last <= self._source.n_rows(step)
        except ConfigError:  # past the curriculum's end
            return False

    def close(self) -> None:
        """Discard the rows read ahead and end the thread."""
        self._pool.shutdown(cancel_futures=True)


def _trained(corpus: Corpus) -> list[str]:
    return [shard.domain for shard in corpus.manifest.shards if shard.split == "train"]


def _stage_fingerprint(stage: msgspec.Struct) -> str:
    return hashlib.sha256(msgspec.json.encode(stage, order="deterministic")).hexdigest()


def _is_source(source: BatchSource) -> bool:
    return bool(source.domains)
