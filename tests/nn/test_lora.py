"""Adapters against the naive statement W + s B A in float64, and what must hold of experts and packed bases."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from quadriga.errors import ConfigError
from quadriga.kernels import ops
from quadriga.model.adapter_spec import LoraSpec, adapted_shapes
from quadriga.model.config import ModelConfig
from quadriga.model.weight_map import parameter_shapes
from quadriga.nn import moe
from quadriga.nn.context import PackedContext
from quadriga.nn.linear import Factors, hold, whole
from quadriga.nn.lora import attach, quantised
from quadriga.nn.transformer import Transformer, random_parameters
from tests.checkpoint.models import TINY
from tests.packing import pack, unpack

IDS = torch.randint(0, 97, (37,), generator=torch.Generator().manual_seed(5))
ALL = {
    "dbrx": ("attention", "router", "experts", "embeddings", "head"),
    "mixtral": ("attention", "router", "experts", "embeddings", "head"),
    "llama2": ("attention", "ffn", "embeddings", "head"),
    "llama2-tied": ("attention", "ffn", "embeddings"),
    "llama3": ("attention", "ffn", "embeddings", "head"),
    "mistral": ("attention", "ffn", "embeddings", "head"),
    "qwen2": ("attention", "ffn", "embeddings"),
    "qwen3": ("attention", "ffn", "embeddings"),
    "qwen3moe": ("attention", "router", "experts", "embeddings", "head"),
    "olmoe": ("attention", "router", "experts", "embeddings", "head"),
    "granitemoe": ("attention", "router", "experts", "embeddings"),
    "granite_swa": ("attention", "ffn", "embeddings"),
    "granitemoe_swa": ("attention", "router", "experts", "shared", "embeddings", "head"),
    "granitemoeshared": ("attention", "router", "experts", "shared", "embeddings"),
    "gpt_oss": ("attention", "router", "experts", "embeddings", "head"),
    "glm4moe": ("attention", "router", "experts", "ffn", "shared", "embeddings", "head"),
    "dots1": ("attention", "router", "experts", "ffn", "shared", "embeddings", "head"),
    "ernie4_5-moe": ("attention", "router", "experts", "ffn", "shared", "embeddings"),
    "hunyuan-moe": ("attention", "router", "experts", "shared", "embeddings"),
    "minimax-m2": ("attention", "router", "experts", "embeddings", "head"),
    "qwen2moe": ("attention", "router", "experts", "shared", "embeddings", "head"),
    "olmo2": ("attention", "ffn", "embeddings", "head"),
    "flex_olmo": ("attention", "router", "experts", "embeddings", "head"),
    "phimoe": ("attention", "router", "experts", "embeddings", "head"),
    "deepseek_v2": ("attention", "router", "experts", "ffn", "shared", "embeddings", "head"),
    "deepseek_v3": ("attention", "router", "experts", "ffn", "shared", "embeddings", "head"),
    "lfm2": ("attention", "ffn", "embeddings"),
    "lfm2moe": ("attention", "router", "experts", "ffn", "embeddings"),
    "qwen3next": ("attention", "router", "experts", "shared", "embeddings", "head"),
    "qwen35moe": ("attention", "router", "experts", "shared", "embeddings", "head"),
    "qwen35": ("attention", "ffn", "embeddings"),
    "granitehybrid": ("attention", "router", "experts", "shared", "embeddings"),
    "gemma4": ("attention", "router", "experts", "shared", "embeddings"),
    "gemma4-dense": ("attention", "ffn", "embeddings"),
    "granitehybrid-dense": ("attention", "ffn", "embeddings"),
    "gemma2": ("attention", "ffn", "embeddings"),
    "gemma3": ("attention", "ffn", "embeddings"),
    "mellum": ("attention", "router", "experts", "embeddings", "head"),
    "nemotron_h": ("attention", "router", "experts", "shared", "embeddings", "head"),
    "nemotron_h-dense": ("attention", "ffn", "embeddings", "head"),
    "mpt": ("attention", "ffn"),
    "grok1": ("attention", "router", "experts", "embeddings"),
}


@pytest.fixture(params=["grouped", "by expert", "reference"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """How adapted experts are computed: grouped products, the processor's own pass, or the plain statement."""
    if request.param == "grouped":
        monkeypatch.setattr(moe, "_parts", lambda *_: None)
    with ops.use("reference" if request.param == "reference" else "cpu"):
        yield request.param


