"""Import and export of a large synthetic DBRX: bytes compared, memory and speed measured.

Makes a checkpoint of random bf16 numbers in the released layout (fused experts, sharded, with index), imports it into
Quadriga's directory, exports it again and compares every tensor's bytes. Each step runs in a process of its own, whose
peak resident memory the operating system reports.

    python bench/roundtrip.py SCRATCH_FOLDER --gigabytes 8
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import torch

from quadriga.io.safetensors import SafetensorsSource, plan_shards, shard_index
from quadriga.model import families
from quadriga.model.cost import n_params
from quadriga.model.weight_map import source_shapes

SHARD_BYTES = 1 << 30


def make(folder: Path, gigabytes: float) -> int:
    """Write the checkpoint. Returns its size in bytes."""
    tiny = families.preset("dbrx-9b").with_n_layers(1)
    per_layer = n_params(tiny.with_n_layers(2)).total - n_params(tiny).total
    n_layers = max(1, round((gigabytes * 1e9 / 2 - n_params(tiny).total) / per_layer + 1))
    config = tiny.with_n_layers(n_layers)
    family = families.FAMILIES["dbrx"]
    shapes = source_shapes(family.layouts["fused"](config))
    plan = plan_shards({name: (shape, "bfloat16") for name, shape in shapes.items()}, SHARD_BYTES)
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(family.config_to_hf(config)))
    (folder / "model.safetensors.index.json").write_text(json.dumps(shard_index(plan)))
    generator = torch.Generator().manual_seed(0)
    for file, header in plan.headers.items():
        with (folder / file).open("wb") as out:
            out.write(header)
            left = plan.sizes[file] - len(header)
            while left:
                n = min(left, 64 << 20)
                out.write(torch.randint(0, 256, (n,), dtype=torch.uint8, generator=generator).numpy().data)
                left -= n
    return sum(plan.sizes.values())


def hashes(folder: Path) -> dict[str, str]:
    """sha256 of every tensor, read box by box."""
    source = SafetensorsSource(folder)
    found = {}
    for name, info in source.tensors.items():
        digest = hashlib.sha256()
        step = max(1, (64 << 20) * info.shape[0] // max(1, info.nbytes))
        for start in range(0, info.shape[0], step):
            box = ((start, min(start + step, info.shape[0])), *((0, n) for n in info.shape[1:]))
            digest.update(source.read(name, box).tobytes())
        found[name] = digest.hexdigest()
    return found


def run(label: str, nbytes: int, *arguments: str) -> None:
    """Run the convert command; print its time and its peak resident memory."""
    started = time.perf_counter()
    process = subprocess.Popen([sys.executable, "-m", "quadriga", "convert", *arguments])
    _, status, usage = os.wait4(process.pid, 0)
    elapsed = time.perf_counter() - started
    if status:
        raise SystemExit(f"{label} failed")
    rate, peak = nbytes / 1e6 / elapsed, usage.ru_maxrss / 1e3
    print(f"{label}: {nbytes / 1e9:.2f} GB in {elapsed:.1f} s, {rate:.0f} MB/s, peak RSS {peak:.0f} MB", flush=True)


def main() -> None:
    """Parse the command line and run the four steps."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("scratch", type=Path)
    parser.add_argument("--gigabytes", type=float, default=8.0)
    args = parser.parse_args()
    work = args.scratch / "roundtrip"
    try:
        nbytes = make(work / "source", args.gigabytes)
        n_files = len(list((work / "source").glob("*.safetensors")))
        print(f"made {nbytes / 1e9:.2f} GB in {n_files} shards", flush=True)
        run("import", nbytes, str(work / "source"), str(work / "ours"))
        run("export", nbytes, str(work / "ours"), str(work / "back"), "--to", "hf")
        before, after = hashes(work / "source"), hashes(work / "back")
        print(f"{len(before)} tensors, identical: {before == after}")
    finally:
        shutil.rmtree(work, ignore_errors=True)


if __name__ == "__main__":
    main()
