"""Our one Transformer against transformers 4.57.6 (golden files) and against plain NumPy, for every family.

Checkpoints go all the way: config.json and safetensors under Hugging Face names are written, opened and read by the
package, so that configuration, names, layouts and mathematics are proven together. Cached decoding in every rhythm is
compared with one pass in tests/engine/test_runner.py.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from quadriga.nn.context import PackedContext
from quadriga.nn.transformer import ModelOutput, Transformer
from quadriga.runners.torch import TorchRunner
from tests.batches import batch, logits_of
from tests.golden.checkpoints import FACTS, NAMES, config_json, oracle, results
from tests.golden.weights import IN_TRANSFORMERS_5, MODELS, PREFILL, TOKENS, WITH_PROBABILITIES, ragged
from tests.nn.routing import exact, row_errors, worst_lag
from tests.nn.wrong_models import FINER_THAN_BF16, MUTATIONS, left_to
from tests.tolerance import faults, relative_error

LoadModel = Callable[..., Transformer]

BAR = 2e-5
"""Largest difference of a float32 logit, as a share of the logits' range."""


def error(ours: Tensor, theirs: Tensor) -> float:
    return float((ours - theirs).abs().max() / (theirs.max() - theirs.min()))


def prefill(model: Transformer) -> ModelOutput:
    return model(torch.tensor(TOKENS), PackedContext([len(TOKENS)]), with_stats=True)


def decode(model: Transformer) -> Tensor:
    """Read PREFILL tokens at once and the others one by one; logits of the single steps."""
    blocks = list(range(-(-len(TOKENS) // 16)))
    runner = TorchRunner(model, len(blocks))
    logits_of(runner, batch([(TOKENS[:PREFILL], 0, blocks)]))
    return torch.cat([logits_of(runner, batch([([TOKENS[i]], i, blocks)])) for i in range(PREFILL, len(TOKENS))])


@pytest.mark.parametrize("name", [*MODELS, *IN_TRANSFORMERS_5])
@torch.inference_mode()
def test_prefill_decode_and_ragged_batches_equal_transformers(golden_model: LoadModel, name: str) -> None:
    model = golden_model(name)
    assert error(prefill(model).logits, results()[f"{name}.prefill"]) <= BAR
    assert error(decode(model), results()[f"{name}.decode"]) <= BAR
    lengths = [len(sequence) for sequence in ragged()]
    packed = torch.tensor([token for sequence in ragged() for token in sequence])
    assert error(model(packed, PackedContext(lengths)).logits, results()[f"{name}.ragged"]) <= BAR
    paged = logits_of(
        TorchRunner(model, 4 * len(lengths)),
        batch([(list(ids), 0, list(range(4 * i, 4 * i + 4))) for i, ids in enumerate(ragged())]),
    )
    assert error(paged, results()[f"{name}.ragged"]) <= BAR


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", NAMES)
@torch.inference_mode()
def test_prefill_and_decode_equal_the_numpy_statement(golden_model: LoadModel, name: str, dtype: torch.dtype) -> None:
    """In float64 a difference is a mistake, not rounding; only the rotary tables are float32, by design."""
    model = golden_model(name, dtype)
    wide_bar = 1e-12 if config_json(name)["model_type"] == "mpt" else 2e-6
    bar = BAR if dtype == torch.float32 else wide_bar
    assert error(prefill(model).logits, oracle(name)) <= bar
    assert error(decode(model), oracle(name)[PREFILL:]) <= bar


@pytest.mark.parametrize("name", WITH_PROBABILITIES)
@torch.inference_mode()
def test_router_probabilities_equal_transformers(golden_model: LoadModel, name: str) -> None:
    stats = prefill(golden_model(name)).router_stats
    theirs = results()[f"{name}.router_probs"]
    assert torch.stack([layer.probs for layer in stats]).sub(theirs).abs().max() < 1e-5
    assert torch.equal(torch.stack([layer.expert_ids for layer in stats]), theirs.topk(3).indices)
    for layer, probs in zip(stats, theirs, strict=True):
        chosen = probs.topk(3).values
        whole = 1.0 if name in ("olmoe", "qwen2moe") else chosen.sum(-1, keepdim=True)
        torch.testing.assert_close(layer.expert_weights, chosen / whole, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["dbrx", "mpt-clipped"])
@torch.inference_mode()
def test_a_good_part_of_q_k_and_v_is_really_clipped(golden_model: LoadModel, name: str) -> None:
    model = golden_model(name)
    shares: list[Tensor] = []
    for layer in model.layers:
        clip = layer.attn.spec.clip_qkv
        layer.attn.wqkv.register_forward_hook(lambda _m, _i, out, c=clip: shares.append((out.abs() > c).float().mean()))
    prefill(model)
    share = torch.stack(shares).mean().item()
    assert 0.1 < share < 0.4
    assert share == pytest.approx(FACTS["clipped_share"][name], abs=1e-3)


@pytest.mark.parametrize("what", MUTATIONS)
@torch.inference_mode()
def test_a_wrong_model_is_seen(golden_model: LoadModel, what: str) -> None:
    name, change = MUTATIONS[what]
    right = golden_model(name)
    changed = change(right.config)
    wrong = Transformer.from_parameters(changed, left_to(changed, right.state_dict()))
    assert error(prefill(wrong).logits, oracle(name)) > BAR


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", NAMES)
@torch.inference_mode()
def test_each_precision_is_within_its_rounding(golden_model: LoadModel, name: str, dtype: torch.dtype) -> None:
    model = golden_model(name, dtype)
    logits, choices = prefill(model)
    reference, free = exact(model, model.config, TOKENS, choices)
    bound = relative_error(dtype, model.config, len(TOKENS))
    rows = row_errors(logits, reference)
    assert rows.median() > bound / 20, "far below it, the bound would mean little"
    assert faults(rows, worst_lag(choices, free), bound) == []


@pytest.mark.parametrize("what", sorted(MUTATIONS.keys() - FINER_THAN_BF16))
@torch.inference_mode()
def test_bfloat16_shows_a_wrong_model_too(golden_model: LoadModel, what: str) -> None:
    name, change = MUTATIONS[what]
    right = golden_model(name, torch.bfloat16)
    changed = change(right.config)
    wrong = Transformer.from_parameters(changed, left_to(changed, right.state_dict()))
    logits, choices = prefill(wrong)
    same_top_k = not choices or choices[0].expert_ids.shape[1] == right.config.only_moe("this test").top_k
    reference, free = exact(right, right.config, TOKENS, choices if same_top_k else [])
    bound = relative_error(torch.bfloat16, right.config, len(TOKENS))
    assert faults(row_errors(logits, reference), worst_lag(choices, free), bound)
