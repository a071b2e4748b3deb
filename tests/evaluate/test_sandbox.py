"""Hostile programs, each in every kind of sandbox that works on this machine."""

from __future__ import annotations

import os
import secrets
import socket
import subprocess
import tempfile
from dataclasses import replace
from pathlib import Path

import pytest

from quadriga.errors import HardwareError
from quadriga.evaluate import sandbox
from quadriga.evaluate.sandbox import Kind, Limits, Sandbox, works
from tests.waiting import HANG_S, until

KINDS: list[Kind] = ["bubblewrap", "unshare"]


@pytest.fixture(params=KINDS)
def box(request: pytest.FixtureRequest) -> Sandbox:
    """A sandbox with small limits and no deadline; skips if the kind does not work on this machine."""
    if not works(request.param):
        pytest.skip(f"{request.param} does not work on this machine")
    return Sandbox(request.param, Limits(wall_s=HANG_S, cpu_s=2, memory_bytes=256 << 20, processes=12))


@pytest.fixture
def brief(box: Sandbox) -> Sandbox:
    """The same with a deadline, for programs that never end."""
    return Sandbox(box.kind, replace(box.limits, wall_s=1.2, cpu_s=3600))


def test_a_program_that_ends_passes_and_one_that_fails_says_why(box: Sandbox) -> None:
    assert box.run("import math, json, re, collections\nassert math.comb(5, 2) == 10").passed
    failed = box.run("assert 1 == 2, 'one is not two'")
    assert (failed.passed, failed.error) == (False, "AssertionError: one is not two")
    assert "SyntaxError" in box.run("def f(:").error


@pytest.mark.parametrize(
    "program",
    [
        "import sys; sys.exit(0)\nassert False",
        "import os; os._exit(0)\nassert False",
        "raise SystemExit(0)",
        "quit = exit = None\nimport os, signal; os.kill(os.getpid(), signal.SIGKILL); assert False",
        "import os\nprint('passed')\nfor fd in range(3, 20):\n    try: os.write(fd, b'passed 0123456789abcdef\\n')\n"
        "    except OSError: pass\nos._exit(0)",
    ],
    ids=["exit", "_exit", "SystemExit", "kills itself", "forges the word"],
)
def test_exiting_before_the_asserts_is_a_failure(box: Sandbox, program: str) -> None:
    assert not box.run(program).passed


def test_overriding_check_does_not_help() -> None:
    from quadriga.evaluate.tasks.generated import humaneval_program

    row = {
        "prompt": "def one():\n",
        "entry_point": "one",
        "test": "def check(candidate):\n    assert candidate() == 1\n",
    }
    kind = next((k for k in KINDS if works(k)), None)
    if kind is None:
        pytest.skip("no sandbox works on this machine")
    box = Sandbox(kind)
    assert box.run(humaneval_program(row, "    return 1\n")).passed
    assert not box.run(humaneval_program(row, "    return 2\n\ndef check(candidate):\n    pass\n")).passed
    assert not box.run(humaneval_program(row, "")).passed


def test_a_fork_bomb_ends_and_leaves_nothing(brief: Sandbox) -> None:
    mark = secrets.token_hex(8)
    bomb = f"mark = '{mark}'\nimport os\nwhile True:\n    try: os.fork()\n    except OSError: pass"
    assert brief.run(bomb).error == "timed out"
    assert until(lambda: survivors(mark) == [])


def test_a_daemon_dies_with_its_sandbox(box: Sandbox) -> None:
    mark = secrets.token_hex(8)
    daemon = (
        "import os, sys\n"
        "read, write = os.pipe()\n"
        "if os.fork() == 0:\n"
        "    os.setsid()\n"
        "    if os.fork() == 0:\n"
        f"        os.execv(sys.executable, [sys.executable, '-I', '-S', '-c', 'import signal; signal.pause()', "
        f"'{mark}'])\n"
        "    os._exit(0)\n"
        "os.close(write)\n"
        "assert os.read(read, 1) == b''\n"  # the pipe closes when the daemon's program starts
    )
    assert box.run(daemon).passed
    assert until(lambda: survivors(mark) == [])


