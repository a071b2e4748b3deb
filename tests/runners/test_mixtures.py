"""Every piece of a mixture, in torch against naive loops in float64, and the CPU's kernels against torch."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from quadriga.errors import ConfigError
from quadriga.kernels import ops
from quadriga.kernels.arrays import arrays
from quadriga.kernels.cpu import library as cpu
from quadriga.model.adapter_spec import LoraSpec, adapted_shapes
from quadriga.model.config import DenseSpec, MoESpec
from quadriga.model.config_json import config_from_json, config_to_json
from quadriga.nn.context import PackedContext
from quadriga.nn.lora import attach
from quadriga.nn.moe import MoE
from quadriga.nn.transformer import Transformer, random_parameters
from quadriga.runners.compiled import CompiledModel, pack_parameters
from tests.batches import batch, logits_of, passed
from tests.mixed import PIECES

HERE = cpu.isas_in_force()
IDS = torch.randint(0, 97, (71,), generator=torch.Generator().manual_seed(4))
D = 48


def parameters() -> dict[str, Tensor]:
    """Weights of a size at which limits are reached, corrections move choices and shares differ."""
    factors = {".w_": 4, ".b_": 16}
    return {
        n: t * next((f for part, f in factors.items() if part in n), 1)
        for n, t in random_parameters(PIECES, std=0.25).items()
    }


def naive(moe: MoE, x: Tensor) -> tuple[Tensor, list[list[int]]]:
    """Token by token and expert by expert, straight from the spec's words; and what was chosen."""
    spec, out, chosen = moe.spec, torch.zeros_like(x), []
    for n, row in enumerate(x):
        logits = moe.router.weight @ row + (0 if moe.router.bias is None else moe.router.bias)
        scores = logits.softmax(0) if spec.score == "softmax" else 1 / (1 + torch.exp(-logits))
        by = (scores if moe.router.correction is None else scores + moe.router.correction).tolist()
        size = spec.n_experts // spec.n_groups
        worth = [sum(sorted(by[g * size : (g + 1) * size])[-2:]) for g in range(spec.n_groups)]
        groups = sorted(range(spec.n_groups), key=lambda g, worth=worth: (-worth[g], g))[: spec.top_k_groups]
        allowed = [e for e in range(spec.n_experts) if spec.n_groups == 1 or e // size in groups]
        ids = sorted(allowed, key=lambda e, by=by: (-by[e], e))[: spec.top_k]
        total = max(sum(float(scores[e]) for e in ids) + spec.normalize_eps, spec.normalize_min)
        for e in ids:
            gate, up = moe.w_gate[e] @ row, moe.w_up[e] @ row
            if moe.b_gate is not None:
                gate, up = gate + moe.b_gate[e], up + moe.b_up[e]
            y = moe.w_down[e] @ unit(gate, up, spec.activation)
            y = y if moe.b_down is None else y + moe.b_down[e]
            out[n] += scores[e] / total * spec.routed_scale * y
        if moe.shared is not None:
            share = 1.0 if moe.shared_gate is None else 1 / (1 + torch.exp(-(moe.shared_gate @ row)))
            shared = moe.shared
            hidden = unit(shared.w_gate @ row, shared.w_up @ row, shared.activation)
            out[n] += share * (shared.w_down @ hidden)
        chosen.append(ids)
    return out, chosen


def unit(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    if activation == "clamped_glu":
        gate, up = torch.where(gate > 7, 7.0, gate), torch.where(up.abs() > 7, 7.0 * up.sign(), up)
        return (up + 1) * gate / (1 + torch.exp(-1.702 * gate))
    if activation == "gelu":
        return gate * 0.5 * (1 + torch.erf(gate / 2**0.5)) * up
    return gate / (1 + torch.exp(-gate)) * up


def mixture(layer: int) -> tuple[MoE, Tensor]:
    model = Transformer.from_parameters(PIECES, {n: t.double() for n, t in parameters().items()}).eval()
    x = torch.randn(41, D, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    return model.layers[layer].moe, x


@pytest.mark.parametrize("layer", [1, 2])
@torch.no_grad()
def test_a_mixture_is_the_naive_loop(layer: int) -> None:
    moe, x = mixture(layer)
    out, stats = moe(x)
    expected, chosen = naive(moe, x)
    assert stats.expert_ids.tolist() == chosen
    torch.testing.assert_close(out, expected, rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(stats.probs.sum(-1), torch.ones(len(x), dtype=torch.float64))


CHANGES = {
    1: [
        {"score": "softmax"}, {"normalize_eps": 0.0}, {"routed_scale": 1.0}, {"n_groups": 1, "top_k_groups": 1},
        {"top_k_groups": 3}, {"shared": DenseSpec(d_ff=104, activation="silu")}, {"normalize_p": None},
    ],
    2: [{"normalize_min": 0.0}, {"activation": "silu"}, {"shared": DenseSpec(d_ff=40, activation="relu")}],
}  # fmt: skip
LEFT_OUT = {1: ["router.correction", "shared.w_down"], 2: ["router.bias", "b_gate", "b_up", "b_down", "shared_gate"]}


@pytest.mark.parametrize("layer", [1, 2])
@torch.no_grad()
def test_every_piece_left_out_is_seen(layer: int) -> None:
    """What the two tests here could not see, they would not hold to anything."""
    model = Transformer.from_parameters(PIECES, parameters()).eval()
    right = model(IDS, PackedContext([len(IDS)])).logits
    bar = 1e-3 * float(right.abs().max())
    for change in CHANGES[layer]:
        layers = list(PIECES.layers)
        layers[layer] = replace(layers[layer], ffn=replace(layers[layer].ffn, **change))
        wrong = Transformer.from_parameters(replace(PIECES, layers=tuple(layers)), parameters()).eval()
        assert float((wrong(IDS, PackedContext([len(IDS)])).logits - right).abs().max()) > bar, change
    for name in LEFT_OUT[layer]:
        values = parameters()
        values[f"layers.{layer}.moe.{name}"].zero_()
        wrong = Transformer.from_parameters(PIECES, values).eval()
        assert float((wrong(IDS, PackedContext([len(IDS)])).logits - right).abs().max()) > bar, name


@pytest.mark.parametrize("isa", HERE)
@torch.inference_mode()
def test_the_kernels_compute_what_torch_computes(isa: str) -> None:
    values = parameters()
    model = Transformer.from_parameters(PIECES, {n: t.double() for n, t in values.items()}).eval()
    expected, stats = model(IDS, PackedContext([len(IDS)]), with_stats=True)
    packed = pack_parameters(arrays(values), "float32")
    compiled = CompiledModel(PIECES, packed, threads=2, n_blocks=8, kv_format="float32", isa=isa)
    logits, routing = passed(compiled, batch([(IDS.tolist(), 0, list(range(5)))]))
    assert float((logits - expected).abs().max()) < 2e-5 * float(expected.max() - expected.min())
    for mine, theirs, load in zip(routing, stats, compiled.expert_load(), strict=True):
        assert np.array_equal(np.asarray(mine.expert_ids), theirs.expert_ids.numpy())
        torch.testing.assert_close(mine.expert_weights.double(), theirs.expert_weights, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(mine.probs.double(), theirs.probs, rtol=1e-3, atol=1e-5)
        assert load.tolist() == theirs.load().tolist(), "the shared network is no expert: it is not counted"


@pytest.mark.parametrize("isa", HERE)
@pytest.mark.parametrize(("form", "bits"), [("float32", "auto"), ("bfloat16", "auto"), ("q8", "int8"), ("q4", "int16")])
def test_a_result_does_not_depend_on_the_batch(form: str, bits: str, isa: str) -> None:
    packed, blocks, tokens = pack_parameters(arrays(parameters()), form), list(range(5)), IDS.tolist()

    def fresh(threads: int) -> CompiledModel:
        return CompiledModel(PIECES, packed, threads=threads, n_blocks=8, activations=bits, isa=isa)

    whole, alone, at, rows = logits_of(fresh(2), batch([(tokens, 0, blocks)])), fresh(1), 0, []
    for size in (1, 2, 13, 40, 1, 14):
        rows.append(logits_of(alone, batch([(tokens[at : at + size], at, blocks)])))
        at += size
    assert at == len(tokens) and torch.equal(torch.cat(rows), whole)


@pytest.mark.parametrize("isa", HERE)
@pytest.mark.parametrize(("n_experts", "top_k"), [(5, 3), (16, 16), (17, 4), (64, 8), (128, 8), (200, 7), (512, 10)])
@torch.inference_mode()
def test_many_experts_are_chosen_in_order_and_of_equal_ones_the_lower(n_experts: int, top_k: int, isa: str) -> None:
    config = replace(
        PIECES, layers=(replace(PIECES.layers[0], ffn=MoESpec(d_ff=16, n_experts=n_experts, top_k=top_k, activation="silu")),)
    )  # fmt: skip
    values = random_parameters(config, std=0.25)
    router = values["layers.0.moe.router.weight"]
    router[1::3] = router[0].clone()  # a third of them alike
    packed = pack_parameters(arrays(values), "float32")
    compiled = CompiledModel(config, packed, threads=1, n_blocks=8, kv_format="float32", isa=isa)
    _, (routing,) = passed(compiled, batch([(IDS.tolist(), 0, list(range(5)))]))
    for ids, logits in zip(*(getattr(routing, part).tolist() for part in ("expert_ids", "logits"))):  # noqa: B905
        assert ids == sorted(range(n_experts), key=lambda e, z=logits: (-z[e], e))[:top_k]


@pytest.mark.parametrize("layer", [1, 2])
def test_gradients_are_those_of_the_naive_loop(layer: int) -> None:
    moe, x = mixture(layer)
    cotangent = torch.randn(x.shape, dtype=x.dtype, generator=torch.Generator().manual_seed(1))
    leaves = dict(moe.named_parameters())
    assert not any("correction" in name for name in leaves), "no gradient trains it"
    grads = torch.autograd.grad((moe(x)[0] * cotangent).sum(), list(leaves.values()))
    expected = []
    spec = moe.spec
    for n, row in enumerate(x):  # one token at a time through torch's own autograd
        with ops.use("reference"):
            one = torch.autograd.grad((moe(row[None])[0] * cotangent[n]).sum(), list(leaves.values()))
        expected = [a + b for a, b in zip(expected, one, strict=True)] if expected else list(one)
    assert spec.top_k < spec.n_experts
    for name, grad, want in zip(leaves, grads, expected, strict=True):
        assert want.abs().max() > 0, name
        torch.testing.assert_close(grad, want, rtol=1e-9, atol=1e-11, msg=name)


def test_adapters_reach_routed_and_shared_networks() -> None:
    """The adapted model is the one whose weights are W + s B A, values and gradients."""
    spec = LoraSpec(rank=4, alpha=6.0, targets=("attention", "router", "experts", "shared", "ffn"))
    generator = torch.Generator().manual_seed(0)
    factors = {
        name: tuple(0.2 * torch.randn(shape, generator=generator) for shape in pair)
        for name, pair in adapted_shapes(PIECES, spec).items()
    }
    assert {"layers.1.moe.shared.w_down", "layers.2.moe.shared.w_gate"} <= factors.keys()
    wide = {n: t.double() for n, t in parameters().items()}
    model = Transformer.from_parameters(PIECES, dict(wide)).eval()
    made = attach(model, spec, factors)  # type: ignore[arg-type]
    for one in made.values():
        one.double()
    pairs = {n: [t.double().requires_grad_() for t in pair] for n, pair in factors.items()}
    merged = {n: t + (1.5 * (pairs[n][1] @ pairs[n][0]) if n in pairs else 0) for n, t in wide.items()}
    plain = Transformer.from_parameters(PIECES, dict(wide)).eval()
    expected = torch.func.functional_call(plain, merged, (IDS, PackedContext([len(IDS)]))).logits
    got = model(IDS, PackedContext([len(IDS)])).logits
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-9)
    got.square().mean().backward()
    expected.square().mean().backward()
    for name, one in made.items():
        for mine, wanted in zip((one.a.grad, one.b.grad), (t.grad for t in pairs[name]), strict=True):
            assert mine is not None and wanted is not None and wanted.abs().max() > 0, name
            torch.testing.assert_close(mine, wanted, rtol=1e-6, atol=1e-10, msg=name)


def test_a_configuration_keeps_every_piece() -> None:
    assert config_from_json(config_to_json(PIECES)) == PIECES


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"score": "tanh"}, "ffn.score must be one of softmax, sigmoid, sparse_mixer"),
        ({"n_groups": 4}, "n_groups must part the experts into equal groups of two or more"),
        ({"n_groups": 3, "top_k_groups": 1, "top_k": 3}, "the chosen groups must exist and hold top_k experts"),
        ({"shared_gate": True}, "shared_gate needs a shared network"),
        ({"routed_scale": 0.0}, "routed_scale must be a finite number above 0"),
        ({"gated": False, "expert_bias": True}, "experts with biases must be gated"),
        ({"gated": False, "activation": "clamped_glu"}, "the activation clamped_glu needs gated experts"),
    ],
)
def test_what_cannot_be_is_refused(change: dict[str, object], says: str) -> None:
    sizes: dict[str, object] = {"d_ff": 8, "n_experts": 6, "top_k": 2, "activation": "silu"}
    with pytest.raises(ConfigError, match=says):
        MoESpec(**(sizes | change))  # type: ignore[arg-type]
