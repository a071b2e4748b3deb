"""The program that tries grammars, run as a process of its own by :mod:`quadriga.text.grammar_trial`.

It knows nothing of Quadriga: Python's own library and llguidance are all that is on its path. A grammar is compiled and
asked for its first tokens, as the server will do after it, but here the kernel keeps bounds: a timer of processor time
whose signal ends the process, a limit of address space, and a small stack, so that what is nested too deeply fails
here and not where requests are served.

Messages are a length and JSON, on file descriptors 0 and 1: first the vocabulary, then grammars one by one. At the end
of its input the program ends, so it does not outlive the process that started it.
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import signal
import struct
import threading
from pathlib import Path
from typing import Any

LENGTH = struct.Struct("<Q")

STACK_BYTES = 4 << 20
"""Less than any thread has that will use the grammar: what fits here fits there."""


def main() -> None:
    """Try grammars until the input ends."""
    setup = receive()
    if setup is None:
        return
    os.nice(setup["nice"])
    tokens = _vocabulary(setup)
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    for what in (resource.RLIMIT_CORE, resource.RLIMIT_FSIZE):
        _limit(what, 0)
    _limit(resource.RLIMIT_AS, _own_bytes() + setup["memory_bytes"])
    threading.stack_size(STACK_BYTES)
    send({"ready": True})
    while (grammar := receive()) is not None:
        answer: dict[str, Any] = {}
        signal.setitimer(signal.ITIMER_PROF, setup["cpu_s"])
        thread = threading.Thread(target=_try, args=(tokens, setup["limits"], grammar, answer))
        thread.start()
        thread.join()
        signal.setitimer(signal.ITIMER_PROF, 0)
        send(answer)


def _vocabulary(setup: dict[str, Any]) -> Any:
    import llguidance

    class Words:
        tokens = [text.encode("latin-1") for text in setup["tokens"]]  # noqa: RUF012 (read by llguidance)
        special_token_ids = setup["special"]
        eos_token_id, bos_token_id = setup["end"][0], setup["bos"]

        def __call__(self, text: str | bytes) -> list[int]:
            if isinstance(text, bytes):
                raise TypeError("texts only")  # llguidance asks whether it may give bytes
            # Asked where a grammar allows one text only. Not as the model's own vocabulary cuts it, but as quick.
            greedy: list[int] = made[0].greedy_tokenize(text) if made else []
            return greedy

    made: list[Any] = []
    words = llguidance.TokenizerWrapper(Words())
    made.append(llguidance.LLTokenizer(words, n_vocab=len(Words.tokens), eos_token=setup["end"]))
    return made[0]


def _try(tokens: Any, limits: dict[str, int], grammar: dict[str, str], answer: dict[str, Any]) -> None:
    """Fill in {"error": None or what is wrong}."""
    try:
        matcher = compile_matcher(tokens, grammar["kind"], grammar["text"], limits)
        matcher.compute_logit_bias()
        answer["error"] = matcher.get_error() if matcher.is_error() else None
    except MemoryError:
        answer["error"] = "it takes too much memory"
    except BaseException as error:  # a panic in Rust is no Exception; whatever it is, it is the grammar's
        answer["error"] = str(error) or type(error).__name__


def compile_matcher(tokens: Any, kind: str, text: str, limits: dict[str, int]) -> Any:
    """A matcher at its beginning; one that is in error where the grammar cannot be used.

    Raises:
        ValueError: the grammar cannot be read.
    """
    import llguidance

    sources: dict[str, Any] = {
        "json": llguidance.LLMatcher.grammar_from_json_schema,
        "regex": llguidance.LLMatcher.grammar_from_regex,
        "lark": llguidance.LLMatcher.grammar_from_lark,
    }
    options: dict[str, Any] = {**limits, "verbose_errors": False}
    parser_limits = llguidance.LLParserLimits(**options)
    return llguidance.LLMatcher(tokens, sources[kind](text), log_level=0, limits=parser_limits)


def receive(source: int = 0) -> Any:
    """The next message, or None at the end of the input."""
    head = _read(source, LENGTH.size)
    return None if head is None else json.loads(_read(source, LENGTH.unpack(head)[0]) or b"null")


def send(message: dict[str, Any], target: int = 1) -> None:
    """Write a message."""
    raw = json.dumps(message).encode()
    view = memoryview(LENGTH.pack(len(raw)) + raw)
    while view:
        view = view[os.write(target, view) :]


def _read(source: int, n: int) -> bytes | None:
    parts = []
    while n:
        part = os.read(source, min(n, 1 << 20))
        if not part:
            return None
        parts.append(part)
        n -= len(part)
    return b"".join(parts)


def _own_bytes() -> int:
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[0])
    except OSError:  # not Linux: the system does not say, and macOS does not hold to the limit either
        pages = 0
    return pages * resource.getpagesize()


def _limit(what: int, value: int) -> None:
    """Lower a limit; one that is already lower stays."""
    most = resource.getrlimit(what)[1]
    allowed = value if most == resource.RLIM_INFINITY else min(value, most)
    with contextlib.suppress(OSError, ValueError):  # macOS refuses some of them
        resource.setrlimit(what, (allowed, allowed))


if __name__ == "__main__":
    main()
