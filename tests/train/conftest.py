"""Runs are compared bit for bit, which holds for one number of threads; other tests of the same process set theirs."""

from __future__ import annotations

import pytest

from quadriga import runtime


@pytest.fixture(autouse=True, scope="module")
def one_thread_for_the_module() -> None:
    """Before the module's own fixtures train."""
    runtime.set_threads(1)


@pytest.fixture(autouse=True)
def one_thread(one_thread_for_the_module: None) -> None:
    """Again before each test: tests of other modules may have come between."""
    runtime.set_threads(1)
