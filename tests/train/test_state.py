"""State on disk: a fault at any operation leaves the last good checkpoint; damaged state is never loaded."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import pytest
import torch

from quadriga import runtime
from quadriga.errors import CheckpointError, TrainingError
from quadriga.train import config as sections
from quadriga.train import run_directory
from quadriga.train.run_directory import MANIFEST, Manifest, RunDirectory, newest, read_manifest
from quadriga.train.shards import Portion, ShardReader, encode, local_parts, parse_name
from quadriga.train.storage import Files
from quadriga.train.world import World
from tests.train.runs import Record, Settings, bits, trainer

ROOT = Path(__file__).parent.parent.parent


class Failing(Files):
    """Files whose i-th operation fails, and in a crash all later ones too."""

    def __init__(self, fail_at: int | None, code: int = errno.ENOSPC, *, crash: bool = False) -> None:
        self.fail_at, self.code, self.crash, self.count = fail_at, code, crash, 0
        self.log: list[str] = []

    def about_to(self, operation: str, path: Path) -> None:
        self.count += 1
        self.log.append(f"{operation} {path.name}")
        if self.fail_at is not None and (self.count == self.fail_at or (self.crash and self.count > self.fail_at)):
            raise Crash if self.crash else OSError(self.code, os.strerror(self.code), str(path))


class Crash(BaseException):
    """Raised by ``Files`` to simulate a crash."""


SYNCHRONOUS = Settings(
    n_steps=3, checkpoint=sections.CheckpointSection(every=1, keep=1, asynchronous=False, on_error="continue")
)


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The state after three undisturbed steps."""
    run = trainer(tmp_path_factory.mktemp("calm"), SYNCHRONOUS)
    run.train()
    return bits(run)


@pytest.fixture(scope="module")
def operations(tmp_path_factory: pytest.TempPathFactory) -> int:
    """Number of disk operations of three saves."""
    files = Failing(None)
    trainer(tmp_path_factory.mktemp("counted"), SYNCHRONOUS, files=files).train()
    kinds = {line.split()[0] for line in files.log}
    assert kinds == {"create", "write", "fsync", "rename", "mkdir", "remove"}
    assert len(files.log) > 25
    return len(files.log)


def _whole_or_nothing(folder: Path) -> int:
    """Check that every checkpoint with a final name is complete; returns the newest step (0: none)."""
    run = RunDirectory(folder)
    for step in run.steps():
        read_manifest(run.at(step))
    found = newest(run)
    return 0 if found is None else found[1].step


def test_a_crash_at_any_operation_keeps_complete_checkpoints(
    tmp_path: Path, expected: dict[str, bytes], operations: int
) -> None:
    """For every i: the process stops at the i-th operation, another one resumes, and the result is the same bit for bit."""
    for i in range(1, operations + 1):
        folder = tmp_path / str(i)
        run = trainer(folder, SYNCHRONOUS, files=Failing(i, crash=True))
        with pytest.raises(Crash):
            run.train()
        newest_step = _whole_or_nothing(folder)
        assert newest_step >= run.step - 1
        RunDirectory(folder).clean()
        again = trainer(folder, SYNCHRONOUS)
        assert again.resume() == bool(newest_step)
        assert again.step == newest_step
        again.train()
        assert bits(again) == expected
        assert RunDirectory(folder).steps()[-1] == 3


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO, errno.EROFS])
def test_after_a_failed_operation_training_continues_from_the_last_good_checkpoint(
    tmp_path: Path, expected: dict[str, bytes], operations: int, code: int
) -> None:
    """For every third operation: the run continues with a warning and ends with the same state."""
    for i in range(1 + code % 3, operations + 1, 3):  # the three codes share the operations
        folder, record = tmp_path / str(i), Record()
        files = Failing(i, code)
        run = trainer(folder, SYNCHRONOUS, files=files, record=record)
        try:
            run.train()
        except TrainingError as error:
            assert "final state could not be saved" in str(error)  # only if the very last save failed
            assert run.step == 3
        else:
            assert _whole_or_nothing(folder) == 3
            assert any("last good one is kept" in e or "saving again" in e for e in record.events)
        assert bits(run) == expected
        assert _whole_or_nothing(folder) >= 2


