"""Whether answers depend on who else asks: our own server and engine, and servers whose answers do."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Lock, Thread
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from quadriga.bench.http_client import target
from quadriga.bench.invariance import Question, Reply, ServerAsked, difference, measure, questions, reply
from quadriga.cli import app
from quadriga.cli import options as cli_options
from quadriga.errors import EndpointError
from tests.server.conftest import Live, tiny_llm


def of(tokens: str, *logprobs: float, reason: str = "stop") -> Reply:
    return Reply(tokens=tuple(tokens), logprobs=logprobs or None, finish_reason=reason)


# The arithmetic ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("alone", "crowded", "counts"),
    [
        (of("abc", -1, -2, -3), of("abc", -1, -2, -3), (0, 3, 0, 3, 0, 0.0)),
        (of("abc", -1, -2, -3), of("abc", -1, -2.5, -3), (1, 3, 0, 3, 1, 0.5)),
        (of("abc", -1, -2, -3), of("axc", -1, -9, -3), (1, 3, 1, 1, 0, 0.0)),  # behind another token nothing compares
        (of("abc", -1, -2, -3), of("a", -1.25), (1, 3, 2, 1, 1, 0.25)),
        (of("ab"), of("abcd"), (1, 4, 2, 0, 0, 0.0)),
        (of("ab"), of("ab", reason="length"), (1, 2, 0, 0, 0, 0.0)),
        (of("ab", -1, -2), of("ab"), (0, 2, 0, 0, 0, 0.0)),
    ],
)
def test_what_counts_as_a_difference(alone: Reply, crowded: Reply, counts: tuple[float, ...]) -> None:
    row = difference(7, [of("same", -1, -1, -1, -1), alone], [of("same", -1, -1, -1, -1), crowded])
    differ, tokens, tokens_off, logprobs, logprobs_off, largest = counts
    assert (row.crowd, row.requests, row.requests_that_differ, row.found) == (7, 2, differ, bool(differ))
    assert (row.tokens, row.tokens_that_differ) == (tokens + 4, tokens_off)
    assert (row.logprobs, row.logprobs_that_differ, row.largest_difference) == (logprobs + 4, logprobs_off, largest)


def test_questions_are_the_same_for_a_seed_and_half_of_them_are_drawn() -> None:
    some = questions(6, prompt_tokens=40, max_tokens=9)
    assert some == questions(6, prompt_tokens=40, max_tokens=9) != questions(6, prompt_tokens=40, max_tokens=9, seed=1)
    assert [q.temperature for q in some] == [0.0, 0.8] * 3 and len({q.prompt for q in some}) == 6
    assert all(40 <= len(q.prompt) <= 200 for q in some) and len({q.seed for q in some}) == 6
    assert {q.temperature for q in questions(3, prompt_tokens=5, max_tokens=9, temperature=0.0)} == {0.0}


def test_a_crowd_is_as_large_as_it_says_and_the_first_round_is_alone() -> None:
    at_once, most, rounds = 0, [], []

    async def ask(question: Question) -> Reply:
        nonlocal at_once
        at_once += 1
        most[-1] = max(most[-1], at_once)
        await asyncio.sleep(0)
        at_once -= 1
        return of(question.prompt[:2], -1, -2)

    def told(done: int, total: int, name: str) -> None:
        if done == 1:
            rounds.append(name)
        if done == total:
            most.append(0)

    most.append(0)
    rows = asyncio.run(measure(ask, questions(8, prompt_tokens=9, max_tokens=2), (3, 5), told))
    assert rounds == ["alone", "alone again", "crowd of 3", "crowd of 5"] and most == [1, 1, 3, 5, 0]
    assert [row.crowd for row in rows] == [1, 3, 5] and not any(row.found for row in rows)


# What servers answer -------------------------------------------------------------------------------------------------


def listed(*pairs: tuple[str, float]) -> dict[str, Any]:
    return {"content": [{"token": token, "logprob": p} for token, p in pairs]}


@pytest.mark.parametrize(
    ("choice", "tokens", "logprobs"),
    [
        ({"message": {"content": "ab"}, "logprobs": listed(("a", -1), ("b", -2))}, ("a", "b"), (-1, -2)),
        ({"text": "ab", "logprobs": {"tokens": ["ab"], "token_logprobs": [-3]}}, ("ab",), (-3,)),
        ({"text": "ab", "logprobs": listed(("ab", -3))}, ("ab",), (-3,)),
        ({"text": "ab", "logprobs": None}, ("a", "b"), None),
        ({"message": {"content": None, "reasoning_content": "hm"}}, ("h", "m"), None),
        ({"text": "ab", "logprobs": {"tokens": ["a", "b"], "token_logprobs": [-3]}}, ("a", "b"), None),
    ],
)
def test_both_forms_of_an_answer(choice: dict[str, Any], tokens: tuple[str, ...], logprobs: Any) -> None:
    got = reply(json.dumps({"choices": [{**choice, "finish_reason": "stop"}]}).encode())
    assert (got.tokens, got.logprobs, got.finish_reason) == (tokens, logprobs, "stop")


@pytest.mark.parametrize("body", [b"", b"{}", b'{"choices": []}', b'{"choices": [3]}', b"[]", b'{"choices": [{}, {}]}'])
def test_what_is_no_answer(body: bytes) -> None:
    with pytest.raises(EndpointError, match="not the API's JSON"):
        reply(body)


class Fickle(ThreadingHTTPServer):
    """Answers change after so many requests: one logit in the 3rd of four requests, one token in the 4th."""

    def __init__(self, steady: int, forms: str = "chat") -> None:
        super().__init__(("127.0.0.1", 0), _Answers)
        self.steady, self.forms, self.seen, self.lock = steady, forms, 0, Lock()
        self.prompts: list[str] = []
        self.url = f"http://127.0.0.1:{self.server_address[1]}"


class _Answers(BaseHTTPRequestHandler):
    server: Fickle
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self._send({"data": [{"id": "fickle"}]})

    def do_POST(self) -> None:
        asked = json.loads(self.rfile.read(int(self.headers["content-length"])))
        prompt = asked["messages"][0]["content"] if "messages" in asked else asked["prompt"]
        with self.server.lock:
            self.server.seen += 1
            if prompt not in self.server.prompts:
                self.server.prompts.append(prompt)
            number, late = self.server.prompts.index(prompt), self.server.seen > self.server.steady
        tokens, logprobs = [f"t{number}", "b", "c"], [-1.0, -2.0, -3.0]
        if late and number == 2:
            logprobs[1] -= 0.125
        if late and number == 3:
            tokens[2] = "other"
        if self.server.forms == "chat":
            shown: dict[str, Any] = {"message": {"content": "".join(tokens)}}
            shown["logprobs"] = listed(*zip(tokens, logprobs, strict=True))
        else:
            shown = {"text": "".join(tokens), "logprobs": {"tokens": tokens, "token_logprobs": logprobs}}
        self._send({"choices": [{**shown, "finish_reason": "stop"}]})

    def _send(self, body: Any) -> None:
        raw = json.dumps(body).encode()
        self.send_response(200)
        self.send_header("content-length", str(len(raw)))
        self.end_headers()
        self.wfile.write(raw)

    def log_message(self, *_: object) -> None:
        pass


@contextmanager
def fickle(steady: int, forms: str = "chat") -> Iterator[Fickle]:
    server = Fickle(steady, forms)
    thread = Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()


def run(*words: str) -> Result:
    return CliRunner().invoke(app, ["bench", "invariance", *words])


SHORT = ["--requests", "4", "--max-tokens", "3", "-c", "2"]


@pytest.mark.parametrize("forms", ["chat", "completions"])
def test_a_server_whose_answers_vary_in_a_crowd_is_found(forms: str) -> None:
    with fickle(steady=8, forms=forms) as server:  # alone, and alone again
        result = run(server.url, *SHORT, "--json", *(["--completions"] if forms == "completions" else []))
    assert result.exit_code == 1, result.output
    found = json.loads(result.stdout)
    again, crowd = found["rounds"]
    assert found["differs"] and found["model"] == "fickle" and found["requests"] == 4
    assert again["round"] == "alone again" and again["requests_that_differ"] == 0 and again["tokens"] == 12
    assert (crowd["round"], crowd["requests_that_differ"], crowd["tokens_that_differ"]) == ("crowd of 2", 2, 1)
    assert (crowd["logprobs"], crowd["logprobs_that_differ"], crowd["largest_difference"]) == (11, 1, 0.125)


def test_one_that_varies_alone_is_told_apart() -> None:
    with fickle(steady=4) as server:
        result = run(server.url, *SHORT)
    assert result.exit_code == 1 and "fickle: differs: alone again, crowd of 2" in result.stderr
    assert result.stdout.splitlines()[1].split("\t") == ["alone again", "2 of 4", "1 of 12", "1 of 11", "0.125"]


def test_our_server_gives_the_same_bits_in_every_crowd(tiny: Live) -> None:
    words = ["--requests", "12", "--max-tokens", "9", "--prompt-tokens", "30", "-c", "3", "-c", "8", "--json"]
    for form in ([], ["--completions"]):
        result = run(tiny.url, *words, *form)
        assert result.exit_code == 0, result.output
        found = json.loads(result.stdout)
        assert not found["differs"] and [row["crowd"] for row in found["rounds"]] == [1, 3, 8]
        assert all(
            row["tokens"] == row["logprobs"] >= 12 and row["logprobs_that_differ"] == 0 for row in found["rounds"]
        )


def test_a_model_in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    llm = tiny_llm()
    monkeypatch.setattr(cli_options, "load_model", lambda model, how: llm)
    result = run("tiny", "--requests", "9", "--max-tokens", "7", "--prompt-tokens", "20", "-c", "5", "--threads", "1")
    assert result.exit_code == 0, result.output
    assert "tiny: the same, to the bit, alone and in every crowd" in result.stderr
    table = [line.split("\t") for line in result.stdout.splitlines()]
    assert [row[0] for row in table] == ["round", "alone again", "crowd of 5"]
    assert all(row[1] == "0 of 9" and row[3].startswith("0 of ") for row in table[1:])


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["http://127.0.0.1:9"], "no server answers"),
        (["http://127.0.0.1:9", "--api-model", "x"], "127.0.0.1:9"),
        (["ftp://x"], "not downloaded from addresses"),
        (["http://x", "--threads", "2"], "--threads"),
        (["tiny", "--api-key", "abc"], "--api-key"),
        (["tiny", "--completions"], "--completions"),
        (["tiny", "--max-tokens", "0"], "max tokens"),
    ],
)
def test_what_is_refused(words: list[str], says: str) -> None:
    result = run(*words)
    assert result.exit_code and result.exception is not None
    assert says in f"{result.exception} {result.output}", (result.exception, result.output)


def test_a_refused_request_is_told_as_the_server_tells_it(tiny: Live) -> None:
    asked = questions(3, prompt_tokens=9, max_tokens=2)
    at = ServerAsked(target(tiny.url), "nobody", chat=True, timeout_s=60)
    with pytest.raises(EndpointError, match="404"):
        asyncio.run(measure(at, asked, (2,), lambda *_: None))
