"""What ``quadriga tune`` hands to a run: the engine, the sandbox, a judge at an address."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

from quadriga.cli import tune_services
from quadriga.engine.live_sampler import LiveSampler
from quadriga.errors import ConfigError
from quadriga.evaluate import sandbox
from quadriga.text.tokenizer import load_directory
from quadriga.train.services import SamplerOptions
from tests.checkpoint.models import TINY
from tests.text.vocabularies import write_bpe


def test_programs_run_in_a_sandbox(monkeypatch: pytest.MonkeyPatch) -> None:
    run = tune_services.services(None).run_programs
    assert run is not None
    with monkeypatch.context() as without:
        without.setattr(sandbox, "works", lambda kind: False)
        with pytest.raises(ConfigError, match="install bubblewrap"):
            run(["pass"], 5.0)
    if not any(sandbox.works(kind) for kind in ("bubblewrap", "unshare")):
        pytest.skip("no sandbox works on this machine")
    assert run(["assert 2 + 2 == 4", "assert 2 + 2 == 5"], 60.0) == [True, False]


@pytest.fixture
def judge() -> Iterator[tuple[str, list[dict[str, object]]]]:
    """(address, the bodies of what was asked): marks everything with 8."""
    asked: list[dict[str, object]] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["content-length"])))
            asked.append(body | {"path": self.path})
            choice = {"message": {"role": "assistant", "content": "8"}}
            if self.path.endswith("/completions") and "prompt" in body:
                told = [None, *({f"<{token}>": -0.5} for token in body["prompt"])][: 1 + len(body["prompt"])]
                choice = {"logprobs": {"top_logprobs": told if body["model"] == "wise" else None}}
            raw = json.dumps({"choices": [choice]}).encode()
            self.send_response(200)
            self.send_header("content-type", "application/json")
            self.send_header("content-length", str(len(raw)))
            self.end_headers()
            self.wfile.write(raw)

        def log_message(self, *_: object) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}/v1", asked
    server.shutdown()
    thread.join()
    server.server_close()


def test_a_judge_is_asked_over_its_chat_api(judge: tuple[str, list[dict[str, object]]]) -> None:
    address, asked = judge
    connect = tune_services.services(None).judge
    assert connect is not None
    assert connect(address, "wise")(["Rate this.", "And this."]) == ["8", "8"]
    assert {one["path"] for one in asked} == {"/v1/chat/completions"} and {one["model"] for one in asked} == {"wise"}
    assert {one["messages"][0]["content"] for one in asked} == {"Rate this.", "And this."}  # type: ignore[index]


def test_a_teacher_is_asked_for_the_logprobs_of_echoed_prompts(judge: tuple[str, list[dict[str, object]]]) -> None:
    address, asked = judge
    connect = tune_services.services(None).teacher
    assert connect is not None
    found = connect(address, "wise")([[5, 9, 11], [7]], 4)
    assert found == [[None, {"<5>": -0.5}, {"<9>": -0.5}, {"<11>": -0.5}], [None, {"<7>": -0.5}]]
    assert sorted(str(one["prompt"]) for one in asked) == ["[5, 9, 11]", "[7]"]
    assert all((one["path"], one["echo"], one["logprobs"]) == ("/v1/completions", True, 4) for one in asked)
    with pytest.raises(ConfigError, match="does not tell the log-probabilities of echoed prompts"):
        connect(address, "silent")([[5]], 4)


def test_the_sampler_is_the_engine(tmp_path: Path) -> None:
    tokenizer = load_directory(write_bpe(tmp_path, eos_token="<|im_end|>"))
    make = tune_services.services(1).sampler
    assert make is not None and tokenizer is not None
    config = replace(TINY["mixtral"], vocab_size=448, max_seq_len=64)
    assert isinstance(make(config, tokenizer, SamplerOptions(format="q8", max_len=40)), LiveSampler)
