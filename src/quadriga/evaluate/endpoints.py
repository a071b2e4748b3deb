"""Models behind an HTTP interface: OpenAI's (also vLLM's, llama.cpp's, our own server's) and Anthropic's.

    generate         chat: POST chat/completions or messages        text: POST completions
    log-likelihood   POST completions {prompt: context + continuation, echo, logprobs: 1}
                     tokens whose text begins behind the context are the continuation's

Requests run several at once, and are tried again after 408, 409, 429, 5xx and broken connections, waiting as the answer
says (Retry-After) or twice as long each time. A chat interface has no log-probabilities of what one sends it, so tasks
that need them are refused by name instead of being replaced by something that looks like them.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import urlsplit

from quadriga import runtime
from quadriga.errors import EndpointError, EvaluationError
from quadriga.evaluate.model import Done, quietly

if TYPE_CHECKING:
    import httpx2

T = TypeVar("T")

_AGAIN = frozenset({408, 409, 425, 429, 500, 502, 503, 504, 529})
_TRIES = 6
_FIRST_WAIT_S = 1.0
_MOST_WAIT_S = 60.0
_MOST_STOPS = 4  # of OpenAI's interface; all are applied here again
_ANTHROPIC_VERSION = "2023-06-01"


@dataclass(frozen=True)
class Read:
    """How probable a text was, as an interface reported it."""

    logprob: float
    greedy: bool
    n_tokens: int


class Caller:
    """POSTs JSON, patiently.

    Args:
        base: address that paths are added to, e.g. https://api.example.org/v1.
        headers: with every request.
        parallel: requests at once.
        transport: instead of the network (tests).
        sleep: instead of waiting (tests).
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
                "models behind an address are asked through httpx2: pip install 'quadriga[eval]'"
            ) from None
        if parallel < 1:
            raise EvaluationError(f"--concurrency must be at least 1, got {parallel}")
        self.base, self.parallel, self._sleep, self._errors = base, parallel, sleep, httpx2
        self._client = httpx2.Client(
            base_url=base.rstrip("/") + "/", headers=dict(headers), timeout=timeout_s, transport=transport
        )

    def post(self, path: str, body: Mapping[str, Any]) -> dict[str, Any]:
        """The answer's JSON object.

        Raises:
            EndpointError: refused, or failed at every try; the message carries what the interface said.
        """
        reason = ""
        for attempt in range(_TRIES):
            asked_wait: float | None = None
            try:
                response = self._client.post(path, json=dict(body))
            except self._errors.TransportError as error:
                reason = f"{type(error).__name__}: {error}"
            else:
                if response.status_code == 200:
                    return self._object(path, response)
                reason = f"status {response.status_code}: {response.text[:300].strip()}"
                if response.status_code not in _AGAIN:
                    raise EndpointError(f"{self.base} refused {path}: {reason}")
                asked_wait = _seconds(response.headers.get("retry-after"))
            if attempt < _TRIES - 1:
                wait = _FIRST_WAIT_S * 2**attempt * random.uniform(0.75, 1.25)
                self._sleep(min(_MOST_WAIT_S, wait if asked_wait is None else asked_wait))
        raise EndpointError(f"{self.base} failed {_TRIES} times at {path}: {reason}")

    def _object(self, path: str, response: httpx2.Response) -> dict[str, Any]:
        try:
            body = response.json()
        except ValueError:
            raise EndpointError(f"{self.base} answered {path} with something that is not JSON") from None
        if not isinstance(body, dict):
            raise EndpointError(f"{self.base} answered {path} with {type(body).__name__} instead of an object")
        return body

    def map(self, ask: Callable[[int], T], n: int, done: Done) -> list[T]:
        """``ask(0) .. ask(n - 1)``, several at once; the first error ends it."""
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


def _seconds(value: str | None) -> float | None:
    try:
        return None if value is None else max(0.0, float(value))
    except ValueError:
        return None  # a date: wait as if nothing had been said


def cut(text: str, stop: Sequence[str]) -> str:
    """A text up to the first stop string in it."""
    ends = [place for s in stop if s and (place := text.find(s)) >= 0]
    return text[: min(ends)] if ends else text


class Endpoint:
    """What both kinds have in common.

    Args:
        caller: who asks.
        model: what the interface calls the model.
        context: tokens that it takes, where a task wants to know.
    """

    api = ""

    def __init__(self, caller: Caller, model: str, *, context: int = 32768) -> None:
        self.caller, self.model, self.context = caller, model, context

    @property
    def name(self) -> str:
        """The model's last name."""
        return self.model.rsplit("/", 1)[-1]

    @property
    def identity(self) -> dict[str, str]:
        """Where it is and what it is called: an interface says no more about its weights."""
        return {"model": self.model, "address": self.caller.base, "api": self.api}

    def loglikelihoods(self, requests: Sequence[tuple[str, str]], *, done: Done = quietly) -> list[Read]:
        """Refused."""
        raise EvaluationError(
            f"{self.name} is asked through {self.api}, which gives no log-probabilities of a text one sends. Choose "
            "tasks that generate (gsm8k, humaneval, mbpp), or a text interface with echo and logprobs (--api openai, "
            "without --chat)."
        )

    def rolling(self, texts: Sequence[str], *, done: Done = quietly) -> list[Read]:
        """Refused."""
        raise EvaluationError("whole texts are scored in windows of tokens, which needs the model in this process")

    def count_tokens(self, text: str) -> int:
        """Refused."""
        raise EvaluationError("this task counts tokens, which needs the model's vocabulary in this process")

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
        """Continue or answer each prompt."""

        def ask(i: int) -> str:
            own_seed = None if seed is None or temperature == 0 else seed + i
            return cut(self._ask(prompts[i], max_new_tokens, stop, temperature, own_seed), stop)

        return self.caller.map(ask, len(prompts), done)

    def _ask(self, prompt: str, n: int, stop: Sequence[str], temperature: float, seed: int | None) -> str:
        raise NotImplementedError


