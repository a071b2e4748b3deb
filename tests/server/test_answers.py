"""What an answer says, number by number: every field beside the engine's own events, ids and sums included.

The clients of test_clients.py read the same forms; here each number must be the right one.
"""

from __future__ import annotations

import codecs
import json
from dataclasses import replace
from typing import Any

import pytest

from quadriga.engine.request import Request, SamplingParams, TokenEvent, seed_of
from quadriga.server.metrics import balance_of, jain_of
from quadriga.text.chat import render
from tests.server.conftest import Live, running, tiny_llm

WORDS = "Tell me of four horses"
SAMPLING = {"temperature": 0.9, "top_p": 0.95, "seed": 5, "max_tokens": 12, "ignore_eos": True}


def own(ids: list[int], n: int = 1, **params: Any) -> list[list[TokenEvent]]:
    """The events of an engine of its own: n answers, the first one with the seed that was given."""
    llm = tiny_llm()
    settings = SamplingParams(
        **{"temperature": 0.9, "top_p": 0.95, "seed": 5, "max_new_tokens": 12, "ignore_eos": True} | params
    )
    wanted = [
        llm.engine.submit(
            Request(
                prompt=tuple(ids), params=replace(settings, seed=seed_of(settings.seed or 0, i) if i else settings.seed)
            )
        )
        for i in range(n)
    ]
    events: dict[int, list[TokenEvent]] = {number: [] for number in wanted}
    while llm.engine.has_work:
        for number, event in llm.engine.step():
            assert isinstance(event, TokenEvent)
            events[number].append(event)
    return list(events.values())


def chat_ids(words: str = WORDS) -> list[int]:
    llm = tiny_llm()
    assert llm.tokenizer is not None
    return render([{"role": "user", "content": words}], llm.tokenizer).ids


def chunks_of(raw: str) -> list[dict[str, Any]]:
    """The events of a stream, without the last word."""
    lines = [line[6:] for line in raw.splitlines() if line.startswith("data: ")]
    assert lines[-1] == "[DONE]"
    return [json.loads(line) for line in lines[:-1]]


def shown(live: Live, token: int, logprob: float) -> dict[str, Any]:
    """A token as it must be shown, by its bytes: this vocabulary has a token for each byte, and one end."""
    raw = bytes([token]) if token < 256 else b""
    text = live.service.token_text(token)
    assert text == (raw.decode() if token < 128 else text)
    return {"token": text, "logprob": pytest.approx(logprob, abs=1e-12), "bytes": list(raw)}


def chat(**more: Any) -> dict[str, Any]:
    return {"model": "tiny", "messages": [{"role": "user", "content": WORDS}], **SAMPLING, **more}


# Chat ----------------------------------------------------------------------------------------------------------------


def test_a_chat_answer_is_the_engines_with_every_number(tiny: Live) -> None:
    ids = chat_ids()
    truth = own(ids, n=3, logprobs=4)
    body = tiny.post("/v1/chat/completions", chat(n=3, logprobs=True, top_logprobs=4)).json()
    assert body["object"] == "chat.completion" and body["model"] == "tiny" and body["id"].startswith("chatcmpl-")
    assert [choice["index"] for choice in body["choices"]] == [0, 1, 2]
    texts = set()
    for choice, events in zip(body["choices"], truth, strict=True):
        texts.add(choice["message"]["content"])
        assert choice["message"]["content"] == "".join(event.text for event in events)
        assert choice["message"]["role"] == "assistant" and choice["finish_reason"] == "length"
        assert choice["logprobs"]["content"] == [
            {
                **shown(tiny, event.token_id, event.logprob),
                "top_logprobs": [shown(tiny, token, logprob) for token, logprob in event.top_logprobs],
            }
            for event in events
        ]
        assert all(event.token_id in {token for token, _ in event.top_logprobs} for event in events)
        assert {len(event.top_logprobs) for event in events} <= {4, 5}
    assert len(texts) == 3, "each choice has a seed of its own"
    usage = body["usage"]
    assert (usage["prompt_tokens"], usage["completion_tokens"]) == (len(ids), 36)
    assert usage["total_tokens"] == len(ids) + 36


