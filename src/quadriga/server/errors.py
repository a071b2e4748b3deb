"""Errors as HTTP answers, in the shapes that OpenAI's and Anthropic's clients read."""

from __future__ import annotations

from typing import Any

from quadriga.errors import BusyError, EngineError, GrammarError, InputError, QuadrigaError

RETRY_AFTER_S = 1
_MAX_MESSAGE = 2_000
"""Characters. What a client sent may be part of a message, but not megabytes of it."""

_OPENAI_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    429: "rate_limit_error",
    503: "service_unavailable_error",
}
_ANTHROPIC_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
}


class ApiError(QuadrigaError):
    """An answer other than 200.

    Attributes:
        status: the HTTP status.
        param: the field that is wrong, e.g. "messages[0].content".
        code: a name for programs, e.g. "context_length_exceeded".
        retry_after_s: with 429 and 503, when to try again.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        retry_after_s: float | None = None,
    ) -> None:
        super().__init__(_shortened(message))
        self.status, self.code, self.retry_after_s = status, code, retry_after_s
        self.param = None if param is None else _shortened(param)

    @property
    def headers(self) -> dict[str, str]:
        """Headers that belong to the status."""
        headers = {"retry-after": str(max(1, round(self.retry_after_s)))} if self.retry_after_s is not None else {}
        if self.status in (501, 504):
            headers["x-should-retry"] = "false"  # OpenAI's and Anthropic's clients would ask again, for the same answer
        if self.status == 401:
            headers["www-authenticate"] = "Bearer"
        return headers

    def openai(self) -> dict[str, Any]:
        """The body OpenAI's clients read."""
        kind = _OPENAI_TYPES.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}

    def anthropic(self) -> dict[str, Any]:
        """The body Anthropic's clients read."""
        kind = _ANTHROPIC_TYPES.get(self.status, "invalid_request_error" if self.status < 500 else "api_error")
        return {"type": "error", "error": {"type": kind, "message": str(self)}}

    def body(self, path: str) -> dict[str, Any]:
        """The body for whoever asks at this path."""
        if path.startswith("/api/"):
            return {"error": str(self)}  # Ollama's
        return self.anthropic() if "/messages" in path else self.openai()


def _shortened(text: str) -> str:
    return text if len(text) <= _MAX_MESSAGE else f"{text[:_MAX_MESSAGE]}... ({len(text)} characters)"


def as_api_error(error: QuadrigaError) -> ApiError:
    """What one of our errors is over HTTP."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, BusyError):
        return ApiError(429, str(error), code="queue_full", retry_after_s=RETRY_AFTER_S)
    if isinstance(error, GrammarError):
        return ApiError(400, str(error), code="invalid_grammar")
    if isinstance(error, InputError):
        code = "context_length_exceeded" if "context" in str(error) else None
        return ApiError(400, str(error), code=code)
    if isinstance(error, EngineError):
        return ApiError(503, str(error), code="engine_error", retry_after_s=RETRY_AFTER_S)
    return ApiError(500, str(error))


def as_bug(error: Exception) -> ApiError:
    """What a mistake of ours is over HTTP: its kind, not its text, which may hold anything."""
    return ApiError(500, f"a mistake in the server ({type(error).__name__}); its log says more")
