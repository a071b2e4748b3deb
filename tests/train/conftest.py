"""Fix the number of threads: runs are compared bit for bit, and other tests in the process change the number."""

from __future__ import annotations

import pytest

from quadriga.nn import devices


@pytest.fixture(autouse=True, scope="module")
def one_thread_for_the_module() -> None:
    """Before the module's own fixtures train."""
    devices.set_threads(1)


@pytest.fixture(autouse=True)
def one_thread(one_thread_for_the_module: None) -> None:
    """Set it again before each test, because tests of other modules may have run in between."""
    devices.set_threads(1)
