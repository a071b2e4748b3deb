"""The rows of a tuning run: read by its objective's layout, split into training and held-out, packed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeVar

from quadriga.errors import ConfigError, CorpusError
from quadriga.hub import data_sets
from quadriga.text.chat import BUILT_IN
from quadriga.text.tokenizer import Tokenizer
from quadriga.train import chat_data
from quadriga.train.batch import IGNORE, BatchSource
from quadriga.train.chat_data import Example, Preference, Problem, Rejects
from quadriga.train.corpus.readers import resolve
from quadriga.train.corpus.vocabulary import end_id
from quadriga.train.packing import ExampleSource
from quadriga.train.tune_config import TuneConfig

T = TypeVar("T")


class TuneRows(NamedTuple):
    """The rows of a run."""

    train: ExampleSource
    held_out: dict[str, BatchSource]
    """By label; of grpo none."""
    problems: dict[tuple[int, ...], Problem]
    """grpo: all questions, by the prompt's token ids."""
    questions: list[Problem]
    """grpo: those that are held out."""
    rejects: Rejects


def read_data(config: TuneConfig, tokenizer: Tokenizer) -> TuneRows:
    """Read the data of a run.

    Raises:
        CorpusError: unreadable files, too few usable rows, or a question with two answers for grpo.
        ConfigError: no chat template has the name that ``data.template`` gives.
    """
    data = config.data
    _refuse_unknown_template(data.template)
    rejects = Rejects(limit=data.max_bad_rows)
    data_sets.log_samples(f.removeprefix("data:") for f in (*data.files, *data.held_out) if f.startswith("data:"))
    if config.objective == "grpo":
        return _questions(config, tokenizer, rejects)
    names, make, weigh = _maker(config, tokenizer)
    train, test = _split(config, make, rejects)
    if not train:
        raise CorpusError(f"no row to train on is left: {len(test)} are held out, every {data.held_out_every}-th")
    pad = tokenizer.pad_id if tokenizer.pad_id is not None else 0

    def packed(some: Sequence[tuple[Example, ...]], rows: int) -> ExampleSource:
        return ExampleSource(
            some, names, n_rows=rows, seq_len=data.seq_len * len(names), weigh=weigh, pad=pad, seed=config.seed
        )

    held_out: dict[str, BatchSource] = {}
    for label in sorted({label for label, _ in test}):
        some = [group for one, group in test if one == label]
        whole = packed(some, 1)
        held_out[label] = packed(some, min(config.evaluate.rows, whole.rows_per_epoch))
    return TuneRows(packed([group for _, group in train], data.rows), held_out, {}, [], rejects)


def _refuse_unknown_template(template: str | None) -> None:
    """A name that no template has would be taken for the text of one, which writes itself for every conversation."""
    if template is not None and template not in BUILT_IN and "{" not in template:
        raise ConfigError(
            f"data.template must be one of {', '.join(sorted(BUILT_IN))}, or the text of a template; got {template!r}"
        )


def _split(config: TuneConfig, make: Callable[[dict[str, Any]], list[T]], rejects: Rejects) -> tuple[list[T], list[T]]:
    """(what is trained on, what is held out) of what ``make`` makes of the rows."""
    data = config.data
    found = chat_data.read([resolve(f) for f in data.files], make, rejects, limit=data.max_rows)
    if data.held_out:
        kept = chat_data.read([resolve(f) for f in data.held_out], make, rejects)
        return [one for row in found for one in row], [one for row in kept for one in row]
    # Whole rows: the pieces of a long text are on one side.
    every = data.held_out_every
    parts: tuple[list[T], list[T]] = ([], [])
    for i, row in enumerate(found):
        parts[i % every == every - 1].extend(row)
    return parts


def _questions(config: TuneConfig, tokenizer: Tokenizer, rejects: Rejects) -> TuneRows:
    """The rows of grpo: a question for each row of a batch; one that occurs twice is one, held out if it ever is.

    So a batch has no question twice, and an answer's seed can follow from its question.
    """
    data, rewards = config.data, config.grpo.rewards
    compared = any(one.kind in ("number", "text") for one in rewards)
    columns = [one.column or "test" for one in rewards if one.kind in ("regex", "json", "code")]

    def make(row: dict[str, Any]) -> list[Problem]:
        one = chat_data.problem(row, tokenizer, data.seq_len, data.template)
        if compared and not one.answer:
            raise chat_data.BadRowError("no answer that a sampled one could be compared with")
        return [one]

    train, test = _split(config, make, rejects)
    problems: dict[tuple[int, ...], Problem] = {}
    for one in (*train, *test):
        known = problems.setdefault(one.ids, one)
        if [known.answer, *map(known.row.get, columns)] != [one.answer, *map(one.row.get, columns)]:
            asked = tokenizer.decode(one.ids)[-200:]
            raise CorpusError(f"a question must have one answer, but {asked!r} has two: {known.answer!r} is the other")
    held_out = {one.ids: one for one in test}
    learnt = {one.ids: one for one in train if one.ids not in held_out}
    if len(learnt) < data.rows:
        raise CorpusError(f"data.rows must be at most the number of questions, {len(learnt)}, got {data.rows}")
    source = ExampleSource(
        [(_prompt(one),) for one in learnt.values()], ("prompt",), n_rows=data.rows, seq_len=data.seq_len,
        weigh="groups", pad=tokenizer.pad_id or 0, seed=config.seed, together=False,
    )  # fmt: skip
    return TuneRows(source, {}, problems, [*held_out.values()][: config.evaluate.rows], rejects)


def _maker(
    config: TuneConfig, tokenizer: Tokenizer
) -> tuple[tuple[str, ...], Callable[[dict[str, Any]], list[tuple[str, tuple[Example, ...]]]], str]:
    """For the objective: (domain names of a group's documents, row -> labelled groups, ``ExampleSource.weigh``)."""
    data = config.data

    def label(row: dict[str, Any]) -> str:
        return "held out" if data.label is None else str(row.get(data.label, "other"))

    def answers(row: dict[str, Any]) -> list[tuple[str, tuple[Example, ...]]]:
        turns, tools = chat_data.conversation(row), chat_data.tools_of(row)
        return [(label(row), (chat_data.example(turns, tokenizer, data.seq_len, data.template, tools=tools),))]

    match config.objective:
        case "text":
            end = end_id(tokenizer, None)
            return (
                ("text",),
                lambda row: [
                    (label(row), (one,)) for one in chat_data.text_examples(row, tokenizer, data.seq_len, end)
                ],
                "tokens",
            )
        case "sft" | "distill":
            return ("conversation",), answers, "tokens"

    def pair(row: dict[str, Any]) -> list[tuple[str, tuple[Example, ...]]]:
        one: Preference = chat_data.preference(row, tokenizer, data.seq_len, data.template)
        return [(label(row), (one.chosen, one.rejected))]

    return ("chosen", "rejected"), pair, "groups"


def _prompt(one: Problem) -> Example:
    """A prompt as a document with one target, so that it is not taken for padding; grpo samples the answers."""
    return Example(one.ids, (*[IGNORE] * (len(one.ids) - 1), one.ids[-1]))
