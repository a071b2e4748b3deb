"""A packed model whose experts stay on disk: tokens a second, bytes read, how often the cache had the expert.

python bench/synthetic.py dbrx-132b OUT --packed q4 [--layers 24]
python bench/larger_than_memory.py OUT --expert-memory 12 --tokens 20
"""

from __future__ import annotations

import argparse
import resource
import time
from pathlib import Path

import quadriga
from quadriga.engine.request import SamplingParams


def main() -> None:
    """Generate, then say what it cost."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--expert-memory", type=float, default=12, help="GB of experts to keep in memory")
    parser.add_argument("--tokens", type=int, default=20)
    args = parser.parse_args()
    nbytes = sum(file.stat().st_size for file in args.model.iterdir())
    started = time.perf_counter()
    model = quadriga.load(args.model, expert_memory=int(args.expert_memory * 1e9), kv_memory=256 << 20)
    loaded = time.perf_counter()
    store = model.expert_store
    assert store is not None, "the experts are in memory"
    times = []
    for event in model.stream([9906, 1917, 11, 856], SamplingParams(max_new_tokens=args.tokens, ignore_eos=True)):
        times.append(time.perf_counter())
        print(f"token {len(times)}: {event.token_id} after {times[-1] - loaded:.1f} s", flush=True)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    rate = (len(times) - 1) / (times[-1] - times[0])
    print(
        f"{nbytes / 1e9:.1f} GB of files, {model.config.n_layers} layers; loaded in {loaded - started:.1f} s; "
        f"{rate:.3f} tokens/s after the first; {store.stats().bytes_read / 1e9:.1f} GB read, "
        f"{store.stats().hit_rate:.1%} of expert visits found in memory; peak memory {peak:.1f} GB"
    )


if __name__ == "__main__":
    main()
