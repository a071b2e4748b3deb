"""One line in the list of skipped tests where triton is missing."""

from __future__ import annotations

import pytest


def test_triton_is_installed() -> None:
    pytest.importorskip("triton", reason="no triton (it exists for Linux): the kernels for GPUs are not tested")
