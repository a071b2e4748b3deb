"""Ollama's interface, with Ollama's own Python client and by hand."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest

from tests.server.conftest import Live, running, tiny_llm

ASK = [{"role": "user", "content": "Tell me of four horses"}]
FEW = {"num_predict": 6, "temperature": 0}


@pytest.fixture(scope="module")
def tiny() -> Iterator[Live]:
    with running(tiny_llm(), aliases=("other",)) as live:
        yield live


def lines(response: Any) -> list[dict[str, Any]]:
    assert response.status_code == 200, response.text
    assert response.headers["content-type"].startswith("application/x-ndjson")
    return [json.loads(line) for line in response.text.splitlines()]


def test_a_chat_is_streamed_by_default_and_is_the_one_of_the_other_interface(tiny: Live) -> None:
    truth = tiny.post("/v1/chat/completions", {"messages": ASK, "max_tokens": 6, "temperature": 0}).json()
    whole = tiny.post("/api/chat", {"model": "tiny", "messages": ASK, "options": FEW, "stream": False}).json()
    assert whole["message"] == {"role": "assistant", "content": truth["choices"][0]["message"]["content"]}
    assert whole["done"] is True and whole["done_reason"] == "length" and whole["model"] == "tiny"
    assert whole["eval_count"] == 6 and whole["prompt_eval_count"] == truth["usage"]["prompt_tokens"]
    assert whole["total_duration"] == whole["prompt_eval_duration"] + whole["eval_duration"] > 0
    streamed = lines(tiny.post("/api/chat", {"model": "tiny:latest", "messages": ASK, "options": FEW}))
    assert "".join(one["message"]["content"] for one in streamed) == whole["message"]["content"]
    assert [one["done"] for one in streamed] == [False] * (len(streamed) - 1) + [True]


def test_generate_uses_the_template_unless_it_is_raw(tiny: Live) -> None:
    prompt = ASK[0]["content"]
    shown = tiny.post("/apply-template", {"messages": ASK}).json()["prompt"]
    body = {"model": "tiny", "options": FEW, "stream": False}
    plain = tiny.post("/api/generate", {**body, "prompt": prompt}).json()
    raw = tiny.post("/api/generate", {**body, "prompt": shown, "raw": True}).json()
    assert plain["response"] == raw["response"] != "" and plain["prompt_eval_count"] == raw["prompt_eval_count"]
    told = tiny.post("/api/generate", {**body, "prompt": prompt, "system": "Be brief."}).json()
    assert told["prompt_eval_count"] > plain["prompt_eval_count"]
    assert lines(tiny.post("/api/generate", {**body, "prompt": "x", "stream": True}))[-1]["response"] == ""


def test_an_answer_follows_a_schema_and_a_call_is_an_object(tiny: Live) -> None:
    schema = {"type": "object", "properties": {"a": {"enum": [1]}}, "required": ["a"], "additionalProperties": False}
    body = {"model": "tiny", "messages": ASK, "format": schema, "stream": False}
    assert json.loads(tiny.post("/api/chat", body).json()["message"]["content"]) == {"a": 1}
    call = {"function": {"name": "rain", "arguments": {"city": "Oslo"}}}
    turns = [*ASK, {"role": "assistant", "tool_calls": [call]}, {"role": "tool", "content": "wet", "tool_name": "rain"}]
    tool = {"type": "function", "function": {"name": "rain", "parameters": {"type": "object"}}}
    answer = tiny.post("/api/chat", {"model": "tiny", "messages": turns, "tools": [tool], "options": FEW})
    assert lines(answer)[-1]["done"] is True


def test_lists_and_facts(tiny: Live) -> None:
    tags = tiny.client.get("/api/tags").json()["models"]
    assert [one["name"] for one in tags] == ["tiny", "other"] and tags[0]["size"] > 0 and len(tags[0]["digest"]) == 64
    assert tags[0]["details"]["family"] == "dbrx" and tags[0]["details"]["quantization_level"] == "q8"
    assert tiny.client.get("/api/ps").json()["models"][0]["context_length"] == 1024
    shown = tiny.post("/api/show", {"model": "other"}).json()
    assert shown["model_info"]["dbrx.context_length"] == 1024 and "completion" in shown["capabilities"]
    assert shown["template"] == tiny.service.llm.tokenizer.chat_template  # type: ignore[union-attr]
    assert tiny.client.get("/api/version").json()["version"].count(".") == 2
    assert lines(tiny.post("/api/pull", {"model": "tiny"})) == [{"status": "success"}]
    loaded = tiny.post("/api/generate", {"model": "tiny"}).json()
    assert loaded["done_reason"] == "load" and loaded["done"] is True


def test_vectors_are_those_of_the_other_interface(tiny: Live) -> None:
    truth = [one["embedding"] for one in tiny.post("/v1/embeddings", {"input": ["a", "bc"]}).json()["data"]]
    assert tiny.post("/api/embed", {"model": "tiny", "input": ["a", "bc"]}).json()["embeddings"] == truth
    assert tiny.post("/api/embeddings", {"model": "tiny", "prompt": "a"}).json()["embedding"] == truth[0]


def test_texts_to_embed_are_cut_to_the_context_unless_that_is_refused(tiny: Live) -> None:
    def embedded(text: Any, **more: Any) -> Any:
        return tiny.post("/api/embed", {"model": "tiny", "input": text, **more})

    long, cut = "ab" * 40_000, "ab" * 512
    made = embedded([long, cut, "ab" * 600]).json()
    assert made["embeddings"][0] == made["embeddings"][1] == made["embeddings"][2]
    assert made["prompt_eval_count"] == 3 * 1024 and embedded(long).json()["embeddings"] == made["embeddings"][:1]
    assert tiny.post("/api/embeddings", {"model": "tiny", "prompt": long}).json()["embedding"] == made["embeddings"][0]
    refused = embedded(long, truncate=False)
    assert refused.status_code == 400 and "context" in refused.json()["error"]
    assert embedded([]).json()["embeddings"] == embedded("").json()["embeddings"] == [], "it only loads the model"
    assert tiny.post("/api/embeddings", {"model": "tiny", "prompt": ""}).json() == {"embedding": []}
    assert embedded(["a", ""]).status_code == 400


def test_a_limit_of_nothing_is_none(tiny: Live) -> None:
    answer = tiny.post(
        "/api/generate", {"model": "tiny", "prompt": "a", "options": {"num_predict": 0}, "stream": False}
    )
    assert answer.json()["eval_count"] > 1


def test_an_empty_stop_string_stops_nothing(tiny: Live) -> None:
    def said(stop: Any) -> Any:
        options = {"num_predict": 5, "temperature": 0, "stop": stop}
        return tiny.post("/api/chat", {"model": "tiny", "messages": ASK, "stream": False, "options": options})

    plain = said(None).json()["message"]
    assert [said(stop).json().get("message") for stop in ("", [], ["", ""])] == [plain] * 3
    assert said(["", plain["content"][1:2]]).json()["message"]["content"] == plain["content"][:1]


@pytest.mark.parametrize(
    ("path", "body", "status", "says"),
    [
        ("chat", {"model": "nope", "messages": ASK}, 404, "not served here"),
        ("chat", {"model": "tiny", "messages": ASK, "format": "xml"}, 400, "format must be"),
        ("chat", {"model": "tiny", "messages": [{"role": "user", "content": "x", "images": ["aGk="]}]}, 400, "images"),
        ("generate", {"model": "tiny", "prompt": "a", "suffix": "b"}, 400, "suffix"),
        ("generate", {"model": "tiny", "prompt": "a", "context": [1]}, 400, "context"),
        ("generate", {"model": "tiny", "prompt": "a", "options": {"temperature": -1}}, 400, "temperature"),
        ("pull", {"model": "llama3"}, 404, "no model 'llama3'"),
        ("pull", {"model": "hf.co/org/repo"}, 400, "cannot be pulled here"),
        ("copy", {"source": "tiny", "destination": "x"}, 400, "cannot be copied"),
    ],
)
def test_errors_are_texts(tiny: Live, path: str, body: dict[str, Any], status: int, says: str) -> None:
    answer = tiny.post(f"/api/{path}", body)
    assert answer.status_code == status and says in answer.json()["error"]
    assert tiny.client.request("DELETE", "/api/delete", json={"model": "tiny"}).status_code == 400


def test_curl_without_a_header_is_understood(tiny: Live) -> None:
    raw = json.dumps({"model": "tiny", "prompt": "a", "options": FEW, "stream": False}).encode()
    form = {"content-type": "application/x-www-form-urlencoded"}
    assert tiny.client.post("/api/generate", content=raw, headers=form).status_code == 200
    assert tiny.client.post("/v1/completions", content=raw, headers=form).status_code == 415
    foreign = {**form, "origin": "https://evil.example"}
    assert tiny.client.post("/api/generate", content=raw, headers=foreign).status_code == 403


def test_ollamas_own_client(tiny: Live) -> None:
    ollama = pytest.importorskip("ollama", reason="its own client is not installed: pip install '.[judges]'")
    client = ollama.Client(host=tiny.url)
    answer = client.chat("tiny", messages=ASK, options=FEW)
    streamed = client.chat("tiny", messages=ASK, options=FEW, stream=True)
    assert "".join(piece.message.content for piece in streamed) == answer.message.content
    assert client.generate("tiny", "a", options=FEW).done and client.embed("tiny", "a").embeddings
    assert client.list().models[0].model == "tiny" and client.show("tiny").capabilities and client.ps().models
    with pytest.raises(ollama.ResponseError, match="not served here"):
        client.chat("nope", messages=ASK)
