"""Checkpoints packed by GPTQ, AWQ, FP8, compressed-tensors and bitsandbytes, each packed here number by number."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch

from quadriga.errors import CheckpointError, ConfigError
from quadriga.io.convert import convert
from quadriga.io.dry_run import dry_run
from quadriga.io.open import open_checkpoint
from quadriga.io.packed import load_packed, packed_format
from quadriga.io.quantised.bitsandbytes import Bitsandbytes
from quadriga.io.quantised.method import Parts
from quadriga.io.source import TensorInfo
from quadriga.kernels.cpu.packing import Packed
from quadriga.model import families
from quadriga.model.config import DenseSpec, ModelConfig
from quadriga.model.weight_map import Box
from quadriga.nn.load import load_parameters
from tests.checkpoint.models import TINY, bits

CONFIG = replace(
    TINY["llama2"].with_ffn(d_ff=96).with_mixer(n_heads=4, n_kv_heads=2, head_dim=16), d_model=64
)  # every side is whole bytes and groups of 32
assert isinstance(CONFIG.layers[0].ffn, DenseSpec)
WIDE = CONFIG.with_ffn(d_ff=128)
"""Of whole runs of 64 columns."""

Array = np.ndarray[Any, Any]
Made = tuple[dict[str, Array], Array]
"""Parts by suffix, and the matrix they stand for."""


def put(words: Array, index: Any, fields: Array, shift: int) -> None:
    words[index] |= fields.astype(np.uint32) << np.uint32(shift)


def stream(fields: Array, width: int) -> Array:
    """Rows of fields as the bits of words, one after the other, lowest first: bit by bit."""
    words = np.zeros((len(fields), fields.shape[1] * width // 32), np.uint32)
    for i in range(fields.shape[1]):
        for bit in range(width):
            at = i * width + bit
            put(words, (slice(None), at // 32), fields[:, i] >> bit & 1, at % 32)
    return words


def gptq(
    rng: np.random.Generator, rows: int, cols: int, *, width: int = 4, ordered: bool = True, v2: bool = False
) -> Made:
    groups = cols // 32
    q, z = rng.integers(0, 2**width, (rows, cols)), rng.integers(0, 2**width, (groups, rows))
    scales = rng.random((groups, rows)).astype(np.float16)
    group = np.arange(cols) // 32
    if not ordered:
        group = rng.permutation(group)
    qweight = stream(q, width).T.copy()
    qzeros = stream((z if v2 else (z - 1) % 2**width), width)
    weight = np.empty((rows, cols), np.float16)
    for c in range(cols):
        weight[:, c] = scales[group[c]] * (q[:, c] - z[group[c]]).astype(np.float16)
    parts = {"qweight": qweight.view(np.int32), "qzeros": qzeros.view(np.int32), "scales": scales}
    if not ordered:
        parts["g_idx"] = group.astype(np.int32)
    return parts, weight


def awq(rng: np.random.Generator, rows: int, cols: int) -> Made:
    groups = cols // 32
    q, z = rng.integers(0, 16, (rows, cols)), rng.integers(0, 16, (rows, groups))
    scales = rng.random((groups, rows)).astype(np.float16)
    qweight, qzeros = np.zeros((cols, rows // 8), np.uint32), np.zeros((groups, rows // 8), np.uint32)
    for word in range(rows // 8):
        for nibble, row in enumerate((0, 2, 4, 6, 1, 3, 5, 7)):
            put(qweight, (slice(None), word), q[8 * word + row], 4 * nibble)
            put(qzeros, (slice(None), word), z[8 * word + row], 4 * nibble)
    weight = np.stack([(q[:, c] - z[:, c // 32]).astype(np.float16) * scales[c // 32] for c in range(cols)], axis=1)
    return {"qweight": qweight.view(np.int32), "qzeros": qzeros.view(np.int32), "scales": scales}, weight


def awq_vectors(rng: np.random.Generator, rows: int, cols: int, *, width: int = 4) -> Made:
    """Version gemv, with room for ``8 * width`` groups of 32, the rest of which is filled with what nobody may read."""
    groups = cols // 32
    q, z = rng.integers(0, 16, (rows, cols)), rng.integers(0, 16, (rows, 8 * width))
    scales = rng.random((rows, 8 * width)).astype(np.float16)
    qweight, qzeros = np.zeros((rows, cols // 8), np.uint32), np.zeros((rows, width), np.uint32)
    for c in range(cols):
        put(qweight, (slice(None), c // 8), q[:, c], 4 * (c % 8))
    for g in range(8 * width):
        put(qzeros, (slice(None), g // 8), z[:, g], 4 * (g % 8))
    assert groups <= 8 * width
    columns = [(q[:, c] - z[:, c // 32]).astype(np.float16) * scales[:, c // 32] for c in range(cols)]
    return {"qweight": qweight.view(np.int32), "qzeros": qzeros.view(np.int32), "scales": scales}, np.stack(columns, 1)


def awq_fast(rng: np.random.Generator, rows: int, cols: int, *, zeros: str = "scaled_zeros") -> Made:
    """Version gemv_fast: where every number goes, one by one."""
    q = rng.integers(0, 16, (rows, cols))
    scales, scaled = (rng.normal(size=(32, rows)).astype(np.float16) for _ in range(2))
    qweight = np.zeros((rows // 4, cols), np.uint16)
    for r in range(rows):
        for c in range(cols):
            a, b, odd = c % 32 // 8, c % 8 // 2, c % 2
            dealt = c // 32 * 32 + 8 * b + 4 * odd + a
            at = (r % 4) * 64 + dealt % 64
            qweight[r // 4, dealt // 64 * 64 + at // 4] |= np.uint16(q[r, c] << (4 * (at % 4)))
    exact = [q[:, c] * scales[c // 32].astype(np.float64) + scaled[c // 32].astype(np.float64) for c in range(cols)]
    parts = {"qweight": qweight.view(np.int16), "scales": scales, zeros: scaled}
    return parts, np.stack(exact, axis=1).astype(np.float16)


def float8(rng: np.random.Generator, rows: int, cols: int) -> Array:
    raw = rng.integers(0, 256, (rows, cols), dtype=np.uint8)
    raw[(raw & 127) == 127] = 0  # NaN
    return raw.view(ml_dtypes.float8_e4m3fn)


def fp8(rng: np.random.Generator, rows: int, cols: int, *, block: tuple[int, int] | None = (24, 40)) -> Made:
    stored = float8(rng, rows, cols)
    if block is None:
        scale = rng.random(1).astype(np.float32)
        return {"weight": stored, "weight_scale": scale, "input_scale": scale}, stored.astype(np.float32) * scale
    scales = rng.random((-(-rows // block[0]), -(-cols // block[1]))).astype(np.float32)
    weight = stored.astype(np.float32)
    for r in range(rows):
        for c in range(cols):
            weight[r, c] *= scales[r // block[0], c // block[1]]
    return {"weight": stored, "weight_scale_inv": scales}, weight


def packed_int(
    rng: np.random.Generator, rows: int, cols: int, *, width: int = 4, size: int = 32, symmetric: bool = True,
    ordered: bool = True,
) -> Made:  # fmt: skip
    n, groups, half = 32 // width, cols // size, 2 ** (width - 1)
    q = rng.integers(-half, half, (rows, cols))
    z = np.zeros((rows, groups), int) if symmetric else rng.integers(-half, half, (rows, groups))
    scales = rng.random((rows, groups)).astype(ml_dtypes.bfloat16)
    group = np.arange(cols) // size
    if not ordered:
        group = rng.permutation(group)
    words, zeros = np.zeros((rows, cols // n), np.uint32), np.zeros((-(-rows // n), groups), np.uint32)
    for c in range(cols):
        put(words, (slice(None), c // n), q[:, c] + half, width * (c % n))
    for r in range(rows):
        put(zeros, r // n, z[r] + half, width * (r % n))
    parts = {"weight_packed": words.view(np.int32), "weight_scale": scales, "weight_shape": np.array([rows, cols])}
    if not symmetric:
        parts["weight_zero_point"] = zeros.view(np.int32)
    if not ordered:
        parts["weight_g_idx"] = group.astype(np.int32)
    columns = [(q[:, c] - z[:, group[c]]).astype(ml_dtypes.bfloat16) * scales[:, group[c]] for c in range(cols)]
    return parts, np.stack(columns, axis=1)


def per_row(rng: np.random.Generator, rows: int, cols: int, *, is_float: bool) -> Made:
    scales = rng.random((rows, 1)).astype(ml_dtypes.bfloat16)
    stored = float8(rng, rows, cols) if is_float else rng.integers(-128, 128, (rows, cols)).astype(np.int8)
    return {"weight": stored, "weight_scale": scales}, stored.astype(ml_dtypes.bfloat16) * scales


def nf4(rng: np.random.Generator, rows: int, cols: int, *, nested: bool) -> Made:
    n = rows * cols
    q, values = rng.integers(0, 16, n), np.sort(rng.uniform(-1, 1, 16)).astype(np.float32)
    state = {"quant_type": "nf4", "blocksize": 64, "dtype": "bfloat16", "shape": [rows, cols]}
    parts = {"weight": (q[0::2] * 16 + q[1::2]).astype(np.uint8)[:, None], "weight.quant_map": values}
    absmax = rng.random(n // 64).astype(np.float32)
    if nested:
        state |= {"nested_blocksize": 16, "nested_dtype": "float32", "nested_offset": 0.3}
        codes, outer = rng.integers(0, 256, n // 64).astype(np.uint8), rng.random(-(-n // 64 // 16)).astype(np.float32)
        inner = np.sort(rng.uniform(-1, 1, 256)).astype(np.float32)
        absmax = np.array([inner[code] * outer[i // 16] for i, code in enumerate(codes)]) + np.float32(0.3)
        parts |= {"weight.absmax": codes, "weight.nested_absmax": outer, "weight.nested_quant_map": inner}
    else:
        parts["weight.absmax"] = absmax
    parts["weight.quant_state.bitsandbytes__nf4"] = np.frombuffer(json.dumps(state).encode(), np.uint8)
    weight = np.array([values[code] * absmax[i // 64] for i, code in enumerate(q)], np.float32)
    return parts, weight.reshape(rows, cols).astype(ml_dtypes.bfloat16)


def compressed(form: str, **weights: object) -> dict[str, object]:
    scheme = {
        "type": "int",
        "num_bits": 8,
        "symmetric": True,
        "dynamic": False,
        "strategy": "channel",
        "group_size": None,
    }
    scheme |= {"block_structure": None, "actorder": None, "observer": "minmax", "observer_kwargs": {}} | weights
    group = {"targets": ["Linear"], "weights": scheme, "input_activations": None, "output_activations": None}
    return {
        "quant_method": "compressed-tensors", "format": form, "config_groups": {"group_0": group}, "ignore": ["lm_head"],
        "kv_cache_scheme": None, "quantization_status": "compressed", "global_compression_ratio": 1.2,
    }  # fmt: skip


GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": False, "sym": False, "damp_percent": 0.1}
AWQ = {
    "quant_method": "awq",
    "bits": 4,
    "group_size": 32,
    "zero_point": True,
    "version": "gemm",
    "modules_to_not_convert": None,
}
WIDE_AWQ = AWQ | {"bits": None, "w_bit": 4}
FP8 = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [24, 40]}
BNB = {
    "quant_method": "bitsandbytes", "load_in_4bit": True, "_load_in_4bit": True, "load_in_8bit": False,
    "_load_in_8bit": False, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True,
    "bnb_4bit_quant_storage": "uint8", "bnb_4bit_compute_dtype": "bfloat16", "llm_int8_threshold": 6.0,
}  # fmt: skip
CT4 = compressed("pack-quantized", num_bits=4, strategy="group", group_size=32)

METHODS: dict[str, tuple[dict[str, Any], Callable[..., Made], dict[str, Any]]] = {
    "gptq": (GPTQ, gptq, {}),
    "gptq, act order": (GPTQ | {"desc_act": True, "sym": True}, gptq, {"ordered": False}),
    "gptq, v2": (GPTQ | {"checkpoint_format": "gptq_v2"}, gptq, {"v2": True}),
    "gptq, 8 bits": (GPTQ | {"bits": 8}, gptq, {"width": 8}),
    "gptq, 2 bits": (GPTQ | {"bits": 2}, gptq, {"width": 2}),
    "gptq, 3 bits": (GPTQ | {"bits": 3, "dynamic": {"-:.*gate.*": {}}}, gptq, {"width": 3}),
    "gptq, 3 bits, v2, act order": (
        GPTQ | {"bits": 3, "format": "gptq_v2"}, gptq, {"width": 3, "v2": True, "ordered": False},
    ),
    "awq": (AWQ, awq, {}),
    "awq, gemv": (AWQ | {"version": "GEMV"}, awq_vectors, {}),
    "awq, gemv_fast": (WIDE_AWQ | {"version": "gemv_fast"}, awq_fast, {"config": WIDE}),
    "llm-awq": (WIDE_AWQ | {"version": "gemv", "backend": "llm-awq"}, awq_fast, {"config": WIDE, "zeros": "qzeros"}),
    "fp8": (FP8, fp8, {}),
    "fp8, one scale": (FP8 | {"weight_block_size": None, "activation_scheme": "static"}, fp8, {"block": None}),
    "packed int4": (CT4, packed_int, {}),
    "packed int4 with zeros": (
        compressed("pack-quantized", num_bits=4, strategy="group", group_size=32, symmetric=False), packed_int,
        {"symmetric": False},
    ),
    "packed int4, act order": (
        compressed("pack-quantized", num_bits=4, strategy="group", group_size=32, actorder="group"), packed_int,
        {"ordered": False},
    ),
    "packed int8": (
        compressed("pack-quantized", strategy="group", group_size=16), packed_int, {"width": 8, "size": 16}
    ),
    "int8": (compressed("int-quantized"), per_row, {"is_float": False}),
    "float8": (compressed("float-quantized", type="float"), per_row, {"is_float": True}),
    "nf4": (BNB, nf4, {"nested": False}),
    "nf4, nested": (BNB, nf4, {"nested": True}),
}  # fmt: skip


def tensor(values: Array) -> torch.Tensor:
    if values.dtype == ml_dtypes.bfloat16:
        return torch.from_numpy(values.view(np.uint16).copy()).view(torch.bfloat16)
    if values.dtype == ml_dtypes.float8_e4m3fn:
        return torch.from_numpy(values.view(np.uint8).copy()).view(torch.float8_e4m3fn)
    return torch.from_numpy(values.copy())


def write(
    folder: Path, how: dict[str, Any], make: Callable[..., Made], *, config: ModelConfig = CONFIG, **options: Any
) -> dict[str, torch.Tensor]:
    """A LLaMA whose projections are packed. Returns the tensors of the same model in plain numbers."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    family, rng = families.family_of(config), np.random.default_rng(5)
    raw = family.config_to_hf(config) | {"quantization_config": how}
    (folder / "config.json").write_text(json.dumps(raw))
    stored, plain = {}, {}
    for piece in family.layouts["hf"](config):
        name, shape = piece.source, piece.source_shape
        if name in plain:
            continue
        if name.endswith("proj.weight"):
            parts, weight = make(rng, *shape, **options)
            stored |= {name.removesuffix("weight") + suffix: tensor(part) for suffix, part in parts.items()}
            plain[name] = tensor(weight)
        else:
            stored[name] = plain[name] = torch.randn(shape).to(torch.float16)
    save_file(stored, folder / "model.safetensors")
    return plain


