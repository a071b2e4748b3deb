"""The rows of a tuning run: read by its objective's layout, split into training and held-out, packed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from quadriga.errors import ConfigError, CorpusError
from quadriga.hub import data_sets
from quadriga.text.tokenizer import Tokenizer
from quadriga.train import chat_data
from quadriga.train.batch import IGNORE, BatchSource
from quadriga.train.chat_data import Example, Preference, Problem, Rejects
from quadriga.train.corpus.readers import resolve
from quadriga.train.corpus.vocabulary import end_id
from quadriga.train.packing import ExampleSource
from quadriga.train.tune_config import TuneConfig


def read_data(
    config: TuneConfig, tokenizer: Tokenizer
) -> tuple[ExampleSource, dict[str, BatchSource], dict[tuple[int, ...], str], Rejects]:
    """Read the data: (training rows, held-out rows by name, prompt -> answer for grpo, rejected rows).

    Raises:
        ConfigError: held-out files that the objective does not use.
        CorpusError: unreadable files, too few usable rows, or a question with two answers for grpo.
    """
    data = config.data
    if config.objective == "grpo" and data.held_out:
        raise ConfigError("grpo samples its answers, so it has no held-out loss: leave out data.held_out")
    rejects = Rejects(limit=data.max_bad_rows)
    names, make, weigh = _maker(config, tokenizer)
    data_sets.log_samples(f.removeprefix("data:") for f in (*data.files, *data.held_out) if f.startswith("data:"))
    found = chat_data.read([resolve(f) for f in data.files], make, rejects, limit=data.max_rows)
    groups = [group for one in found for group in one]
    labels = [label for label, _ in groups]
    everything = [group for _, group in groups]
    if data.held_out:
        kept = chat_data.read([resolve(f) for f in data.held_out], make, rejects)
        test = [group for one in kept for group in one]
        train = everything
    elif config.objective == "grpo":
        test, train = [], everything
    else:
        every = data.held_out_every
        test = [(labels[i], g) for i, g in enumerate(everything) if i % every == every - 1]
        train = [g for i, g in enumerate(everything) if i % every != every - 1]
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
    problems: dict[tuple[int, ...], str] = {}
    if config.objective == "grpo":
        for answer, group in groups:
            if problems.setdefault(group[0].ids, answer) != answer:
                asked = tokenizer.decode(group[0].ids)[-200:]
                raise CorpusError(f"a question must have one answer, but {asked!r} has two: {answer!r} is the other")
    return packed(train, data.rows), held_out, problems, rejects


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
        case "sft":
            return ("conversation",), answers, "tokens"
        case "grpo":
            problem = partial(chat_data.problem, tokenizer=tokenizer, seq_len=data.seq_len, template=data.template)
            return ("prompt",), lambda row: [_prompt(problem(row))], "groups"

    def pair(row: dict[str, Any]) -> list[tuple[str, tuple[Example, ...]]]:
        one: Preference = chat_data.preference(row, tokenizer, data.seq_len, data.template)
        return [(label(row), (one.chosen, one.rejected))]

    return ("chosen", "rejected"), pair, "groups"


def _prompt(one: Problem) -> tuple[str, tuple[Example, ...]]:
    """A prompt as a document with one target, so that it is not taken for padding; GRPO samples the answers."""
    targets = (*[IGNORE] * (len(one.ids) - 1), one.ids[-1])
    return one.answer, (Example(one.ids, targets),)
