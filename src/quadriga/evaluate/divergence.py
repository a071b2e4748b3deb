"""How far a model's predictions are from a baseline's, token by token, on the same text.

    text ─► windows of W tokens, each read alone ─► both models' logits ─► tokens W/2 + 1 .. W - 1 of each window

    kl       sum over the vocabulary of p_base (log p_base - log p_model)
    dp       p_model - p_base of the token that came
    same     both models' most probable token is the same

The figures and the scored tokens, which have a context of at least half a window, are those of llama.cpp's
``llama-perplexity --kl-divergence``; it also begins each window with bos. Nothing is stored of the logits: both models
are loaded, and each window's numbers go to a journal, so that a killed run goes on.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from quadriga.errors import EvaluationError
from quadriga.evaluate.items import Scores
from quadriga.evaluate.journal import Journal, read_journal

Logits = Callable[[Sequence[int]], npt.NDArray[np.float32]]
"""Tokens (T,) -> logits (T, V)."""
KEPT = ("kl", "base_nll", "nll", "dp", "same")
"""What is kept of each token."""


@dataclass(frozen=True)
class Divergence:
    """The figures of a finished comparison: name -> (value, standard error or None)."""

    n: int
    figures: dict[str, tuple[float, float | None]]


def compare(
    base: Logits,
    model: Logits,
    tokens: Sequence[int],
    *,
    window: int,
    out: Path,
    question: Mapping[str, Any],
    progress: Callable[[int, int, str], None] = lambda done, total, name: None,
) -> Divergence:
    """Compare two models on a text, or go on with it.

    Args:
        base, model: the two models' logits.
        tokens: the text, in the vocabulary of both.
        window: tokens of a window; a last, shorter one is left out.
        out: folder for ``divergence.jsonl``.
        question: what determines the numbers: both models' identities.

    Raises:
        EvaluationError: a text shorter than a window, a window below 4, vocabularies of other sizes, or a journal of
            other settings.
    """
    if window < 4 or len(tokens) < window:
        raise EvaluationError(
            f"a window must have from 4 to as many tokens as the text, {len(tokens)}; got {window}. Give a longer "
            "text, or a shorter --window."
        )
    whole = {"window": window, "tokens": len(tokens), **question}
    journal, parts = Journal(out / "divergence.jsonl", whole), _kept(out / "divergence.jsonl")
    starts = range(0, len(tokens) - window + 1, window)
    for i, start in enumerate(starts):
        if i not in journal.scores:
            piece = list(tokens[start : start + window])
            parts[i] = measured(base(piece), model(piece), piece)
            means: Scores = {name: float(np.mean(values)) for name, values in parts[i].items()}
            journal.add([(i, means, {name: values.tolist() for name, values in parts[i].items()})])
        progress(i + 1, len(starts), "divergence")
    return summed([parts[i] for i in range(len(starts))])


def measured(
    base: npt.NDArray[np.float32], model: npt.NDArray[np.float32], tokens: Sequence[int]
) -> dict[str, npt.NDArray[np.float64]]:
    """The kept numbers of a window's second half, from both models' logits (T, V).

    Raises:
        EvaluationError: the two have vocabularies of other sizes.
    """
    if base.shape != model.shape:
        raise EvaluationError(
            f"both models must have the same vocabulary: the baseline's logits are {base.shape}, the model's "
            f"{model.shape}"
        )
    half = len(tokens) // 2
    rows = slice(half, len(tokens) - 1)  # row t predicts token t + 1
    p, q = _log_softmax(base[rows]), _log_softmax(model[rows])
    came = np.asarray(tokens[half + 1 :])[:, None]
    p_came, q_came = (np.take_along_axis(one, came, axis=1)[:, 0] for one in (p, q))
    return {
        "kl": (np.exp(p) * (p - q)).sum(axis=1),
        "base_nll": -p_came,
        "nll": -q_came,
        "dp": np.exp(q_came) - np.exp(p_came),
        "same": (p.argmax(axis=1) == q.argmax(axis=1)).astype(np.float64),
    }


def _log_softmax(logits: npt.NDArray[np.float32]) -> npt.NDArray[np.float64]:
    wide = logits.astype(np.float64)
    wide -= wide.max(axis=1, keepdims=True)
    shifted: npt.NDArray[np.float64] = wide - np.log(np.exp(wide).sum(axis=1, keepdims=True))
    return shifted


def _kept(path: Path) -> dict[int, dict[str, npt.NDArray[np.float64]]]:
    """The numbers of finished windows."""
    _, rows = read_journal(path)
    return {i: {name: np.asarray(row[name]) for name in KEPT} for i, row in rows.items()}


def summed(parts: Sequence[Mapping[str, npt.NDArray[np.float64]]]) -> Divergence:
    """The figures over all tokens; errors treat tokens as independent, as llama.cpp's do."""
    kept = {name: np.concatenate([part[name] for part in parts]) for name in KEPT}
    n = len(kept["kl"])

    def mean(values: npt.NDArray[np.float64]) -> tuple[float, float | None]:
        error = None if n < 2 else float(values.std(ddof=1) / np.sqrt(n))
        return float(values.mean()), error

    def perplexity(values: npt.NDArray[np.float64]) -> tuple[float, float | None]:
        value, error = mean(values)
        return float(np.exp(value)), None if error is None else float(np.exp(value)) * error

    kl, dp = kept["kl"], kept["dp"]
    figures = {
        "perplexity, baseline": perplexity(kept["base_nll"]),
        "perplexity": perplexity(kept["nll"]),
        "ln of their ratio": mean(kept["nll"] - kept["base_nll"]),
        "mean KL": mean(kl),
        **{f"KL, {share:g} %": (float(np.percentile(kl, share)), None) for share in (50, 95, 99, 99.9, 100)},
        "mean change of p, %": tuple(None if one is None else 100 * one for one in mean(dp)),
        "RMS change of p, %": (100 * float(np.sqrt((dp**2).mean())), None),
        "same most probable token, %": tuple(None if one is None else 100 * one for one in mean(kept["same"])),
    }
    return Divergence(n, {name: (float(value[0] or 0.0), value[1]) for name, value in figures.items()})