@pytest.mark.parametrize("name", METHODS)
def test_the_numbers_are_the_method_s(tmp_path: Path, name: str) -> None:
    how, make, options = METHODS[name]
    plain = write(tmp_path / "m", how, make, **options)
    checkpoint = open_checkpoint(tmp_path / "m")
    assert checkpoint.source.tensors.keys() == plain.keys()
    for weight, values in plain.items():
        got = checkpoint.source.read(weight)
        assert got.tobytes() == bits(values), weight
        if values.ndim == 2:
            rows, cols = values.shape
            for (a, b), (c, d) in (((1, rows), (0, cols)), ((5, 13), (3, cols - 1)), ((rows - 3, rows), (31, 33))):
                part = checkpoint.source.read(weight, ((a, b), (c, d)))
                assert part.tobytes() == bits(values[a:b, c:d])
    q = plain["model.layers.1.self_attn.q_proj.weight"]
    assert torch.equal(load_parameters(checkpoint)["layers.1.attn.wqkv.weight"][:64], q.float())
    assert packed_format(checkpoint, "layers.0.ffn.w_up", "keep") == "q8"
    report = dry_run(tmp_path / "m")
    assert report.n_tensors == len(plain)


class Loose:
    """A ``TensorSource`` of arrays."""

    def __init__(self, arrays: dict[str, Array]) -> None:
        self.arrays = arrays
        self.tensors = {name: TensorInfo(one.shape, str(one.dtype), one.nbytes) for name, one in arrays.items()}

    def read(self, name: str, box: Box | None = None) -> Array:
        return self.arrays[name] if box is None else self.arrays[name][tuple(slice(*r) for r in box)]

    def close(self) -> None:
        """Nothing is open."""


