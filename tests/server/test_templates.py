"""A model whose chat template wants to do harm: conversations get an error, everything else goes on."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch

from quadriga import LLM
from quadriga.kernels.arrays import arrays
from quadriga.nn.transformer import random_parameters
from quadriga.runners.compiled import CompiledModel, pack_parameters
from quadriga.text import chat
from quadriga.text.tokenizer import Tokenizer
from tests.checkpoint.models import TINY
from tests.server.conftest import Bytes, Live, running
from tests.waiting import HANG_S

CHAT = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 2}
TEXT = {"model": "tiny", "prompt": "hi", "max_tokens": 2}


def with_template(template: str) -> LLM:
    torch.manual_seed(0)
    config = replace(TINY["dbrx"], vocab_size=257, max_seq_len=256)
    runner = CompiledModel(
        config, pack_parameters(arrays(random_parameters(config, std=0.3)), "q8"), threads=1, n_blocks=32
    )
    special = {"<|end|>": 256}
    return LLM(runner, Tokenizer(Bytes(), special_ids=special, eos_ids=(256,), chat_template=template), max_sequences=4)


HOSTILE = {
    "memory": ("{{ 'a' * 10**10 }}", "256 MB of memory"),
    "one call of C": ("{{ messages | tojson(indent=200000000) }}", "256 MB of memory"),
    "output": ("{% for i in range(99999) %}{% for j in range(99999) %}x{% endfor %}{% endfor %}", "characters"),
    "files": ("{% include '/etc/passwd' %}", "no loader"),
    "code": ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "unsafe"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_each_conversation_gets_an_error_and_the_server_goes_on(name: str) -> None:
    template, says = HOSTILE[name]
    with running(with_template(template)) as live:
        for path, body in (
            ("/v1/chat/completions", CHAT),
            ("/v1/chat/completions", CHAT | {"stream": True}),
            ("/v1/messages", CHAT),
            ("/v1/messages/count_tokens", {"model": "tiny", "messages": CHAT["messages"]}),
            ("/apply-template", {"model": "tiny", "messages": CHAT["messages"]}),
            ("/tokenize", {"model": "tiny", "messages": CHAT["messages"]}),
        ):
            response = live.post(path, body)
            assert response.status_code == 400, (path, response.text)
            assert says in response.text and "chat template" in response.text
        assert live.post("/v1/completions", TEXT).status_code == 200
        assert live.client.get("/health").status_code == 200


def test_renderings_under_way_hold_up_no_other_request(tiny: Live, monkeypatch: pytest.MonkeyPatch) -> None:
    """More of them than the event loop has threads; they end when the test says so, not by the clock."""
    gate, begun = threading.Event(), threading.Semaphore(0)

    def wait(*_: object) -> list[str]:
        begun.release()
        assert gate.wait(HANG_S)
        return ["hi"]

    monkeypatch.setattr(chat, "render_texts", wait)
    with ThreadPoolExecutor(40) as clients:
        chats = [
            clients.submit(tiny.post, "/v1/messages/count_tokens", {k: CHAT[k] for k in ("model", "messages")})
            for _ in range(40)
        ]
        try:
            assert begun.acquire(timeout=HANG_S)
            for path, body in (("/v1/completions", TEXT), ("/tokenize", {"model": "tiny", "prompt": "hi"})) * 3:
                assert tiny.post(path, body).status_code == 200
            assert tiny.client.get("/health").status_code == 200
            assert not any(one.done() for one in chats)
        finally:
            gate.set()
        assert [one.result(HANG_S).json() for one in chats] == [{"input_tokens": 2}] * 40
