"""``python -m quadriga.kernels.triton.check``: compile every row of ``cases`` for every GPU it names, without a GPU.

Prints registers, shared memory, spills and matrix instructions of each kernel, and exits with 1 if one spills, takes
more shared memory than a block may, or multiplies without the matrix instruction it should.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator

from quadriga.kernels.triton.binary import MATRIX, SHARED_LIMIT, Binary, compile_launch
from quadriga.kernels.triton.cases import CASES, Case
from quadriga.kernels.triton.launch import Launch, recording


def faults(case: Case, launches: list[Launch], binaries: list[Binary]) -> Iterator[str]:
    """What is wrong with a case's kernels on one capability."""
    for launch, binary in zip(launches, binaries, strict=True):
        if binary.spills:
            yield f"{binary.spills} spills"
        if binary.shared_bytes > SHARED_LIMIT[binary.capability]:
            yield f"{binary.shared_bytes} bytes of shared memory; a block has {SHARED_LIMIT[binary.capability]}"
        if launch.name in case.matrix and not binary.matrix:
            yield f"{launch.name} without {MATRIX[binary.capability]}"


def check(case: Case) -> Iterator[tuple[str, list[str]]]:
    """(a line of the report, faults) of every capability."""
    with recording() as launches:
        case.call()
    for capability in case.capabilities:
        binaries = [compile_launch(launch, capability) for launch in launches]
        said = "; ".join(
            f"{launch.name} {b.registers} registers, {b.shared_bytes / 1024:.0f} KiB, "
            f"{b.matrix} {MATRIX[capability]}, {b.spills} spills"
            for launch, b in zip(launches, binaries, strict=True)
        )
        yield f"sm_{capability}  {case.name}: {said}", list(faults(case, launches, binaries))


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(description="Compile every kernel for GPUs that need not be here.")
    parser.add_argument("--only", default="", help="rows whose name contains this")
    only = parser.parse_args().only
    cases = [case for case in CASES if only in case.name]
    if not cases:
        parser.error(f"no row's name contains {only!r}; there are: {', '.join(case.name for case in CASES)}")
    bad = 0
    for case in cases:
        for line, wrong in check(case):
            bad += bool(wrong)
            print(line + "".join(f"  FAULT: {fault}" for fault in wrong), flush=True)
    print(f"{len(cases)} calls compiled, {bad} with faults")
    return 1 if bad else 0


if __name__ == "__main__":
    raise SystemExit(main())
