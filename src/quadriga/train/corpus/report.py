"""Describe corpora, and what a mix would read of them, as plain values that JSON can hold."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from quadriga.errors import ConfigError, CorpusError
from quadriga.train.corpus import vocabulary
from quadriga.train.corpus.format import SPLITS, Corpus, Manifest, Stream
from quadriga.train.corpus.recipe import from_table
from quadriga.train.data_config import DataConfig, StageConfig
from quadriga.train.order import Curriculum, DomainShape, StageShape

_MANY_EPOCHS = 4
"""Up to about four epochs, repeated text was worth almost as much as new text (Muennighoff et al. 2023)."""


_NOTHING = {"documents": 0, "tokens": 0, "text_bytes": 0, "shards": 0}


def describe(manifest: Manifest) -> dict[str, Any]:
    """Describe a corpus: content by split and domain, what each step dropped, the tokenizer, the fingerprint."""
    content: dict[tuple[str, str], dict[str, Any]] = {}
    for shard in manifest.shards:
        empty = {
            "split": shard.split,
            "domain": shard.domain,
            "documents": 0,
            "tokens": 0,
            "text_bytes": 0,
            "shards": 0,
        }
        row = content.setdefault((shard.split, shard.domain), empty)
        row["documents"] += shard.n_documents
        row["tokens"] += shard.n_tokens
        row["text_bytes"] += shard.n_text_bytes
        row["shards"] += 1
    return {
        "content": list(content.values()),
        "steps": manifest.steps,
        "vocabulary": msgspec.to_builtins(manifest.tokenizer),
        "inputs": msgspec.to_builtins(manifest.inputs),
        "fingerprint": manifest.fingerprint,
    }


def show_document(corpus: Corpus, split: str, domain: str | None, number: int) -> str:
    """A document as text, after a line with its origin.

    Raises:
        ConfigError: no such split or domain, or the domain has fewer documents.
    """
    if split not in SPLITS:
        raise ConfigError(f"split must be one of {', '.join(SPLITS)}; got {split!r}")
    if domain not in corpus.domains:
        raise ConfigError(f"--domain must be one of {', '.join(corpus.domains)}; got {domain!r}")
    left = number
    for entry in corpus.manifest.shards:
        if entry.split != split or entry.domain != domain:
            continue
        if 0 <= left < entry.n_documents:
            shard = corpus.shard(entry.name)
            start = int(shard.ends[left - 1]) if left else 0
            ids = shard.tokens[start : shard.ends[left]]
            origin = np.load(corpus.local(f"{entry.name}.origin.npy"), mmap_mode="r")[left]
            text = vocabulary.load(corpus.path).decode(ids[:-1].tolist())
            head = f"# {entry.name}, document {left}: row {origin['row']} of chunk {entry.chunk}, {len(ids)} tokens"
            return f"{head}\n{text}"
        left -= entry.n_documents
    raise ConfigError(
        f"the document must be below {number - left}, the number of documents of {split} / {domain}; got {number}"
    )


def mix_of_run(path: Path) -> dict[str, Any]:
    """What the ``[data]`` section of a run's TOML file reads: tokens and epochs by domain and stage.

    Raises:
        ConfigError: the file has no such section, or the curriculum does not fit the corpora.
    """
    try:
        table = tomllib.loads(path.read_text())
    except (OSError, tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read {path}: {error}") from None
    if "data" not in table:
        raise ConfigError(f"{path} must have a [data] section with corpora and stages")
    config = from_table(table["data"], DataConfig, f"{path.name} [data]")
    return _mix(config, [Corpus(corpus, config.n_cache_bytes) for corpus in config.corpora])


def mix_of_corpora(paths: list[Path], tokens: int, temperature: float) -> dict[str, Any]:
    """A mix over whole corpora with weights n_tokens^temperature, and the TOML for it."""
    if not 0 <= temperature <= 2:
        raise ConfigError(f"temperature must be from 0 to 2, got {temperature}")
    corpora = [Corpus(path) for path in paths]
    sizes = {stream.domain: stream.n_tokens for stream in _streams(corpora)}
    powers = {domain: n**temperature for domain, n in sizes.items()}
    mix = {domain: round(power / sum(powers.values()), 4) for domain, power in powers.items()}
    seq_len = max(length for length in (32, 128, 512, 2048, 4096) if length <= max(32, min(sizes.values())))
    stage = StageConfig(tokens=tokens, seq_len=seq_len, batch_tokens=seq_len, mix=mix)
    config = DataConfig(corpora=[str(path) for path in paths], stages=[stage], unit_tokens=seq_len)
    table = _mix(config, corpora)
    table["notes"].append("mix = {" + ", ".join(f"{domain} = {weight}" for domain, weight in mix.items()) + "}")
    return table


def _streams(corpora: list[Corpus]) -> list[Stream]:
    domains = sorted({s.domain for corpus in corpora for s in corpus.manifest.shards if s.split == "train"})
    if not domains:
        raise CorpusError("the corpora have no documents to train on")
    return [Stream(corpora, domain, "train") for domain in domains]


def _mix(config: DataConfig, corpora: list[Corpus]) -> dict[str, Any]:
    streams = _streams(corpora)
    curriculum = Curriculum(
        [DomainShape(stream.domain, stream.n_tokens) for stream in streams],
        [StageShape(stage.seq_len, stage.n_rows, stage.n_steps, stage.mix) for stage in config.stages],
        config.unit_tokens,
        config.seed,
    )
    stages = [
        {
            "tokens": stage.n_steps * stage.n_batch_tokens,
            "steps": stage.n_steps,
            "seq_len": stage.seq_len,
            "by_domain": {
                stream.domain: curriculum.stage_rows(number, d) * stage.seq_len for d, stream in enumerate(streams)
            },
        }
        for number, stage in enumerate(config.stages)
    ]
    domains = {
        stream.domain: {"tokens": stream.n_tokens, "epochs": curriculum.epochs(d)} for d, stream in enumerate(streams)
    }
    notes = [
        f"{name} is read {entry['epochs']:.1f} times: beyond {_MANY_EPOCHS} epochs, repeated text is worth clearly less"
        for name, entry in domains.items()
        if entry["epochs"] > _MANY_EPOCHS
    ]
    return {"stages": stages, "domains": domains, "steps": config.n_steps, "tokens": config.n_tokens, "notes": notes}
