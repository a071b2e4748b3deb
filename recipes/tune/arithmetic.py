"""Small arithmetic whose answers can be checked: sums and differences to train on, and others that are held out.

    python recipes/tune/arithmetic.py runs/arithmetic-data        train.jsonl and test.jsonl

All a + b and a - b > 0 of numbers from 2 to 49; 500 of them are in test.jsonl only. Every run writes the same rows.
"""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path

N_HELD_OUT = 500


def main(folder: Path) -> None:
    """Write both files: a question, its answer, and the pattern of a text that begins with it."""
    pairs = [(a, b) for a in range(2, 50) for b in range(2, 50)]
    problems = [(f"{a} + {b}", a + b) for a, b in pairs] + [(f"{a} - {b}", a - b) for a, b in pairs if a > b]
    random.Random(7).shuffle(problems)
    folder.mkdir(parents=True, exist_ok=True)
    for name, some in (("test.jsonl", problems[:N_HELD_OUT]), ("train.jsonl", problems[N_HELD_OUT:])):
        rows = [{"question": q, "answer": str(n), "pattern": rf"^\s*{n}(?!\d)"} for q, n in some]
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
        print(f"{folder / name}: {len(rows)} questions")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
