"""GGUF files in the formats that are searched: what is stored how, and whose errors count."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf as oracle
import numpy as np
import pytest
import torch

from quadriga.bench.speed import bytes_per_token
from quadriga.errors import CheckpointError, ConfigError
from quadriga.io.conversion_plan import FILE_TYPE
from quadriga.io.convert import convert
from quadriga.io.convert_options import GGUF_FORMATS
from quadriga.io.directory import packed_shapes, verify
from quadriga.io.gguf import TABLES
from quadriga.io.gguf_mixtures import MIXTURES, format_in
from quadriga.io.open import open_checkpoint
from quadriga.io.packed import load_packed
from quadriga.io.rank_parameters import load_part
from quadriga.kernels.cpu.packing import Packed, pack
from quadriga.model.config import ModelConfig
from quadriga.model.rank_mesh import RankMesh
from quadriga.model.rank_share import RankShare
from quadriga.model.weight_map import qkv_rows
from quadriga.nn.load import load_parameters
from quadriga.nn.transformer import Transformer
from quadriga.quant import pack_blocks
from quadriga.quant.formats import FORMATS
from quadriga.quant.packed import OF_BLOCKS
from quadriga.runners.compiled import CompiledModel
from tests.checkpoint.models import TINY, random_bits, write_hf
from tests.runners.test_compiled import HERE, UNIT, check, sequence

DENSE = replace(TINY["llama2"].with_ffn(d_ff=512), d_model=256)
MOE = replace(TINY["mixtral"].with_ffn(d_ff=256), d_model=256)


def write(folder: Path, config: ModelConfig, std: float = 1.0) -> Path:
    generator = torch.Generator().manual_seed(3)
    values = {n: std * torch.randn(t.shape, generator=generator) for n, t in random_bits(config).items()}
    write_hf(folder, config, parameters=values)
    return folder


def stored(path: Path) -> dict[str, Any]:
    return {t.name: t for t in oracle.GGUFReader(path).tensors}


@pytest.mark.parametrize("form", pack_blocks.PACK)
def test_matrices_tables_and_what_has_no_whole_blocks(tmp_path: Path, form: str) -> None:
    source = write(tmp_path / "hf", DENSE)
    plan = convert(source, tmp_path / "m.gguf", to="gguf", gguf_format=form)
    tensors = stored(tmp_path / "m.gguf")
    kinds = {name: tensor.tensor_type.value for name, tensor in tensors.items()}
    assert kinds["blk.1.ffn_up.weight"] == kinds["blk.1.ffn_down.weight"] == FORMATS[form].ggml_type
    assert kinds["token_embd.weight"] == kinds["output.weight"] == FORMATS[TABLES.get(form, form)].ggml_type
    assert kinds["output_norm.weight"] == FORMATS["float32"].ggml_type
    # 6 heads of 8 are 48 columns: no whole block of 256, nor of 32.
    assert kinds["blk.0.attn_output.weight"] == FORMATS["float16"].ggml_type
    assert any("3 tensors whose rows are no whole" in note and "are stored as float16" in note for note in plan.notes)
    up = tensors["blk.2.ffn_up.weight"]
    expected = open_checkpoint(source).parameters.read("layers.2.ffn.w_up")
    back = oracle.quants.dequantize(up.data, up.tensor_type)
    assert ((back - expected) ** 2).mean() < 0.07 * (expected**2).mean()
    np.testing.assert_array_equal(open_checkpoint(tmp_path / "m.gguf").parameters.read("layers.2.ffn.w_up"), back)


def test_rows_of_whole_32s_become_q8_0(tmp_path: Path) -> None:
    plan = convert(write(tmp_path / "hf", DENSE.with_ffn(d_ff=96)), tmp_path / "m.gguf", to="gguf", gguf_format="q4_k")
    assert stored(tmp_path / "m.gguf")["blk.0.ffn_down.weight"].tensor_type.name == "Q8_0"
    assert any("are stored as float16 or q8_0" in note for note in plan.notes)


@pytest.mark.parametrize("config", [DENSE, MOE], ids=["dense", "experts"])
def test_importance_reaches_the_matrix_it_is_of(tmp_path: Path, config: ModelConfig) -> None:
    """One matrix, or one expert, has a column that counts: it alone is stored otherwise, and that column nearer."""
    source = write(tmp_path / "hf", config)
    weights = np.ones(256, dtype=np.float32)
    weights[::7] = 1000
    part = "layers.1.moe.w_up/3" if config.is_moe else "layers.1.ffn.w_up"
    assert part in packed_shapes(config)
    convert(source, tmp_path / "plain.gguf", to="gguf", gguf_format="q3_k")
    convert(source, tmp_path / "heavy.gguf", to="gguf", gguf_format="q3_k", importance={part: weights})
    plain, heavy = stored(tmp_path / "plain.gguf"), stored(tmp_path / "heavy.gguf")
    name = "blk.1.ffn_up_exps.weight" if config.is_moe else "blk.1.ffn_up.weight"
    assert [n for n in plain if not np.array_equal(plain[n].data, heavy[n].data)] == [name]
    a, b = (oracle.quants.dequantize(t[name].data, t[name].tensor_type) for t in (plain, heavy))
    if config.is_moe:
        assert [e for e in range(len(a)) if not np.array_equal(a[e], b[e])] == [3]
        a, b = a[3], b[3]
    expected = open_checkpoint(source).parameters.read(part.split("/")[0])
    expected = expected[3] if config.is_moe else expected
    errors = [((x - expected)[:, ::7] ** 2).mean() for x in (a, b)]
    assert errors[1] < 0.9 * errors[0]


def test_every_format_that_is_written_has_llama_cpp_s_number() -> None:
    assert set(GGUF_FORMATS) == set(FILE_TYPE) <= {*FORMATS, *MIXTURES}
    theirs = {"float32": "ALL_F32", "float16": "MOSTLY_F16", "bfloat16": "MOSTLY_BF16", "mxfp4": "MOSTLY_MXFP4_MOE"}
    small = {name: f"MOSTLY_{name.upper()}_S" for name in ("q3_k", "q4_k", "q5_k")}
    for name, number in FILE_TYPE.items():
        assert oracle.LlamaFileType(number).name == {**theirs, **small}.get(name, f"MOSTLY_{name.upper()}")


@pytest.mark.parametrize("form", OF_BLOCKS)
def test_blocks_are_computed_with_as_they_are_and_written_as_they_were(tmp_path: Path, form: str) -> None:
    """Loaded, in a packed directory, and in another GGUF file: the same numbers, and there the same bytes."""
    config, block = MOE.with_mixer(head_dim=128, n_heads=2, n_kv_heads=1), OF_BLOCKS[form]
    convert(write(tmp_path / "m", config), tmp_path / "m.gguf", to="gguf", gguf_format=block)
    (tmp_path / "again").mkdir()
    convert(tmp_path / "m.gguf", tmp_path / "again" / "m.gguf", to="gguf", gguf_format=block)
    assert (tmp_path / "again" / "m.gguf").read_bytes() == (tmp_path / "m.gguf").read_bytes()
    convert(tmp_path / "m.gguf", tmp_path / "packed", format="keep")
    checkpoint = open_checkpoint(tmp_path / "m.gguf")
    for opened in (checkpoint, open_checkpoint(tmp_path / "packed")):
        parameters = load_packed(opened).parameters
        for name in ("layers.1.attn.wqkv.weight", "layers.0.attn.wo.weight", "layers.2.moe.w_down"):
            one, numbers = parameters[name], checkpoint.parameters.read(name)
            if isinstance(one, list):
                one, numbers = one[3], numbers[3]
            assert isinstance(one, Packed) and one.format == form
            assert np.array_equal(one.unpack(), numbers)


def test_q_k_and_v_of_different_formats_keep_theirs(tmp_path: Path) -> None:
    """As in llama.cpp's mixtures; loaded, in a packed directory, for a rank of several, and in what is made of that."""
    config = DENSE.with_mixer(head_dim=128, n_heads=2, n_kv_heads=1)
    convert(write(tmp_path / "hf", config, 0.1), tmp_path / "m.gguf", to="gguf", gguf_format="q4_k_m")
    checkpoint, name = open_checkpoint(tmp_path / "m.gguf"), "layers.2.attn.wqkv.weight"
    numbers, parameters = checkpoint.parameters.read(name), load_packed(checkpoint).parameters
    pieces = parameters[name]
    assert isinstance(pieces, list) and [(one.format, one.rows) for one in pieces] == [("q4k", 384), ("q6k", 128)]
    assert np.array_equal(np.concatenate([one.unpack() for one in pieces]), numbers)
    plain = {name: value.float() for name, value in load_parameters(checkpoint).items()}
    for isa in HERE:
        compiled = CompiledModel(
            config, parameters, threads=2, n_blocks=8, kv_format="float32", activations="int16", isa=isa
        )
        check(compiled, sequence(6, 41), [3, 1, 0], Transformer.from_parameters(config, plain), UNIT["int16"])
    assert bytes_per_token(config, {name: pieces}) == sum(one.data.nbytes for one in pieces)
    convert(tmp_path / "m.gguf", tmp_path / "packed", format="keep")
    again = open_checkpoint(tmp_path / "packed")
    kept = load_packed(again).parameters[name]
    assert isinstance(kept, list) and [(one.format, one.rows) for one in kept] == [("q4k", 384), ("q6k", 128)]
    assert all(a.data.tobytes() == b.data.tobytes() for a, b in zip(kept, pieces, strict=True))
    assert np.array_equal(again.parameters.read(name), numbers) and not verify(tmp_path / "packed")
    convert(tmp_path / "packed", tmp_path / "plain", to="hf", dtype="float32")
    assert np.array_equal(open_checkpoint(tmp_path / "plain").parameters.read(name), numbers)
    manifest = json.loads((tmp_path / "packed" / "quadriga.json").read_text())
    del manifest["parameters"][f"{name}/0"]
    (tmp_path / "packed" / "quadriga.json").write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match="does not describe its model"):
        open_checkpoint(tmp_path / "packed")


