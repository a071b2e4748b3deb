"""``python -m quadriga.hub.fetching NAME``: fetch a model in a process of its own, which can be stopped at any moment.

It says how far it is on standard output, a line of JSON each: ``{"name": ..., "done": ..., "total": ...}`` (bytes),
and at last ``{"path": ...}`` or ``{"error": ...}``. When its standard input ends, whoever started it does not want the
model any more, or is gone: it and what it has started are interrupted, and what can be resumed is kept.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

from quadriga.errors import QuadrigaError
from quadriga.hub.catalogue import resolve

EVERY_S = 0.2
"""Between two lines about the same file."""


def main(name: str) -> int:
    """Fetch a model; the exit code."""
    # Whoever runs in the background of a shell ignores interrupts, and hands that down to what it starts.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    try:
        say({"path": str(resolve(name, progress=_teller()))})
    except QuadrigaError as error:
        say({"error": str(error)})
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


def say(what: dict[str, Any]) -> None:
    """A line for whoever waits."""
    with contextlib.suppress(BrokenPipeError):
        sys.stdout.write(json.dumps(what) + "\n")
        sys.stdout.flush()


def _teller(clock: Callable[[], float] = time.monotonic) -> Callable[[int, int, str], None]:
    """What is called with (bytes done, in total, file): says the first and the last of a file, and some between."""
    last, told_s = ("", 0), 0.0

    def tell(done: int, total: int, name: str) -> None:
        nonlocal last, told_s
        now = clock()
        if (name, total) != last or done >= total or now - told_s >= EVERY_S:
            last, told_s = (name, total), now
            say({"name": name, "done": done, "total": total})

    return tell


def _end_with_parent() -> None:
    while os.read(0, 1 << 12):
        pass
    # The whole group: pip is part of it. Whoever starts this gives it one of its own.
    if os.getpgid(0) == os.getpid():
        os.killpg(0, signal.SIGINT)
    else:
        os.kill(os.getpid(), signal.SIGINT)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
