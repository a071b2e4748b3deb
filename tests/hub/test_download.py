"""Downloads against a server that is a list of answers; the process that fetches; locks and sizes in the cache."""

from __future__ import annotations

import errno
import fcntl
import io
import json
import os
import signal
import urllib.error
import urllib.request
from email.message import Message
from pathlib import Path
from typing import Any

import pytest

from quadriga import runtime
from quadriga.errors import CatalogueError
from quadriga.hub import cache, download, fetching
from quadriga.hub.download import from_address

URL = "https://example.org/a/model.bin"
WHOLE = bytes(range(10)) * 30


class Answer:
    """What a server says to one request.

    Args:
        body: what comes of what it promises.
        length: what it promises; None: as much as comes.
        fault: raised where the body ends.
    """

    def __init__(
        self, status: int, body: bytes = b"", *, length: int | None = None, fault: OSError | None = None
    ) -> None:
        self.status, self._body, self._fault = status, io.BytesIO(body), fault
        self.headers = {"Content-Length": str(len(body) if length is None else length)}

    def read(self, n: int) -> bytes:
        piece = self._body.read(min(n, 64))
        if not piece and self._fault is not None:
            raise self._fault
        return piece

    def __enter__(self) -> Answer:
        return self

    def __exit__(self, *exception: object) -> None:
        """Nothing is open."""


