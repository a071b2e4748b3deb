"""What a request may say: msgspec types. A field that is not here is left out and named, or refused; see ``fields``.

Fields that clients send by habit are here with the values that ask for nothing special (``best_of=1``).
"""

from __future__ import annotations

import json
import re
from typing import Any, ClassVar, Literal, TypeVar

import msgspec
from msgspec import Struct

from quadriga.server.errors import ApiError

T = TypeVar("T")

MAX_LOGPROBS = 20
MAX_CHOICES = 128
MAX_STOPS = 16
MAX_STOP_CHARS = 4_096
"""Of one stop string. What a step may have to compare grows with the square of it."""
MAX_TOOLS = 128
MAX_BIASES = 4_096
MAX_STOP_IDS = 4_096

INLINE_BYTES = 64 << 10
"""A body up to this size takes a few milliseconds at most, whatever is in it."""

MAX_KEYS = 1 << 16
MAX_VALUES = 1 << 16
MAX_NUMBERS = 1 << 20
MAX_ESCAPES = 1 << 21
"""What a larger body may be made of. The parser holds the interpreter's lock, and with it the event loop, for some
0.7 us a key, 0.5 us a text or list and 0.02 us a backslash, in whatever thread it runs: at most 50 ms at these bounds
(measured on two shared cores with AVX2). Numbers are read by functions of ours, between which others get their turn."""

_SLICE = 1 << 18
_HALF_PAIR = re.compile(rb"\\u[dD][89a-fA-F]")


Prompts = str | list[str | int | list[int]]
"""One text, texts, one list of token ids, or lists of ids; ``completions.prompts_of`` refuses mixtures."""


class TextPart(Struct, kw_only=True, forbid_unknown_fields=True):
    """A piece of a message's content."""

    type: Literal["text", "input_text", "output_text"]
    text: str


class FunctionCall(Struct, kw_only=True, forbid_unknown_fields=True):
    """A tool call's function and its arguments: an object as a JSON text, or as it is; "" is an empty one."""

    name: str
    arguments: str | dict[str, Any]


class ToolCall(Struct, kw_only=True, forbid_unknown_fields=True):
    """A call the assistant made."""

    function: FunctionCall
    id: str | None = None
    type: Literal["function"] = "function"
    index: int | None = None


