"""Every option of a conversion beside every result: used, which other bytes show, or refused by its name."""

from __future__ import annotations

import hashlib
import inspect
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from quadriga.errors import ConfigError
from quadriga.io import convert_options
from quadriga.io.convert import convert, write
from quadriga.io.directory import packed_shapes
from quadriga.option_rules import as_flag
from tests.checkpoint.models import TINY
from tests.checkpoint.test_packed import write as write_model

RECIPE = {
    name: "float32" if len(shape) == 1 or "router" in name else "q4"
    for name, shape in packed_shapes(TINY["mixtral"]).items()
}
IMPORTANCE = {
    name: np.linspace(0.01, 9.0, shape[1], dtype=np.float32)
    for name, shape in packed_shapes(TINY["mixtral"]).items()
    if len(shape) == 2 and "router" not in name
}

RESULTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "packed": {"format": "q4"},
    "packed plain": {"format": "bfloat16"},
    "packed without a search": {"format": "mx4"},
    "recipe": {"format": RECIPE},
    "hf": {"to": "hf"},
    "gguf": {"to": "gguf"},
}

OPTIONS: dict[str, tuple[Any, set[str]]] = {
    "layout": ("hf5", {"hf"}),
    "dtype": ("float32", {"plain", "hf"}),
    "gguf_format": ("q8_0", {"gguf"}),
    "embeddings": ("float32", {"packed", "packed plain", "packed without a search"}),
    "importance": (IMPORTANCE, {"packed", "recipe"}),
    "max_shard_bytes": (40_000, {"plain", "hf"}),
}
"""A value of each option, and the results that it changes; for all others it is refused."""


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("source") / "mixtral", "mixtral")


def made(source: Path, out: Path, **options: Any) -> dict[str, str]:
    """The files of a conversion, by what they hold."""
    convert(source, out, **options)
    files = sorted(out.rglob("*")) if out.is_dir() else [out]
    return {f.name: hashlib.sha256(f.read_bytes()).hexdigest() for f in files}


def test_the_table_has_every_option() -> None:
    own = set(convert_options.OPTIONS)
    assert own == {*OPTIONS, "to", "format"}
    for function in (convert, write):
        assert own <= set(inspect.signature(function).parameters)
    for function in (convert, write):
        defaults = {n: p.default for n, p in inspect.signature(function).parameters.items() if n in own}
        assert defaults == convert_options.OPTIONS
    assert {rule.option for rule in convert_options.RULES} == own - {"to"}


@pytest.mark.parametrize("result", RESULTS)
@pytest.mark.parametrize("option", OPTIONS)
def test_every_option_is_used_or_refused(source: Path, tmp_path: Path, option: str, result: str) -> None:
    value, used = OPTIONS[option]
    given = RESULTS[result]
    if result in used:
        assert made(source, tmp_path / "with", **given, **{option: value}) != made(
            source, tmp_path / "with out", **given
        )
        return
    with pytest.raises(ConfigError, match=rf"^{option} .*would have no effect: .*(Leave|leave).* out"):
        convert(source, tmp_path / "out", **given, **{option: value})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("to", ["hf", "gguf"])
def test_a_format_packs_for_our_own_kernels_only(source: Path, tmp_path: Path, to: str) -> None:
    for form in ("q4", RECIPE):
        with pytest.raises(ConfigError, match=r"^format .*would have no effect: it packs weights"):
            convert(source, tmp_path / "out", to=to, format=form)


@pytest.mark.parametrize(
    ("result", "option", "value"), [("packed", "dtype", "keep"), ("hf", "gguf_format", "bfloat16")]
)
def test_what_happens_anyway_is_refused_too(source: Path, tmp_path: Path, result: str, option: str, value: str) -> None:
    with pytest.raises(ConfigError, match=rf"^{option} {value} would have no effect"):
        convert(source, tmp_path / "out", **RESULTS[result], **{option: value})


@pytest.mark.parametrize("option", ["to", "dtype", "gguf_format", "format", "embeddings", "layout"])
@pytest.mark.parametrize("value", ["nonsense", ""])
def test_unknown_names_are_refused(source: Path, tmp_path: Path, option: str, value: str) -> None:
    beside = {"to": "gguf"} if option == "gguf_format" else {"to": "hf"} if option == "layout" else {}
    beside |= {"format": "q4"} if option == "embeddings" else {}
    with pytest.raises(ConfigError, match=rf"^{option} must be "):
        convert(source, tmp_path / "out", **beside, **{option: value})


@pytest.mark.parametrize("value", [0, -1, 2**70, 1.5])
def test_sizes_of_files_are_whole_and_not_nothing(source: Path, tmp_path: Path, value: Any) -> None:
    with pytest.raises(ConfigError, match=r"^max_shard_bytes must be a whole number"):
        convert(source, tmp_path / "out", to="hf", max_shard_bytes=value)


def test_the_command_line_reads_flags() -> None:
    with pytest.raises(ConfigError, match=r"^--gguf-format q8_0 would .*Give --to gguf, or leave --gguf-format out"):
        convert_options.check({"to": "hf", "gguf_format": "q8_0"}, as_flag)