class Server:
    """Gives its answers in turn, and writes down what was asked."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *answers: Answer) -> None:
        self._answers = list(answers)
        self.asked: list[tuple[str, str | None]] = []
        """Addresses, and the ranges that were asked for."""
        monkeypatch.setattr(urllib.request, "urlopen", self._open)

    def _open(self, request: urllib.request.Request, timeout: float) -> Answer:
        assert timeout == download.TIMEOUT_S
        self.asked.append((request.full_url, request.get_header("Range")))
        answer = self._answers.pop(0)
        if answer.status >= 400:
            raise urllib.error.HTTPError(request.full_url, answer.status, "no", Message(), None)
        return answer


Told = list[tuple[int, int, str]]


def bring(target: Path) -> Told:
    """Download; what the progress was told."""
    told: Told = []
    from_address(URL, target, name="model", progress=lambda *at: told.append(at))
    return told


def part_of(target: Path) -> Path:
    return target.with_name(f"{target.name}.part")


def test_what_broke_off_goes_on_where_it_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "model.bin"
    server = Server(monkeypatch, Answer(200, WHOLE[:100], length=300), Answer(206, WHOLE[100:]))
    with pytest.raises(CatalogueError, match=r"broke off.*what has come is kept"):
        bring(target)
    assert not target.exists() and part_of(target).read_bytes() == WHOLE[:100]
    assert bring(target) == [(164, 300, "model"), (228, 300, "model"), (292, 300, "model"), (300, 300, "model")]
    assert target.read_bytes() == WHOLE and not part_of(target).exists()
    assert server.asked == [(URL, None), (URL, "bytes=100-")]


def test_a_server_that_knows_no_ranges_begins_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "model.bin"
    part_of(target).write_bytes(b"of an older one")
    Server(monkeypatch, Answer(200, WHOLE))
    assert bring(target)[-1] == (300, 300, "model")
    assert target.read_bytes() == WHOLE


def test_a_part_that_is_whole_already_is_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "model.bin"
    part_of(target).write_bytes(WHOLE)
    Server(monkeypatch, Answer(416))
    assert bring(target) == [] and target.read_bytes() == WHOLE


@pytest.mark.parametrize("status", [404, 416, 503])
def test_no_file_is_an_error_that_names_the_answer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, status: int
) -> None:
    Server(monkeypatch, Answer(status))
    with pytest.raises(CatalogueError, match=rf"answered {status} .*not the file"):
        bring(tmp_path / "model.bin")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("kind", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_is_called_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: int) -> None:
    Server(monkeypatch, Answer(200, WHOLE[:64], length=300, fault=OSError(kind, "no room")))
    with pytest.raises(CatalogueError, match=r"the disk of .* is full"):
        bring(tmp_path / "model.bin")


def test_a_mirror_stands_before_the_host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QUADRIGA_MIRROR", "http://mirror.test/all/")
    server = Server(monkeypatch, Answer(200, WHOLE))
    bring(tmp_path / "model.bin")
    assert server.asked == [("http://mirror.test/all/example.org/a/model.bin", None)]


class Rounds:
    """An event that is set after so many looks."""

    def __init__(self, n: int) -> None:
        self.left = n

    def wait(self, timeout_s: float) -> bool:
        self.left -= 1
        return self.left < 0


def test_a_folder_that_has_more_than_was_expected_is_full_and_not_fuller(tmp_path: Path) -> None:
    (tmp_path / "inner").mkdir()
    (tmp_path / "inner" / "a").write_bytes(bytes(30))
    (tmp_path / "b").write_bytes(bytes(12))
    (tmp_path / "gone").symlink_to(tmp_path / "nowhere")
    whole = cache.size_of(tmp_path)
    assert whole == 42 + len(str(tmp_path / "nowhere")) and cache.size_of(tmp_path / "b") == 12
    told: Told = []
    for expected in (40, 10_000, 0):
        download._watch(tmp_path, expected, "x", lambda *at: told.append(at), Rounds(1))  # type: ignore[arg-type]
    assert told == [(40, 40, "x"), (whole, 10_000, "x"), (whole, 0, "x")]


def test_a_file_that_is_gone_when_it_is_looked_at_counts_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a").write_bytes(bytes(5))
    (tmp_path / "renamed").write_bytes(bytes(70))
    lstat = os.lstat

    def gone(path: Any, **how: Any) -> os.stat_result:
        if str(path).endswith("renamed"):
            raise FileNotFoundError(path)
        return lstat(path, **how)

    monkeypatch.setattr(cache.os, "lstat", gone)
    assert cache.size_of(tmp_path) == 5


# The process that fetches --------------------------------------------------------------------------------------------


def fetched(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], result: Any) -> tuple[int, list[Any]]:
    """(exit code, lines) of a process whose model is ``result``, or that this is raised."""

    def resolve(name: str, *, progress: Any) -> Any:
        progress(1, 4, name)
        progress(4, 4, name)
        if isinstance(result, BaseException):
            raise result
        return result

    monkeypatch.setattr(fetching, "resolve", resolve)
    monkeypatch.setattr(fetching, "_end_with_parent", lambda: None)
    before = signal.getsignal(signal.SIGINT)
    try:
        code = fetching.main("smol")
    finally:
        signal.signal(signal.SIGINT, before)
    return code, [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def test_its_exit_code_and_last_line_say_how_it_ended(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    said = [{"name": "smol", "done": done, "total": 4} for done in (1, 4)]
    assert fetched(monkeypatch, capsys, Path("/models/smol")) == (0, [*said, {"path": "/models/smol"}])
    assert fetched(monkeypatch, capsys, CatalogueError("no network")) == (2, [*said, {"error": "no network"}])
    assert fetched(monkeypatch, capsys, KeyboardInterrupt()) == (130, said)


# The cache -----------------------------------------------------------------------------------------------------------


def test_a_folder_is_locked_for_one(tmp_path: Path) -> None:
    folder = tmp_path / "models" / "smol"
    with cache.locked(folder), (folder.parent / ".smol.lock").open("w") as other:
        with pytest.raises(BlockingIOError):
            fcntl.flock(other, fcntl.LOCK_SH | fcntl.LOCK_NB)
        with cache.locked(folder.parent / "another"):
            pass
    with (folder.parent / ".smol.lock").open("w") as other:
        fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)


def test_nothing_is_begun_that_the_disk_has_no_room_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runtime, "free_disk_bytes", lambda path: 5_000_000)
    cache.need_room(tmp_path, 5_000_000)
    with pytest.raises(CatalogueError, match=r"5\.3 MB are needed, 5\.0 MB are free"):
        cache.need_room(tmp_path, 5_300_000)
