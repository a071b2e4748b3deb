"""Pack routers and adapter of a finished run into the delta that the package ships.

python recipes/quadriga-smol/make_delta.py smollm2-135m-instruct runs/smol-moe runs/quadriga-smol/adapter OUT
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np

from quadriga.edits import delta
from quadriga.edits.upcycle import Upcycling
from quadriga.hub import catalogue
from quadriga.io import adapter
from quadriga.io.open import open_checkpoint


def main() -> None:
    """Read, check that the rows are those of whole copies, write, print the hash."""
    base, moe, folder, out = sys.argv[1:5]
    path = catalogue.resolve(base)
    checkpoint = open_checkpoint(Path(moe))
    spec = checkpoint.config.only_moe("a delta")
    how = Upcycling(n_experts=spec.n_experts, top_k=spec.top_k)
    routers = {}
    for layer in range(checkpoint.config.n_layers):
        rows = checkpoint.parameters.read(f"layers.{layer}.moe.router.weight")
        routers[layer] = rows[:: how.n_granules]
        assert np.array_equal(rows, np.repeat(routers[layer], how.n_granules, axis=0)), "granules of a copy share a row"
    trained = adapter.load(Path(folder), checkpoint.config)
    sha = delta.write(Path(out), base_sha256=delta.sha256(path), how=how, routers=routers, adapter=trained)
    print(f"{out}: {Path(out).stat().st_size:,} bytes, sha256 {sha}")


if __name__ == "__main__":
    main()