class Full(Files):
    """A disk that is full as long as there are more than two checkpoints, the one that is written among them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def about_to(self, operation: str, path: Path) -> None:
        if operation == "write" and len(list(self.folder.glob("checkpoints/*"))) > 2:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))


@pytest.mark.parametrize("asynchronous", [True, False])
def test_a_full_disk_is_pruned_and_the_save_repeated_and_said(tmp_path: Path, asynchronous: bool) -> None:
    section = sections.CheckpointSection(every=1, keep=3, asynchronous=asynchronous)
    record = Record()
    run = trainer(tmp_path, Settings(n_steps=5, checkpoint=section), files=Full(tmp_path), record=record)
    assert run.train()
    said = [event for event in record.events if "the disk is full" in event]
    assert [line.partition("removed")[2] for line in said] == [
        f" the checkpoints of steps {step}, and saving again" for step in (1, 2, 3)
    ]
    assert _whole_or_nothing(tmp_path) == 5 and RunDirectory(tmp_path).steps() == [4, 5]
    assert not any("could not be saved" in event for event in record.events)


def test_a_failed_save_is_said_at_once_and_not_at_the_next_one(tmp_path: Path) -> None:
    section = sections.CheckpointSection(every=4, asynchronous=False)
    record = Record()
    run = trainer(tmp_path, Settings(n_steps=8, checkpoint=section), files=Failing(3, errno.EIO), record=record)
    run.train(lambda: bool(record.events))
    assert run.step == 6, "said after the step that follows, long before step 8"
    assert RunDirectory(tmp_path).steps() == [6]


def test_on_error_stop_ends_the_run(tmp_path: Path) -> None:
    section = sections.CheckpointSection(every=1, asynchronous=False, on_error="stop")
    run = trainer(tmp_path, Settings(checkpoint=section), files=Failing(3))
    with pytest.raises(TrainingError, match="could not be saved: OSError"):
        run.train()


def test_a_full_disk_is_reported(tmp_path: Path) -> None:
    """On a mounted 1 MB file system, if mounting is allowed: the error comes from the kernel."""
    place = tmp_path / "small"
    place.mkdir()
    if os.geteuid() != 0 or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(place)]).returncode:
        pytest.skip("mounting a file system needs root")
    try:
        record = Record()
        with pytest.raises(TrainingError, match="No space left"):
            trainer(place, SYNCHRONOUS, record=record).train()
        assert any("No space left" in event for event in record.events)
        assert not list(place.rglob("*.tmp"))
    finally:
        subprocess.run(["umount", str(place)], check=True)


# Damage --------------------------------------------------------------------------------------------------------------


@pytest.fixture
def saved(tmp_path: Path) -> RunDirectory:
    trainer(tmp_path, Settings(n_steps=3, checkpoint=sections.CheckpointSection(every=1, keep=2))).train()
    return RunDirectory(tmp_path)


def test_a_damaged_checkpoint_is_skipped_with_a_warning(saved: RunDirectory) -> None:
    file = saved.at(3) / "rank-00000.safetensors"
    raw = bytearray(file.read_bytes())
    raw[len(raw) // 2] ^= 1
    file.write_bytes(raw)
    record = Record()
    run = trainer(saved.path, SYNCHRONOUS, record=record)
    assert run.resume()
    assert run.step == 2
    assert any("was changed: its sha256" in event for event in record.events)
    late = Record()
    again = trainer(saved.path, SYNCHRONOUS)
    assert again.resume()
    again.listen([late])
    assert late.events == record.events, "whoever listens after the resume hears of it too"


@pytest.mark.parametrize("share", [0, 0.3, 0.999])
def test_a_file_cut_short_is_refused(saved: RunDirectory, share: float) -> None:
    file = saved.at(3) / "rank-00000.safetensors"
    file.write_bytes(file.read_bytes()[: int(share * file.stat().st_size)])
    with pytest.raises(CheckpointError, match="missing or cut short"):
        read_manifest(saved.at(3))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda table: table.pop("files"), "is not the manifest of a training checkpoint"),
        (lambda table: table.update(version=2), "version 2"),
        (lambda table: table.update(files={"../x": [1, "0"]}), "missing or cut short"),
        (lambda table: table.update(extra=1), "is not the manifest of a training checkpoint"),
    ],
)
def test_strange_manifests_are_refused(saved: RunDirectory, change: object, message: str) -> None:
    place = saved.at(3) / MANIFEST
    table = json.loads(place.read_text())
    change(table)  # type: ignore[operator]
    place.write_text(json.dumps(table))
    with pytest.raises(CheckpointError, match=message):
        read_manifest(saved.at(3))


def test_all_damaged_is_an_error_not_a_fresh_start(saved: RunDirectory) -> None:
    for step in saved.steps():
        (saved.at(step) / "rank-00000.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError, match="no checkpoint of this run is intact"):
        trainer(saved.path, SYNCHRONOUS).resume()


class Ranks(World):
    """One of several ranks that share a folder; what the others say is computed by them before."""

    def gather(self, values: torch.Tensor) -> list[torch.Tensor]:
        self.__dict__.setdefault("said", []).append(values.clone())
        return [values]


def test_each_file_is_verified_by_one_rank(saved: RunDirectory, monkeypatch: pytest.MonkeyPatch) -> None:
    place, table = saved.at(3), json.loads((saved.at(3) / MANIFEST).read_text())
    raw = (place / "rank-00000.safetensors").read_bytes()
    for rank in range(1, 5):
        (place / f"rank-{rank:05d}.safetensors").write_bytes(raw)
        table["files"][f"rank-{rank:05d}.safetensors"] = table["files"]["rank-00000.safetensors"]
    (place / MANIFEST).write_text(json.dumps(table))
    (place / "rank-00004.safetensors").write_bytes(raw[:-1] + b"!")
    read: dict[int, list[str]] = {}
    digest = run_directory.file_digest
    for rank in range(2):
        monkeypatch.setattr(
            run_directory,
            "file_digest",
            lambda path, rank=rank: (read.setdefault(rank, []).append(path.name), digest(path))[1],
        )
        world = Ranks(rank, 2, torch.device("cpu"))
        if rank:
            read_manifest(place, world)
        else:
            with pytest.raises(CheckpointError, match=r"rank-00004\.safetensors was changed"):
                read_manifest(place, world)
    assert read == {
        0: [f"rank-0000{i}.safetensors" for i in (0, 2, 4)],
        1: [f"rank-0000{i}.safetensors" for i in (1, 3)],
    }


def test_only_the_newest_checkpoints_are_kept(tmp_path: Path) -> None:
    section = sections.CheckpointSection(every=1, keep=2, keep_every=3)
    trainer(tmp_path, Settings(n_steps=8, checkpoint=section)).train()
    assert RunDirectory(tmp_path).steps() == [3, 6, 7, 8]


def _checkpoint(run: RunDirectory, step: int, text: bytes) -> None:
    run.part(step).mkdir(parents=True)
    size, digest = run.files.write(run.part(step) / "rank-00000.safetensors", [text])
    run.finish(Manifest(step=step, files={"rank-00000.safetensors": (size, digest)}, state={}))


def test_a_checkpoint_of_the_same_step_takes_the_place_of_the_older_one(tmp_path: Path) -> None:
    """After a rollback a step is saved a second time; its folder is not empty then."""
    run = RunDirectory(tmp_path)
    for text in (b"before the rollback", b"after it"):
        _checkpoint(run, 7, text)
        read_manifest(run.at(7))
    assert (run.at(7) / "rank-00000.safetensors").read_bytes() == b"after it"
    assert [path.name for path in run.checkpoints.iterdir()] == ["step-00000007"]


def test_a_checkpoint_loses_its_manifest_before_its_tensors(tmp_path: Path) -> None:
    """One whose removal is interrupted does not look complete, and the next start removes what is left of it."""
    run = RunDirectory(tmp_path, Failing(None))
    for step in (3, 5):
        _checkpoint(run, step, b"tensors")
    files = Failing(None)
    RunDirectory(tmp_path, files).remove(run.at(3))
    assert files.log[0] == "remove manifest.json" and run.steps() == [5]
    (run.at(5) / MANIFEST).unlink()
    _checkpoint(run, 6, b"tensors")
    run.part(8).mkdir()
    run.clean()
    assert [path.name for path in run.checkpoints.iterdir()] == ["step-00000006"]


def test_a_run_is_locked_by_one_process(tmp_path: Path) -> None:
    with RunDirectory(tmp_path).locked():
        script = (
            "import sys, pathlib; from quadriga.train.run_directory import RunDirectory\n"
            "with RunDirectory(pathlib.Path(sys.argv[1])).locked(): pass"
        )
        done = subprocess.run([sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True)
    assert done.returncode != 0
    assert f"in use by process {os.getpid()}" in done.stderr
    with RunDirectory(tmp_path).locked():
        pass


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(TrainingError, match="cannot write to the run's folder"),
        RunDirectory(tmp_path / "file").locked(),
    ):
        pass


# Shards --------------------------------------------------------------------------------------------------------------


def _write(path: Path, parts: dict[str, torch.Tensor]) -> Path:
    def raw() -> Iterable[bytes | memoryview]:
        yield from encode(parts)

    Files().write(path, raw())
    return path


def test_portions_are_stored_as_boxes_of_the_whole(tmp_path: Path) -> None:
    """Three ranks' heads of a packed projection of 6 + 3 + 3 rows; a fourth reads other heads of it."""
    whole = torch.arange(12.0 * 5).view(12, 5)
    files = []
    for rank in range(3):
        portion = Portion(0, ((2 * rank, 2 * rank + 2), (6 + rank, 7 + rank), (9 + rank, 10 + rank)), 12)
        mine = portion.take(whole)
        assert mine.tolist() == whole[[2 * rank, 2 * rank + 1, 6 + rank, 9 + rank]].tolist()
        parts = local_parts({"wqkv": mine}, 0, {"wqkv": portion})
        assert next(iter(parts)) == f"wqkv@{2 * rank}:{2 * rank + 2},0:5"
        files.append(tmp_path / f"rank-{rank}.safetensors")
        files[-1].write_bytes(b"".join(encode(parts)))
    reader = ShardReader(files)
    assert torch.equal(reader.whole("wqkv"), whole)
    other = Portion(0, ((1, 3), (7, 9)), 12)
    target = torch.zeros(4, 5)
    reader.fill("wqkv", target, other)
    assert torch.equal(target, whole[[1, 2, 7, 8]])
    columns, across = Portion(1, ((3, 5), (0, 1)), 5), torch.zeros(12, 3)
    reader.fill("wqkv", across, columns)
    assert torch.equal(across, whole[:, [3, 4, 0]])
    with pytest.raises(CheckpointError, match=r"\[12, 5\] in the checkpoint and \[13, 5\] in this run"):
        reader.fill("wqkv", torch.zeros(4, 5), Portion(0, ((1, 3), (7, 9)), 13))


