"""A model behind an address, for ``quadriga chat --url``: any server with OpenAI's chat interface."""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from quadriga.cli.rules import is_address
from quadriga.errors import QuadrigaError, RequestError

if TYPE_CHECKING:
    from quadriga.engine.request import SamplingParams

TIMEOUT_S = 600.0
"""Between two pieces of an answer; a long prompt on a slow machine takes its time."""
_LIST_TIMEOUT_S = 10.0
_MAX_ERROR = 300


@dataclass(frozen=True)
class Piece:
    """A piece of an answer."""

    text: str
    finish_reason: str | None = None


class RemoteModel:
    """What a conversation needs of a model, over HTTP.

    Args:
        url: the server's address, with or without /v1.
        key: sent as a bearer token.
        model: what the server calls it; None takes the first of its list.

    Raises:
        RequestError: the address is none, nothing answers there, or it has no such interface.
    """

    expert_store = None

    def __init__(self, url: str, key: str | None = None, model: str | None = None) -> None:
        if not is_address(url):
            raise RequestError(f"--url must be an address such as http://127.0.0.1:8000, got {url!r}")
        self._base = url.rstrip("/").removesuffix("/v1") + "/v1"
        self._headers = {"content-type": "application/json"}
        if key is not None:
            if not (key.isascii() and key.isprintable()):
                raise RequestError("--api-key must be printable ASCII")
            self._headers["authorization"] = f"Bearer {key}"
        self.name = model or self._first_model()

    def _first_model(self) -> str:
        with self._open("/models", None, _LIST_TIMEOUT_S) as answer:
            try:
                return str(json.load(answer)["data"][0]["id"])
            except (ValueError, LookupError, TypeError):
                raise RequestError(f"{self._base}/models lists no model: give --api-model NAME") from None

    def chat_stream(
        self, messages: Sequence[dict[str, str]], params: SamplingParams | None = None
    ) -> Generator[Piece, None, None]:
        """The answer to a conversation as it comes.

        Raises:
            RequestError: the server refuses it, or does not answer as one with this interface does.
        """
        body = {"model": self.name, "messages": list(messages), "stream": True, **_fields(params)}
        answer = self._open("/chat/completions", json.dumps(body).encode(), TIMEOUT_S)
        return self._pieces(answer)

    def _pieces(self, answer: Any) -> Generator[Piece, None, None]:
        reason = None
        with answer:
            try:
                for line in answer:
                    if not line.startswith(b"data:"):
                        continue
                    data = line[5:].strip()
                    if data == b"[DONE]":
                        break
                    event = json.loads(data)
                    if "error" in event:
                        raise RequestError(f"{self._base} says: {_message(event)}")
                    for choice in event.get("choices", []):
                        reason = choice.get("finish_reason") or reason
                        if text := choice.get("delta", {}).get("content"):
                            yield Piece(text)
            except (OSError, ValueError, AttributeError) as error:
                raise RequestError(f"the answer of {self._base} broke off: {error}") from None
        if reason is None:
            raise RequestError(f"the answer of {self._base} broke off before its end")
        yield Piece("", reason)

    def _open(self, path: str, body: bytes | None, timeout_s: float) -> Any:
        request = urllib.request.Request(self._base + path, data=body, headers=self._headers)
        try:
            return urllib.request.urlopen(request, timeout=timeout_s)
        except urllib.error.HTTPError as error:
            with error:
                raw = error.read(1 << 16)
            try:
                said = _message(json.loads(raw))
            except ValueError:
                said = error.reason
            raise RequestError(f"{self._base} says ({error.code}): {said}") from None
        except (OSError, ValueError) as error:
            reason = getattr(error, "reason", error)
            raise RequestError(
                f"nothing answers at {self._base}: {reason}. Is the server running? (quadriga serve)"
            ) from None


def _message(body: Any) -> str:
    error = body.get("error", body) if isinstance(body, dict) else body
    said = error.get("message", error) if isinstance(error, dict) else error
    return str(said)[:_MAX_ERROR]


def _fields(params: SamplingParams | None) -> dict[str, Any]:
    """Sampling as the interface has it; what is as it is anyway is not sent, as some servers refuse what they lack."""
    from quadriga.engine.request import SamplingParams

    if params is None:
        return {}
    plain = SamplingParams()
    fields: dict[str, Any] = {"max_tokens": params.max_new_tokens, "temperature": params.temperature}
    for name in (
        *("top_k", "top_p", "min_p", "seed", "speculate"),
        *("repetition_penalty", "presence_penalty", "frequency_penalty"),
    ):
        if getattr(params, name) != getattr(plain, name):
            fields[name] = getattr(params, name)
    if params.stop:
        fields["stop"] = list(params.stop)
    if params.logit_bias:
        fields["logit_bias"] = {str(token): bias for token, bias in params.logit_bias.items()}
    return fields


def running_models(url: str, key: str | None = None) -> list[dict[str, Any]]:
    """What a server serves, as its own list says.

    Raises:
        QuadrigaError: nothing answers there.
    """
    served = RemoteModel(url, key, model="-")
    with served._open("/models", None, _LIST_TIMEOUT_S) as answer:
        try:
            return list(json.load(answer)["data"])
        except (ValueError, LookupError, TypeError):
            raise QuadrigaError(f"{url} does not list models as OpenAI's interface does") from None
