"""Files and the batches made of them: what comes out, whose they are, and what is there after a stop."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest

from quadriga.server.batch_jobs import WINDOW_S, BatchJobs, BatchRequest
from quadriga.server.caller import Caller
from quadriga.server.files import FileStore, owner_of
from quadriga.server.guard import Limits
from tests.server.conftest import Gate, Live, running, tiny_llm
from tests.waiting import until

MB = 1 << 20


class Clock:
    def __init__(self) -> None:
        self.now = 1_000_000.0

    def __call__(self) -> float:
        return self.now


@contextlib.contextmanager
def server(folder: Path, limits: Limits | None = None, **options: Any) -> Iterator[tuple[Live, FileStore]]:
    store = FileStore(folder, options.pop("max_bytes", MB), Clock())
    with running(tiny_llm(), limits, store=store, **options) as live:
        yield live, store


def client_of(live: Live, key: str = "any") -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{live.url}/v1", api_key=key, max_retries=0)


def line(number: int, **body: Any) -> dict[str, Any]:
    body = {"prompt": "ab", "max_tokens": 3, "temperature": 0, **body}
    return {"custom_id": f"line-{number}", "method": "POST", "url": "/v1/completions", "body": body}


def lines(*items: Any) -> bytes:
    return b"".join(json.dumps(item).encode() + b"\n" for item in items)


def ended(client: openai.OpenAI, batch_id: str) -> Any:
    over = ("completed", "failed", "cancelled", "expired")
    assert until(lambda: client.batches.retrieve(batch_id).status in over)
    return client.batches.retrieve(batch_id)


def begun(client: openai.OpenAI, raw: bytes, endpoint: Any = "/v1/completions") -> Any:
    file = client.files.create(file=("in.jsonl", raw), purpose="batch")
    return client.batches.create(input_file_id=file.id, endpoint=endpoint, completion_window="24h")


def answers(client: openai.OpenAI, file_id: str | None) -> dict[str, Any]:
    assert file_id is not None
    text = client.files.content(file_id).text
    return {one["custom_id"]: one for one in map(json.loads, text.splitlines())}


def test_a_file_comes_back_as_it_was(tmp_path: Path) -> None:
    raw = b"\r\n--x\r\nany bytes \x00\xff\r\n" * 100
    with server(tmp_path) as (live, _):
        client = client_of(live)
        file = client.files.create(file=("n\u00e4me.bin", raw), purpose="user_data")
        assert (file.bytes, file.filename, file.purpose, file.status) == (
            len(raw),
            "n\u00e4me.bin",
            "user_data",
            "processed",
        )
        assert client.files.content(file.id).read() == raw
        assert client.files.retrieve(file.id) == file and [f.id for f in client.files.list()] == [file.id]
        assert client.files.delete(file.id).deleted and not list(client.files.list())
        with pytest.raises(openai.NotFoundError):
            client.files.content(file.id)
    assert not list(tmp_path.iterdir()), "nothing is left of a file that was deleted"


def test_a_batch_is_answered_and_failures_have_a_file_of_their_own(tmp_path: Path) -> None:
    with server(tmp_path) as (live, _):
        client = client_of(live)
        batch = ended(client, begun(client, lines(line(1), line(2, temperature=300), line(3, prompt="c"))).id)
        assert batch.status == "completed" and batch.completed_at and batch.errors is None
        assert (batch.request_counts.total, batch.request_counts.completed, batch.request_counts.failed) == (3, 2, 1)
        good, bad = answers(client, batch.output_file_id), answers(client, batch.error_file_id)
        assert good.keys() == {"line-1", "line-3"} and bad.keys() == {"line-2"}
        alone = live.post("/v1/completions", line(1)["body"]).json()["choices"]
        assert good["line-1"]["response"]["body"]["choices"] == alone and good["line-1"]["error"] is None
        assert bad["line-2"]["response"]["status_code"] == 400
        assert [b.id for b in client.batches.list()] == [batch.id]
        assert live.settled()


@pytest.mark.parametrize(
    ("raw", "code"),
    [
        (b"", "empty_file"),
        (b"no json\n", "invalid_json_line"),
        (lines(line(1), line(1)), "duplicate_custom_id"),
        (lines({**line(1), "url": "/v1/embeddings"}), "mismatched_endpoint"),
    ],
)
def test_a_file_that_is_no_batch_fails_by_line(tmp_path: Path, raw: bytes, code: str) -> None:
    with server(tmp_path) as (live, _):
        client = client_of(live)
        batch = ended(client, begun(client, raw).id)
        assert batch.status == "failed" and batch.errors.data[0].code == code


class NoDesk:
    """Lets batches be made and none be run."""

    def handlers(self, _: Caller) -> dict[str, Any]:
        return {"/v1/completions": None}

    def caller(self, *_: str) -> None:
        return None


def left(folder: Path, n: int, key: str = "") -> str:
    """A batch of n lines that a server was stopped over; its id."""
    store = FileStore(folder, MB, Clock())
    caller = Caller(salt=hashlib.sha256(key.encode()).digest() if key else b"", client=b"127.0.0.1")
    (folder / "x.part").write_bytes(lines(*(line(i) for i in range(n))))
    file = store.add(folder / "x.part", "in.jsonl", "batch", owner_of(caller))
    made = BatchJobs(store, NoDesk()).create(BatchRequest(input_file_id=file["id"], endpoint="/v1/completions"), caller)
    return str(made["id"])


def test_a_batch_goes_on_where_a_stop_left_it(tmp_path: Path) -> None:
    batch_id = left(tmp_path, 40)
    told = json.dumps({"custom_id": "line-7", "response": {"status_code": 200, "body": "kept"}, "error": None})
    (tmp_path / f"{batch_id}.output.part").write_text(told + '\n{"custom_id": "line-8", "resp')
    with server(tmp_path) as (live, _):
        client = client_of(live)
        over = ended(client, batch_id)
        assert over.status == "completed" and over.request_counts.completed == 40
        good = answers(client, over.output_file_id)
        assert len(good) == 40 and good["line-7"]["response"]["body"] == "kept", "it was not answered again"
        assert good["line-8"]["response"]["status_code"] == 200, "a line that was cut off is"


def test_a_damaged_folder_keeps_no_server_from_starting(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Facts that are cut off, of the wrong type or another's; bytes that are gone; answers that are no JSON."""
    batch_id = left(tmp_path, 3)
    (tmp_path / f"{batch_id}.output.part").write_bytes(b"\0" * 40 + b'\n{"custom_id": "line-2", "response": null}\n')
    [whole] = tmp_path.glob("file-*.json")
    for i, raw in enumerate(
        [b"", b"[]", b"{}", b"\0" * 99, whole.read_bytes(), b'{"id": "file-%d", "bytes": "9"}' % 5, b"[" * 100_000]
    ):
        (tmp_path / f"file-{i}.json").write_bytes(raw)
        (tmp_path / f"batch_{i}.json").write_bytes(raw)
    gone = json.loads(whole.read_bytes()) | {"id": "file-" + "0" * 24}
    (tmp_path / f"{gone['id']}.json").write_text(json.dumps(gone))
    with server(tmp_path) as (live, store):
        client = client_of(live)
        assert gone["id"] not in [one.id for one in client.files.list()]
        assert sum("is damaged and is passed over" in record.message for record in caplog.records) == 14
        assert sum(f"the bytes of {gone['id']}" in record.message for record in caplog.records) == 1
        over = ended(client, batch_id)
        assert over.status == "completed" and len(answers(client, over.output_file_id)) == 3
        store.path(over.output_file_id).unlink()
        with pytest.raises(openai.NotFoundError, match="gone from the disk"):
            client.files.content(over.output_file_id)
        for query, param in (("order=up", "order"), ("limit=\u0663", "limit")):
            refused = live.client.get(f"/v1/files?{query}")
            assert refused.status_code == 400 and refused.json()["error"]["param"] == param


