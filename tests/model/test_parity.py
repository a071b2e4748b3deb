"""Our one Transformer against transformers 4.57.6 (golden files) and against plain NumPy, for every family.

Checkpoints go all the way: config.json and safetensors under Hugging Face names are written, opened and read by the
package, so that configuration, names, layouts and mathematics are proven together. Cached decoding in every rhythm is
compared with one pass in tests/engine/test_runner.py.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from quadriga import ops
from quadriga.engine.runner import TorchRunner
from quadriga.model.config import ModelConfig, RopeSpec
from quadriga.model.context import PackedContext
from quadriga.model.moe import Router, RouterStats
from quadriga.model.transformer import ModelOutput, Transformer
from tests.batches import batch
from tests.golden.checkpoints import FACTS, NAMES, config_json, results, weights
from tests.golden.weights import MODELS, PREFILL, TOKENS, ragged
from tests.oracles import numpy_models
from tests.tolerance import TAIL, relative_error

LoadModel = Callable[..., Transformer]

BAR = 2e-5
"""Largest difference of a float32 logit, as a share of the logits' range."""


@cache
def oracle(name: str) -> Tensor:
    """The NumPy statement's logits (T, V), float64."""
    w, raw = {k: v.astype(np.float64) for k, v in weights(name).items()}, config_json(name)
    if name != "grok1":
        return torch.from_numpy(numpy_models.ORACLES[raw["model_type"]](w, raw, TOKENS))
    sizes = {
        "d_model": raw["hidden_size"],
        "n_layers": raw["num_hidden_layers"],
        "n_heads": raw["num_attention_heads"],
        "n_kv_heads": raw["num_key_value_heads"],
        "top_k": raw["num_experts_per_tok"],
    }
    return torch.from_numpy(numpy_models.grok1(w, sizes, TOKENS))


def error(ours: Tensor, theirs: Tensor) -> float:
    return float((ours - theirs).abs().max() / (theirs.max() - theirs.min()))


def prefill(model: Transformer) -> ModelOutput:
    return model(torch.tensor(TOKENS), PackedContext([len(TOKENS)]), with_stats=True)


