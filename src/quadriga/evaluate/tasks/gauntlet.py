"""The Mosaic Eval Gauntlet v0.3: its row formats, its tasks, and the scores of its five categories.

    score of a task     = (accuracy - chance) / (1 - chance)
    score of a category = mean of its tasks            core average = mean of the five categories

A category with a task that was not run has no score, and the missing task is named: a mean over fewer tasks would be a
different figure under the same name.

Rows have one of four formats (``tasks.row_formats``), users' own JSONL files too.
"""

from __future__ import annotations

import hashlib
import re
import string
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from quadriga.errors import EvaluationError
from quadriga.evaluate.data import Data, Row, read_rows
from quadriga.evaluate.items import AnswerItem, ChoiceItem, ClozeItem, Item, Scores
from quadriga.evaluate.tasks.base import Shots, Task
from quadriga.evaluate.tasks.row_formats import checked_row, row_format

_COT = "The answer is "


@dataclass(frozen=True)
class Layout:
    """The delimiters between the parts of a prompt."""

    question: str = ""
    """Before every question, shots included."""
    answer: str = " "
    """Between a question and its answer."""
    example: str = "\n"
    """After each shot."""


def items_of(
    rows: Sequence[Row], shots: int, layout: Layout, group: str = "", pool: Sequence[Row] | None = None
) -> list[Item]:
    """Turn rows of one format into items; shots are drawn from ``pool``, else from the same rows, never the question.

    Raises:
        EvaluationError: no rows, too few for the shots, or a row that is malformed or has another format.
    """
    if not rows:
        raise EvaluationError("a task needs at least one question, got a file without rows")
    format_name, draw, items = row_format(rows[0]), Shots(shots), list[Item]()
    rows = [checked_row(row, format_name, f"row {number}") for number, row in enumerate(rows, 1)]
    if pool is not None:
        pool = [checked_row(row, format_name, f"row {number} of the pool") for number, row in enumerate(pool, 1)]
    for row in rows:
        examples = draw.draw(rows, row) if pool is None else draw.draw(pool)
        before = "".join(_solved(one, format_name, layout) + layout.example for one in examples)
        items.append(_ITEM[format_name](before, row, layout, group or row.get("category", "")))
    return items


def _solved(row: Row, format_name: str, layout: Layout) -> str:
    """A row with the right answer filled in, as shown in an example."""
    match format_name:
        case "schema":
            return f"{layout.question}{row['context_options'][row['gold']]}{layout.answer}{row['continuation'].strip()}"
        case "choice":
            end = row["choices"][row["gold"]]
        case "cloze":
            end = row["continuation"].strip()
        case _:
            thought = row.get("chain_of_thought", "")
            end = f"{thought.strip()} {_COT}{row['answer']}" if thought else row["answer"]
    question = row["query" if format_name == "choice" else "context"].rstrip(" ")
    return f"{layout.question}{question}{layout.answer}{end}"


def _choice(before: str, row: Row, layout: Layout, group: str) -> Item:
    context = f"{before}{layout.question}{row['query'].rstrip(' ')}"
    choices = tuple(row["choices"])
    pairs = tuple((context, f"{layout.answer}{choice}") for choice in choices)
    return ChoiceItem(pairs=pairs, gold=row["gold"], texts=choices, group=group)


def _schema(before: str, row: Row, layout: Layout, group: str) -> Item:
    end = layout.answer + row["continuation"].strip()
    pairs = tuple((f"{before}{layout.question}{start.rstrip(' ')}", end) for start in row["context_options"])
    return ChoiceItem(pairs=pairs, gold=row["gold"], group=group)


def _cloze(before: str, row: Row, layout: Layout, group: str) -> Item:
    context = f"{before}{layout.question}{row['context'].rstrip(' ')}"
    return ClozeItem(context=context, continuation=layout.answer + row["continuation"].strip(), group=group)


def _question(before: str, row: Row, layout: Layout, group: str) -> Item:
    prompt = f"{before}{layout.question}{row['context'].rstrip(' ')}{layout.answer.rstrip(' ')}"
    accepted = [row["answer"], *row.get("aliases", ())]
    thinks = "chain_of_thought" in row
    return AnswerItem(prompt=prompt, grader=_starts_with(accepted, thinks=thinks), group=group)


_ITEM: dict[str, Callable[[str, Row, Layout, str], Item]] = {
    "choice": _choice,
    "schema": _schema,
    "cloze": _cloze,
    "question": _question,
}


def _starts_with(accepted: Sequence[str], *, thinks: bool) -> Callable[[str], Scores]:
    """A grader: right if the answer starts with an accepted one; with ``thinks``, the part after "The answer is "."""

    def grade(answer: str) -> Scores:
        if thinks:
            answer = answer.split(_COT, 1)[1] if _COT in answer else answer
            right = any(answer.strip().lower().startswith(one.strip().lower()) for one in accepted)
        else:
            right = any(_normalised(answer, like=one).startswith(_normalised(one, like=one)) for one in accepted)
        return {"acc": float(right)}

    return grade


