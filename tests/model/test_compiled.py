"""The compiled model against the plain one, for every family, format, cache and instruction set; and batch invariance."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from quadriga.model.compiled import CompiledModel, Parameter, pack_parameters
from quadriga.model.config import ModelConfig
from quadriga.model.context import PackedContext
from quadriga.model.transformer import Transformer, random_parameters
from quadriga.ops import cpu
from quadriga.ops.packing import Packed
from tests.batches import batch
from tests.checkpoint.models import TINY
from tests.tolerance import TAIL, relative_error

BLOCK = 16
HERE = cpu.ISAS[: cpu.ISAS.index(cpu.isa()) + 1]
"""Instruction sets this processor has: each contains the ones before it."""

FAMILIES = {
    **TINY,
    "dbrx-vote": replace(TINY["dbrx"], ffn=replace(TINY["dbrx"].ffn, aggregate="vote")),
    "dbrx-fuse": replace(TINY["dbrx"], ffn=replace(TINY["dbrx"].ffn, aggregate="fuse", normalize_p=2.0)),
    "relu-wide-heads": replace(TINY["llama2"], attn=replace(TINY["llama2"].attn, head_dim=40)),
}

UNIT = {"bfloat16": 2**-9, "int8": 0.0083, "int16": 0.0083 / 128}
"""Unit roundoff of activations. Groups of 32 in 8 bits: the step is max / 127, the largest of 32 normal numbers about 2.1
deviations, so the error's root mean square is 2.1 / 127 / sqrt(12) = 0.0048 = u / sqrt(3). int16 has 128 times the steps."""

FORMATS = [("bfloat16", "bfloat16")] + [(form, bits) for form in ("q8", "q4", "q4m") for bits in ("int8", "int16")]


def make(config: ModelConfig, form: str, **options: object) -> tuple[CompiledModel, Transformer]:
    """A compiled model, and the plain one with the very numbers that the packed weights hold."""
    torch.manual_seed(1)
    parameters = random_parameters(config, seed=3, std=0.25)
    for name, values in parameters.items():
        if name.endswith("norm.weight"):
            values.uniform_(0.5, 1.5)
        if name.endswith("fuse.weight"):
            values.normal_()
        if name.endswith("moe.router.weight"):
            values.mul_(4)  # clear choices: a flipped near tie is not what is tested here
    packed = pack_parameters(parameters, form)
    plain = {name: _plain(value) for name, value in packed.items()}
    arguments: dict[str, object] = {"threads": 2, "n_blocks": 40, "kv_format": "float32"} | options
    return CompiledModel(config, packed, **arguments), Transformer.from_parameters(config, plain)  # type: ignore[arg-type]


def _plain(value: Parameter) -> Tensor:
    if isinstance(value, Tensor):
        return value
    return value.unpack() if isinstance(value, Packed) else torch.stack([p.unpack() for p in value])


def sequence(seed: int, n: int) -> list[int]:
    return torch.randint(0, 97, (n,), generator=torch.Generator().manual_seed(seed)).tolist()


def plain_logits(model: Transformer, tokens: list[int]) -> tuple[Tensor, list[Tensor]]:
    """Logits, and the chosen experts of every layer, sorted."""
    with torch.inference_mode():
        hidden, stats = model.hidden(torch.tensor(tokens), PackedContext([len(tokens)]))
        return model.head(hidden), [s.expert_ids.sort(-1).values for s in stats]


def check(compiled: CompiledModel, tokens: list[int], blocks: list[int], plain: Transformer, unit: float) -> None:
    """Logits within the bound that rounding at ``unit`` explains.

    A token whose router was near a tie may choose another expert after rounding, and what attends to it sees another
    value: one token in six may, and the tail is judged at the ninetieth percentile.
    """
    config = compiled.config
    got = compiled.forward(batch([(tokens, 0, blocks)])).clone()
    expected, choices = plain_logits(plain, tokens)
    mine = [s.expert_ids.sort(-1).values for s in compiled.router_stats(len(tokens))]
    same = torch.stack(
        [(a == b).all(-1) for a, b in zip(mine, choices, strict=True)] or [torch.ones(len(tokens)) > 0]
    ).all(0)
    error = (got - expected).square().mean(-1).sqrt() / expected.std()
    bound = relative_error(torch.bfloat16, config, len(tokens)) * unit / 2**-9
    assert same.float().mean() > 5 / 6, f"{int((~same).sum())} of {len(tokens)} tokens chose other experts"
    typical, tail = error[same].median(), error[same].quantile(0.9)
    assert typical <= bound, f"typical row off by {typical:.2e}, bound {bound:.2e}"
    assert tail <= TAIL * bound, f"one row in ten off by {tail:.2e}, bound {TAIL * bound:.2e}"


