"""Sizes in bytes and names of formats as people write them."""

from __future__ import annotations

import pytest

from quadriga.cli.options import gguf_format, size
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


@pytest.mark.parametrize(
    ("written", "ours"),
    [("Q4_K_M", "q4_k_m"), ("q8_0", "q8_0"), ("F16", "float16"), ("BF16", "bfloat16"), (None, None)],
)
def test_formats_as_llama_cpp_writes_them(written: str | None, ours: str | None) -> None:
    assert gguf_format(written) == ours
