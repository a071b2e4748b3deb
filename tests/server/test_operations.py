"""TLS, socket files, probes by address, and what metrics say of keys, cuts and refusals."""

from __future__ import annotations

import hashlib
import socket
import ssl
import subprocess
import threading
from pathlib import Path
from typing import Any

import httpx2
import pytest

from quadriga.errors import ConfigError
from quadriga.server.guard import Limits
from quadriga.server.run import Certificate, listen_at
from tests.server.conftest import Gate, Live, running, tiny_llm
from tests.waiting import HANG_S, until

BODY: dict[str, Any] = {"prompt": "ab", "max_tokens": 5, "temperature": 0, "ignore_eos": True}


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A certificate of 127.0.0.1 and its key, made by openssl."""
    folder = tmp_path_factory.mktemp("tls")
    cert, key = folder / "cert.pem", folder / "key.pem"
    command = "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2 -subj /CN=localhost"
    command += f" -addext subjectAltName=IP:127.0.0.1 -keyout {key} -out {cert}"
    subprocess.run(command.split(), check=True, capture_output=True, timeout=HANG_S)
    return cert, key


def test_tls_and_nothing_else(pair: tuple[Path, Path]) -> None:
    with running(tiny_llm(), certificate=Certificate(*pair)) as live:
        trusted = ssl.create_default_context(cafile=str(pair[0]))
        url = live.url.replace("http:", "https:")
        with httpx2.Client(base_url=url, verify=trusted, timeout=HANG_S) as client:
            answer = client.post("/v1/completions", json={**BODY, "stream": True})
            assert answer.status_code == 200 and answer.text.endswith("data: [DONE]\n\n")
            assert client.get("/health").status_code == 200
        with pytest.raises(httpx2.HTTPError):
            live.client.get("/health")
        old = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        old.check_hostname, old.verify_mode = False, ssl.CERT_NONE
        host, port = url.removeprefix("https://").split(":")
        with socket.create_connection((host, int(port)), timeout=HANG_S) as raw, old.wrap_socket(raw) as tls:
            assert tls.version() in ("TLSv1.2", "TLSv1.3")


def test_a_certificate_that_is_none_is_told_before_anything_is_loaded(pair: tuple[Path, Path], tmp_path: Path) -> None:
    cert, key = pair
    (tmp_path / "empty").write_text("")
    for chain, its in ((cert, cert), (tmp_path / "none", key), (tmp_path / "empty", key)):
        with pytest.raises(ConfigError, match="--tls-cert"):
            Certificate(chain, its)


def test_a_socket_file(tmp_path: Path) -> None:
    path = tmp_path / "s"
    left = listen_at(path)
    left.close()  # the file stays, as after a crash
    with running(tiny_llm(), listener=listen_at(path)):
        assert path.stat().st_mode & 0o777 == 0o660
        with httpx2.Client(transport=httpx2.HTTPTransport(uds=str(path)), base_url="http://localhost") as client:
            assert client.post("/v1/completions", json=BODY).status_code == 200
            refused = client.get("/health", headers={"host": "evil.example"})
            assert refused.status_code == 403, "the Host list holds here too"
        with pytest.raises(ConfigError, match="in use"):
            listen_at(path)
    with pytest.raises(ConfigError, match="cannot listen"):
        listen_at(tmp_path / "no" / "folder")


def test_probes_answer_under_any_name_where_they_are_open() -> None:
    host = {"host": "10.1.2.3:8000"}
    with running(tiny_llm(), Limits(open_probes=True, keys=("some-key",))) as live:
        assert live.client.get("/health", headers=host).status_code == 200
        for path in ("/ready", "/metrics", "/v1/metrics"):
            assert live.client.get(path, headers=host).status_code == 401, "keys are still asked for"
            keyed = {**host, "authorization": "Bearer some-key"}
            assert live.client.get(path, headers=keyed).status_code == 200
        assert live.client.get("/v1/models", headers=host).status_code == 403
        foreign = {**host, "origin": "https://evil.example"}
        assert live.client.get("/health", headers=foreign).status_code == 403, "pages of others are kept out as before"


def metric(page: str, line: str) -> float:
    return next((float(one.rsplit(" ", 1)[1]) for one in page.splitlines() if one.startswith(line + " ")), 0.0)


def test_what_keys_use_and_what_was_cut_or_refused_is_counted() -> None:
    keys = {"authorization": "Bearer first-key"}, {"authorization": "Bearer other-key"}
    with running(tiny_llm(), Limits(keys=("first-key", "other-key"), concurrent=3)) as live:
        live.post("/v1/completions", BODY, headers=keys[0])
        live.post("/v1/completions", {**BODY, "n": 2}, headers=keys[0])
        live.post("/v1/embeddings", {"input": ["abc", "d"]}, headers=keys[1])
        assert live.post("/v1/completions", {**BODY, "n": 4}, headers=keys[0]).status_code == 400
        assert live.post("/v1/completions", BODY).status_code == 401

        def page() -> str:
            return live.client.get("/metrics", headers=keys[0]).text

        with Gate(live) as gate:
            gone = threading.Event()

            def leave() -> None:
                with live.client.stream(
                    "POST", "/v1/completions", json={**BODY, "stream": True}, headers=keys[0]
                ) as said:
                    for line in said.iter_lines():
                        if "text" in line:
                            break
                gone.set()

            thread = threading.Thread(target=leave)
            thread.start()
            gate.let(2)  # or one, where the client leaves before the next
            assert gone.wait(HANG_S)
            thread.join()
            # While the gate is shut: an answer that could run to its end would not be one that was cut.
            assert until(lambda: metric(page(), 'quadriga_aborted_tokens_total{model_name="tiny"}') >= 1)
        name = [f'client="key:{hashlib.sha256(key.encode()).hexdigest()[:8]}"' for key in ("first-key", "other-key")]
        text, tokens = page(), "quadriga_client_tokens_total{"
        assert metric(text, f'{tokens}{name[1]},kind="read",model_name="tiny"}}') == 4
        assert metric(text, f'{tokens}{name[0]},kind="made",model_name="tiny"}}') >= 15
        assert metric(text, 'quadriga_embedded_texts_total{model_name="tiny"}') == 2
        assert metric(text, 'quadriga_refused_total{reason="request_too_large"}') == 1
        assert metric(text, 'quadriga_refused_total{reason="invalid_api_key"}') == 1
        assert "first-key" not in text


def test_queries_of_the_prefix_cache_are_beside_its_hits(tiny: Live) -> None:
    before = tiny.metric("vllm:prefix_cache_queries_total"), tiny.metric("vllm:prefix_cache_hits_total")
    for _ in range(2):
        tiny.post("/v1/completions", {**BODY, "prompt": list(range(40))})
    assert tiny.metric("vllm:prefix_cache_queries_total") - before[0] == 80
    assert tiny.metric("vllm:prefix_cache_hits_total") - before[1] == 32
