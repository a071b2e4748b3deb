"""Models behind an HTTP API: OpenAI's (also served by vLLM, llama.cpp and our own server) and Anthropic's.

    generate         chat: POST chat/completions or messages        text: POST completions
    log-likelihood   POST completions {prompt: context + continuation, echo, logprobs: 1}
                     the continuation's tokens are those whose text starts after the context

Several requests run at once. They are retried after 408, 409, 425, 429, 5xx, broken connections and half answers, after
the time that Retry-After gives or twice as long each time. A chat API returns no log-probabilities of the text it is
sent, so tasks that need them are refused with an error instead of being replaced by an approximation.
"""

from __future__ import annotations

import json
import logging
import random
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from math import isnan, nan
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import urlsplit

from quadriga import runtime
from quadriga.errors import EndpointError, EvaluationError
from quadriga.evaluate.model import Done, Message, quietly

if TYPE_CHECKING:
    import httpx2

_log = logging.getLogger(__name__)

T = TypeVar("T")

_AGAIN = frozenset({408, 409, 425, 429, 500, 502, 503, 504, 529})
_TRIES = 6
_FIRST_WAIT_S = 1.0
_MOST_WAIT_S = 60.0
_MOST_STOPS = 4  # OpenAI's limit; cut() applies all stop strings to the answer
_ANTHROPIC_VERSION = "2023-06-01"


@dataclass(frozen=True)
class ReportedLikelihood:
    """A ``Likelihood`` computed from the log-probabilities that an API returned."""

    logprob: float
    greedy: bool
    n_tokens: int


