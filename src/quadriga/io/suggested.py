"""How a checkpoint's makers would have its tokens chosen: generation_config.json."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quadriga.errors import CheckpointError
from quadriga.io.json_files import read_json


@dataclass(frozen=True)
class Suggested:
    """Sampling for conversations. The defaults are the chat page's."""

    temperature: float = 0.7
    top_p: float = 0.95
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0


def suggested(checkpoint: Path) -> Suggested:
    """What the file beside a checkpoint says; without one, or where it says nothing of sampling, the defaults.

    Raises:
        CheckpointError: a value that is no number.
    """
    file = checkpoint / "generation_config.json"
    return of_config(read_json(file)) if checkpoint.is_dir() and file.is_file() else Suggested()


def of_config(raw: Mapping[str, Any]) -> Suggested:
    """The same of a parsed file. ``do_sample: false`` says nothing: it is what the file holds where nobody chose."""
    given: dict[str, Any] = {}
    for name, kind in (
        ("temperature", float),
        ("top_p", float),
        ("top_k", int),
        ("min_p", float),
        ("repetition_penalty", float),
    ):
        value = raw.get(name)
        if value is None:
            continue
        number = isinstance(value, (int, float)) and not isinstance(value, bool) and -1e300 < value < 1e300
        if not number or (kind is int and value != int(value)):
            raise CheckpointError(f"{name} in generation_config.json must be a number, got {value!r}")
        given[name] = kind(value)
    if not {"temperature", "top_p", "top_k", "min_p"} & given.keys():
        return Suggested(**given)
    return Suggested(**{"temperature": 1.0, "top_p": 1.0, **given})  # what is not said is off
