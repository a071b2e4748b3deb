"""Chat templates rendered in processes of their own, so that none can harm the one that serves.

    render_texts ──► a slot ──► a child (template_child.py) ──► texts, or one TemplateError

A template is a program from a model file. Jinja2 runs it as its writers meant it, but has no bounds: one filter can
take all memory, one product minutes, and both hold the interpreter's lock. So it runs where the kernel keeps bounds. A
child is started with the first rendering (about 0.1 s) and kept: a rendering then costs about 0.3 ms more than jinja2
itself. One that went over a bound is ended and replaced.

A child is a fresh program (no fork of a process with threads), inherits no file descriptor but its end of a socket
pair, gets next to no environment, and ends when that socket closes, which the kernel does however the parent ends.
"""

from __future__ import annotations

import atexit
import contextlib
import importlib.util
import json
import os
import queue
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from quadriga import runtime
from quadriga.errors import TemplateError
from quadriga.text.template_child import HEAD, LENGTH

Job = tuple[int, bool]
"""One rendering: how many of the messages, and whether to add the generation prompt."""

_CHILDREN = 2
"""Renderings at once. They take well under a millisecond; a second child lets others past one that takes its time."""
_BOOT = "import sys, runpy; sys.path += sys.argv[2:]; runpy.run_path(sys.argv[1], run_name='__main__')"
_KEPT_VARIABLES = ("TZ", "LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH")
"""What strftime_now reads, and what a Python of an unusual place may need to start."""
_GUARD_S = 60.0
"""Against a child that is stopped or swapped out: one that computes is ended by its processor time long before."""
_GUARD_PER_CPU_S = 60.0


@dataclass(frozen=True, kw_only=True)
class Budget:
    """What a rendering may take."""

    cpu_s: float
    """Seconds of processor time."""
    memory_bytes: int
    """Address space beyond the program's own."""
    chars: int
    """Characters of the text it makes."""


class _GoneError(Exception):
    """The child ended without an answer."""

    def __init__(self, status: int, said: str) -> None:
        super().__init__(said)
        self.status, self.said = status, said


class _Child:
    """One running child. Used by one thread at a time."""

    def __init__(self) -> None:
        environment = runtime.child_environment()
        ours, theirs = socket.socketpair()
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-I", "-S", "-B", "-X", "utf8", "-c", _BOOT, *_paths()],
                stdin=theirs.fileno(),
                stdout=theirs.fileno(),
                stderr=subprocess.PIPE,
                cwd="/",
                env={name: environment[name] for name in _KEPT_VARIABLES if name in environment},
                start_new_session=True,  # Ctrl-C in the terminal is for the program, not for this child
            )
        except OSError as error:
            ours.close()
            raise TemplateError(f"cannot start the process that renders chat templates: {error}") from None
        finally:
            theirs.close()
        self._socket = ours
        self.pid = self._process.pid
        self.n_answers = 0

    def ask(self, request: bytes, budget: Budget, n_jobs: int) -> dict[str, Any]:
        """Send one request, wait for its answer.

        Raises:
            _GoneError: it ended instead.
            TimeoutError: it did neither.
        """
        deadline = time.monotonic() + _GUARD_S + _GUARD_PER_CPU_S * budget.cpu_s * n_jobs
        try:
            self._socket.settimeout(deadline - time.monotonic())
            self._socket.sendall(HEAD.pack(budget.memory_bytes, len(request)) + request)
            n_bytes = LENGTH.unpack(self._receive(LENGTH.size, deadline))[0]
            if n_bytes > n_jobs * (6 * budget.chars + 64) + 8192:  # 6 bytes: JSON's longest way to write a character
                raise ConnectionError("an answer longer than any")
            answer: dict[str, Any] = json.loads(self._receive(n_bytes, deadline).decode("utf-8", "surrogatepass"))
        except (ConnectionError, ValueError) as error:
            raise self._gone(str(error)) from None
        self.n_answers += 1
        return answer

    def _receive(self, n: int, deadline: float) -> bytes:
        parts = []
        while n:
            self._socket.settimeout(max(0.001, deadline - time.monotonic()))
            part = self._socket.recv(min(n, 1 << 20))
            if not part:
                raise ConnectionError
            parts.append(part)
            n -= len(part)
        return b"".join(parts)

    def _gone(self, said: str) -> _GoneError:
        self._socket.close()  # if it runs on after all, this ends it
        try:
            status = self._process.wait(timeout=_GUARD_S)
        except subprocess.TimeoutExpired:
            status = -signal.SIGKILL
            self.end()
        assert self._process.stderr is not None
        lines = self._process.stderr.read().decode(errors="replace").splitlines()
        return _GoneError(status, lines[-1][:300] if lines else said)

    def end(self) -> None:
        """End it now."""
        self._socket.close()
        self._process.kill()
        self._process.wait()
        if self._process.stderr is not None:
            self._process.stderr.close()

    def forget(self) -> None:
        """Let go of a child that belongs to the process this one was forked from."""
        self._socket.close()
        if self._process.stderr is not None:
            self._process.stderr.close()
        self._process.returncode = 0  # it is not ours to wait for


