"""Seconds until a GGUF file's weights lie packed in memory: a LLaMA of random blocks, as large as asked.

    python bench/gguf_load.py q4_k --layers 14 --repeats 3

Prints the file's size, the median and the largest memory use. To compare two versions of the package, run one after the
other in turn (PYTHONPATH=OTHER/src) on the same file: it is written once, to --file.
"""

from __future__ import annotations

import argparse
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from quadriga.io.gguf import Typed, plan_gguf
from quadriga.io.open import open_checkpoint
from quadriga.io.packed import load_packed
from quadriga.quant.formats import FORMATS

D, F, V, HEADS = 2048, 8192, 32000, 16


def write(path: Path, form: str, layers: int) -> None:
    """Random bytes, all below 0x3c: every scale is finite in every format."""
    shapes: dict[str, tuple[int, ...]] = {"token_embd": (V, D), "output": (V, D), "output_norm": (D,)}
    for i in range(layers):
        shapes |= {f"blk.{i}.attn_{which}": (D, D) for which in ("q", "k", "v", "output")}
        shapes |= {f"blk.{i}.ffn_gate": (F, D), f"blk.{i}.ffn_up": (F, D), f"blk.{i}.ffn_down": (D, F)}
        shapes |= {f"blk.{i}.attn_norm": (D,), f"blk.{i}.ffn_norm": (D,)}
    counts = {"block_count": layers, "context_length": 4096, "embedding_length": D, "feed_forward_length": F}
    counts |= {"attention.head_count": HEADS, "attention.head_count_kv": HEADS, "vocab_size": V}
    metadata = {"general.architecture": Typed("string", "llama")}
    metadata |= {f"llama.{key}": Typed("uint32", value) for key, value in counts.items()}
    metadata |= {
        "llama.attention.layer_norm_rms_epsilon": Typed("float32", 1e-5),
        "llama.rope.freq_base": Typed("float32", 1e4),
        "llama.rope.dimension_count": Typed("uint32", D // HEADS),
    }
    tensors = {f"{name}.weight": (shape, form if len(shape) == 2 else "float32") for name, shape in shapes.items()}
    plan = plan_gguf(path.name, metadata, tensors)
    rng = np.random.default_rng(0)
    with path.open("wb") as file:
        file.truncate(plan.sizes[path.name])
        file.write(plan.headers[path.name])
        for name, (shape, stored) in tensors.items():
            file.seek(plan.places[name][1])
            file.write(rng.integers(0, 0x3C, FORMATS[stored].nbytes_of(shape), dtype=np.uint8).tobytes())


def load(path: Path) -> None:
    start = time.perf_counter()
    load_packed(open_checkpoint(path))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10
    print(f"{time.perf_counter() - start:.3f} {peak}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("format", nargs="?", default="q4_k", choices=[f for f in FORMATS if FORMATS[f].block > 1])
    parser.add_argument("--layers", type=int, default=14)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--file", type=Path, help="where the model is, or will be; default: a temporary file")
    parser.add_argument("--load", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.load:
        load(args.load)
        return
    with tempfile.TemporaryDirectory() as folder:
        path = args.file or Path(folder) / "model.gguf"
        if not path.exists():
            write(path, args.format, args.layers)
        runs = []
        for _ in range(args.repeats):
            command = [sys.executable, __file__, "--load", str(path)]
            runs.append(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split())
        seconds, peak = statistics.median(float(s) for s, _ in runs), max(int(p) for _, p in runs)
        print(f"{args.format}: {path.stat().st_size / 1e9:.2f} GB in {seconds:.2f} s, {peak} MB at most")


if __name__ == "__main__":
    main()