def normalised(text: str) -> str:
    """Normalise an answer as TriviaQA does: lower case, no punctuation, no articles, single spaces."""
    text = "".join(" " if c in string.punctuation + "‘’´`_" else c for c in text.lower())
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def _normalised(text: str, *, like: str) -> str:
    """As ``normalised``, unless that leaves nothing of ``like`` ("+", "A"): then without case and outer spaces."""
    return normalised(text) if normalised(like) else text.strip().lower()


def own_task(path: Path) -> Task:
    """A task from a user's JSONL file, in any language and any of the four row formats."""
    rows = read_rows(path)
    format_name = row_format(rows[0]) if rows else "choice"
    digest = hashlib.sha256(path.read_bytes()).hexdigest()

    def build(data: Data, shots: int) -> list[Item]:
        data.used[path.name] = digest
        return items_of(rows, shots, Layout())

    return Task(
        name=path.name,
        version=1,
        title=path.stem,
        protocol=f"{path.name}, row format {format_name}, as it is; shots from the same file.",
        kind="generate" if format_name == "question" else "likelihood",
        shots=0,
        build=build,
        main="acc_norm" if format_name == "choice" else "acc",
        max_new_tokens=128,
        stop=("\n\n", "Question:"),
        by_group=any(row.get("category") for row in rows),
    )


# The tasks -----------------------------------------------------------------------------------------------------------

_ANSWER = Layout(answer="\nAnswer: ")
_A = Layout(answer="\n\nA:", question="Q: ")
_PLAIN = Layout()


@dataclass(frozen=True)
class Part:
    """One task of a category: name, shots, score of guessing, data file and layout."""

    name: str
    shots: int
    chance: float
    file: str | None
    """Path under mosaic_gauntlet/ without .jsonl; None if the data does not contain it."""
    layout: Layout = _PLAIN


CATEGORIES: dict[str, tuple[Part, ...]] = {
    "world_knowledge": (
        Part("jeopardy", 3, 0.0, "world_knowledge/jeopardy_all", _ANSWER),
        Part("bigbench_qa_wikidata", 3, 0.0, "world_knowledge/bigbench_qa_wikidata"),
        Part("arc_easy", 3, 0.25, "world_knowledge/arc_easy", _ANSWER),
        Part("arc_challenge", 3, 0.25, "world_knowledge/arc_challenge", _ANSWER),
        Part("mmlu", 5, 0.25, "mmlu", _ANSWER),
        Part("triviaqa_sm_sub", 3, 0.0, "world_knowledge/triviaqa_sm_sub"),
    ),
    "commonsense_reasoning": (
        Part("copa", 0, 0.5, "commonsense_reasoning/copa"),
        Part("siqa", 3, 0.5, "commonsense_reasoning/siqa"),
        Part("commonsense_qa", 0, 0.25, "commonsense_reasoning/commonsense_qa"),
        Part("piqa", 0, 0.5, "commonsense_reasoning/piqa", _ANSWER),
        Part("openbook_qa", 10, 0.25, "commonsense_reasoning/openbook_qa"),
        Part("bigbench_strange_stories", 0, 0.5, "commonsense_reasoning/bigbench_strange_stories"),
        Part("bigbench_strategy_qa", 0, 0.5, "commonsense_reasoning/bigbench_strategy_qa"),
    ),
    "language_understanding": (
        Part("lambada_openai", 0, 0.0, "language_understanding/lambada_openai"),
        Part("hellaswag", 0, 0.25, "hellaswag"),
        Part("winograd", 3, 0.5, "language_understanding/winograd_wsc"),
        Part("winogrande", 5, 0.5, "language_understanding/winogrande"),
    ),
    "symbolic_problem_solving": (
        Part("bigbench_elementary_math_qa", 1, 0.25, None),
        Part("bigbench_dyck_languages", 5, 0.0, "symbolic_problem_solving/bigbench_dyck_languages"),
        Part("bigbench_operators", 3, 0.0, "symbolic_problem_solving/bigbench_operators"),
        Part("simple_arithmetic_withspaces", 5, 0.0, "symbolic_problem_solving/simple_arithmetic_withspaces"),
        Part("simple_arithmetic_nospaces", 5, 0.0, "symbolic_problem_solving/simple_arithmetic_nospaces"),
        Part("gsm8k", 0, 0.0, "symbolic_problem_solving/gsm8k_prepended_8shot", Layout(answer="\n\nA:")),
        Part("svamp", 5, 0.0, "symbolic_problem_solving/svamp", _A),
        Part("agi_eval_lsat_ar", 5, 0.25, "symbolic_problem_solving/agi_eval_lsat_ar"),
    ),
    "reading_comprehension": (
        Part("squad", 3, 0.0, None),
        Part("boolq", 0, 0.5, "reading_comprehension/boolq", _ANSWER),
        Part("coqa", 0, 0.0, None),
        Part("agi_eval_lsat_rc", 5, 0.25, "reading_comprehension/agi_eval_lsat_rc"),
        Part("agi_eval_lsat_lr", 5, 0.25, "reading_comprehension/agi_eval_lsat_lr"),
        Part("agi_eval_sat_en", 5, 0.25, "reading_comprehension/agi_eval_sat_en"),
    ),
}

