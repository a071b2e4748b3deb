"""A golden model as a GGUF file twice: by the gguf package, as llama.cpp's converter makes it ("theirs"), and by ours."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from quadriga import load
from quadriga.io.convert import convert
from quadriga.io.gguf_source import GGUFSource
from tests.golden.checkpoints import config_json, oracle, weights
from tests.golden.weights import TOKENS


def write_tensors(writer: Any, tensors: Mapping[str, Any]) -> None:
    """The end of a gguf.GGUFWriter whose keys are all said."""
    for tensor, values in tensors.items():
        writer.add_tensor(tensor, np.ascontiguousarray(values))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def assert_computes(path: Path, name: str, bound: float) -> None:
    """The kernels' logits in float32 beside the golden ones, as a part of their range."""
    logits = load(path, format="float32", kv_format="float32", threads=1).logits(TOKENS)
    wanted = oracle(name).numpy()
    assert np.abs(logits - wanted).max() / np.ptp(wanted) <= bound


def write_twins(folder: Path, name: str, write: Callable[[Path, str], None]) -> GGUFSource:
    """Theirs, opened, as theirs.gguf; ours as ours.gguf from a Hugging Face directory, again.gguf from theirs."""
    (folder / "hf").mkdir()
    (folder / "hf/config.json").write_text(json.dumps(config_json(name)))
    save_file(weights(name), folder / "hf/model.safetensors")
    write(folder / "theirs.gguf", name)
    convert(folder / "hf", folder / "ours.gguf", to="gguf", gguf_format="float32")
    convert(folder / "theirs.gguf", folder / "again.gguf", to="gguf", gguf_format="float32")
    return GGUFSource(folder / "theirs.gguf")


def assert_same_tensors(ours: GGUFSource, theirs: GGUFSource, *, nearly: str | None = None) -> None:
    """To the bit; those whose names end in ``nearly`` to an ulp of float32."""
    assert ours.shapes == theirs.shapes
    for tensor in ours.tensors:
        if nearly is None or not tensor.endswith(nearly):
            np.testing.assert_array_equal(ours.read(tensor), theirs.read(tensor), err_msg=tensor)
        np.testing.assert_allclose(ours.read(tensor), theirs.read(tensor), rtol=2e-7)
