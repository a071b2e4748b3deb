"""GGUF files in the formats that are searched: what is stored how, and whose errors count."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf as oracle
import numpy as np
import pytest
import torch

from quadriga.io.conversion_plan import FILE_TYPE
from quadriga.io.convert import convert
from quadriga.io.convert_options import GGUF_FORMATS
from quadriga.io.directory import packed_shapes
from quadriga.io.gguf import TABLES
from quadriga.io.open import open_checkpoint
from quadriga.model.config import ModelConfig
from quadriga.quant import pack_blocks
from quadriga.quant.formats import FORMATS
from tests.checkpoint.models import TINY, random_bits, write_hf

DENSE = replace(TINY["llama2"].with_ffn(d_ff=512), d_model=256)
MOE = replace(TINY["mixtral"].with_ffn(d_ff=256), d_model=256)


def write(folder: Path, config: ModelConfig) -> Path:
    generator = torch.Generator().manual_seed(3)
    values = {n: torch.randn(t.shape, generator=generator) for n, t in random_bits(config).items()}
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
    assert set(GGUF_FORMATS) == set(FILE_TYPE) <= set(FORMATS)
    theirs = {"float32": "ALL_F32", "float16": "MOSTLY_F16", "bfloat16": "MOSTLY_BF16", "mxfp4": "MOSTLY_MXFP4_MOE"}
    small = {name: f"MOSTLY_{name.upper()}_S" for name in ("q3_k", "q4_k", "q5_k")}
    for name, number in FILE_TYPE.items():
        assert oracle.LlamaFileType(number).name == {**theirs, **small}.get(name, f"MOSTLY_{name.upper()}")
