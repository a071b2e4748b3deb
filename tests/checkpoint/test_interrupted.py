"""A conversion that was interrupted: what its journal vouches for, and when the work of before may be used."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from quadriga.errors import CheckpointError
from quadriga.io import conversion_writer, directory
from quadriga.io.convert import convert
from tests.checkpoint.models import TINY, random_bits, write_hf


class PowerCut(Exception):
    """The machine stops here."""


def interrupted(folder: Path, monkeypatch: pytest.MonkeyPatch, *, after_syncs: int = 3, **options: Any) -> Path:
    """The journal of a conversion of ``folder``/hf that stopped after some rounds of syncing."""
    append, rounds = conversion_writer.Writer._append, 0

    def stops(self: Any, lines: list[dict[str, str]]) -> None:
        nonlocal rounds
        rounds += 1
        if rounds > after_syncs:
            raise PowerCut
        append(self, lines)

    with monkeypatch.context() as patch:
        patch.setattr(conversion_writer, "_SYNC_BYTES", 20_000)
        patch.setattr(conversion_writer.Writer, "_append", stops)
        with pytest.raises(PowerCut):
            convert(folder / "hf", folder / "out", **options)
    return folder / "out.part/journal.jsonl"


def test_a_line_the_crash_tore_is_not_believed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_hf(tmp_path / "hf", TINY["llama2"])
    convert(tmp_path / "hf", tmp_path / "whole")
    journal = interrupted(tmp_path, monkeypatch)
    lines = journal.read_text().splitlines(keepends=True)
    assert len(lines) > 3
    torn = json.loads(lines[-1])["tensor"]
    journal.write_text("".join(lines[:-1]) + lines[-1][:-20])
    written: list[str] = []
    convert(tmp_path / "hf", tmp_path / "out", progress=lambda done, total, name: written.append(name))
    assert torn in written, "the tensor of the torn line is made again"
    assert not {json.loads(line)["tensor"] for line in lines[1:-1]} & set(written), "the others are not"
    for file in ("quadriga.json", "weights.safetensors"):
        assert (tmp_path / "out" / file).read_bytes() == (tmp_path / "whole" / file).read_bytes()


def test_the_journal_names_a_tensor_only_after_its_data_is_on_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between two entries of the journal the weights' file is synced."""
    write_hf(tmp_path / "hf", TINY["llama2"])
    monkeypatch.setattr(conversion_writer, "_SYNC_BYTES", 20_000)
    written: set[int] = set()
    unsynced: set[int] = set()  # files of weights with a write that no sync followed yet
    promises, synced = 0, 0
    real_pwrite, real_fsync, append = os.pwrite, os.fsync, conversion_writer.Writer._append

    def pwrite(fd: int, raw: Any, offset: int) -> int:
        unsynced.add(fd)
        written.add(fd)
        return real_pwrite(fd, raw, offset)

    def fsync(fd: int) -> None:
        nonlocal synced
        real_fsync(fd)
        synced += fd in written
        unsynced.discard(fd)

    def checked(self: Any, lines: list[dict[str, str]]) -> None:
        nonlocal promises, synced
        if "tensor" in lines[0]:
            assert synced, f"no file of weights was synced before the journal named {lines[0]['tensor']}"
            promises, synced = promises + 1, 0
        append(self, lines)

    monkeypatch.setattr(os, "pwrite", pwrite)
    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(conversion_writer.Writer, "_append", checked)
    convert(tmp_path / "hf", tmp_path / "out")
    assert promises > 2
    assert not unsynced, "everything under the final name has been synced"


def test_another_source_of_the_same_names_and_shapes_is_not_continued(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_hf(tmp_path / "hf", TINY["llama2"])
    interrupted(tmp_path, monkeypatch)
    write_hf(tmp_path / "hf", TINY["llama2"], parameters=random_bits(TINY["llama2"], seed=5))
    times = (tmp_path / "hf/model.safetensors").stat()
    os.utime(tmp_path / "hf/model.safetensors", ns=(times.st_atime_ns, times.st_mtime_ns + 1_000_000))
    with pytest.raises(CheckpointError, match="--restart"):
        convert(tmp_path / "hf", tmp_path / "out")


def test_other_options_are_not_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """float16 and bfloat16 need the same room: only the plan's headers tell them apart."""
    write_hf(tmp_path / "hf", TINY["llama2"], parameters={n: t * 0 + 1 for n, t in random_bits(TINY["llama2"]).items()})
    interrupted(tmp_path, monkeypatch, dtype="float16")
    with pytest.raises(CheckpointError, match="--restart"):
        convert(tmp_path / "hf", tmp_path / "out", dtype="bfloat16")
    convert(tmp_path / "hf", tmp_path / "out", dtype="bfloat16", resume=False)
    assert directory.verify(tmp_path / "out") == []
