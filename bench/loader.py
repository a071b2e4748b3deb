"""Rows a second that the loader reads on one core, and what share of a training step that is.

    python bench/loader.py corpora/mix

Reads whole global batches of a one-stage curriculum in its own order, after one warm pass over the first of them; files
are in the page cache, as they are for any corpus that fits.
"""

from __future__ import annotations

import argparse
import statistics
import time

from quadriga.runtime import cpu_name
from quadriga.train.data_config import DataConfig, StageConfig
from quadriga.train.loader import open_source


def main() -> None:
    """Measure and print a line for each row length."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("corpus")
    parser.add_argument("--steps", type=int, default=20)
    options = parser.parse_args()
    print(f"{cpu_name()}, one core")
    for seq_len in (512, 2048, 8192):
        stage = StageConfig(tokens=options.steps * 131072, seq_len=seq_len, batch_tokens=131072)
        source = open_source(DataConfig(corpora=[options.corpus], stages=[stage]))
        rows, times = source.n_rows(0), []
        source.rows(0, 0, rows)
        for step in range(options.steps):
            started = time.perf_counter()
            source.rows(step, 0, rows)
            times.append(time.perf_counter() - started)
        took = statistics.median(times)
        print(f"rows of {seq_len:5}: {rows / took:9,.0f} rows/s {rows * seq_len / took / 1e6:7.1f} M tokens/s")


if __name__ == "__main__":
    main()