def decode(model: Transformer) -> Tensor:
    """Read PREFILL tokens at once and the others one by one; logits of the single steps."""
    blocks = list(range(-(-len(TOKENS) // 16)))
    runner = TorchRunner(model, len(blocks))
    runner.forward(batch([(TOKENS[:PREFILL], 0, blocks)]))
    return torch.cat([runner.forward(batch([([TOKENS[i]], i, blocks)])) for i in range(PREFILL, len(TOKENS))])


@pytest.mark.parametrize("name", MODELS)
@torch.inference_mode()
def test_prefill_decode_and_ragged_batches_equal_transformers(golden_model: LoadModel, name: str) -> None:
    model = golden_model(name)
    assert error(prefill(model).logits, results()[f"{name}.prefill"]) <= BAR
    assert error(decode(model), results()[f"{name}.decode"]) <= BAR
    lengths = [len(sequence) for sequence in ragged()]
    packed = torch.tensor([token for sequence in ragged() for token in sequence])
    assert error(model(packed, PackedContext(lengths)).logits, results()[f"{name}.ragged"]) <= BAR
    paged = TorchRunner(model, 4 * len(lengths)).forward(
        batch([(list(ids), 0, list(range(4 * i, 4 * i + 4))) for i, ids in enumerate(ragged())])
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


@pytest.mark.parametrize("name", ["dbrx", "mixtral"])
@torch.inference_mode()
def test_router_probabilities_equal_transformers(golden_model: LoadModel, name: str) -> None:
    stats = prefill(golden_model(name)).router_stats
    theirs = results()[f"{name}.router_probs"]
    assert torch.stack([layer.probs for layer in stats]).sub(theirs).abs().max() < 1e-5
    assert torch.equal(torch.stack([layer.expert_ids for layer in stats]), theirs.topk(3).indices)
    for layer, probs in zip(stats, theirs, strict=True):
        chosen = probs.topk(3).values
        torch.testing.assert_close(layer.expert_weights, chosen / chosen.sum(-1, keepdim=True), rtol=0, atol=1e-5)


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


# What a test of parity is worth is what it can see: each change below must break it.
MUTATIONS: dict[str, tuple[str, Callable[[ModelConfig], ModelConfig]]] = {
    "rope theta 10000, as transformers 5.15-5.23 loads DBRX": (
        "dbrx",
        lambda c: replace(c, position=RopeSpec(theta=10_000.0)),
    ),
    "no clipping": ("dbrx", lambda c: replace(c, attn=replace(c.attn, clip_qkv=None))),
    "weights not renormalised": ("dbrx", lambda c: replace(c, ffn=replace(c.ffn, normalize_p=None))),
    "weights of norm 2": ("dbrx", lambda c: replace(c, ffn=replace(c.ffn, normalize_p=2.0))),
    "one expert fewer": ("mixtral", lambda c: replace(c, ffn=replace(c.ffn, top_k=2))),
    "vote": ("mixtral", lambda c: replace(c, ffn=replace(c.ffn, aggregate="vote"))),
    "layer norm for rms norm": ("llama", lambda c: replace(c, norm=replace(c.norm, kind="layer"))),
    "epsilon 3e-5": ("llama", lambda c: replace(c, norm=replace(c.norm, eps=3e-5))),
    "scores of twice the scale": ("llama-tied", lambda c: replace(c, attn=replace(c.attn, scale=2 * 8**-0.5))),
    "tanh gelu": ("mpt", lambda c: replace(c, ffn=replace(c.ffn, activation="gelu_tanh"))),
    "alibi bias 6": ("mpt", lambda c: replace(c, position=replace(c.position, max_bias=6.0))),
    "no clipping in mpt": ("mpt-clipped", lambda c: replace(c, attn=replace(c.attn, clip_qkv=None))),
    "exact gelu": ("grok1", lambda c: replace(c, ffn=replace(c.ffn, activation="gelu"))),
    "no soft cap": ("grok1", lambda c: replace(c, attn=replace(c.attn, soft_cap=None))),
    "logits not scaled": ("grok1", lambda c: replace(c, logit_scale=1.0)),
    "embeddings not scaled": ("grok1", lambda c: replace(c, embedding_scale=1.0)),
}
FINER_THAN_BF16 = {"epsilon 3e-5", "tanh gelu", "exact gelu", "no soft cap"}
"""Mistakes smaller than bf16's own rounding: only float32 can show them."""


@pytest.mark.parametrize("what", MUTATIONS)
@torch.inference_mode()
def test_a_wrong_model_is_seen(golden_model: LoadModel, what: str) -> None:
    name, change = MUTATIONS[what]
    right = golden_model(name)
    wrong = Transformer.from_parameters(change(right.config), right.state_dict())
    assert error(prefill(wrong).logits, oracle(name)) > BAR


class ForcedRouter(nn.Module):
    """A router whose choice of experts is given, so that two precisions can be compared where a near tie flips."""

    def __init__(self, router: Router, ids: Tensor) -> None:
        super().__init__()
        self.router, self.ids = router, ids

    def forward(self, x: Tensor) -> ops.Routing:
        free = self.router(x)
        chosen, p = free.probs.gather(1, self.ids), self.router.spec.normalize_p
        if p is not None:
            chosen = chosen / torch.linalg.vector_norm(chosen, ord=p, dim=-1, keepdim=True)
        return ops.Routing(self.ids, chosen, free.probs, free.logits)


def exact(model: Transformer, config: ModelConfig, choices: list[RouterStats]) -> ModelOutput:
    """float64 results of a model of ``config`` with the (rounded) weights of ``model`` and given expert choices."""
    wide = Transformer.from_parameters(config, {name: t.double() for name, t in model.state_dict().items()})
    for layer, stats in zip(wide.layers, choices, strict=False):
        layer.moe.router = ForcedRouter(layer.moe.router, stats.expert_ids)
    return prefill(wide)


def in_deviations(ours: Tensor, theirs: Tensor) -> Tensor:
    """Root mean square difference of each row (T,), in units of the reference's standard deviation."""
    return (ours - theirs).square().mean(-1).sqrt() / theirs.std()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", NAMES)
@torch.inference_mode()
def test_each_precision_is_within_its_rounding(golden_model: LoadModel, name: str, dtype: torch.dtype) -> None:
    model = golden_model(name, dtype)
    logits, choices = prefill(model)
    reference, free = exact(model, model.config, choices)
    bound = relative_error(dtype, model.config, len(TOKENS))
    rows = in_deviations(logits, reference)
    assert bound / 20 < rows.median() < bound  # far below it, the bound would mean little
    assert rows.max() < TAIL * bound
    # An expert chosen here and not there was nearly as probable: the choice is rounding, not a mistake.
    for mine, wide in zip(choices, free, strict=True):
        kth_best = wide.probs.sort(dim=-1, descending=True).values[:, [2]]
        lag = (kth_best - wide.probs.gather(1, mine.expert_ids)).clamp(min=0)
        assert lag.max() < TAIL * bound * wide.probs.std()


@pytest.mark.parametrize("what", sorted(MUTATIONS.keys() - FINER_THAN_BF16))
@torch.inference_mode()
def test_bfloat16_shows_a_wrong_model_too(golden_model: LoadModel, what: str) -> None:
    name, change = MUTATIONS[what]
    right = golden_model(name, torch.bfloat16)
    wrong = Transformer.from_parameters(change(right.config), right.state_dict())
    logits, choices = prefill(wrong)
    same_top_k = not choices or choices[0].expert_ids.shape[1] == right.config.ffn.top_k  # type: ignore[union-attr]
    reference, _ = exact(right, right.config, choices if same_top_k else [])
    assert in_deviations(logits, reference).median() > relative_error(torch.bfloat16, right.config, len(TOKENS))
