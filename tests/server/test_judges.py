"""Judges from outside: each is somebody else's idea of what a server of these interfaces must do.

OpenAI's and Anthropic's Python libraries are in test_clients.py. A random model answers the judges of form, the default
model those that read what is said.
"""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

from quadriga.server.files import FileStore
from tests.server import judges
from tests.server.conftest import Live, running, tiny_llm
from tests.waiting import HANG_S

MODEL = "smollm2-135m-instruct"

NODE = """
import OpenAI from "openai";
const [url, model] = process.argv.slice(2);
const client = new OpenAI({ baseURL: url + "/v1", apiKey: "x", maxRetries: 0 });
const ask = { model, messages: [{ role: "user", content: "hi" }], max_tokens: 12, seed: 3, temperature: 1 };
const whole = await client.chat.completions.create(ask);
let text = "", reason = null, usage = null;
for await (const c of await client.chat.completions.create({ ...ask, stream: true, stream_options: { include_usage: true } })) {
  text += c.choices[0]?.delta?.content ?? "";
  reason = c.choices[0]?.finish_reason ?? reason;
  usage = c.usage ?? usage;
}
const stream = await client.chat.completions.create({ ...ask, max_tokens: 900, stream: true });
let seen = 0;
for await (const _ of stream) { if (++seen == 3) { stream.controller.abort(); break; } }
const vector = (await client.embeddings.create({ model, input: "a cat" })).data[0].embedding;
const names = []; for await (const m of client.models.list()) names.push(m.id);
const response = await client.responses.create({ model, input: "hi", max_output_tokens: 5 });
let refused = null;
try { await client.chat.completions.create({ ...ask, temperature: 300 }); } catch (error) { refused = [error.status, error.message]; }
console.log(JSON.stringify({ whole: whole.choices[0].message.content, text, reason, usage, length: vector.length, names,
  status: response.status, refused, seen }));
"""


@pytest.mark.slow
def test_openais_node_library(tiny: Live, tmp_path: Path) -> None:
    node = judges.node_with("openai", tmp_path)
    (tmp_path / "ask.mjs").write_text(NODE)
    done = subprocess.run(
        [node, "ask.mjs", tiny.url, "tiny"], cwd=tmp_path, capture_output=True, text=True, timeout=HANG_S
    )
    assert done.returncode == 0, done.stderr
    got = json.loads(done.stdout)
    assert got["whole"] == got["text"] and got["reason"] in ("length", "stop")
    assert got["usage"]["completion_tokens"] <= 12 and got["names"] == ["tiny"]
    assert got["length"] == tiny.service.llm.config.d_model and got["status"] in ("incomplete", "completed")
    assert got["refused"][0] == 400 and "temperature" in got["refused"][1]
    assert got["seen"] == 3 and tiny.settled(), "the aborted stream is gone"


@pytest.mark.weights
def test_langchain(smol: str) -> None:
    judges.need("langchain_openai")
    from langchain_openai import ChatOpenAI, OpenAIEmbeddings
    from pydantic import BaseModel

    class Weather(BaseModel):
        """The weather of a city."""

        city: str
        days: int

    chat = ChatOpenAI(base_url=f"{smol}/v1", api_key="x", model=MODEL, temperature=0, max_tokens=80, max_retries=0)
    whole = chat.invoke("What is the capital of France?")
    assert "Paris" in whole.content and whole.usage_metadata["output_tokens"] > 3
    assert "".join(str(piece.content) for piece in chat.stream("What is the capital of France?")) == whole.content
    assert chat.with_structured_output(Weather, method="json_schema").invoke("Rome, 3 days, as JSON").days >= 0
    called = chat.bind_tools([Weather], tool_choice="Weather").invoke("Weather in Rome for 3 days?").tool_calls
    assert called[0]["name"] == "Weather" and set(called[0]["args"]) == {"city", "days"}
    vectors = OpenAIEmbeddings(base_url=f"{smol}/v1", api_key="x", model=MODEL, check_embedding_ctx_length=False)
    assert len(vectors.embed_query("a cat")) == 576


FORMS = {"openai-chat": "chat-tool-calling", "open-responses": "tool-calling", "anthropic": "anth-tool-calling"}