def model_of(name: str, dtype: torch.dtype = torch.float64, std: float = 0.2) -> Transformer:
    parameters = random_parameters(TINY[name], std=std)
    return Transformer.from_parameters(TINY[name], {n: t.to(dtype) for n, t in parameters.items()}).eval()


def random_factors(config: ModelConfig, spec: LoraSpec, seed: int = 0) -> dict[str, tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    return {
        name: (torch.randn(a, generator=generator) * 0.3, torch.randn(b, generator=generator) * 0.3)
        for name, (a, b) in adapted_shapes(config, spec).items()
    }


def stored_factors(
    config: ModelConfig, spec: LoraSpec, seed: int = 0
) -> dict[str, tuple[NDArray[np.float32], NDArray[np.float32]]]:
    """:func:`random_factors` as files have them."""
    return {name: (a.numpy(), b.numpy()) for name, (a, b) in random_factors(config, spec, seed).items()}


def loss_of(model: Transformer) -> Tensor:
    logits = model(IDS, PackedContext([20, 17])).logits
    return -logits[:-1].log_softmax(-1).gather(1, IDS[1:, None]).mean()


@pytest.mark.parametrize("name", list(TINY))
def test_logits_and_gradients_are_those_of_the_materialised_weight(name: str, way: str) -> None:
    spec = LoraSpec(rank=4, alpha=6.0, targets=ALL[name])
    factors = random_factors(TINY[name], spec)
    model = model_of(name)
    made = attach(model, spec, factors)
    for one in made.values():  # float64 all through, so that only mathematics is compared
        one.double()
    loss_of(model).backward()

    naive = {n: (a.double().requires_grad_(), b.double().requires_grad_()) for n, (a, b) in factors.items()}
    plain = model_of(name)
    weights = {n: p.detach() for n, p in plain.named_parameters()}
    for n, (a, b) in naive.items():
        weights[n] = weights[n] + 1.5 * torch.einsum("...or,...ri->...oi", b, a)
    logits = torch.func.functional_call(plain, weights, (IDS, PackedContext([20, 17]))).logits
    wanted = -logits[:-1].log_softmax(-1).gather(1, IDS[1:, None]).mean()
    wanted.backward()

    torch.testing.assert_close(model(IDS, PackedContext([20, 17])).logits, logits, rtol=0, atol=1e-9)
    assert made.keys() == naive.keys()
    for n, one in made.items():
        for got, want in ((one.a.grad, naive[n][0].grad), (one.b.grad, naive[n][1].grad)):
            assert want is not None and want.abs().max() > 0, n
            torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-12, msg=n)


def test_a_new_adapter_changes_nothing_and_trains_only_itself() -> None:
    plain = model_of("mixtral", torch.float32)
    wanted = plain(IDS, PackedContext([37])).logits
    model = model_of("mixtral", torch.float32)
    made = attach(model, LoraSpec(rank=4, alpha=8.0, targets=ALL["mixtral"]), seed=1)
    assert torch.equal(model(IDS, PackedContext([37])).logits, wanted)
    trained = {id(p) for p in model.parameters() if p.requires_grad}
    assert trained == {id(p) for one in made.values() for p in (one.a, one.b)}
    again = attach(model_of("mixtral", torch.float32), LoraSpec(rank=4, alpha=8.0, targets=ALL["mixtral"]), seed=1)
    assert all(torch.equal(made[n].a, again[n].a) for n in made)


def test_experts_without_a_token_get_exactly_zero_and_the_others_do_not(way: str) -> None:
    model = model_of("mixtral")
    made = attach(model, LoraSpec(rank=4, alpha=4.0, targets=("experts",)), None)
    for one in made.values():
        torch.nn.init.normal_(one.b, std=0.1)
    tokens = IDS[:1]  # one token visits three of five experts
    output = model(tokens, PackedContext([1]), with_stats=True)
    output.logits.square().sum().backward()
    for layer, stats in enumerate(output.router_stats):
        visited = set(stats.expert_ids.reshape(-1).tolist())
        assert len(visited) == 3
        for part in ("w_gate", "w_up", "w_down"):
            one = made[f"layers.{layer}.moe.{part}"]
            for gradient in (one.a.grad, one.b.grad):
                for e in range(5):
                    assert bool((gradient[e] != 0).any()) == (e in visited)