@pytest.mark.parametrize("nested", [False, True])
def test_rows_of_nf4_may_begin_in_the_middle_of_a_byte_and_of_a_block(nested: bool) -> None:
    rows, cols = 128, 35
    made, weight = nf4(np.random.default_rng(7), rows, cols, nested=nested)
    method = Bitsandbytes("nf4")
    parts = Parts("w", Loose(made), {name: name for name in made})
    assert method.shape(parts) == (rows, cols)
    for first, last in ((0, 1), (1, 2), (3, 90), (127, 128), (0, rows)):
        assert method.read(parts, first, last).tobytes() == weight[first:last].tobytes(), (first, last)


def test_they_convert_to_plain_numbers(tmp_path: Path) -> None:
    plain = write(tmp_path / "m", FP8, fp8)
    convert(tmp_path / "m", tmp_path / "out", to="hf", dtype="bfloat16")
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())
    source = open_checkpoint(tmp_path / "out").source
    for name, values in plain.items():
        assert source.read(name).tobytes() == bits(values.bfloat16())


@pytest.mark.parametrize("v2", [False, True])
def test_symmetric_gptq_is_q4_bit_by_bit(tmp_path: Path, v2: bool) -> None:
    """The packed numbers are scale * (q - 8) itself; GPTQ's own kernels round the product to float16."""
    how = GPTQ | {"sym": True, "checkpoint_format": "gptq_v2" if v2 else "gptq"}
    plain = write(tmp_path / "m", how, middle_zeros(v2), v2=v2)
    checkpoint = open_checkpoint(tmp_path / "m")
    assert checkpoint.source.read("model.layers.0.mlp.up_proj.weight").tobytes() == bits(
        plain["model.layers.0.mlp.up_proj.weight"]
    )
    packed = load_packed(checkpoint).parameters
    for parameter, names in {
        "layers.2.ffn.w_down": ["mlp.down_proj"],
        "layers.2.attn.wqkv.weight": ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
    }.items():
        matrix = packed[parameter]
        assert isinstance(matrix, Packed) and matrix.format == "q4"
        expected = torch.cat([plain[f"model.layers.2.{name}.weight"] for name in names]).numpy()
        np.testing.assert_array_equal(matrix.unpack().astype(np.float16), expected)