@pytest.mark.parametrize("isa", HERE)
@pytest.mark.parametrize("family", FAMILIES)
def test_equals_the_plain_model_in_float32(family: str, isa: str) -> None:
    config = FAMILIES[family]
    compiled, plain = make(config, "float32", isa=isa)
    tokens = sequence(5, 37)
    check(compiled, tokens, [3, 9, 0], plain, 2**-21)  # exp and erf to 1.5e-7, sums in float32
    got_routing = compiled.router_stats(len(tokens))
    with torch.inference_mode():
        _, routing = plain.hidden(torch.tensor(tokens), PackedContext([len(tokens)]))
    for mine, theirs in zip(got_routing, routing, strict=True):
        assert torch.equal(mine.expert_ids, theirs.expert_ids)
        torch.testing.assert_close(mine.expert_weights, theirs.expert_weights, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(mine.probs, theirs.probs, rtol=1e-3, atol=1e-5)
        torch.testing.assert_close(mine.logits, theirs.logits, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("isa", HERE)
@pytest.mark.parametrize(("form", "bits"), FORMATS)
@pytest.mark.parametrize("family", ["dbrx", "mixtral", "llama2", "mpt", "grok1"])
def test_equals_the_plain_model_in_every_format(family: str, form: str, bits: str, isa: str) -> None:
    config = FAMILIES[family]
    activations = "auto" if bits == "bfloat16" else bits
    compiled, plain = make(config, form, isa=isa, activations=activations)
    check(compiled, sequence(6, 41), [3, 9, 0], plain, UNIT[bits])


@pytest.mark.parametrize("kv_format", ["float32", "bfloat16", "q8"])
@pytest.mark.parametrize("family", ["dbrx", "mpt", "grok1"])
def test_cache_formats(family: str, kv_format: str) -> None:
    config = replace(FAMILIES[family], max_seq_len=1024)
    compiled, plain = make(config, "float32", kv_format=kv_format, n_blocks=80)
    tokens = sequence(7, 600)  # three chunks of 256 keys
    unit = {"float32": 2**-20, "bfloat16": 2**-9, "q8": 0.0083}[kv_format]
    check(compiled, tokens, list(range(60, 20, -1)), plain, unit)


@pytest.mark.parametrize("isa", HERE)
@pytest.mark.parametrize("kv_format", ["float32", "bfloat16", "q8"])
@pytest.mark.parametrize(("form", "bits"), [("float32", "auto"), *FORMATS])
def test_a_result_does_not_depend_on_the_batch(form: str, bits: str, kv_format: str, isa: str) -> None:
    """One by one, in chunks of any size, beside others, with another number of threads: the same bits."""
    config = replace(FAMILIES["dbrx"], max_seq_len=1024)
    tokens, other = sequence(8, 300), sequence(9, 45)
    blocks, others = list(range(5, 25)), [30, 31, 32]

    def fresh(threads: int) -> CompiledModel:
        activations = bits if bits.startswith("int") else "auto"
        return make(config, form, isa=isa, kv_format=kv_format, activations=activations, threads=threads)[0]

    whole = fresh(2).forward(batch([(tokens, 0, blocks)])).clone()
    alone = fresh(1)
    sizes = [1, 2, 9, 13, 64, 100, 7, 1, 3]
    rows, at = [], 0
    for size in [*sizes, len(tokens) - sum(sizes)]:
        rows.append(alone.forward(batch([(tokens[at : at + size], at, blocks)])).clone())
        at += size
    assert torch.equal(torch.cat(rows), whole)
    crowd = fresh(3)
    first = crowd.forward(batch([(other[:44], 0, others), (tokens[:290], 0, blocks)])).clone()
    second = crowd.forward(batch([(tokens[290:], 290, blocks), (other[44:], 44, others)])).clone()
    assert torch.equal(torch.cat((first[44:], second[:10])), whole)


def test_a_wrong_model_is_seen() -> None:
    """The bound of the coarsest format still tells a wrong rotation from a rounding."""
    config = FAMILIES["mixtral"]
    compiled, plain = make(config, "q4", activations="int8")
    tokens = sequence(6, 41)
    wrong = Transformer.from_parameters(
        replace(config, position=replace(config.position, theta=10.0)), dict(plain.state_dict())
    )
    with pytest.raises(AssertionError, match=r"typical row|chose other"):
        check(compiled, tokens, [3, 9, 0], wrong, UNIT["int8"])


def test_expert_load_counts_every_choice() -> None:
    compiled, _ = make(FAMILIES["mixtral"], "q8")
    for seed in (1, 2):
        compiled.forward(batch([(sequence(seed, 20), 0, [0, 1])]))
    for load, routing in zip(compiled.expert_load(), compiled.router_stats(20), strict=True):
        assert int(load.sum()) == 2 * 20 * 3
        assert bool((load >= torch.bincount(routing.expert_ids.reshape(-1), minlength=5)).all())
