"""Several threads at once in a test: started together, failed together, and never waited for for ever."""

from __future__ import annotations

import threading
from collections.abc import Callable

from tests import waiting

MOST_SECONDS = waiting.HANG_S
"""Until something that does not come is called a hang; a guard, not a measure."""


def until(condition: Callable[[], bool]) -> None:
    """Return when a condition holds that another thread brings about."""
    assert waiting.until(condition), "what is waited for never comes"


def all_at_once(*work: Callable[[], None]) -> None:
    """Run every function in a thread of its own, all begun together; the first that raised is raised here.

    Raises:
        AssertionError: one of them does not end.
    """
    together, raised = threading.Barrier(len(work)), list[BaseException]()

    def run(function: Callable[[], None]) -> None:
        together.wait(MOST_SECONDS)
        try:
            function()
        except BaseException as error:
            raised.append(error)

    threads = [threading.Thread(target=run, args=(one,), name=one.__name__, daemon=True) for one in work]
    for thread in threads:
        thread.start()
    until(lambda: bool(raised) or not any(thread.is_alive() for thread in threads))
    if raised:
        raise raised[0]
