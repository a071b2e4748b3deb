"""Grok-1's released form: real pickles are read, anything that is not an array is refused before it can act."""

from __future__ import annotations

import io
import os
import pickle
import re
import struct
import sys
import types
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from quadriga.errors import CheckpointError
from quadriga.io.grok import GrokSource
from quadriga.io.open import open_checkpoint
from quadriga.kernels.arrays import tensor
from quadriga.model import families
from quadriga.model.config import ModelConfig
from quadriga.model.weight_map import parameter_shapes, source_shapes
from quadriga.nn.load import load_parameters
from tests.checkpoint.models import TINY, bits, stored

# Twelve layers, so that string order (0, 1, 10, 11, 2, ...) differs from number order.
CONFIG: ModelConfig = TINY["grok1"].with_n_layers(12)


class QuantizedWeight8bit:
    """Stands for the release's class; pickled under the name it has there."""

    def __init__(self, weight: np.ndarray[Any, Any], scales: np.ndarray[Any, Any]) -> None:
        self.weight, self.scales = weight, scales


QuantizedWeight8bit.__module__ = "__main__"


def pickled(value: object, protocol: int) -> bytes:
    main = sys.modules["__main__"]
    had = getattr(main, "QuantizedWeight8bit", None)
    main.QuantizedWeight8bit = QuantizedWeight8bit  # type: ignore[attr-defined]
    try:
        return pickle.dumps(value, protocol=protocol)
    finally:
        if had is None:
            del main.QuantizedWeight8bit  # type: ignore[attr-defined]


def release(folder: Path, protocol: int = 5) -> dict[str, torch.Tensor]:
    """A release of a small Grok-1: quantised matrices, float32 norms. Returns the parameters it stands for."""
    import json

    rng = np.random.default_rng(3)
    pieces = families.FAMILIES["grok1"].layouts["jax"](CONFIG)
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(families.FAMILIES["grok1"].config_to_hf(CONFIG)))
    parameters = {name: torch.zeros(shape) for name, shape in parameter_shapes(CONFIG).items()}
    numbers: dict[str, torch.Tensor] = {}
    names = sorted(source_shapes(pieces), key=lambda name: name)
    for index, name in enumerate(names):
        shape = source_shapes(pieces)[name]
        if len(shape) == 1 or "embed" in name:
            leaf: object = rng.standard_normal(shape).astype(np.float32)
            numbers[name] = torch.from_numpy(np.asarray(leaf))
        else:
            weight = rng.integers(-127, 128, shape, dtype=np.int8)
            scales = rng.uniform(0.001, 0.01, (*shape[:-2], 1, shape[-1])).astype(np.float32)
            leaf = QuantizedWeight8bit(weight, scales)
            numbers[name] = torch.from_numpy(weight.astype(np.float32) * scales)
        (folder / f"tensor{index:05d}_000").write_bytes(pickled(leaf, protocol))
    assert re.search(r"layer_10/.*layer_2/", " ".join(names)), "layers come in string order"
    # Check the expectation against the layout itself: storing the parameters gives the numbers back.
    for piece in pieces:
        value = numbers[piece.source]
        target = tuple(slice(*r) for r in piece.target_box) if piece.target_box else ...
        parameters[piece.target][target] = value.transpose(-2, -1) if piece.transpose else value
    again = stored(pieces, parameters)
    assert all(bits(again[name]) == bits(numbers[name]) for name in names)
    return parameters


@pytest.mark.parametrize("protocol", [3, 4, 5])
def test_a_release_is_read_exactly(tmp_path: Path, protocol: int) -> None:
    parameters = release(tmp_path / "ckpt-0", protocol)
    for path in (tmp_path / "ckpt-0", tmp_path):
        checkpoint = open_checkpoint(path)
        assert (checkpoint.kind, checkpoint.config.n_layers) == ("grok", 12)
        loaded = load_parameters(checkpoint)
        assert all(bits(loaded[name]) == bits(value) for name, value in parameters.items())


def test_bfloat16_arrays(tmp_path: Path) -> None:
    """jax pickles bfloat16 as ml_dtypes' type; its bytes are the numbers."""
    head = b"\x80\x04\x8c\x16numpy._core.multiarray\x8c\x0c_reconstruct\x93\x8c\x05numpy\x8c\x07ndarray\x93K\x00\x85C\x01b\x87R"
    dtype = b"\x8c\x05numpy\x8c\x05dtype\x93\x8c\x09ml_dtypes\x8c\x08bfloat16\x93\x89\x88\x87R"
    values = torch.randn(6, 4).bfloat16()
    raw = values.view(torch.uint8).numpy().tobytes()
    state = b"(K\x01K\x06K\x04\x86" + dtype + b"\x89C" + bytes([len(raw)]) + raw + b"tb."
    (tmp_path / "tensor00000_000").write_bytes(head + state)
    piece = families.FAMILIES["grok1"].layouts["jax"](CONFIG)[0]
    source = GrokSource(tmp_path, [replace(piece, source="a", source_shape=(6, 4))])
    assert torch.equal(tensor(source.read("a")), values)
    assert torch.equal(tensor(source.read("a", ((2, 5), (1, 3)))), values[2:5, 1:3])