def test_tensors_are_assembled_from_any_boxes(tmp_path: Path) -> None:
    whole = torch.arange(5 * 7.0).view(5, 7)
    a = _write(tmp_path / "a.safetensors", {"x@0:3,0:7": whole[:3].contiguous(), "step@": torch.tensor(3.0)})
    b = _write(tmp_path / "b.safetensors", {"x@3:5,0:4": whole[3:, :4].contiguous()})
    c = _write(tmp_path / "c.safetensors", {"x@3:5,4:7": whole[3:, 4:].contiguous()})
    reader = ShardReader([c, a, b])
    assert torch.equal(reader.whole("x"), whole)
    assert reader.whole("step").item() == 3.0
    with pytest.raises(CheckpointError, match="incomplete in the checkpoint: 30 of 35"):
        ShardReader([a, b, _write(tmp_path / "d.safetensors", {"x@4:5,6:7": whole[4:, 6:].contiguous()})]).whole("x")
    with pytest.raises(CheckpointError, match=r"is \[5, 7\] in the checkpoint and \[5, 8\] in this run"):
        reader.fill("x", torch.empty(5, 8))


@pytest.mark.parametrize("name", ["x", "x@a:b", "x@3:3", "x@-1:2", "x@1", "x@1:2:3"])
def test_malformed_part_names_are_refused(name: str) -> None:
    with pytest.raises(CheckpointError, match="not a part of a training checkpoint"):
        parse_name(name)


