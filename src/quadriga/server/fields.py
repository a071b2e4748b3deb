"""Fields of a request that its type does not have.

Clients send fields that were made for other servers. Most of them change nothing that is asked (a cache key, a hint
about effort), so they are left out, and named in the answer's ``x-quadriga-ignored`` header. Those in :data:`REFUSED`
say what the answer must be made of or look like: without them it would be the answer to another question, so they are
a 400 with the reason. ``--strict`` refuses both.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from typing import Any, TypeVar

import msgspec
from msgspec import inspect

from quadriga.server.errors import ApiError
from quadriga.server.schema import convert, parse_json

T = TypeVar("T")

HEADER = "x-quadriga-ignored"
MAX_HEADER = 1_000
"""Characters of the header; more names than fit are counted."""

_log = logging.getLogger(__name__)

_FORMAT = "the answer's form is asked for with response_format (regex and Lark grammars too)"
_STATE = "nothing is stored between requests: send the whole conversation"
_TEXT = "this model reads and writes text"

REFUSED: dict[str, str] = {
    "functions": "it is the old name of tools",
    "function_call": "it is the old name of tool_choice",
    **dict.fromkeys(
        (
            "guided_json",
            "guided_regex",
            "guided_choice",
            "guided_grammar",
            "structured_outputs",
            "json_schema",
            "grammar",
        ),
        _FORMAT,
    ),
    "bad_words": "words cannot be forbidden; logit_bias can forbid token ids",
    "banned_strings": "words cannot be forbidden; logit_bias can forbid token ids",
    "allowed_token_ids": "give logit_bias, or a response_format of type regex",
    "logits_processors": "programs in requests are not run",
    "use_beam_search": "answers are sampled; ask for n of them",
    "previous_response_id": _STATE,
    "conversation": _STATE,
    "context": "give the conversation as messages; token ids of an earlier answer are no prompt here",
    "background": "answers are not kept to be fetched later; stream them",
    "documents": "put the documents into a message",
    "data_sources": "put what is to be read into a message",
    "web_search_options": "this server does not search the web",
    "mcp_servers": "this server calls no other servers",
    "container": "this server runs no code",
    "chat_template": "templates come with the model, never with a request",
    "prompt_embeds": "give a text or token ids",
    "image_data": _TEXT,
    "images": _TEXT,
    "audio": _TEXT,
    "prediction": "give speculate, which guesses from the conversation itself",
}
"""Name of a field of a body -> why it is not left out."""

Found = list[str]
_Walk = Callable[[Any, str, Found], None]


def read(raw: bytes, kind: type[T], *, strict: bool = False) -> tuple[T, list[str]]:
    """A request's body as its type, and the fields that were left out.

    Args:
        strict: refuse what the type does not have, whatever it is.

    Raises:
        ApiError: 400 that names the field and what is wrong with it.
    """
    return checked(parse_json(raw), kind, strict=strict)


def checked(body: Any, kind: type[T], *, strict: bool = False) -> tuple[T, list[str]]:
    """The same for a body that has been parsed; it is changed in place."""
    ignored = [] if strict else prune(body, kind)
    return convert(body, kind), ignored


def prune(body: Any, kind: type) -> list[str]:
    """Take out of a parsed JSON body what the msgspec type has no field for, and tools of kinds it does not know.

    Args:
        body: changed in place.
        kind: the type of the request. Its class variable ``TOOL_KINDS``, where it has one, is the set of ``type`` that
            its tools may have (None: no type); ``REFUSED`` are fields that mean something in its interface only.

    Returns:
        What was taken out: places such as ``tools[0].cache_hint``.

    Raises:
        ApiError: 400, a field whose absence would change what is asked.
    """
    found: Found = []
    if not isinstance(body, dict):
        return found
    refused = _refused_of(kind)
    for name in refused.keys() & body.keys():
        if not _asks_nothing(body[name]):
            raise ApiError(400, f"{name} is not supported: {refused[name]}", param=name)
    kinds = getattr(kind, "TOOL_KINDS", None)
    if kinds is not None and isinstance(body.get("tools"), list):
        body["tools"] = [tool for i, tool in enumerate(body["tools"]) if _is_of(tool, kinds, f"tools[{i}]", found)]
    walk = _walk_of(kind)
    if walk is not None:
        walk(body, "", found)
    return found


def header(ignored: list[str]) -> str:
    """Names as the header has them: in ASCII, commas between, the first ones where there are many."""
    shown: list[str] = []
    length = 0
    for name in ignored:
        text = name.encode("ascii", "backslashreplace").decode().replace(",", " ")
        text = "".join(c if c.isprintable() else " " for c in text)[:100]
        length += len(text) + 2
        if length > MAX_HEADER:
            shown.append(f"and {len(ignored) - len(shown)} more")
            break
        shown.append(text)
    return ", ".join(shown)


class Once:
    """Says in the log, once for each name, what was left out."""

    MAX_NAMES = 1_000

    def __init__(self) -> None:
        self._said: set[str] = set()

    def say(self, path: str, ignored: list[str]) -> None:
        """Note the names that have not been noted before."""
        for name in ignored:
            plain = "".join("" if c.isdigit() else c for c in name[:100])
            if plain not in self._said and len(self._said) < self.MAX_NAMES:
                self._said.add(plain)
                _log.debug("%s: %s has no meaning here and was left out", path, name[:100])


def _asks_nothing(value: Any) -> bool:
    return value is None or value is False or value in ("", "none") or value == [] or value == {}


def _is_of(tool: Any, kinds: frozenset[str | None], place: str, found: Found) -> bool:
    """False for a tool that only its own maker's server can run."""
    kind = tool.get("type") if isinstance(tool, dict) else None
    if not isinstance(kind, str) or kind in kinds:
        return True
    found.append(f"{place} ({kind[:60]})")
    return False


