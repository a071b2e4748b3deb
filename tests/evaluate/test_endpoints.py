"""Models behind an API: our own server, and constructed difficult responses."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import httpx2
import pytest

from quadriga.engine.text_model import TextModel
from quadriga.errors import EndpointError, EvaluationError
from quadriga.evaluate.endpoints import Anthropic, OpenAIChat, OpenAIText, connect, cut
from tests.server.conftest import running, tiny_llm


def test_our_server_and_the_model_in_this_process_agree() -> None:
    pairs = [("The answer is", " no"), ("The answer is ", "yes, it is"), ("b\n", "c")]
    here = TextModel(tiny_llm())
    with running(tiny_llm()) as live:
        there = connect(live.url + "/v1", model="tiny", parallel=3)
        assert isinstance(there, OpenAIText)
        for mine, theirs in zip(here.loglikelihoods(pairs), there.loglikelihoods(pairs), strict=True):
            assert theirs.logprob == pytest.approx(mine.logprob, abs=1e-4)
            assert (theirs.greedy, theirs.n_tokens) == (mine.greedy, mine.n_tokens)
        prompts = ["One, two,", "a"]
        assert there.generate(prompts, max_new_tokens=6) == here.generate(prompts, max_new_tokens=6)


def answering(*answers: httpx2.Response, seen: list[httpx2.Request]) -> Callable[[httpx2.Request], httpx2.Response]:
    """A server that gives these responses one after another, then repeats the last."""

    def handle(request: httpx2.Request) -> httpx2.Response:
        seen.append(request)
        return answers[min(len(seen), len(answers)) - 1]

    return handle


def chat_answer(text: str) -> httpx2.Response:
    return httpx2.Response(200, json={"choices": [{"message": {"content": text}}]})


def ask(
    *answers: httpx2.Response, api: str = "openai", **options: Any
) -> tuple[list[str], list[httpx2.Request], list[float]]:
    seen: list[httpx2.Request] = []
    waits: list[float] = []
    endpoint = connect(
        "https://api.test/v1",
        api=api,
        model="m",
        key="secret-key",
        chat=True,
        parallel=1,
        transport=httpx2.MockTransport(answering(*answers, seen=seen)),
        sleep=waits.append,
    )
    return endpoint.generate(["hello"], max_new_tokens=9, **options), seen, waits


def test_chat_requests_carry_prompt_and_options() -> None:
    texts, seen, _ = ask(chat_answer("a b STOP c"), stop=("STOP", "1", "2", "3", "4"), temperature=0.5, seed=7)
    assert texts == ["a b "]
    assert seen[0].headers["authorization"] == "Bearer secret-key"
    assert str(seen[0].url) == "https://api.test/v1/chat/completions"
    assert json.loads(seen[0].content) == {
        "model": "m",
        "messages": [{"role": "user", "content": "hello"}],
        "max_tokens": 9,
        "temperature": 0.5,
        "stop": ["STOP", "1", "2", "3"],
        "seed": 7,
    }


def test_blank_stops_are_not_sent_to_anthropic_but_applied_here() -> None:
    answer = httpx2.Response(200, json={"content": [{"type": "text", "text": "x\n\ny"}, {"type": "other"}]})
    texts, seen, _ = ask(answer, api="anthropic", stop=("\n\n", "Q:"))
    assert texts == ["x"]
    assert seen[0].headers["x-api-key"] == "secret-key"
    assert seen[0].headers["anthropic-version"] == "2023-06-01"
    assert json.loads(seen[0].content)["stop_sequences"] == ["Q:"]


def test_busy_and_failed_requests_are_retried_after_a_wait() -> None:
    texts, seen, waits = ask(
        httpx2.Response(429, headers={"retry-after": "3"}),
        httpx2.Response(500),
        httpx2.Response(529),
        chat_answer("ok"),
    )
    assert (texts, len(seen)) == (["ok"], 4)
    assert waits[0] == 3.0
    assert 1.5 <= waits[1] <= 2.5
    assert 3.0 <= waits[2] <= 5.0


@pytest.mark.parametrize("half", ['{"choices": [{"mess', "", '{"choices": "\\ud'])
def test_half_an_answer_is_asked_for_again(half: str) -> None:
    texts, seen, waits = ask(httpx2.Response(200, text=half), chat_answer("ok"))
    assert (texts, len(seen), len(waits)) == (["ok"], 2, 1)


def test_a_broken_encoding_is_asked_for_again() -> None:
    broken = httpx2.Response(200, headers={"content-encoding": "gzip"}, stream=httpx2.ByteStream(b"no gzip"))
    assert ask(broken, chat_answer("ok"))[0] == ["ok"]


def test_a_wait_that_is_no_number_is_our_own() -> None:
    assert ask(httpx2.Response(429, headers={"retry-after": "nan"}), chat_answer("ok"))[2][0] >= 0.75


def test_retries_end_with_an_error() -> None:
    with pytest.raises(EndpointError, match=r"failed 6 times.*status 503: gone"):
        ask(httpx2.Response(503, text="gone"))


def test_a_refusal_is_not_retried_and_says_why() -> None:
    seen: list[httpx2.Request] = []
    endpoint = connect(
        "https://api.test/v1",
        model="m",
        chat=True,
        transport=httpx2.MockTransport(answering(httpx2.Response(401, text="wrong key"), seen=seen)),
    )
    with pytest.raises(EndpointError, match="refused chat/completions: status 401: wrong key"):
        endpoint.generate(["x"], max_new_tokens=1)
    assert len(seen) == 1


@pytest.mark.parametrize(
    "answer",
    [
        httpx2.Response(200, text="<html>"),
        httpx2.Response(200, json=[1]),
        httpx2.Response(200, json={"choices": []}),
        httpx2.Response(200, json={"choices": [{"message": None}]}),
        httpx2.Response(200, json={"choices": [{"message": {"content": 5}}]}),
        httpx2.Response(200, json={"choices": [{"message": {"content": [{"type": "text", "text": None}]}}]}),
    ],
)
def test_answers_of_an_unknown_format_are_errors(answer: httpx2.Response) -> None:
    with pytest.raises(EndpointError, match=r"not JSON|instead of an object|unknown format"):
        ask(answer)


def test_texts_in_parts_and_texts_that_no_file_can_hold() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "image"}, {"type": "text", "text": "b"}]
    assert ask(httpx2.Response(200, json={"choices": [{"message": {"content": parts}}]}))[0] == ["ab"]
    half = httpx2.Response(200, text='{"choices": [{"message": {"content": "x\\ud800y"}}]}')
    assert ask(half)[0] == ["x?y"]


ECHO: dict[str, Any] = {
    "text_offset": [0, 2, 4, 5],
    "token_logprobs": [None, -1.0, -0.5, -3.0],
    "top_logprobs": [None, {" c": -1.0}, {"d": -0.5}, {}],
}


def echoed(**changed: Any) -> OpenAIText:
    answer = httpx2.Response(200, text=json.dumps({"choices": [{"text": "", "logprobs": ECHO | changed}]}))
    endpoint = connect("https://api.test/v1", model="m", transport=httpx2.MockTransport(answering(answer, seen=[])))
    assert isinstance(endpoint, OpenAIText)
    return endpoint


def test_an_echo_by_hand() -> None:
    (found,) = echoed().loglikelihoods([("ab", " cd")])
    assert (found.logprob, found.greedy, found.n_tokens) == (-1.5, True, 2)


@pytest.mark.parametrize(
    "changed",
    [
        {"top_logprobs": None},
        {"top_logprobs": [None, {" c": -1.0}]},
        {"top_logprobs": [None, {" c": -1.0}, None, {}]},
        {"token_logprobs": [None, -1.0, None, -3.0]},
        {"token_logprobs": [None, -1.0, "x", -3.0]},
        {"token_logprobs": [None, -1.0, float("nan"), -3.0]},
        {"token_logprobs": None},
        {"text_offset": [0, None, 4, 5]},
        {"text_offset": [0]},
    ],
)
def test_an_echo_with_gaps_is_refused(changed: dict[str, Any]) -> None:
    with pytest.raises(EvaluationError, match=r"did not return the log-prob|no log-probability of a token of ' cd'"):
        echoed(**changed).loglikelihoods([("ab", " cd")])


def test_chat_apis_refuse_likelihoods() -> None:
    for endpoint in (
        connect("https://api.test/v1", model="gpt", chat=True),
        connect("https://api.anthropic.test/v1", model="claude"),
    ):
        assert isinstance(endpoint, OpenAIChat | Anthropic)
        with pytest.raises(EvaluationError, match="no log-probabilities"):
            endpoint.loglikelihoods([("a", "b")])
        with pytest.raises(EvaluationError, match="in this process"):
            endpoint.rolling(["a"])
        with pytest.raises(EvaluationError, match="counts tokens"):
            endpoint.count_tokens("a")


def test_a_completions_api_without_echo_is_refused() -> None:
    answer = httpx2.Response(200, json={"choices": [{"text": "x", "logprobs": None}]})
    endpoint = connect(
        "https://api.test/v1", model="m", transport=httpx2.MockTransport(answering(answer, seen=[])), parallel=1
    )
    with pytest.raises(EvaluationError, match="did not return the log-probabilities"):
        endpoint.loglikelihoods([("a", "b")])


def test_greedy_compares_with_the_apis_most_probable_token() -> None:
    shown = {
        "text_offset": [0, 3, 5],
        "token_logprobs": [None, -0.5, -1.0],
        "top_logprobs": [None, {" b": -0.5}, {"c": -0.25}],
    }
    answer = httpx2.Response(200, json={"choices": [{"text": "aaa bx", "logprobs": shown}]})
    endpoint = connect(
        "https://api.test/v1", model="m", transport=httpx2.MockTransport(answering(answer, seen=[])), parallel=1
    )
    (one,) = endpoint.loglikelihoods([("aaa", " b")])
    assert (one.logprob, one.greedy, one.n_tokens) == (-0.5, True, 1)
    (two,) = endpoint.loglikelihoods([("aaa", " b!!")])
    assert (two.logprob, two.greedy, two.n_tokens) == (-1.5, False, 2)


def test_what_connect_refuses() -> None:
    with pytest.raises(EvaluationError, match="--api-model"):
        connect("https://api.test/v1")
    with pytest.raises(EvaluationError, match="openai, anthropic or auto"):
        connect("https://api.test/v1", api="grpc", model="m")


def test_cut_is_at_the_first_of_all_stops() -> None:
    assert cut("abcdef", ["e", "c", ""]) == "ab"
    assert cut("abc", ["x"]) == "abc"


@pytest.mark.parametrize("api", ["openai", "anthropic"])
def test_answers_that_end_before_they_begin_are_said_once(api: str, caplog: pytest.LogCaptureFixture) -> None:
    def answer(text: str, cut: bool) -> httpx2.Response:
        if api == "anthropic":
            parts = [{"type": "thinking", "thinking": "so"}, {"type": "text", "text": text}]
            return httpx2.Response(200, json={"content": parts, "stop_reason": "max_tokens" if cut else "end_turn"})
        choice = {"message": {"content": text or None}, "finish_reason": "length" if cut else "stop"}
        return httpx2.Response(200, json={"choices": [choice]})

    def warnings(*answers: httpx2.Response) -> list[str]:
        caplog.clear()
        endpoint = connect(
            "https://api.test/v1",
            api=api,
            model="m",
            chat=True,
            parallel=1,
            transport=httpx2.MockTransport(answering(*answers, seen=[])),
        )
        endpoint.generate(["x"] * len(answers), max_new_tokens=9)
        return [record.getMessage() for record in caplog.records if record.name.startswith("quadriga.evaluate")]

    assert warnings(answer("yes", True), answer("", False)) == []
    (said,) = warnings(answer("", True), answer("yes", False), answer(" ", True))
    assert "an answer of m ended at the 9 tokens that the task allows before it had any text" in said
