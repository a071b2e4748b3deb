"""Split GGUF files: read as one, and refused when the parts do not belong together."""

from __future__ import annotations

from collections.abc import Callable
from math import prod
from pathlib import Path

import pytest

from quadriga.errors import CheckpointError
from quadriga.io.convert import convert
from quadriga.io.gguf import Typed, plan_gguf
from quadriga.io.gguf_source import GGUFSource
from quadriga.io.open import open_checkpoint
from quadriga.nn.load import load_parameters
from tests.checkpoint.models import TINY, bits, random_bits, write_hf


def split(
    whole: Path,
    folder: Path,
    count: int = 3,
    said: Callable[[int], tuple[int, int]] | None = None,
    empty_first: bool = False,
) -> list[Path]:
    """Split a GGUF file as llama.cpp's llama-gguf-split does: all metadata in the first part, tensors shared out.

    With ``empty_first`` the first part holds no tensor (its option --no-tensor-first-split).
    """
    source = GGUFSource(whole)
    names = list(source.header.tensors)
    paths = []
    for number in range(count):
        mine = names[number::count]
        if empty_first:
            mine = names[number - 1 :: count - 1] if number else []
        file = f"model-{number + 1:05d}-of-{count:05d}.gguf"
        no, of = said(number) if said else (number, count)
        metadata = source.header.typed() if number == 0 else {}
        metadata |= {"split.no": Typed("uint16", no), "split.count": Typed("uint16", of)}
        metadata |= {"split.tensors.count": Typed("int32", len(names))}
        plan = plan_gguf(file, metadata, {n: (source.tensors[n].shape, source.tensors[n].dtype) for n in mine})
        content = bytearray(plan.headers[file]) + bytes(plan.sizes[file] - len(plan.headers[file]))
        for name in mine:
            raw = source.raw(name, 0, prod(source.tensors[name].shape[:-1])).tobytes()
            at = plan.places[name][1]
            content[at : at + len(raw)] = raw
        (folder / file).write_bytes(content)
        paths.append(folder / file)
    return paths


@pytest.fixture
def whole(tmp_path: Path) -> Path:
    values = {n: t.float().nan_to_num(0, 1, -1) for n, t in random_bits(TINY["dbrx"]).items()}
    write_hf(tmp_path / "hf", TINY["dbrx"], parameters=values)
    convert(tmp_path / "hf", tmp_path / "whole.gguf", to="gguf", gguf_format="float32")
    (tmp_path / "parts").mkdir()
    return tmp_path / "whole.gguf"


@pytest.mark.parametrize("empty_first", [False, True])
def test_parts_are_one_model(whole: Path, empty_first: bool) -> None:
    paths = split(whole, whole.parent / "parts", empty_first=empty_first)
    expected = load_parameters(open_checkpoint(whole))
    for path in (paths[0], paths[2], whole.parent / "parts"):
        loaded = load_parameters(open_checkpoint(path))
        assert all(bits(loaded[name]) == bits(value) for name, value in expected.items())


def test_a_folder_with_more_than_the_model(whole: Path) -> None:
    """As other programs keep models: a projector of pictures and an importance matrix beside the parts."""
    folder = whole.parent / "parts"
    split(whole, folder)
    for name in ("mmproj-F16.gguf", "imatrix_unsloth.gguf"):
        (folder / name).write_bytes(b"no model")
    assert open_checkpoint(folder).config == open_checkpoint(whole).config
    whole.rename(folder / "model-Q8_0.gguf")
    with pytest.raises(CheckpointError, match=r"has 2 models. Give one: model-00001-of-00003.gguf, model-Q8_0.gguf"):
        open_checkpoint(folder)


@pytest.mark.parametrize("fault", ["missing", "renamed", "mixed up", "twice", "incomplete"])
def test_parts_that_do_not_belong_together(whole: Path, fault: str) -> None:
    folder = whole.parent / "parts"
    paths = split(whole, folder, said=(lambda n: (0, 3)) if fault == "mixed up" else None)
    first, says = paths[0], ""
    match fault:
        case "missing":
            paths[1].unlink()
            says = "model-00002-of-00003.gguf"
        case "renamed":
            first = first.rename(folder / "part-one.gguf")
            says = "must be called NAME-00001-of-00003.gguf"
        case "mixed up":
            says = "the parts are mixed up"
        case "twice":
            other = split(whole, whole.parent, count=3)
            raw = (
                other[0].read_bytes().replace(b"split.no\x02\x00\x00\x00\x00\x00", b"split.no\x02\x00\x00\x00\x01\x00")
            )
            paths[1].write_bytes(raw)
            says = "again; are the parts of one model"
        case "incomplete":
            raw = first.read_bytes()
            at = raw.index(b"split.tensors.count") + len("split.tensors.count") + 4
            first.write_bytes(raw[:at] + (99).to_bytes(4, "little") + raw[at + 4 :])
            says = "must hold 99 tensors"
    with pytest.raises(CheckpointError, match=says):
        open_checkpoint(first)
