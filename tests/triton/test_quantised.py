"""Whole models of packed weights on the kernels for GPUs, interpreted: the numbers that the packed weights stand for.

float32 throughout, so nothing but the order of sums differs from plain torch on the unpacked numbers.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch

from quadriga.errors import ConfigError
from quadriga.io.convert import convert
from quadriga.io.open import open_checkpoint
from quadriga.io.packed import load_packed
from quadriga.kernels.arrays import tensor
from quadriga.kernels.cpu.packing import Packed, Parameter
from quadriga.kernels.pass_batch import PassBatch
from quadriga.kernels.triton.linear import Matrix, linear
from quadriga.kernels.triton.packed import PLANES, from_packed
from quadriga.kernels.triton.weights import GroupedWeight
from quadriga.model.cache_layout import cache_layout
from quadriga.model.config import ModelConfig
from quadriga.model.weight_map import stays_float32
from quadriga.nn.load import load_parameters
from quadriga.nn.transformer import Transformer
from quadriga.quant import codec
from quadriga.quant.formats import FORMATS
from quadriga.runners.base import CacheSize
from quadriga.runners.cuda import runner as cuda_runner
from quadriga.runners.cuda.load import load_weights
from quadriga.runners.cuda.runner import CudaRunner
from quadriga.runners.cuda.weights import DeviceWeights
from quadriga.runners.torch import TorchRunner
from tests.batches import batch, logits_of, passed
from tests.checkpoint.gguf_twins import write_tensors
from tests.checkpoint.models import TINY
from tests.checkpoint.test_packed import write as write_folder
from tests.checkpoint.test_quantised import FP8, fp8
from tests.checkpoint.test_quantised import write as write_packed
from tests.runners.test_compiled import make, sequence
from tests.tolerance import kernel_roundings, relative_error
from tests.triton.test_runner import N_BLOCKS, grouped

HOST = torch.device("cpu")


def short(config: ModelConfig) -> ModelConfig:
    """One layer of each kind: interpreted, every one takes seconds."""
    return replace(config, layers=tuple(config.kinds()))


def two_passes(config: ModelConfig) -> list[PassBatch]:
    """A prompt beside a step of another sequence, then a step of both."""
    texts, lengths, tables = [sequence(5, 8), sequence(6, 2)], (7, 1), [[3], [5]]
    first = [(text[:n], 0, table) for text, n, table in zip(texts, lengths, tables, strict=True)]
    then = [(text[n:], n, table) for text, n, table in zip(texts, lengths, tables, strict=True)]
    return [grouped(batch(chunks), cache_layout(config).n_groups) for chunks in (first, then)]


def numbers(value: Parameter) -> torch.Tensor:
    """A packed parameter unpacked: experts stacked, runs of rows below each other."""
    if isinstance(value, np.ndarray):
        return tensor(value)
    if isinstance(value, Packed):
        return tensor(value.unpack())
    alike = len({one.rows for one in value}) == 1
    return (torch.stack if alike else torch.cat)([tensor(one.unpack()) for one in value])


def on_device(packed: Mapping[str, Parameter]) -> DeviceWeights:
    """The CPU's packed parameters as planes, but what stays numbers."""
    made: dict[str, Matrix] = {}
    for name, value in packed.items():
        if isinstance(value, np.ndarray) or stays_float32(name) or name.endswith(("wk_b.weight", "wv_b.weight")):
            made[name] = numbers(value)
        else:
            matrices = [value] if isinstance(value, Packed) else list(value)
            made[name] = from_packed(matrices, len(matrices))
    return DeviceWeights(made, torch.float32)


CASES = [
    ("dbrx", "q4"),
    ("mixtral", "q8"),
    ("gpt_oss", "mx4"),
    ("deepseek_v3", "q4k"),
    ("qwen3next", "q6k"),
    ("lfm2moe", "q4m"),  # its head is the table
    *(pytest.param(name, form, marks=pytest.mark.slow) for name, form in (("olmoe", "q5k"), ("mpt", "q2k"), ("grok1", "iq4xs"))),
]  # fmt: skip


@pytest.mark.parametrize(("family", "form"), CASES)
def test_logits_are_those_of_the_unpacked_numbers(family: str, form: str) -> None:
    """Prompts, single tokens, and both in one pass."""
    config = short(TINY[family])
    layout = cache_layout(config)
    engine, plain = make(config, form, threads=1, n_slots=N_BLOCKS)
    kernels = CudaRunner(config, on_device(engine.parameters), N_BLOCKS * layout.n_groups, layout, n_slots=N_BLOCKS)
    truth = TorchRunner(plain, N_BLOCKS * layout.n_groups, layout, n_slots=N_BLOCKS)
    assert kernels.weights()[0] == PLANES[form]
    for one in two_passes(config):
        (mine, my_routing), (theirs, their_routing) = passed(kernels, one), passed(truth, one)
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4 * float(theirs.std()))
        for a, b in zip(my_routing, their_routing, strict=True):
            assert torch.equal(a.expert_ids, b.expert_ids)


