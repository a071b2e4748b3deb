"""Replicas on a Ray cluster: the way through a handle, without Ray, and two nodes of a cluster where it is installed."""

from __future__ import annotations

import asyncio
import re
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx2
import pytest

from quadriga.engine.load_options import LoadOptions
from quadriga.errors import ConfigError
from quadriga.server.front.exchange import Lost
from quadriga.server.front.ray_serve import Host, RayChild, RayExchange, ray_launcher
from quadriga.server.front.replica import Order
from quadriga.server.hosting import Hosting
from tests.server.front import Asked, FakeReplica
from tests.waiting import HANG_S, until

ORDER = Order(
    source="m",
    names=["m"],
    how=LoadOptions(),
    hosting=Hosting(max_waiting=1, step_timeout_s=1.0),
    strict=False,
    max_body_bytes=1000,
)
HEADERS = [(b"content-type", b"application/json"), (b"x-request-id", b"relay-7")]


class Handle:
    """Calls a host in this process as a handle of Ray Serve would."""

    def __init__(self, host: Host) -> None:
        self._host = host
        self.ask = SimpleNamespace(remote=lambda *asked: self._ask(*asked))
        self.come, self.beat = (SimpleNamespace(remote=call) for call in (host.come, host.beat))

    def options(self, *, stream: bool) -> Handle:
        assert stream
        return self

    def _ask(self, *asked: Any) -> Any:
        return _Answer(self._host.ask(*asked))


class _Answer:
    def __init__(self, answer: Any) -> None:
        self._answer, self.cancelled = answer, False

    def __aiter__(self) -> Any:
        return self

    async def __anext__(self) -> Any:
        return await self._answer.__anext__()

    def cancel(self) -> None:
        self.cancelled = True


async def _never() -> Any:
    await asyncio.Event().wait()
    yield None


def test_a_request_goes_through_a_handle_and_back(tmp_path: Path) -> None:
    async def script(asked: Asked) -> None:
        await asked.head()
        await asked.event({"said": asked.body})
        if asked.body == "all":
            await asked.piece(b"")
        else:
            asked.replica.die()

    async def run() -> None:
        host, told = Host(ORDER), list[Any]()
        with pytest.raises(RuntimeError):
            await host.beat()
        replica = FakeReplica(0, tmp_path / "s", host._report, script)
        await replica.listen()
        host._process = replica
        handle: Any = Handle(host)
        assert await handle.come.remote()
        gone: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        whole = RayExchange(handle, told.append, gone)
        await whole.ask("POST", b"/v1/completions", HEADERS, b'"all"')
        assert whole.status == 200 and whole.header(b"content-type") == b"text/event-stream"
        assert await whole.whole() == b'data: {"said": "all"}\n\n'
        assert told == [{"id": "relay-7", "model": "m", "prompt": 5, "answer": 4}], "what it used comes the same way"
        whole.close()
        child = RayChild(handle, told.append, lambda: told.append("forgotten"))
        assert await child.ready()
        ended = asyncio.create_task(child.ended())
        await asyncio.sleep(0)
        child.tell_to_end()
        child.kill()
        assert await ended == 0 and told[1:] == ["forgotten"]
        cut = RayExchange(handle, told.append, gone)
        await cut.ask("POST", b"/v1/completions", HEADERS, b'"half"')
        with pytest.raises(Lost):
            await cut.whole()
        nobody = RayExchange(handle, told.append, gone)
        with pytest.raises(Lost):
            await nobody.ask("POST", b"/v1/completions", HEADERS, b'"all"')
        host._process = None
        child = RayChild(handle, told.append, lambda: None)
        waiting = child.exchange()
        handle._ask = lambda *_: _Answer(_never())
        asked = asyncio.create_task(waiting.ask("POST", b"/v1/completions", HEADERS, b'"all"'))
        await asyncio.sleep(0)
        assert not asked.done() and await child.ended() == 1
        with pytest.raises(Lost, match="does not answer"):
            await asked

    asyncio.run(asyncio.wait_for(run(), HANG_S))


def test_without_ray_it_is_told_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ConfigError, match="cluster"):
        ray_launcher(ORDER, "auto")


@pytest.mark.slow
@pytest.mark.dist
def test_two_nodes_of_a_local_cluster() -> None:
    """One replica on each; a node that is gone loses no request, and one that comes has the replica again."""
    cluster_utils = pytest.importorskip("ray.cluster_utils", reason="needs the extra cluster")
    small = {"num_cpus": 1, "object_store_memory": 100_000_000}
    cluster = cluster_utils.Cluster(initialize_head=True, head_node_args={**small, "include_dashboard": False})
    node = cluster.add_node(**small)
    words = ["quadriga-nano", "--replicas", "2", "--ray", cluster.address, "--kv-memory", "8MB", "--port", "0"]
    server = subprocess.Popen([sys.executable, "-m", "quadriga", "serve", *words], stdout=subprocess.PIPE, text=True)
    try:
        assert server.stdout is not None
        found = re.search(r"http://[\d.]+:\d+", server.stdout.readline())
        assert found
        with httpx2.Client(base_url=found[0], timeout=HANG_S) as client:

            def said(i: int) -> str:
                body = {"prompt": f"The {i}. " * 40, "max_tokens": 12, "temperature": 0}
                answer = client.post("/v1/completions", json=body)
                assert answer.status_code == 200, answer.text
                return str(answer.json()["choices"][0]["text"])

            def n_ready() -> int:
                return int(client.get("/health").json()["replicas"]["ready"])

            texts = [said(i) for i in range(8)]
            made = re.findall(
                r'^vllm:generation_tokens_total{replica="(.)".* (\S+)$', client.get("/metrics").text, re.M
            )
            assert [whose for whose, n in made if float(n)] == ["0", "1"], "both have answered"
            cluster.remove_node(node)
            assert [said(i) for i in range(8)] == texts
            assert until(lambda: n_ready() == 1)
            cluster.add_node(**small)
            assert until(lambda: n_ready() == 2)
            assert [said(i) for i in range(8)] == texts
        server.send_signal(signal.SIGTERM)
        assert server.wait(HANG_S) == 0
    finally:
        server.kill()
        cluster.shutdown()