def test_a_batch_can_be_cancelled_and_expires(tmp_path: Path) -> None:
    with server(tmp_path) as (live, store):
        client = client_of(live)
        for what, status in (("cancel", "cancelled"), ("late", "expired")):
            with Gate(live) as gate:
                batch = begun(client, lines(*(line(i) for i in range(50))))
                gate.hold()
                if what == "cancel":
                    assert client.batches.cancel(batch.id).status == "cancelling"
                else:
                    store.clock.now += WINDOW_S  # type: ignore[attr-defined]
            over = ended(client, batch.id)
            assert over.status == status and 0 < over.request_counts.completed < 50
            if what == "late":
                assert len(answers(client, over.error_file_id)) == 50 - over.request_counts.completed
        with pytest.raises(openai.BadRequestError, match="cancelled"):
            client.batches.cancel(over.id)


def test_a_batch_waits_for_everybody_else(tmp_path: Path) -> None:
    with server(tmp_path) as (live, _):
        seen = []
        submit = live.service.llm.engine.submit
        live.service.llm.engine.submit = lambda r, **o: seen.append(r.priority) or submit(r, **o)  # type: ignore[method-assign]
        client = client_of(live)
        ended(client, begun(client, lines(line(1, priority=7))).id)
        ended(
            client,
            begun(client, lines({**line(1), "url": "/v1/embeddings", "body": {"input": "a"}}), "/v1/embeddings").id,
        )
        assert seen == [-1000, -1000]