@pytest.mark.parametrize("form", ["q4", "q6k"])
def test_logits_are_those_of_the_cpu_s_kernels(form: str) -> None:
    """Which round what they multiply to 16 bits: an error with a bound of its own."""
    config = replace(TINY["dbrx"], layers=TINY["dbrx"].layers[:2])
    engine, _ = make(config, form, threads=1, activations="int16")
    kernels = CudaRunner(config, on_device(engine.parameters), 40)
    one = batch([(sequence(6, 18), 0, [3, 9])])
    mine, theirs = logits_of(kernels, one), logits_of(engine, one)
    bound = relative_error(torch.bfloat16, config, 18, kernel_roundings(config)) * (0.0083 / 128) / 2**-8
    errors = (mine - theirs).pow(2).mean(1).sqrt() / theirs.std()
    assert 0 < float(errors.median()) <= bound and float(errors.max()) <= 4 * bound


def planes_of(packed: Mapping[str, Parameter], name: str) -> list[torch.Tensor]:
    value = packed[name]
    assert not isinstance(value, np.ndarray)
    matrices = [value] if isinstance(value, Packed) else list(value)
    return [plane for plane in from_packed(matrices, len(matrices)).planes if plane is not None]


@pytest.mark.parametrize(("way", "form"), [("directory", "keep"), ("numbers", "q4m"), ("directory", "q8")])
def test_a_checkpoint_s_planes_are_what_the_cpu_s_kernels_have(tmp_path: Path, way: str, form: str) -> None:
    """A packed directory as it is, or packed anew; numbers packed as was asked."""
    path = write_folder(tmp_path / "hf", "dbrx")
    if way == "directory":
        convert(path, path := tmp_path / "packed", format="q4")
    opened = open_checkpoint(path)
    ours, theirs = load_weights(opened, form, dtype=torch.bfloat16, device=HOST), load_packed(opened, form).parameters
    kept = {"keep": ("q8", "q4"), "q4m": ("q4m", "q4m"), "q8": ("q8", "q8")}[form]  # of tables, of the rest
    for name in ("embed.weight", "lm_head.weight", "layers.1.attn.wqkv.weight", "layers.0.moe.w_down"):
        matrix = ours.matrix(name)
        assert isinstance(matrix, GroupedWeight) and matrix.format == kept["layers" in name]
        mine = [plane for plane in matrix.planes if plane is not None]
        assert all(torch.equal(a, b) for a, b in zip(mine, planes_of(theirs, name), strict=True)), name
    router = ours.numbers("layers.1.moe.router.weight")
    assert torch.equal(router.float(), numbers(theirs["layers.1.moe.router.weight"]))


def test_a_directory_of_numbers_is_loaded_as_ever(tmp_path: Path) -> None:
    """In what is computed in; vectors and routers as they are stored."""
    opened = open_checkpoint(write_folder(tmp_path / "hf", "dbrx"))
    ours = load_weights(opened, dtype=torch.float16, device=HOST)
    assert ours.sizes().keys() == {"float16", "bfloat16"}  # the test's files are bfloat16
    assert ours.numbers("layers.1.moe.w_up").dtype == torch.float16
    assert ours.numbers("layers.0.moe.router.weight").dtype == ours.numbers("final_norm.weight").dtype == torch.bfloat16
    with pytest.raises(ConfigError, match=r"matrices in q8, .*, or keep; got 'float32'"):
        load_weights(opened, "float32", dtype=torch.float32, device=HOST)


D, F, V, HEADS = 256, 512, 97, 4
MIXED = {"attn_v": "q6_k", "ffn_down": "q6_k", "ffn_up": "q5_k", "token_embd": "q6_k", "output": "q6_k"}
"""As llama.cpp mixes formats: what is not named is q4_k. With gate and up of two formats besides."""


