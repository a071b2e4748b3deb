"""The clients people have, against a server on this machine: OpenAI's and Anthropic's own libraries."""

from __future__ import annotations

import base64
import json
import struct

import anthropic
import openai
import pytest

from tests.waiting import HANG_S

MODEL = "smollm2-135m-instruct"
QUESTION = [{"role": "user", "content": "What is the capital of France?"}]
WEATHER = {
    "type": "object",
    "properties": {"city": {"type": "string"}, "days": {"type": "integer"}},
    "required": ["city", "days"],
    "additionalProperties": False,
}
TOOL = {"type": "function", "function": {"name": "weather", "description": "Weather of a city", "parameters": WEATHER}}

pytestmark = pytest.mark.weights


@pytest.fixture
def client(smol: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{smol}/v1", api_key="x", max_retries=0, timeout=HANG_S)


@pytest.fixture
def claude(smol: str) -> anthropic.Anthropic:
    return anthropic.Anthropic(base_url=smol, api_key="x", max_retries=0, timeout=HANG_S)


# Chat ----------------------------------------------------------------------------------------------------------------


def test_chat_whole_and_streamed_are_the_same(client: openai.OpenAI) -> None:
    options = {"model": MODEL, "messages": QUESTION, "temperature": 0.8, "seed": 3, "max_tokens": 24}
    whole = client.chat.completions.create(**options, logprobs=True, top_logprobs=2)
    choice = whole.choices[0]
    chunks = list(client.chat.completions.create(**options, stream=True, stream_options={"include_usage": True}))
    streamed = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert streamed == choice.message.content
    assert chunks[-1].usage is not None and chunks[-1].usage.completion_tokens == whole.usage.completion_tokens
    reasons = [c.choices[0].finish_reason for c in chunks if c.choices]
    assert reasons[-1] == choice.finish_reason and set(reasons[:-1]) == {None}
    tokens = choice.logprobs.content
    assert len(tokens) == whole.usage.completion_tokens
    assert all(len(t.top_logprobs) in (2, 3) and t.logprob <= t.top_logprobs[0].logprob + 1e-6 for t in tokens)
    said = b"".join(bytes(t.bytes) for t in tokens).decode()
    assert said.removesuffix("<|im_end|>") == choice.message.content


def test_it_knows_the_answer(client: openai.OpenAI) -> None:
    done = client.chat.completions.create(model=MODEL, messages=QUESTION, temperature=0)
    assert "Paris" in done.choices[0].message.content and done.choices[0].finish_reason == "stop"


def test_several_choices_differ_and_each_is_what_its_seed_gives(client: openai.OpenAI) -> None:
    options = {"model": MODEL, "messages": QUESTION, "temperature": 1.5, "max_tokens": 12}
    many = client.chat.completions.create(**options, n=3, seed=10)
    texts = [choice.message.content for choice in many.choices]
    again = client.chat.completions.create(**options, n=3, seed=10)
    assert texts == [choice.message.content for choice in again.choices] and len(set(texts)) == 3
    next_seed = client.chat.completions.create(**options, n=3, seed=11)
    assert not {choice.message.content for choice in next_seed.choices} & set(texts), "neighbouring seeds share nothing"


def test_an_answer_follows_a_schema(client: openai.OpenAI) -> None:
    form = {"type": "json_schema", "json_schema": {"name": "w", "schema": WEATHER, "strict": True}}
    ask = [{"role": "user", "content": "The weather in Rome for 3 days, as JSON."}]
    done = client.chat.completions.create(
        model=MODEL, messages=ask, response_format=form, temperature=1, seed=1, max_tokens=200
    )
    value = json.loads(done.choices[0].message.content)
    assert set(value) == {"city", "days"} and isinstance(value["days"], int)
    regex = {"response_format": {"type": "regex", "regex": "(yes|no), [a-z]{3,5}!"}}
    said = (
        client.chat.completions.create(model=MODEL, messages=ask, extra_body=regex, seed=1).choices[0].message.content
    )
    assert said.startswith(("yes, ", "no, ")) and said.endswith("!")


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "weather"}}])
@pytest.mark.parametrize("stream", [False, True])
def test_a_forced_tool_call_is_well_formed(client: openai.OpenAI, choice: object, stream: bool) -> None:
    other = {"type": "function", "function": {"name": "stop", "parameters": {"type": "object", "properties": {}}}}
    options = {"model": MODEL, "messages": [{"role": "user", "content": "Will it rain in Oslo?"}], "seed": 5}
    options |= {"tools": [TOOL, other], "tool_choice": choice, "parallel_tool_calls": False, "max_tokens": 200}
    if stream:
        deltas = [c.choices[0] for c in client.chat.completions.create(**options, stream=True)]
        first, *pieces = [call for d in deltas for call in d.delta.tool_calls or []]
        assert all((p.index, p.id, p.function.name) == (first.index, None, None) for p in pieces), (
            "the rest of one call"
        )
        first.function.arguments += "".join(p.function.arguments for p in pieces)
        calls, reason = [first], deltas[-1].finish_reason
    else:
        done = client.chat.completions.create(**options).choices[0]
        calls, reason = done.message.tool_calls, done.finish_reason
    assert len(calls) == 1 and reason == "tool_calls" and calls[0].id.startswith("call_")
    if calls[0].function.name == "weather":
        assert set(json.loads(calls[0].function.arguments)) == {"city", "days"}
    else:
        assert choice == "required"