def test_dropout_is_for_training_only(way: str) -> None:
    model = model_of("mixtral", torch.float32)
    spec = LoraSpec(rank=4, alpha=4.0, targets=("experts",), dropout=0.5)
    attach(model, spec, random_factors(TINY["mixtral"], spec))
    one, two = (model(IDS, PackedContext([37])).logits for _ in range(2))
    assert torch.equal(one, two)
    model.train()
    one, two = (model(IDS, PackedContext([37])).logits for _ in range(2))
    assert not torch.equal(one, two)


@pytest.mark.parametrize("form", ["q4", "q8"])
@pytest.mark.parametrize("name", ["mixtral", "llama2", "mpt"])
def test_over_a_packed_base_it_is_the_adapter_over_the_unpacked_numbers(name: str, form: str, way: str) -> None:
    spec = LoraSpec(rank=4, alpha=6.0, targets=tuple(t for t in ALL[name] if t in ("attention", "experts", "ffn")))
    factors = random_factors(TINY[name], spec)
    parameters = random_parameters(TINY[name], std=0.2)
    packed: dict[str, object] = {}
    unpacked = dict(parameters)
    for n in adapted_shapes(TINY[name], spec):
        t = parameters[n]
        one = [pack(m.contiguous(), form) for m in (t if t.ndim == 3 else t[None])]
        packed[n] = one if t.ndim == 3 else one[0]
        unpacked[n] = torch.stack([unpack(p) for p in one]).view(t.shape)
        assert not torch.equal(unpacked[n], t)
    model = Transformer.from_parameters(TINY[name], parameters).eval()
    quantised(model, packed)  # type: ignore[arg-type]
    plain = Transformer.from_parameters(TINY[name], unpacked).eval()
    grads = []
    for m in (model, plain):
        made = attach(m, spec, factors)
        loss_of(m).backward()
        grads.append({n: (one.a.grad, one.b.grad) for n, one in made.items()})
    torch.testing.assert_close(
        model(IDS, PackedContext([37])).logits, plain(IDS, PackedContext([37])).logits, rtol=0, atol=2e-5
    )
    for n in grads[0]:
        for got, want in zip(grads[0][n], grads[1][n], strict=True):
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-6)


def test_experts_with_factors_on_some_of_their_matrices(monkeypatch: pytest.MonkeyPatch) -> None:
    spec = LoraSpec(rank=4, alpha=6.0, targets=("experts",))
    results = []
    for parts in (lambda *_: None, moe._parts):
        monkeypatch.setattr(moe, "_parts", parts)
        model = model_of("mixtral")
        made = attach(model, spec, random_factors(TINY["mixtral"], spec))
        for module in model.modules():
            if isinstance(module, moe.MoE):
                hold(module, "w_up", module.w_up.frozen)  # type: ignore[union-attr]
        made = {name: one.double() for name, one in made.items() if not name.endswith("w_up")}
        loss_of(model).backward()
        results.append([t.grad for one in made.values() for t in (one.a, one.b)])
    for got, want in zip(results[1], results[0], strict=True):
        assert want is not None and want.abs().max() > 0
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-14)


def test_the_effective_weight_is_what_a_loss_over_the_head_sees() -> None:
    spec = LoraSpec(rank=4, alpha=6.0, targets=("embeddings",))
    factors = random_factors(TINY["llama2-tied"], spec)
    model = model_of("llama2-tied")
    before = whole(model.embed.weight).clone()
    attach(model, spec, factors)
    a, b = factors["embed.weight"]
    torch.testing.assert_close(whole(model.embed.weight), before + 1.5 * (b @ a).double())
    torch.testing.assert_close(model.embed.look_up(IDS), whole(model.embed.weight)[IDS])


def test_targets_a_model_has_not_are_refused() -> None:
    with pytest.raises(ConfigError, match="experts, router, which this model has not: it is a dense model"):
        attach(model_of("llama2"), LoraSpec(rank=4, alpha=4.0, targets=("experts", "router")))
    with pytest.raises(ConfigError, match="its head is the table: target embeddings"):
        attach(model_of("llama2-tied"), LoraSpec(rank=4, alpha=4.0, targets=("head",)))
    with pytest.raises(ConfigError, match=r"lora.targets must be some of .*; got \['q_proj'\]"):
        LoraSpec(rank=4, alpha=4.0, targets=("q_proj",))
    assert set(adapted_shapes(TINY["dbrx"], LoraSpec(rank=2, alpha=1.0, targets=ALL["dbrx"]))) == {
        n for n in parameter_shapes(TINY["dbrx"]) if not n.endswith("norm.weight")
    }
    assert isinstance(Factors(torch.ones(2, 3), torch.ones(4, 2), scale=2.0).delta(), Tensor)
