"""Fields that a request has and its type has not; values that mean what they mean elsewhere; names of the model."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from quadriga.server.fields import HEADER, REFUSED, Once, header, prune
from quadriga.server.guard import Limits
from quadriga.server.messages import MessagesRequest
from quadriga.server.responses import ResponsesRequest
from quadriga.server.schema import ChatRequest
from tests.server.conftest import Live, running, tiny_llm
from tests.server.test_http import CHAT, TEXT

DOCS = Path(__file__).parents[2] / "docs/server.md"


@pytest.fixture(scope="module")
def tiny() -> Iterator[Live]:
    with running(tiny_llm()) as live:
        yield live


def test_what_no_type_has_is_taken_out_wherever_it_is_and_named() -> None:
    body: dict[str, Any] = {
        "model": "m",
        "client_metadata": {"a": 1},
        "messages": [
            {"role": "user", "content": [{"type": "text", "text": "x", "cache_control": {"type": "ephemeral"}}]},
            {"role": "assistant", "content": None, "tool_calls": [], "weight": 1},
        ],
        "tools": [
            {"type": "function", "function": {"name": "f", "eager": True, "parameters": {"kept": {"any": "thing"}}}},
            {"type": "web_search", "max_uses": 2},
        ],
        "seed": None,
        "stream_options": {"include_usage": True, "more": 1},
    }
    assert sorted(prune(body, ChatRequest)) == [
        "client_metadata",
        "messages[0].content[0].cache_control",
        "messages[1].weight",
        "stream_options.more",
        "tools[0].function.eager",
        "tools[1] (web_search)",
    ]
    assert body["tools"] == [
        {"type": "function", "function": {"name": "f", "parameters": {"kept": {"any": "thing"}}}},
    ]
    assert prune(body, ChatRequest) == [], "nothing is left to take out"


@pytest.mark.parametrize(
    ("kind", "body"),
    [
        (
            MessagesRequest,  # Claude Code
            {
                "model": "m",
                "max_tokens": 9,
                "stream": True,
                "thinking": {"type": "enabled", "budget_tokens": 1024},
                "context_management": {"edits": [{"type": "clear_thinking_20251015", "keep": "all"}]},
                "output_config": {"effort": "high"},
                "metadata": {"user_id": "u"},
                "system": [{"type": "text", "text": "s", "cache_control": {"type": "ephemeral", "ttl": "1h"}}],
                "tools": [
                    {"name": "Bash", "input_schema": {"type": "object"}, "eager_input_streaming": True},
                    {"type": "web_search_20250305", "name": "web_search", "max_uses": 8},
                ],
                "messages": [
                    {"role": "user", "content": [{"type": "text", "text": "hi"}]},
                    {"role": "assistant", "content": [{"type": "thinking", "thinking": "t", "signature": "s"}]},
                    {"role": "user", "content": [{"type": "text", "text": "go", "cache_control": {"type": "x"}}]},
                ],
            },
        ),
        (
            ResponsesRequest,  # Codex
            {
                "model": "m",
                "instructions": "i",
                "input": [
                    {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "hi"}]},
                    {"type": "reasoning", "summary": [], "encrypted_content": "x", "content": None},
                    {"type": "custom_tool_call", "call_id": "c", "name": "apply_patch", "input": "p"},
                    {"type": "custom_tool_call_output", "call_id": "c", "output": "ok"},
                ],
                "tools": [
                    {"type": "function", "name": "shell", "strict": False, "parameters": {"type": "object"}},
                    {"type": "custom", "name": "apply_patch", "format": {"type": "grammar", "syntax": "lark"}},
                    {"type": "web_search", "external_web_access": False},
                    {"type": "namespace", "name": "mcp", "tools": [{"type": "function", "name": "a"}]},
                ],
                "tool_choice": "auto",
                "parallel_tool_calls": False,
                "reasoning": {"effort": "medium", "summary": "auto"},
                "store": False,
                "stream": True,
                "include": ["reasoning.encrypted_content"],
                "prompt_cache_key": "k",
                "text": {"verbosity": "low"},
                "client_metadata": {"x": "y"},
            },
        ),
    ],
    ids=["claude code", "codex"],
)
def test_what_agents_send_is_taken(tiny: Live, kind: type, body: dict[str, Any]) -> None:
    path = {MessagesRequest: "/v1/messages", ResponsesRequest: "/v1/responses"}[kind]
    limit = "max_tokens" if kind is MessagesRequest else "max_output_tokens"
    with tiny.client.stream("POST", path, json=body | {"model": "tiny", limit: 2}) as response:
        text = response.read().decode()
        assert response.status_code == 200, text
    ignored = response.headers[HEADER]
    assert "tools[" in ignored and "web_search" in ignored and "max_tokens" not in ignored
    assert ("message_stop" if kind is MessagesRequest else "response.incomplete") in text


def test_a_stored_prompt_is_refused_where_there_could_be_one(tiny: Live) -> None:
    asked = {"model": "tiny", "input": "hi", "max_output_tokens": 2}
    refused = tiny.post("/v1/responses", asked | {"prompt": {"id": "pmpt_1"}})
    assert refused.status_code == 400 and refused.json()["error"]["param"] == "prompt"
    assert tiny.post("/v1/responses", asked | {"prompt": None}).status_code == 200
    chat = tiny.post("/v1/chat/completions", CHAT | {"prompt": "x"})
    assert chat.status_code == 200 and chat.headers[HEADER] == "prompt"


@pytest.mark.parametrize("name", REFUSED)
def test_what_would_change_the_question_is_refused_with_the_reason_and_in_the_docs(tiny: Live, name: str) -> None:
    refused = tiny.post("/v1/chat/completions", CHAT | {name: {"x": 1}})
    assert refused.status_code == 400 and refused.json()["error"]["param"] == name
    assert REFUSED[name] in refused.json()["error"]["message"]
    assert f"`{name}`" in DOCS.read_text()
    for nothing in (None, False, [], {}, ""):
        assert tiny.post("/v1/chat/completions", CHAT | {name: nothing}).status_code == 200


def test_the_header_names_what_was_left_out_and_batches_leave_it_out_too(tiny: Live) -> None:
    answer = tiny.post("/v1/chat/completions", CHAT | {"store": True, "verbosity": "low"})
    assert answer.status_code == 200 and answer.headers[HEADER] == "store, verbosity"
    assert HEADER not in tiny.post("/v1/chat/completions", CHAT).headers
    line = {"custom_id": "1", "url": "/v1/completions", "body": TEXT | {"store": True}}
    lines = tiny.client.post(
        "/v1/batches", content=json.dumps(line).encode(), headers={"content-type": "application/jsonl"}
    )
    assert json.loads(lines.text)["response"]["status_code"] == 200


@pytest.mark.parametrize("kind", [{}, [], 5, True, None])
def test_a_tool_of_no_kind_at_all_is_refused(tiny: Live, kind: Any) -> None:
    for path, tool in (("/v1/chat/completions", {"function": {"name": "f"}}), ("/v1/responses", {"name": "f"})):
        body = {"messages": CHAT["messages"], "input": "x", "tools": [{"type": kind, **tool}], "max_output_tokens": 1}
        assert tiny.post(path, body).status_code == 400
    body = {"messages": CHAT["messages"], "max_tokens": 1, "tools": [{"type": kind, "name": "f", "input_schema": {}}]}
    assert tiny.post("/v1/messages", body).status_code == (200 if kind is None else 400)


def test_strict_refuses_them_by_name() -> None:
    with running(tiny_llm(), Limits(strict=True)) as live:
        refused = live.post("/v1/chat/completions", CHAT | {"store": True})
        assert refused.status_code == 400 and "store is not supported" in refused.text
        assert live.post("/v1/chat/completions", CHAT).status_code == 200
        spec = live.client.get("/openapi.json").json()["components"]["schemas"]
        assert spec["ChatRequest"]["additionalProperties"] is False


def test_a_header_is_ascii_and_short_whatever_names_there_are() -> None:
    assert header(["a", "b[0].c"]) == "a, b[0].c"
    shown = header([f"naïve\r\n,{i}" for i in range(500)])
    assert shown.isascii() and shown.isprintable() and len(shown) < 1_200 and shown.endswith("more")


def test_the_log_says_each_name_once(caplog: pytest.LogCaptureFixture) -> None:
    once = Once()
    with caplog.at_level(logging.DEBUG, "quadriga"):
        for i in range(3):
            once.say("/v1/x", [f"messages[{i}].weight", "store"])
    assert len(caplog.records) == 2


# Values --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "same"),
    [
        ({"top_k": -1, "seed": 3}, {"top_k": 0, "seed": 3}),
        ({"temperature": 0, "seed": -1}, {"temperature": 0}),
        ({"temperature": 0, "skip_special_tokens": True}, {"temperature": 0}),
        ({"temperature": 0, "ignore_eos": None, "stop": None}, {"temperature": 0}),
    ],
    ids=str,
)
def test_values_mean_what_they_mean_elsewhere(tiny: Live, given: dict[str, Any], same: dict[str, Any]) -> None:
    for path, body in (("/v1/chat/completions", CHAT), ("/v1/completions", TEXT)):
        one, other = (tiny.post(path, {**body, "max_tokens": 5, **options}) for options in (given, same))
        assert one.status_code == other.status_code == 200, one.text
        assert one.json()["choices"] == other.json()["choices"]


def test_minus_one_is_no_limit(tiny: Live) -> None:
    ends = {"stop_token_ids": list(range(256)), "max_tokens": -1}
    for path, body in (("/v1/chat/completions", CHAT), ("/v1/completions", TEXT)):
        answer = tiny.post(path, body | ends)
        assert answer.status_code == 200 and answer.json()["usage"]["completion_tokens"] == 1


def test_a_call_without_arguments_and_one_with_an_object(tiny: Live) -> None:
    calls = [
        {"type": "function", "function": {"name": "f", "arguments": ""}},
        {"id": "b", "type": "function", "function": {"name": "f", "arguments": {"a": 1}}},
    ]
    turns = [*CHAT["messages"], {"role": "assistant", "content": None, "tool_calls": calls}, *CHAT["messages"]]
    shown = tiny.post("/apply-template", {"messages": turns}).json()["prompt"]
    assert '{"name": "f", "arguments": {}}' in shown and '{"name": "f", "arguments": {"a": 1}}' in shown


def test_nothing_ends_an_answer_before_its_least_length(tiny: Live) -> None:
    ends = {"stop_token_ids": list(range(255)), "temperature": 1.0, "seed": 1}
    answer = tiny.post("/v1/completions", TEXT | ends | {"max_tokens": 6, "min_tokens": 4}).json()
    assert answer["usage"]["completion_tokens"] == 5, "two tokens are left, then any of the others ends it"


def test_control_tokens_are_written_on_request(tiny: Live) -> None:
    biased = TEXT | {"logit_bias": {"256": 100}, "ignore_eos": True, "max_tokens": 2, "temperature": 0}
    assert tiny.post("/v1/completions", biased).json()["choices"][0]["text"] == ""
    shown = tiny.post("/v1/completions", biased | {"skip_special_tokens": False}).json()["choices"][0]["text"]
    assert shown == "<|end|>" * 2


def test_a_bos_token_is_left_out_on_request(tiny: Live, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiny.service.llm.tokenizer, "prefix_ids", (256,))
    counts = [
        tiny.post("/v1/completions", TEXT | {"add_special_tokens": add}).json()["usage"]["prompt_tokens"]
        for add in (True, False)
    ]
    assert counts[0] == counts[1] + 1


def test_choices_share_nothing_with_those_of_the_next_seed(tiny: Live) -> None:
    def texts(seed: int) -> list[str]:
        body = TEXT | {"n": 4, "seed": seed, "temperature": 1.0, "max_tokens": 8}
        return [choice["text"] for choice in tiny.post("/v1/completions", body).json()["choices"]]

    assert texts(7) == texts(7) and len({*texts(7), *texts(8)}) == 8


# Prefill -------------------------------------------------------------------------------------------------------------

HALF = [*CHAT["messages"], {"role": "assistant", "content": "Of course: "}]


def test_an_answer_that_was_begun_goes_on(tiny: Live) -> None:
    text = tiny.post("/apply-template", {"messages": HALF}).json()["prompt"]
    assert text.endswith("<|im_start|>assistant\nOf course: ")
    asked = tiny.post("/apply-template", {"messages": HALF, "continue_final_message": False}).json()["prompt"]
    assert asked.endswith("Of course: <|im_end|>\n<|im_start|>assistant\n")
    plain = {"max_tokens": 4, "temperature": 0, "model": "tiny"}
    truth = tiny.post("/v1/completions", {"prompt": text, **plain}).json()["choices"][0]["text"]
    assert (
        tiny.post("/v1/chat/completions", {"messages": HALF, **plain}).json()["choices"][0]["message"]["content"]
        == truth
    )
    assert tiny.post("/v1/messages", {"messages": HALF, **plain}).json()["content"][0]["text"] == truth
    items = {"input": HALF, "max_output_tokens": 4, "temperature": 0}
    assert tiny.post("/v1/responses", items).json()["output"][0]["content"][0]["text"] == truth


# Names ---------------------------------------------------------------------------------------------------------------


def test_a_model_may_be_left_out_or_have_several_names() -> None:
    with running(tiny_llm(), aliases=("gpt-4o", "a:b")) as live:
        assert [model["id"] for model in live.client.get("/v1/models").json()["data"]] == ["tiny", "gpt-4o", "a:b"]
        assert live.client.get("/v1/models/gpt-4o").json()["max_model_len"] == 1024
        for name in ("tiny", "gpt-4o", "a:b"):
            assert live.post("/v1/chat/completions", CHAT | {"model": name}).json()["model"] == name
        body = {key: value for key, value in CHAT.items() if key != "model"}
        assert live.post("/v1/chat/completions", body).json()["model"] == "tiny"
        unknown = live.post("/v1/chat/completions", CHAT | {"model": "b"})
        assert unknown.status_code == 404 and "'gpt-4o'" in unknown.text
