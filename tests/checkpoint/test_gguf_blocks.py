"""Models in every block type of GGUF, from first byte to packed matrices; random bytes and files cut short."""

from __future__ import annotations

from pathlib import Path

import gguf as oracle
import numpy as np
import pytest

from quadriga.errors import CheckpointError
from quadriga.io.open import open_checkpoint
from quadriga.io.packed import load_packed, read_matrix
from quadriga.kernels.cpu.packing import Packed, pack
from quadriga.quant import codec
from quadriga.quant.formats import FORMATS, PLAIN

BLOCKED = [name for name in FORMATS if name not in PLAIN]
D, F, V, HEADS = 256, 512, 40, 4


def write(path: Path, name: str, *, largest_byte: int) -> dict[str, np.ndarray]:
    """A LLaMA of one layer whose matrices are random blocks of one type; bytes below 0x3c make scales below 1."""
    spec, rng = FORMATS[name], np.random.default_rng(21)
    writer = oracle.GGUFWriter(path, "llama")
    writer.add_context_length(64)
    writer.add_embedding_length(D)
    writer.add_block_count(1)
    writer.add_feed_forward_length(F)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(1e4)
    writer.add_vocab_size(V)
    writer.add_rope_dimension_count(D // HEADS)
    shapes = {"token_embd": (V, D), "output": (V, D), "blk.0.ffn_gate": (F, D), "blk.0.ffn_up": (F, D)}
    shapes |= {f"blk.0.attn_{which}": (D, D) for which in ("q", "k", "v", "output")} | {"blk.0.ffn_down": (D, F)}
    stored = {}
    for tensor, (rows, cols) in shapes.items():
        raw = rng.integers(0, largest_byte, (rows, cols // spec.block * spec.nbytes), dtype=np.uint8)
        writer.add_tensor(tensor + ".weight", raw, raw_dtype=oracle.GGMLQuantizationType(spec.ggml_type))
        stored[tensor] = raw
    for tensor in ("output_norm", "blk.0.attn_norm", "blk.0.ffn_norm"):
        writer.add_tensor(tensor + ".weight", np.ones(D, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return stored


@pytest.mark.parametrize("name", BLOCKED)
def test_a_model_of_every_type_is_packed_from_the_codec_s_numbers(tmp_path: Path, name: str) -> None:
    stored = write(tmp_path / "m.gguf", name, largest_byte=0x3C)
    checkpoint = open_checkpoint(tmp_path / "m.gguf")
    packed = load_packed(checkpoint, "float32").parameters
    up, q = (codec.dequantize(stored[f"blk.0.{n}"], name).reshape(-1, D) for n in ("ffn_up", "attn_q"))
    # Rows (head, pair, side) become (head, side, pair).
    q = q.reshape(HEADS, D // HEADS // 2, 2, D).swapaxes(1, 2).reshape(D, D)
    for parameter, expected in {"layers.0.ffn.w_up": up, "layers.0.attn.wqkv.weight": q}.items():
        matrix = packed[parameter]
        assert isinstance(matrix, Packed)
        np.testing.assert_array_equal(matrix.unpack(0, len(expected)), expected)
    assert read_matrix(checkpoint, "layers.0.ffn.w_up", 0, "q8").block_format == name
    kept = read_matrix(checkpoint, "layers.0.ffn.w_up", 0, "q4").pack("q4")
    np.testing.assert_array_equal(kept.data, pack(up, "q4").data if name != "q4_0" else kept.data)


@pytest.mark.parametrize("form", ["q8", "keep"])
@pytest.mark.parametrize("name", BLOCKED)
def test_random_bytes_are_numbers_or_an_error_that_names_the_matrix(tmp_path: Path, name: str, form: str) -> None:
    write(tmp_path / "m.gguf", name, largest_byte=256)
    checkpoint = open_checkpoint(tmp_path / "m.gguf")
    assert checkpoint.parameters.read("layers.0.ffn.w_gate").shape == (F, D)
    try:
        load_packed(checkpoint, form)
    except CheckpointError as error:
        assert "must be finite" in str(error) and str(error).startswith(("embed.weight", "layers.0."))
    else:
        assert name in ("mxfp4", "nvfp4"), "random scales are NaN in some blocks"


@pytest.mark.parametrize("name", BLOCKED)
def test_a_file_cut_short_is_an_error(tmp_path: Path, name: str) -> None:
    write(tmp_path / "m.gguf", name, largest_byte=0x3C)
    whole = (tmp_path / "m.gguf").read_bytes()
    (tmp_path / "m.gguf").write_bytes(whole[: len(whole) - D * F // 2])
    with pytest.raises(CheckpointError, match="ends past the end of the file; the file is cut short or forged"):
        open_checkpoint(tmp_path / "m.gguf")
