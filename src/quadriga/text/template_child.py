"""The program that renders chat templates, run as a process of its own by :mod:`quadriga.text.template_process`.

It knows nothing of Quadriga: Python's own library and jinja2 are all that is on its path. The environment is the one
transformers 4.57.6 gives templates (utils/chat_template_utils.py there), so what a template means here is what it meant
where the model was trained. What is ours is the cage:

    memory     RLIMIT_AS of each request, above what the program itself takes
    time       an interval timer of processor time for each rendering; its signal ends the process, whatever the
               interpreter is busy with (one call of C can take minutes and answers no Python signal handler)
    output     counted as it is made
    the rest   root becomes nobody; no file or socket can be opened (RLIMIT_NOFILE 0), no file written (RLIMIT_FSIZE 0),
               no process started (RLIMIT_NPROC 0)

One request and one answer at a time, on file descriptors 0 and 1, each as length and JSON (:data:`HEAD`, :data:`LENGTH`
there). At the end of its input the program ends, so it does not outlive the process that started it.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import resource
import signal
import struct
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

HEAD = struct.Struct("<QQ")
"""Of a request: bytes of memory it may take, bytes of JSON that follow."""
LENGTH = struct.Struct("<Q")
"""Of an answer: bytes of JSON that follow."""

_IN, _OUT = 0, 1
_NOBODY = 65534
_KEPT_TEMPLATES = 8
_MAX_REASON = 300


class _TooLong(Exception):
    """A rendering has more characters than it may."""


def main() -> None:
    """Answer requests until the input ends."""
    environment = _environment()
    own_bytes = _prepare()
    templates: dict[str, Any] = {}
    while head := _read(HEAD.size):
        memory_bytes, n_bytes = HEAD.unpack(head)
        _limit(resource.RLIMIT_AS, own_bytes + memory_bytes, hard=False)
        answer = _answer(environment, templates, n_bytes)
        signal.setitimer(signal.ITIMER_PROF, 0)
        raw = json.dumps(answer, ensure_ascii=False).encode("utf-8", "surrogatepass")
        _write(LENGTH.pack(len(raw)) + raw)


def _environment() -> Any:
    """Jinja2's sandbox as transformers sets it up."""
    import jinja2
    import jinja2.ext
    import jinja2.sandbox
    from jinja2 import nodes, parser

    class Generation(jinja2.ext.Extension):
        """``{% generation %}``: what it encloses is rendered; transformers' training also notes where it lies."""

        tags = {"generation"}  # noqa: RUF012 (jinja2 wants a set of the class)

        def parse(self, parser: parser.Parser) -> nodes.Node:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return nodes.CallBlock(self.call_method("_enclosed"), [], [], body).set_lineno(line)

        @staticmethod
        def _enclosed(caller: Callable[[], str]) -> str:
            return caller()

    def raise_exception(message: str) -> None:
        raise jinja2.exceptions.TemplateError(message)

    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = _strftime_now
    return environment


def _to_json(
    x: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    return json.dumps(x, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _strftime_now(format: str) -> str:  # the parameter's name is part of what templates may write
    return datetime.datetime.now().strftime(format)


def _prepare() -> int:
    """Load what Python and jinja2 load on demand, close the doors; returns the bytes of address space taken so far."""
    import encodings.unicode_escape
    import html
    import textwrap
    import unicodedata

    import jinja2.constants
    import jinja2.debug

    assert encodings.unicode_escape and unicodedata, "of string literals"
    assert html and textwrap and jinja2.constants and jinja2.debug, "of striptags, wordwrap, lipsum and errors"
    time.localtime()  # reads the time zone's file
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGPROF})
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[0])
    except OSError:  # not Linux: the system does not say, and macOS does not hold to the limit either
        pages = 0
    with contextlib.suppress(OSError):  # root may lift limits, so it becomes nobody; there may be none to become
        if os.geteuid() == 0:
            os.setgroups([])
            os.setgid(_NOBODY)
            os.setuid(_NOBODY)
    for what in (resource.RLIMIT_NOFILE, resource.RLIMIT_FSIZE, resource.RLIMIT_NPROC, resource.RLIMIT_CORE):
        _limit(what, 0, hard=True)
    return pages * resource.getpagesize()


def _limit(what: int, value: int, *, hard: bool) -> None:
    """Lower a limit; one that is already lower stays."""
    most = resource.getrlimit(what)[1]
    allowed = value if most == resource.RLIM_INFINITY else min(value, most)
    with contextlib.suppress(OSError, ValueError):  # macOS refuses some of them
        resource.setrlimit(what, (allowed, allowed if hard else most))


def _answer(environment: Any, templates: dict[str, Any], n_bytes: int) -> dict[str, Any]:
    """{"texts": [...]}, or {"error": "template" | "memory" | "length", "reason": ...}."""
    import jinja2

    try:
        request = json.loads(_read(n_bytes).decode("utf-8", "surrogatepass"))
        return {"texts": _rendered(environment, templates, request)}
    except MemoryError:
        return {"error": "memory", "reason": ""}
    except _TooLong:
        return {"error": "length", "reason": ""}
    except jinja2.TemplateSyntaxError as error:
        return {"error": "template", "reason": _first_line(f"line {error.lineno}: {error.message}")}
    except jinja2.TemplateError as error:
        return {"error": "template", "reason": _first_line(str(error.message or type(error).__name__))}
    except RecursionError:
        return {"error": "template", "reason": "it calls itself too deeply"}
    except Exception as error:  # what a template can raise has no bounds, and all of it is the template's
        return {"error": "template", "reason": _first_line(f"{type(error).__name__}: {error}")}


def _rendered(environment: Any, templates: dict[str, Any], request: Mapping[str, Any]) -> list[str]:
    source, cpu_s = request["source"], request["cpu_s"]
    signal.setitimer(signal.ITIMER_PROF, cpu_s)
    template = templates.get(source)
    if template is None:
        if len(templates) >= _KEPT_TEMPLATES:
            templates.clear()
        template = templates[source] = environment.from_string(source)
    texts = []
    for n_messages, add_generation_prompt in request["jobs"]:
        signal.setitimer(signal.ITIMER_PROF, cpu_s)
        pieces, n = [], 0
        variables = {"messages": request["messages"][:n_messages], "add_generation_prompt": add_generation_prompt}
        for piece in template.generate({**request["variables"], **variables}):
            pieces.append(piece)
            n += len(piece)
            if n > request["chars"]:
                raise _TooLong
        texts.append("".join(pieces))
    return texts


def _first_line(text: str) -> str:
    lines = text[: 4 * _MAX_REASON].splitlines()
    return lines[0][:_MAX_REASON] if lines else ""


def _read(n: int) -> bytes:
    """Exactly n bytes, or none at the end of the input."""
    parts = []
    while n:
        part = os.read(_IN, min(n, 1 << 20))
        if not part:
            return b""
        parts.append(part)
        n -= len(part)
    return b"".join(parts)


def _write(raw: bytes) -> None:
    view = memoryview(raw)
    while view:
        view = view[os.write(_OUT, view) :]


if __name__ == "__main__":
    main()
