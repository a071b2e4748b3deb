"""Checkpoints as quantisers of 2025 and 2026 publish them, each packed here number by number: FP4, scales a row, 8 bits
of bitsandbytes, several schemes in one file, AutoRound's and ModelOpt's settings, and settings in other places."""

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
from quadriga.io.detect import locate
from quadriga.io.open import open_checkpoint
from quadriga.io.packed import load_packed, packed_format
from quadriga.kernels.cpu.packing import Packed
from quadriga.model import families
from quadriga.quant.packed import PACKED
from tests.checkpoint.models import bits
from tests.checkpoint.test_quantised import (
    AWQ,
    BNB,
    CONFIG,
    CT4,
    FP8,
    GPTQ,
    Made,
    awq,
    compressed,
    float8,
    fp8,
    gptq,
    packed_int,
    per_row,
    spoilt,
    stream,
    write,
)

E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


def fp4(rng: np.random.Generator, rows: int, cols: int, *, kind: str, least: int = 100) -> Made:
    """NVFP4 (compressed-tensors divides by its second scale, ModelOpt multiplies) or MXFP4, code by code.

    Args:
        least: the least of MXFP4's scales; below 104 their halves are none of float16's.
    """
    size = 32 if kind == "mxfp4" else 16
    q = rng.integers(0, 16, (rows, cols))
    packed = (q[:, 0::2] + 16 * q[:, 1::2]).astype(np.uint8)
    outer = np.float32(rng.uniform(1, 3000))
    if kind == "mxfp4":
        stored = rng.integers(least, 140, (rows, cols // size)).astype(np.uint8)
        scales = np.float32(2) ** (stored.astype(np.float32) - 127)
    else:
        stored = np.abs(float8(rng, rows, cols // size))
        scales = stored.astype(np.float32) * outer if kind == "modelopt" else stored.astype(np.float32) / outer
    weight = np.empty((rows, cols), np.float32)
    for r in range(rows):
        for c in range(cols):
            weight[r, c] = np.float32(E2M1[q[r, c] & 7] * (-1 if q[r, c] & 8 else 1)) * scales[r, c // size]
    if kind == "modelopt":
        return {"weight": packed, "weight_scale": stored, "weight_scale_2": np.array(outer)}, weight
    parts = {"weight_packed": packed, "weight_scale": stored}
    if kind == "nvfp4":
        parts |= {"weight_global_scale": np.array([outer]), "input_global_scale": np.ones(1, np.float32)}
    return parts, weight.astype(ml_dtypes.bfloat16)


def rows_of_float8(rng: np.random.Generator, rows: int, cols: int, *, flat: bool = False) -> Made:
    stored, scales = float8(rng, rows, cols), rng.random((rows, 1)).astype(np.float32)
    parts = {"weight": stored, "weight_scale": scales[:, 0] if flat else scales}
    return parts, stored.astype(np.float32) * scales


def one_scale(rng: np.random.Generator, rows: int, cols: int) -> Made:
    """As Mistral publishes FP8 and transformers 5 writes it without blocks."""
    parts, weight = fp8(rng, rows, cols, block=None)
    scale = np.array(parts["weight_scale"][0])
    return {"weight": parts["weight"], "weight_scale_inv": scale, "activation_scale": scale}, weight


def mx8(rng: np.random.Generator, rows: int, cols: int) -> Made:
    stored, powers = float8(rng, rows, cols), rng.integers(110, 135, (rows, cols // 32)).astype(np.uint8)
    weight = stored.astype(np.float32) * (np.float32(2) ** (powers.astype(np.float32) - 127)).repeat(32, axis=1)
    return {"weight": stored, "weight_scale": powers}, weight.astype(ml_dtypes.bfloat16)


def llm_int8(rng: np.random.Generator, rows: int, cols: int) -> Made:
    stored, largest = rng.integers(-127, 128, (rows, cols)).astype(np.int8), rng.random(rows).astype(np.float32)
    weight = stored.astype(np.float32) * largest[:, None] * np.float32(7.874015718698502e-3)
    return {"weight": stored, "SCB": largest, "weight_format": np.array(0, np.uint8)}, weight


def odd_bits(rng: np.random.Generator, rows: int, cols: int, *, width: int) -> Made:
    """pack-quantized of a width that lies across words, one scale and one zero a row."""
    half = 2 ** (width - 1)
    q, z = rng.integers(0, 2 * half, (rows, cols)), rng.integers(0, 2 * half, (rows, 1))
    whole = -(-cols // 32) * 32
    words = stream(np.pad(q, ((0, 0), (0, whole - cols))), width)[:, : -(-cols * width // 32)]
    zeros = stream(np.pad(z.T, ((0, 0), (0, -rows % 32))), width)[:, : -(-rows * width // 32)].T.copy()
    scales = rng.random((rows, 1)).astype(ml_dtypes.bfloat16)
    parts = {
        "weight_packed": words.view(np.int32), "weight_shape": np.array([rows, cols]), "weight_scale": scales,
        "weight_zero_point": zeros.view(np.int32),
    }  # fmt: skip
    return parts, (q - z).astype(ml_dtypes.bfloat16) * scales


def in_turn(*makers: Callable[..., Made]) -> Callable[..., Made]:
    """One matrix by each of them, and again from the first."""
    count = 0

    def made(rng: np.random.Generator, rows: int, cols: int) -> Made:
        nonlocal count
        count += 1
        return makers[count % len(makers)](rng, rows, cols)

    return made


def of_bits(width: int) -> Callable[..., Made]:
    def made(rng: np.random.Generator, rows: int, cols: int) -> Made:
        parts, weight = gptq(rng, rows, cols, width=width)
        return parts | {"g_idx": (np.arange(cols) // 32).astype(np.int32)}, weight

    return made


def middle_awq(rng: np.random.Generator, rows: int, cols: int) -> Made:
    """AWQ whose zeros are all 8, as AutoRound writes symmetric weights."""
    parts, _ = awq(rng, rows, cols)
    parts["qzeros"] = np.full_like(parts["qzeros"], -2004318072)  # 0x88888888
    weight = np.empty((rows, cols), np.float16)
    for c in range(cols):
        for r in range(rows):
            nibble = (0, 4, 1, 5, 2, 6, 3, 7)[r % 8]
            q = int(parts["qweight"].view(np.uint32)[c, r // 8]) >> 4 * nibble & 15
            weight[r, c] = np.float16(q - 8) * parts["scales"][c // 32, r]
    return parts, weight


ROUND = {
    "quant_method": "auto-round", "bits": 4, "group_size": 32, "sym": False, "data_type": "int", "iters": 400,
    "autoround_version": "0.9.1", "block_name_to_quantize": "model.layers", "packing_format": "auto_round:auto_gptq",
}  # fmt: skip
FP4_WEIGHTS: dict[str, Any] = {"type": "float", "num_bits": 4, "dynamic": False}
NVFP4 = compressed(
    "nvfp4-pack-quantized", **FP4_WEIGHTS, strategy="tensor_group", group_size=16, scale_dtype="torch.float8_e4m3fn"
)
MXFP4 = compressed("mxfp4-pack-quantized", **FP4_WEIGHTS, strategy="group", group_size=32, scale_dtype="torch.uint8")
MXFP8 = compressed("mxfp8-quantized", type="float", strategy="group", group_size=32, scale_dtype="torch.uint8")
ROWS8 = compressed("float-quantized", type="float")
KV = {"num_bits": 8, "type": "float", "strategy": "tensor", "dynamic": False, "symmetric": True}
MODELOPT = {
    "quant_method": "modelopt", "quant_algo": "NVFP4", "producer": {"name": "modelopt", "version": "0.37.0"},
    "config_groups": {"group_0": {"targets": ["Linear"]}}, "ignore": ["lm_head"], "kv_cache_scheme": KV,
}  # fmt: skip


def mixed(*configs: dict[str, Any]) -> dict[str, Any]:
    """Their schemes as groups of one configuration; and a group that only activations are rounded in."""
    groups = {
        f"group_{i}": config["config_groups"]["group_0"] | {"format": config["format"]}
        for i, config in enumerate(configs)
    }
    groups["cache"] = {"targets": ["re:.*k_proj"], "weights": None, "output_activations": KV}
    return configs[0] | {"format": "mixed-precision", "config_groups": groups}


def _row8(rng: np.random.Generator, rows: int, cols: int) -> Made:
    return per_row(rng, rows, cols, is_float=True)


METHODS: dict[str, tuple[dict[str, Any], Callable[..., Made], dict[str, Any]]] = {
    "nvfp4": (NVFP4 | {"moe_sparsity_config": None}, fp4, {"kind": "nvfp4"}),
    "mxfp4": (MXFP4, fp4, {"kind": "mxfp4"}),
    "mxfp8": (MXFP8, mx8, {}),
    "modelopt, nvfp4": (MODELOPT, fp4, {"kind": "modelopt"}),
    "modelopt, fp8": (MODELOPT | {"quant_algo": "FP8"}, lambda *a: fp8(*a, block=None), {}),
    "modelopt, fp8 a row": (
        MODELOPT | {"quant_algo": "FP8_PER_CHANNEL_PER_TOKEN"}, rows_of_float8, {"flat": True},
    ),
    "fbgemm": ({"quant_method": "fbgemm_fp8", "activation_scale_ub": 1200.0}, rows_of_float8, {}),
    "fp8 of transformers 5": (
        FP8 | {"scale_fmt": "float", "expert_dtype": "fp8", "modules_to_convert": None, "dequantize": False}, fp8, {},
    ),
    "fp8, one scale of Mistral's": (FP8 | {"weight_block_size": None, "activation_scheme": "static"}, one_scale, {}),
    "llm.int8": (
        BNB | {"load_in_4bit": False, "_load_in_4bit": False, "load_in_8bit": True, "_load_in_8bit": True}, llm_int8, {},
    ),
    "packed int3 with zeros": (
        compressed("pack-quantized", num_bits=3, symmetric=False), odd_bits, {"width": 3},
    ),
    "packed int7 with zeros": (
        compressed("pack-quantized", num_bits=7, symmetric=False), odd_bits, {"width": 7},
    ),
    "two schemes": (mixed(CT4, ROWS8, NVFP4), in_turn(packed_int, _row8, lambda *a: fp4(*a, kind="nvfp4")), {}),
    "gptq of several bits": (
        GPTQ | {"method": "gptq", "dynamic": {r"+:.*up.*": {"bits": 8}, "-:.*x.*": {}}}, in_turn(of_bits(8), of_bits(3)), {},
    ),
    "auto-round": (ROUND, gptq, {}),
    "auto-round, whole zeros": (ROUND | {"packing_format": "auto_round"}, gptq, {"v2": True}),
    "auto-round as awq": (ROUND | {"packing_format": "auto_round:auto_awq", "sym": True}, middle_awq, {}),
    "awq by auto-round": (AWQ | {"provider": "auto-round", "zero_point": False, "sym": True, "iters": 0}, middle_awq, {}),
    "awq of transformers 5": (
        AWQ | {"sym": True, "act_group_aware": True, "damp_percent": 0.1, "backend": "auto", "format": "gemm",
               "true_sequential": True, "meta": None}, awq, {},
    ),
}  # fmt: skip


def check(folder: Path, plain: dict[str, Any]) -> None:
    source = open_checkpoint(folder).source
    assert source.tensors.keys() == plain.keys()
    for weight, values in plain.items():
        assert source.read(weight).tobytes() == bits(values), weight
        if values.ndim == 2:
            rows, cols = values.shape
            for (a, b), (c, d) in (((1, rows), (0, cols)), ((5, 13), (3, cols - 1))):
                assert source.read(weight, ((a, b), (c, d))).tobytes() == bits(values[a:b, c:d])


@pytest.mark.parametrize("name", METHODS)
def test_the_numbers_are_the_method_s(tmp_path: Path, name: str) -> None:
    how, make, options = METHODS[name]
    check(tmp_path, write(tmp_path, how, make, **options))


@pytest.mark.parametrize("several", [False, True])
def test_mxfp4_is_kept_bit_by_bit(tmp_path: Path, several: bool) -> None:
    """In 4.5 bits a number where q8 takes 8.5; of several schemes the others become q8."""

    def made(*args: Any) -> Made:
        return fp4(*args, kind="mxfp4", least=104)

    how = mixed(MXFP4, ROWS8) if several else MXFP4
    plain = write(tmp_path, how, in_turn(_row8, made) if several else made)
    checkpoint = open_checkpoint(tmp_path)
    packed = load_packed(checkpoint).parameters
    kinds = set()
    for i in range(CONFIG.n_layers):
        for ours, theirs in (
            ("ffn.w_up", "mlp.up_proj"),
            ("ffn.w_down", "mlp.down_proj"),
            ("attn.wo.weight", "self_attn.o_proj"),
        ):
            matrix, name = packed[f"layers.{i}.{ours}"], f"model.layers.{i}.{theirs}.weight"
            assert isinstance(matrix, Packed) and matrix.format == packed_format(
                checkpoint, f"layers.{i}.{ours}", "keep"
            )
            kinds.add(matrix.format)
            if matrix.format == "mx4":
                assert checkpoint.source.tensors[name].dtype == "mxfp4"
                np.testing.assert_array_equal(matrix.unpack(), plain[name].float().numpy())
                assert matrix.data.nbytes == PACKED["mx4"].nbytes_of(*plain[name].shape)
    assert kinds == ({"mx4", "q8"} if several else {"mx4"})
    if not several:
        matrix = packed["layers.1.attn.wqkv.weight"]
        assert isinstance(matrix, Packed) and matrix.format == "mx4"
        whole = torch.cat([plain[f"model.layers.1.self_attn.{part}_proj.weight"].float() for part in "qkv"])
        np.testing.assert_array_equal(matrix.unpack(), whole.numpy())


def test_bits_of_single_matrices_are_auto_round_s(tmp_path: Path) -> None:
    """extra_config has 8 bits for one matrix and leaves another as it was."""
    special = "model.layers.1.mlp.up_proj"
    names = iter(
        piece.source for piece in families.family_of(CONFIG).layouts["hf"](CONFIG) if "proj.weight" in piece.source
    )

    def made(rng: np.random.Generator, rows: int, cols: int) -> Made:
        return gptq(rng, rows, cols, width=8 if next(names).startswith(special) else 4)

    extra = {special: {"bits": 8, "data_type": "int"}, "lm_head": {"bits": 16, "data_type": "float"}}
    check(tmp_path, write(tmp_path, ROUND | {"extra_config": extra}, made))


@pytest.mark.parametrize("name", ["auto-round", "auto-round as awq"])
def test_matrices_that_auto_round_names_for_other_reasons_keep_bits_and_groups(tmp_path: Path, name: str) -> None:
    """It writes what differs from the file's settings, and "sym" is not needed for reading."""
    how, make, options = METHODS[name]
    extra = {"model.layers.0.mlp.up_proj": {"sym": False}, ".*down.*": {"bits": 4, "group_size": 32}}
    check(tmp_path, write(tmp_path, how | {"extra_config": extra}, make, **options))


@pytest.mark.parametrize("where", ["self_attn", "self_attn.k_proj"])
def test_scales_of_the_cache_are_left_out(tmp_path: Path, where: str) -> None:
    """By packed weights and by plain ones."""
    from safetensors.torch import load_file, save_file

    plain = write(tmp_path, ROWS8 | {"kv_cache_scheme": KV}, _row8)
    stored = load_file(tmp_path / "model.safetensors")
    scale = stored["model.layers.0.mlp.up_proj.weight_scale"][:1, 0].clone()
    for i in range(CONFIG.n_layers):
        for part in ("k_scale", "v_scale", "output_scale"):
            stored[f"model.layers.{i}.{where}.{part}"] = scale.clone()
    stored["lm_head.input_scale"] = scale.clone()
    save_file(stored, tmp_path / "model.safetensors")
    check(tmp_path, plain)


@pytest.mark.parametrize(
    ("file", "how", "make"),
    [
        ("quantize_config.json", {k: v for k, v in GPTQ.items() if k != "quant_method"}, gptq),
        ("quantize_config.json", GPTQ | {"checkpoint_format": "gptq"}, gptq),
        ("quant_config.json", {"zero_point": True, "q_group_size": 32, "w_bit": 4, "version": "GEMM"}, awq),
        (
            "hf_quant_config.json",
            {
                "producer": {"name": "modelopt", "version": "0.23.0"},
                "quantization": {"quant_algo": "FP8", "kv_cache_quant_algo": "FP8", "exclude_modules": ["lm_head"]},
            },
            lambda *a: fp8(*a, block=None),
        ),
    ],
)
def test_settings_in_a_file_beside(tmp_path: Path, file: str, how: dict[str, Any], make: Callable[..., Made]) -> None:
    plain = write(tmp_path, GPTQ, make)
    raw = json.loads((tmp_path / "config.json").read_text())
    del raw["quantization_config"]
    (tmp_path / "config.json").write_text(json.dumps(raw))
    (tmp_path / file).write_text(json.dumps(how))
    check(tmp_path, plain)


def test_settings_of_the_text_of_a_model_that_sees(tmp_path: Path) -> None:
    from quadriga.io.quantised.config import split
    from quadriga.io.quantised.gptq import Gptq

    raw = {"model_type": "some_vl", "text_config": {"model_type": "llama", "quantization_config": GPTQ}}
    rest, method = split(raw)
    assert rest == {"model_type": "some_vl", "text_config": {"model_type": "llama"}}
    assert method == Gptq(4, 32, zeros_less_one=True)


@pytest.mark.parametrize(
    ("how", "message"),
    [
        (ROUND | {"packing_format": "auto_round:fp8_static"}, "packing_format must be 'auto_round:auto_gptq'"),
        ({k: v for k, v in ROUND.items() if k != "packing_format"}, "lacks the key 'packing_format'"),
        (ROUND | {"extra_config": {".*up.*": {"bits": 8}}}, "must name single matrices where bits differ"),
        (ROUND | {"extra_config": {"lm_head": {"bits": 5}}}, "bits must be 2, 3, 4, 8 or 16"),
        (ROUND | {"data_type": "mx_fp"}, "data_type must be 'int'"),
        (ROUND | {"act_bits": 8}, "act_bits must be 16"),
        (MODELOPT | {"quant_algo": "W4A8_AWQ"}, "quant_algo must be 'FP8'"),
        (GPTQ | {"dynamic": {"+:.*": {"bits": 8, "adapter": {"rank": 4}}}}, "dynamic may set bits"),
        (GPTQ | {"rotation": "hadamard"}, "rotation must be null"),
        (compressed("nvfp4-pack-quantized", **FP4_WEIGHTS, strategy="group", group_size=16), "strategy must be"),
        (compressed("mxfp8-quantized", type="float"), "must be of type float in groups of 32"),
        (FP8 | {"expert_dtype": "fp4"}, "expert_dtype must be 'fp8'"),
        (mixed(CT4) | {"config_groups": {"a": {"targets": [], "weights": None}}}, "must pack weights, got 1 groups"),
    ],
)
def test_what_is_not_read_is_refused_by_name(tmp_path: Path, how: dict[str, Any], message: str) -> None:
    write(tmp_path, how, gptq)
    with pytest.raises(ConfigError, match=message):
        open_checkpoint(tmp_path)


def with_zeros(rng: np.random.Generator, rows: int, cols: int) -> Made:
    parts, weight = per_row(rng, rows, cols, is_float=False)
    return parts | {"weight_zero_point": np.ones((rows, 1), np.int8)}, weight


def both_scales(rng: np.random.Generator, rows: int, cols: int) -> Made:
    parts, weight = one_scale(rng, rows, cols)
    return parts | {"weight_scale": parts["weight_scale_inv"]}, weight


@pytest.mark.parametrize(
    ("how", "make", "message"),
    [
        (compressed("int-quantized"), with_zeros, "'weight_zero_point' must be zero"),
        (FP8 | {"weight_block_size": None}, both_scales, "got both"),
        (
            BNB | {"load_in_4bit": False, "_load_in_4bit": False, "load_in_8bit": True, "_load_in_8bit": True},
            spoilt(llm_int8, "weight_format", lambda x: np.array(2, np.uint8)), "'weight_format' must be 0",
        ),
        (NVFP4, spoilt(lambda *a: fp4(*a, kind="nvfp4"), "weight_global_scale", lambda x: None), "is missing"),
        (MXFP4, spoilt(lambda *a: fp4(*a, kind="mxfp4"), "weight_scale", lambda x: x[:, 1:]), "'weight_scale' must have"),
        (mixed(CT4, ROWS8), in_turn(packed_int, lambda *a: per_row(*a, is_float=False)), "must fit one of the 2 schemes"),
        (GPTQ | {"dynamic": {"+:x": {"bits": 8}}}, gptq, "'g_idx' is missing"),
        (
            GPTQ | {"dynamic": {"+:x": {"bits": 8}}}, spoilt(of_bits(4), "g_idx", lambda x: x[:-1]), "its bits must be 2, 3",
        ),
    ],
)  # fmt: skip
def test_parts_that_do_not_fit_are_named(
    tmp_path: Path, how: dict[str, Any], make: Callable[..., Made], message: str
) -> None:
    write(tmp_path, how, make)
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize(
    ("how", "make", "says"),
    [
        (MXFP4, lambda *a: fp4(*a, kind="mxfp4"), "stand for; in memory they stay as they are: MXFP4 (as mx4);"),
        (mixed(NVFP4, MXFP4), lambda *a: fp4(*a, kind="mxfp4"), "stay as they are: MXFP4 (as mx4);"),
        (GPTQ | {"sym": True}, gptq, "stay as they are: 4 bits in order around 8 (as q4);"),
        (NVFP4, lambda *a: fp4(*a, kind="nvfp4"), "the numbers they stand for; activations"),
    ],
)
def test_info_says_what_stays_packed(tmp_path: Path, how: dict[str, Any], make: Callable[..., Made], says: str) -> None:
    write(tmp_path, how, make)
    assert any(says in note for note in locate(tmp_path).notes)


def test_columns_as_rows_are_no_blocks(tmp_path: Path) -> None:
    """A matrix that is stored the other way round would get other groups: it becomes q8."""
    write(tmp_path, MXFP4, fp4, kind="mxfp4")
    checkpoint = open_checkpoint(tmp_path)
    turned = [
        replace(piece, transpose=True) if piece.target.endswith("w_down") else piece for piece in checkpoint.pieces
    ]
    other = replace(checkpoint, pieces=turned)
    assert packed_format(other, "layers.0.ffn.w_down", "keep") == "q8"
    assert packed_format(other, "layers.0.ffn.w_up", "keep") == "mx4"
