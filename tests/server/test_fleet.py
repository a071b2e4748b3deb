"""Several models in one server, and adapters that come and go."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from quadriga import LLM
from quadriga.cli.serve import _models
from quadriga.errors import ConfigError
from quadriga.io.adapter_files import Adapter, save
from quadriga.model.adapter_spec import LoraSpec
from quadriga.nn.transformer import Transformer, random_parameters
from quadriga.runners.torch import TorchRunner
from quadriga.server.fleet import Fleet
from quadriga.server.guard import Limits
from quadriga.server.service import Service
from quadriga.text.chat import CHATML
from quadriga.text.tokenizer import Tokenizer
from tests.checkpoint.models import TINY
from tests.nn.test_lora import stored_factors
from tests.server.conftest import Bytes, Live, running, tiny_llm
from tests.waiting import until

ADMIN = {"authorization": "Bearer admin-key"}


def other_llm() -> LLM:
    torch.manual_seed(5)
    config = replace(TINY["dbrx"], vocab_size=257, max_seq_len=256)
    model = Transformer.from_parameters(config, random_parameters(config, std=0.3))
    tokenizer = Tokenizer(Bytes(), special_ids={"<|end|>": 256}, eos_ids=(256,), chat_template=CHATML)
    return LLM(TorchRunner(model), tokenizer, max_sequences=8)


@pytest.fixture(scope="module")
def both() -> Iterator[Live]:
    second = Service(other_llm(), name="other", aliases=["second"])
    with running(tiny_llm(), Limits(admin_key="admin-key"), beside=[second]) as live:
        yield live


def said(live: Live, model: str | None) -> tuple[str, str]:
    body = {"model": model, "prompt": "ab", "max_tokens": 8, "temperature": 0}
    answer = live.post("/v1/completions", body)
    assert answer.status_code == 200, answer.text
    return answer.json()["model"], answer.json()["choices"][0]["text"]


def test_a_requests_model_chooses(both: Live) -> None:
    first, second = said(both, "tiny")[1], said(both, "other")[1]
    assert first != second and said(both, None) == ("tiny", first)
    assert said(both, "second") == ("second", second)
    chat = {"messages": [{"role": "user", "content": "a"}], "max_tokens": 4, "temperature": 0}
    texts = {
        both.post("/api/chat", {**chat, "model": m, "stream": False}).text for m in ("tiny:latest", "other:latest")
    }
    assert len(texts) == 2
    vectors = [
        both.post("/v1/embeddings", {"model": m, "input": "a"}).json()["data"][0]["embedding"]
        for m in ("tiny", "other")
    ]
    assert vectors[0] != vectors[1]
    for path, body in (("/v1/completions", {"prompt": "a"}), ("/tokenize", {"prompt": "a"})):
        missing = both.post(path, {**body, "model": "third"})
        assert missing.status_code == 404
        assert all(name in missing.json()["error"]["message"] for name in ("'tiny'", "'other'", "'second'"))


def test_every_list_has_all_models(both: Live) -> None:
    assert [one["id"] for one in both.client.get("/v1/models").json()["data"]] == ["tiny", "other", "second"]
    assert both.client.get("/v1/models/second").json()["max_model_len"] == 256
    assert both.client.get("/v1/models/third").status_code == 404
    assert [one["name"] for one in both.client.get("/api/tags").json()["models"]] == ["tiny", "other", "second"]
    assert both.client.get("/ready").status_code == both.client.get("/health").status_code == 200
    said(both, "other")
    page = both.client.get("/metrics").text
    for metric in (
        "vllm:generation_tokens_total",
        "vllm:num_requests_running",
        "vllm:e2e_request_latency_seconds_count",
    ):
        assert page.count(f'{metric}{{model_name="tiny"}}') == page.count(f'{metric}{{model_name="other"}}') == 1
        assert page.count(f"# TYPE {metric.removesuffix('_count')} ") <= 1
    experts = both.client.get("/v1/experts", params={"model": "other"}).json()
    assert experts["model"] == "other" and both.client.get("/v1/experts").json()["model"] == "tiny"
    assert both.client.get("/props", params={"model": "other"}).json()["model_alias"] == "other"
    lines = "".join(
        f'{{"custom_id": "{m}", "url": "/v1/completions", "body": {{"model": "{m}", "prompt": "ab", "max_tokens": 8, "temperature": 0}}}}\n'
        for m in ("tiny", "other")
    )  # fmt: skip
    answers = both.client.post("/v1/batches", content=lines, headers={"content-type": "application/jsonl"}).text
    assert "tiny" in answers and "other" in answers


def test_adapters_come_and_go_with_the_admin_key(both: Live, tmp_path: Path) -> None:
    spec = LoraSpec(rank=4, alpha=60.0, targets=("attention", "experts"))
    config = replace(TINY["dbrx"], vocab_size=257, max_seq_len=256)
    for seed, name in enumerate(("one", "two"), 1):
        save(Adapter(spec=spec, factors=stored_factors(config, spec, seed)), tmp_path / name)

    def post(verb: str, headers: dict[str, str] | None = None, **body: Any) -> int:
        return both.client.post(
            f"/v1/{verb}_lora_adapter", json={"model": "other", **body}, headers=headers or ADMIN
        ).status_code

    load = {"lora_name": "new", "lora_path": str(tmp_path / "one")}
    assert post("load", {"authorization": "Bearer wrong-key"}, **load) == 401
    assert post("load", **load) == 200 and post("load", **load) == 400, "the name is taken"
    plain, adapted = said(both, "other")[1], said(both, "other:new")[1]
    assert plain != adapted and "other:new" in both.client.get("/v1/models").text
    for wrong in ({"lora_name": "a:b"}, {"lora_path": "one"}, {"lora_path": str(tmp_path / "none")}):
        assert post("load", **{**load, "lora_name": "x", **wrong}) == 400
    assert post("load", model="tiny", **load) == 400, "its kernels know no adapters"
    assert post("unload", lora_name="new") == 200 and post("unload", lora_name="new") == 404
    assert both.post("/v1/completions", {"model": "other:new", "prompt": "a"}).status_code == 404
    assert post("load", **{**load, "lora_path": str(tmp_path / "two")}) == 200
    assert said(both, "other:new")[1] not in (plain, adapted), "nothing of the first one is left in the cache"
    assert until(lambda: post("unload", lora_name="new") == 200)


def test_without_an_admin_key_nobody_may(tiny: Live) -> None:
    answer = tiny.post("/v1/load_lora_adapter", {"lora_name": "a", "lora_path": "/x"})
    assert answer.status_code == 403 and "--admin-key" in answer.json()["error"]["message"]


def test_names_are_told_apart() -> None:
    assert _models(["a/b", "c"], ()) == [("a/b", ["b"]), ("c", ["c"])]
    assert _models(["x=a/b"], ()) == [("a/b", ["x"])] and _models(["a/b=c"], ()) == [("a/b=c", ["b=c"])]
    assert _models(["a"], ["n", "m"]) == [("a", ["n", "m"])]
    for given, served in ((["a/m", "b/m"], ()), (["a", "b"], ["n"]), (["x=a", "x=b"], ()), (["x:y=a", "b"], ())):
        with pytest.raises(ConfigError, match="NAME=MODEL"):
            _models(given, served)
    llm = tiny_llm()
    with pytest.raises(ConfigError, match="'tiny'"):
        Fleet([Service(llm, name="tiny"), Service(llm, name="b", aliases=["tiny"])])
