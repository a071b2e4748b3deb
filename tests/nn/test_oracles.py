"""The NumPy statements against transformers 4.57.6: the oracles must be right before anything is held to them."""

from __future__ import annotations

import math

import numpy as np
import pytest

from tests.golden.checkpoints import FACTS, config_json, results, weights
from tests.golden.weights import IN_TRANSFORMERS_5, MODELS, TOKENS, draw, ragged
from tests.oracles import numpy_models, router_losses

BAR = 2e-5
"""Largest difference of a logit as a share of the logits' range: float32 there, float64 here."""

MOE = {"dbrx": numpy_models.dbrx, "mixtral": numpy_models.mixtral}


def wide(name: str) -> dict[str, numpy_models.Array]:
    return {tensor: values.astype(np.float64) for tensor, values in weights(name).items()}


def test_the_golden_files_are_of_the_right_version_and_these_weights() -> None:
    assert FACTS["made_with"].startswith("transformers 4.57.6,")
    # NumPy may change a generator's stream between versions; then the golden files must be made anew.
    assert draw("pinned", (3,)).tolist() == FACTS["drawn"]


@pytest.mark.parametrize("name", [*MODELS, *IN_TRANSFORMERS_5])
def test_logits_equal_transformers(name: str) -> None:
    config, w = config_json(name), wide(name)
    oracle = numpy_models.ORACLES[config["model_type"]]
    expected = [oracle(w, config, sequence) for sequence in (TOKENS, *ragged())]
    for ours, key in ((expected[0], "prefill"), (expected[0][16:], "decode"), (np.concatenate(expected[1:]), "ragged")):
        theirs = results()[f"{name}.{key}"].numpy()
        assert ours.shape == theirs.shape
        assert np.abs(ours - theirs).max() / np.ptp(theirs) <= BAR, key


@pytest.mark.parametrize("name", MOE)
def test_router_probabilities_and_balance_losses_equal_transformers(name: str) -> None:
    config, w = config_json(name), wide(name)
    _, probs = MOE[name](w, config, TOKENS)
    assert np.abs(results()[f"{name}.router_probs"].numpy() - probs).max() < 1e-5
    assert router_losses.hf_balance(list(probs), 3) == pytest.approx(FACTS[name]["aux_loss"], rel=1e-5)
    of_sequences = [MOE[name](w, config, sequence)[1] for sequence in ragged()]
    layers = [np.concatenate(parts) for parts in zip(*of_sequences, strict=True)]
    assert router_losses.hf_balance(layers, 3) == pytest.approx(FACTS[name]["aux_loss_ragged"], rel=1e-5)


def test_closed_forms() -> None:
    """What can be said without any program: slopes of the ALiBi paper, uniform routers, a rotation by hand."""
    assert numpy_models.alibi_slopes(8) == [2.0**-i for i in range(1, 9)]
    assert numpy_models.alibi_slopes(6) == [2.0**-i for i in (2, 4, 6, 8, 1, 3)]
    c, s = math.cos(1), math.sin(1)
    np.testing.assert_allclose(numpy_models.rotate(np.array([1.0, 0.0]), 1, 7.0), [c, s])
    np.testing.assert_allclose(numpy_models.rotate(np.array([0.0, 2.0]), 1, 7.0), [-2 * s, 2 * c])
    np.testing.assert_allclose(numpy_models.gelu(np.array([1.0])), [0.8413447460685429])
    uniform = np.full((7, 5), 0.2)
    assert router_losses.hf_balance([uniform] * 4, 3) == pytest.approx(3)
    assert router_losses.megablocks_balance([uniform] * 4, 3) == pytest.approx(1)
    assert router_losses.z_loss([np.zeros((7, 5))] * 4) == pytest.approx(4 * math.log(5) ** 2)
