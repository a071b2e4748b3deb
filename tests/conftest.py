"""Fixtures shared by all tests."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from quadriga.checkpoint import catalogue
from quadriga.errors import CatalogueError


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """The default model's file, fetched once into the user's cache.

    Without a network the tests that need it are skipped with the reason; where CI is set they fail instead.
    """
    try:
        return catalogue.resolve(catalogue.DEFAULT_MODEL)
    except CatalogueError as error:
        if os.environ.get("CI"):
            raise
        pytest.skip(f"the default model cannot be fetched: {error}")
