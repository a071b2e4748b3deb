"""Sizes in bytes and names of formats as people write them; files that cannot be used."""

from __future__ import annotations

from pathlib import Path

import pytest

from quadriga import cli
from quadriga.cli.options import gguf_format, size, stops, text_of
from quadriga.errors import ConfigError


@pytest.mark.parametrize(
    ("text", "expected"),
    [("20GB", 20 * 10**9), ("1.5gb", 1_500_000_000), ("512MiB", 512 << 20), ("7", 7), ("2 TB", 2 * 10**12)],
)
def test_sizes(text: str, expected: int) -> None:
    assert size(text) == expected


def test_stop_strings_as_a_shell_gives_them() -> None:
    assert stops(["a\\nb", "\\t", "\n", "n\\\\x"]) == ("a\nb", "\t", "\n", "n\\\\x")
    assert stops(None) == stops([]) == ()


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


def test_what_is_no_text_is_refused_by_its_option(tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_bytes("Größe\n".encode())
    assert text_of(text, "--text") == "Größe\n"
    text.write_bytes(b"Gr\xf6\xdfe")
    for path in (text, tmp_path / "missing.txt", tmp_path):
        with pytest.raises(ConfigError, match="--text must be a UTF-8 text file"):
            text_of(path, "--text")


def test_a_file_that_cannot_be_used_is_a_line_and_no_traceback(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    missing = tmp_path / "nowhere/rows.csv"
    monkeypatch.setattr(cli.runtime, "start_logging", lambda: None)  # it would hold for all tests after this one
    monkeypatch.setattr(cli, "app", lambda: missing.open("w"))
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 2
    assert capsys.readouterr().err == f"error: {missing} cannot be used: No such file or directory\n"
