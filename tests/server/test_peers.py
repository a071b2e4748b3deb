"""What llama.cpp's server tests and vLLM's entrypoint tests ask of a server, in our words, asked of ours.

Read in ggml-org/llama.cpp, tools/server/tests/unit, and vllm-project/vllm, tests/entrypoints/openai. A name is what one of
theirs is about, several of theirs may be one of ours. What another test of ours holds is not repeated.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.server.conftest import Live

TEXT: dict[str, Any] = {"prompt": "ab", "max_tokens": 6, "temperature": 0}
OWN: dict[str, Any] = {"prompt": "ab", "n_predict": 6, "temperature": 0}
CHAT: dict[str, Any] = {"messages": [{"role": "user", "content": "a"}], "max_tokens": 6, "temperature": 0}
Check = Callable[[Live], bool]


def ask(live: Live, path: str, body: dict[str, Any], **more: Any) -> Any:
    answer = live.post(path, body | more)
    assert answer.status_code == 200, answer.text
    return answer.json()


def refused(live: Live, path: str, body: dict[str, Any], **more: Any) -> bool:
    answer = live.post(path, body | more)
    return answer.status_code == 400 and bool(answer.json()["error"]["message"])


def chunks(live: Live, path: str, body: dict[str, Any], **more: Any) -> list[Any]:
    lines = live.post(path, {**body, "stream": True, **more}).text.split("\n\n")
    return [json.loads(line.removeprefix("data: ")) for line in lines if line and not line.endswith("[DONE]")]


def text_of(said: Any) -> str:
    return str(said["choices"][0]["text"])


def vector(live: Live, **body: Any) -> list[float]:
    found: list[float] = ask(live, "/v1/embeddings", body)["data"][0]["embedding"]
    return found


def llama_completion(live: Live) -> bool:
    said = ask(live, "/completion", OWN, return_tokens=True)
    assert type(said["has_new_line"]) is bool and said["prompt"] == "ab" and not said["truncated"]
    return bool(said["timings"]["prompt_n"] == 2 and said["timings"]["predicted_n"] == len(said["tokens"]) == 6)


def llama_prompts(live: Live) -> bool:
    one = ask(live, "/completion", OWN)["content"]
    many = ask(live, "/completion", OWN, prompt=[[97, 98], "ab"])
    assert [each["content"] for each in many] == [one, one] and [each["index"] for each in many] == [0, 1]
    return bool(ask(live, "/completion", OWN, prompt=[97, "b"])["content"] == one)


def llama_fields(live: Live) -> bool:
    said = ask(live, "/completion", OWN, response_fields=["content", "generation_settings/n_predict", "prompt"])
    return bool(said.keys() == {"content", "generation_settings/n_predict", "prompt"} and said["prompt"] == "ab")


def llama_probabilities(live: Live) -> bool:
    whole = ask(live, "/completion", OWN, n_probs=4)["completion_probabilities"]
    streamed = [c["completion_probabilities"] for c in chunks(live, "/completion", OWN, n_probs=4) if not c["stop"]]
    for one in whole:
        assert one.keys() == {"id", "token", "bytes", "logprob", "top_logprobs"} and one["logprob"] <= 0
        assert len(one["top_logprobs"]) == 4 and one["top_logprobs"][0]["id"] == one["id"]
    return streamed == [[one] for one in whole]


def llama_formats(live: Live) -> bool:
    wanted = (
        {"type": "json_object", "schema": {"const": "42"}},
        {"type": "json_schema", "json_schema": {"name": "a", "schema": {"const": "42"}}},
    )
    for form in wanted:
        assert (
            ask(live, "/v1/chat/completions", CHAT, response_format=form)["choices"][0]["message"]["content"] == '"42"'
        )
    wrong = (
        {"type": "sound"},
        {"type": "json_object", "schema": 123},
        {"type": "json_object", "schema": {"type": "hiccup"}},
    )
    return all(refused(live, "/v1/chat/completions", CHAT, response_format=form) for form in wrong)


def llama_messages(live: Live) -> bool:
    user = {"role": "user", "content": "test"}
    wrong: list[Any] = [None, "string", [123], [{}], [{"role": 123}], [{"role": "system", "content": 123}], [user, {}]]
    return all(refused(live, "/v1/chat/completions", CHAT, messages=messages) for messages in wrong)


def llama_stream_head(live: Live) -> bool:
    said = chunks(live, "/v1/chat/completions", CHAT)
    assert len({chunk["id"] for chunk in said}) == 1 and said[0]["choices"][0]["delta"]["role"] == "assistant"
    return not any("role" in chunk["choices"][0]["delta"] for chunk in said[1:])


def llama_timings(live: Live) -> bool:
    last = chunks(live, "/v1/chat/completions", CHAT, stream_options={"include_usage": True})[-1]
    return (
        not last["choices"] and {"prompt_per_second", "predicted_per_second", "predicted_n"} <= last["timings"].keys()
    )


def llama_prefill(live: Live) -> bool:
    turns = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": [{"type": "text", "text": "Wh"}, {"type": "text", "text": "ill"}]},
    ]
    return bool(ask(live, "/apply-template", {"messages": turns})["prompt"].endswith("assistant\nWhill"))


def llama_tokens(live: Live) -> bool:
    text = "unicode 媽 and emoji 🤗"
    ids = ask(live, "/tokenize", {"content": text})["tokens"]
    pieces = ask(live, "/tokenize", {"content": text, "with_pieces": True})["tokens"]
    assert [piece["id"] for piece in pieces] == ids and all(piece["piece"] for piece in pieces)
    return bool(ask(live, "/detokenize", {"tokens": ids})["content"] == text)


def llama_rerank(live: Live) -> bool:
    body = {"query": "a cat", "documents": ["zzz", "a cat", "dog"]}
    said = ask(live, "/rerank", body, top_n=2)
    assert len(said["results"]) == 2 and said["results"][0]["index"] == 1 and said["usage"]["prompt_tokens"] > 0
    return all(refused(live, "/rerank", body, documents=wrong) for wrong in ([], None, 123, [1, 2]))


def llama_vectors(live: Live) -> bool:
    one = vector(live, input="abc")
    many = ask(live, "/v1/embeddings", {"input": ["abc", "abc", "abc"]})
    assert sum(x * x for x in one) == pytest.approx(1, abs=1e-3) and all(d["embedding"] == one for d in many["data"])
    return bool(many["usage"]["prompt_tokens"] == many["usage"]["total_tokens"] == 9)


LLAMA: dict[str, Check] = {
    "a completion counts its tokens and gives them where asked": llama_completion,
    "a stream is the whole answer": lambda s: (
        "".join(c["content"] for c in chunks(s, "/completion", OWN)) == ask(s, "/completion", OWN)["content"]
    ),
    "the same seed is the same answer": lambda s: (
        len({ask(s, "/completion", OWN, temperature=1, seed=42)["content"] for _ in range(3)}) == 1
    ),
    "other seeds are other answers": lambda s: (
        len({ask(s, "/completion", OWN, temperature=1, seed=i)["content"] for i in range(4)}) == 4
    ),
    "a known prefix changes nothing": lambda s: (
        len({ask(s, "/completion", OWN, prompt="x" * 80)["content"] for _ in range(2)}) == 1
    ),
    "a prompt beyond the context is refused": lambda s: refused(s, "/completion", OWN, prompt="life " * 500),
    "prompts of ids, of several, mixed": llama_prompts,
    "fields of the answer are chosen": llama_fields,
    "probabilities, whole and streamed": llama_probabilities,
    "a biased token is never chosen": lambda s: (
        97 not in ask(s, "/completion", OWN, logit_bias=[[97, -100]], return_tokens=True, n_predict=30)["tokens"]
    ),
    "response formats with a schema, and those that are none": llama_formats,
    "messages that are none are refused": llama_messages,
    "one id in a stream, the role once": llama_stream_head,
    "timings beside the usage": llama_timings,
    "an assistant's last message is continued": llama_prefill,
    "tokens and back, with pieces": llama_tokens,
    "documents are ranked": llama_rerank,
    "vectors are of length 1, equal for equal texts, counted": llama_vectors,
    "vectors: too long, or none, is refused": lambda s: (
        refused(s, "/v1/embeddings", {"input": "x" * 3000}) and refused(s, "/v1/embeddings", {"input": []})
    ),
    "no file of the machine is read": lambda s: refused(
        s,
        "/v1/chat/completions",
        CHAT,
        messages=[{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "file:///etc/passwd"}}]}],
    ),
    "health and the page need no login": lambda s: (
        s.client.get("/health").status_code == s.client.get("/").status_code == 200
    ),
    "models, props, slots": lambda s: all(
        s.client.get(path).status_code == 200 for path in ("/models", "/props", "/slots")
    ),
}
"""Elsewhere: libraries (test_clients), keys and CORS (test_guard, test_http), cuts (test_http), tools (test_calls), /infill
(test_llamacpp), Anthropic's and Responses' interfaces (test_clients), adapters (test_fleet), speculation (test_answers)."""

NOT_LLAMA = {
    "GBNF grammars": "Lark grammars, regular expressions and schemas",
    "saving a slot to a file": "--prefix-cache keeps every known prefix",
    "shifting a full context": "an answer ends with its context",
    "any model name is served": "an unknown name is a 404",
    "probabilities after sampling": "the model's own are given",
    "vectors of every token": "one vector a text",
    "pictures and sound": "models here read text",
}


def vllm_usage(live: Live) -> bool:
    usage = ask(live, "/v1/completions", TEXT)["usage"]
    return (usage["prompt_tokens"], usage["completion_tokens"], usage["total_tokens"]) == (2, 6, 8)


def vllm_logprobs(live: Live) -> bool:
    for n, most in ((None, None), (0, 1), (5, 6)):
        shown = ask(live, "/v1/completions", TEXT, logprobs=n)["choices"][0]["logprobs"]
        assert (shown is None) == (n is None) and (
            n is None or max(1, n) <= len(shown["top_logprobs"][0] or {1: 1}) <= most
        )
    return refused(live, "/v1/completions", TEXT, logprobs=21) and refused(
        live, "/v1/completions", TEXT, logprobs=30, stream=True
    )


def vllm_stream(live: Live) -> bool:
    said = chunks(live, "/v1/completions", TEXT)
    assert [c["choices"][0]["finish_reason"] for c in said if c["choices"][0]["finish_reason"]] == ["length"]
    return "".join(map(text_of, said)) == text_of(ask(live, "/v1/completions", TEXT))


def vllm_choices(live: Live) -> bool:
    body = {**TEXT, "n": 3, "temperature": 1, "seed": 42, "max_tokens": 20}
    whole = [choice["text"] for choice in ask(live, "/v1/completions", body)["choices"]]
    parts = ["", "", ""]
    for chunk in chunks(live, "/v1/completions", body):
        parts[chunk["choices"][0]["index"]] += text_of(chunk)
    return len(set(whole)) == 3 and parts == whole


def vllm_stream_options(live: Live) -> bool:
    assert all(
        c.get("usage") is None for c in chunks(live, "/v1/completions", TEXT, stream_options={"include_usage": False})
    )
    *body, last = chunks(live, "/v1/completions", TEXT, stream_options={"include_usage": True})
    assert (
        all(chunk["usage"] is None for chunk in body) and last["choices"] == [] and last["usage"]["total_tokens"] == 8
    )
    return refused(live, "/v1/completions", TEXT, stream_options={"include_usage": True})


def vllm_batch(live: Live) -> bool:
    for prompts in (["ab", "ab"], [[97, 98], [97, 98]]):
        texts = [choice["text"] for choice in ask(live, "/v1/completions", TEXT, prompt=prompts)["choices"]]
        assert len(texts) == 2 and texts[0] == texts[1]
    return len(ask(live, "/v1/completions", TEXT, prompt=["ab", "c"], n=2)["choices"]) == 4


def vllm_echo(live: Live) -> bool:
    for prompt in ("abc", [97, 98, 99]):
        choice = ask(live, "/v1/completions", TEXT, prompt=prompt, echo=True, logprobs=1)["choices"][0]
        shown = choice["logprobs"]
        assert choice["text"].startswith("abc") and shown["token_logprobs"][0] is shown["top_logprobs"][0] is None
        assert len(shown["tokens"]) == len(shown["text_offset"]) == 9
    return True


def vllm_wrong_formats(live: Live) -> bool:
    wrong = (
        {
            "type": "json_schema",
            "json_schema": {"name": "a", "schema": {"type": "object", "properties": {"foo": "bar"}}},
        },
        {"type": "regex", "regex": "[.*"},
        {"type": "grammar", "grammar": "root ::= select_statementinvalidsyntax"},
    )
    return all(refused(live, "/v1/completions", TEXT, response_format=form) for form in wrong)


def vllm_chat_logprobs(live: Live) -> bool:
    assert ask(live, "/v1/chat/completions", CHAT, logprobs=False)["choices"][0]["logprobs"] is None
    for n in (0, 5):
        shown = ask(live, "/v1/chat/completions", CHAT, logprobs=True, top_logprobs=n)["choices"][0]["logprobs"]
        assert len(shown["content"]) == 6 and n <= len(shown["content"][0]["top_logprobs"]) <= n + 1
    return refused(live, "/v1/chat/completions", CHAT, logprobs=True, top_logprobs=21)


def vllm_turns(live: Live) -> bool:
    first = ask(live, "/v1/chat/completions", CHAT)["choices"][0]["message"]
    turns = [*CHAT["messages"], {k: first[k] for k in ("role", "content")}, {"role": "user", "content": "b"}]
    return isinstance(ask(live, "/v1/chat/completions", CHAT, messages=turns)["choices"][0]["message"]["content"], str)


def vllm_choice(live: Live) -> bool:
    form = {"type": "regex", "regex": "(Rust|Ada)"}
    said = ask(live, "/v1/chat/completions", CHAT, response_format=form, temperature=1)
    return said["choices"][0]["message"]["content"] in ("Rust", "Ada")


VLLM: dict[str, Check] = {
    "usage counts": vllm_usage,
    "a prompt of ids": lambda s: (
        text_of(ask(s, "/v1/completions", TEXT, prompt=[97, 98])) == text_of(ask(s, "/v1/completions", TEXT))
    ),
    "log-probabilities: none, zero, some, too many": vllm_logprobs,
    "a stream is the whole answer and ends once": vllm_stream,
    "n answers are different, streamed the same": vllm_choices,
    "usage in streams where it is asked for": vllm_stream_options,
    "several prompts": vllm_batch,
    "echo with log-probabilities": vllm_echo,
    "schemas, expressions and grammars that are none": vllm_wrong_formats,
    "a chat's log-probabilities: none, zero, some, too many": vllm_chat_logprobs,
    "a conversation of several turns": vllm_turns,
    "one of some choices": vllm_choice,
    "no prompts are refused": lambda s: refused(s, "/v1/completions", TEXT, prompt=[]),
    "a body that is no object is refused": lambda s: s.post("/v1/chat/completions", [1]).status_code == 400,
    "a bias beyond the vocabulary is refused": lambda s: refused(
        s, "/v1/chat/completions", CHAT, logit_bias={"100000": 1}
    ),
    "a stop id beyond the vocabulary is refused": lambda s: refused(
        s, "/v1/chat/completions", CHAT, stop_token_ids=[100000]
    ),
    "an unknown model is a 404": lambda s: s.post("/v1/completions", {**TEXT, "model": "other"}).status_code == 404,
    "models say how long their context is": lambda s: (
        s.client.get("/v1/models").json()["data"][0]["max_model_len"] == 1024
    ),
    "a null tool choice is none": lambda s: bool(ask(s, "/v1/chat/completions", CHAT, tool_choice=None)),
    "content as a list of texts": lambda s: bool(
        ask(s, "/v1/chat/completions", CHAT, messages=[{"role": "user", "content": [{"type": "text", "text": "a"}]}])
    ),
    "token ids: tokenise, detokenise": lambda s: (
        ask(s, "/detokenize", {"tokens": ask(s, "/tokenize", {"prompt": "ab"})["tokens"]})["prompt"] == "ab"
    ),
    "scores of pairs": lambda s: len(ask(s, "/score", {"text_1": "a", "text_2": ["a", "b"]})["data"]) == 2,
}
"""Elsewhere: tools (test_calls, test_clients), reasoning (tests/text/test_reasoning), adapters (test_fleet), shutdown
(test_life), text offsets (test_answers), Responses and Anthropic (test_clients), run-batch (test_files)."""

NOT_VLLM = {
    "prompt_logprobs": "echo with logprobs says the same",
    "return_token_ids": "/tokenize",
    "truncate_prompt_tokens": "a prompt that is too long is refused",
    "beam search": "answers are sampled",
    "prompt_embeds": "texts and ids",
    "continuous_usage_stats": "usage comes last",
    "structured_outputs": "response_format",
    "any role": "roles of the interface",
    "pictures, sound and video": "models here read text",
}


@pytest.mark.parametrize("name", LLAMA)
def test_what_llama_cpp_asks_of_its_server(tiny: Live, name: str) -> None:
    assert LLAMA[name](tiny)


@pytest.mark.parametrize("name", VLLM)
def test_what_vllm_asks_of_its_server(tiny: Live, name: str) -> None:
    assert VLLM[name](tiny)


def test_the_documentation_counts_them() -> None:
    page = " ".join((Path(__file__).parents[2] / "docs/server.md").read_text().split())
    for peer, here, not_here in (("llama.cpp", LLAMA, NOT_LLAMA), ("vLLM", VLLM, NOT_VLLM)):
        assert f"{len(here)} of {peer}'s ({len(not_here)} do not apply" in page
