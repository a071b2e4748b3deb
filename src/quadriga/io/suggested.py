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


_OFF: Mapping[str, tuple[object, ...]] = {
    **dict.fromkeys(
        (
            "bad_words_ids", "begin_suppress_tokens", "constraints", "exponential_decay_length_penalty",
            "force_words_ids", "forced_bos_token_id", "forced_decoder_ids", "forced_eos_token_id", "sequence_bias",
            "stop_strings", "suppress_tokens", "watermarking_config",
        ),
        ([], {}),
    ),
    **dict.fromkeys(
        (
            "diversity_penalty", "encoder_no_repeat_ngram_size", "epsilon_cutoff", "eta_cutoff", "min_length",
            "min_new_tokens", "no_repeat_ngram_size", "penalty_alpha", "top_h",
        ),
        (0,),
    ),
    **dict.fromkeys(("guidance_scale", "length_penalty", "num_beams", "typical_p"), (1,)),
}  # fmt: skip
"""Keys that would change which tokens are chosen and are not heeded -> what of each says nothing, besides null."""


def not_heeded(raw: Mapping[str, Any]) -> list[str]:
    """What is said of keys of a parsed file that ask for other tokens than requests do; a request may ask for some."""
    asked = [key for key, off in _OFF.items() if raw.get(key) is not None and raw[key] not in off]
    if not asked:
        return []
    return [f"generation_config.json asks for {', '.join(sorted(asked))}, which only requests decide: not heeded"]


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
