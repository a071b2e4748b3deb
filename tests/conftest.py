"""Fixtures shared by all tests."""

from __future__ import annotations

import faulthandler
import os
import sys
from collections.abc import Callable, Generator
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch
from hypothesis import HealthCheck, settings

from quadriga.errors import CatalogueError
from quadriga.hub import catalogue
from quadriga.io.open import open_checkpoint
from quadriga.nn.load import load_parameters
from quadriga.nn.transformer import Transformer
from tests.golden import checkpoints

# Kernels for GPUs are interpreted in this process; triton reads this when they are imported.
os.environ["TRITON_INTERPRET"] = "1"

GUARD_S = 30 * 60
"""The longest a test may take before its process shows where it stands and ends: no wait inside a test is longer than
``waiting.HANG_S``, and a hang in C ends too. Four times as long for the slow ones."""

# An example may take as long as it does: a busy machine is no failure.
settings.register_profile("any machine", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("any machine")

_stderr = pytest.StashKey[int]()
_no_options = pytest.StashKey[TemporaryDirectory[str]]()


def pytest_configure(config: pytest.Config) -> None:
    """Keep the real standard error, for pytest puts another one in its place while tests run; and no options of the user."""
    # A folder of the run: a browser that a test starts writes there.
    os.environ["XDG_CONFIG_HOME"] = config.stash.setdefault(_no_options, TemporaryDirectory()).name
    config.stash[_stderr] = os.dup(sys.__stderr__.fileno() if sys.__stderr__ else 2)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, object, object]:
    """Guard every test, fixtures included, against hanging."""
    factor = 4 if item.get_closest_marker("slow") else 1
    faulthandler.dump_traceback_later(factor * GUARD_S, exit=True, file=item.config.stash[_stderr])
    try:
        return (yield)
    finally:
        faulthandler.cancel_dump_traceback_later()


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


@pytest.fixture(scope="session")
def golden_model(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Transformer]:
    """``golden_model(name, dtype)``: a model of ``tests.golden``, written as a checkpoint, opened and loaded."""
    folders: dict[str, Path] = {}

    def load(name: str, dtype: torch.dtype = torch.float32) -> Transformer:
        if name not in folders:
            folders[name] = tmp_path_factory.mktemp(name)
            checkpoints.write(name, folders[name])
        checkpoint = open_checkpoint(folders[name])
        return Transformer.from_parameters(checkpoint.config, load_parameters(checkpoint, dtype=dtype)).eval()

    return load
