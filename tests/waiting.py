"""Waiting for what must happen. The one place of the tests that looks at a clock, and only to end a hang.

A test waits for an event (a line, a state, a count of work) and never for time to pass, so that a slow or busy machine
changes nothing. What ends a hang is ``HANG_S``, ten minutes: no machine that can run the tests at all takes that long
for one event. ``tests/test_clock.py`` holds every other file to this.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable

HANG_S = float(os.environ.get("QUADRIGA_TEST_HANG_S", 600))
"""After this long, what was waited for is taken never to come. Less by the environment, for who looks for a hang."""


def until(condition: Callable[[], bool]) -> bool:
    """Wait until something is true; False if it hangs. The polls decide nothing but when it is seen."""
    end = time.monotonic() + HANG_S
    while not condition():
        if time.monotonic() > end:
            return False
        time.sleep(0.005)
    return True
