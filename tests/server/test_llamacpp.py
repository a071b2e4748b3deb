"""llama.cpp's routes, scores, and filling in the middle."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest

from quadriga.text.added_tokens import AddedToken
from quadriga.text.infill import marks_of
from quadriga.text.tokenizer import Tokenizer
from tests.server.conftest import Bytes, Live, running, tiny_llm

GREEDY: dict[str, Any] = {"temperature": 0, "n_predict": 8}


class Marked(Bytes):
    """Bytes, an end token and three marks."""

    n_vocab = 260

    def token_bytes(self, token_id: int) -> bytes:
        return bytes([token_id]) if token_id < 256 else b""


@pytest.fixture(scope="module")
def marked() -> Iterator[Live]:
    llm = tiny_llm(n_rows=260)
    special = {"<|end|>": 256, "<|fim_prefix|>": 257, "<|fim_suffix|>": 258, "<|fim_middle|>": 259}
    llm.tokenizer = Tokenizer(Marked(), special_ids=special, eos_ids=(256,))
    with running(llm) as live:
        yield live


def test_a_completion_is_that_of_the_other_route(tiny: Live) -> None:
    said = tiny.post("/completion", {**GREEDY, "prompt": "ab", "return_tokens": True}).json()
    other = tiny.post("/v1/completions", {"prompt": "ab", "temperature": 0, "max_tokens": 8}).json()
    assert said["content"] == other["choices"][0]["text"] and len(said["tokens"]) == said["tokens_predicted"] == 8
    assert (said["stop"], said["stop_type"], said["tokens_evaluated"], said["model"]) == (True, "limit", 2, "tiny")
    mixed = tiny.post("/completion", {**GREEDY, "prompt": [97, "b"]}).json()
    assert mixed["content"] == said["content"]
    lines = tiny.post("/completion", {**GREEDY, "prompt": "ab", "stream": True}).text.split("\n\n")
    chunks = [json.loads(line.removeprefix("data: ")) for line in lines if line]
    assert "".join(chunk["content"] for chunk in chunks) == said["content"]
    assert [chunk["stop"] for chunk in chunks] == [False] * 8 + [True] and chunks[-1]["stop_type"] == "limit"


def test_a_completion_says_why_it_ended_and_how_likely_it_was(tiny: Live) -> None:
    said = tiny.post("/completion", {**GREEDY, "prompt": "ab", "n_probs": 2}).json()
    shown = said["completion_probabilities"]
    assert len(shown) == 8 and all(len(one["top_logprobs"]) == 2 for one in shown)
    word = shown[2]["token"]
    if not word.startswith("bytes:"):
        cut = tiny.post("/completion", {**GREEDY, "prompt": "ab", "stop": [word]}).json()
        assert (cut["stop_type"], cut["stopping_word"]) == ("word", word) and word not in cut["content"]
    for same in ({"stop": ""}, {"stop": ["", ""]}, {"top_k": -7}):  # as llama.cpp has it: nothing, and all
        assert tiny.post("/completion", {**GREEDY, "prompt": "ab", **same}).json()["content"] == said["content"]
    biased = tiny.post("/completion", {**GREEDY, "prompt": "ab", "logit_bias": [[256, 100]]}).json()
    assert (biased["stop_type"], biased["content"]) == ("eos", "")


@pytest.mark.parametrize("route", ["/completion", "/v1/completions"])
def test_repetitions_cost_the_next_token_what_the_fields_say(tiny: Live, route: str) -> None:
    """A z after xy is likely, until it would be the second one; a breaker between lets it come."""

    def said(**fields: Any) -> str:
        one = {"n_predict": 1} if route == "/completion" else {"max_tokens": 1}
        body = {"prompt": "xyzxy", "temperature": 0, "logit_bias": {str(ord("z")): 50.0}, **one, **fields}
        answer = tiny.post(route, body).json()
        return str(answer["content"] if "content" in answer else answer["choices"][0]["text"])

    strong = {"dry_multiplier": 90.0}
    assert said() == said(dry_multiplier=0.0) == "z" != said(**strong)
    assert said(**strong, dry_allowed_length=3) == said(**strong, dry_penalty_last_n=4) == "z"
    assert said(**strong, dry_sequence_breakers=["y"]) == said(**strong, dry_sequence_breakers=["yzx"]) == "z"
    assert said(**strong, dry_sequence_breakers=["zyx"]) != "z"
    assert said(dry_multiplier=10.0) == "z" != said(dry_multiplier=10.0, dry_base=20.0, dry_allowed_length=1)


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"prompt": ""}, "prompt"),
        ({"prompt": [1, [2]]}, "prompt"),
        ({"prompt": ["a", "b"], "stream": True}, "stream"),
        ({"prompt": "a", "n_predict": 0}, "n_predict"),
        ({"prompt": "a", "n_probs": 21}, "n_probs"),
        ({"prompt": "a", "grammar": "root ::= x"}, "grammar"),
    ],
)
def test_what_cannot_be_done_is_refused_by_name(tiny: Live, body: dict[str, Any], param: str) -> None:
    answer = tiny.post("/completion", body)
    assert answer.status_code == 400 and answer.json()["error"]["param"] == param


def test_the_middle_is_asked_for_with_the_vocabularys_marks(marked: Live) -> None:
    asked: list[tuple[int, ...]] = []
    submit = marked.service.llm.engine.submit
    marked.service.llm.engine.submit = lambda r, **o: asked.append(r.prompt) or submit(r, **o)  # type: ignore[method-assign]
    body = {**GREEDY, "input_prefix": "a<|end|>", "input_suffix": "z", "prompt": "m"}
    said = marked.post("/infill", body).json()
    assert asked[0] == (257, *b"a<|end|>", 258, *b"z", 259, *b"m"), "names of tokens in texts are text"
    again = {"prompt": "a<|end|>", "suffix": "z", "max_tokens": 8, "temperature": 0}
    marked.post("/v1/completions", again)
    assert asked[1] == asked[0][:-1] and said["stop"]
    marked.post("/infill", {**body, "input_extra": [{"filename": "x.py", "text": "X"}]})
    assert b"X\n\na<|end|>" in bytes(i for i in asked[2] if i < 256)


def test_a_vocabulary_without_marks_says_so(tiny: Live) -> None:
    for path, body in (("/infill", {"input_prefix": "a"}), ("/v1/completions", {"prompt": "a", "suffix": "b"})):
        answer = tiny.post(path, body)
        assert answer.status_code == 400 and "middle" in answer.json()["error"]["message"]
    assert marks_of(Tokenizer(Bytes(), special_ids={})) is None


def test_codestrals_order_and_plain_added_tokens() -> None:
    added = [AddedToken(id=i, content=text, special=False) for text, i in (("[PREFIX]", 1), ("[SUFFIX]", 2))]
    tokenizer = Tokenizer(Bytes(), special_ids={}, added=added)
    marks = marks_of(tokenizer)
    assert marks is not None and marks.prompt(tokenizer, "a", "z") == [2, ord("z"), 1, ord("a")]


def test_props_and_slots(tiny: Live) -> None:
    props = tiny.client.get("/props").json()
    assert props["total_slots"] == 8 and "assistant" in props["chat_template"] and props["eos_token"] == "<|end|>"
    assert props["default_generation_settings"]["n_ctx"] == 1024 and props["infill"] is False
    slots = tiny.client.get("/slots").json()
    assert len(slots) == 8 and slots[0].keys() == {"id", "n_ctx", "is_processing"}


def test_tokens_by_llama_cpps_names(tiny: Live) -> None:
    assert tiny.post("/tokenize", {"content": "ab"}).json()["tokens"] == [97, 98]
    assert tiny.post("/detokenize", {"tokens": [97, 98]}).json()["content"] == "ab"
    assert tiny.post("/tokenize", {"content": "ab", "prompt": "ab"}).status_code == 400


def test_documents_are_ordered_by_their_vectors_and_it_is_said(tiny: Live) -> None:
    texts = ["zzzz", "a cat", "!!!", "a cat"]
    said = tiny.post("/v1/rerank", {"query": "a cat", "documents": [*texts[:3], {"text": texts[3]}], "top_n": 3}).json()
    assert [one["index"] for one in said["results"]][:2] == [1, 3] and len(said["results"]) == 3
    assert said["results"][0]["relevance_score"] == pytest.approx(1, abs=1e-5) and "cosine" in said["method"]
    assert said["results"][0]["document"] == {"text": "a cat"}
    scores = tiny.post("/v1/score", {"text_1": "a cat", "text_2": texts}).json()["data"]
    by_index = {one["index"]: one["relevance_score"] for one in said["results"]}
    assert all(scores[i]["score"] == pytest.approx(by_index[i]) for i in by_index)
    pairs = tiny.post("/v1/score", {"text_1": texts, "text_2": texts}).json()["data"]
    assert [one["score"] for one in pairs] == pytest.approx([1] * 4, abs=1e-5)
    assert tiny.post("/v1/score", {"text_1": ["a", "b"], "text_2": ["a"]}).status_code == 400
    assert tiny.post("/v1/rerank", {"query": "a", "documents": []}).status_code == 400
