"""A model beside a baseline: the numbers of each token by a naive loop, the second half of windows, and going on."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from quadriga.errors import EvaluationError
from quadriga.evaluate.divergence import compare, measured, summed

VOCAB = 7
TOKENS = [3, 1, 4, 1, 5, 2, 6, 5, 3, 5, 0, 2, 6]


class Fake:
    """Logits that follow from the tokens; counts its calls."""

    def __init__(self, sharpness: float) -> None:
        self.sharpness, self.n = sharpness, 0

    def __call__(self, ids: Sequence[int]) -> npt.NDArray[np.float32]:
        self.n += 1
        rows = [[self.sharpness * math.sin(3 * i + v + k) for v in range(VOCAB)] for k, i in enumerate(ids)]
        return np.array(rows, np.float32)


def softmax(row: npt.NDArray[np.float32]) -> list[float]:
    exps = [math.exp(float(x)) for x in row]
    return [x / sum(exps) for x in exps]


def test_the_numbers_of_a_window_by_hand() -> None:
    piece = TOKENS[:6]
    base, model = Fake(1.0)(piece), Fake(2.5)(piece)
    found = measured(base, model, piece)
    assert {len(values) for values in found.values()} == {2}, "tokens 4 and 5 of six"
    for n, t in enumerate((4, 5)):
        p, q = softmax(base[t - 1]), softmax(model[t - 1])
        assert found["kl"][n] == pytest.approx(sum(a * math.log(a / b) for a, b in zip(p, q, strict=True)))
        assert found["nll"][n] == pytest.approx(-math.log(q[piece[t]]))
        assert found["base_nll"][n] == pytest.approx(-math.log(p[piece[t]]))
        assert found["dp"][n] == pytest.approx(q[piece[t]] - p[piece[t]])
        assert found["same"][n] == float(p.index(max(p)) == q.index(max(q)))
    with pytest.raises(
        EvaluationError, match=r"same vocabulary: the baseline's logits are \(6, 7\), the model's \(6, 6\)"
    ):
        measured(base, model[:, :6], piece)


def test_figures_by_hand() -> None:
    part = {
        "kl": np.array([0.0, 0.1, 0.5]),
        "base_nll": np.array([1.0, 2.0, 3.0]),
        "nll": np.array([1.5, 2.0, 4.0]),
        "dp": np.array([-0.1, 0.0, 0.2]),
        "same": np.array([1.0, 1.0, 0.0]),
    }
    found = summed(
        [{name: values[:2] for name, values in part.items()}, {name: values[2:] for name, values in part.items()}]
    )
    values = {name: value for name, (value, _) in found.figures.items()}
    assert found.n == 3
    assert (values["perplexity, baseline"], values["perplexity"]) == (
        pytest.approx(math.e**2),
        pytest.approx(math.exp(2.5)),
    )
    assert (values["ln of their ratio"], values["mean KL"]) == (pytest.approx(0.5), pytest.approx(0.2))
    assert (values["KL, 50 %"], values["KL, 100 %"]) == (pytest.approx(0.1), pytest.approx(0.5))
    assert values["mean change of p, %"] == pytest.approx(100 / 30)
    assert values["RMS change of p, %"] == pytest.approx(100 * math.sqrt(0.05 / 3))
    assert values["same most probable token, %"] == pytest.approx(200 / 3)
    assert found.figures["mean KL"][1] == pytest.approx(np.std([0, 0.1, 0.5], ddof=1) / math.sqrt(3))


def test_an_odd_window_scores_what_has_half_of_it_before() -> None:
    piece = TOKENS[:7]
    base, model = Fake(1.0)(piece), Fake(2.5)(piece)
    found = measured(base, model, piece)["nll"]
    assert found == pytest.approx([-math.log(softmax(model[t - 1])[piece[t]]) for t in (4, 5, 6)])


def test_the_perplexity_s_error_is_the_mean_s_times_it() -> None:
    one = {name: np.array([1.0, 3.0]) for name in ("kl", "base_nll", "nll", "dp", "same")}
    value, error = summed([one]).figures["perplexity"]
    assert (value, error) == (pytest.approx(math.e**2), pytest.approx(math.e**2 * 1.0))
    assert summed([{name: values[:1] for name, values in one.items()}]).figures["perplexity"][1] is None


def test_a_text_of_whole_windows_is_read_to_its_end(tmp_path: Path) -> None:
    base = Fake(1.0)
    found = compare(base, Fake(2.0), TOKENS[:12], window=4, out=tmp_path, question={})
    assert (found.n, base.n) == (3, 3)


def run(out: Path, base: Fake, model: Any, question: dict[str, str] | None = None) -> Any:
    return compare(base, model, TOKENS, window=4, out=out, question=question or {"model": "m"})


def test_equal_models_do_not_differ(tmp_path: Path) -> None:
    found = run(tmp_path, Fake(1.0), Fake(1.0))
    assert found.n == 3, "three windows of four, one token of each; the thirteenth token is left out"
    assert found.figures["mean KL"][0] == pytest.approx(0.0, abs=1e-12)
    assert found.figures["same most probable token, %"][0] == 100.0


def test_a_killed_run_goes_on_with_the_same_figures(tmp_path: Path) -> None:
    whole = run(tmp_path / "whole", Fake(1.0), Fake(2.0))
    model = Fake(2.0)

    def dies(ids: Sequence[int]) -> npt.NDArray[np.float32]:
        if model.n == 2:
            raise KeyboardInterrupt
        return model(ids)

    base = Fake(1.0)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "cut", base, dies)
    rest = Fake(2.0)
    assert run(tmp_path / "cut", base, rest) == whole
    assert rest.n == 1
    with pytest.raises(EvaluationError, match="changed: model"):
        run(tmp_path / "cut", base, rest, {"model": "other"})
    with pytest.raises(EvaluationError, match="a window must have from 4 to as many tokens as the text, 13; got 99"):
        compare(base, rest, TOKENS, window=99, out=tmp_path / "x", question={})
