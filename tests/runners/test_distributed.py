"""Ranks that are processes, on gloo: the same numbers as one process, the commands, and every way to end."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

import quadriga
from quadriga import runtime
from quadriga.cli import app
from quadriga.errors import ConfigError, HardwareError
from quadriga.model.rank_mesh import RankMesh
from quadriga.runners import make
from tests.checkpoint.models import TINY, write_hf
from tests.runners import rank_worker
from tests.runners.test_ranks import parameters_of
from tests.text import vocabularies
from tests.torchrun import environment, torchrun
from tests.waiting import HANG_S

ROOT = Path(__file__).parent.parent.parent
pytestmark = pytest.mark.dist


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny DBRX with a vocabulary."""
    path = tmp_path_factory.mktemp("distributed") / "dbrx"
    config = TINY["dbrx"].with_n_layers(4)
    config = type(config)(**{**vars(config), "vocab_size": 400, "eos_ids": ()})
    write_hf(path, config, parameters=parameters_of(config))
    (path / "tokenizer.json").write_text(json.dumps(vocabularies.bpe()))
    return path


@contextmanager
def started(folder: Path, mesh: str, way: str) -> Iterator[list[subprocess.Popen[str]]]:
    """The ranks of a mesh as processes of ours; what is left of them is killed."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    n = RankMesh.parse(mesh).size
    ranks = []
    for rank in range(n):
        place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "RANK": str(rank), "LOCAL_RANK": str(rank)}
        ranks.append(
            subprocess.Popen(
                [sys.executable, "-m", "tests.runners.rank_worker", str(folder), mesh, way],
                cwd=ROOT,
                env={**environment(), **place, "WORLD_SIZE": str(n), "LOCAL_WORLD_SIZE": str(n)},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
        )
    try:
        yield ranks
    finally:
        for process in ranks:
            process.kill()
            process.communicate()


@pytest.mark.parametrize("mesh", ["tp=2", "ep=2,pp=2"])
def test_processes_compute_what_one_does(mesh: str, folder: Path, tmp_path: Path) -> None:
    with started(folder, mesh, str(tmp_path / "out.npz")) as ranks:
        for process in ranks:
            said = process.communicate(timeout=2 * HANG_S)
            assert process.returncode == 0, said[1][-3000:]
            assert "error" not in said[1], said[1]
    got = np.load(tmp_path / "out.npz")
    model = quadriga.load(folder, format="float32", kv_format="float32", threads=1)
    expected = model.logits(rank_worker.PROMPTS[1])
    assert np.abs(got["logits"] - expected).max() < 1e-5 * np.abs(expected).max()
    params = quadriga.SamplingParams(max_new_tokens=12, ignore_eos=True)
    for i in (0, 2):
        assert got["tokens"][i].tolist() == model.generate(rank_worker.PROMPTS[i], params).token_ids
    assert np.array_equal(got["logprobs"], got["alone"])  # to the bit
    assert got["load"].shape == (4, 5) and len(set(got["load"].sum(1))) == 1


def test_the_commands_run_on_ranks(folder: Path) -> None:
    words = ["quadriga", "generate", "--model", str(folder), "--max-tokens", "9", "--json", "--temperature", "0"]
    words += ["--format", "float32", "--kv-format", "float32", "--threads", "1"]
    one = CliRunner().invoke(app, [*words[1:], "The fox"])
    done = torchrun(2, *words, "--parallel", "tp=2", stdin="The fox")  # rank 0 alone reads it
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads(done.stdout)["text"] == json.loads(one.stdout)["text"]
    words = ["quadriga", "bench", "decode", str(folder), "--count", "4", "--rounds", "1", "--parallel", "ep=2"]
    speed = torchrun(2, *words)
    assert speed.returncode == 0 and speed.stdout.startswith("decode 4: "), speed.stderr[-3000:]


def test_ranks_end_in_order(folder: Path) -> None:
    with started(folder, "tp=2", "idle") as ranks:
        assert ranks[0].stdout is not None and ranks[0].stdout.readline() == "ready\n"
        ended = [process.communicate("", timeout=HANG_S) for process in ranks]
        assert [process.returncode for process in ranks] == [0, 0]
        assert not any("Traceback" in error or "error:" in error for _, error in ended), ended


@pytest.mark.parametrize(("victim", "way"), [(0, "idle"), (2, "idle"), (1, "busy")])
def test_a_killed_rank_ends_all_others(victim: int, way: str, folder: Path) -> None:
    with started(folder, "pp=3", way) as ranks:
        for _ in range(1 if way == "idle" else 5):
            assert ranks[0].stdout is not None and ranks[0].stdout.readline() in ("ready\n", "token\n")
        os.kill(ranks[victim].pid, signal.SIGKILL)
        for rank, process in enumerate(ranks):
            if rank == victim:
                continue
            assert process.stderr is not None
            said = process.stderr.read()  # until it ends
            assert process.wait(HANG_S) == 1, said
            assert f"rank {rank} of 3: rank {victim} is gone" in said, said


def test_what_all_ranks_refuse_ends_all_of_them_with_that(folder: Path) -> None:
    with started(folder, "tp=3", "idle") as ranks:
        for process in ranks:
            said = process.communicate(timeout=HANG_S)[1]
            assert process.returncode == 2 and "tp x ep must be at most 2" in said, (process.returncode, said)


# Without other processes ---------------------------------------------------------------------------------------------


def test_ranks_that_nobody_has_started_are_missed(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match=r"this process is by itself.*torchrun --nproc-per-node 2"):
        make.join(RankMesh(tp=2))
    for name, value in {"LOCAL_RANK": "0", "RANK": "0", "WORLD_SIZE": "3", "MASTER_ADDR": "x"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match="for 2 ranks, and torchrun has started 3"):
        make.join(RankMesh(tp=2))


def test_without_torch_one_line_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"LOCAL_RANK": "0", "RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "x"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setitem(sys.modules, "torch", None)
    monkeypatch.delitem(sys.modules, "quadriga.runners.distributed", raising=False)
    with pytest.raises(HardwareError, match="sharing a model among ranks needs torch"):
        make.join(RankMesh(tp=2))


def test_threads_are_shared_among_the_ranks_of_a_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runtime, "cpu_count", lambda: 7)
    assert runtime.threads_of_rank() == 7
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")
    assert runtime.threads_of_rank() == 2
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "9")
    assert runtime.threads_of_rank() == 1
