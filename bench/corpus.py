"""Preparation of training text on one core: bytes and tokens a second of each step, and what a large corpus would take.

    python bench/corpus.py CORPUS.jsonl --tokenizer cl100k_base.tiktoken --tokenizer corpora/mix --bench BENCHMARKS

Every step runs on the same documents, in memory, in this process; the middle of ``--repeat`` times is printed. Beside
our MinHash stands datasketch's, where it is installed, on the first documents, with the same words.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import msgspec
import numpy as np

from quadriga.runtime import cpu_name
from quadriga.text.language import language
from quadriga.train.corpus import minhash, vocabulary
from quadriga.train.corpus.clean import clean
from quadriga.train.corpus.decontaminate import References, clean_pieces, reference_files, reference_ngrams
from quadriga.train.corpus.quality import broken_rule
from quadriga.train.corpus.recipe import Decontaminate, Domain, Duplicates
from quadriga.train.corpus.words import words

TARGET_TOKENS = 12e12


def seconds(run: Callable[[], object], repeat: int) -> float:
    """The median time of a run."""
    times = []
    for _ in range(repeat):
        started = time.perf_counter()
        run()
        times.append(time.perf_counter() - started)
    return statistics.median(times)


def datasketch_seconds(texts: list[str], rules: Duplicates) -> float | None:
    """The same signatures by datasketch, from the same word n-grams."""
    try:
        from datasketch import MinHash
    except ImportError:
        return None
    shingles = [[gram.tobytes() for gram in np.unique(words(text).ngrams(rules.ngram))] for text in texts]
    size = rules.bands * rules.rows
    return seconds(lambda: [MinHash(num_perm=size).update_batch(grams) for grams in shingles], 1)


def main() -> None:
    """Measure, print, and append to a CSV."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("corpus", type=Path)
    parser.add_argument("--tokenizer", type=Path, action="append", default=[])
    parser.add_argument("--bench", help="benchmark files to decontaminate against")
    parser.add_argument("--megabytes", type=float, default=12.0)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--csv", type=Path)
    options = parser.parse_args()

    texts, size = [], 0
    lines = options.corpus.read_bytes().splitlines()
    step = max(1, int(sum(map(len, lines)) / (options.megabytes * 1e6)))
    for line in lines[::step]:  # evenly over the file: all domains
        texts.append(clean(msgspec.json.decode(line)["text"]))
        size += len(texts[-1].encode())
    found = [words(text) for text in texts]
    rules, prose = Duplicates(), Domain()
    grams = reference_ngrams(reference_files([options.bench]), 13) if options.bench else np.empty(0, dtype=np.uint64)
    references = References(grams)
    n = rules.bands * rules.rows
    many = np.random.default_rng(0).integers(0, 2**32, (200_000, n), dtype=np.uint32)
    keys = minhash.band_keys(many, rules.bands, rules.rows)
    steps: dict[str, Callable[[], object]] = {
        "clean-up": lambda: [clean(text) for text in texts],
        "language": lambda: [language(text) for text in texts],
        "words": lambda: [words(text) for text in texts],
        "quality rules": lambda: [broken_rule(text, w, prose) for text, w in zip(texts, found, strict=True)],
        "decontaminate": lambda: [
            clean_pieces(t, w, references, Decontaminate()) for t, w in zip(texts, found, strict=True)
        ],
        "exact hash": lambda: [hashlib.blake2b(text.encode(), digest_size=16).digest() for text in texts],
        "MinHash (112)": lambda: [minhash.signature(w, rules.ngram, n, rules.seed) for w in found],
    }
    taken = {name: seconds(run, options.repeat) for name, run in steps.items()}
    tokenised = {}
    for path in options.tokenizer:
        folder = path if path.is_dir() else path.parent
        tokenizer = vocabulary.load(folder)
        n_tokens = sum(len(tokenizer.encode(text)) for text in texts)
        name = f"tokenise ({tokenizer.n_vocab:,} tokens)"
        taken[name] = seconds(lambda t=tokenizer: [t.encode(text) for text in texts], options.repeat)  # type: ignore[misc]
        tokenised[name] = n_tokens
    first = next(iter(tokenised.values()), None)
    bands = seconds(
        lambda: [minhash.pairs_with_equal_keys(band, np.arange(len(many))) for band in keys], options.repeat
    )
    print(
        f"{cpu_name()}, one core; {len(texts)} documents, {size / 1e6:.1f} MB, "
        f"{first or 0:,} tokens of the first vocabulary"
    )
    rows = []
    for name, time_s in taken.items():
        tokens = tokenised.get(name, first or 0)
        rows.append((name, time_s, size / time_s / 1e6, tokens / time_s / 1e6))
        print(f"{name:28} {rows[-1][2]:8.1f} MB/s {rows[-1][3]:8.2f} M tokens/s")
    dedup = taken["words"] + taken["MinHash (112)"] + taken["exact hash"]
    per_document = bands / len(many)
    print(
        f"de-duplication (words, hash, MinHash): {(first or 0) / dedup / 1e6:.2f} M tokens/s; "
        f"bands {per_document * 1e6:.2f} us a document"
    )
    peer = datasketch_seconds(texts[:60], rules)
    if peer is not None:
        ours = seconds(lambda: [minhash.signature(w, rules.ngram, n, rules.seed) for w in found[:60]], options.repeat)
        print(f"MinHash of 60 documents: ours {ours:.3f} s, datasketch {peer:.3f} s ({peer / ours:.1f}x)")
    if first:
        name = next(iter(tokenised))
        whole = sum(taken[key] for key in steps) + taken[name] + per_document * len(texts)
        core_days = TARGET_TOKENS / first * whole / 86400
        print(
            f"all steps: {first / whole / 1e6:.2f} M tokens/s a core; "
            f"{TARGET_TOKENS / 1e12:.0f}T tokens: {core_days:,.0f} core-days"
        )
        for n_cores in (1_000, 10_000, 100_000):
            print(f"  on {n_cores:,} cores: {core_days / n_cores * 24:,.1f} hours")
    if options.csv:
        with options.csv.open("a", newline="") as file:
            for row in rows:
                csv.writer(file).writerow([cpu_name(), 1, len(texts), size, *row])


if __name__ == "__main__":
    main()