_GENERATED = ("triviaqa_sm_sub", "gsm8k", "svamp")
_GROUPED = ("jeopardy", "mmlu")


def _rows(data: Data, file: str) -> dict[str, list[Row]]:
    """A part's rows by sub-category. MMLU and HellaSwag are read from their own files into the Gauntlet's format."""
    if file == "mmlu":
        found: dict[str, list[Row]] = {}
        for row in data.rows("mmlu/test.jsonl"):
            lines = "\n".join(f"{x}. {c}" for x, c in zip("ABCD", row["choices"], strict=True))
            query = f"{row['question'].strip()}\n{lines}"
            found.setdefault(row["subject"], []).append(
                {"query": query, "choices": ["A", "B", "C", "D"], "gold": row["answer"]}
            )
        return found
    if file == "hellaswag":
        rows = [
            {
                "query": f"{row['activity_label']}: {row['ctx_a']} {row['ctx_b'].capitalize()}".strip(),
                "choices": row["endings"],
                "gold": int(row["label"]),
            }
            for row in data.rows("hellaswag/validation.jsonl")
        ]
        return {"": rows}
    rows = data.rows(f"mosaic_gauntlet/{file}.jsonl")
    if "category" not in rows[0]:
        return {"": rows}
    by_category: dict[str, list[Row]] = {}
    for row in rows:
        by_category.setdefault(row["category"], []).append(row)
    return by_category


def _build(part: Part) -> Callable[[Data, int], list[Item]]:
    def build(data: Data, shots: int) -> list[Item]:
        assert part.file is not None, "a part without data is not run"
        by_group = _rows(data, part.file)
        return [item for group, rows in by_group.items() for item in items_of(rows, shots, part.layout, group)]

    return build


def _gauntlet_task(category: str, part: Part) -> Task:
    generated = part.name in _GENERATED
    metric = "acc" if generated else "acc_tokens"
    cloze = part.chance == 0.0
    return Task(
        name=f"gauntlet_{part.name}",
        version=1,
        title=f"Gauntlet {part.name}",
        protocol=f"Mosaic Eval Gauntlet v0.3, {category}, {part.shots} shots; choices by mean log-probability of a "
        "token. Shots are drawn with Python's generator (seed 1234), not with theirs.",
        kind="generate" if generated else "likelihood",
        shots=part.shots,
        build=_build(part),
        main="acc" if cloze else metric,
        chance=part.chance,
        fixed_shots=True,
        max_new_tokens=256 if part.name in ("gsm8k", "svamp") else 32,
        stop=("\n\n", "Question:", "Q:"),
        by_group=part.name in _GROUPED,
    )


TASKS = tuple(
    _gauntlet_task(category, part) for category, parts in CATEGORIES.items() for part in parts if part.file is not None
)

MISSING = tuple(part.name for parts in CATEGORIES.values() for part in parts if part.file is None)
"""Names of Gauntlet tasks whose data is not available here."""


@dataclass(frozen=True)
class GauntletScore:
    """Scores by task, and by category where all tasks of the category ran."""

    tasks: dict[str, float]
    categories: dict[str, float]
    missing: dict[str, tuple[str, ...]]
    """Category -> its tasks without a result."""
    partial: dict[str, float]
    """For categories with missing tasks, the mean over the others: not comparable with published figures."""
    core_average: float | None
    """Mean of the five categories; None if any task is missing."""


def gauntlet_score(accuracies: Mapping[str, float]) -> GauntletScore:
    """Compute the Gauntlet's scores.

    Args:
        accuracies: task name without "gauntlet_" -> accuracy.

    Raises:
        EvaluationError: a name that is not a task of the Gauntlet.
    """
    known = {part.name: part for parts in CATEGORIES.values() for part in parts}
    for name in accuracies:
        if name not in known:
            raise EvaluationError(f"{name!r} is not a task of the Gauntlet; its tasks are {', '.join(known)}")
    tasks = {name: (a - known[name].chance) / (1 - known[name].chance) for name, a in accuracies.items()}
    categories: dict[str, float] = {}
    partial: dict[str, float] = {}
    missing: dict[str, tuple[str, ...]] = {}
    for category, parts in CATEGORIES.items():
        present = [tasks[part.name] for part in parts if part.name in tasks]
        absent = tuple(part.name for part in parts if part.name not in tasks)
        if absent:
            missing[category] = absent
            if present:
                partial[category] = sum(present) / len(present)
        else:
            categories[category] = sum(present) / len(present)
    core = None if missing else sum(categories.values()) / len(categories)
    return GauntletScore(tasks, categories, missing, partial, core)
