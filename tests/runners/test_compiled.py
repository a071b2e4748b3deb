"""The compiled model against the plain one, for every family, format, cache and instruction set; and batch invariance."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from quadriga.kernels.arrays import arrays, tensor
from quadriga.kernels.cpu import library as cpu
from quadriga.kernels.cpu.packing import Packed, Parameter
from quadriga.model.config import ModelConfig, RopeSpec
from quadriga.nn.context import PackedContext
from quadriga.nn.moe import RouterStats
from quadriga.nn.transformer import Transformer, random_parameters
from quadriga.quant.packed import OF_BLOCKS
from quadriga.runners.compiled import CompiledModel, pack_parameters
from quadriga.runners.torch import TorchRunner
from tests.batches import batch, logits_of, passed
from tests.checkpoint.models import TINY
from tests.configs import with_delta_rules
from tests.nn.routing import exact, row_errors, worst_lag
from tests.tolerance import faults, kernel_roundings, relative_error

BLOCK = 16
HERE = cpu.isas_in_force()
"""Instruction sets this processor has: each contains the ones before it."""

FAMILIES = {
    **TINY,
    # Limits that are reached: a clip of 8 or a cap of 30 never is, with weights like these.
    "dbrx": TINY["dbrx"].with_mixer(clip_qkv=2.0),
    "grok1": TINY["grok1"].with_mixer(soft_cap=2.0),
    "dbrx-vote": TINY["dbrx"].with_ffn(aggregate="vote"),
    "dbrx-fuse": TINY["dbrx"].with_ffn(aggregate="fuse", normalize_p=2.0),
    "alibi-groups": TINY["mpt"].with_mixer(n_kv_heads=2),
    "latent-groups": TINY["deepseek_v3"].with_mixer(n_heads=35),  # of 18 and 17 heads
    "relu-wide-heads": TINY["llama2"].with_mixer(head_dim=40),
    "wide-states": with_delta_rules(TINY["llama2"], k_dim=20, v_dim=73),  # of 32, 32 and 9 columns
}

UNIT = {"bfloat16": 2**-8, "int8": 0.0083, "int16": 0.0083 / 128}
"""Unit roundoff of activations. Groups of 32 in 8 bits: the step is max / 127, the largest of 32 normal numbers about 2.1
deviations, so the error's root mean square is 2.1 / 127 / sqrt(12) = 0.0048 = u / sqrt(3). int16 has 128 times the steps."""

FORMATS = [("bfloat16", "bfloat16")] + [
    (form, bits) for form in ("q8", "q4", "q4m", "mx4") for bits in ("int8", "int16")
]


def make(config: ModelConfig, form: str, **options: object) -> tuple[CompiledModel, Transformer]:
    """A compiled model, and the plain one with the very numbers that the packed weights hold."""
    torch.manual_seed(1)
    parameters = random_parameters(config, seed=3, std=0.25)
    for name, values in parameters.items():
        if name.endswith("norm.weight"):
            values.uniform_(0.5, 1.5)
        if name.endswith("fuse.weight"):
            values.normal_()
    packed = pack_parameters(arrays(parameters), form)
    plain = {name: _plain(value) for name, value in packed.items()}
    arguments: dict[str, object] = {"threads": 2, "n_blocks": 40, "kv_format": "float32"} | options
    return CompiledModel(config, packed, **arguments), Transformer.from_parameters(config, plain)  # type: ignore[arg-type]


def _plain(value: Parameter) -> Tensor:
    if isinstance(value, np.ndarray):
        return tensor(value)
    return tensor(value.unpack()) if isinstance(value, Packed) else torch.stack([tensor(p.unpack()) for p in value])


def sequence(seed: int, n: int) -> list[int]:
    return torch.randint(0, 97, (n,), generator=torch.Generator().manual_seed(seed)).tolist()


def check(
    compiled: CompiledModel, tokens: list[int], blocks: list[int], plain: Transformer, unit: float
) -> list[RouterStats]:
    """Every row of logits is within the bound that rounding at ``unit`` explains, given the experts that were chosen."""
    got, routing = passed(compiled, batch([(tokens, 0, blocks)]))
    judge(got, routing, plain, tokens, unit)
    return routing


def judge(got: Tensor, choices: list[RouterStats], plain: Transformer, tokens: list[int], unit: float) -> None:
    """See :func:`check`."""
    reference, free = exact(plain, plain.config, tokens, choices)
    bound = relative_error(torch.bfloat16, plain.config, len(tokens), kernel_roundings(plain.config)) * unit / 2**-8
    assert faults(row_errors(got, reference), worst_lag(choices, free), bound, tail=4) == []


