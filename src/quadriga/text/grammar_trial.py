"""Grammars tried in a process of their own before the server compiles them.

    check(kind, text) ──► the child (grammar_child.py) ──► nothing, or what is wrong with the grammar

llguidance compiles within limits of its own, but they do not count everything: a thousand patternProperties take
minutes, a chain of ten thousand rules ends the process with a full stack, and neither can be stopped from outside. In
a child the kernel stops both. What passed there is compiled once more where requests are served (a few milliseconds),
as a compiled grammar cannot leave its process.

The child is started with the first grammar (about 0.2 s and the vocabulary, up to a second) and kept; one that was
stopped is replaced. It inherits nothing but its pipes, gets an empty environment, and ends when they close, which the
kernel does however this process ends.
"""

from __future__ import annotations

import atexit
import contextlib
import importlib.util
import selectors
import signal
import subprocess
import sys
import threading
import weakref
from pathlib import Path
from typing import Any

from quadriga import runtime
from quadriga.errors import BusyError, GrammarError
from quadriga.text.grammar_child import receive, send

CPU_S = 2.0
"""Processor time that a grammar may take to compile and to allow its first token."""

MEMORY_BYTES = 512 << 20
"""Address space it may take."""

NICE = 10
"""The child gives way to answers where both want a processor."""

_GUARD_S = 120.0
"""Against a child that is stopped or swapped out; one that computes ends by its processor time long before."""

_BOOT = "import sys, runpy; sys.path.append(sys.argv[2]); runpy.run_path(sys.argv[1], run_name='__main__')"
_KEPT_VARIABLES = ("LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH")

_running: weakref.WeakSet[Trial] = weakref.WeakSet()


class Trial:
    """See the module docstring. One grammar at a time; any thread.

    Args:
        vocabulary: ``tokens`` (texts in latin-1, a byte a character), ``special``, ``end``, ``bos``.
        limits: llguidance's, as given to its ``LLParserLimits``.
        cpu_s, memory_bytes: what a grammar may take.
    """

    def __init__(
        self,
        vocabulary: dict[str, Any],
        limits: dict[str, int],
        *,
        cpu_s: float = CPU_S,
        memory_bytes: int = MEMORY_BYTES,
    ) -> None:
        self._setup = {**vocabulary, "limits": limits, "cpu_s": cpu_s, "memory_bytes": memory_bytes, "nice": NICE}
        self._child: subprocess.Popen[bytes] | None = None
        self._lock = threading.Lock()
        self.n_started = 0
        """Children started so far."""
        _running.add(self)

    def check(self, kind: str, text: str) -> None:
        """Try a grammar.

        Raises:
            GrammarError: it cannot be used; the same answer every time.
            BusyError: the child did not answer at all.
        """
        with self._lock:
            if self._child is not None and self._child.poll() is not None:
                self._end()  # somebody ended it while it waited; that says nothing of this grammar
            child = self._child or self._start()
            try:
                answer = self._ask(child, {"kind": kind, "text": text})
            except TimeoutError:
                self._end()
                raise BusyError("the process that tries grammars does not answer; try again later") from None
            if answer is None:
                status = child.wait()
                self._end()
                raise GrammarError(self._why(status))
        if answer["error"] is not None:
            raise GrammarError(f"the grammar cannot be used: {first_line(answer['error'])}")

    def _start(self) -> subprocess.Popen[bytes]:
        environment = runtime.child_environment()
        found = importlib.util.find_spec("llguidance")
        assert found is not None and found.origin is not None, "this module's caller has imported it"
        program = str(Path(__file__).with_name("grammar_child.py").resolve())
        folder = str(Path(found.origin).resolve().parent.parent)
        self._child = subprocess.Popen(
            [sys.executable, "-I", "-S", "-B", "-X", "utf8", "-c", _BOOT, program, folder],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            cwd="/",
            env={name: environment[name] for name in _KEPT_VARIABLES if name in environment},
            start_new_session=True,  # Ctrl-C in the terminal is for the program, not for this child
        )
        self.n_started += 1
        if self._ask(self._child, self._setup) is None:
            self._end()
            raise BusyError("the process that tries grammars cannot be started")
        return self._child

    def _ask(self, child: subprocess.Popen[bytes], message: dict[str, Any]) -> dict[str, Any] | None:
        """Its answer, or None if it ended instead."""
        assert child.stdin is not None and child.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            send(message, child.stdin.fileno())
        with selectors.DefaultSelector() as answers:  # select itself takes no descriptor above 1,023
            answers.register(child.stdout, selectors.EVENT_READ)
            if not answers.select(_GUARD_S):
                raise TimeoutError
        answer: dict[str, Any] | None = receive(child.stdout.fileno())
        return answer

    def _why(self, status: int) -> str:
        if status == -signal.SIGPROF:
            return (
                f"the grammar takes more than {self._setup['cpu_s']:g} s of processor time to compile; make it smaller"
            )
        if status == -signal.SIGABRT:
            megabytes = self._setup["memory_bytes"] >> 20
            return f"the grammar takes more than {megabytes} MB of memory to compile; make it smaller"
        return "the grammar is nested too deeply to be compiled; make it smaller"

    def _end(self) -> None:
        child, self._child = self._child, None
        if child is not None:
            child.kill()
            child.wait()
            for pipe in (child.stdin, child.stdout):
                if pipe is not None:
                    pipe.close()

    def close(self) -> None:
        """End the child; the next check starts another."""
        with self._lock:
            self._end()


def first_line(message: str) -> str:
    """What llguidance says, without the parser's state behind it."""
    return message.strip().splitlines()[0][:300] if message.strip() else "no reason given"


@atexit.register
def _end_all() -> None:
    for trial in list(_running):
        child = trial._child
        if child is not None:
            child.kill()
