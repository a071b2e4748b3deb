"""Large and hostile bodies: bounded before any work, worked on beside the event loop, forgotten afterwards."""

from __future__ import annotations

import asyncio
import gc
import json
import random
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from starlette.requests import Request
from starlette.types import Message as AsgiMessage

from quadriga.engine.request import SamplingParams
from quadriga.errors import RequestError
from quadriga.server import batches, chat, completions, fields, messages, schema, service, text_routes, work
from quadriga.server.errors import ApiError
from quadriga.server.guard import Limits, read_body
from quadriga.server.schema import ChatRequest, CompletionRequest, Function, Tool, parse, parse_json
from quadriga.server.tools import CLOSE, OPEN, Reader, Reading, ToolUse
from quadriga.text import chat as template
from quadriga.text.tool_calls import forms
from tests.server.conftest import Live, running, tiny_llm
from tests.waiting import HANG_S, until

CHAT = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 2}
TEXT = {"model": "tiny", "prompt": "hi", "max_tokens": 2}


def refusal_of(raw: bytes, kind: type = CompletionRequest) -> str:
    with pytest.raises(ApiError) as caught:
        parse(raw, kind)
    assert caught.value.status == 400
    return str(caught.value)


# Work for each part of a body ----------------------------------------------------------------------------------------


class Counted(str):
    """A key that counts how often it is hashed or compared."""

    work = 0

    def __hash__(self) -> int:
        Counted.work += 1
        return super().__hash__()

    def __eq__(self, other: object) -> bool:
        Counted.work += 1
        return super().__eq__(other)


def test_a_repeated_key_is_found_in_one_pass() -> None:
    n = 3000
    pairs = [(Counted(f"{i:x}"), 0) for i in range(n)]
    Counted.work = 0
    with pytest.raises(ValueError, match="the key '7' appears twice"):
        schema._once([*pairs, (Counted("7"), 0)])
    assert Counted.work < 10 * n


def tree(rng: random.Random, depth: int) -> Any:
    kind = rng.randrange(8 if depth else 5)
    if kind < 5:
        odd = rng.choice(['a"b', "\\", '\\"', '\\\\"', "tfn[]{}:,", "", "é\0\n", "x" * rng.randrange(40)])
        return [odd, rng.randrange(10**6), rng.choice([True, False, None]), 1.5, ""][kind]
    if kind < 7:
        return [tree(rng, depth - 1) for _ in range(rng.randrange(5))]
    return {rng.choice('ab"\\:,') + str(i): tree(rng, depth - 1) for i in range(rng.randrange(5))}


def parts_of(value: Any) -> tuple[int, int, int]:
    """(keys, texts, lists and objects, numbers) of parsed JSON."""
    if isinstance(value, dict):
        inner = [parts_of(v) for v in value.values()]
        return len(value) + sum(p[0] for p in inner), 1 + sum(p[1] for p in inner), sum(p[2] for p in inner)
    if isinstance(value, list):
        inner = [parts_of(v) for v in value]
        return sum(p[0] for p in inner), 1 + sum(p[1] for p in inner), sum(p[2] for p in inner)
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return 0, int(not number), int(number)


def passes(monkeypatch: pytest.MonkeyPatch, raw: bytes, **bounds: int) -> bool:
    for name in ("MAX_KEYS", "MAX_VALUES", "MAX_NUMBERS", "MAX_ESCAPES"):
        monkeypatch.setattr(schema, name, bounds.get(name, 10**9))
    try:
        schema.check_parts(raw)
    except ApiError:
        return False
    return True


