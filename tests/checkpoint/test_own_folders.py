"""Meta's and Mistral's own folders: params.json beside consolidated files, cut up for several processes or not."""

from __future__ import annotations

import json
import os
import pickle
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from quadriga.errors import CheckpointError, ConfigError
from quadriga.io.convert import convert
from quadriga.io.detect import locate
from quadriga.io.open import open_checkpoint
from quadriga.io.torch_source import TorchSource
from quadriga.kernels import arrays
from quadriga.model import families
from quadriga.model.config import DenseSpec, ModelConfig, RopeSpec
from quadriga.model.families import PRESETS
from quadriga.model.families.own_params import from_params
from quadriga.nn.load import load_parameters
from tests.checkpoint.models import TINY, bits, random_bits, stored, write_hf
from tests.configs import changed

TOKENS: dict[str, Any] = {"bos_id": 1, "eos_ids": (2,)}
LLAMA: ModelConfig = changed(
    TINY["llama2"], max_seq_len=4096, ffn=DenseSpec(d_ff=144, activation="silu"), **TOKENS
)  # int(1.1 * int(8 * 48 / 3)) = 140, in steps of 12: 144
META = {"dim": 48, "n_layers": 3, "n_heads": 6, "n_kv_heads": 2, "vocab_size": -1, "multiple_of": 12}
META |= {"ffn_dim_multiplier": 1.1, "norm_eps": 1e-5}
MIXTRAL: ModelConfig = replace(TINY["mixtral"], max_seq_len=32_768, **TOKENS)
MISTRAL = {"dim": 48, "n_layers": 3, "head_dim": 8, "hidden_dim": 80, "n_heads": 6, "n_kv_heads": 2, "norm_eps": 1e-5}
MISTRAL |= {"vocab_size": 97, "moe": {"num_experts_per_tok": 3, "num_experts": 5}}


