"""Every layout of rows, answers marked token by token, bad rows counted; packing keeps groups whole and every token."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from quadriga.errors import CorpusError
from quadriga.text.tokenizer import Tokenizer, load_directory
from quadriga.train.batch import IGNORE
from quadriga.train.chat_data import (
    BadRowError,
    Example,
    Rejects,
    conversation,
    example,
    preference,
    problem,
    read,
    text_examples,
    tools_of,
)
from quadriga.train.packing import ExampleSource
from tests.text.vocabularies import write_bpe

ASKED = [{"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": "4"}]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder = write_bpe(tmp_path_factory.mktemp("bpe"), eos_token="<|im_end|>")
    found = load_directory(folder, cl100k_ranks=lambda: Path("/nowhere"))
    assert found is not None
    return found


@pytest.mark.parametrize(
    "row",
    [
        {"messages": ASKED},
        {"conversations": [{"from": "human", "value": "2 + 2?"}, {"from": "gpt", "value": "4"}]},
        {"instruction": "2 + 2?", "input": "", "output": "4"},
        {"instruction": "2 + 2?", "context": "", "response": "4", "category": "qa"},
        {"prompt": "2 + 2?", "response": "4"},
        {"prompt": "2 + 2?", "completion": "4"},
        {"question": "2 + 2?", "answer": "4"},
    ],
)
def test_every_layout_is_the_same_conversation(row: dict[str, Any]) -> None:
    assert conversation(row) == ASKED


def test_context_is_appended_to_the_instruction() -> None:
    row = {"instruction": "Sum up.", "context": "A long text.", "response": "Short."}
    assert conversation(row)[0]["content"] == "Sum up.\n\nA long text."


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"text": "x"}, "unknown columns: text"),
        ({"messages": []}, "messages is not a list of turns"),
        ({"messages": [{"role": "user"}]}, "a turn needs role and content"),
        ({"conversations": [{"from": "robot", "value": "x"}]}, "unknown speaker"),
        ({"prompt": 3, "response": "x"}, "prompt is not text"),
    ],
)
def test_rows_of_unknown_layout_say_why(row: dict[str, Any], reason: str) -> None:
    with pytest.raises(BadRowError, match=reason):
        conversation(row)


def test_targets_are_the_answers_and_their_ends_only(tokenizer: Tokenizer) -> None:
    turns = [*ASKED, {"role": "user", "content": "And 3?"}, {"role": "assistant", "content": "nine <|im_end|>"}]
    one = example(turns, tokenizer, 400)
    learned = [one.targets[n] for n in range(len(one.ids)) if one.targets[n] != IGNORE]
    end = tokenizer.special_ids["<|im_end|>"]
    # Each answer, and the token that ends it; what a user or an answer typed is never a special token.
    assert learned == [*tokenizer.encode("4"), end, *tokenizer.encode("nine <|im_end|>"), end]
    for n in range(len(one.ids) - 1):
        assert one.targets[n] in (IGNORE, one.ids[n + 1])
    assert one.targets[-1] == IGNORE


def test_preferences_learn_from_the_last_answer_only(tokenizer: Tokenizer) -> None:
    before = [*ASKED, {"role": "user", "content": "Sure?"}]
    row = {"messages": before, "chosen": {"role": "assistant", "content": "Yes"}, "rejected": "No"}
    one = preference(row, tokenizer, 400)
    end = tokenizer.special_ids["<|im_end|>"]
    assert [t for t in one.chosen.targets if t != IGNORE] == [*tokenizer.encode("Yes"), end]
    assert [t for t in one.rejected.targets if t != IGNORE] == [*tokenizer.encode("No"), end]
    sharegpt = {
        "conversations": [{"from": "human", "value": "Hi"}],
        "chosen": {"from": "gpt", "value": "Hello"},
        "rejected": {"from": "gpt", "value": "Go"},
    }
    assert preference(sharegpt, tokenizer, 400).chosen.n_targets == len(tokenizer.encode("Hello")) + 1
    with pytest.raises(BadRowError, match="equal"):
        preference({"prompt": "a", "chosen": "b", "rejected": "b"}, tokenizer, 400)


# Tools and parts ------------------------------------------------------------------------------------------------------

HERMES = (
    "{% if tools %}<|im_start|>system\n{% for tool in tools %}{{ tool | tojson }}\n{% endfor %}<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}"
    "{% for call in m.tool_calls or [] %}<tool_call>{{ call.function | tojson }}</tool_call>{% endfor %}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
WEATHER = {"name": "weather", "parameters": {"type": "object", "properties": {"city": {"type": "string"}}}}
CALL = {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Rom"}'}}
WITH_TOOLS = {
    "tools": [{"type": "function", "function": WEATHER}],
    "messages": [
        {"role": "user", "content": [{"type": "text", "text": "Sun in "}, {"type": "text", "text": "Rom?"}]},
        {"role": "assistant", "content": None, "tool_calls": [CALL]},
        {"role": "tool", "tool_call_id": "c1", "content": "sunny"},
        {"role": "assistant", "content": "Yes."},
    ],
}


def learned(one: Example, tokenizer: Tokenizer) -> str:
    """The answers without the line break that this template writes behind each turn."""
    return tokenizer.decode([t for t in one.targets if t != IGNORE]).replace("\n", "")


def sft(row: dict[str, Any], tokenizer: Tokenizer, template: str = HERMES) -> Example:
    return example(conversation(row), tokenizer, 900, template, tools=tools_of(row))


def test_calls_of_tools_are_learned_and_their_results_are_not(tokenizer: Tokenizer) -> None:
    one = sft(WITH_TOOLS, tokenizer)
    call = '<tool_call>{"name": "weather", "arguments": {"city": "Rom"}}</tool_call>'
    assert learned(one, tokenizer) == f"{call}Yes."
    text = tokenizer.decode(one.ids)
    assert "Sun in Rom?" in text and "sunny" in text and '"properties"' in text


def test_sharegpts_calls_and_tools_as_text_are_the_same(tokenizer: Tokenizer) -> None:
    shared = {
        "tools": json.dumps([WEATHER]),
        "conversations": [
            {"from": "human", "value": "Sun in Rom?"},
            {"from": "function_call", "value": '{"name": "weather", "arguments": {"city": "Rom"}}'},
            {"from": "observation", "value": "sunny"},
            {"from": "gpt", "value": "Yes."},
        ],
    }
    assert sft(shared, tokenizer) == sft(WITH_TOOLS, tokenizer)


def test_an_answer_of_weight_0_is_read_and_not_learned(tokenizer: Tokenizer) -> None:
    turns = [dict(turn) for turn in WITH_TOOLS["messages"]]
    turns[1]["weight"] = 0
    one = sft({**WITH_TOOLS, "messages": turns}, tokenizer)
    assert one.ids == sft(WITH_TOOLS, tokenizer).ids and learned(one, tokenizer) == "Yes."
    turns[3]["weight"] = 0
    with pytest.raises(BadRowError, match="no answer to learn"):
        sft({**WITH_TOOLS, "messages": turns}, tokenizer)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"content": [{"type": "image_url", "image_url": {}}]}, "content has a part that is not text: 'image_url'"),
        ({"tool_calls": [CALL]}, "only the assistant makes tool calls"),
        ({"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "[1"}}]}, "a tool call needs"),
        ({"role": "assistant", "function_call": {"name": "f"}}, "a turn has function_call"),
        ({"role": "assistant", "weight": 0.5}, "the weight of a turn is 0 or 1"),
    ],
)
def test_turns_that_cannot_be_learned_say_why(change: dict[str, Any], reason: str) -> None:
    with pytest.raises(BadRowError, match=reason):
        conversation({"messages": [{"role": "user", "content": "x"} | change]})


@pytest.mark.parametrize("tools", ["{", [1], [{"type": "function"}], "5"])
def test_tools_that_are_none_say_why(tools: object) -> None:
    with pytest.raises(BadRowError, match="tools is not"):
        tools_of({"tools": tools})


def test_a_template_that_leaves_tools_or_calls_out_is_refused(tokenizer: Tokenizer) -> None:
    with pytest.raises(BadRowError, match="does not write tools: 'weather' is not in its text"):
        sft(WITH_TOOLS, tokenizer, "chatml")
    with pytest.raises(BadRowError, match="does not write calls of tools: 'weather'"):
        sft({"messages": WITH_TOOLS["messages"]}, tokenizer, "chatml")


def test_preferences_learn_every_turn_that_differs_and_repeat_no_question(tokenizer: Tokenizer) -> None:
    asked = [{"role": "user", "content": "Sun?"}, {"role": "assistant", "content": "Where?"}]
    rome = {"role": "user", "content": "Rom"}
    last = WITH_TOOLS["messages"][1:]
    rejected = [{"role": "assistant", "content": "No idea"}]
    tools = WITH_TOOLS["tools"]
    for row in (
        {"messages": [*asked, rome], "chosen": last, "rejected": rejected},
        {"prompt": [*asked, rome], "chosen": [*asked, rome, *last], "rejected": [*asked, rome, *rejected]},
        {"chosen": [*asked, rome, *last], "rejected": [*asked, rome, *rejected]},
    ):
        one = preference({**row, "tools": tools}, tokenizer, 900, HERMES)
        assert "weather" in learned(one.chosen, tokenizer) and learned(one.chosen, tokenizer).endswith("Yes.")
        assert learned(one.rejected, tokenizer) == "No idea"
        assert tokenizer.decode(one.chosen.ids).count("Sun?") == 1


def test_problem_prompts_end_where_the_answer_starts(tokenizer: Tokenizer) -> None:
    one = problem({"question": "2 + 2?", "answer": "It is\n#### 4"}, tokenizer, 100)
    assert one.answer.endswith("#### 4")
    assert tokenizer.encode("assistant")[0] in one.ids[-8:] and one.ids[-1] == tokenizer.encode("\n")[-1]


def test_text_is_cut_and_every_token_but_the_first_is_a_target_and_its_end_is_one(tokenizer: Tokenizer) -> None:
    text = "The quick brown fox jumps over the lazy dog. " * 5
    ids = tokenizer.encode(text)
    parts = text_examples({"text": text}, tokenizer, 16, end_id=0)
    assert [t for part in parts for t in part.targets] == [*ids[1:], 0]
    assert all(len(part.ids) <= 16 for part in parts)


def test_bad_rows_are_counted_and_too_many_are_an_error(tmp_path: Path, tokenizer: Tokenizer) -> None:
    good = json.dumps({"messages": ASKED})
    lines = [good, "{not json", "[1]", json.dumps({"a": 1}), json.dumps({"messages": ASKED[:1]}), "", good]
    (tmp_path / "rows.jsonl").write_text("\n".join(lines))
    rejects = Rejects(limit=4)
    found = read([tmp_path / "rows.jsonl"], lambda row: example(conversation(row), tokenizer, 400), rejects)
    assert len(found) == 2 and rejects.n == 4
    assert rejects.first[0] == "rows.jsonl:2: not JSON" and "unknown columns" in rejects.reasons
    assert str(rejects).startswith("1 rows skipped: not JSON (rows.jsonl:2); 1 rows skipped: not a JSON object")
    with pytest.raises(CorpusError, match=r"4 rows cannot be used, but data.max_bad_rows is 3"):
        read([tmp_path / "rows.jsonl"], lambda row: example(conversation(row), tokenizer, 400), Rejects(limit=3))
    with pytest.raises(CorpusError, match=r"no row of rows.jsonl can be used"):
        read([tmp_path / "rows.jsonl"], lambda row: example(conversation(row), tokenizer, 2), Rejects(limit=9))


def _groups(sizes: list[tuple[int, int]]) -> list[tuple[Example, ...]]:
    n, groups = 10, []
    for a, b in sizes:
        group = []
        for size in (a, b):
            ids = tuple(range(n, n + size))
            group.append(Example(ids, (*[IGNORE] * (size // 2), *ids[size // 2 + 1 :], IGNORE)))
            n += size
        groups.append(tuple(group))
    return groups


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(2, 15), st.integers(2, 15)), min_size=1, max_size=40), st.integers(0, 3))
def test_packing_loses_nothing_and_keeps_pairs_in_a_row(sizes: list[tuple[int, int]], seed: int) -> None:
    groups = _groups(sizes)
    source = ExampleSource(groups, ("chosen", "rejected"), n_rows=1, seq_len=32, weigh="groups", seed=seed)
    seen: list[int] = []
    for step in range(source.rows_per_epoch):
        batch = source.rows(step, 0, 1)
        assert len(batch.tokens) == 32 and batch.bounds[-1] == 32
        names = batch.domains.tolist()
        real = [d for d in names if d != 2]
        assert real == [0, 1] * (len(real) // 2), "every pair is whole, the chosen answer first"
        kept = batch.real()
        seen += batch.tokens[kept].tolist()
        for first, last in zip(batch.bounds[:-1].tolist(), batch.bounds[1:].tolist(), strict=True):
            assert batch.positions[first:last].tolist() == list(range(last - first))
        pairs = sum(any(t != IGNORE for one in g for t in one.targets) for g in groups)
        assert batch.target_weight() <= pairs + 1e-5
    # Documents whose every target is ignored count as padding, so sizes here leave at least one target each.
    want = [i for g in groups for one in g if one.n_targets for i in one.ids]
    assert sorted(seen) == sorted(want)


def test_a_group_has_weight_one_whatever_its_length() -> None:
    """Weights sum to the number of groups, in an epoch and in each row; tokens without a target have weight 0."""
    groups = _groups([(9, 4), (3, 3), (12, 15), (2, 7), (5, 5)])
    source = ExampleSource(groups, ("a", "b"), n_rows=1, seq_len=32, weigh="groups", seed=2)
    batches = [source.rows(step, 0, 1) for step in range(source.rows_per_epoch)]
    assert sum(batch.target_weight() for batch in batches) == pytest.approx(5, rel=1e-6)
    for batch in batches:
        n_groups = batch.domains.tolist().count(0)
        assert batch.target_weight() == pytest.approx(n_groups, rel=1e-6)


def test_rows_are_filled_with_whatever_fits() -> None:
    groups = _groups([(5, 6)] * 20)
    assert ExampleSource(groups, ("a", "b"), n_rows=1, seq_len=32).rows_per_epoch == 10, "two of eleven in each"
    mixed = ExampleSource(_groups([(10, 10), (3, 3), (3, 3)] * 6), ("a", "b"), n_rows=1, seq_len=32)
    assert mixed.rows_per_epoch <= 7, (
        "the small ones beside the large ones: six rows hold all, first fit may need one more"
    )


def test_every_epoch_has_an_order_of_its_own_and_rows_depend_on_the_step_alone() -> None:
    groups = _groups([(5, 6)] * 20)
    source = ExampleSource(groups, ("a", "b"), n_rows=2, seq_len=32, seed=1)
    again = ExampleSource(groups, ("a", "b"), n_rows=2, seq_len=32, seed=1)
    later = source.steps_per_epoch * 2 + 1
    assert source.rows(later, 0, 2).tokens.equal(again.rows(later, 0, 2).tokens)
    assert not source.rows(0, 0, 2).tokens.equal(source.rows(source.steps_per_epoch, 0, 2).tokens)
    assert source.fingerprint == again.fingerprint
    assert source.fingerprint != ExampleSource(groups[1:], ("a", "b"), n_rows=2, seq_len=32, seed=1).fingerprint
    for other in ({"seed": 2}, {"n_rows": 3}, {"seq_len": 33}, {"weigh": "groups"}, {"together": False}):
        changed = ExampleSource(groups, ("a", "b"), **{"n_rows": 2, "seq_len": 32, "seed": 1} | other)  # type: ignore[arg-type]
        assert changed.fingerprint != source.fingerprint, other
    with pytest.raises(CorpusError, match="must be at least the longest group's 11 tokens, got 8"):
        ExampleSource(groups, ("a", "b"), n_rows=2, seq_len=8)
