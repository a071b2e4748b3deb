"""Fixtures shared by all tests."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from quadriga.checkpoint import catalogue
from quadriga.checkpoint.open import load_parameters, open_checkpoint
from quadriga.errors import CatalogueError
from quadriga.model.transformer import Transformer
from tests.golden import checkpoints


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