def write_gguf(path: Path) -> None:
    """A LLaMA of one layer whose matrices are of several formats; q and k lie beside v, of another."""
    rng, writer = np.random.default_rng(21), gguf.GGUFWriter(path, "llama")
    writer.add_context_length(64)
    writer.add_embedding_length(D)
    writer.add_block_count(1)
    writer.add_feed_forward_length(F)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(HEADS // 2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(1e4)
    writer.add_vocab_size(V)
    writer.add_rope_dimension_count(D // HEADS)
    shapes = {"token_embd": (V, D), "output": (V, D), "ffn_gate": (F, D), "ffn_up": (F, D), "ffn_down": (D, F)}
    shapes |= {"attn_q": (D, D), "attn_k": (D // 2, D), "attn_v": (D // 2, D), "attn_output": (D, D)}
    for name, shape in shapes.items():
        form = MIXED.get(name, "q4_k")
        raw = codec.quantize(rng.normal(size=shape).astype(np.float32) * 0.1, form).reshape(shape[0], -1)
        stored = name if name in ("token_embd", "output") else f"blk.0.{name}"
        kind = gguf.GGMLQuantizationType(FORMATS[form].ggml_type)
        writer.add_tensor(f"{stored}.weight", raw, raw_dtype=kind)
    ones = np.ones(D, dtype=np.float32)
    write_tensors(writer, {f"{name}.weight": ones for name in ("output_norm", "blk.0.attn_norm", "blk.0.ffn_norm")})


def reference_of(config: ModelConfig, packed: Mapping[str, Parameter]) -> TorchRunner:
    plain = {name: numbers(value) for name, value in packed.items()}
    return TorchRunner(Transformer.from_parameters(config, plain), N_BLOCKS)


def test_a_file_of_several_formats_keeps_every_one(tmp_path: Path) -> None:
    """wqkv in two runs of rows, gate beside up of another format, a table and a head of six bits."""
    write_gguf(tmp_path / "mixed.gguf")
    opened = open_checkpoint(tmp_path / "mixed.gguf")
    kernels = cuda_runner.load(opened, lambda *_: CacheSize(N_BLOCKS, 0), dtype="float32", device="cpu")
    truth = reference_of(opened.config, load_packed(opened).parameters)
    for one in two_passes(opened.config):
        mine, theirs = logits_of(kernels, one), logits_of(truth, one)
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4 * float(theirs.std()))
    q4k, k8, k8m = (
        (D * D + D // 2 * D + D * D + F * D) * 4.625,
        (D // 2 * D + D * F + 2 * V * D) * 8.5625,
        F * D * 9.125,
    )
    assert kernels._weights.sizes() == {"q4k": q4k / 8, "k8": k8 / 8, "k8m": k8m / 8, "float32": 3 * D * 4}


@pytest.mark.parametrize("block", [(24, 128), None])
def test_fp8_is_multiplied_as_it_is_stored(tmp_path: Path, block: tuple[int, int] | None) -> None:
    """One scale for blocks of 24 x 128, or for a matrix; rows of q and k in another order than the file's."""
    how = FP8 | {"weight_block_size": block and list(block)}
    write_packed(tmp_path / "m", how, fp8, block=block)
    opened = open_checkpoint(tmp_path / "m")
    ours, truth = load_weights(opened, dtype=torch.float32, device=HOST), load_parameters(opened)
    for name in ("layers.1.attn.wqkv.weight", "layers.0.ffn.w_down"):
        matrix = ours.matrix(name)
        assert isinstance(matrix, GroupedWeight) and matrix.format == "fp8"
        assert torch.equal(linear(torch.eye(matrix.columns), matrix).T, truth[name].float())


def test_what_has_no_planes_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Experts of one layer in two formats become numbers, and a line says how many parameters did."""
    write_folder(tmp_path / "hf", "dbrx")
    opened = open_checkpoint(tmp_path / "hf")
    shapes = [n for n, value in load_packed(opened, "q4").parameters.items() if not isinstance(value, np.ndarray)]
    n_experts = opened.config.layers[0].moe.n_experts  # type: ignore[union-attr]
    recipe = {}
    for name in shapes:
        stacked = name.rpartition(".")[2] in ("w_gate", "w_up", "w_down")
        for one in [f"{name}/{e}" for e in range(n_experts)] if stacked else [name]:
            recipe[one] = "float32" if stays_float32(name) else "q8" if "w_down/2" in one else "q4"
    convert(tmp_path / "hf", tmp_path / "packed", format=recipe)
    opened = open_checkpoint(tmp_path / "packed")
    with caplog.at_level(logging.WARNING):
        ours = load_weights(opened, dtype=torch.float32, device=HOST)
    n_layers = opened.config.n_layers
    assert (
        f"{n_layers} parameters become float32 on the device: experts of a layer in several formats (q4, q8)"
        in caplog.text
    )
    truth = load_packed(opened).parameters["layers.1.moe.w_down"]
    assert torch.equal(ours.numbers("layers.1.moe.w_down"), numbers(truth))


def test_a_token_of_packed_weights_is_the_same_alone_and_in_a_crowd() -> None:
    """To the bit: seventeen sequences, which take wider tiles than one."""
    config = replace(short(TINY["dbrx"]), max_seq_len=64)
    engine, _ = make(config, "q4", threads=1)
    weights = on_device(engine.parameters)
    rows = [([t], 0, [i]) for i, t in enumerate(sequence(4, 20))]
    crowd = CudaRunner(config, weights, 24).forward(batch(rows)).logits
    for i in (0, 19):
        alone = CudaRunner(config, weights, 24).forward(batch([rows[i]])).logits
        assert np.array_equal(np.asarray(alone)[0], np.asarray(crowd)[i])