@pytest.mark.parametrize("form", FORMS)
def test_llm_comply_finds_the_form_right(tiny: Live, form: str) -> None:
    verdicts = judges.llm_comply(tiny.url, "tiny", form)
    # A random model may talk up to the end of its context, which some cases call a failure: that is not about form.
    faults = {
        name: [error for error in errors if error != "expected status='completed', got 'incomplete'"]
        for name, (status, errors) in verdicts.items()
        if status == "failed"
    }
    failed = {name: errors for name, errors in faults.items() if errors}
    # These models read text: a picture must be refused with 400. And a random one cannot finish a call's arguments.
    # Its invalid request is one without a model: here that is the model there is.
    ours = {"Error Handling"} if form != "anthropic" else set()
    assert {"Image Input"} <= set(failed) <= {"Image Input", "Tool Calling", *ours}, failed
    assert "HTTP 400" in failed["Image Input"][0]
    right = {name for name, (status, _) in verdicts.items() if status in ("passed", "failed")} - set(failed)
    wanted = {
        "Basic Text Response",
        "System Prompt",
        "Multi-turn Conversation",
        "Streaming Response",
        "Streaming Usage",
    }
    assert wanted <= right


@pytest.mark.slow
@pytest.mark.parametrize(("form", "case"), FORMS.items())
def test_llm_comply_sees_tools_called(smol: str, form: str, case: str) -> None:
    verdicts = judges.llm_comply(smol, MODEL, form, case)
    assert [status for status, _ in verdicts.values()] == ["passed"], verdicts


@pytest.mark.slow
def test_schemathesis_finds_nothing_against_openais_own_specification(tiny: Live, tmp_path: Path) -> None:
    spec = judges.published_spec(tmp_path, "tiny")
    said = judges.schemathesis(spec, f"{tiny.url}/v1", "--phases", "examples,coverage,fuzzing", "-n", "20")
    assert f"{len(judges.ROUTES)} selected" in said and tiny.settled()


@pytest.mark.slow
def test_schemathesis_finds_nothing_against_our_own_specification(tmp_path: Path) -> None:
    with running(tiny_llm(), store=FileStore(tmp_path, 1 << 20)) as live:  # without a store, batches answer 501
        said = judges.schemathesis(f"{live.url}/openapi.json", live.url, "--phases", "coverage,fuzzing", "-n", "20")
        assert "selected" in said and live.settled()


def test_lm_eval_over_http_gives_the_log_likelihoods_of_the_process_itself(tmp_path: Path) -> None:
    judges.need("lm_eval", "tenacity", "aiohttp")
    from lm_eval.api.instance import Instance
    from lm_eval.models.openai_completions import LocalCompletionsAPI

    pairs = [("Two and two is", " four"), ("", "Once upon"), ("a" * 300, "b" * 40), ("naïve", " café 中文")]
    with running(tiny_llm(n_blocks=128)) as live:
        outside = LocalCompletionsAPI(
            model="tiny",
            base_url=f"{live.url}/v1/completions",
            tokenizer_backend="remote",
            num_concurrent=4,
            max_length=1024,
        )
        asked = [Instance("loglikelihood", {}, pair, i, metadata=(None, None, None)) for i, pair in enumerate(pairs)]
        got = outside.loglikelihood(asked, disable_tqdm=True)
        rolled = outside.loglikelihood_rolling(
            [Instance("loglikelihood_rolling", {}, ("x y z " * 20,), 0, metadata=(None, None, None))], disable_tqdm=True
        )
        assert live.settled()
    llm = tiny_llm()
    end = llm.tokenizer.eos_ids[0]
    for (context, continuation), (total, greedy) in zip(pairs, got, strict=True):
        before = llm.tokenizer.encode(context) or [end]  # lm_eval begins after the end token where there is no context
        expected, best = llm.loglikelihood(before, llm.tokenizer.encode(continuation))
        assert total == pytest.approx(expected, rel=1e-5) and greedy == best
    text = llm.tokenizer.encode("x y z " * 20)
    assert rolled[0] == pytest.approx(llm.loglikelihood([end], text)[0], rel=1e-5)