def test_a_recipe_may_part_q_k_and_v(tmp_path: Path) -> None:
    """Each rounded as its own matrix would be, under the importance that all three share."""
    config = DENSE.with_mixer(head_dim=128, n_heads=2, n_kv_heads=1)
    source = open_checkpoint(write(tmp_path / "hf", config, 0.1))
    name, forms = "layers.1.attn.wqkv.weight", ("q3k", "q4", "q6k")
    recipe = dict.fromkeys((n for n, shape in packed_shapes(config).items() if len(shape) == 2), "q8")
    del recipe[name]
    importance = {name: np.linspace(0.1, 4, 256, dtype=np.float32)}
    parts = {f"{name}/{i}": form for i, form in enumerate(forms)}
    convert(source.path, tmp_path / "out", format=recipe | parts, importance=importance)
    got = load_packed(open_checkpoint(tmp_path / "out")).parameters[name]
    values, rows = source.parameters.read(name), qkv_rows(config, name)
    assert isinstance(got, list) and [one.rows for one in got] == rows == [256, 128, 128]
    for one, form, first in zip(got, forms, (0, 256, 384), strict=True):
        expected = pack(np.ascontiguousarray(values[first : first + one.rows]), form, importance=importance[name])
        assert one.format == form and one.data.tobytes() == expected.data.tobytes()
    with pytest.raises(ConfigError, match=f"the recipe gives {name} the format None"):
        convert(source.path, tmp_path / "x", format=recipe | {f"{name}/0": "q4"})


