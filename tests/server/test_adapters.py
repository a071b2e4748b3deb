"""Adapters over HTTP: MODEL:NAME answers with the adapter, several at once, unknown ones are 404."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import torch

from quadriga import LLM
from quadriga.io.adapter_files import Adapter, save
from quadriga.model.adapter_spec import LoraSpec
from quadriga.nn.transformer import Transformer, random_parameters
from quadriga.runners.torch import TorchRunner
from quadriga.text.chat import CHATML
from quadriga.text.tokenizer import Tokenizer
from tests.checkpoint.models import TINY
from tests.nn.test_lora import stored_factors
from tests.server.conftest import Bytes, running


def test_requests_choose_adapters_by_the_models_name(tmp_path: Path) -> None:
    config = replace(TINY["dbrx"], vocab_size=257, max_seq_len=256)
    model = Transformer.from_parameters(config, random_parameters(config, std=0.3))
    tokenizer = Tokenizer(Bytes(), special_ids={"<|end|>": 256}, eos_ids=(256,), chat_template=CHATML)
    llm = LLM(TorchRunner(model), tokenizer, max_sequences=8)
    spec = LoraSpec(rank=4, alpha=6.0, targets=("attention", "experts", "router"))
    for seed, name in enumerate(("one", "two"), 1):
        save(Adapter(spec=spec, factors=stored_factors(config, spec, seed)), tmp_path / name)
        llm.add_adapter(name, tmp_path / name)
    torch.manual_seed(0)
    with running(llm) as live:

        def ask(model: str) -> str:
            body = {"model": model, "messages": [{"role": "user", "content": "hi"}], "temperature": 0, "max_tokens": 8}
            response = live.post("/v1/chat/completions", {**body, "logprobs": True})
            assert response.status_code == 200, response.text
            return str([token["token"] for token in response.json()["choices"][0]["logprobs"]["content"]])

        names = ["tiny", "tiny:one", "tiny:two"]
        alone = {name: ask(name) for name in names}
        assert len(set(alone.values())) == 3
        with ThreadPoolExecutor(6) as many:
            assert list(many.map(ask, names * 2)) == [alone[name] for name in names * 2]
        missing = live.post(
            "/v1/chat/completions", {"model": "tiny:three", "messages": [{"role": "user", "content": "x"}]}
        )
        assert missing.status_code == 404 and "'tiny:two'" in missing.json()["error"]["message"]
        vectors = [live.post("/v1/embeddings", {"model": name, "input": "hi"}).json() for name in names]
        assert [vector["model"] for vector in vectors] == names
        assert len({str(vector["data"][0]["embedding"]) for vector in vectors}) == 3, "each adapter has its own"
        listed = live.client.get("/v1/models").json()["data"]
        assert [(one["id"], one["parent"]) for one in listed] == [
            ("tiny", None),
            ("tiny:one", "tiny"),
            ("tiny:two", "tiny"),
        ]
        assert live.settled()