class Runs:
    def __init__(self, action: tuple[Any, ...]) -> None:
        self.action = action

    def __reduce__(self) -> tuple[Any, ...]:
        return self.action


def laughing() -> bytes:
    """Opcodes of a tuple of itself 200 times doubled: nothing in memory, 2^200 words if it is written out."""
    return b")q\x00" + b"".join(b"h\x00h\x00\x86q\x00" for _ in range(200))


def hostile() -> dict[str, bytes]:
    good = pickle.dumps(np.ones((6, 4), np.float32), protocol=4)
    nested: object = ()
    for _ in range(500):
        nested = (nested,)
    return {
        "os.system": pickle.dumps(Runs((os.system, ("touch pwned",)))),
        "eval": pickle.dumps(Runs((eval, ("open('pwned', 'w')",)))),
        "import by name": b"cposix\nsystem\n(S'touch pwned'\ntR.",
        "a dict": pickle.dumps({"weight": 1}),
        "a list of arrays": pickle.dumps([np.ones(3)]),
        "an object array": pickle.dumps(np.array([object], dtype=object)),
        "integers": pickle.dumps(np.ones((6, 4), np.int64)),
        "big-endian": pickle.dumps(np.ones((6, 4), ">f4")),
        "column order": pickle.dumps(np.asfortranarray(np.ones((6, 4), np.float32))),
        "cut short": good[: len(good) // 2],
        "empty": b"",
        "no pickle": b"GGUF" * 10,
        "bytes that are not there": b"\x80\x04\x8e" + struct.pack("<Q", 2**60) + b".",
        "a string that is not there": b"\x80\x04\x8d" + struct.pack("<Q", 2**60) + b".",
        "deep": pickle.dumps(nested, protocol=4),
        "a name of laughing tuples": b"\x80\x04" + laughing() + b"\x8c\x01a\x93.",
        "a shape of laughing tuples": b"\x80\x04cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\nK\x00K\x00tR(K\x01"
        + laughing()
        + b"cnumpy\ndtype\n(X\x02\x00\x00\x00f4tR\x89NtbN.",
        "endless": b"\x80\x04" + b"N" * 100_000 + b".",
        "memo of nothing": b"\x80\x04h\x05.",
        "pops too much": b"\x80\x04\x87.",
        "shape too small": pickle.dumps(np.ones((6, 4), np.float32), protocol=4).replace(b"K\x06K\x04", b"K\x05K\x04"),
        "other shape": pickle.dumps(np.ones((4, 6), np.float32)),
        "scales that do not fit": pickled(
            QuantizedWeight8bit(np.ones((6, 4), np.int8), np.ones((5, 4), np.float32)), 4
        ),
    }


@pytest.mark.parametrize("name", hostile())
def test_what_is_no_array_is_refused_and_never_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tensor00000_000").write_bytes(hostile()[name])
    piece = families.FAMILIES["grok1"].layouts["jax"](CONFIG)[0]
    with pytest.raises(CheckpointError, match="tensor00000_000"):
        GrokSource(tmp_path, [replace(piece, source="a", source_shape=(6, 4))])
    assert not (tmp_path / "pwned").exists()


def test_missing_files_and_wrong_order_are_named(tmp_path: Path) -> None:
    release(tmp_path)
    first, second = tmp_path / "tensor00000_000", tmp_path / "tensor00001_000"
    swapped = first.read_bytes(), second.read_bytes()
    first.write_bytes(swapped[1])
    second.write_bytes(swapped[0])
    with pytest.raises(CheckpointError, match="tensor00000_000 should be language_model/in_out_embed"):
        open_checkpoint(tmp_path)
    second.unlink()
    with pytest.raises(CheckpointError, match=r"must hold 146 tensor files for this model, got 145"):
        open_checkpoint(tmp_path)


def test_the_fake_class_is_the_real_layout() -> None:
    """The pickles of this test name __main__.QuantizedWeight8bit, as the release's do."""
    raw = pickled(QuantizedWeight8bit(np.ones(1, np.int8), np.ones(1, np.float32)), 4)
    assert b"__main__" in raw
    assert b"QuantizedWeight8bit" in raw
    assert isinstance(sys.modules["__main__"], types.ModuleType)
    assert io.BytesIO(raw).read(1) == b"\x80"
