"""Published benchmark results of DBRX and its competitors, as data: every number with its source and protocol.

Source: the launch post of 27 March 2024, tables 1 to 4 (two stored copies agree), and what it quotes. They are never
mixed with numbers measured here: another harness or another prompt gives another number.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

LAUNCH = "Databricks, Introducing DBRX, 2024-03-27"


@dataclass(frozen=True, kw_only=True)
class Benchmark:
    """One row of a published table.

    Attributes:
        protocol: shots and metric, and whose measurement it is.
            values: column -> value in percent unless the protocol says otherwise.
            tasks: our tasks that measure the same by a similar protocol; the first one that was run is shown.
            notes: column -> how its number differs from the protocol.
    """

    name: str
    protocol: str
    values: Mapping[str, float]
    tasks: tuple[str, ...] = ()
    notes: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Table:
    """One published table; ``columns`` are the models."""

    key: str
    title: str
    source: str
    columns: tuple[str, ...]
    benchmarks: tuple[Benchmark, ...]


def _row(columns: tuple[str, ...], *numbers: float | None) -> dict[str, float]:
    return {c: n for c, n in zip(columns, numbers, strict=True) if n is not None}


_OPEN = ("DBRX Instruct", "Mixtral Instruct", "Mixtral Base", "LLaMA2-70B Chat", "LLaMA2-70B Base", "Grok-1")
_XAI = {"Grok-1": "as reported by xAI"}
_OWN_RUN = "EleutherAI's harness by Databricks for DBRX, Open LLM Leaderboard v1 for the others"

_OPEN_TABLE = Table(
    key="open",
    title="Open models",
    source=f"{LAUNCH}, table 1",
    columns=_OPEN,
    benchmarks=(
        Benchmark(
            name="Open LLM Leaderboard, mean of six",
            protocol=_OWN_RUN,
            values=_row(_OPEN, 74.5, 72.7, 68.4, 62.4, 67.9, None),
        ),
        Benchmark(
            name="ARC-challenge",
            protocol=f"25 shots; {_OWN_RUN}",
            values=_row(_OPEN, 68.9, 70.1, 66.4, 64.6, 67.3, None),
            tasks=("arc_challenge",),
        ),
        Benchmark(
            name="HellaSwag",
            protocol=f"10 shots; {_OWN_RUN}",
            values=_row(_OPEN, 89.0, 87.6, 86.5, 85.9, 87.3, None),
            tasks=("hellaswag_10", "hellaswag"),
        ),
        Benchmark(
            name="MMLU",
            protocol=f"5 shots; {_OWN_RUN}",
            values=_row(_OPEN, 73.7, 71.4, 71.9, 63.9, 69.8, 73.0),
            tasks=("mmlu",),
            notes=_XAI,
        ),
        Benchmark(
            name="TruthfulQA",
            protocol=f"0 shots, MC2; {_OWN_RUN}",
            values=_row(_OPEN, 66.9, 65.0, 46.8, 52.8, 44.9, None),
            tasks=("truthfulqa_mc2",),
        ),
        Benchmark(
            name="WinoGrande",
            protocol=f"5 shots; {_OWN_RUN}",
            values=_row(_OPEN, 81.8, 81.1, 81.7, 80.5, 83.7, None),
            tasks=("winogrande",),
        ),
        Benchmark(
            name="GSM8K",
            protocol=f"5 shots, maj@1, the leaderboard's old harness commit; {_OWN_RUN}",
            values=_row(_OPEN, 66.9, 61.1, 57.6, 26.7, 54.1, 62.9),
            tasks=("gsm8k",),
            notes={
                "Grok-1": "8 shots, as reported by xAI",
                "DBRX Instruct": "72.8 with the harness's later parsing",
                "LLaMA2-70B Chat": "48.4 with the harness's later parsing",
            },
        ),
        Benchmark(
            name="Gauntlet v0.3",
            protocol="Databricks, Mosaic Eval Gauntlet v0.3.0, over 30 tasks",
            values=_row(_OPEN, 66.8, 60.7, 56.8, 52.8, 56.4, None),
            tasks=("gauntlet",),
        ),
        Benchmark(
            name="HumanEval",
            protocol="0 shots, pass@1; Databricks unless noted",
            values=_row(_OPEN, 70.1, 54.8, 40.2, 32.2, 31.0, 63.2),
            tasks=("humaneval",),
            notes=_XAI | {"Mixtral Base": "from the Mixtral paper; Databricks measured 36.7"},
        ),
    ),
)

_CLOSED = (
    "DBRX Instruct",
    "GPT-3.5",
    "GPT-4",
    "Claude 3 Haiku",
    "Claude 3 Sonnet",
    "Claude 3 Opus",
    "Gemini 1.0 Pro",
    "Gemini 1.5 Pro",
    "Mistral Medium",
    "Mistral Large",
)
_MAKERS = "as reported by each model's maker"

_CLOSED_TABLE = Table(
    key="closed",
    title="Closed models",
    source=f"{LAUNCH}, table 2",
    columns=_CLOSED,
    benchmarks=(
        Benchmark(
            name="MT-Bench",
            protocol="Inflection's corrected questions, mean of 5 runs, 1 to 10 points; Databricks",
            values=_row(_CLOSED, 8.39, None, None, 8.41, 8.54, 9.03, 8.23, None, 8.05, 8.90),
            notes={"GPT-3.5": "Turbo of that time: 8.58", "GPT-4": "Turbo of that time: 9.27"},
        ),
        Benchmark(
            name="MMLU",
            protocol=f"5 shots; {_MAKERS}",
            values=_row(_CLOSED, 73.7, 70.0, 86.4, 75.2, 79.0, 86.8, 71.8, 81.9, 75.3, 81.2),
            tasks=("mmlu",),
        ),
        Benchmark(
            name="HellaSwag",
            protocol=f"10 shots; {_MAKERS}",
            values=_row(_CLOSED, 89.0, 85.5, 95.3, 85.9, 89.0, 95.4, 84.7, 92.5, 88.0, 89.2),
            tasks=("hellaswag_10",),
        ),
        Benchmark(
            name="HumanEval",
            protocol=f"0 shots, pass@1; {_MAKERS}; DBRX at temperature 0, one sample",
            values=_row(_CLOSED, 70.1, 48.1, 67.0, 75.9, 73.0, 84.9, 67.7, 71.9, 38.4, 45.1),
            tasks=("humaneval",),
        ),
        Benchmark(
            name="GSM8K",
            protocol=f"chain of thought, maj@1; {_MAKERS}; DBRX with the harness's later parsing",
            values=_row(_CLOSED, 72.8, 57.1, 92.0, 88.9, 92.3, 95.0, 86.5, 91.7, 66.7, 81.0),
            tasks=("gsm8k",),
            notes={
                **dict.fromkeys(("DBRX Instruct", "GPT-3.5", "GPT-4", "Mistral Medium", "Mistral Large"), "5 shots"),
                "Gemini 1.0 Pro": "maj1@32",
                "Gemini 1.5 Pro": "11 shots",
            },
        ),
        Benchmark(
            name="WinoGrande",
            protocol=f"5 shots; {_MAKERS}",
            values=_row(_CLOSED, 81.8, 81.6, 87.5, None, None, None, None, None, 88.0, 86.7),
            tasks=("winogrande",),
        ),
    ),
)

_LONG = ("DBRX Instruct", "Mixtral Instruct", "GPT-3.5 Turbo", "GPT-4 Turbo")
_LONG_ROWS = {
    "answer in the beginning third": (45.1, 41.3, 37.3, 49.3),
    "answer in the middle third": (45.3, 42.7, 37.3, 49.0),
    "answer in the last third": (48.0, 44.4, 37.0, 50.9),
    "2K context": (59.1, 64.6, 36.3, 69.3),
    "4K context": (65.1, 59.9, 35.9, 63.5),
    "8K context": (59.5, 55.3, 45.0, 61.5),
    "16K context": (27.0, 20.1, 31.7, 26.0),
    "32K context": (19.9, 14.0, None, 28.5),
}

_LONG_TABLE = Table(
    key="long",
    title="Long context",
    source=f"{LAUNCH}, table 3",
    columns=_LONG,
    benchmarks=tuple(
        Benchmark(
            name=name,
            protocol="mean of KV-Pairs and HotpotQAXL; GPT-3.5 Turbo's means cover at most 16K",
            values=_row(_LONG, *numbers),
        )
        for name, numbers in _LONG_ROWS.items()
    ),
)

_RAG = ("DBRX Instruct", "Mixtral Instruct", "LLaMA2-70B Chat", "GPT-3.5 Turbo", "GPT-4 Turbo")

_RAG_TABLE = Table(
    key="rag",
    title="With retrieved passages",
    source=f"{LAUNCH}, table 4",
    columns=_RAG,
    benchmarks=tuple(
        Benchmark(
            name=name,
            protocol="top 10 Wikipedia passages by bge-large-en-v1.5, the answer contains the gold string",
            values=_row(_RAG, *numbers),
        )
        for name, numbers in {
            "Natural Questions": (60.0, 59.1, 56.5, 57.7, 63.9),
            "HotPotQA": (55.0, 54.2, 54.7, 53.0, 62.9),
        }.items()
    ),
)

TABLES: dict[str, Table] = {table.key: table for table in (_OPEN_TABLE, _CLOSED_TABLE, _LONG_TABLE, _RAG_TABLE)}