def test_a_tool_result_goes_back_in(client: openai.OpenAI) -> None:
    call = {"id": "call_1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Oslo"}'}}
    turns = [
        {"role": "user", "content": "Weather in Oslo?"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "call_1", "content": "rain, 4 degrees"},
    ]
    done = client.chat.completions.create(model=MODEL, messages=turns, tools=[TOOL], temperature=0, max_tokens=40)
    assert done.choices[0].message.content or done.choices[0].message.tool_calls


# Plain completions, vectors, lists -----------------------------------------------------------------------------------


def test_completions_take_texts_and_ids_and_echo_with_logprobs(client: openai.OpenAI) -> None:
    text = client.completions.create(model=MODEL, prompt="The capital of France is", max_tokens=3, temperature=0)
    assert text.choices[0].text.startswith(" Paris")
    two = client.completions.create(model=MODEL, prompt=["One, two,", "A B C"], max_tokens=4, temperature=0, n=2)
    assert [c.index for c in two.choices] == [0, 1, 2, 3] and two.choices[0].text == two.choices[1].text
    ids = [504, 3575, 282, 4649, 314]
    echoed = client.completions.create(
        model=MODEL, prompt=[ids], echo=True, logprobs=2, max_tokens=1, temperature=0
    ).choices[0]
    rows = echoed.logprobs
    assert len(rows.tokens) == len(rows.token_logprobs) == len(rows.top_logprobs) == len(rows.text_offset) == 6
    assert rows.token_logprobs[0] is None and all(p <= 0 for p in rows.token_logprobs[1:])
    assert "".join(rows.tokens) == echoed.text
    assert rows.token_logprobs[-1] == max(rows.top_logprobs[-1].values())
    scored = client.completions.create(model=MODEL, prompt=[ids], echo=True, logprobs=1, max_tokens=0).choices[0]
    assert scored.logprobs.token_logprobs == rows.token_logprobs[:-1]


def test_vectors_are_the_same_in_both_encodings(client: openai.OpenAI) -> None:
    texts = ["A cat on a mat.", "Interest rates rose."]
    floats = client.embeddings.create(model=MODEL, input=texts, encoding_format="float").data
    packed = client.embeddings.create(model=MODEL, input=texts, encoding_format="base64").data
    for one, other in zip(floats, packed, strict=True):
        raw = base64.b64decode(other.embedding) if isinstance(other.embedding, str) else None
        values = list(struct.unpack(f"<{len(raw) // 4}f", raw)) if raw else other.embedding
        assert values == pytest.approx(one.embedding) and len(values) == 576
        assert sum(v * v for v in values) == pytest.approx(1, abs=1e-5)


def test_the_model_is_listed(client: openai.OpenAI) -> None:
    assert [m.id for m in client.models.list()] == [MODEL]
    assert client.models.retrieve(MODEL).id == MODEL


@pytest.mark.parametrize(
    ("change", "error", "says"),
    [
        ({"model": "gpt-4"}, openai.NotFoundError, "gpt-4"),
        ({"temperature": 300}, openai.BadRequestError, "temperature"),
        ({"extra_body": {"audio": {"voice": "alloy"}}}, openai.BadRequestError, "audio"),
        ({"max_tokens": -2}, openai.BadRequestError, "max_tokens"),
        ({"messages": []}, openai.BadRequestError, "messages"),
        ({"messages": [{"role": "user", "content": "a " * 9000}]}, openai.BadRequestError, "context is 8192"),
        ({"top_logprobs": 21, "logprobs": True}, openai.BadRequestError, "logprobs"),
        ({"extra_body": {"response_format": {"type": "regex", "regex": "("}}}, openai.BadRequestError, "grammar"),
    ],
)
def test_errors_name_what_is_wrong(client: openai.OpenAI, change: dict[str, object], error: type, says: str) -> None:
    with pytest.raises(error, match=says):
        client.chat.completions.create(**({"model": MODEL, "messages": QUESTION} | change))