@pytest.mark.parametrize("spoil", ["zeros", "order", "scales"])
def test_gptq_that_only_says_it_is_symmetric_is_not_q4(tmp_path: Path, spoil: str) -> None:
    def made(rng: np.random.Generator, rows: int, cols: int) -> Made:
        parts, weight = (gptq if spoil == "zeros" else middle_zeros(False))(rng, rows, cols, ordered=spoil != "order")
        if spoil == "scales":
            parts["scales"] = parts["scales"].astype(np.float32)
        return parts, weight

    write(tmp_path, GPTQ | {"sym": True}, made)
    checkpoint = open_checkpoint(tmp_path)
    assert packed_format(checkpoint, "layers.0.ffn.w_up", "keep") == "q8"


def middle_zeros(v2: bool) -> Callable[..., Made]:
    """GPTQ whose zeros are all 8."""

    def made(rng: np.random.Generator, rows: int, cols: int, **options: Any) -> Made:
        parts, _ = gptq(rng, rows, cols, **options)
        parts["qzeros"] = np.full_like(parts["qzeros"], -2004318072 if v2 else 0x77777777)  # 0x88888888
        q = np.stack([parts["qweight"].view(np.uint32)[c // 8] >> np.uint32(4 * (c % 8)) & 15 for c in range(cols)], 1)
        group = parts.get("g_idx", np.arange(cols) // 32)
        return parts, parts["scales"].T[:, group] * (q.astype(np.int16) - 8).astype(np.float16)

    return made


def test_zeros_that_gptqmodel_wrote_before_it_mended_them(tmp_path: Path) -> None:
    """Three bits: it took (0x24924924, 0x92492492, 0x49249249) from the words of z = 4, where 1 a field was meant."""

    def made(rng: np.random.Generator, rows: int, cols: int) -> Made:
        parts, _ = gptq(rng, rows, cols, width=3, v2=True)
        words = stream(np.full((cols // 32, rows), 4), 3)
        less = words - np.resize(np.array([0x24924924, 0x92492492, 0x49249249], np.uint32), words.shape)
        q = [
            [int(parts["qweight"].view(np.uint32)[c * 3 // 32, r]) >> (c * 3 % 32) for c in range(10)]
            for r in range(rows)
        ]
        weight = (np.array(q) % 8 - 4).astype(np.float16) * parts["scales"].T[:, :1]
        return parts | {"qzeros": less.view(np.int32)}, weight

    plain = write(tmp_path, GPTQ | {"bits": 3, "sym": True}, made)
    source = open_checkpoint(tmp_path).source
    for name in (n for n in plain if n.endswith("proj.weight")):
        assert source.read(name)[:, :10].tobytes() == bits(plain[name])


def test_fields_must_fill_whole_words(tmp_path: Path) -> None:
    """Three bits lie in threes of words."""
    write(tmp_path, GPTQ | {"bits": 3}, spoilt(gptq, "qweight", lambda x: x[:-1]))
    with pytest.raises(CheckpointError, match="whole runs of 3 words: 'qweight' has 11 words of 64 rows"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize("zero", [True, False])
def test_biases_that_autogptq_makes_up_are_left_out(tmp_path: Path, zero: bool) -> None:
    def with_bias(rng: np.random.Generator, rows: int, cols: int) -> Made:
        parts, weight = gptq(rng, rows, cols)
        return parts | {"bias": np.full(rows, 0 if zero else 1e-7, np.float16)}, weight

    plain = write(tmp_path, GPTQ, with_bias)
    if not zero:
        with pytest.raises(CheckpointError, match=r"down_proj\.bias"):
            open_checkpoint(tmp_path)
        return
    assert open_checkpoint(tmp_path).source.tensors.keys() == plain.keys()


def test_an_index_without_its_shards_is_enough_for_a_dry_run(tmp_path: Path) -> None:
    plain = write(tmp_path / "m", GPTQ, gptq)
    from safetensors import safe_open

    with safe_open(tmp_path / "m" / "model.safetensors", "np") as file:
        table = dict.fromkeys(file.keys(), "model-00001-of-00001.safetensors")
    (tmp_path / "m" / "model.safetensors").unlink()
    (tmp_path / "m" / "model.safetensors.index.json").write_text(json.dumps({"weight_map": table}))
    assert dry_run(tmp_path / "m").n_tensors == len(plain)


def test_a_dry_run_passes_over_an_index_that_a_larger_model_left(tmp_path: Path) -> None:
    plain = write(tmp_path / "m", GPTQ, gptq)
    table = {"model.layers.99.mlp.up_proj.qweight": "model-00001-of-00002.safetensors"}
    (tmp_path / "m" / "model.safetensors.index.json").write_text(json.dumps({"weight_map": table}))
    report = dry_run(tmp_path / "m")
    assert (report.n_tensors, report.n_files, report.files_present) == (len(plain), 1, 1)


def with_weights(**changes: object) -> dict[str, Any]:
    return compressed("pack-quantized", **({"num_bits": 4, "strategy": "group", "group_size": 32} | changes))


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"quant_method": "aqlm"}, "quant_method must be one of fp8, .*gptq, .*; got 'aqlm'"),
        ({"bits": 4}, "lacks the key 'quant_method'"),
        (GPTQ | {"bits": 5}, "bits must be 2 or 3 or 4 or 8, got 5"),
        (GPTQ | {"checkpoint_format": "gptq", "format": "gptq_v2"}, "checkpoint_format and format must agree"),
        (GPTQ | {"checkpoint_format": "marlin"}, "checkpoint_format must be 'gptq' or 'gptq_v2'"),
        (GPTQ | {"dynamic": [1]}, "dynamic must be"),
        (GPTQ | {"group_size": 0}, "group_size must be -1 or a whole number from 1, got 0"),
        (GPTQ | {"new_key": 1}, "has the key 'new_key'"),
        (AWQ | {"version": "marlin"}, "version must be 'gemm'"),
        (AWQ | {"format": "gemv"}, "version and format must agree, got gemm and gemv"),
        (AWQ | {"zero_point": "no"}, "zero_point must be True or False, got 'no'"),
        (FP8 | {"fmt": "e5m2"}, "fmt must be 'e4m3'"),
        (FP8 | {"weight_block_size": [128]}, "weight_block_size must be two whole numbers"),
        (BNB | {"load_in_8bit": True}, "load_in_4bit must be False"),
        (BNB | {"bnb_4bit_quant_storage": "bfloat16"}, "bnb_4bit_quant_storage must be 'uint8'"),
        (compressed("mxfp6-pack-quantized"), "format must be one of pack-quantized"),
        (with_weights(num_bits=9), "num_bits must be 1 to 8, and 8 of type float; got 9"),
        (with_weights(strategy="tensor_group"), "strategy must be tensor, channel"),
        (with_weights(strategy="group", group_size=None), "strategy must be tensor, channel"),
        (with_weights(type="float", num_bits=8), "float must be symmetric, and not pack-quantized"),
        (with_weights(dynamic=True), "dynamic must be False"),
        (CT4 | {"moe_sparsity_config": {"method": "prune"}}, "moe_sparsity_config must be null"),
        (CT4 | {"sparsity_config": {"format": "sparse-24-bitmask"}}, "format must be 'dense'"),
        (CT4 | {"config_groups": {}}, "must pack weights, got 0 groups"),
    ],
)  # fmt: skip
def test_what_is_not_read_is_refused_by_name(tmp_path: Path, how: dict[str, Any], message: str) -> None:
    write(tmp_path, how, gptq)
    with pytest.raises(ConfigError, match=message):
        open_checkpoint(tmp_path)


def spoilt(make: Callable[..., Made], part: str, change: Callable[[Array], Array | None]) -> Callable[..., Made]:
    """``make`` with one part changed; None leaves it out."""

    def made(rng: np.random.Generator, rows: int, cols: int, **options: Any) -> Made:
        parts, weight = make(rng, rows, cols, **options)
        changed = change(parts.pop(part))
        return parts | ({} if changed is None else {part: changed}), weight

    return made


def state(**changes: object) -> Callable[[Array], Array]:
    return lambda raw: np.frombuffer(json.dumps(json.loads(raw.tobytes()) | changes).encode(), np.uint8)


QUANT_STATE = "weight.quant_state.bitsandbytes__nf4"


@pytest.mark.parametrize(
    ("how", "make", "message"),
    [
        (GPTQ, spoilt(gptq, "qzeros", lambda x: None), r"down_proj\.weight: its part 'qzeros' is missing"),
        (GPTQ, spoilt(gptq, "qzeros", lambda x: x[:, :-1]), r"'qzeros' must have the shape \[3, 8\], got \[3, 7\]"),
        (GPTQ, spoilt(gptq, "qweight", lambda x: x.astype(np.float32)), "'qweight' must be int32, got float32"),
        (GPTQ | {"group_size": 64}, gptq, "96 columns in groups of 64 need 2 rows of 'scales', got 3"),
        (AWQ, spoilt(awq, "scales", lambda x: x[:, :-8]), r"'scales' must have the shape \[3, 64\]"),
        (AWQ | {"group_size": 64}, awq, "its 96 columns must be whole groups of 64"),
        (FP8, spoilt(fp8, "weight_scale_inv", lambda x: x[:-1]), r"must have the shape \[3, 3\], got \[2, 3\]"),
        (FP8, spoilt(fp8, "weight", lambda x: x.astype(np.float32)), "'weight' must be float8_e4m3fn, got float32"),
        (CT4, spoilt(packed_int, "weight_shape", lambda x: x * 0), "'weight_shape' must say how many"),
        (
            CT4,
            spoilt(packed_int, "weight_packed", lambda x: x[:, 1:]),
            r"'weight_packed' must have the shape \[64, 12\]",
        ),
        (CT4, lambda r, m, n: ({"weight": float8(r, m, n)}, np.zeros((m, n))), "but no tensor is called so"),
        (BNB, spoilt(lambda *a: nf4(*a, nested=False), "weight.absmax", lambda x: x[1:]), "'weight.absmax' must have"),
        (BNB, spoilt(lambda *a: nf4(*a, nested=False), QUANT_STATE, state(shape=[4])), "must be a matrix in blocks"),
        (BNB, spoilt(lambda *a: nf4(*a, nested=False), QUANT_STATE, state(blocksize=0)), "must be a matrix in blocks"),
        (BNB, spoilt(lambda *a: nf4(*a, nested=False), QUANT_STATE, state(dtype="int8")), "dtype .* must be one of"),
        (BNB, spoilt(lambda *a: nf4(*a, nested=False), QUANT_STATE, lambda x: x[:9]), "quantisation state"),
    ],
)
def test_parts_that_do_not_fit_are_named(
    tmp_path: Path, how: dict[str, Any], make: Callable[..., Made], message: str
) -> None:
    write(tmp_path, how, make)
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize(("how", "make", "part"), [(GPTQ, gptq, "g_idx"), (CT4, packed_int, "weight_g_idx")])
def test_groups_that_do_not_exist_are_an_error(
    tmp_path: Path, how: dict[str, Any], make: Callable[..., Made], part: str
) -> None:
    write(tmp_path, how, spoilt(lambda *a: make(*a, ordered=False), part, lambda x: x + 1))
    checkpoint = open_checkpoint(tmp_path)
    with pytest.raises(CheckpointError, match=f"its part '{part}' must"):
        checkpoint.source.read("model.layers.0.mlp.up_proj.weight")
