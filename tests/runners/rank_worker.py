"""What each process of ``test_distributed.py`` runs: a model shared among them, asked in one of several ways.

python -m torch.distributed.run ... -m tests.runners.rank_worker FOLDER MESH OUT     logits, answers, counts
python -m tests.runners.rank_worker FOLDER MESH idle|busy                            until it is killed
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np

import quadriga
from quadriga.engine.request import SamplingParams

PROMPTS = ([5, 9, 2, 11, 45, 3], [7] * 19, [1])


def main(folder: str, mesh: str, what: str) -> None:
    """See the module docstring."""
    model = quadriga.load(folder, format="float32", kv_format="float32", threads=1, parallel=mesh)
    if what == "idle":
        print("ready", flush=True)
        sys.stdin.read()
    elif what == "busy":
        while True:
            for _ in model.stream(PROMPTS[0], SamplingParams(max_new_tokens=40, ignore_eos=True)):
                print("token", flush=True)
    else:
        params = [SamplingParams(max_new_tokens=12, temperature=t, seed=1, ignore_eos=True) for t in (0.0, 0.8, 0.0)]
        done = model.generate_many(PROMPTS, params)
        np.savez(
            Path(what),
            logits=model.logits(PROMPTS[1]),
            tokens=np.array([one.token_ids for one in done]),
            logprobs=np.array([one.logprobs for one in done]),
            alone=np.array([model.generate(p, s).logprobs for p, s in zip(PROMPTS, params, strict=True)]),
            load=np.array(model.runner.expert_load()),
        )


if __name__ == "__main__":
    main(*sys.argv[1:])