def test_a_streamed_chat_is_the_whole_one(tiny: Live) -> None:
    whole = tiny.post("/v1/chat/completions", chat(n=2, logprobs=True, top_logprobs=2)).json()
    asked = chat(n=2, logprobs=True, top_logprobs=2, stream=True, stream_options={"include_usage": True})
    chunks = chunks_of(tiny.post("/v1/chat/completions", asked).text)
    assert len({chunk["id"] for chunk in chunks}) == len({chunk["created"] for chunk in chunks}) == 1
    assert chunks[0]["id"].startswith("chatcmpl-") and chunks[0]["id"] != whole["id"]
    assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}
    assert all(chunk["usage"] is None for chunk in chunks[:-1]) and chunks[-1]["choices"] == []
    same = {name: whole["usage"][name] for name in ("prompt_tokens", "completion_tokens", "total_tokens")}
    assert {name: chunks[-1]["usage"][name] for name in same} == same
    for choice in whole["choices"]:
        mine = [c["choices"][0] for c in chunks[:-1] if c["choices"][0]["index"] == choice["index"]]
        assert mine[0]["delta"]["role"] == "assistant"
        assert "".join(one["delta"].get("content") or "" for one in mine) == choice["message"]["content"]
        assert [p for one in mine if one["logprobs"] for p in one["logprobs"]["content"]] == choice["logprobs"][
            "content"
        ]
        assert [one["finish_reason"] for one in mine] == [None] * (len(mine) - 1) + [choice["finish_reason"]]


def test_usage_comes_only_when_it_is_asked_for(tiny: Live) -> None:
    chunks = chunks_of(tiny.post("/v1/chat/completions", chat(stream=True)).text)
    assert all("usage" not in chunk and chunk["choices"] for chunk in chunks)


def test_ids_are_an_answers_own(tiny: Live) -> None:
    for path, body in (("/v1/chat/completions", chat()), ("/v1/completions", text())):
        ids = [tiny.post(path, body).json()["id"] for _ in range(4)]
        assert len(set(ids)) == 4 and all(len(one) > 20 for one in ids)


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        ({"temperature": 0}, {"temperature": 0.0}),
        ({"logit_bias": {"65": 100, "66": -100}}, {"logit_bias": {65: 100.0, 66: -100.0}}),
        ({"presence_penalty": 1.5, "frequency_penalty": -0.5}, {"presence_penalty": 1.5, "frequency_penalty": -0.5}),
        ({"repetition_penalty": 1.8}, {"repetition_penalty": 1.8}),
        ({"top_k": 3, "top_p": 1.0}, {"top_k": 3, "top_p": 1.0}),
        ({"min_p": 0.2, "top_p": 1.0}, {"min_p": 0.2, "top_p": 1.0}),
        ({"stop_token_ids": [200, 10, 99]}, {"stop_ids": (200, 10, 99)}),
        ({"stop": ["a", "e", "\\u0001"]}, {"stop": ("a", "e", "\\u0001")}),
        ({"ignore_eos": False, "logit_bias": {"256": 9}}, {"ignore_eos": False, "logit_bias": {256: 9.0}}),
        ({"ignore_eos": True, "logit_bias": {"256": 9}}, {"ignore_eos": True, "logit_bias": {256: 9.0}}),
        ({"seed": 0}, {"seed": 0}),
        ({"max_tokens": 1}, {"max_new_tokens": 1}),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else None,
)
def test_every_field_does_what_it_says(tiny: Live, given: dict[str, Any], meant: dict[str, Any]) -> None:
    (events,) = own(chat_ids(), **meant)
    choice = tiny.post("/v1/chat/completions", chat(logprobs=True, **given)).json()["choices"][0]
    assert [token["bytes"] for token in choice["logprobs"]["content"]] == [
        [event.token_id] if event.token_id < 256 else [] for event in events
    ]
    assert choice["finish_reason"] == events[-1].finish_reason