def test_ranks_take_their_rows_of_each_run(tmp_path: Path) -> None:
    config = DENSE.with_mixer(head_dim=128, n_heads=4, n_kv_heads=2)
    convert(write(tmp_path / "hf", config, 0.1), tmp_path / "m.gguf", to="gguf", gguf_format="q4_k_m")
    convert(tmp_path / "m.gguf", tmp_path / "packed", format="keep")
    name = "layers.2.attn.wqkv.weight"
    mesh = RankMesh(tp=2)
    for rank in range(2):
        share = RankShare(config, mesh.place(rank))
        parts = [load_part(open_checkpoint(tmp_path / where), share)[name] for where in ("m.gguf", "packed")]
        for a, b in zip(*parts, strict=True):
            assert isinstance(a, Packed) and isinstance(b, Packed)
            assert a.format == b.format and np.array_equal(a.unpack(), b.unpack())


MISTRAL = {
    "q3_k_s": {"q3_k": 225, "q6_k": 1},
    "q3_k_m": {"q3_k": 129, "q4_k": 92, "q5_k": 4, "q6_k": 1},
    "q3_k_l": {"q3_k": 129, "q5_k": 96, "q6_k": 1},
    "q4_k_s": {"q4_k": 217, "q5_k": 8, "q6_k": 1},
    "q4_k_m": {"q4_k": 193, "q6_k": 33},
    "q5_k_s": {"q5_k": 225, "q6_k": 1},
    "q5_k_m": {"q5_k": 193, "q6_k": 33},
}
"""What llama.cpp says when it loads the published GGUF files of Mistral-7B: how many tensors are of which type."""


@pytest.mark.parametrize("mixture", MIXTURES)
def test_mixtures_are_llama_cpp_s(mixture: str) -> None:
    config = DENSE.with_n_layers(32)
    parts = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")
    names = [f"blk.{i}.{part}.weight" for i in range(32) for part in parts] + ["output.weight", "token_embd.weight"]
    assert Counter(format_in(mixture, name, config) for name in names) == MISTRAL[mixture]


def test_mixtures_know_tied_tables_eight_experts_and_large_models() -> None:
    tied, eight = replace(DENSE, tied_embeddings=True), MOE.with_ffn(n_experts=8, top_k=2)
    assert format_in("q4_k_m", "token_embd.weight", tied) == "q6_k"
    of_eight = [format_in("q4_k_m", f"blk.1.attn_{part}.weight", eight) for part in ("q", "k", "v", "output", "qkv")]
    assert of_eight == ["q4_k", "q8_0", "q8_0", "q5_k", "q5_k"]
    large = DENSE.with_n_layers(80).with_mixer(n_heads=6, n_kv_heads=2)
    assert format_in("q4_k_m", "blk.10.attn_v.weight", large) == "q5_k"
    assert format_in("q4_k_m", "blk.12.attn_v.weight", large) == "q6_k"
    assert format_in("q4_k_m", "blk.10.ffn_down_exps.weight", large) == "q4_k"
