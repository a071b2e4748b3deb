"""Label the lines of a corpus {text, source, lang} with one of four domains: en, zh, code, math.

    python recipes/quadriga-smol/domains.py $QUADRIGA_DATA/corpus/mix.jsonl mix.domains.jsonl

Long documents are cut at paragraph ends into parts of about PART[domain] characters, some 500 tokens of SmolLM2's
vocabulary each (Chinese is bytes to it), and parts of the four domains take turns in the proportions of TURNS: a
beginning of the result of any length has that mix.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from itertools import cycle
from pathlib import Path

MATH = ("OpenLogic", "prealgebra", "university-physics", "statistics", "college-algebra", "contemporary-mathematics")
PART = {"en": 2400, "zh": 360, "code": 1600, "math": 1800}
TURNS = ("zh", "code", "math", "zh", "en", "code", "math", "zh")


def domain(row: dict[str, str]) -> str:
    """The domain of one line."""
    if row["lang"] == "python":
        return "code"
    if any(name in row["source"] for name in MATH):
        return "math"
    return row["lang"]


def parts(text: str, size: int) -> Iterator[str]:
    """The text cut at paragraph ends."""
    while len(text) > size:
        cut = text.rfind("\n", size // 2, size) + 1 or size
        yield text[:cut]
        text = text[cut:]
    yield text


def main() -> None:
    """Read, label, interleave, write."""
    source, target = map(Path, sys.argv[1:3])
    queues: dict[str, list[str]] = {"en": [], "zh": [], "code": [], "math": []}
    documents: dict[str, list[str]] = {name: [] for name in queues}
    with source.open(encoding="utf-8") as lines:
        for line in lines:
            row = json.loads(line)
            documents[domain(row)].append(row["text"])
    for name, texts in documents.items():
        # A part of every document in turn: any beginning of the result sees many sources.
        open_ones = [parts(text, PART[name]) for text in texts]
        while open_ones:
            still = []
            for one in open_ones:
                part = next(one, None)
                if part is not None:
                    queues[name].append(part)
                    still.append(one)
            open_ones = still
    with target.open("w", encoding="utf-8") as out:
        positions = dict.fromkeys(queues, 0)
        for name in cycle(TURNS):
            if positions[name] == len(queues[name]):
                break  # the shortest domain is used up
            out.write(json.dumps({"text": queues[name][positions[name]], "domain": name}, ensure_ascii=False) + "\n")
            positions[name] += 1


if __name__ == "__main__":
    main()
