"""Sizes in bytes as people write them."""

from __future__ import annotations

import pytest

from quadriga.cli.options import size
from quadriga.errors import ConfigError


@pytest.mark.parametrize(
    ("text", "expected"),
    [("20GB", 20 * 10**9), ("1.5gb", 1_500_000_000), ("512MiB", 512 << 20), ("7", 7), ("2 TB", 2 * 10**12)],
)
def test_sizes(text: str, expected: int) -> None:
    assert size(text) == expected


@pytest.mark.parametrize("text", ["", "GB", "-1GB", "1XB", "nan", "1e400GB"])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="20GB"):
        size(text)