class ApiClient:
    """An HTTP client that POSTs JSON and retries.

    Args:
        base: URL that paths are appended to, e.g. https://api.example.org/v1.
        headers: sent with every request.
        parallel: how many requests run at once.
        timeout_s: limit for one request, in seconds.
        transport: replaces the network in tests.
        sleep: replaces waiting in tests.
    """

    def __init__(
        self,
        base: str,
        headers: Mapping[str, str],
        *,
        parallel: int = 8,
        timeout_s: float = 600.0,
        transport: httpx2.BaseTransport | None = None,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        try:
            import httpx2
        except ImportError:
            raise EvaluationError(
                f"evaluating a model over HTTP needs httpx2: {runtime.install_hint('eval')}"
            ) from None
        if parallel < 1:
            raise EvaluationError(f"--concurrency must be at least 1, got {parallel}")
        self.base, self.parallel, self._sleep, self._errors = base, parallel, sleep, httpx2
        self._client = httpx2.Client(
            base_url=base.rstrip("/") + "/", headers=dict(headers), timeout=timeout_s, transport=transport
        )

    def post(self, path: str, body: Mapping[str, Any]) -> dict[str, Any]:
        """POST ``body`` and return the JSON object of the response.

        Raises:
            EndpointError: the request was refused, or every attempt failed; the message includes the API's own.
        """
        reason = ""
        for attempt in range(_TRIES):
            asked_wait: float | None = None
            try:
                response = self._client.post(path, json=dict(body))
            except self._errors.RequestError as error:
                reason = f"{type(error).__name__}: {error}"
            else:
                if response.status_code == 200 and not _is_half(response.content):
                    return self._object(path, response)
                reason = f"status {response.status_code}: {response.text[:300].strip()}"
                if response.status_code != 200 and response.status_code not in _AGAIN:
                    raise EndpointError(f"{self.base} refused {path}: {reason}")
                asked_wait = _seconds(response.headers.get("retry-after"))
            if attempt < _TRIES - 1:
                wait = _FIRST_WAIT_S * 2**attempt * random.uniform(0.75, 1.25)
                self._sleep(min(_MOST_WAIT_S, wait if asked_wait is None else asked_wait))
        raise EndpointError(f"{self.base} failed {_TRIES} times on {path}: {reason}")

    def _object(self, path: str, response: httpx2.Response) -> dict[str, Any]:
        try:
            body = response.json()
        except ValueError:
            raise EndpointError(f"{self.base} answered {path} with something that is not JSON") from None
        if not isinstance(body, dict):
            raise EndpointError(f"{self.base} answered {path} with {type(body).__name__} instead of an object")
        return body

    def map(self, ask: Callable[[int], T], n: int, done: Done) -> list[T]:
        """Return ``[ask(0), ..., ask(n - 1)]``, run in parallel. The first error is raised and cancels the rest."""
        with ThreadPoolExecutor(self.parallel) as pool:
            futures = {pool.submit(ask, i): i for i in range(n)}
            answers: dict[int, T] = {}
            try:
                for future in as_completed(futures):
                    answers[futures[future]] = future.result()
                    done(1)
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise
        return [answers[i] for i in range(n)]


def _is_half(content: bytes) -> bool:
    """True if nothing came, or the beginning of a JSON object: a server or proxy that stopped while it wrote."""
    if not content.strip().startswith(b"{"):
        return not content.strip()
    try:
        json.loads(content)
    except ValueError:
        return True
    return False


def _seconds(value: str | None) -> float | None:
    try:
        seconds = nan if value is None else float(value)
    except ValueError:
        return None  # a date instead of seconds: fall back to our own waiting times
    return None if isnan(seconds) else max(0.0, seconds)


def cut(text: str, stop: Sequence[str]) -> str:
    """Cut a text before the first stop string in it."""
    ends = [place for s in stop if s and (place := text.find(s)) >= 0]
    return text[: min(ends)] if ends else text


class Endpoint:
    """A ``LanguageModel`` behind an API: what all of them share. Scoring is refused unless a subclass implements it.

    Args:
        client: the HTTP client.
        model: the model's name in the API.
        context: the model's context length in tokens, for tasks that depend on it; no API reports it.
    """

    api = ""

    def __init__(self, client: ApiClient, model: str, *, context: int = 32768) -> None:
        self.client, self.model, self.context = client, model, context
        self._said_cut = False

    @property
    def name(self) -> str:
        """The last part of the model's name: ``b`` of ``a/b``."""
        return self.model.rsplit("/", 1)[-1]

    @property
    def identity(self) -> dict[str, str]:
        """The API's address and the model's name; an API reveals no more about its weights."""
        return {"model": self.model, "address": self.client.base, "api": self.api}

    def loglikelihoods(self, requests: Sequence[tuple[str, str]], *, done: Done = quietly) -> list[ReportedLikelihood]:
        """Not available: raises EvaluationError."""
        raise EvaluationError(
            f"{self.name} is reached through {self.api}, which returns no log-probabilities of a prompt. Choose tasks "
            "that generate (gsm8k, humaneval, mbpp), or a completions API with echo and logprobs (--api openai, "
            "without --chat)."
        )

    def rolling(self, texts: Sequence[str], *, done: Done = quietly) -> list[ReportedLikelihood]:
        """Not available: raises EvaluationError."""
        raise EvaluationError("scoring whole texts needs a model in this process: an API has no windows of tokens")

    def count_tokens(self, text: str) -> int:
        """Not available: raises EvaluationError."""
        raise EvaluationError("this task counts tokens, which needs a model (with its tokenizer) in this process")

    def generate(
        self,
        prompts: Sequence[str],
        *,
        max_new_tokens: int,
        stop: Sequence[str] = (),
        temperature: float = 0.0,
        seed: int | None = None,
        done: Done = quietly,
    ) -> list[str]:
        """Return the model's answer to each prompt, cut at the stop strings."""

        def ask(i: int) -> str:
            own_seed = None if seed is None or temperature == 0 else seed + i
            return cut(self._ask(prompts[i], max_new_tokens, stop, temperature, own_seed), stop)

        return self.client.map(ask, len(prompts), done)

    def converse(
        self,
        conversations: Sequence[Sequence[Message]],
        *,
        max_new_tokens: int,
        temperature: float = 0.0,
        seed: int | None = None,
        done: Done = quietly,
    ) -> list[str]:
        """Return the assistant's next turn of each conversation."""

        def ask(i: int) -> str:
            own_seed = None if seed is None or temperature == 0 else seed + i
            return self._talk(conversations[i], max_new_tokens, (), temperature, own_seed)

        return self.client.map(ask, len(conversations), done)

    def _whole(self, text: str, reason: object, n: int) -> str:
        """The text; a log line, once, where it is empty because a model that thinks first used up its tokens."""
        if not text.strip() and reason in ("length", "max_tokens") and not self._said_cut:
            self._said_cut = True
            _log.warning(
                "an answer of %s ended at the %d tokens that the task allows before it had any text, as those of a "
                "model that thinks first do; such answers count as empty. Switch its thinking off at the server.",
                self.name,
                n,
            )
        return text

    def _ask(self, prompt: str, n: int, stop: Sequence[str], temperature: float, seed: int | None) -> str:
        return self._talk([{"role": "user", "content": prompt}], n, stop, temperature, seed)

    def _talk(
        self, messages: Sequence[Message], n: int, stop: Sequence[str], temperature: float, seed: int | None
    ) -> str:
        raise EvaluationError(
            f"{self.name} is reached through {self.api}, which has no conversations: this task needs a chat API "
            f"(--chat)"
        )


class OpenAIChat(Endpoint):
    """OpenAI's chat completions; each prompt is sent as one user message."""

    api = "openai chat"

    def _talk(
        self, messages: Sequence[Message], n: int, stop: Sequence[str], temperature: float, seed: int | None
    ) -> str:
        body: dict[str, Any] = {"model": self.model, "messages": [dict(one) for one in messages]}
        body |= _openai_options(n, stop, temperature, seed)
        answer = self.client.post("chat/completions", body)
        text = _field(self.client, answer, lambda a: _text(a["choices"][0]["message"]["content"] or ""))
        return self._whole(text, answer["choices"][0].get("finish_reason"), n)


class OpenAIText(Endpoint):
    """OpenAI's text completions: continues prompts as they are, and scores them where the server supports ``echo``."""

    api = "openai text"

    def _ask(self, prompt: str, n: int, stop: Sequence[str], temperature: float, seed: int | None) -> str:
        body = {"model": self.model, "prompt": prompt} | _openai_options(n, stop, temperature, seed)
        text: str = _field(self.client, self.client.post("completions", body), lambda a: _text(a["choices"][0]["text"]))
        return text

    def loglikelihoods(self, requests: Sequence[tuple[str, str]], *, done: Done = quietly) -> list[ReportedLikelihood]:
        """Log-likelihood of each continuation, from an echoed prompt (see the module docstring).

        Raises:
            EvaluationError: the API does not echo log-probabilities.
        """
        return self.client.map(lambda i: self._score(*requests[i]), len(requests), done)

    def _score(self, context: str, continuation: str) -> ReportedLikelihood:
        n_spaces = len(context) - len(context.rstrip())
        border = len(context) - n_spaces
        body = {"model": self.model, "prompt": context + continuation, "max_tokens": 1, "echo": True, "logprobs": 1}
        try:
            answer = self.client.post("completions", body | {"temperature": 0})
        except EndpointError as error:
            if "refused" in str(error):
                raise EvaluationError(f"log-likelihoods need completions with echo and logprobs; {error}") from None
            raise
        logprob, greedy, n_tokens = 0.0, True, 0
        end = len(context) + len(continuation)
        for i, (offset, own, best) in enumerate(self._echoed(answer)):
            if not border <= offset < end or (i == 0 and own is None):  # nothing stands before the first token
                continue
            if own is None or best is None:
                raise EvaluationError(f"{self.client.base} returned no log-probability of a token of {continuation!r}")
            logprob, greedy, n_tokens = logprob + own, greedy and own >= best, n_tokens + 1
        if not n_tokens:
            raise EvaluationError(f"{self.client.base} returned no token of {continuation!r} after its context")
        return ReportedLikelihood(logprob, greedy, n_tokens)

    def _echoed(self, answer: dict[str, Any]) -> list[tuple[int, float | None, float | None]]:
        """Of each token: where its text starts, its log-probability and that of the likeliest (None: not told).

        Raises:
            EvaluationError: the answer has no such lists, or they are not of numbers.
        """
        try:
            shown = answer["choices"][0]["logprobs"]
            tops = [[_number(one) for one in (top or {}).values()] for top in shown["top_logprobs"]]
            owns = [None if own is None else _number(own) for own in shown["token_logprobs"]]
            starts = [int(start) for start in shown["text_offset"]]
            if len(starts) < 2:
                raise ValueError("only one token")
            return [
                (start, own, None if own is None or not top else max(own, *top))
                for start, own, top in zip(starts, owns, tops, strict=True)
            ]
        except (KeyError, IndexError, TypeError, AttributeError, ValueError) as error:
            raise EvaluationError(
                f"{self.client.base} did not return the log-probabilities of an echoed prompt (echo, logprobs): "
                f"{type(error).__name__}: {error}"
            ) from None


class Anthropic(Endpoint):
    """Anthropic's messages API; each prompt is sent as one user message."""

    api = "anthropic"

    def _talk(
        self, messages: Sequence[Message], n: int, stop: Sequence[str], temperature: float, seed: int | None
    ) -> str:
        body: dict[str, Any] = {"model": self.model, "max_tokens": n, "temperature": temperature}
        body["messages"] = [dict(one) for one in messages if one["role"] != "system"]
        system = "\n\n".join(one["content"] for one in messages if one["role"] == "system")
        if system:
            body["system"] = system
        stops = [s for s in stop if s.strip()]  # the API refuses blank ones; cut() applies all
        if stops:
            body["stop_sequences"] = stops
        answer = self.client.post("messages", body)
        return self._whole(
            _field(self.client, answer, lambda a: _text(list(a["content"]))), answer.get("stop_reason"), n
        )


def _openai_options(n: int, stop: Sequence[str], temperature: float, seed: int | None) -> dict[str, Any]:
    options: dict[str, Any] = {"max_tokens": n, "temperature": temperature}
    if stop:
        options["stop"] = list(stop)[:_MOST_STOPS]
    if seed is not None:
        options["seed"] = seed
    return options


def _text(content: Any) -> str:
    """A text, or the text parts of a list; halves of surrogate pairs, which no file can hold, as question marks.

    Raises:
        TypeError: something else.
    """
    if isinstance(content, list):
        content = "".join(_text(part["text"]) for part in content if part["type"] == "text")
    if not isinstance(content, str):
        raise TypeError(f"an answer must be a text, got {type(content).__name__}")
    return content.encode(errors="replace").decode()


def _number(value: Any) -> float:
    """A log-probability.

    Raises:
        ValueError, TypeError: no number.
    """
    if isnan(number := float(value)):
        raise ValueError("a log-probability is not a number")
    return number


def _field(client: ApiClient, answer: dict[str, Any], take: Callable[[dict[str, Any]], T]) -> T:
    try:
        return take(answer)
    except (KeyError, IndexError, TypeError):
        raise EndpointError(f"{client.base} answered in an unknown format: {str(answer)[:300]}") from None


def connect(
    address: str,
    *,
    api: str = "auto",
    model: str | None = None,
    key: str | None = None,
    chat: bool = False,
    parallel: int = 8,
    transport: httpx2.BaseTransport | None = None,
    sleep: Callable[[float], None] = time.sleep,
) -> Endpoint:
    """Create the ``LanguageModel`` for an API address.

    Args:
        address: the API's base URL, up to and including /v1.
        api: openai, anthropic, or auto (anthropic if the host's name contains it).
        model: the model's name in the API.
        key: the API key; default: QUADRIGA_API_KEY.
        chat: use OpenAI's chat completions instead of its text completions; Anthropic's API is always chat.
        parallel: how many requests run at once.
        transport: replaces the network in tests.
        sleep: replaces waiting in tests.

    Raises:
        EvaluationError: unknown api, or no model name.
    """
    if api not in ("auto", "openai", "anthropic"):
        raise EvaluationError(f"--api must be openai, anthropic or auto; got {api!r}")
    if model is None:
        raise EvaluationError("an API serves many models: name the one to evaluate with --api-model")
    if api == "auto":
        api = "anthropic" if "anthropic" in (urlsplit(address).hostname or "") else "openai"
    key = key or runtime.setting("API_KEY")
    if api == "anthropic":
        headers = {"anthropic-version": _ANTHROPIC_VERSION} | ({"x-api-key": key} if key else {})
    else:
        headers = {"authorization": f"Bearer {key}"} if key else {}
    client = ApiClient(address, headers, parallel=parallel, transport=transport, sleep=sleep)
    if api == "anthropic":
        return Anthropic(client, model)
    return (OpenAIChat if chat else OpenAIText)(client, model)
