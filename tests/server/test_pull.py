"""/api/pull and /api/delete: who may, how far it is, what goes wrong, and whoever leaves in the middle."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from quadriga.hub import fetching
from quadriga.hub.catalogue import source_of
from quadriga.server import pull
from quadriga.server.fleet import plain_name
from quadriga.server.guard import Limits
from tests.server.conftest import Live, running
from tests.server.test_on_demand import Shelf
from tests.waiting import HANG_S, until

ADMIN = {"authorization": "Bearer the-admins-key"}
STEPS = (
    'import sys; print(\'{"name": "w", "done": 3, "total": 9}\', flush=True)\n'
    "assert sys.argv[1] == 'hf:org/new', sys.argv\n"
)


@contextlib.contextmanager
def store(monkeypatch: pytest.MonkeyPatch, program: str, mark: Path = Path("/nowhere")) -> Iterator[tuple[Live, Shelf]]:
    """A server of whatever is in the local store; b is once there is a mark, which a program that fetches it makes."""
    monkeypatch.setattr(pull, "FETCH", (sys.executable, "-c", program))
    shelf = Shelf()
    come = shelf.offers[1]
    shelf.on_demand._look = lambda _: [come] if mark.exists() else []
    del shelf.on_demand._slots["b"]
    with running(shelf.fleet, Limits(admin_key="the-admins-key")) as live:
        yield live, shelf


def lines(answer: Any) -> list[dict[str, Any]]:
    assert answer.status_code == 200, answer.text
    return [json.loads(line) for line in answer.text.splitlines()]


def test_a_model_is_pulled_with_its_progress_and_served_then(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    mark = tmp_path / "here"
    with store(monkeypatch, f"{STEPS}open({str(mark)!r}, 'w'); print('{{\"path\": \"x\"}}')", mark) as (live, _):
        assert live.post("/v1/completions", {"model": "b", "prompt": "a"}).status_code == 404
        told = lines(live.post("/api/pull", {"model": "hf.co/org/new:latest"}, headers=ADMIN))
        assert told[0] == {"status": "pulling manifest"} and told[-1] == {"status": "success"}
        bar = told[1]
        assert (bar["status"], bar["total"], bar["completed"]) == ("pulling w", 9, 3) and bar["digest"].startswith(
            "sha256:"
        )
        assert live.post("/v1/completions", {"model": "b", "prompt": "a", "max_tokens": 1}).status_code == 200
        whole = live.post("/api/pull", {"model": "hf:org/new", "stream": False}, headers=ADMIN)
        assert whole.json() == {"status": "success"}


def test_only_the_admin_pulls_and_only_where_the_store_is_served(monkeypatch: pytest.MonkeyPatch) -> None:
    with store(monkeypatch, "raise SystemExit('nothing may be fetched')") as (live, shelf):
        assert live.post("/api/pull", {"model": "a"}).status_code == 200, "it is there"
        for headers in ({}, {"authorization": "Bearer another-one"}):
            for method, path, model in (("POST", "pull", "hf:org/new"), ("DELETE", "delete", "a")):
                answer = live.client.request(method, f"/api/{path}", json={"model": model}, headers=headers)
                assert answer.status_code == 403 and "--admin-key" in answer.json()["error"], answer.text
        for name in ("/etc/passwd", "../x", "hf:../../x", "cl100k_base", "https://e.org/x", "hf.co/a/b:", "\u0000"):
            answer = live.post("/api/pull", {"model": name}, headers=ADMIN)
            assert answer.status_code == 404 and "no model" in answer.json()["error"], name
        shelf.on_demand._look = None
        fixed = live.post("/api/pull", {"model": "hf:org/new"}, headers=ADMIN)
        assert fixed.status_code == 400 and "--models-memory" in fixed.json()["error"]


@pytest.mark.parametrize(
    ("program", "says"),
    [
        ('print(\'{"error": "the disk of /x is full"}\')', "the disk of /x is full"),
        ("import os; os.abort()", "ended without a word"),
    ],
)
def test_what_goes_wrong_is_said_in_both_forms(monkeypatch: pytest.MonkeyPatch, program: str, says: str) -> None:
    with store(monkeypatch, STEPS + program) as (live, _):
        told = lines(live.post("/api/pull", {"model": "hf:org/new"}, headers=ADMIN))
        assert says in told[-1]["error"] and not any(one.get("status") == "success" for one in told)
        whole = live.post("/api/pull", {"model": "hf:org/new", "stream": False}, headers=ADMIN)
        assert whole.status_code == 500 and says in whole.json()["error"]


def test_who_leaves_stops_the_download(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    told = tmp_path / "told"
    waits = f"sys.stdin.read(); open({str(told)!r}, 'w')"
    with store(monkeypatch, STEPS + waits) as (live, _):
        monkeypatch.setattr(pull.Pulls, "_check", lambda *_: None)
        monkeypatch.setattr(pull, "MAX_PULLS", 1)
        connection = live.connect({"model": "hf:org/new"}, "/api/pull")
        seen = b""
        while b"completed" not in seen:
            seen += connection.recv(1 << 16)
        full = live.post("/api/pull", {"model": "hf:org/new"})
        assert full.status_code == 429 and "being fetched" in full.json()["error"]
        connection.close()
        assert until(told.exists)
        assert until(lambda: live.post("/api/pull", {"model": "a"}).status_code == 200)


def test_a_model_that_is_deleted_is_gone_and_one_in_use_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    removed: list[str] = []
    monkeypatch.setattr("quadriga.hub.catalogue.remove", removed.append)
    with store(monkeypatch, "") as (live, shelf):
        assert live.post("/v1/completions", {"model": "c", "prompt": "a", "max_tokens": 1}).status_code == 200
        slot = shelf.on_demand.slot_of("c")
        assert slot is not None

        def delete(name: str) -> int:
            return live.client.request("DELETE", "/api/delete", json={"model": name}, headers=ADMIN).status_code

        slot.n_users += 1
        assert delete("c") == 409 and not removed
        slot.n_users -= 1
        assert delete("c") == 200 and removed == ["c"] and delete("c") == 404
        assert slot.service is None
        assert "c" not in [one["id"] for one in live.client.get("/v1/models").json()["data"]]


def test_names_that_ollamas_clients_write() -> None:
    assert source_of("hf.co/org/repo") == source_of("huggingface.co/org/repo") == "hf:org/repo"
    assert source_of("quadriga-nano") == "quadriga-nano" and source_of("cl100k_base") is None
    assert (
        plain_name("hf.co/org/Repo:latest") == "Repo" and plain_name("tiny:latest") == "tiny" and plain_name(None) == ""
    )


def test_the_process_that_fetches_tells_and_ends_when_nobody_waits(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    now = iter([0.0, 0.1, 0.3, 0.35, 0.36])
    tell = fetching._teller(lambda: next(now))
    for done in (0, 1, 2, 3, 9):
        tell(done, 9, "w")
    assert [json.loads(line)["done"] for line in capsys.readouterr().out.splitlines()] == [0, 2, 9]
    # As in the background of a shell: interrupts are ignored.
    program = "import signal, threading; signal.signal(signal.SIGINT, signal.SIG_IGN)\n"
    program += "from quadriga.hub import fetching\nfetching.resolve = lambda *_, **__: threading.Event().wait()\n"
    command = [sys.executable, "-c", f"{program}print('up', flush=True); raise SystemExit(fetching.main('x'))"]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, start_new_session=True, env=dict(os.environ)) as process:
        assert process.stdin is not None and process.stdout is not None
        assert process.stdout.readline() == b"up\n"
        process.stdin.close()
        try:
            assert process.wait(HANG_S) in (130, -signal.SIGINT)
        finally:
            process.kill()
