"""Where systems and processors differ: which instruction sets there are, and sleeping without a futex."""

from __future__ import annotations

import platform
import shutil
import subprocess
from pathlib import Path

import pytest

from quadriga import runtime
from quadriga.errors import HardwareError
from quadriga.kernels.cpu import library as cpu
from tests.waiting import HANG_S

CSRC = Path(cpu.__file__).parent / "csrc"

NEEDED = {
    "avx2": {"avx2", "fma", "f16c"},
    "avx512": {"avx512f", "avx512bw", "avx512vl", "avx512dq", "avx512_vnni", "avx512_bf16", "avx2", "fma", "f16c"},
    "neon": {"asimddp"},
    "i8mm": {"asimddp", "i8mm", "bf16"},
}
"""As Linux names them in /proc/cpuinfo."""

OF_MACHINE = {"x86_64": ("avx2", "avx512"), "aarch64": ("neon", "i8mm")}


def test_the_instruction_sets_are_those_whose_flags_the_system_shows() -> None:
    flags, of_machine = runtime.cpu_flags(), OF_MACHINE.get(platform.machine(), ())
    if not flags & {"fpu", "asimd"} or (platform.machine() == "aarch64") != ("asimd" in flags):
        pytest.skip("the system shows another processor's flags, or none")
    expected = ("portable", *(name for name in of_machine if NEEDED[name] <= flags))
    assert cpu.isas_of_processor() == expected


def test_what_the_processor_lacks_is_refused_by_name() -> None:
    lacking = next(name for name in cpu.ISAS if name not in cpu.isas_of_processor())
    with pytest.raises(HardwareError, match=f"{lacking} need instructions this processor lacks; it has"):
        cpu.Context(1, lacking)


PHASES = """
#include "pool.hpp"

#include <atomic>
#include <chrono>
#include <cstdio>
#include <thread>

int main() {
  Pool pool(3);
  int64_t total = 0;
  for (int64_t phase = 1; phase <= 3000; ++phase) {
    std::atomic<int64_t> sum{0};
    pool.run(7, 1, [&](int64_t begin, int64_t end, int) {
      for (int64_t i = begin; i < end; ++i) sum += i * phase;
    });
    total += sum;
    // Long enough that the others fall asleep, every now and then.
    if (phase % 100 == 0) std::this_thread::sleep_for(std::chrono::milliseconds(1));
  }
  std::printf("%lld", (long long)total);
}
"""


@pytest.mark.parametrize("flags", [["-DQD_NO_FUTEX=1"], []], ids=["condition variables", "futex"])
def test_threads_sleep_and_wake(flags: list[str], tmp_path: Path) -> None:
    """Where there is no futex (macOS) as where there is: no phase is lost and none is waited for in vain."""
    compiler = shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        pytest.skip("no C++ compiler")
    (tmp_path / "phases.cpp").write_text(PHASES)
    sources = [tmp_path / "phases.cpp", *(CSRC / f"{name}.cpp" for name in ("pool", "system", "memory", "failure"))]
    command = [
        compiler,
        "-std=c++17",
        "-O1",
        "-pthread",
        *flags,
        f"-I{CSRC}",
        *map(str, sources),
        "-o",
        str(tmp_path / "phases"),
    ]
    subprocess.run(command, check=True)
    done = subprocess.run([tmp_path / "phases"], capture_output=True, text=True, check=True, timeout=HANG_S)
    assert int(done.stdout) == 21 * 3000 * 3001 // 2