def tensors_of(config: ModelConfig, layout: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """(parameters, the tensors that a folder in this layout holds)."""
    parameters = random_bits(config)
    return parameters, stored(families.family_of(config).layouts[layout](config), parameters)


def folder_of(path: Path, params: dict[str, Any], files: dict[str, dict[str, Tensor]]) -> Path:
    path.mkdir(parents=True, exist_ok=True)
    (path / "params.json").write_text(json.dumps(params))
    for name, tensors in files.items():
        if name.endswith(".safetensors"):
            save_file({k: t.contiguous() for k, t in tensors.items()}, path / name)
        else:
            torch.save(tensors, path / name)
    return path


def assert_same(path: Path, parameters: dict[str, Tensor]) -> None:
    checkpoint = open_checkpoint(path)
    loaded = load_parameters(checkpoint)
    checkpoint.close()
    assert loaded.keys() == parameters.keys()
    assert all(bits(loaded[name]) == bits(value) for name, value in parameters.items())


def cut(tensors: dict[str, Tensor], n: int, *, rows_of_the_table: bool) -> list[dict[str, Tensor]]:
    """As fairscale cuts Meta's models: outputs of wq, wk, wv, w1, w3 and the head, inputs of wo and w2."""
    parts: list[dict[str, Tensor]] = [{} for _ in range(n)]
    for name, tensor in tensors.items():
        if tensor.ndim == 1:
            pieces = [tensor] * n
        else:
            by_column = name.endswith(("wo.weight", "w2.weight")) or (
                name.startswith("tok_embeddings") and not rows_of_the_table
            )
            pieces = [t.clone() for t in tensor.tensor_split(n, dim=1 if by_column else 0)]
        for part, piece in zip(parts, pieces, strict=True):
            part[name] = piece
    for part in parts:
        part["rope.freqs"] = torch.arange(4.0)
    return parts


# Reading -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("old_protocol", [False, True])
def test_metas_folder(tmp_path: Path, old_protocol: bool) -> None:
    parameters, tensors = tensors_of(LLAMA, "meta")
    folder = folder_of(tmp_path / "7B", META, {})
    torch.save(OrderedDict(tensors), folder / "consolidated.00.pth", pickle_protocol=2 if old_protocol else 4)
    assert_same(folder, parameters)
    assert_same(folder / "params.json", parameters)
    found = locate(folder)
    assert (found.kind, found.config) == ("own", LLAMA)
    assert [note.split(":")[0] for note in found.notes] == [
        "params.json does not give rope_theta",
        "params.json does not give the context",
        "params.json names no tokens",
    ]


@pytest.mark.parametrize("rows_of_the_table", [False, True])
@pytest.mark.parametrize("n", [2, 4])
def test_a_model_cut_up_for_several_processes(tmp_path: Path, n: int, rows_of_the_table: bool) -> None:
    config = replace(LLAMA, vocab_size=100).with_mixer(n_heads=6, n_kv_heads=2)
    parameters, tensors = tensors_of(config, "meta")
    parts = cut(tensors, n, rows_of_the_table=rows_of_the_table)
    files = {f"consolidated.{i:02d}.pth": part for i, part in enumerate(parts)}
    folder = folder_of(tmp_path / "13B", META, files)
    assert_same(folder, parameters)
    view = open_checkpoint(folder).parameters
    for name, box in (("layers.1.attn.wo.weight", ((5, 30), (20, 29))), ("layers.2.ffn.w_down", ((0, 7), (70, 80)))):
        part = parameters[name][tuple(slice(*axis) for axis in box)]
        assert bits(arrays.tensor(view.read(name, box))) == bits(part), "a box across files"


def test_tensors_that_share_a_storage_and_parameters(tmp_path: Path) -> None:
    """Every process of Meta's saved views into one buffer; some people save nn.Parameters."""
    parameters, tensors = tensors_of(LLAMA, "meta")
    whole = torch.cat([t.reshape(-1) for t in tensors.values()])
    views: OrderedDict[str, Tensor] = OrderedDict()
    at = 0
    for name, tensor in tensors.items():
        views[name] = whole[at : at + tensor.numel()].view(tensor.shape)
        at += tensor.numel()
    views["norm.weight"] = torch.nn.Parameter(tensors["norm.weight"])
    views._metadata = OrderedDict({"": {"version": 1}})  # type: ignore[attr-defined]
    assert_same(folder_of(tmp_path, META, {"consolidated.00.pth": views}), parameters)


@pytest.mark.parametrize("layout", ["one file", "numbered", "of several", "pickle"])
def test_mistrals_folder(tmp_path: Path, layout: str) -> None:
    parameters, tensors = tensors_of(MIXTRAL, "mistral")
    names = list(tensors)
    files = {
        "one file": {"consolidated.safetensors": names},
        "numbered": {f"consolidated.{i:02d}.safetensors": names[i::3] for i in range(3)},
        "of several": {f"consolidated-{i + 1:05d}-of-00002.safetensors": names[i::2] for i in range(2)},
        "pickle": {"consolidated.00.pth": names},
    }[layout]
    folder = folder_of(tmp_path, MISTRAL, {file: {n: tensors[n] for n in own} for file, own in files.items()})
    assert_same(folder, parameters)
    found = locate(folder)
    assert found.config == MIXTRAL
    assert found.notes[0].startswith("params.json does not give rope_theta: 1000000")


def test_mixtrals_first_release(tmp_path: Path) -> None:
    """Eight .pt files, the experts of a layer below each other in three matrices."""
    parameters, tensors = tensors_of(MIXTRAL, "mistral-stacked")
    assert tensors["layers.0.block_sparse_moe.w2"].shape == (5 * 80, 48)
    names = list(tensors)
    files = {f"consolidated.{i:02d}.pt": {n: tensors[n] for n in names[i::8]} for i in range(8)}
    folder = folder_of(tmp_path, MISTRAL, files)
    assert_same(folder, parameters)
    assert open_checkpoint(folder).layout == "mistral-stacked"


def test_safetensors_are_preferred_to_pickles(tmp_path: Path) -> None:
    parameters, tensors = tensors_of(MIXTRAL, "mistral")
    folder = folder_of(tmp_path, MISTRAL, {"consolidated.safetensors": tensors})
    (folder / "consolidated.00.pth").write_bytes(b"never opened")
    assert_same(folder, parameters)


def test_the_tokenizer_beside_the_folders_of_all_sizes(tmp_path: Path) -> None:
    """As Meta's downloads come: tokenizer.model, 7B/consolidated.00.pth, 13B/..."""
    _, tensors = tensors_of(LLAMA, "meta")
    folder = folder_of(tmp_path / "7B", META, {"consolidated.00.pth": tensors})
    (tmp_path / "tokenizer.model").write_bytes(b"of all sizes")
    assert open_checkpoint(folder).tokenizer_folder == tmp_path
    convert(folder, tmp_path / "made", to="hf")
    assert (tmp_path / "made" / "tokenizer.model").read_bytes() == b"of all sizes"
    (folder / "tokenizer.model").write_bytes(b"its own")
    assert open_checkpoint(folder).tokenizer_folder == folder
    write_hf(tmp_path / "hf", LLAMA)
    assert open_checkpoint(tmp_path / "hf").tokenizer_folder == tmp_path / "hf"


def test_it_converts_to_the_same_files_as_hugging_faces(tmp_path: Path) -> None:
    parameters, tensors = tensors_of(LLAMA, "meta")
    parts = cut(tensors, 2, rows_of_the_table=False)
    folder = folder_of(tmp_path / "own", META, {f"consolidated.{i:02d}.pth": part for i, part in enumerate(parts)})
    convert(folder, tmp_path / "made", to="hf")
    write_hf(tmp_path / "hf", LLAMA, parameters=parameters)
    assert_same(tmp_path / "made", parameters)
    one, other = open_checkpoint(tmp_path / "made"), open_checkpoint(tmp_path / "hf")
    assert one.config == other.config


# params.json ---------------------------------------------------------------------------------------------------------

_RELEASED: list[tuple[dict[str, Any], int, ModelConfig]] = [
    (
        {"dim": 4096, "multiple_of": 256, "n_heads": 32, "n_layers": 32, "norm_eps": 1e-05, "vocab_size": -1},
        32_000,
        PRESETS["llama2-7b"],
    ),
    (
        {"dim": 5120, "multiple_of": 256, "n_heads": 40, "n_layers": 40, "norm_eps": 1e-05, "vocab_size": -1},
        32_000,
        PRESETS["llama2-13b"],
    ),
    (
        {"dim": 8192, "multiple_of": 4096, "ffn_dim_multiplier": 1.3, "n_heads": 64, "n_kv_heads": 8, "n_layers": 80}
        | {"norm_eps": 1e-05, "vocab_size": -1},
        32_000,
        PRESETS["llama2-70b"],
    ),
    (
        {"dim": 4096, "n_layers": 32, "head_dim": 128, "hidden_dim": 14336, "n_heads": 32, "n_kv_heads": 8}
        | {"norm_eps": 1e-05, "vocab_size": 32000, "moe": {"num_experts_per_tok": 2, "num_experts": 8}},
        0,
        PRESETS["mixtral-8x7b"].with_ffn(aux_loss_weight=0.0),
    ),
]


@pytest.mark.parametrize(("params", "rows", "config"), _RELEASED)
def test_a_released_params_json_is_its_preset(params: dict[str, Any], rows: int, config: ModelConfig) -> None:
    assert from_params(params, lambda _: rows)[0] == config
    assert from_params({"model": params}, lambda _: rows)[0] == config


def test_contexts_and_bases_that_the_file_leaves_open() -> None:
    llama1 = {"dim": 4096, "multiple_of": 256, "n_heads": 32, "n_layers": 32, "norm_eps": 1e-06, "vocab_size": -1}
    large = {"dim": 8192, "multiple_of": 256, "n_heads": 64, "n_layers": 80, "norm_eps": 1e-05, "vocab_size": -1}
    code = llama1 | {"norm_eps": 1e-05, "rope_theta": 1000000}
    llama3 = {"dim": 4096, "n_layers": 32, "n_heads": 32, "n_kv_heads": 8, "vocab_size": 128256, "multiple_of": 1024}
    llama3 |= {"ffn_dim_multiplier": 1.3, "norm_eps": 1e-05, "rope_theta": 500000.0, "use_scaled_rope": False}
    found = [from_params(p, lambda _: 32_000)[0] for p in (llama1, large, code, llama3, llama1 | {"max_seq_len": 100})]
    assert [config.max_seq_len for config in found] == [2048, 2048, 16_384, 8192, 100]
    assert [config.layers[0].mixer.position for config in found[:4]] == [
        RopeSpec(theta=t) for t in (1e4, 1e4, 1e6, 5e5)
    ]
    assert [config.layers[0].ffn.d_ff for config in found[:4]] == [11_008, 22_016, 11_008, 14_336]
    assert (found[3].bos_id, found[3].eos_ids) == (128_000, (128_001, 128_009))
    # Mistral 7B v0.1: a window, in one copy as text; its program then took 10000 for the base.
    v01 = {k: v for k, v in MISTRAL.items() if k != "moe"} | {"sliding_window": "4096"}
    config, notes = from_params(v01, lambda _: 0)
    assert (config.family, config.max_seq_len, config.layers[0].mixer.position) == ("llama2", 4096, RopeSpec(theta=1e4))
    assert "rope_theta: 10000" in notes[0]
    assert from_params(v01 | {"max_position_embeddings": 32_768}, lambda _: 0)[0].max_seq_len == 4096
    assert from_params(MISTRAL | {"max_seq_len": 65_536}, lambda _: 0)[0].max_seq_len == 65_536


@pytest.mark.parametrize(
    ("params", "change", "says"),
    [
        (META, {"use_scaled_rope": True}, "use_scaled_rope must be False"),
        (META, {"multiple_of": 0}, "multiple_of must be at least 1"),
        (META, {"moe_args": {}}, "'moe_args', which Quadriga does not know"),
        (META, {"vision_chunk_size": 448}, "vision_chunk_size"),
        (META, {"quantization_args": {}}, "quantization_args"),
        (META, {"dim": "48"}, "dim must be a whole number"),
        (MISTRAL, {"model_type": "mamba"}, "model_type must be 'transformer'"),
        (MISTRAL, {"vision_encoder": {}}, "vision_encoder"),
        (MISTRAL, {"yarn": {"beta": 32}}, "'yarn', which Quadriga does not know"),
        (MISTRAL, {"tied_embeddings": True}, "tied_embeddings must be False"),
        (MISTRAL, {"lora": {"rank": 2}}, "lora must be null"),
        (MISTRAL, {"moe": {"num_experts": 5, "num_experts_per_tok": 3, "first": 1}}, "moe has the key 'first'"),
        (MISTRAL, {"sliding_window": [1024, None]}, "sliding_window must be a whole number"),
    ],
)
def test_params_that_are_not_computed_are_refused(params: dict[str, Any], change: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        from_params(params | change, lambda _: 97)


# Files that do not fit -----------------------------------------------------------------------------------------------


def _damaged(folder: Path, what: str) -> None:
    first, second = folder / "consolidated.00.pth", folder / "consolidated.01.pth"
    match what:
        case "one missing in between":
            second.rename(folder / "consolidated.02.pth")
        case "the last missing":
            second.unlink()
        case "other norms":
            part = torch.load(second)
            part["norm.weight"] = part["norm.weight"] + 1
            torch.save(part, second)
        case "another dtype":
            torch.save({name: tensor.float() for name, tensor in torch.load(second).items()}, second)
        case "whole in both":
            whole = torch.cat([torch.load(file)["output.weight"] for file in (first, second)])
            for file in (first, second):
                torch.save(torch.load(file) | {"output.weight": whole}, file)
        case "none":
            first.unlink()
            second.unlink()


@pytest.mark.parametrize(
    ("what", "says"),
    [
        ("one missing in between", r"number \[1\] is missing"),
        ("the last missing", "vocab|wrong shape"),
        ("other norms", r"norm\.weight is whole in 2 files, which must not differ"),
        ("another dtype", r"are stored as \['bfloat16', 'float32'\]"),
        ("whole in both", r"output\.weight is whole in 2 files"),
        ("none", r"needs consolidated\.00\.pth"),
    ],
)
def test_parts_that_make_no_whole(tmp_path: Path, what: str, says: str) -> None:
    config = LLAMA
    values = {n: t.float().nan_to_num(0, 1, -1).bfloat16() for n, t in random_bits(config).items()}
    parts = cut(stored(families.family_of(config).layouts["meta"](config), values), 2, rows_of_the_table=False)
    folder = folder_of(tmp_path, META, {f"consolidated.{i:02d}.pth": part for i, part in enumerate(parts)})
    assert open_checkpoint(folder).config == config
    _damaged(folder, what)
    with pytest.raises(CheckpointError, match=says):
        open_checkpoint(folder)


# Hostile files -------------------------------------------------------------------------------------------------------

GOOD = {"a": torch.arange(24.0).view(6, 4), "b": torch.arange(5.0)}


def saved(folder: Path, value: object, **options: Any) -> Path:
    torch.save(value, folder / "x.pth", **options)
    return folder / "x.pth"


def with_pickle(folder: Path, change: Callable[[bytes], bytes]) -> Path:
    """A sound file whose pickle is another."""
    source = saved(folder, GOOD)
    with zipfile.ZipFile(source) as archive:
        parts = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(folder / "y.pth", "w") as archive:
        for name, content in parts.items():
            archive.writestr(name, change(content) if name.endswith("data.pkl") else content)
    return folder / "y.pth"


class Runs:
    def __init__(self, action: tuple[Any, ...]) -> None:
        self.action = action

    def __reduce__(self) -> tuple[Any, ...]:
        return self.action


def _zip(folder: Path, parts: dict[str, bytes], compression: int = zipfile.ZIP_STORED) -> Path:
    with zipfile.ZipFile(folder / "z.pth", "w", compression) as archive:
        for name, content in parts.items():
            archive.writestr(name, content)
    return folder / "z.pth"


def _raw(folder: Path, content: bytes) -> Path:
    (folder / "r.pth").write_bytes(content)
    return folder / "r.pth"


def _sound(folder: Path) -> bytes:
    return saved(folder, GOOD).read_bytes()


LAUGHING = b"\x80\x02)q\x00" + b"".join(b"h\x00h\x00\x86q\x00" for _ in range(200))

HOSTILE: dict[str, tuple[Callable[[Path], Path], str]] = {
    "os.system": (
        lambda f: with_pickle(f, lambda _: pickle.dumps(Runs((os.system, ("touch pwned",))), 2)),
        r"it names (posix|nt)\.system",
    ),
    "eval": (
        lambda f: with_pickle(f, lambda _: pickle.dumps(Runs((eval, ("open('pwned', 'w')",))), 2)),
        "it names __builtin__.eval",
    ),
    "a whole module": (lambda f: saved(f, torch.nn.Linear(2, 3)), "it names torch.nn.modules.linear.Linear"),
    "a list": (lambda f: saved(f, [torch.ones(3)]), "has no place|not a dictionary of tensors"),
    "a dictionary of dictionaries": (lambda f: saved(f, {"state_dict": GOOD}), "not a dictionary of tensors"),
    "whole numbers": (lambda f: saved(f, {"a": torch.ones(3, dtype=torch.int64)}), "it names torch.LongStorage"),
    "a transposed tensor": (lambda f: saved(f, {"a": GOOD["a"].T}), "do not lie one after the other"),
    "a broadcast tensor": (lambda f: saved(f, {"a": torch.ones(1).expand(1000)}), "do not lie one after the other"),
    "before torch 1.6": (lambda f: saved(f, GOOD, _use_new_zipfile_serialization=False), "saved since 1.6"),
    "no torch file": (lambda f: _raw(f, b"GGUF" * 100), "saved since 1.6"),
    "empty": (lambda f: _raw(f, b""), "saved since 1.6"),
    "cut short": (lambda f: _raw(f, _sound(f)[:-300]), "saved since 1.6"),
    "cut short in the middle": (
        lambda f: _raw(f, (raw := _sound(f))[:300] + raw[-200:]),
        "claims more than the file holds|not where|cut short|malformed",
    ),
    "compressed": (lambda f: _zip(f, {"x/data.pkl": b"}." * 99}, zipfile.ZIP_DEFLATED), "compressed"),
    "no pickle": (lambda f: _zip(f, {"x/data/0": b"1234"}), "must hold one data.pkl, it has 0"),
    "two pickles": (lambda f: _zip(f, {"x/data.pkl": b"}.", "y/data.pkl": b"}."}), "it has 2"),
    "big-endian": (lambda f: _zip(f, {"x/data.pkl": b"\x80\x02}.", "x/byteorder": b"big"}), "big-endian"),
    "a pickle that is cut short": (lambda f: with_pickle(f, lambda raw: raw[:-20]), "cut short"),
    "names of laughing tuples": (
        lambda f: with_pickle(f, lambda _: LAUGHING + b"X\x01\x00\x00\x00a\x93."),
        "a name that is no text",
    ),
    "references of laughing tuples": (lambda f: with_pickle(f, lambda _: LAUGHING + b"Q."), "refers to data"),
    "endless": (lambda f: with_pickle(f, lambda _: b"\x80\x02" + b"N0" * 10), "has no place"),
    "another storage": (
        lambda f: with_pickle(f, lambda raw: raw.replace(b"X\x01\x00\x00\x000q", b"X\x01\x00\x00\x007q")),
        "lies in a storage that is not in the file",
    ),
    "more rows than there are": (
        lambda f: with_pickle(f, lambda raw: raw.replace(b"K\x06K\x04", b"K\x07K\x04")),
        "past the end",
    ),
    "a huge directory behind a 64-bit record": (
        lambda f: _raw(
            f,
            b"PK"
            + struct.pack("<4sQ2H2L4Q", b"PK\6\6", 44, 0, 0, 0, 0, 2**40, 2**40, 2**60, 2)
            + struct.pack("<4sLQL", b"PK\6\7", 0, 2, 1)
            + struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, 9, 9, 2**32 - 1, 0, 0),
        ),
        "claims more than the file holds",
    ),
    "a huge directory": (
        lambda f: _raw(f, b"PK" + bytes(100) + struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, 9, 9, 2**32 - 2, 0, 0)),
        "claims more than the file holds",
    ),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_what_is_no_dictionary_of_tensors_is_refused_and_never_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.chdir(tmp_path)
    make, says = HOSTILE[name]
    path = make(tmp_path)
    with pytest.raises(CheckpointError, match=says) as error:
        TorchSource(path)
    assert len(str(error.value)) < 500
    assert not (tmp_path / "pwned").exists()


def test_a_sound_file_like_the_hostile_ones(tmp_path: Path) -> None:
    for path in (saved(tmp_path, GOOD), with_pickle(tmp_path, lambda raw: raw)):
        source = TorchSource(path)
        assert torch.equal(arrays.tensor(source.read("a")), GOOD["a"])
        assert torch.equal(arrays.tensor(source.read("a", ((2, 5), (1, 3)))), GOOD["a"][2:5, 1:3])
        assert torch.equal(arrays.tensor(source.read("b", ((1, 4),))), GOOD["b"][1:4])
        source.close()


def test_every_damaged_byte_is_refused_or_read(tmp_path: Path) -> None:
    content = _sound(tmp_path)
    for at in range(0, len(content), 7):
        damaged = bytearray(content)
        damaged[at] ^= 0xFF
        path = _raw(tmp_path, bytes(damaged))
        try:
            source = TorchSource(path)
            for tensor in source.tensors:
                source.read(tensor)
            source.close()
        except CheckpointError:
            continue


def test_a_file_cut_short_while_open_is_an_error(tmp_path: Path) -> None:
    source = TorchSource(saved(tmp_path, {"a": torch.zeros(1 << 16)}))
    os.truncate(tmp_path / "x.pth", 1000)
    with pytest.raises(CheckpointError, match="became shorter while it was read"):
        source.read("a")
    source.close()