def test_without_a_temperature_it_is_one(tiny: Live) -> None:
    (events,) = own(chat_ids(), temperature=1.0)
    body = chat()
    del body["temperature"]
    content = tiny.post("/v1/chat/completions", body).json()["choices"][0]["message"]["content"]
    assert content == "".join(event.text for event in events)


# Completions ---------------------------------------------------------------------------------------------------------


def text(**more: Any) -> dict[str, Any]:
    return {"model": "tiny", "prompt": WORDS, **SAMPLING, **more}


def test_choices_of_several_prompts_are_in_order_and_their_sums_are_of_all(tiny: Live) -> None:
    prompts = ["first words", "the second, longer words"]
    body = tiny.post("/v1/completions", text(prompt=prompts, n=2, logprobs=3, echo=True)).json()
    assert [choice["index"] for choice in body["choices"]] == [0, 1, 2, 3]
    for p, prompt in enumerate(prompts):
        ids = list(prompt.encode())
        for i, events in enumerate(own(ids, n=2, logprobs=3, prompt_logprobs=True)):
            choice = body["choices"][2 * p + i]
            assert choice["text"] == prompt + "".join(event.text for event in events)
            report, rows = events[0].prompt, choice["logprobs"]
            assert report is not None
            tokens = [*ids, *(event.token_id for event in events)]
            assert rows["tokens"] == [tiny.service.token_text(token) for token in tokens]
            decoder = codecs.getincrementaldecoder("utf-8")("replace")
            lengths = [len(decoder.decode(bytes([token]) if token < 256 else b"")) for token in tokens]
            starts = [sum(lengths[:k]) for k in range(len(tokens))]
            assert rows["text_offset"] == starts
            assert rows["token_logprobs"] == [None, *report.logprobs, *(event.logprob for event in events)]
            tops = [None, *report.top_logprobs, *(event.top_logprobs for event in events)]
            assert rows["top_logprobs"] == [
                None if top is None else {tiny.service.token_text(t): logprob for t, logprob in top} for top in tops
            ]
    usage = body["usage"]
    assert usage["prompt_tokens"] == sum(map(len, prompts)) and usage["completion_tokens"] == 4 * 12
    assert usage["total_tokens"] == usage["prompt_tokens"] + 48


def test_a_scored_prompt_alone_has_no_token_more(tiny: Live) -> None:
    body = tiny.post("/v1/completions", text(max_tokens=0, echo=True, logprobs=2)).json()
    (choice,) = body["choices"]
    assert choice["text"] == WORDS and choice["finish_reason"] == "length"
    assert {len(choice["logprobs"][name]) for name in choice["logprobs"]} == {len(WORDS)}
    assert choice["logprobs"]["token_logprobs"][0] is None and None not in choice["logprobs"]["token_logprobs"][1:]
    assert body["usage"]["completion_tokens"] == 0


def test_a_streamed_completion_is_the_whole_one(tiny: Live) -> None:
    asked = text(n=2, logprobs=2)
    whole = tiny.post("/v1/completions", asked).json()
    streamed = tiny.post("/v1/completions", asked | {"stream": True, "stream_options": {"include_usage": True}})
    chunks = chunks_of(streamed.text)
    assert len({chunk["id"] for chunk in chunks}) == 1 and chunks[-1]["usage"]["completion_tokens"] == 24
    for choice in whole["choices"]:
        mine = [c["choices"][0] for c in chunks[:-1] if c["choices"][0]["index"] == choice["index"]]
        assert "".join(one["text"] for one in mine) == choice["text"]
        assert [one["finish_reason"] for one in mine][-1] == choice["finish_reason"] == "length"
        for name in ("tokens", "token_logprobs", "top_logprobs"):
            assert [x for one in mine for x in one["logprobs"][name]] == choice["logprobs"][name]


def test_what_was_found_in_the_cache_is_in_the_sums() -> None:
    with running(tiny_llm()) as live:
        body = text(prompt="x" * 100, max_tokens=1)
        usages = [live.post("/v1/completions", body).json()["usage"] for _ in range(2)]
    assert [u["prompt_tokens"] for u in usages] == [100, 100]
    assert [u["prompt_tokens_details"]["cached_tokens"] for u in usages] == [0, 96]


