"""A fake model that answers by rule, so that every score can be computed by hand, and made-up data for the tasks."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from quadriga.evaluate.data import Data
from quadriga.evaluate.model import Done, Message, quietly


@dataclass(frozen=True)
class Said:
    """A ``Likelihood`` with given values."""

    logprob: float
    greedy: bool = False
    n_tokens: int = 1


@dataclass
class RuleModel:
    """Scores pairs with ``rule`` and generates with ``write``; counts the requests."""

    rule: Callable[[str, str], Said] = lambda context, continuation: Said(-float(len(continuation)))
    write: Callable[[str], str] = lambda prompt: ""
    name: str = "rule"
    context: int = 4096
    identity: dict[str, str] = field(default_factory=lambda: {"model": "rule", "weights": "0"})
    n_pairs: int = 0
    n_prompts: int = 0
    seeds: list[int | None] = field(default_factory=list)
    temperatures: list[float] = field(default_factory=list)
    dies_after: int | None = None
    """Raise KeyboardInterrupt after this many pairs."""

    def loglikelihoods(self, requests: Sequence[tuple[str, str]], *, done: Done = quietly) -> list[Said]:
        self.n_pairs += len(requests)
        if self.dies_after is not None and self.n_pairs > self.dies_after:
            raise KeyboardInterrupt
        return [self.rule(*request) for request in requests]

    def rolling(self, texts: Sequence[str], *, done: Done = quietly) -> list[Said]:
        return [Said(-0.5 * len(text), n_tokens=len(text) // 2) for text in texts]

    def generate(
        self,
        prompts: Sequence[str],
        *,
        max_new_tokens: int,
        stop: Sequence[str] = (),
        temperature: float = 0.0,
        seed: int | None = None,
        done: Done = quietly,
    ) -> list[str]:
        self.n_prompts += len(prompts)
        self.seeds.append(seed)
        return [self.write(prompt) for prompt in prompts]

    def converse(
        self,
        conversations: Sequence[Sequence[Message]],
        *,
        max_new_tokens: int,
        temperature: float = 0.0,
        seed: int | None = None,
        done: Done = quietly,
    ) -> list[str]:
        self.n_prompts += len(conversations)
        self.seeds.append(seed)
        self.temperatures.append(temperature)
        return [self.write("\n".join(f"{one['role']}: {one['content']}" for one in talk)) for talk in conversations]

    def count_tokens(self, text: str) -> int:
        return len(text.split())


class Unchecked(Data):
    """Reads made-up files under the names of published ones."""

    def bytes(self, name: str) -> bytes:
        assert self.folder is not None
        return (self.folder / name).read_bytes()


def write(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Rows as the kind of file that the name says."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        pa = pytest.importorskip("pyarrow")
        from pyarrow import parquet

        parquet.write_table(pa.Table.from_pylist(list(rows)), path)
    elif path.suffix == ".csv":
        with path.open("w", newline="", encoding="utf-8") as out:
            writer = csv.DictWriter(out, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    else:
        path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
