"""What a program finds behind the sandbox's walls: no files, no new name spaces, no more memory in sum, no word."""

from __future__ import annotations

from pathlib import Path

import pytest

from quadriga.evaluate.sandbox import Kind, Limits, Sandbox, works
from quadriga.evaluate.sandbox_groups import Groups
from tests.waiting import HANG_S

KINDS: list[Kind] = ["bubblewrap", "unshare"]


@pytest.fixture(params=KINDS)
def box(request: pytest.FixtureRequest) -> Sandbox:
    """A sandbox with small limits and no deadline; skips if the kind does not work on this machine."""
    if not works(request.param):
        pytest.skip(f"{request.param} does not work on this machine")
    return Sandbox(request.param, Limits(wall_s=HANG_S, cpu_s=20, memory_bytes=256 << 20, processes=12))


def test_the_machine_s_files_cannot_be_read(box: Sandbox, tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text("sesame")
    for path in (secret, Path(__file__), Path("/etc/passwd"), Path("/etc/hostname"), Path("/var"), Path("/sys")):
        assert path.exists() or str(path) == "/etc/hostname"
        assert box.run(f"import os\nassert not os.path.exists({str(path)!r})").error == "", path
    outside = "import os\nassert set(os.listdir('/etc')) <= {'ld.so.cache'}, os.listdir('/etc')\n"
    assert box.run("import os\nif os.path.exists('/etc'):\n    " + outside.replace("\n", "\n    ")).error == ""


def test_the_machine_s_devices_are_out_of_reach(box: Sandbox) -> None:
    program = (
        "import os, stat\n"
        "known = {'null', 'zero', 'full', 'random', 'urandom', 'tty', 'ptmx'}\n"
        "found = [n for n in os.listdir('/dev') if n not in known]\n"
        "odd = [n for n in found if not stat.S_ISLNK(os.lstat('/dev/' + n).st_mode) and n not in ('pts', 'shm')]\n"
        "assert not odd, odd\n"
        "assert len(os.urandom(4)) == 4 and open('/dev/zero', 'rb').read(3) == bytes(3)\n"
    )
    assert box.run(program).error == ""


def test_nothing_but_its_tmp_can_be_written(box: Sandbox) -> None:
    program = (
        "import os\n"
        "for top, _, _ in os.walk('/'):\n"
        "    if top.startswith('/proc') or top == '/tmp':\n"
        "        continue\n"
        "    try:\n"
        "        os.mkdir(top + '/mine')\n"
        "    except OSError:\n"
        "        continue\n"
        "    raise ValueError(top)\n"
    )
    assert box.run(program).error == ""


@pytest.mark.parametrize(
    "call",
    [
        "libc.unshare(0x10000000)",
        "libc.unshare(0x00020000)",
        "libc.syscall(ctypes.c_long(clone), ctypes.c_ulong(0x10000000 | 17), None, None, None, None)",
        "libc.mount(b'none', b'/tmp', b'tmpfs', ctypes.c_ulong(0), None)",
        "libc.ptrace(0, 0, None, None)",
        "libc.setns(0, 0)",
    ],
)
def test_no_name_space_or_mount_can_be_made(box: Sandbox, call: str) -> None:
    program = (
        "import ctypes, os\n"
        "libc = ctypes.CDLL(None, use_errno=True)\n"
        "clone = {'x86_64': 56, 'aarch64': 220}[os.uname().machine]\n"
        f"assert {call} == -1\n"
        "assert ctypes.get_errno() == 1, ctypes.get_errno()\n"
    )
    assert box.run(program).error == ""


def test_it_has_no_capability_and_gets_none(box: Sandbox) -> None:
    program = (
        "status = dict(line.split(':', 1) for line in open('/proc/thread-self/status'))\n"
        "assert int(status['CapEff'], 16) == int(status['CapPrm'], 16) == 0\n"
        "assert status['NoNewPrivs'].strip() == '1' and status['Seccomp'].strip() == '2'\n"
    )
    assert box.run(program).error == ""


def test_threads_and_processes_of_its_own_work(box: Sandbox) -> None:
    program = (
        "import subprocess, sys, threading\n"
        "out = []\n"
        "threads = [threading.Thread(target=out.append, args=(i,)) for i in range(3)]\n"
        "[t.start() for t in threads]; [t.join() for t in threads]\n"
        "assert sorted(out) == [0, 1, 2]\n"
        "said = subprocess.run([sys.executable, '-I', '-S', '-c', 'print(6 * 7)'], capture_output=True, text=True)\n"
        "assert said.stdout == '42\\n', said\n"
    )
    assert box.run(program).error == ""


def test_the_word_is_in_no_frame_variable_or_list_of_the_collector(box: Sandbox) -> None:
    thief = (
        "import gc, os, re, sys\n"
        "seen, found, todo = set(), [], list(sys.modules.values())\n"
        "frame = sys._getframe()\n"
        "while frame is not None:\n"
        "    todo += [*frame.f_locals.values(), *frame.f_globals.values(), *frame.f_code.co_consts]\n"
        "    frame = frame.f_back\n"
        "for look in (gc.get_objects, *(lambda f=f: f(sys._getframe(3)) for f in (gc.get_referents, gc.get_referrers))):\n"
        "    try: todo += look()\n"
        "    except RuntimeError: pass\n"
        "while todo:\n"
        "    thing = todo.pop()\n"
        "    if id(thing) in seen or len(seen) > 100000:\n"
        "        continue\n"
        "    seen.add(id(thing))\n"
        "    if isinstance(thing, (str, bytes)):\n"
        "        word = thing if isinstance(thing, bytes) else thing.encode(errors='replace')\n"
        "        found += re.findall(b'(?<![0-9a-f])[0-9a-f]{32}(?![0-9a-f])', word)\n"
        "    elif isinstance(thing, dict):\n"
        "        todo += [*thing.keys(), *thing.values()]\n"
        "    elif isinstance(thing, (list, tuple, set, frozenset)):\n"
        "        todo += thing\n"
        "    elif hasattr(thing, '__dict__'):\n"
        "        todo += list(vars(thing).values())\n"
        "for word in set(found):\n"
        "    for fd in range(3, 30):\n"
        "        try: os.write(fd, b'passed ' + word + b'\\n')\n"
        "        except OSError: pass\n"
        "os._exit(0)\n"
    )
    outcome = box.run(thief)
    assert outcome.error.startswith("ended before its tests did"), outcome


_WRITE = "os.write(frame.f_locals['fd'], b'passed ' + frame.f_locals['word'] + b'\\n'); os._exit(0)"
_WATCHERS = {
    "profile": f"""
import os, sys
def watch(frame, event, about):
    if 'word' in frame.f_locals: {_WRITE}
sys.setprofile(watch)
raise ValueError
""",
    "arguments of calls": """
import os, re, sys
def watch(frame, event, about):
    for word in re.findall('[0-9a-f]{32}', repr(getattr(about, '__self__', '')) + repr(frame.f_locals)):
        for fd in range(3, 30):
            try: os.write(fd, f'passed {word}\\n'.encode()); os._exit(0)
            except OSError: pass
sys.setprofile(watch)
raise ValueError
""",
    "jump": """
import sys
def jump(frame, event, about):
    if event == 'line': frame.f_lineno = max(line for *_, line in frame.f_code.co_lines() if line)
    return jump
sys._getframe().f_back.f_trace = jump
sys.settrace(jump)
raise ValueError
""",
    "another sys": """
import sys
del sys.modules['sys']
import sys
sys.setprofile(lambda *event: None)
""",
}


@pytest.mark.parametrize("watcher", _WATCHERS)
def test_nobody_traces_or_profiles_the_driver(box: Sandbox, watcher: str) -> None:
    assert "is refused to programs" in box.run(_WATCHERS[watcher]).error


def test_its_own_memory_file_is_closed_to_it(box: Sandbox) -> None:
    assert "PermissionError" in box.run("open('/proc/self/mem', 'rb')").error


def _all_groups(monkeypatch: pytest.MonkeyPatch) -> list[Groups]:
    """Skips where groups cannot be made; from then on those that are made are remembered."""
    made: list[Groups] = []
    make = Groups.make

    def remember(memory_bytes: int, processes: int) -> Groups:
        made.append(make(memory_bytes, processes))
        if len(made[-1].folders) < 2:
            made[-1].remove()
            pytest.skip("this process may not make control groups")
        return made[-1]

    monkeypatch.setattr(Groups, "make", remember)
    Groups.make(256 << 20, 12).remove()
    made.clear()
    return made


def test_all_processes_together_are_limited_in_memory(box: Sandbox, monkeypatch: pytest.MonkeyPatch) -> None:
    _all_groups(monkeypatch)
    # Each child answers twice: the kernel may kill one that has answered once to make room for the next.
    greedy = (
        "import os\n"
        "children = []\n"
        "for _ in range(4):\n"
        "    (mine, answer), (go, ask) = os.pipe(), os.pipe()\n"
        "    if os.fork() == 0:\n"
        "        os.close(mine), os.close(ask)\n"
        "        held = bytearray(b'x') * (120 << 20)\n"
        "        os.write(answer, b'!')\n"
        "        os.read(go, 1)\n"
        "        os.write(answer, b'!')\n"
        "        while True: __import__('signal').pause()\n"
        "    os.close(answer)\n"
        "    children.append((mine, ask))\n"
        "full = [os.read(mine, 1) for mine, _ in children]\n"
        "for _, ask in children: os.write(ask, b'!')\n"
        "assert full == [os.read(mine, 1) for mine, _ in children] == [b'!'] * len(children), 'one was killed'\n"
    )
    assert not box.run(greedy).passed
    assert box.run(greedy.replace("range(4)", "range(1)")).passed


def test_its_groups_are_gone_afterwards(box: Sandbox, monkeypatch: pytest.MonkeyPatch) -> None:
    made = _all_groups(monkeypatch)
    assert box.run("import os\nfor _ in range(3):\n    if os.fork() == 0:\n        while True: pass\n").passed
    assert made[0].folders and not any(folder.exists() for folder in made[0].folders)


@pytest.mark.parametrize(
    ("lines", "files", "expected"),
    [
        ("0::/user/scope\n", {"memory.max", "pids.max"}, {"user/scope": {"memory.max": "9", "pids.max": "3"}}),
        (
            "4:memory:/mine\n8:pids:/\n0::/\n",
            {"memory.limit_in_bytes", "pids.max"},
            {"memory/mine": {"memory.limit_in_bytes": "9"}, "pids": {"pids.max": "3"}},
        ),
        ("0::/user/scope\n", {"cgroup.procs"}, {}),
    ],
    ids=["one tree", "a tree for each controller", "controllers not handed down"],
)
def test_limits_are_written_where_each_version_has_them(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    lines: str,
    files: set[str],
    expected: dict[str, dict[str, str]],
) -> None:
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/self/cgroup").write_text(lines)
    for folder in ("user/scope", "memory/mine", "pids"):
        (tmp_path / "sys/fs/cgroup" / folder).mkdir(parents=True)
    mkdir, rmdir = Path.mkdir, Path.rmdir

    def kernel_mkdir(folder: Path) -> None:
        mkdir(folder)
        for name in files:
            (folder / name).write_text("max")

    def kernel_rmdir(folder: Path) -> None:
        for name in files:
            (folder / name).unlink()
        rmdir(folder)

    monkeypatch.setattr(Path, "mkdir", kernel_mkdir)
    monkeypatch.setattr(Path, "rmdir", kernel_rmdir)
    groups = Groups.make(9, 3, tmp_path)
    written = {
        str(folder.parent.relative_to(tmp_path / "sys/fs/cgroup")): {
            file.name: file.read_text() for file in folder.iterdir() if file.read_text() != "max"
        }
        for folder in groups.folders
    }
    assert written == expected
    groups.remove()
    assert not list((tmp_path / "sys/fs/cgroup").rglob("quadriga-*"))
