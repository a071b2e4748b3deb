"""GGUF files from before llama.cpp merged the experts of a layer: a tensor each, the router in half precision."""

from __future__ import annotations

from dataclasses import replace
from math import prod
from pathlib import Path

import numpy as np
import pytest
import torch

from quadriga.errors import CheckpointError
from quadriga.io import gguf
from quadriga.io.convert import convert
from quadriga.io.detect import locate
from quadriga.io.gguf import plan_gguf
from quadriga.io.gguf_source import GGUFSource
from quadriga.io.open import open_checkpoint
from quadriga.model.config import ModelConfig
from quadriga.nn.load import load_parameters
from tests.checkpoint.models import TINY, bits, random_bits, write_hf

# Rows of whole blocks of 32, so that the experts can be quantised.
CONFIGS: dict[str, ModelConfig] = {
    name: replace(TINY[name].with_ffn(d_ff=96), d_model=64, embedding_scale=1.0) for name in ("mixtral", "grok1")
}


def split_by_expert(merged: Path, out: Path, *, half_router: bool = True) -> None:
    """Cut every tensor of all experts into one each, the stored bytes unchanged; the router becomes float16."""
    source = GGUFSource(merged)
    tensors: dict[str, tuple[tuple[int, ...], str]] = {}
    content: dict[str, bytes] = {}
    for name, tensor in source.header.tensors.items():
        raw = bytes(source.raw(name, 0, prod(tensor.shape[:-1])))
        if "_exps" in name:
            size = len(raw) // tensor.shape[0]
            for expert in range(tensor.shape[0]):
                one = name.replace("_exps.", f".{expert}.")
                tensors[one] = (tensor.shape[1:], tensor.format)
                content[one] = raw[expert * size : (expert + 1) * size]
        elif "ffn_gate_inp" in name and half_router:
            tensors[name] = (tensor.shape, "float16")
            content[name] = np.frombuffer(raw, np.float32).astype(np.float16).tobytes()
        else:
            tensors[name], content[name] = (tensor.shape, tensor.format), raw
    plan = plan_gguf(out.name, source.header.typed(), tensors)
    data = bytearray(plan.sizes[out.name])
    data[: len(plan.headers[out.name])] = plan.headers[out.name]
    for name, raw in content.items():
        data[plan.places[name][1] : plan.places[name][1] + len(raw)] = raw
    out.write_bytes(data)


def merged_file(folder: Path, name: str, form: str) -> Path:
    config = CONFIGS[name]
    values = {n: t.float().nan_to_num(0, 1, -1).clamp(-2, 2) for n, t in random_bits(config).items()}
    write_hf(folder / "hf", config, parameters=values)
    convert(folder / "hf", folder / "merged.gguf", to="gguf", gguf_format=form)
    return folder / "merged.gguf"


@pytest.mark.parametrize("form", ["float16", "q8_0"])
@pytest.mark.parametrize("name", CONFIGS)
def test_one_tensor_an_expert_is_the_same_model(tmp_path: Path, name: str, form: str) -> None:
    merged = merged_file(tmp_path, name, form)
    split_by_expert(merged, tmp_path / "split.gguf")
    one, other = open_checkpoint(merged), open_checkpoint(tmp_path / "split.gguf")
    assert (one.layout, other.layout) == ("gguf", "gguf-split")
    assert one.config == other.config
    expected, loaded = load_parameters(one), load_parameters(other)
    for parameter, value in expected.items():
        if parameter.endswith("router.weight"):
            assert torch.equal(loaded[parameter], value.half())
        else:
            assert bits(loaded[parameter]) == bits(value), parameter


def test_their_blocks_are_packed_as_they_lie(tmp_path: Path) -> None:
    """Unpacked and packed again they would not be the stored numbers."""
    merged = merged_file(tmp_path, "mixtral", "q8_0")
    split_by_expert(merged, tmp_path / "split.gguf", half_router=False)
    for name in ("merged", "split"):
        convert(tmp_path / f"{name}.gguf", tmp_path / name, format="keep")
    (one,), (other,) = (sorted((tmp_path / name).glob("*.packed")) for name in ("merged", "split"))
    assert one.read_bytes() == other.read_bytes()


def test_a_missing_expert_and_a_promise_of_millions_are_named(tmp_path: Path) -> None:
    merged = merged_file(tmp_path, "mixtral", "float16")
    split_by_expert(merged, tmp_path / "split.gguf")
    raw = (tmp_path / "split.gguf").read_bytes()
    (tmp_path / "less.gguf").write_bytes(raw.replace(b"blk.1.ffn_up.3.weight", b"blk.1.ffn_xx.3.weight"))
    with pytest.raises(CheckpointError, match=r"blk\.1\.ffn_up\.3\.weight"):
        open_checkpoint(tmp_path / "less.gguf")
    at = raw.index(b"llama.block_count") + len(b"llama.block_count") + 4
    (tmp_path / "more.gguf").write_bytes(raw[:at] + (9999).to_bytes(4, "little") + raw[at + 4 :])
    with pytest.raises(CheckpointError, match=r"asks for \d+ tensors \(9999 layers\)"):
        open_checkpoint(tmp_path / "more.gguf")


def test_opening_a_file_reads_its_header_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, read = merged_file(tmp_path, "mixtral", "q8_0"), list[str]()
    parse = gguf.parse_header
    monkeypatch.setattr(gguf, "parse_header", lambda file, name: (read.append(name), parse(file, name))[1])
    open_checkpoint(path).close()
    assert read == ["merged.gguf"]
    before = len(list(Path("/proc/self/fd").iterdir()))
    locate(path)
    assert read == ["merged.gguf"] * 2 and len(list(Path("/proc/self/fd").iterdir())) == before
