"""Products of one large matrix in the packed formats of GGUF's blocks, in turn: one row (decoding) and many (a prompt).

python bench/products.py [--rows 4096 --cols 4096 --n 1 512 --threads 2 --rounds 30 --isa avx2 --activations int8]

Every round takes each format once. What counts is each one's quickest round, and how it compares with the first
format's: on a busy machine most rounds are interrupted. Bytes are those of the packed matrix: where memory is the
limit, times follow them.
"""

from __future__ import annotations

import argparse
import time

import numpy as np

from quadriga.kernels.cpu import library as cpu
from quadriga.kernels.cpu import packing
from quadriga.kernels.cpu.packing import Packed
from quadriga.quant.formats import FORMATS
from quadriga.quant.packed import FROM_GGUF, PACKED

_SCALES = {"q2_k": (80, 82), "q3_k": (108,), "q6_k": (208,)}
"""Where a block's float16 numbers stand; of the others in front."""


def matrix(block: str, rows: int, cols: int) -> Packed:
    """Random blocks, whose scales are ordinary numbers, packed."""
    spec, rng = FORMATS[block], np.random.default_rng(0)
    raw = rng.integers(0, 256, (rows * cols // spec.block, spec.nbytes), dtype=np.uint8)
    for at in _SCALES.get(block, (0, 2) if block in ("q4_1", "q5_1", "q4_k", "q5_k") else (0,)):
        raw[:, at : at + 2] = 0x00, 0x18
    return packing.pack_blocks(raw, block, rows, cols, FROM_GGUF[block])


def main() -> None:
    """Print a table: format, bits, seconds, GB/s, time over the first's."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=4096)
    parser.add_argument("--cols", type=int, default=4096)
    parser.add_argument("--n", type=int, nargs="+", default=[1, 512])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--isa", default=None)
    parser.add_argument("--activations", choices=("int8", "int16"), default="int8")
    parser.add_argument("--blocks", nargs="+", default=["q4_1", *(b for b in FROM_GGUF if b != "q4_1")])
    args = parser.parse_args()
    context = cpu.Context(args.threads, args.isa)
    context.set_int16(args.activations == "int16")
    matrices = {block: matrix(block, args.rows, args.cols) for block in args.blocks}
    for n in args.n:
        x = np.random.default_rng(1).standard_normal((n, args.cols)).astype(np.float32)
        spent: dict[str, list[float]] = {block: [] for block in matrices}
        for _ in range(args.rounds):
            for block, one in matrices.items():
                start = time.perf_counter()
                packing.linear(one, x, context)
                spent[block].append(time.perf_counter() - start)
        isa = args.isa or cpu.isa()
        print(f"{n} rows of {args.activations}, {args.rows} x {args.cols}, {args.threads} threads, {isa}")
        for block, times in spent.items():
            form, least = PACKED[FROM_GGUF[block]], min(times)
            rate, over = form.nbytes_of(args.rows, args.cols) / least / 1e9, least / min(spent[args.blocks[0]])
            print(f"{form.name:6} {form.bits:6.3f} bits {least * 1e3:9.3f} ms {rate:7.2f} GB/s {over:6.3f} x")


if __name__ == "__main__":
    main()