def test_the_parts_of_a_body_are_counted_without_parsing_it(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = random.Random(1)
    for _ in range(600):
        value = [tree(rng, 4), 1]
        raw = json.dumps(value, ensure_ascii=rng.random() < 0.5, indent=rng.choice([None, 1])).encode()
        monkeypatch.setattr(schema, "_SLICE", rng.choice([1, 2, 3, 7, 50, 10**6]))
        keys, values, numbers = parts_of(value)
        assert passes(monkeypatch, raw, MAX_KEYS=keys)
        assert not (keys and passes(monkeypatch, raw, MAX_KEYS=keys - 1)), raw
        assert passes(monkeypatch, raw, MAX_VALUES=values)
        assert not passes(monkeypatch, raw, MAX_VALUES=values - 2), raw
        assert not passes(monkeypatch, raw, MAX_NUMBERS=numbers - 2), raw
        assert passes(monkeypatch, raw, MAX_NUMBERS=numbers + raw.count(b"[]") + raw.count(b"{}")), raw


def many(piece: str, n: int, around: str = "[]") -> bytes:
    inner = ",".join(piece.replace("#", str(i)) for i in range(n))
    return f'{{"model":"tiny","prompt":"a","x":{around[0]}{inner}{around[1]}}}'.encode()


@pytest.mark.parametrize(
    ("raw", "named"),
    [
        (many('"#":1', 70_000, "{}"), "65,536 keys"),
        (many('{"#":1}', 70_000), "65,536 keys"),
        (many("[]", 70_000), "65,536 texts, lists and objects"),
        (many('"#"', 70_000), "65,536 texts, lists and objects"),
        (many("true", 70_000), "65,536 texts, lists and objects"),
        (b"[" * 4_000_000, "65,536 texts, lists and objects"),
        (many("1", 1_100_000), "1,048,576 numbers"),
        (many("-1.5e3", 1_100_000), "1,048,576 numbers"),
        (b'{"model":"tiny","prompt":"' + b"\\n" * 2_200_000 + b'"}', "2,097,152 backslashes"),
        (b'{"model":"tiny","prompt":"' + b"\\\\" * 1_100_000 + b'"}', "2,097,152 backslashes"),
    ],
    ids=lambda value: repr(value)[:40],
)
def test_what_a_body_may_be_made_of_is_bounded_before_it_is_parsed(
    raw: bytes, named: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(schema.json, "loads", lambda *_, **__: pytest.fail("it is parsed"))
    assert named in refusal_of(raw)


def test_a_large_body_within_the_bounds_is_what_it_always_was() -> None:
    ids = [i % 257 for i in range(300_000)]
    body = parse(json.dumps({"model": "tiny", "prompt": ids, "temperature": 0.25}).encode(), CompletionRequest)
    assert body.prompt == ids and body.temperature == 0.25
    text = 'He said: "{[no, it\'s \\ fine]}", twice.\n' * 5000
    assert parse(json.dumps({"model": "tiny", "prompt": text}).encode(), CompletionRequest).prompt == text
    assert "4300 digits" in refusal_of(b'{"model":"tiny","prompt":"a","seed":' + b"9" * 70_000 + b"}")


def test_numbers_of_large_bodies_are_read_where_others_get_their_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[str] = []

    def reader(digits: str) -> int:
        read.append(digits)
        return int(digits)

    monkeypatch.setattr(schema, "_int", reader)
    parse_json(json.dumps(list(range(20_000))).encode())
    assert len(read) == 20_000, "by a function of Python's"
    parse_json(b"[1, 2]")
    assert len(read) == 20_000, "small bodies need none"


# Texts that are none -------------------------------------------------------------------------------------------------

HALVES = [
    '"\\ud800"',
    '"a\\uDFFFb"',
    '"\\udc00\\ud800"',
    '["x", ["\\ud83d"]]',
    '{"\\ud800": 1}',
    '{"a": {"b": "\\uDBFF "}}',
]
WHOLE = [
    '"\\ud83d\\ude00"',
    '"\\\\ud800"',
    '"\\\\\\ud83d\\ude00"',
    '"\\u00d8"',
    '{"\\uD83D\\uDE00": ["\\ud7ff", "\\ue000"]}',
]


@pytest.mark.parametrize("padding", [0, schema.INLINE_BYTES], ids=["small", "large"])
@pytest.mark.parametrize("raw", HALVES)
def test_half_of_a_surrogate_pair_is_refused_wherever_it_is(raw: str, padding: int) -> None:
    assert "half of a surrogate pair" in refusal_of(f"[{raw}{' ' * padding}]".encode())


@pytest.mark.parametrize("padding", [0, schema.INLINE_BYTES], ids=["small", "large"])
@pytest.mark.parametrize("raw", WHOLE)
def test_whole_pairs_and_what_looks_like_half_of_one_are_text(raw: str, padding: int) -> None:
    assert parse_json((raw + " " * padding).encode()) == json.loads(raw)


def test_a_body_without_such_escapes_is_not_looked_through_again(monkeypatch: pytest.MonkeyPatch) -> None:
    raw = json.dumps({"model": "tiny", "prompt": "Ärger \\ 的 \n" * 1000}).encode()
    monkeypatch.setattr(schema, "_check_texts", lambda _: pytest.fail("a second pass"))
    monkeypatch.setattr(schema.json, "dumps", lambda *_, **__: pytest.fail("a second pass"))
    assert parse(raw, CompletionRequest).prompt


# Bounds of single fields ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"logit_bias": {str(i): 1 for i in range(4097)}}, "logit_bias takes at most 4096 token ids, got 4097"),
        ({"stop_token_ids": [1] * 4097}, "stop_token_ids takes at most 4096, got 4097"),
        ({"stop": "x" * 4097}, "a stop string has at most 4096 characters, got 4097"),
        ({"stop": ["a", "x" * 400_000]}, "a stop string has at most 4096 characters, got 400000"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_bounds_of_fields_are_named(tiny: Live, change: dict[str, Any], says: str) -> None:
    for path, body in (("/v1/chat/completions", CHAT), ("/v1/completions", TEXT)):
        response = tiny.post(path, body | change)
        assert response.status_code == 400 and response.json()["error"]["message"] == says
        assert response.json()["error"]["param"] == next(iter(change))


def test_a_token_id_has_one_bias(tiny: Live) -> None:
    response = tiny.post("/v1/completions", TEXT | {"logit_bias": {"7": 1, "007": -1}})
    assert response.status_code == 400 and "the token id 7 twice" in response.json()["error"]["message"]


def test_what_is_just_not_nested_too_deep_to_be_parsed_is_refused_too(tiny: Live) -> None:
    headers = {"content-type": "application/json"}
    for depth in range(880, 1000):
        nested = '{"a":' * depth + "1" + "}" * depth
        for path, tool in (
            ("/v1/chat/completions", f'{{"type":"function","function":{{"name":"f","parameters":{nested}}}}}'),
            ("/v1/messages", f'{{"name":"f","input_schema":{nested}}}'),
        ):
            raw = json.dumps(CHAT)[:-1] + f', "tools": [{tool}]}}'
            assert tiny.client.post(path, content=raw.encode(), headers=headers).status_code == 400, (depth, path)


@pytest.mark.parametrize("n_bytes", [0, schema.INLINE_BYTES + 1])
def test_whatever_runs_out_of_depth_is_the_body_s_fault(n_bytes: int) -> None:
    def deep() -> None:
        raise RecursionError

    async def run() -> None:
        one = work.Work()
        for way in (one.check, one.encode):
            with pytest.raises(ApiError, match="nested too deep") as caught:
                await way(n_bytes, deep)
            assert caught.value.status == 400
        one.close()

    asyncio.run(run())


def test_fields_at_their_bounds_are_taken(tiny: Live) -> None:
    change = {"stop_token_ids": [1] * 4096, "stop": "x" * 4096, "logit_bias": {str(i): 1 for i in range(256)}}
    assert tiny.post("/v1/completions", TEXT | change).status_code == 200


def test_a_conversation_has_no_more_messages_than_the_context_has_tokens(tiny: Live) -> None:
    turns = [{"role": "user", "content": "a"}] * 1025
    for path, body in (
        ("/v1/chat/completions", {"model": "tiny", "messages": turns}),
        ("/v1/messages", {"model": "tiny", "max_tokens": 1, "messages": turns}),
        ("/tokenize", {"messages": turns}),
    ):
        response = tiny.post(path, body)
        assert response.status_code == 400 and "messages must be 1 to 1024, got 1025" in response.text


def test_what_is_encoded_without_a_context_is_bounded(tiny: Live, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text_routes, "MAX_TEXT_BYTES", 3000)
    encoded = record_encoding(tiny, monkeypatch)
    for text in ("a" * 3001, "é" * 1501):
        turns = [{"role": "user", "content": text}]
        for path, body in (
            ("/tokenize", {"prompt": text}),
            ("/tokenize", {"messages": turns}),
            ("/apply-template", {"messages": turns}),
            ("/v1/messages/count_tokens", {"model": "tiny", "messages": turns}),
        ):
            response = tiny.post(path, body)
            assert response.status_code == 400 and "may have 3,000 bytes of text" in response.text, path
    assert not encoded
    counted = tiny.post("/tokenize", {"prompt": "é" * 1500, "return_token_strs": True}).json()
    assert counted["count"] == len(counted["token_strs"]) == 3000, "three times the context"


def test_the_lines_of_a_batch_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    line = b'{"custom_id":"%d","url":"/v1/completions","body":{"model":"x"}}\n'
    monkeypatch.setattr(batches, "MAX_LINES", 20)
    handlers: Any = {"/v1/completions": None}
    batches.run(b"\n".join(line % i for i in range(20)), handlers)
    with pytest.raises(ApiError, match="1 to 20 lines, got more"):
        batches.run(b"".join(line % i for i in range(21)), handlers)
    monkeypatch.setattr(batches, "parse", lambda *_: pytest.fail("a line is read"))
    with pytest.raises(ApiError, match="1 to 20 lines, got more"):
        batches.run(b"\n" * 8_000_000, handlers)


# Prompts that cannot fit ---------------------------------------------------------------------------------------------


def record_encoding(live: Live, monkeypatch: pytest.MonkeyPatch, least_chars: int = 1000) -> list[str]:
    """The long texts that the server's vocabulary is asked to encode."""
    tokenizer, seen = live.service.llm.tokenizer, list[str]()
    assert tokenizer is not None
    vocabulary, original = tokenizer._vocabulary, tokenizer._vocabulary.encode

    def encode(text: str, allow_special: bool) -> list[int]:
        if len(text) >= least_chars:
            seen.append(text)
        return original(text, allow_special)

    monkeypatch.setattr(vocabulary, "encode", encode)
    return seen


@pytest.mark.parametrize("text", ["a" * 100_000, " " * 100_000, "word " * 20_000, "的" * 30_000], ids=lambda t: t[:5])
def test_a_prompt_that_cannot_fit_is_refused_without_encoding_it(
    tiny: Live, text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoded = record_encoding(tiny, monkeypatch, least_chars=2000)
    turns = [{"role": "user", "content": f"x{text}x"}]
    for path, body in (
        ("/v1/completions", TEXT | {"prompt": text}),
        ("/v1/completions", TEXT | {"prompt": ["hi", text]}),
        ("/v1/embeddings", {"model": "tiny", "input": text}),
        ("/v1/chat/completions", CHAT | {"messages": turns}),
        ("/v1/messages", {"model": "tiny", "max_tokens": 1, "messages": turns}),
        ("/v1/responses", {"model": "tiny", "input": text + "x"}),
    ):
        response = tiny.post(path, body)
        assert response.status_code == 400 and "exceed the model's context of 1024" in response.text, path
        if "/messages" not in path:
            assert response.json()["error"]["code"] == "context_length_exceeded"
    assert not encoded


def test_a_conversation_that_cannot_fit_is_not_even_rendered(tiny: Live, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(template.Program, "render", lambda *_, **__: pytest.fail("it is rendered"))
    response = tiny.post("/v1/chat/completions", CHAT | {"messages": [{"role": "user", "content": "a" * 20_000}]})
    assert response.status_code == 400 and "exceed the model's context" in response.text


def test_what_a_template_may_leave_out_is_rendered_but_not_encoded(tiny: Live, monkeypatch: pytest.MonkeyPatch) -> None:
    encoded = record_encoding(tiny, monkeypatch, least_chars=2000)
    turns = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "a" * 20_000}]
    response = tiny.post("/v1/chat/completions", CHAT | {"messages": turns})
    assert response.status_code == 400 and "exceed the model's context" in response.text and not encoded
    spaces = [{"role": "system", "content": " " * 20_000}, {"role": "user", "content": "hi"}]
    assert tiny.post("/v1/chat/completions", CHAT | {"messages": spaces}).status_code == 200, "the template trims them"


def test_too_many_token_ids_are_no_tensor_first(tiny: Live, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "as_tensor", lambda *_, **__: pytest.fail("a tensor is made"))
    with pytest.raises(RequestError, match="1025 tokens exceed the model's context of 1024"):
        tiny.service.llm.prompt_ids([1] * 1025)


def test_the_documented_limits_are_the_limits() -> None:
    page = (Path(__file__).parents[2] / "docs" / "server.md").read_text()
    parts = (
        f"{schema.MAX_KEYS:,} keys; {schema.MAX_VALUES:,} texts, lists and objects; {schema.MAX_NUMBERS:,} numbers; "
    )
    for said in (
        f"{parts}{schema.MAX_ESCAPES:,} backslashes",
        f"body of over {schema.INLINE_BYTES >> 10} KiB",
        f"being read and encoded | {work.MAX_LARGE} |",
        f"{chat.MAX_MESSAGES:,}, and no more than the context has tokens",
        f"{schema.MAX_BIASES:,} each; {schema.MAX_STOP_CHARS:,} characters",
        f"lines of a batch | {batches.MAX_LINES:,} |",
        f"`count_tokens` | {text_routes.MAX_TEXT_BYTES:,} bytes",
    ):
        assert said in page, said
    assert schema.MAX_BIASES == schema.MAX_STOP_IDS


# The event loop ------------------------------------------------------------------------------------------------------


@dataclass
class Shut:
    """A place in the server's work that is closed until it is opened."""

    reached: threading.Event = field(default_factory=threading.Event)
    gate: threading.Event = field(default_factory=threading.Event)

    def at(self, monkeypatch: pytest.MonkeyPatch, owner: Any, name: str) -> None:
        original: Callable[..., Any] = getattr(owner, name)

        def wait(*arguments: Any, **options: Any) -> Any:
            self.reached.set()
            assert self.gate.wait(HANG_S), "the gate is opened"
            return original(*arguments, **options)

        monkeypatch.setattr(owner, name, wait)


LARGE = "x " * schema.INLINE_BYTES
PLACES: dict[str, tuple[Any, str, str, Any]] = {
    "parsing": (fields, "parse_json", "/v1/completions", TEXT | {"prompt": LARGE}),
    "parsing a conversation": (
        fields,
        "parse_json",
        "/v1/chat/completions",
        CHAT | {"messages": [CHAT["messages"][0]] * 3000},
    ),
    "counting its parts": (schema, "check_parts", "/tokenize", {"prompt": LARGE}),
    "sampling": (service.Service, "params", "/v1/completions", TEXT | {"stop": ["y"], "user": LARGE}),
    "prompts": (completions, "prompts_of", "/v1/completions", TEXT | {"prompt": LARGE}),
    "small prompts": (completions, "prompts_of", "/v1/completions", TEXT),
    "turns": (chat, "_turns", "/v1/chat/completions", CHAT | {"user": LARGE}),
    "the template": (chat, "render", "/v1/chat/completions", CHAT | {"user": LARGE}),
    "another interface": (messages, "as_chat", "/v1/messages", CHAT | {"metadata": {"user_id": LARGE}}),
    "counting tokens": (
        template,
        "render",
        "/v1/messages/count_tokens",
        {"model": "tiny", "messages": CHAT["messages"]},
    ),
    "token ids": (text_routes, "_tokens", "/tokenize", {"prompt": LARGE}),
    "their text": (text_routes, "_text", "/detokenize", {"tokens": [65] * 50_000}),
    "a batch": (batches, "run", "/v1/batches", None),
}


def post(live: Live, path: str, body: Any) -> Any:
    if body is not None:
        return live.client.post(path, json=body, timeout=HANG_S)
    line = {"custom_id": "1", "url": "/v1/completions", "body": TEXT | {"user": LARGE}}
    headers = {"content-type": "application/jsonl"}
    return live.client.post(path, content=json.dumps(line).encode(), headers=headers, timeout=HANG_S)


@pytest.mark.parametrize("place", PLACES)
def test_the_loop_answers_others_while_a_body_is_worked_on(
    tiny: Live, place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    owner, name, path, body = PLACES[place]
    shut = Shut()
    shut.at(monkeypatch, owner, name)
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(post, tiny, path, body)
        try:
            assert shut.reached.wait(HANG_S), "the work begins"
            assert tiny.client.get("/health", timeout=HANG_S / 4).status_code == 200, "while it is under way"
            assert not waiting.done()
        finally:
            shut.gate.set()
        assert waiting.result(HANG_S).status_code in (200, 400)


def test_small_requests_do_not_wait_for_large_ones(tiny: Live, monkeypatch: pytest.MonkeyPatch) -> None:
    shut = Shut()
    shut.at(monkeypatch, schema, "check_parts")
    with ThreadPoolExecutor(40) as pool:
        waiting = [pool.submit(post, tiny, "/tokenize", {"prompt": LARGE}) for _ in range(12)]
        try:
            assert until(lambda: tiny.service.work._n_large == 12)
            for path, body in (
                ("/v1/chat/completions", CHAT),
                ("/v1/completions", TEXT),
                ("/tokenize", {"prompt": "x"}),
            ):
                assert tiny.client.post(path, json=body, timeout=HANG_S / 4).status_code == 200
        finally:
            shut.gate.set()
        assert {w.result(HANG_S).status_code for w in waiting} == {200}


def test_no_more_large_bodies_wait_than_may(tiny: Live, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(work, "MAX_LARGE", 2)
    shut = Shut()
    shut.at(monkeypatch, schema, "check_parts")
    with ThreadPoolExecutor(2) as pool:
        waiting = [pool.submit(post, tiny, "/tokenize", {"prompt": LARGE}) for _ in range(2)]
        try:
            assert until(lambda: tiny.service.work._n_large == 2)
            refused = tiny.post("/tokenize", {"prompt": LARGE})
            assert refused.status_code == 429 and refused.headers["retry-after"]
            assert refused.json()["error"]["code"] == "queue_full"
        finally:
            shut.gate.set()
        assert [w.result(HANG_S).status_code for w in waiting] == [200, 200]
    assert tiny.post("/tokenize", {"prompt": LARGE}).status_code == 200


def test_whoever_leaves_before_its_turn_is_forgotten(tiny: Live, monkeypatch: pytest.MonkeyPatch) -> None:
    shut = Shut()
    shut.at(monkeypatch, schema, "check_parts")
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(post, tiny, "/tokenize", {"prompt": LARGE})
        try:
            assert shut.reached.wait(HANG_S)
            connection = tiny.connect({"prompt": LARGE}, path="/tokenize")
            assert until(lambda: tiny.service.work._n_large == 2)
            connection.close()
            assert until(lambda: tiny.service.work._n_large == 1), "while the first is still under way"
        finally:
            shut.gate.set()
        assert first.result(HANG_S).status_code == 200


def test_freed_memory_goes_back_once_large_bodies_are_done(monkeypatch: pytest.MonkeyPatch) -> None:
    released = threading.Event()
    monkeypatch.setattr(work, "TIDY_AFTER_S", 0.0)
    monkeypatch.setattr(work.runtime, "release_freed_memory", released.set)

    async def run() -> None:
        one = work.Work()
        assert await one.check(schema.INLINE_BYTES, lambda: 1) == 1
        assert one._tidy is None, "small bodies leave nothing behind"
        assert await one.check(schema.INLINE_BYTES + 1, lambda: 2) == 2
        assert await asyncio.to_thread(released.wait, HANG_S)
        one.close()

    asyncio.run(run())


def test_a_server_s_collections_leave_out_what_was_there_before_it() -> None:
    program = "import gc, sys; from quadriga import runtime; kept = [[] for _ in range(1000)]; "
    program += "runtime.prefer_short_pauses(); runtime.release_freed_memory(); "
    program += "print(gc.get_freeze_count() > 1000, sys.getswitchinterval() <= 0.001)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=HANG_S)
    assert done.stdout.split() == ["True", "True"], done.stderr


@pytest.mark.parametrize("body", [TEXT | {"prompt": "x" * 20_000}, TEXT | {"top_p": 2}, TEXT | {"prompt": LARGE * 2}])
@pytest.mark.parametrize("path", ["/v1/completions", "/v1/batches"])
def test_a_refused_request_is_forgotten_without_the_collector(tiny: Live, path: str, body: dict[str, Any]) -> None:
    """An error that is caught and kept under a second name holds its frames, and they the body, in a circle."""
    gc.collect()
    errors = (ApiError, RequestError)
    kept = [o for o in gc.get_objects() if issubclass(type(o), errors)]  # by another test's report, say
    gc.disable()
    try:
        if path == "/v1/batches":
            line = json.dumps({"custom_id": "1", "url": "/v1/completions", "body": body}).encode()
            response = tiny.client.post(path, content=line, headers={"content-type": "application/jsonl"})
            assert response.json()["response"]["status_code"] == 400
        else:
            assert tiny.post(path, body).status_code == 400
        assert until(lambda: sum(issubclass(type(o), errors) for o in gc.get_objects()) <= len(kept))
    finally:
        gc.enable()


def test_a_body_that_is_too_large_is_forgotten_without_the_collector() -> None:
    pieces = [{"type": "http.request", "body": b"x" * 60, "more_body": True}] * 2
    headers = [(b"content-type", b"application/json")]

    async def receive() -> AsgiMessage:
        return pieces.pop()

    async def refused() -> int:
        try:
            await read_body(Request({"type": "http", "headers": headers}, receive), Limits(max_body_bytes=100))
        except ApiError as error:
            return error.status
        return 200

    gc.collect()
    gc.disable()
    try:
        assert asyncio.run(refused()) == 413
        assert not [o for o in gc.get_objects() if issubclass(type(o), ApiError)]
    finally:
        gc.enable()


# Batches -------------------------------------------------------------------------------------------------------------


def test_a_batch_that_is_refused_line_by_line_gives_others_their_turn() -> None:
    n, most = 2000, 0

    async def refuse(_: bytes) -> Any:
        raise ApiError(404, "no such model")

    lines = b"".join(b'{"custom_id":"%d","url":"/u","body":{}}\n' % i for i in range(n))
    out: list[bytes] = []
    turns = 0

    async def send(message: AsgiMessage) -> None:
        out.append(message.get("body", b""))

    async def receive() -> AsgiMessage:
        await asyncio.Event().wait()
        raise AssertionError

    async def run() -> None:
        nonlocal turns, most
        response = batches.run(lines, {"/u": refuse})
        answering = asyncio.create_task(response({"type": "http"}, receive, send))  # type: ignore[arg-type]
        while not answering.done():
            most = max(most, len(asyncio.all_tasks()))
            turns += 1
            await asyncio.sleep(0)
        await answering

    asyncio.run(run())
    answers = [json.loads(line) for line in b"".join(out).splitlines()]
    assert {a["custom_id"] for a in answers} == {str(i) for i in range(n)}
    assert all(a["response"]["status_code"] == 404 for a in answers)
    assert turns >= n, "one line between two turns of another"
    assert most <= batches._AT_ONCE + 10, "and no task for each line"


# Answers -------------------------------------------------------------------------------------------------------------

TOOLS = [Tool(type="function", function=Function(name="f"))]


def reader() -> Reader:
    return Reader(ToolUse(ChatRequest(model="m", messages=[], tools=TOOLS)).reads)


@pytest.mark.parametrize(
    ("begin", "piece", "end"),
    [
        (OPEN + '{"name": "f", "arguments": {"text": "', "words ", '"}}' + CLOSE),
        (OPEN, "<tool_cal", ""),
        ("", " \n", "word"),
        ("word", "\n", ""),
    ],
    ids=["a long call", "a call that never ends", "white space", "more of it"],
)
def test_text_that_is_held_back_is_looked_through_once(
    begin: str, piece: str, end: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    looked, original = [], Reader._read
    monkeypatch.setattr(
        Reader, "_read", lambda self, tools, held, *rest: looked.append(len(held)) or original(self, tools, held, *rest)
    )
    one, n, said = reader(), 5000, list[Any]()
    for i, text in enumerate([begin, *[piece] * n, end]):
        said += one.push(text, last=i == n + 1)
    whole = begin + piece * n + end
    assert sum(looked) <= 2 * len(whole) + 100
    assert one.n_calls or "".join(said) == whole


def test_places_that_only_look_like_calls_are_read_up_to_their_mistake(monkeypatch: pytest.MonkeyPatch) -> None:
    n, given = 3000, list[Any]()
    original = forms._json
    monkeypatch.setattr(forms, "_json", lambda raw: given.append(raw) or original(raw))
    text = OPEN * n + '{"name": "f", "arguments": {}}' + CLOSE
    answer = Reading(ToolUse(ChatRequest(model="m", messages=[], tools=TOOLS)).reads).read(text)
    assert answer.content == OPEN * (n - 1) and len(answer.calls) == 1
    assert len(given) == n and all(isinstance(raw, memoryview) for raw in given), "no copy of all that follows"


def test_a_prompt_is_echoed_once_for_all_its_answers(tiny: Live, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer, decoded = tiny.service.llm.tokenizer, list[int]()
    assert tokenizer is not None
    original = tokenizer.decode
    monkeypatch.setattr(tokenizer, "decode", lambda ids: decoded.append(len(ids)) or original(ids))
    body = TEXT | {"prompt": ["abc", "defgh"], "n": 4, "echo": True, "seed": 1}
    texts = [choice["text"] for choice in tiny.post("/v1/completions", body).json()["choices"]]
    assert [text[:3] for text in texts] == ["abc"] * 4 + ["def"] * 4 and decoded == [3, 5]


def test_many_answers_check_their_parameters_once(tiny: Live, monkeypatch: pytest.MonkeyPatch) -> None:
    checked, original = list[int](), SamplingParams.__post_init__
    monkeypatch.setattr(SamplingParams, "__post_init__", lambda self: checked.append(1) or original(self))
    response = tiny.post("/v1/completions", TEXT | {"n": 8, "seed": 7, "max_tokens": 6})
    assert len(checked) == 1 and len({choice["text"] for choice in response.json()["choices"]}) > 1


def test_log_probabilities_come_in_parts_that_are_the_same_json(tiny: Live) -> None:
    body = CHAT | {"logprobs": True, "top_logprobs": 2, "temperature": 0, "max_tokens": 3}
    content = tiny.post("/v1/chat/completions", body).json()["choices"][0]["logprobs"]["content"]
    assert len(content) == 3 and all(len(token["top_logprobs"]) == 2 for token in content)
    assert all(token["bytes"] == token["top_logprobs"][0]["bytes"] for token in content)


def test_a_vocabulary_is_asked_once_for_each_token(tiny: Live, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer, asked = tiny.service.llm.tokenizer, list[int]()
    assert tokenizer is not None
    original = tokenizer.token_bytes
    monkeypatch.setattr(tokenizer, "token_bytes", lambda token_id: asked.append(token_id) or original(token_id))
    assert tokenizer.decode([72, 105] * 40_000) == "Hi" * 40_000
    assert sorted(asked) == [72, 105]


def test_what_a_client_sent_is_not_sent_back_whole(tiny: Live) -> None:
    name = "x" * 50_000
    for body in (TEXT | {"model": name}, TEXT | {"response_format": {"type": name}}):
        response = tiny.post("/v1/completions", body)
        assert response.status_code in (400, 404) and len(response.content) < 10_000
        assert response.json()["error"]["message"]
    ignored = tiny.post("/v1/completions", TEXT | {name: 1}).headers["x-quadriga-ignored"]
    assert ignored.startswith("xxx") and len(ignored) <= 100
    parts = [{"role": "user", "content": [{"type": name, "text": "a"}]}]
    assert len(tiny.post("/v1/responses", {"model": "tiny", "input": parts}).content) < 10_000


@pytest.fixture(scope="module")
def tiny() -> Iterator[Live]:
    """A server of its own: tests here reach into it."""
    with running(tiny_llm(), max_waiting=64) as live:
        yield live
