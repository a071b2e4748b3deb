"""The program that a replica is: ``python -m quadriga.server.front.replica``, told on standard input what to serve.

It listens at a socket file that only its user can reach, and believes the front: who asks comes in a header, keys and
limits are the front's. On standard output it says, a line of JSON each, when it answers and what every request has
used. It ends when its standard input does: whoever started it is gone then.
"""

from __future__ import annotations

import json
import os
import sys
import threading
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import msgspec

from quadriga import runtime
from quadriga.engine.load import load
from quadriga.engine.load_options import LoadOptions
from quadriga.errors import QuadrigaError
from quadriga.server.access import Entry
from quadriga.server.guard import Limits
from quadriga.server.hosting import Hosting
from quadriga.server.run import listen_at, serve

EXIT_WRONG = 2
"""It cannot be served: trying again would not help."""


@dataclass(frozen=True, kw_only=True)
class Order:
    """What a replica is to serve, and how."""

    source: str
    names: list[str]
    how: LoadOptions
    hosting: Hosting
    strict: bool
    max_body_bytes: int
    socket: str = ""
    """Where it listens."""
    drain_s: int = 1
    """What is under way when it is told to end: its clients have been answered, or told that they are not."""


def main() -> int:
    """Serve what is asked for, to the end."""
    order = msgspec.json.decode(sys.stdin.buffer.readline(), type=Order)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    runtime.start_logging()
    try:
        listener = listen_at(Path(order.socket))
        service = order.hosting.service(load(order.source, **asdict(order.how)), order.names)
    except QuadrigaError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_WRONG
    runtime.prefer_short_pauses()
    limits = Limits(strict=order.strict, max_body_bytes=order.max_body_bytes, behind=report)
    serve(service, limits, listener, drain_s=order.drain_s, started=lambda: say({"ready": True}))
    return 0


def report(entry: Entry) -> None:
    """Tell the front what a request has used."""
    used = entry.usage
    what = {"model": used.model, "prompt": used.n_prompt, "answer": used.n_answer, "first_s": used.first_s}
    say({"id": entry.request_id, **what})


def say(what: dict[str, Any]) -> None:
    """A line to the front."""
    sys.stdout.write(json.dumps(what) + "\n")
    sys.stdout.flush()


def _end_with_parent() -> None:
    while os.read(0, 1 << 12):  # not sys.stdin: its lock, held here, would keep the interpreter from ending
        pass
    os._exit(1)


if __name__ == "__main__":
    sys.exit(main())