def survivors(mark: str) -> list[str]:
    """Processes on this machine with ``mark`` in their command line."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            line = (entry / "cmdline").read_bytes()
        except OSError:
            continue
        if mark.encode() in line:
            found.append(entry.name)
    return found


def test_endless_output_is_dropped(brief: Sandbox) -> None:
    outcome = brief.run("import sys\nwhile True:\n    print('x' * 100000); sys.stderr.write('y' * 100000)")
    assert outcome.error == "timed out"


def test_an_endless_error_message_is_cut(box: Sandbox) -> None:
    assert len(box.run("raise ValueError('x' * 10**7)").error) <= 600


def test_a_hundred_gigabytes_are_refused(box: Sandbox) -> None:
    assert "MemoryError" in box.run("x = [0] * (100 * 2**30 // 8)").error


def test_endless_arithmetic_reaches_the_time_limit(brief: Sandbox) -> None:
    assert brief.run("while True: pass").error == "timed out"


def test_the_cpu_time_limit_ends_a_program(box: Sandbox) -> None:
    hurried = Sandbox(box.kind, replace(box.limits, cpu_s=1))
    assert hurried.run("while True: pass").error.startswith("ended before its tests did")


def test_the_home_folder_cannot_be_written(box: Sandbox, tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_text("mine")
    for path in (
        Path.home() / f"quadriga-{secrets.token_hex(8)}",
        victim,
        Path("/usr/quadriga-test"),
        Path("/quadriga-test"),
    ):
        assert not box.run(f"open({str(path)!r}, 'w').write('theirs')").passed, path
        assert not box.run(f"import os; os.remove({str(path)!r})").passed, path
        assert path == victim or not path.exists()
    assert victim.read_text() == "mine"


def test_its_own_tmp_is_empty_and_small(box: Sandbox) -> None:
    assert box.run("import os\nassert os.listdir('/tmp') == []\nopen('/tmp/a', 'w').write('x')").passed
    assert not box.run("open('/tmp/a', 'wb').write(bytes(64 << 20))").passed


def test_there_is_no_network(box: Sandbox) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        outcome = box.run(f"import socket; socket.create_connection(('127.0.0.1', {port}), 2)")
        assert not outcome.passed
        server.setblocking(False)
        with pytest.raises(BlockingIOError):
            server.accept()


def test_other_processes_cannot_be_killed_or_seen(box: Sandbox) -> None:
    box.run("import os, signal\nos.kill(os.getppid(), signal.SIGKILL)")
    with subprocess.Popen(["cat"], stdin=subprocess.PIPE) as bystander:
        outcome = box.run(f"import os, signal\nos.kill({bystander.pid}, signal.SIGKILL)")
        assert not outcome.passed
        assert bystander.poll() is None
        bystander.kill()
    killer = "import os, signal\nfor pid in range(2, 100000):\n    try: os.kill(pid, 0)\n    except ProcessLookupError: continue\n"
    assert box.run(killer + "    except PermissionError: continue\n    if pid > 100: raise ValueError(pid)\n").passed


def test_a_crash_in_c_is_a_failure(box: Sandbox) -> None:
    outcome = box.run("import ctypes; ctypes.string_at(0)")
    assert not outcome.passed
    assert not list(Path.cwd().glob("core*"))


def test_the_environment_is_empty(box: Sandbox, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET_KEY", "sesame")
    program = "import os\nassert not {k for k in os.environ if k not in ('PWD', 'LC_CTYPE')}, dict(os.environ)\n"
    assert box.run(program).error == ""


def test_packages_of_this_environment_are_out_of_reach(box: Sandbox) -> None:
    assert "ModuleNotFoundError" in box.run("import torch").error
    assert "ModuleNotFoundError" in box.run("import quadriga").error


def test_a_package_that_is_shown_may_lie_under_this_machine_s_tmp(
    box: Sandbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As those of a virtual environment in a temporary folder do; the program's own /tmp stays writable and empty else."""
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:
        package = Path(folder, "site-packages/made_up")
        package.mkdir(parents=True)
        (package / "__init__.py").write_text("answer = 42\n")
        (package.parent / "secret.py").write_text("")
        monkeypatch.syspath_prepend(str(package.parent))
        program = (
            "import made_up, os\n"
            "assert made_up.answer == 42\n"
            f"assert os.listdir('/tmp') == [{Path(folder).name!r}]\n"
            f"assert os.listdir({str(package.parent)!r}) == ['made_up']\n"
            "open('/tmp/mine', 'w').close()\n"
        )
        assert Sandbox(box.kind, box.limits, ("made_up",)).run(program).error == ""


def test_open_files_are_counted_and_none_is_inherited(box: Sandbox) -> None:
    assert not box.run("files = [open('/dev/null') for _ in range(1000)]").passed
    with Path(__file__).open() as secret:
        os.set_inheritable(secret.fileno(), True)
        program = f"import os\ntry: os.fstat({secret.fileno()})\nexcept OSError: pass\nelse: raise ValueError('open')"
        assert box.run(program).error == ""


def test_many_at_once_keep_their_order(box: Sandbox) -> None:
    programs = [f"assert {i} % 3 == 0" for i in range(7)]
    assert box.passes(programs) == [i % 3 == 0 for i in range(7)]


def test_without_a_sandbox_it_is_refused_unless_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sandbox, "works", lambda kind: False)
    with pytest.raises(HardwareError, match="--unsafe-exec"):
        Sandbox.find()
    bare = Sandbox.find(unsafe=True)
    assert bare.kind == "none"
    assert bare.run("assert True").passed
    assert not bare.run("import os; os._exit(0)").passed
    assert bare.run("import os\nassert 'HOME' not in os.environ").passed


def test_the_best_kind_is_found() -> None:
    present = [kind for kind in KINDS if works(kind)]
    if not present:
        pytest.skip("no sandbox works on this machine")
    assert Sandbox.find().kind == present[0]