def test_a_key_with_a_long_batch_holds_no_other_keys_up(tmp_path: Path) -> None:
    keys = ("first-key", "second-key")
    with server(tmp_path, Limits(keys=keys)) as (live, _):
        one, other = (client_of(live, key) for key in keys)
        with Gate(live) as gate:
            long = begun(one, lines(*(line(i, max_tokens=90, ignore_eos=True) for i in range(40))))
            gate.hold()
            short = begun(other, lines(line(1, max_tokens=1)))
            while other.batches.retrieve(short.id).status != "completed":
                gate.let()
            assert one.batches.retrieve(long.id).status == "in_progress"
            one.batches.cancel(long.id)
        assert ended(one, long.id).status == "cancelled"


def test_files_belong_to_a_key(tmp_path: Path) -> None:
    keys = ("first-key", "second-key")
    with server(tmp_path, Limits(keys=keys)) as (live, _):
        one, other = (client_of(live, key) for key in keys)
        batch = ended(one, begun(one, lines(line(1))).id)
        assert batch.status == "completed"
        for ask in (other.files.retrieve, other.files.content, other.files.delete):
            with pytest.raises(openai.NotFoundError):
                ask(batch.output_file_id)
        with pytest.raises(openai.NotFoundError):
            other.batches.retrieve(batch.id)
        with pytest.raises(openai.NotFoundError):
            other.batches.create(input_file_id=batch.input_file_id, endpoint="/v1/completions", completion_window="24h")
        assert not list(other.files.list()) and not list(other.batches.list()) and len(list(one.files.list())) == 2
    text = "".join(path.read_text() for path in tmp_path.iterdir())
    assert not any(key in text for key in keys), "no key is written down"


def test_what_does_not_fit_is_refused(tmp_path: Path) -> None:
    with server(tmp_path, max_bytes=1000) as (live, _):
        client = client_of(live)
        with pytest.raises(openai.APIStatusError, match="files-size") as refused:
            client.files.create(file=("a", b"x" * 2000), purpose="batch")
        assert refused.value.status_code == 413 and not list(tmp_path.iterdir())
        for form, says in (
            (
                {"content": b"--b\r\nno end", "headers": {"content-type": "multipart/form-data; boundary=b"}},
                "well formed",
            ),
            ({"content": b"{}", "headers": {"content-type": "application/json"}}, "multipart"),
            ({"files": {"file": ("a", b"x")}, "data": {"purpose": "joy"}}, "purpose"),
            ({"files": {"other": ("a", b"x")}, "data": {"purpose": "batch"}}, "file"),
        ):
            answer = live.client.post("/v1/files", **form)
            assert answer.status_code in (400, 415) and says in answer.json()["error"]["message"], form
        assert live.client.get("/v1/files/..%2F..%2Fetc").status_code == 404


def test_a_server_without_a_folder_says_so(tiny: Live) -> None:
    for method, path in (("GET", "/v1/files"), ("POST", "/v1/files"), ("GET", "/v1/batches")):
        answer = tiny.client.request(method, path)
        assert answer.status_code == 501 and "--files" in answer.json()["error"]["message"]
        assert answer.headers["x-should-retry"] == "false", "SDKs ask again otherwise"
    body = {"input_file_id": "file-x", "endpoint": "/v1/completions", "completion_window": "24h"}
    assert tiny.post("/v1/batches", body).status_code == 501


def test_a_batch_of_a_key_that_is_gone_fails(tmp_path: Path) -> None:
    gone, kept = left(tmp_path, 1, "first-key"), left(tmp_path, 1, "other-key")
    with server(tmp_path, Limits(keys=("other-key",))) as (live, store):
        assert ended(client_of(live, "other-key"), kept).status == "completed"
        facts = json.loads((store.folder / f"{gone}.json").read_text())
        assert facts["status"] == "failed" and "key" in facts["errors"]["data"][0]["message"]
