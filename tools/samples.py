"""Write ``src/quadriga/hub/samples``: small parts of the data sets, from a folder that has them whole.

    python tools/samples.py FOLDER

Every row is a row of the set, unchanged. Rows are the first of each file, or of each subject; of the corpus, documents
of at most 60 kB in the order of a hash until each domain has its bytes.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import sys
from collections import Counter
from pathlib import Path

OUT = Path(__file__).parent.parent / "src/quadriga/hub/samples"
ALL = 10**9
FIRST = {  # lines of each file
    "bench/mmlu/dev.jsonl": ALL,
    "bench/hellaswag/validation.jsonl": 100,
    "bench/winogrande/validation_xl.jsonl": 105,
    "bench/arc/challenge_test.jsonl": 50,
    "bench/arc/challenge_validation.jsonl": 40,
    "bench/arc/easy_test.jsonl": 50,
    "bench/arc/easy_validation.jsonl": 40,
    "bench/piqa/validation.jsonl": 100,
    "bench/boolq/validation.jsonl": 60,
    "bench/copa/validation.jsonl": ALL,
    "bench/gsm8k/test.jsonl": 60,
    "bench/gsm8k/train.jsonl": 1100,
    "bench/humaneval/HumanEval.jsonl": ALL,
    "bench/mbpp/mbpp.jsonl": ALL,
    "bench/mosaic_gauntlet/language_understanding/lambada_openai.jsonl": 100,
    "bench/truthfulqa/TruthfulQA.csv": 41,
    "sft/databricks-dolly-15k.jsonl": 1100,
    "preference/dpo_en_demo.jsonl": 100,
}
CORPUS = {"corpus/mix.jsonl": 650_000, "corpus/mix.val.jsonl": 40_000}  # bytes of each domain


def main(folder: Path) -> None:
    """Write every sample, and index.txt."""
    rows = []
    for name, n in FIRST.items():
        rows.append(_write(name, _first(folder / name, n), folder))
    rows.append(_write("bench/mmlu/test.jsonl", _by_subject(folder / "bench/mmlu/test.jsonl", 2), folder))
    rows.append(_write("bench/wikitext2/test.txt", _articles(folder / "bench/wikitext2/test.txt", 6), folder))
    for name, n in CORPUS.items():
        rows.append(_write(name, _documents(folder / name, n), folder))
    (OUT / "index.txt").write_text("".join(f"{row}\n" for row in sorted(rows, key=lambda row: row.split("  ")[-1])))


def _first(path: Path, n: int) -> bytes:
    return b"".join(path.read_bytes().splitlines(keepends=True)[:n])


def _by_subject(path: Path, n: int) -> bytes:
    seen: Counter[str] = Counter()
    kept = []
    for line in path.read_bytes().splitlines(keepends=True):
        subject = json.loads(line)["subject"]
        seen[subject] += 1
        if seen[subject] <= n:
            kept.append(line)
    return b"".join(kept)


def _articles(path: Path, n: int) -> bytes:
    lines = path.read_text().splitlines(keepends=True)
    starts = [i for i, line in enumerate(lines) if line.startswith(" = ") and not line.startswith(" = =")]
    return "".join(lines[: starts[n]]).encode()


def _documents(path: Path, n_bytes: int) -> bytes:
    lines = sorted(path.read_bytes().splitlines(keepends=True), key=lambda line: hashlib.sha256(line).digest())
    have: Counter[str] = Counter()
    kept = []
    for line in lines:
        domain = json.loads(line)["domain"]
        if len(line) <= 60_000 and have[domain] + len(line) <= n_bytes:
            have[domain] += len(line)
            kept.append(line)
    return b"".join(kept)


def _write(name: str, content: bytes, folder: Path) -> str:
    path = OUT / f"{name}.gz"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(content, 9, mtime=0))
    n, whole = content.count(b"\n"), (folder / name).read_bytes().count(b"\n")
    return f"{hashlib.sha256(content).hexdigest()}  {len(content)}  {n}  {whole}  {name}"


if __name__ == "__main__":
    main(Path(sys.argv[1]))