@pytest.mark.parametrize("isa", HERE)
@pytest.mark.parametrize("family", FAMILIES)
def test_equals_the_plain_model_in_float32(family: str, isa: str) -> None:
    config = FAMILIES[family]
    compiled, plain = make(config, "float32", isa=isa)
    tokens = sequence(5, 37)
    got_routing = check(compiled, tokens, [3, 9, 0], plain, 2**-21)  # exp and erf to 1.5e-7, sums in float32
    with torch.inference_mode():
        _, routing = plain.hidden(torch.tensor(tokens), PackedContext([len(tokens)]))
    for mine, theirs in zip(got_routing, routing, strict=True):
        assert torch.equal(mine.expert_ids, theirs.expert_ids)
        torch.testing.assert_close(mine.expert_weights, theirs.expert_weights, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(mine.probs, theirs.probs, rtol=1e-3, atol=1e-5)
        torch.testing.assert_close(mine.logits, theirs.logits, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("isa", HERE)
@pytest.mark.parametrize(("form", "bits"), FORMATS)
@pytest.mark.parametrize("family", ["dbrx", "mixtral", "llama2", "mpt", "grok1", "deepseek_v3"])
def test_equals_the_plain_model_in_every_format(family: str, form: str, bits: str, isa: str) -> None:
    config = FAMILIES[family]
    activations = "auto" if bits == "bfloat16" else bits
    compiled, plain = make(config, form, isa=isa, activations=activations)
    check(compiled, sequence(6, 41), [3, 9, 0], plain, UNIT[bits])


@pytest.mark.parametrize("isa", HERE)
@pytest.mark.parametrize("form", OF_BLOCKS)
def test_equals_the_plain_model_in_formats_of_blocks(form: str, isa: str) -> None:
    for bits in ("int8", "int16"):
        compiled, plain = make(FAMILIES["dbrx"], form, isa=isa, activations=bits)
        check(compiled, sequence(6, 41), [3, 9, 0], plain, UNIT[bits])


@pytest.mark.parametrize("kv_format", ["float32", "bfloat16", "q8"])
@pytest.mark.parametrize("family", ["dbrx", "mpt", "grok1", "latent-groups"])
def test_cache_formats(family: str, kv_format: str) -> None:
    """800 tokens are four chunks of 256 keys, in one pass and in many: single tokens, few and many, in every chunk."""
    config = replace(FAMILIES[family], max_seq_len=1024)
    compiled, plain = make(config, "float32", kv_format=kv_format, n_blocks=80)
    tokens, blocks = sequence(7, 800), list(range(79, 20, -1))
    unit = {"float32": 2**-20, "bfloat16": 2**-8, "q8": 0.0083}[kv_format]
    check(compiled, tokens, blocks, plain, unit)
    whole = logits_of(compiled, batch([(tokens, 0, blocks)]))
    stepwise, _ = make(config, "float32", kv_format=kv_format, n_blocks=80)
    rows, at = [], 0
    for size in (250, 1, 8, 1, 240, 5, 1, 7, 1, 2, 250, 1, 3, 1, 8, 9, 10, 1, 1):
        rows.append(logits_of(stepwise, batch([(tokens[at : at + size], at, blocks)])))
        at += size
    assert at == 800 and torch.equal(torch.cat(rows), whole)


@pytest.mark.parametrize("isa", HERE)
@pytest.mark.parametrize("kv_format", ["float32", "bfloat16", "q8"])
@pytest.mark.parametrize(("form", "bits"), [("float32", "auto"), *FORMATS])
def test_a_result_does_not_depend_on_the_batch(form: str, bits: str, kv_format: str, isa: str) -> None:
    """One by one, in chunks of any size, beside others, with another number of threads: the same bits."""
    same_in_every_batch(FAMILIES["dbrx"], form, bits, kv_format, isa)


@pytest.mark.parametrize("isa", HERE)
@pytest.mark.parametrize("kv_format", ["float32", "bfloat16", "q8"])
@pytest.mark.parametrize(("form", "bits"), [("bfloat16", "bfloat16"), ("q4", "int8")])
def test_a_result_of_latents_does_not_depend_on_the_batch(form: str, bits: str, kv_format: str, isa: str) -> None:
    same_in_every_batch(FAMILIES["latent-groups"], form, bits, kv_format, isa)


@pytest.mark.parametrize("isa", HERE)
@pytest.mark.parametrize(("form", "bits"), [("float32", "auto"), ("q8", "int16")])
def test_a_result_of_states_does_not_depend_on_the_batch(form: str, bits: str, isa: str) -> None:
    same_in_every_batch(FAMILIES["wide-states"], form, bits, "float32", isa)


def same_in_every_batch(config: ModelConfig, form: str, bits: str, kv_format: str, isa: str) -> None:
    """See the tests above."""
    config = replace(config, max_seq_len=1024)
    tokens, other = sequence(8, 300), sequence(9, 45)
    blocks, others = list(range(5, 25)), [30, 31, 32]

    def fresh(threads: int) -> CompiledModel:
        activations = bits if bits.startswith("int") else "auto"
        return make(config, form, isa=isa, kv_format=kv_format, activations=activations, threads=threads)[0]

    whole = logits_of(fresh(2), batch([(tokens, 0, blocks)]))
    alone = fresh(1)
    sizes = [1, 2, 9, 13, 64, 100, 7, 1, 3]
    rows, at = [], 0
    for size in [*sizes, len(tokens) - sum(sizes)]:
        rows.append(logits_of(alone, batch([(tokens[at : at + size], at, blocks)])))
        at += size
    assert torch.equal(torch.cat(rows), whole)
    crowd = fresh(3)
    first = logits_of(crowd, batch([(other[:44], 0, others), (tokens[:290], 0, blocks)]))
    second = logits_of(crowd, batch([(tokens[290:], 290, blocks), (other[44:], 44, others)]))
    assert torch.equal(torch.cat((first[44:], second[:10])), whole)


def test_a_wrong_model_is_seen() -> None:
    """The bound of the coarsest format still tells a wrong rotation from a rounding."""
    config = FAMILIES["mixtral"]
    compiled, plain = make(config, "q4", activations="int8")
    tokens = sequence(6, 41)
    wrong = Transformer.from_parameters(config.with_mixer(position=RopeSpec(theta=10.0)), dict(plain.state_dict()))
    with pytest.raises(AssertionError, match=r"row"):
        check(compiled, tokens, [3, 9, 0], wrong, UNIT["int8"])


def test_expert_load_counts_every_choice() -> None:
    compiled, _ = make(FAMILIES["mixtral"], "q8")
    for seed in (1, 2):
        _, last = passed(compiled, batch([(sequence(seed, 20), 0, [0, 1])]))
    for load, routing in zip(compiled.expert_load(), last, strict=True):
        assert int(load.sum()) == 2 * 20 * 3
        assert bool((load >= torch.bincount(routing.expert_ids.reshape(-1), minlength=5).numpy()).all())


# Ties, mixtures, distances -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("isa", HERE)
@pytest.mark.parametrize("v", [1, 15, 16, 17, 97, 4096])
def test_the_first_of_equal_logits_is_the_best(v: int, isa: str) -> None:
    """Wherever they lie in the lines of 16 that the kernels look at: the lowest id, as in torch's argmax."""
    compiled, _ = make(FAMILIES["llama2"], "float32", isa=isa)
    places = sorted({place for place in (0, 1, 14, 15, 16, 17, v // 2, v - 2, v - 1) if 0 <= place < v})
    logits = torch.randn(len(places) ** 2, v, generator=torch.Generator().manual_seed(v))
    wanted = []
    for row, (a, b) in enumerate((a, b) for a in places for b in places):
        logits[row, a] = logits[row, b] = 5.0
        wanted.append(min(a, b))
    best, log_sums = compiled.row_stats(logits.numpy())
    assert best == wanted
    torch.testing.assert_close(torch.tensor(log_sums), logits.logsumexp(-1), rtol=0, atol=2e-6)


@pytest.mark.parametrize("isa", HERE)
@pytest.mark.parametrize("equal", [(0, 1, 2, 3, 4), (1, 3), (2, 4), (0, 4)])
def test_of_equal_experts_the_lower_numbers_are_chosen(equal: tuple[int, ...], isa: str) -> None:
    config = FAMILIES["mixtral"]
    parameters = random_parameters(config, seed=3, std=0.25)
    for layer in range(config.n_layers):
        router = parameters[f"layers.{layer}.moe.router.weight"]
        router[list(equal)] = router[equal[0]].clone()
    compiled = CompiledModel(config, pack_parameters(arrays(parameters), "float32"), threads=2, n_blocks=4, isa=isa)
    tokens = sequence(6, 41)
    for stats in passed(compiled, batch([(tokens, 0, [0, 1, 2])]))[1]:
        for ids, probs in zip(stats.expert_ids.tolist(), stats.probs.tolist(), strict=True):
            assert len({probs[e] for e in equal}) == 1
            assert ids == sorted(range(5), key=lambda e: (-probs[e], e))[:3]


MIXTURES = {
    "every expert another": ["float32", "bfloat16", "q8", "mx4", "q4m"],
    "floats beside integers": ["q8", "bfloat16", "q8", "float32", "q4"],
    "integers": ["q4", "q8", "q4m", "q4", "q8"],
    "blocks of 256": ["q4k", "q6k", "q2k", "iq4xs", "q8"],
    "blocks with other blocks": ["q3k", "q5k", "iq4nl", "q4", "bfloat16"],
    "five bits": ["q5", "q5m", "q4k", "q5", "q8"],
}


@pytest.mark.parametrize("isa", HERE)
@pytest.mark.parametrize("n", [1, 2, 41])
@pytest.mark.parametrize("mixture", MIXTURES)
def test_experts_of_different_formats_compute_together(mixture: str, n: int, isa: str) -> None:
    """As a recipe or a file mixes them: one expert's three matrices in three formats, and attention in another again."""
    config, forms = FAMILIES["dbrx"], MIXTURES[mixture]
    parameters = random_parameters(config, seed=3, std=0.25)
    mixed = {f: pack_parameters(arrays(parameters), f) for f in {*forms, "q8"}}
    packed: dict[str, Parameter] = dict(mixed["q8"])
    for name, value in packed.items():
        if isinstance(value, list):
            turn = {"w_gate": 1, "w_up": 0, "w_down": 2}[name.rpartition(".")[2]]  # gate and up of two formats too
            packed[name] = [mixed[forms[(e + turn) % 5]][name][e] for e in range(5)]  # type: ignore[index]
    plain = Transformer.from_parameters(config, {name: _plain(value) for name, value in packed.items()})
    for seed in range(20 // n + 1):  # of single tokens many, so that every expert comes first once
        compiled = CompiledModel(
            config, packed, threads=2, n_blocks=4, kv_format="float32", activations="int16", isa=isa
        )
        check(compiled, sequence(seed, n), [3, 1, 0], plain, UNIT["bfloat16"])


@pytest.mark.parametrize("isa", HERE)
@pytest.mark.parametrize("position", [255, 257, 4097, 32_767])
@pytest.mark.parametrize("family", ["dbrx", "mpt"])
def test_far_positions_are_exact(family: str, position: int, isa: str) -> None:
    """Beyond 256, a position rounded to bfloat16 is another position; the cache before is empty for both."""
    config = replace(FAMILIES[family], max_seq_len=40_000)
    n_blocks = position // 16 + 1
    compiled, plain = make(config, "float32", n_blocks=n_blocks, isa=isa)
    reference = TorchRunner(plain.double(), n_blocks)
    tokens, blocks = sequence(4, 3), list(range(n_blocks))
    pass_ = batch([(tokens, position - 2, blocks)])
    got, wanted = logits_of(compiled, pass_), logits_of(reference, pass_)
    # An angle of 32767 in float32 is off by up to 2^-10: what both share is the rounded product.
    assert float((got - wanted).abs().max() / wanted.std()) < 1e-4


# What is stored ------------------------------------------------------------------------------------------------------


def one_layer(head_dim: int) -> tuple[ModelConfig, dict[str, Tensor]]:
    """A layer whose attention hands on the values as they are: one key, wo the identity, no feed-forward network."""
    alike = FAMILIES["llama2"].with_n_layers(1).with_mixer(n_heads=2, n_kv_heads=2, head_dim=head_dim)
    config = replace(alike, d_model=2 * head_dim)
    parameters = random_parameters(config, seed=3, std=0.5)
    parameters["layers.0.attn.wo.weight"] = torch.eye(2 * head_dim)
    for name in ("w_gate", "w_up", "w_down"):
        parameters[f"layers.0.ffn.{name}"].zero_()
    return config, parameters


@pytest.mark.parametrize("isa", HERE)
@pytest.mark.parametrize("kv_format", ["float32", "bfloat16", "q8"])
@pytest.mark.parametrize("head_dim", [6, 16, 40])
def test_a_value_is_stored_to_the_nearest_number_of_its_format(head_dim: int, kv_format: str, isa: str) -> None:
    config, parameters = one_layer(head_dim)
    compiled = CompiledModel(
        config, pack_parameters(arrays(parameters), "float32"), threads=1, n_blocks=60, kv_format=kv_format, isa=isa
    )
    tokens = list(range(50))
    logits_of(compiled, batch([([token], 0, [i]) for i, token in enumerate(tokens)]))
    embedded = parameters["embed.weight"][tokens]
    normed = embedded * (embedded.square().mean(-1, keepdim=True) + config.final_norm.eps).rsqrt()
    values = (normed * parameters["layers.0.attn_norm.weight"]) @ parameters["layers.0.attn.wqkv.weight"][
        -2 * head_dim :
    ].T
    got = tensor(compiled.program.stream[: len(tokens)]) - embedded
    heads, off = values.view(-1, 2, head_dim), (got - values).view(-1, 2, head_dim).abs()
    slack = 4e-6 * heads.abs().amax()
    if kv_format == "float32":
        assert float(off.max()) <= slack
    elif kv_format == "bfloat16":
        assert bool((off <= heads.abs() * 2**-8 + slack).all()), "half of the last of eight bits"
        assert float((off / heads.abs().clamp_min(1e-3)).max()) > 2**-10
    else:
        step = heads.abs().amax(-1, keepdim=True) / 127
        # Half a step of 1/127 of each head's largest; and the step, as a weight of the sum, is rounded to bfloat16.
        assert bool((off <= 0.5 * step + heads.abs() * 2**-8 + slack).all())
        assert float((off / step).max()) > 0.4


@pytest.mark.parametrize("isa", HERE)
@pytest.mark.parametrize("kv_format", ["float32", "bfloat16", "q8"])
def test_what_was_in_a_block_before_is_nothing_to_the_next(kv_format: str, isa: str) -> None:
    config = replace(FAMILIES["dbrx"], max_seq_len=1024)
    tokens, blocks = sequence(3, 37), [4, 2, 7]
    fresh, _ = make(config, "float32", kv_format=kv_format, isa=isa)
    expected = logits_of(fresh, batch([(tokens, 0, blocks)]))
    used, _ = make(config, "float32", kv_format=kv_format, isa=isa)
    logits_of(used, batch([(sequence(5, 160), 0, [7, 4, 2, *range(10, 18)])]))
    assert torch.equal(logits_of(used, batch([(tokens, 0, blocks)])), expected)


def test_logits_are_of_the_rows_that_were_asked_for() -> None:
    config = FAMILIES["dbrx"]
    compiled, _ = make(config, "float32")
    tokens = sequence(1, 30)
    whole = logits_of(compiled, batch([(tokens, 0, [0, 1])]))
    rows = np.array([29, 3, 17], dtype=np.int32)
    assert torch.equal(logits_of(compiled, replace(batch([(tokens, 0, [0, 1])]), rows=rows)), whole[[29, 3, 17]])


@pytest.mark.parametrize("family", ["dbrx", "mpt", "grok1"])
def test_each_sequence_has_its_own_positions_and_blocks(family: str) -> None:
    """Sequences of one pass in any order, some decoding and some reading, give what each gives alone."""
    config = FAMILIES[family]
    compiled, _ = make(config, "float32")
    parts = [(sequence(1, 20), [0, 1]), (sequence(2, 33), [9, 8, 7]), (sequence(3, 1), [5]), (sequence(4, 12), [3])]
    alone = [logits_of(make(config, "float32")[0], batch([(tokens, 0, blocks)]))[-1] for tokens, blocks in parts]
    logits_of(compiled, batch([(tokens[:-1], 0, blocks) for tokens, blocks in parts if len(tokens) > 1]))
    chunks = [(tokens[-1:], len(tokens) - 1, blocks) for tokens, blocks in parts]
    together = logits_of(compiled, batch([chunks[2], chunks[0], chunks[3], chunks[1]]))
    assert torch.equal(together, torch.stack([alone[2], alone[0], alone[3], alone[1]]))


@pytest.mark.parametrize("kv_format", ["float32", "q8"])
def test_a_block_of_all_layers_lies_in_one_run_of_memory(kv_format: str) -> None:
    """17 tokens in blocks 5 and 2 write nowhere else, and a copy of a block is a whole one, next to the others' bytes."""
    compiled, _ = make(FAMILIES["dbrx"], "float32", kv_format=kv_format, n_blocks=7)
    logits = logits_of(compiled, batch([(sequence(6, 17), 0, [5, 2])]))
    blocks = compiled._kv
    assert blocks.shape == (7, compiled.kv_bytes // 7) and blocks.flags.c_contiguous
    assert [bool(block.any()) for block in blocks] == [False, False, True, False, False, True, False]
    compiled.copy_blocks([(5, 0), (2, 6)])
    compiled.write_block(5, bytes(len(blocks[5])))
    again = logits_of(compiled, batch([(sequence(6, 17)[16:], 16, [0, 6])]))
    assert torch.equal(again[-1], logits[-1])