class OpenAIChat(Endpoint):
    """A chat interface of OpenAI's kind; each prompt is a user's message."""

    api = "openai chat"

    def _ask(self, prompt: str, n: int, stop: Sequence[str], temperature: float, seed: int | None) -> str:
        body: dict[str, Any] = {"model": self.model, "messages": [{"role": "user", "content": prompt}]}
        body |= _openai_options(n, stop, temperature, seed)
        answer = self.caller.post("chat/completions", body)
        return _field(self.caller, answer, lambda a: a["choices"][0]["message"]["content"] or "")


class OpenAIText(Endpoint):
    """A text interface of OpenAI's kind; it continues prompts as they are, and with ``echo`` it can score them."""

    api = "openai text"

    def _ask(self, prompt: str, n: int, stop: Sequence[str], temperature: float, seed: int | None) -> str:
        body = {"model": self.model, "prompt": prompt} | _openai_options(n, stop, temperature, seed)
        text: str = _field(self.caller, self.caller.post("completions", body), lambda a: a["choices"][0]["text"])
        return text

    def loglikelihoods(self, requests: Sequence[tuple[str, str]], *, done: Done = quietly) -> list[Read]:
        """See the module docstring.

        Raises:
            EvaluationError: the interface does not echo log-probabilities.
        """
        return self.caller.map(lambda i: self._score(*requests[i]), len(requests), done)

    def _score(self, context: str, continuation: str) -> Read:
        n_spaces = len(context) - len(context.rstrip())
        border = len(context) - n_spaces
        body = {"model": self.model, "prompt": context + continuation, "max_tokens": 1, "echo": True, "logprobs": 1}
        try:
            answer = self.caller.post("completions", body | {"temperature": 0})
        except EndpointError as error:
            if "refused" in str(error):
                raise EvaluationError(f"log-likelihoods need completions with echo and logprobs; {error}") from None
            raise
        shown = _field(self.caller, answer, lambda a: a["choices"][0].get("logprobs"))
        if not shown or not shown.get("text_offset") or len(shown["token_logprobs"]) < 2:
            raise EvaluationError(
                f"{self.caller.base} did not give log-probabilities of an echoed prompt (echo, logprobs)"
            )
        logprob, greedy, n_tokens = 0.0, True, 0
        end = len(context) + len(continuation)
        for i, offset in enumerate(shown["text_offset"]):
            if not border <= offset < end or shown["token_logprobs"][i] is None:
                continue
            own = float(shown["token_logprobs"][i])
            best = max([own, *(shown["top_logprobs"][i] or {}).values()])
            logprob, greedy, n_tokens = logprob + own, greedy and own >= best, n_tokens + 1
        if not n_tokens:
            raise EvaluationError(f"{self.caller.base} shows no token of {continuation!r} after its context")
        return Read(logprob, greedy, n_tokens)


class Anthropic(Endpoint):
    """Anthropic's messages; each prompt is a user's message."""

    api = "anthropic"

    def _ask(self, prompt: str, n: int, stop: Sequence[str], temperature: float, seed: int | None) -> str:
        body: dict[str, Any] = {"model": self.model, "max_tokens": n, "temperature": temperature}
        body["messages"] = [{"role": "user", "content": prompt}]
        stops = [s for s in stop if s.strip()]  # the interface refuses blank ones; cut() applies all
        if stops:
            body["stop_sequences"] = stops
        answer = self.caller.post("messages", body)
        return _field(
            self.caller, answer, lambda a: "".join(part["text"] for part in a["content"] if part["type"] == "text")
        )


def _openai_options(n: int, stop: Sequence[str], temperature: float, seed: int | None) -> dict[str, Any]:
    options: dict[str, Any] = {"max_tokens": n, "temperature": temperature}
    if stop:
        options["stop"] = list(stop)[:_MOST_STOPS]
    if seed is not None:
        options["seed"] = seed
    return options


def _field(caller: Caller, answer: dict[str, Any], take: Callable[[dict[str, Any]], T]) -> T:
    try:
        return take(answer)
    except (KeyError, IndexError, TypeError):
        raise EndpointError(f"{caller.base} answered in an unknown form: {str(answer)[:300]}") from None


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
    """A model behind an address.

    Args:
        address: the interface's base, up to and with /v1.
        api: openai, anthropic, or auto: anthropic if the host's name says so.
        model: what the interface calls it.
        key: instead of QUADRIGA_API_KEY.
        chat: OpenAI's chat interface instead of its text interface; Anthropic's is always chat.
        parallel: requests at once.

    Raises:
        EvaluationError: an unknown api, or no model's name.
    """
    if api not in ("auto", "openai", "anthropic"):
        raise EvaluationError(f"--api must be openai, anthropic or auto; got {api!r}")
    if model is None:
        raise EvaluationError("an interface serves many models: give the name it knows yours by with --api-model")
    if api == "auto":
        api = "anthropic" if "anthropic" in (urlsplit(address).hostname or "") else "openai"
    key = key or runtime.setting("API_KEY")
    if api == "anthropic":
        headers = {"anthropic-version": _ANTHROPIC_VERSION} | ({"x-api-key": key} if key else {})
    else:
        headers = {"authorization": f"Bearer {key}"} if key else {}
    caller = Caller(address, headers, parallel=parallel, transport=transport, sleep=sleep)
    if api == "anthropic":
        return Anthropic(caller, model)
    return (OpenAIChat if chat else OpenAIText)(caller, model)
