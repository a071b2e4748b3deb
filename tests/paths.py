"""Where tests find data that is not part of the project; absent data skips a test with the reason."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

_ROOT = Path(__file__).parent.parent


def data(relative: str) -> Path:
    """A file of the shared data folder (QUADRIGA_DATA, else ../shared/data beside the project), or a skip."""
    base = os.environ.get("QUADRIGA_DATA")
    path = (Path(base) if base else _ROOT.parent / "shared" / "data") / relative
    if not path.exists():
        pytest.skip(f"{relative} is not here; set QUADRIGA_DATA to the folder that holds it")
    return path
