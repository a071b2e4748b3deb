"""What a request may ask of experts, and what is added to the routers' logits for it."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest

from quadriga.errors import RequestError
from quadriga.model.steering import ExpertFactor, router_shift
from tests.checkpoint.models import TINY
from tests.configs import changed, first_dense
from tests.mixed import PIECES

DBRX = TINY["dbrx"]


def test_a_factor_is_a_logarithm_in_its_layers_row() -> None:
    model = first_dense(DBRX)  # its first layer has no experts, so number 0 is the second layer
    shift = router_shift([ExpertFactor(0, 2, 4.0), ExpertFactor(1, 4, 0.0), ExpertFactor(1, 0, 0.5)], model)
    expected = np.zeros((model.n_layers, 5), dtype=np.float32)
    expected[1, 2], expected[2, 4], expected[2, 0] = math.log(4), -np.inf, -math.log(2)
    np.testing.assert_array_equal(shift, expected)


@pytest.mark.parametrize(
    ("factors", "said"),
    [
        ([(9, 0, 1)], "layer must be from 0 to 2"),
        ([(-1, 0, 1)], "layer must be from 0"),
        ([(0, 5, 1)], "expert must be from 0 to 4 in layer 0"),
        ([(0, 1, -1)], "factor must be 0"),
        ([(0, 1, math.nan)], "factor must be 0"),
        ([(0, 1, math.inf)], "factor must be 0"),
        ([(0, 1, 1e-4)], "from 0.001 to 1000"),
        ([(2, 3, 2), (2, 3, 4)], "expert 3 of layer 2 is named twice"),
        ([(1, 0, 0), (1, 1, 0), (1, 2, 0)], "layer 1 chooses 3 experts for each token, and only 2 are left on"),
        ([(0, 0, 2.0)] * 4097, "at most 4096"),
    ],
)
def test_what_cannot_be_is_refused_by_name(factors: list[tuple[int, int, float]], said: str) -> None:
    with pytest.raises(RequestError, match=said):
        router_shift([ExpertFactor(*one) for one in factors], DBRX)


def test_a_dense_model_has_none() -> None:
    dense = changed(DBRX, ffn=first_dense(DBRX).layers[0].ffn)
    with pytest.raises(RequestError, match="this model is dense"):
        router_shift([ExpertFactor(0, 0, 2)], dense)


def test_every_group_keeps_as_many_as_a_router_may_need_of_it() -> None:
    index, spec = next((i, s) for i, s in PIECES.moe_layers if s.n_groups > 1)
    number = [i for i, _ in PIECES.moe_layers].index(index)
    size = spec.n_experts // spec.n_groups
    least = max(2, -(-spec.top_k // spec.top_k_groups))
    off = [ExpertFactor(number, e, 0) for e in range(size - least)]
    assert np.isneginf(router_shift(off, PIECES)).sum() == size - least
    with pytest.raises(RequestError, match=f"each group must keep at least {least} experts on; {least - 1} are left"):
        router_shift([*off, ExpertFactor(number, size - 1, 0)], PIECES)


def test_layers_of_different_widths_share_a_table() -> None:
    wide = replace(DBRX.layers[0].ffn, n_experts=7, top_k=2)
    layers = (replace(DBRX.layers[0], ffn=wide), *DBRX.layers[1:])
    shift = router_shift([ExpertFactor(0, 6, 3.0)], replace(DBRX, layers=layers))
    assert shift.shape == (DBRX.n_layers, 7) and shift[0, 6] == np.float32(math.log(3))
