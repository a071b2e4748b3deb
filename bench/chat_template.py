"""What rendering a chat template in a process of its own costs, beside jinja2 in this process.

    python bench/chat_template.py

Prints medians: starting a process to its first answer, a short and a long conversation in it, the same in jinja2 alone,
and what the process has in memory (Linux).
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import jinja2.sandbox

from quadriga.text.chat import CHATML
from quadriga.text.template_process import Budget, _Children, children, render_texts

BUDGET = Budget(cpu_s=60, memory_bytes=256 << 20, chars=1 << 30)
TURN = {"role": "user", "content": "What is the capital of France? Say it in one word. " * 5}


def median_ms(work: Callable[[], object], n: int) -> float:
    """Median wall time of ``n`` calls after a first one."""
    work()
    times = []
    for _ in range(n):
        started = time.perf_counter()
        work()
        times.append(1e3 * (time.perf_counter() - started))
    return statistics.median(times)


def start() -> None:
    """One process, one rendering, its end."""
    request = {"source": "x", "variables": {}, "messages": [], "jobs": [(0, True)], "cpu_s": 9, "chars": 9}
    fresh = _Children()
    fresh.ask(json.dumps(request).encode(), BUDGET, 1)
    fresh.end()


def main() -> None:
    """Print the medians."""
    print(f"start                  {median_ms(start, 9):8.2f} ms")
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    template = environment.from_string(CHATML)
    for n, rounds in ((5, 400), (10_000, 5)):
        messages = [TURN] * n

        def alone(messages: list[dict[str, str]] = messages) -> str:
            return template.render(messages=messages, add_generation_prompt=True)

        def child(messages: list[dict[str, str]] = messages) -> str:
            return render_texts(CHATML, {}, messages, [(len(messages), True)], BUDGET)[0]

        assert alone() == child(), "both render the same"
        print(
            f"{n:6} messages        {median_ms(child, rounds):8.2f} ms, jinja2 alone {median_ms(alone, rounds):8.2f} ms"
        )
    for pid in children.pids():
        lines = Path(f"/proc/{pid}/status").read_text().splitlines() if Path("/proc").exists() else []
        print(*(line for line in lines if line.startswith("VmRSS")))


if __name__ == "__main__":
    main()