# Responses -----------------------------------------------------------------------------------------------------------


def test_responses_whole_and_streamed(client: openai.OpenAI) -> None:
    options = {"model": MODEL, "input": "What is the capital of France?", "temperature": 0, "max_output_tokens": 30}
    whole = client.responses.create(**options)
    assert "Paris" in whole.output_text and whole.status == "completed"
    events = list(client.responses.create(**options, stream=True))
    assert [e.sequence_number for e in events] == list(range(len(events)))
    assert events[0].type == "response.created" and events[-1].type == "response.completed"
    text = "".join(e.delta for e in events if e.type == "response.output_text.delta")
    assert text == whole.output_text == events[-1].response.output_text
    cut = client.responses.create(model=MODEL, input="Count to fifty.", max_output_tokens=3)
    assert cut.status == "incomplete" and cut.incomplete_details.reason == "max_output_tokens"


def test_responses_call_tools(client: openai.OpenAI) -> None:
    tool = {"type": "function", "name": "weather", "parameters": WEATHER, "strict": True}
    # Greedy: a draw may talk until the context is full, which is an answer cut off and minutes of work.
    asked = {"model": MODEL, "tools": [tool], "temperature": 0, "parallel_tool_calls": False}
    done = client.responses.create(**asked, input="Rain in Oslo?", tool_choice="required", max_output_tokens=400)
    calls = [item for item in done.output if item.type == "function_call"]
    assert calls and set(json.loads(calls[0].arguments)) == {"city", "days"}
    turns = [
        {"role": "user", "content": "Rain in Oslo?"},
        {"type": "function_call", "call_id": calls[0].call_id, "name": "weather", "arguments": calls[0].arguments},
        {"type": "function_call_output", "call_id": calls[0].call_id, "output": "no"},
    ]
    assert client.responses.create(**asked, input=turns, max_output_tokens=20).output


# Anthropic -----------------------------------------------------------------------------------------------------------


def test_messages_whole_and_streamed(claude: anthropic.Anthropic) -> None:
    options = {
        "model": MODEL,
        "messages": QUESTION,
        "max_tokens": 30,
        "system": "Be brief.",
        "extra_body": {"temperature": 0.0},
    }
    whole = claude.messages.create(**options)
    assert "Paris" in whole.content[0].text and whole.stop_reason == "end_turn"
    with claude.messages.stream(**options) as stream:
        assert "".join(stream.text_stream) == whole.content[0].text
        assert stream.get_final_message().usage.output_tokens == whole.usage.output_tokens
    counted = claude.messages.count_tokens(model=MODEL, messages=QUESTION, system="Be brief.")
    usage = whole.usage
    assert counted.input_tokens == usage.input_tokens + usage.cache_read_input_tokens
    assert claude.messages.create(**options | {"max_tokens": 2}).stop_reason == "max_tokens"
    stopped = claude.messages.create(**options | {"stop_sequences": ["Paris"]})
    assert (stopped.stop_reason, stopped.stop_sequence) == ("stop_sequence", "Paris")


def test_messages_call_tools_and_take_results(claude: anthropic.Anthropic) -> None:
    tool = {"name": "weather", "description": "Weather of a city", "input_schema": WEATHER}
    options = {"model": MODEL, "max_tokens": 200, "tools": [tool], "extra_body": {"temperature": 0.0}}
    done = claude.messages.create(**options, messages=QUESTION, tool_choice={"type": "any"})
    call = next(block for block in done.content if block.type == "tool_use")
    assert done.stop_reason == "tool_use" and set(call.input) == {"city", "days"}
    result = {"type": "tool_result", "tool_use_id": call.id, "content": "sunny"}
    turns = [
        *QUESTION,
        {"role": "assistant", "content": done.content},
        {"role": "user", "content": [result]},
    ]
    with claude.messages.stream(**options, messages=turns, tool_choice={"type": "tool", "name": "weather"}) as stream:
        assert stream.get_final_message().content[0].name == "weather"


def test_anthropic_errors_have_its_shape(claude: anthropic.Anthropic) -> None:
    with pytest.raises(anthropic.NotFoundError) as caught:
        claude.messages.create(model="claude", messages=QUESTION, max_tokens=3)
    assert caught.value.body["type"] == "error" and caught.value.body["error"]["type"] == "not_found_error"