@functools.cache
def _refused_of(kind: type) -> dict[str, str]:
    """Those of :data:`REFUSED` that the type has no field for, and its own."""
    own = {field.encode_name for field in msgspec.structs.fields(kind)}
    return {name: why for name, why in (REFUSED | getattr(kind, "REFUSED", {})).items() if name not in own}


@functools.cache
def _walk_of(kind: Any) -> _Walk | None:
    return _walk(inspect.type_info(kind))


def _walk(info: inspect.Type) -> _Walk | None:
    """What looks through a value of the type, or None where nothing can be taken out of it."""
    if isinstance(info, inspect.StructType):
        return _through_struct(info)
    if isinstance(info, (inspect.ListType, inspect.VarTupleType)):
        return _through_list(_walk(info.item_type))
    if isinstance(info, inspect.UnionType):
        return _through_union(info)
    return None


def _through_struct(info: inspect.StructType) -> _Walk:
    parts = {field.encode_name: _walk(field.type) for field in info.fields}
    nullable = {field.encode_name for field in info.fields if field.required or _takes_null(field.type)}
    if info.tag_field is not None:
        parts[info.tag_field] = None

    def walk(value: Any, place: str, found: Found) -> None:
        if not isinstance(value, dict):
            return
        for name in [name for name in value if name not in parts]:
            if not _asks_nothing(value.pop(name)):
                found.append(_inside(place, name))
        for name in [name for name, item in value.items() if item is None and name not in nullable]:
            del value[name]  # as if it were not there
        for name, item in value.items():
            part = parts[name]
            if part is not None:
                part(item, _inside(place, name), found)

    return walk


def _takes_null(info: inspect.Type) -> bool:
    return info in (inspect.NoneType(), inspect.AnyType()) or (
        isinstance(info, inspect.UnionType) and inspect.NoneType() in info.types
    )


def _through_list(item: _Walk | None) -> _Walk | None:
    if item is None:
        return None

    def walk(value: Any, place: str, found: Found) -> None:
        if isinstance(value, list):
            for i, one in enumerate(value):
                item(one, f"{place}[{i}]", found)

    return walk


def _through_union(info: inspect.UnionType) -> _Walk | None:
    structs = [one for one in info.types if isinstance(one, inspect.StructType)]
    lists = [one for one in info.types if isinstance(one, inspect.ListType)]
    of_list = _walk(lists[0]) if lists else None
    of_dict = {one.tag: _through_struct(one) for one in structs}
    if of_list is None and not of_dict:
        return None
    tag_field = structs[0].tag_field if structs else None

    def walk(value: Any, place: str, found: Found) -> None:
        if isinstance(value, list) and of_list is not None:
            of_list(value, place, found)
        elif isinstance(value, dict) and of_dict:
            tag = value.get(tag_field) if tag_field is not None else None
            if tag is None and len(of_dict) == 1:
                next(iter(of_dict.values()))(value, place, found)
            elif isinstance(tag, str) and tag in of_dict:
                of_dict[tag](value, place, found)

    return walk


def _inside(place: str, name: str) -> str:
    shown = name if len(name) <= 100 else name[:97] + "..."
    return f"{place}.{shown}" if place else shown