class Message(Struct, kw_only=True, forbid_unknown_fields=True):
    """One turn of a conversation."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[TextPart] | None = None
    name: str | None = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: str | None = None
    refusal: None = None
    audio: None = None
    function_call: None = None
    annotations: list[Any] | None = None
    reasoning_content: str | None = None
    """What an assistant thought before it answered; the chat template decides whether it is shown again."""
    reasoning: str | None = None
    """The same, as some servers call it."""


class Function(Struct, kw_only=True, forbid_unknown_fields=True):
    """A function the model may call; its parameters are a JSON schema."""

    name: str
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(Struct, kw_only=True, forbid_unknown_fields=True):
    """A tool."""

    type: Literal["function"]
    function: Function


class NamedFunction(Struct, kw_only=True, forbid_unknown_fields=True):
    """The name in a tool choice."""

    name: str


class NamedTool(Struct, kw_only=True, forbid_unknown_fields=True):
    """A tool choice by name."""

    type: Literal["function"]
    function: NamedFunction


class JsonSchema(Struct, kw_only=True, forbid_unknown_fields=True):
    """The schema of a ``json_schema`` response format."""

    name: str
    schema: dict[str, Any] | None = None
    description: str | None = None
    strict: bool | None = None


class ResponseFormat(Struct, kw_only=True, forbid_unknown_fields=True):
    """What an answer must look like: text, any JSON object, a JSON schema, a regular expression or a Lark grammar."""

    type: Literal["text", "json_object", "json_schema", "regex", "grammar"]
    json_schema: JsonSchema | None = None
    schema: dict[str, Any] | None = None
    """With ``json_object``: a schema, as llama.cpp and others take it."""
    regex: str | None = None
    grammar: str | None = None


class StreamOptions(Struct, kw_only=True, forbid_unknown_fields=True):
    """Options of a stream."""

    include_usage: bool = False
    include_obfuscation: Literal[False] | None = None


class SteeredExpert(Struct, kw_only=True, forbid_unknown_fields=True):
    """An expert that is switched off (factor 0), or whose odds are multiplied; ``layer`` counts layers with experts."""

    layer: int
    expert: int
    factor: float


class Sampling(Struct, kw_only=True, forbid_unknown_fields=True):
    """Fields that chat and plain completions share."""

    model: str | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    typical_p: float | None = None
    xtc_probability: float | None = None
    xtc_threshold: float | None = None
    dry_multiplier: float | None = None
    dry_base: float | None = None
    dry_allowed_length: int | None = None
    dry_penalty_last_n: int | None = None
    dry_sequence_breakers: list[str] | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    logit_bias: dict[str, float] | None = None
    seed: int | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    ignore_eos: bool = False
    max_tokens: int | None = None
    min_tokens: int | None = None
    skip_special_tokens: bool = True
    n: int | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    response_format: ResponseFormat | None = None
    priority: int = 0
    deadline_ms: int | None = None
    speculate: int | None = None
    routing: bool = False
    experts: list[SteeredExpert] | None = None
    user: str | None = None


class ChatRequest(Sampling, kw_only=True, forbid_unknown_fields=True):
    """POST /v1/chat/completions."""

    TOOL_KINDS: ClassVar[frozenset[str | None]] = frozenset({"function"})

    messages: list[Message]
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    tools: list[Tool] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    parallel_tool_calls: bool | None = None
    modalities: list[Literal["text"]] | None = None
    reasoning_effort: str | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None


class CompletionRequest(Sampling, kw_only=True, forbid_unknown_fields=True):
    """POST /v1/completions."""

    prompt: Prompts
    echo: bool | None = None
    logprobs: int | None = None
    suffix: str | None = None
    best_of: Literal[1] | None = None
    parse_special: bool = True
    add_special_tokens: bool = True


class TextDocument(Struct, kw_only=True, forbid_unknown_fields=True):
    """A document as an object."""

    text: str


class EmbeddingRequest(Struct, kw_only=True, forbid_unknown_fields=True):
    """POST /v1/embeddings."""

    input: Prompts
    model: str | None = None
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: int | None = None
    priority: int = 0
    user: str | None = None


class RerankRequest(Struct, kw_only=True, forbid_unknown_fields=True):
    """POST /v1/rerank: documents, ordered by how near they are to a query."""

    query: str
    documents: list[str | TextDocument]
    model: str | None = None
    top_n: int | None = None
    return_documents: bool = True
    priority: int = 0
    user: str | None = None


class ScoreRequest(Struct, kw_only=True, forbid_unknown_fields=True):
    """POST /v1/score: how near texts are to each other: one to many, or pair by pair."""

    text_1: str | list[str]
    text_2: str | list[str]
    model: str | None = None
    encoding_format: Literal["float"] | None = None
    priority: int = 0
    user: str | None = None


class TokenizeRequest(Struct, kw_only=True, forbid_unknown_fields=True):
    """POST /tokenize: a text, or a conversation through the chat template."""

    model: str | None = None
    prompt: str | None = None
    content: str | None = None
    """The same as ``prompt``, as llama.cpp calls it."""
    messages: list[Message] | None = None
    add_special_tokens: bool = True
    parse_special: bool = True
    tools: list[Tool] | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    return_token_strs: bool = False
    with_pieces: bool = False
    """Each token as an object of its id and text, as llama.cpp has it."""


class DetokenizeRequest(Struct, kw_only=True, forbid_unknown_fields=True):
    """POST /detokenize."""

    tokens: list[int]
    model: str | None = None


class TemplateRequest(Struct, kw_only=True, forbid_unknown_fields=True):
    """POST /apply-template: a conversation as the text the model reads."""

    messages: list[Message]
    model: str | None = None
    tools: list[Tool] | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None


def parse(raw: bytes, kind: type[T]) -> T:
    """A request body as one of the types above.

    Raises:
        ApiError: 400 that names the field and what is wrong with it.
    """
    return convert(parse_json(raw), kind)


def parse_json(raw: bytes) -> Any:
    """A body as JSON: UTF-8, no key twice, no NaN, nothing nested too deep, no lone surrogates, bounded in its parts.

    Raises:
        ApiError: 400 that says what is wrong.
    """
    read_numbers: dict[str, Any] = {}
    if len(raw) > INLINE_BYTES:
        check_parts(raw)
        read_numbers = {"parse_int": _int, "parse_float": _float}
    try:
        value = json.loads(raw.decode(), object_pairs_hook=_once, parse_constant=_no_constant, **read_numbers)
        if _may_have_half_pairs(raw):
            _check_texts(value)
    except UnicodeDecodeError:
        raise ApiError(400, "the body must be UTF-8") from None
    except UnicodeEncodeError:
        raise ApiError(400, "the body has half of a surrogate pair, which is no text") from None
    except RecursionError:
        raise ApiError(400, "the body is nested too deep") from None
    except ValueError as error:
        raise ApiError(400, f"the body must be JSON: {error}") from None
    return value


def check_parts(raw: bytes) -> None:
    """Count what a body is made of before it is parsed: in slices, and nothing is made of it.

    What follows a mistake in the JSON may be counted wrongly, which does not matter: no parser gets there.

    Raises:
        ApiError: 400 that names what there is too much of.
    """
    n_quotes = n_keys = n_lists = n_words = n_commas = n_escapes = start = 0
    while start < len(raw):
        piece = raw[start : start + _SLICE]
        if (len(piece) - len(piece.rstrip(b"\\"))) % 2:  # never between a backslash and what it escapes
            piece = raw[start : start + _SLICE + 1]
        start += len(piece)
        n_escapes += piece.count(b"\\")
        parts = piece.replace(b"\\\\", b"").replace(b'\\"', b"").split(b'"')
        outside = b"".join(parts[n_quotes % 2 :: 2])
        n_quotes += len(parts) - 1
        n_keys += outside.count(b":")
        n_commas += outside.count(b",")
        n_lists += outside.count(b"[") + outside.count(b"{")
        n_words += outside.count(b"t") + outside.count(b"f") + outside.count(b"n")  # of true, false, null
        # A piece may end after a comma, in a text, or between a key and its colon: one more than the bound may pass.
        values = max(0, n_quotes // 2 - n_keys - 1) + n_words + n_lists
        numbers = n_commas - ((n_quotes + 1) // 2 - n_keys) - n_words
        for what, n, most in (
            ("keys", n_keys, MAX_KEYS),
            ("texts, lists and objects", values, MAX_VALUES),
            ("numbers", numbers, MAX_NUMBERS),
            ("backslashes", n_escapes, MAX_ESCAPES),
        ):
            if n > most:
                raise ApiError(400, f"a body may have {most:,} {what}; this one has more. Send it in parts")


def convert(value: Any, kind: type[T]) -> T:
    """Checked JSON as one of the types above; see :func:`parse`."""
    try:
        return msgspec.convert(value, kind)
    except msgspec.ValidationError as error:
        message, _, place = str(error).partition(" - at `$")
        param = place.rstrip("`").lstrip(".") or None
        if "unknown field `" in message:
            field = message.split("`")[1]
            param = f"{param}.{field}" if param else field
            message = f"{param} is not supported"
        raise ApiError(400, f"{param}: {message}" if param and param not in message else message, param=param) from None


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    out = dict(pairs)
    if len(out) != len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise ValueError(f"the key {key[:100]!r} appears twice")
            seen.add(key)
    return out


def _may_have_half_pairs(raw: bytes) -> bool:
    """True if an escape in the body stands for half of a pair; whether the other half is beside it is not looked at.

    Nothing else makes lone surrogates: as bytes they are no UTF-8.
    """
    return any(_HALF_PAIR.search(raw, at, at + _SLICE + 4) for at in range(0, len(raw), _SLICE))


def _check_texts(value: Any) -> None:
    """Encode every text of a parsed body: UnicodeEncodeError if one of them cannot be."""
    left = [value]
    while left:
        one = left.pop()
        if isinstance(one, str):
            one.encode()
        elif isinstance(one, list):
            left.extend(one)
        elif isinstance(one, dict):
            left.extend(one)
            left.extend(one.values())


def _int(digits: str) -> int:
    """What json does by itself, as a function of Python's: between two of them another thread may have its turn."""
    return int(digits)


def _float(digits: str) -> float:
    return float(digits)


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is no JSON number")
