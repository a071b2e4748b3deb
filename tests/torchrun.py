"""Ranks as users start them: a module under torch.distributed.run, one thread each, on this machine."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from quadriga import runtime
from tests.waiting import HANG_S

ROOT = Path(__file__).parent.parent


def environment() -> dict[str, str]:
    """Of a rank: this checkout's code, one thread."""
    return {**runtime.child_environment(), "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT / 'src'}:{ROOT}"}


def torchrun(n: int, module: str, *words: str, stdin: str | None = None) -> subprocess.CompletedProcess[str]:
    """Run ``module`` with ``words`` on n ranks, to their end."""
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(n), "-m"),
        *(module, *words),
    ]
    return subprocess.run(
        command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=2 * HANG_S, input=stdin
    )