class _Children:
    """The children of this process: a slot each, filled when it is first needed."""

    def __init__(self) -> None:
        self._begin()

    def _begin(self) -> None:
        self._slots: queue.LifoQueue[_Child | None] = queue.LifoQueue()  # the one used last is used next
        for _ in range(_CHILDREN):
            self._slots.put(None)
        self._alive: set[_Child] = set()
        self._lock = threading.Lock()
        self.n_started = 0

    def ask(self, request: bytes, budget: Budget, n_jobs: int) -> dict[str, Any]:
        """An answer from whichever child is free; see :meth:`_Child.ask`."""
        child = self._slots.get()
        try:
            while True:
                child = child or self._start()
                fresh = child.n_answers == 0
                answer, gone = self._try(child, request, budget, n_jobs)
                if answer is not None and answer.get("error") != "memory":
                    return answer
                child = None
                # Memory that earlier requests left in a child, and its end by somebody's hand while it waited, say
                # nothing of this request: only what happens to a fresh one does.
                if fresh or (gone is not None and gone.status == -signal.SIGPROF):
                    if gone is not None:
                        raise gone
                    assert answer is not None, "a child answers or is gone"
                    return answer
        except BaseException:
            child = None
            raise
        finally:
            self._slots.put(child)

    def _try(
        self, child: _Child, request: bytes, budget: Budget, n_jobs: int
    ) -> tuple[dict[str, Any] | None, _GoneError | None]:
        """(answer, None) or (None, how it ended); a child that cannot be used again is ended."""
        good = False
        try:
            answer = child.ask(request, budget, n_jobs)
            good = answer.get("error") != "memory"
            return answer, None
        except _GoneError as gone:
            return None, gone
        finally:
            if not good:
                self._end(child)

    def warm(self) -> None:
        """Start a child if none is running, without waiting for it."""
        with contextlib.suppress(queue.Empty):
            child = self._slots.get_nowait()
            try:
                child = child or self._start()
            finally:
                self._slots.put(child)

    def _start(self) -> _Child:
        child = _Child()
        with self._lock:
            self._alive.add(child)
            self.n_started += 1
        return child

    def _end(self, child: _Child) -> None:
        with self._lock:
            self._alive.discard(child)
        child.end()

    def pids(self) -> list[int]:
        """Of the children that run."""
        with self._lock:
            return [child.pid for child in self._alive]

    def end(self) -> None:
        """End all of them."""
        for child in list(self._alive):
            self._end(child)

    def forget(self) -> None:
        """After a fork: their sockets are the other process's."""
        for child in self._alive:
            child.forget()
        self._begin()


children = _Children()
"""Of this process."""

atexit.register(children.end)
os.register_at_fork(after_in_child=children.forget)


def render_texts(
    source: str,
    variables: Mapping[str, object],
    messages: Sequence[Mapping[str, object]],
    jobs: Sequence[Job],
    budget: Budget,
) -> list[str]:
    """Render the first n of ``messages`` for each of ``jobs``.

    Args:
        source: the template.
        variables: what it may read besides messages and add_generation_prompt; like messages, only what JSON can hold.
        budget: of each job. Its memory is for all of them, one after another.

    Raises:
        TemplateError: the template fails, or goes over its budget.
    """
    fields = {"source": source, "variables": variables, "messages": messages, "jobs": jobs}
    limits = {"cpu_s": budget.cpu_s, "chars": budget.chars}
    request = json.dumps({**fields, **limits}, ensure_ascii=False).encode("utf-8", "surrogatepass")
    budget = replace(budget, memory_bytes=budget.memory_bytes + _BYTES_FOR_A_BYTE * len(request))
    try:
        answer = children.ask(request, budget, len(jobs))
    except _GoneError as gone:
        raise TemplateError(_why_gone(gone, budget)) from None
    except TimeoutError:
        raise TemplateError("the process that renders chat templates does not answer; is it stopped?") from None
    if "texts" in answer:
        texts: list[str] = answer["texts"]
        return texts
    reasons = {
        "memory": f"it needs more than {budget.memory_bytes >> 20} MB of memory",
        "length": f"it makes more than {budget.chars} characters",
    }
    raise TemplateError(_CANNOT + reasons.get(answer["error"], str(answer["reason"])))


_CANNOT = "the chat template cannot render these messages: "
_BYTES_FOR_A_BYTE = 24
"""Memory for each byte of a request: JSON, strings of up to four bytes a character, pieces, the text, and its JSON."""


def _why_gone(gone: _GoneError, budget: Budget) -> str:
    if gone.status == -signal.SIGPROF:
        return f"{_CANNOT}it needs more than {budget.cpu_s:.3g} s of processor time"
    if gone.status < 0:
        return f"{_CANNOT}its process was ended by {signal.Signals(-gone.status).name}"
    return f"the process that renders chat templates ended with status {gone.status}: {gone.said}"


def warm() -> None:
    """Start what renders, so that the first conversation need not wait for it."""
    children.warm()


def _paths() -> list[str]:
    """The child's program, and the folders its two packages lie in."""
    folders = []
    for name in ("jinja2", "markupsafe"):
        found = importlib.util.find_spec(name)
        if found is None or not found.submodule_search_locations:
            raise TemplateError(f"chat templates need the package {name}, which is not installed: pip install jinja2")
        folders.append(str(Path(found.submodule_search_locations[0]).resolve().parent))
    return [str(Path(__file__).with_name("template_child.py").resolve()), *dict.fromkeys(folders)]
