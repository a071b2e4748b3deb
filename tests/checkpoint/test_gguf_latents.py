"""GGUF files of latent attention: a matrix a head, as llama.cpp writes them since April 2025, and all in one as before."""

from __future__ import annotations

from dataclasses import replace
from math import prod
from pathlib import Path

import numpy as np
import pytest
import torch

from quadriga import load
from quadriga.io.convert import convert
from quadriga.io.gguf import Typed, plan_gguf
from quadriga.io.gguf_source import GGUFSource
from quadriga.io.open import open_checkpoint
from quadriga.io.packed import load_packed
from quadriga.kernels.cpu.packing import Packed
from quadriga.model.config import LatentAttentionSpec
from quadriga.nn.load import load_parameters
from quadriga.nn.transformer import random_parameters
from tests.checkpoint.models import LATENT, TINY, bits, write_hf

# Rows of whole blocks of 32, so that every matrix can be quantised.
MIXER = replace(LATENT, head_dim=0, kv_rank=64, q_rank=96, nope_dim=32)
CONFIG = replace(TINY["deepseek_v3"].with_mixer(kv_rank=64, head_dim=74, q_rank=96, nope_dim=32), d_model=64)
TOKENS = [3, 96, 41, 7, 58, 12, 90, 33]


def by_head(folder: Path, form: str) -> Path:
    assert CONFIG.layers[0].mixer == MIXER
    write_hf(folder / "hf", CONFIG, parameters=random_parameters(CONFIG, seed=4, std=0.2))
    convert(folder / "hf", folder / "heads.gguf", to="gguf", gguf_format=form)
    return folder / "heads.gguf"


def joined(heads: Path, out: Path, mixer: LatentAttentionSpec, *, beside: bool = False) -> None:
    """W_Kb and W_Vb of a float32 file put into one matrix; ``beside``: besides the two, as ik_llama.cpp does."""
    source = GGUFSource(heads)
    tensors, content = {}, {}
    for name, tensor in source.header.tensors.items():
        tensors[name], content[name] = (
            (tensor.shape, tensor.format),
            bytes(source.raw(name, 0, prod(tensor.shape[:-1]))),
        )
    for i in range(CONFIG.n_layers):
        names = [f"blk.{i}.attn_{part}_b.weight" for part in "kv"]
        k, v = (np.frombuffer(content[name], np.float32).reshape(tensors[name][0]) for name in names)
        whole = np.concatenate((k.swapaxes(1, 2), v), axis=1).reshape(-1, mixer.kv_rank)
        if not beside:
            for name in names:
                del tensors[name], content[name]
        tensors[f"blk.{i}.attn_kv_b.weight"] = (whole.shape, "float32")
        content[f"blk.{i}.attn_kv_b.weight"] = whole.tobytes()
    keys = source.header.typed()
    if not beside:
        keys = {key: value for key, value in keys.items() if not key.endswith("_mla")}
        sizes = {"head_count_kv": mixer.n_heads, "key_length": mixer.qk_dim, "value_length": mixer.v_dim}
        for name, size in sizes.items():
            key = f"deepseek2.attention.{name}"
            keys[key] = Typed(keys[key].type, size)
    plan = plan_gguf(out.name, keys, tensors)
    data = bytearray(plan.sizes[out.name])
    data[: len(plan.headers[out.name])] = plan.headers[out.name]
    for name, raw in content.items():
        data[plan.places[name][1] : plan.places[name][1] + len(raw)] = raw
    out.write_bytes(data)


@pytest.mark.parametrize("beside", [False, True])
def test_one_matrix_of_all_heads_is_the_same_model(tmp_path: Path, beside: bool) -> None:
    heads = by_head(tmp_path, "float32")
    joined(heads, tmp_path / "joined.gguf", MIXER, beside=beside)
    one, other = open_checkpoint(heads), open_checkpoint(tmp_path / "joined.gguf")
    assert (one.layout, other.layout) == ("gguf", "gguf" if beside else "gguf-joined")
    assert one.config == other.config
    expected, loaded = load_parameters(one), load_parameters(other)
    for parameter, value in expected.items():
        assert bits(loaded[parameter]) == bits(value), parameter
    wanted = load(tmp_path / "hf", format="float32", kv_format="float32", threads=1).logits(TOKENS)
    got = load(tmp_path / "joined.gguf", format="float32", kv_format="float32", threads=1).logits(TOKENS)
    assert np.array_equal(got, wanted)


def test_blocks_of_a_matrix_a_head_are_packed_as_they_lie(tmp_path: Path) -> None:
    """Unpacked and packed again they would not be the stored numbers; rotary rows move with their blocks."""
    opened = open_checkpoint(by_head(tmp_path, "q8_0"))
    values, packed = load_parameters(opened), load_packed(opened).parameters
    for part in ("wk_b", "wv_b", "wq_b", "wkv_a"):
        matrix = packed[f"layers.1.attn.{part}.weight"]
        assert isinstance(matrix, Packed) and matrix.format == "q8"
        assert torch.equal(torch.from_numpy(matrix.unpack()), values[f"layers.1.attn.{part}.weight"]), part
