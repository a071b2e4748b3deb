"""The CPU's kernels against transformers 4.57.6 (golden files), and Grok-1's against plain NumPy: what test_parity.py asks
of the plain model, with the same list of wrong models, in float32 on every instruction set of this machine.

That the kernels also equal the plain model in every packed format is tests/model/test_compiled.py.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from quadriga.kernels.arrays import arrays
from quadriga.kernels.cpu import library as cpu
from quadriga.model.config import ModelConfig
from quadriga.nn.transformer import Transformer
from quadriga.runners.compiled import CompiledModel, pack_parameters
from tests.batches import batch, logits_of, passed
from tests.golden.checkpoints import NAMES, oracle, results
from tests.golden.weights import IN_TRANSFORMERS_5, MODELS, PREFILL, TOKENS, ragged
from tests.nn.wrong_models import MUTATIONS, left_to

LoadModel = Callable[..., Transformer]

BAR = 2e-5
"""Largest difference of a float32 logit, as a share of the logits' range."""

HERE = cpu.isas_in_force()
BLOCKS = [5, 0, 7]


def build(model: Transformer, config: ModelConfig | None = None, isa: str | None = None) -> CompiledModel:
    config = config or model.config
    parameters = pack_parameters(arrays(left_to(config, model.state_dict())), "float32")
    return CompiledModel(config, parameters, threads=2, n_blocks=12, kv_format="float32", isa=isa)


def prefill(model: CompiledModel) -> Tensor:
    return logits_of(model, batch([(TOKENS, 0, BLOCKS)]))


def decode(model: CompiledModel) -> Tensor:
    """Read PREFILL tokens at once and the others one by one; logits of the single steps."""
    logits_of(model, batch([(TOKENS[:PREFILL], 0, BLOCKS)]))
    steps = [logits_of(model, batch([([TOKENS[i]], i, BLOCKS)])) for i in range(PREFILL, len(TOKENS))]
    return torch.cat(steps)


def error(ours: Tensor, theirs: Tensor) -> float:
    return float((ours - theirs).abs().max() / (theirs.max() - theirs.min()))


@pytest.mark.parametrize("isa", HERE)
@pytest.mark.parametrize("name", [*MODELS, *IN_TRANSFORMERS_5])
def test_prefill_decode_and_ragged_batches_equal_transformers(golden_model: LoadModel, name: str, isa: str) -> None:
    model = build(golden_model(name), isa=isa)
    assert error(prefill(model), results()[f"{name}.prefill"]) <= BAR
    assert error(decode(model), results()[f"{name}.decode"]) <= BAR
    together = [(list(ids), 0, list(range(4 * i, 4 * i + 4))) for i, ids in enumerate(ragged())]
    assert error(logits_of(model, batch(together)), results()[f"{name}.ragged"]) <= BAR


@pytest.mark.parametrize("isa", HERE)
@pytest.mark.parametrize("name", NAMES)
def test_prefill_and_decode_equal_the_numpy_statement(golden_model: LoadModel, name: str, isa: str) -> None:
    model = build(golden_model(name), isa=isa)
    assert error(prefill(model), oracle(name)) <= BAR
    assert error(decode(model), oracle(name)[PREFILL:]) <= BAR


@pytest.mark.parametrize("isa", HERE)
@pytest.mark.parametrize("name", ["dbrx", "mixtral"])
def test_routing_equals_transformers(golden_model: LoadModel, name: str, isa: str) -> None:
    model = build(golden_model(name), isa=isa)
    theirs = results()[f"{name}.router_probs"]
    _, stats = passed(model, batch([(TOKENS, 0, BLOCKS)]))
    assert torch.stack([layer.probs for layer in stats]).sub(theirs).abs().max() < 1e-5
    assert torch.equal(torch.stack([layer.expert_ids for layer in stats]), theirs.topk(3).indices)
    for layer, probs in zip(stats, theirs, strict=True):
        chosen = probs.topk(3).values
        torch.testing.assert_close(layer.expert_weights, chosen / chosen.sum(-1, keepdim=True), rtol=0, atol=1e-5)


@pytest.mark.parametrize("what", MUTATIONS)
def test_a_wrong_model_is_seen(golden_model: LoadModel, what: str) -> None:
    name, change = MUTATIONS[what]
    right = golden_model(name)
    wrong = build(right, change(right.config))
    assert error(prefill(wrong), oracle(name)) > BAR
    assert error(decode(wrong), oracle(name)[PREFILL:]) > BAR
