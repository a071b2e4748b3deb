"""Apply every kept wrong change to a copy of the tree, one at a time, and see that the named tests fail.

    python -m tests.mutants [ROOM ...]              what `make mutate` and `make mutate ONLY=kernels` run

    build/mutants/tree      the copy; only what differs is written again, so that a build stays warm
    build/mutants/library   the kernels of the copy, without optimisation: a change of one file is some seconds

First the named tests run on the copy as it is: they must pass, or their failing would mean nothing. A mutant is killed
if its tests fail, crash or hang; it survives if they pass; one that no longer applies, does not compile or cannot be
imported is a fault of the list. Exit status 1 if any mutant is not killed.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.mutants.kept import ROOT, Mutant, load, rooms

WORK = ROOT / "build" / "mutants"
TREE, LIBRARY = WORK / "tree", WORK / "library"
HANG_S = 60
"""What a wait inside a test may last here: a mutant's tests are quick."""
LIMIT_S = 15 * 60
"""Of one mutant's tests together; longer is a hang."""


def copy_tree() -> None:
    """Bring the copy up to date with the working tree: tracked files and new ones that git does not ignore."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        check=True,
    )
    wanted = {name for name in listed.stdout.decode().split("\0") if name and (ROOT / name).is_file()}
    for old in [path for path in TREE.rglob("*") if path.is_file()]:
        if old.relative_to(TREE).as_posix() not in wanted:
            old.unlink()
    for name in sorted(wanted):
        source, target = ROOT / name, TREE / name
        if not target.exists() or target.read_bytes() != source.read_bytes():
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(source.read_bytes())
            target.chmod(source.stat().st_mode)


def build() -> str:
    """Build the copy's kernels; what the compiler said if it could not."""
    if not (LIBRARY / "CMakeCache.txt").exists():
        generator = ["-G", "Ninja"] if _has("ninja") else []
        flags = ["-DCMAKE_BUILD_TYPE=None", "-DCMAKE_CXX_FLAGS=-O0 -w"]
        subprocess.run(["cmake", "-S", TREE, "-B", LIBRARY, *generator, *flags], check=True, capture_output=True)
    done = subprocess.run(["cmake", "--build", LIBRARY, "-j2"], capture_output=True, text=True)
    return "" if done.returncode == 0 else (done.stdout + done.stderr)[-2000:]


def _has(program: str) -> bool:
    from shutil import which

    return which(program) is not None


def run_tests(tests: Sequence[str], library: Path | None) -> tuple[int | None, str]:
    """(pytest's exit status, None for a hang; the end of what it said), in a process that has the libraries loaded."""
    said = WORK / "said.txt"
    process = _FRESH.Process(target=_pytest, args=(list(tests), library, said))
    process.start()
    process.join(LIMIT_S)
    hangs = process.is_alive()
    if hangs:
        process.kill()
        process.join()
    text = said.read_text(errors="replace")[-4000:] if said.exists() else ""
    return None if hangs else process.exitcode, text


_FRESH = multiprocessing.get_context("forkserver")
_FRESH.set_forkserver_preload(["torch", "hypothesis", "pytest", "tests.mutants.run"])


def _pytest(tests: list[str], library: Path | None, said: Path) -> None:
    """In a fresh process: the copy takes the working tree's place, and pytest runs."""
    out = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    os.dup2(out, 1), os.dup2(out, 2)
    os.environ.update(QUADRIGA_TEST_HANG_S=str(HANG_S), PYTHONPATH=str(TREE / "src"))
    if library is not None:
        os.environ["QUADRIGA_LIBRARY"] = str(library)
    sys.dont_write_bytecode = True  # files of one size that change within a second look alike to the cache
    os.chdir(TREE)
    ours = {str(ROOT), str(ROOT / "src"), "", "src", "."}
    sys.path[:] = [str(TREE), str(TREE / "src"), *(path for path in sys.path if path not in ours)]
    for name in [name for name in sys.modules if name.partition(".")[0] in ("tests", "quadriga")]:
        del sys.modules[name]
    sys.exit(int(pytest.main(["-x", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", *tests])))


def library_in_use(mutants: Sequence[Mutant]) -> Path | None:
    """The library for mutants in Python: the one of the working tree if it has one, else one of the copy's own."""
    own = ROOT / "src/quadriga/kernels/cpu/quadriga_cpu.so"
    if own.exists() and not any(mutant.compiled for mutant in mutants):
        return own.resolve()
    wrong = build()
    if wrong:
        raise SystemExit(wrong)
    return LIBRARY / "quadriga_cpu.so"


def verdict_of(mutant: Mutant, library: Path | None) -> tuple[str, str]:
    """("killed" or what else became of it; by which test, or why)."""
    path = TREE / mutant.file
    right = path.read_text()
    try:
        wrong_text = mutant.applied(TREE)
    except (ValueError, OSError) as error:
        return "does not apply", str(error)
    path.write_text(wrong_text)
    try:
        complaint = build() if mutant.compiled else ""
        if complaint:
            return "does not compile", complaint
        code, said = run_tests(mutant.tests, LIBRARY / "quadriga_cpu.so" if mutant.compiled else library)
    finally:
        path.write_text(right)
    if code is None:
        return "killed", "its tests hang"
    if code == 0:
        return "SURVIVED", " ".join(mutant.tests)
    if code == 1:
        failed = [
            line.removeprefix("FAILED ").split(" - ")[0] for line in said.splitlines() if line.startswith("FAILED ")
        ]
        return "killed", failed[0] if failed else "an error in a fixture"
    return ("killed", "its tests crash") if code < 0 else ("cannot run", said)


def main() -> int:
    """See the module docstring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rooms", nargs="*", choices=[[], *rooms()], help="rooms to visit; all if none is named")
    parser.add_argument("--name", default="", help="only mutants whose name contains this")
    parser.add_argument("--unproven", action="store_true", help="do not run the tests on the right code first")
    chosen = parser.parse_args()
    mutants = [m for room in chosen.rooms or rooms() for m in load(room) if chosen.name in m.name]
    os.environ.update(OMP_NUM_THREADS="1", PYTHONDONTWRITEBYTECODE="1")  # before the first process
    TREE.mkdir(parents=True, exist_ok=True)
    copy_tree()
    library = library_in_use(mutants)
    if not chosen.unproven:
        code, said = run_tests(sorted({test for mutant in mutants for test in mutant.tests}), library)
        if code != 0:
            print(said, f"\nthe right code fails its own tests ({code}): nothing can be learned from mutants")
            return 1
    bad = 0
    for mutant in mutants:
        started = time.perf_counter()
        verdict, why = verdict_of(mutant, library)
        bad += verdict != "killed"
        print(f"{verdict:>9}  {mutant.room}: {mutant.name}  ({why}; {time.perf_counter() - started:.0f} s)", flush=True)
    print(f"{len(mutants) - bad} of {len(mutants)} killed")
    return 1 if bad else 0