# The other interfaces ------------------------------------------------------------------------------------------------


def test_messages_and_responses_count_the_same(tiny: Live) -> None:
    ids = chat_ids()
    message = {"model": "tiny", "max_tokens": 7, "messages": [{"role": "user", "content": WORDS}]}
    usage = tiny.post("/v1/messages", message).json()["usage"]
    assert usage["output_tokens"] <= 7
    assert usage["input_tokens"] + (usage.get("cache_read_input_tokens") or 0) == len(ids)
    response = tiny.post("/v1/responses", {"model": "tiny", "input": WORDS, "max_output_tokens": 7}).json()
    usage = response["usage"]
    assert usage["input_tokens"] == len(ids) and usage["output_tokens"] <= 7
    assert usage["total_tokens"] == usage["input_tokens"] + usage["output_tokens"]


def test_a_batch_answers_each_line_under_its_own_id(tiny: Live) -> None:
    lines = [
        {"custom_id": f"line-{i}", "method": "POST", "url": "/v1/completions", "body": text(seed=i)} for i in range(5)
    ]
    raw = "\n".join(map(json.dumps, lines)).encode()
    answer = tiny.client.post("/v1/batches", content=raw, headers={"content-type": "application/jsonl"})
    got = {one["custom_id"]: one for one in map(json.loads, answer.text.splitlines())}
    assert sorted(got) == [f"line-{i}" for i in range(5)] and len({one["id"] for one in got.values()}) == 5
    for i in range(5):
        alone = tiny.post("/v1/completions", text(seed=i)).json()["choices"]
        assert got[f"line-{i}"]["response"]["body"]["choices"] == alone
    twice = raw + b"\n" + raw.splitlines()[0]
    refused = tiny.client.post("/v1/batches", content=twice, headers={"content-type": "application/jsonl"})
    assert refused.status_code == 400 and "same custom_id" in refused.json()["error"]["message"]


def test_routing_says_which_experts_and_how_sure(tiny: Live) -> None:
    body = tiny.post("/v1/completions", text(routing=True, max_tokens=3)).json()["choices"][0]["routing"]
    llm = tiny_llm()
    params = SamplingParams(temperature=0.9, top_p=0.95, seed=5, max_new_tokens=3, ignore_eos=True)
    llm.engine.submit(Request(prompt=tuple(WORDS.encode()), params=params, routing=True))
    events = []
    while llm.engine.has_work:
        events += [event for _, event in llm.engine.step()]
    assert len(body) == len(events) == 3
    for got, event in zip(body, events, strict=True):
        assert isinstance(event, TokenEvent) and event.routing is not None
        assert got["id"] == event.token_id
        assert got["layers"] == [[[e, round(w, 4)] for e, w in layer] for layer in event.routing]
        assert got["entropy"] == [round(part, 3) for part in event.router_entropy]


def test_priority_decides_who_is_next() -> None:
    with running(tiny_llm(max_sequences=1)) as live:
        seen: list[int] = []
        submit = live.service.llm.engine.submit
        live.service.llm.engine.submit = lambda request: seen.append(request.priority) or submit(request)  # type: ignore[func-returns-value, method-assign]
        live.post("/v1/completions", text(priority=7))
        live.post("/v1/chat/completions", chat(priority=-3))
    assert seen == [7, -3]


def test_balance_and_fairness_by_hand() -> None:
    assert balance_of([2, 2, 2, 2]) == 1.0 and balance_of([8, 0, 0, 0]) == 4.0 and balance_of([0, 0]) == 1.0
    assert jain_of([3, 3, 3]) == 1.0 and jain_of([9, 0, 0]) == pytest.approx(1 / 3) and jain_of([0, 0]) == 1.0
    assert balance_of([1, 2, 3]) == 1.5 and jain_of([1, 2, 3]) == pytest.approx(36 / 42)