def test_a_file_of_garbage_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.safetensors").write_bytes(b"\x80\x02}q\x00." * 40)
    with pytest.raises(CheckpointError, match=r"a\.safetensors"):
        ShardReader([tmp_path / "a.safetensors"])


# Kills ---------------------------------------------------------------------------------------------------------------

CHILD = """
import sys, pathlib, torch
sys.path.insert(0, sys.argv[2])
torch.set_num_threads(1)
from tests.train import runs
from quadriga.train import config as sections
section = sections.CheckpointSection(every=1, keep=2)
settings = runs.Settings(n_steps=int(sys.argv[3]), checkpoint=section)
run = runs.trainer(pathlib.Path(sys.argv[1]), settings)
run.run.clean()
run.resume()
def point(event, arguments):
    if event in ("open", "os.rename", "os.remove", "os.mkdir", "os.scandir", "quadriga.step"):
        sys.stdout.write(".")
        sys.stdout.flush()
sys.addaudithook(point)
run.train(lambda: bool(sys.audit("quadriga.step")))
"""


def _kill_and_resume(folder: Path, n_steps: int, n_kills: int) -> None:
    """SIGKILL the run at moments spread over its work, saves included, until it has been killed ``n_kills`` times.

    It writes a dot at every step and every file that it opens, renames or removes; a kill follows one of the dots.
    """
    generator = torch.Generator().manual_seed(n_kills)
    kills = 0
    environment = {**runtime.child_environment(), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", CHILD, str(folder), str(ROOT), str(n_steps)]
    while True:
        child = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, cwd=ROOT)
        assert child.stdout is not None
        if kills < n_kills:
            n_dots = int(torch.randint(1, 120, (), generator=generator))
            assert child.stdout.read(n_dots) == b"." * n_dots, "the run is longer than that"
            child.send_signal(signal.SIGKILL)
        child.stdout.read()
        code = child.wait()
        _whole_or_nothing(folder)
        if code == 0:
            return
        assert code == -signal.SIGKILL
        kills += 1


@pytest.mark.parametrize(
    ("n_steps", "n_kills"), [(60, 2), pytest.param(400, 24, marks=pytest.mark.slow)], ids=["2 kills", "24 kills"]
)
def test_killed_at_random_moments_it_ends_with_the_same_bits(tmp_path: Path, n_steps: int, n_kills: int) -> None:
    (tmp_path / "killed" / "checkpoints").mkdir(parents=True)
    _kill_and_resume(tmp_path / "killed", n_steps, n_kills)
    section = sections.CheckpointSection(every=1000)
    settings = Settings(n_steps=n_steps, checkpoint=section)
    calm = trainer(tmp_path / "calm", settings)
    calm.train()
    killed = trainer(tmp_path / "killed", settings)
    assert killed.resume()
    assert killed.step == n_steps
    assert bits(killed) == bits(calm)
