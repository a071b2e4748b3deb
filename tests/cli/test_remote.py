"""Conversations with a server: quadriga chat --url, quadriga ps; and short names of commands."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any

import pytest
from typer.testing import CliRunner

from quadriga.cli import app
from quadriga.cli.remote import RemoteModel
from quadriga.errors import RequestError
from tests.server.conftest import Live, running, tiny_llm


@pytest.fixture(scope="module")
def tiny() -> Iterator[Live]:
    with running(tiny_llm(), aliases=("other",)) as live:
        yield live


def quadriga(*words: str, stdin: str = "") -> Any:
    return CliRunner().invoke(app, list(words), input=stdin, catch_exceptions=False)


def test_a_question_is_answered_by_the_server(tiny: Live) -> None:
    body = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 5, "temperature": 0.0}
    truth = tiny.post("/v1/chat/completions", body).json()["choices"][0]["message"]["content"]
    for url in (tiny.url, tiny.url + "/v1/"):
        done = quadriga("chat", "hi", "--url", url, "--max-tokens", "5", "--temperature", "0", "--json")
        assert json.loads(done.stdout) == {"text": truth, "finish_reason": "length"}
    shown = quadriga("chat", "hi", "--url", tiny.url, "--max-tokens", "5", "--temperature", "0", "--api-model", "other")
    assert shown.stdout.strip() == truth.strip()


def test_ps_lists_what_is_served(tiny: Live) -> None:
    shown = quadriga("ps", "--url", tiny.url).stdout
    assert "tiny" in shown and "other" in shown and "1024" in shown


def test_what_needs_the_model_here_says_so(tiny: Live) -> None:
    from quadriga.cli.chat import ChatSession
    from quadriga.engine.request import SamplingParams

    session = ChatSession(RemoteModel(tiny.url), SamplingParams(max_new_tokens=3))
    assert "".join(piece.text for piece in session.ask("hi")) == session.turns[-1]["content"]
    said: list[str] = []
    session.command("/stats", said.append)
    assert said[0].startswith("1 answers")
    for command in ("/experts", "/tokens x"):
        with pytest.raises(RequestError, match="leave --url out"):
            session.command(command, said.append)


class Broken(BaseHTTPRequestHandler):
    """Answers as its server's ``said`` says: status, body."""

    def do_GET(self) -> None:
        self.do_POST()

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers.get("content-length", 0)))
        status, body = self.server.said  # type: ignore[attr-defined]
        self.send_response(status)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def broken() -> Iterator[HTTPServer]:
    server = HTTPServer(("127.0.0.1", 0), Broken)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize(
    ("status", "body", "says"),
    [
        (404, b"<html>", "says \\(404\\)"),
        (401, b'{"error": {"message": "who are you?"}}', "who are you"),
        (200, b'data: {"choices": [{"delta": {"content": "a"}}]}\n\n', "broke off before its end"),
        (200, b"data: {not json}\n\n", "broke off"),
        (200, b'data: {"error": {"message": "no more memory"}}\n\n', "no more memory"),
        (200, b"data: [1]\n\n", "broke off"),
    ],
)
def test_a_server_that_fails_is_an_error_with_its_words(broken: Any, status: int, body: bytes, says: str) -> None:
    broken.said = status, body
    model = RemoteModel(f"http://127.0.0.1:{broken.server_address[1]}", model="m")
    with pytest.raises(RequestError, match=says):
        list(model.chat_stream([{"role": "user", "content": "x"}]))


@pytest.mark.parametrize("body", [b"[]", b'{"data": []}', b"x"])
def test_a_list_of_no_models(broken: Any, body: bytes) -> None:
    broken.said = 200, body
    with pytest.raises(RequestError, match="--api-model"):
        RemoteModel(f"http://127.0.0.1:{broken.server_address[1]}")


@pytest.mark.parametrize(
    ("url", "key", "says"),
    [
        ("127.0.0.1:8000", None, "must be an address"),
        ("http://127.0.0.1:1", None, "nothing answers"),
        ("http://x", "ä", "ASCII"),
    ],
)
def test_addresses_that_are_none(url: str, key: str | None, says: str) -> None:
    with pytest.raises(RequestError, match=says):
        RemoteModel(url, key)


def test_short_names(monkeypatch: pytest.MonkeyPatch) -> None:
    from quadriga.cli import options

    assert quadriga("ls").stdout == quadriga("models", "list").stdout
    assert quadriga("show", "quadriga-nano").stdout == quadriga("models", "show", "quadriga-nano").stdout
    asked: list[Any] = []

    def load(model: str, how: Any) -> Any:
        asked.append((model, how.threads))
        raise RequestError("enough")

    monkeypatch.setattr(options, "load_model", load)
    for words in (
        ["run", "quadriga-nano", "hello", "--threads", "1"],
        ["chat", "hello", "--model", "quadriga-nano", "--threads", "1"],
    ):
        with pytest.raises(RequestError, match="enough"):
            quadriga(*words)
    assert asked == [("quadriga-nano", 1)] * 2
