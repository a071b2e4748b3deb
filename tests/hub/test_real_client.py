"""Hugging Face's own client against a hub on this machine: the requests that it makes, and what comes of them."""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from tests.waiting import HANG_S

FILES = {
    "config.json": b"{}",
    "tokenizer.json": b"{}",
    "model.safetensors": b"s" * 100,
    "original/model.safetensors": b"s" * 100,
    "m-Q4_K_M.gguf": b"4" * 50,
    "m-Q8_0.gguf": b"8" * 90,
    "[odd] name.txt": b"",
}
COMMIT = "c" * 40


class Hub(BaseHTTPRequestHandler):
    """One repository, org/m: its list, and its files."""

    protocol_version = "HTTP/1.1"
    fetched: list[str]

    def log_message(self, format: str, *args: object) -> None:
        """Nothing."""

    def do_HEAD(self) -> None:
        """As GET, without the body."""
        self.do_GET()

    def do_GET(self) -> None:
        """A list, or a file."""
        path = self.path.partition("?")[0]
        file = FILES.get(re.sub(r"/org/m/resolve/[^/]+/", "", path))
        if re.fullmatch(r"/api/models/org/m(/revision/\w+)?", path):
            siblings = [{"rfilename": name, "size": len(content)} for name, content in FILES.items()]
            self._answer(json.dumps({"id": "org/m", "sha": COMMIT, "siblings": siblings}).encode())
        elif re.fullmatch(r"/api/models/org/m/tree/\w+", path):  # asked by versions from 1 on
            tree = [{"type": "file", "path": name, "size": len(body), "oid": "0"} for name, body in FILES.items()]
            self._answer(json.dumps(tree).encode())
        elif file is not None:
            if self.command == "GET":
                self.fetched.append(path.rpartition(f"{COMMIT}/")[2])
            self._answer(file, ETag=f'"{hashlib.sha1(file).hexdigest()}"', **{"X-Repo-Commit": COMMIT})
        else:
            self._answer(b"", 404, **{"X-Error-Code": "RepoNotFound"})

    def _answer(self, body: bytes, status: int = 200, **headers: str) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)


@pytest.fixture
def hub() -> Iterator[tuple[str, list[str]]]:
    """(the hub's address, files that were fetched from it)."""
    fetched: list[str] = []
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("OneHub", (Hub,), {"fetched": fetched}))
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", fetched
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def test_one_model_of_a_repository_comes(hub: tuple[str, list[str]], tmp_path: Path) -> None:
    address, fetched = hub
    environment = {**os.environ, "HF_ENDPOINT": address, "HF_HOME": str(tmp_path / "hf"), "NO_PROXY": "127.0.0.1"}
    environment |= {"QUADRIGA_CACHE": str(tmp_path / "ours"), "HF_HUB_DISABLE_TELEMETRY": "1"}

    def pull(name: str) -> tuple[str, str]:
        command = [sys.executable, "-m", "quadriga", "pull", name]
        done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=HANG_S, check=False)
        return done.stdout.strip(), done.stderr

    path, said = pull("hf:org/m")
    assert sorted(fetched) == ["config.json", "model.safetensors", "tokenizer.json"], said
    assert sorted(file.name for file in Path(path).iterdir()) == ["config.json", "entry.json", *sorted(fetched)[1:]]
    assert "Fetching" not in said, "one progress bar, ours"
    fetched.clear()
    path, said = pull("hf.co/org/m:q8_0")
    assert Path(path).read_bytes() == FILES["m-Q8_0.gguf"] and fetched == ["m-Q8_0.gguf"], said
    assert "the hub has no repository org/none" in pull("hf:org/none")[1]
