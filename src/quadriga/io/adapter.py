"""Adapters as files: our own form, peft's in both directions, and folding one into a checkpoint.

    ADAPTER/quadriga_adapter.json    rank, alpha, targets, what it was made for, sha256 of the numbers
    ADAPTER/adapter.safetensors      layers.0.moe.w_up.a (E, r, D), layers.0.moe.w_up.b (E, F, r), ...

peft writes one pair of factors for every matrix that Hugging Face's checkpoint stores, so the family's weight map ties
the two forms together: a stored matrix is a box of a parameter, its factors are the same rows of B over a common A.

    export   q_proj: A, B[rows of q]     k_proj: A, B[rows of k]     ...                  exact
    import   wqkv:   A = [A_q; A_k; A_v],  B = blockdiag(B_q, B_k, B_v)                   exact, of rank 3 r

peft's form for fused expert stacks (``target_parameters``, experts (E, out, in)) reads and writes as well: all experts'
A below each other, the numbers of B with the expert as the fastest axis. Before 0.19 it took the first axis of a slice
for the input, so A and B changed places.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np

from quadriga.errors import CheckpointError
from quadriga.io import peft_config
from quadriga.io.adapter_extras import Extras
from quadriga.io.adapter_files import MANIFEST, Adapter, load_own
from quadriga.io.derive import Unchanged, derive
from quadriga.io.open import Checkpoint
from quadriga.io.peft_read import from_peft
from quadriga.model.config import ModelConfig
from quadriga.quant.dtypes import Array, as_float32


def load(folder: Path, config: ModelConfig) -> Adapter:
    """Read an adapter of either form and hold it to the model it is for.

    Raises:
        CheckpointError: nothing there, malformed, changed since it was written, or of another model.
        ConfigError: peft options that are no plain low-rank adapter.
    """
    if (folder / MANIFEST).is_file():
        return load_own(folder, config)
    if (folder / peft_config.FILE).is_file():
        return from_peft(folder, config)
    raise CheckpointError(f"{folder} is no adapter: it needs {MANIFEST}, or peft's {peft_config.FILE}")


def merge(base: Checkpoint, adapter: Adapter) -> Checkpoint:
    """``base`` with W + s B A for every adapted W, as a derived checkpoint; ``convert.write`` stores it."""
    return derive(base, _Merge(base, adapter))


class _Merge(Unchanged):
    def __init__(self, base: Checkpoint, adapter: Adapter) -> None:
        digest = hashlib.sha256(repr(adapter.spec).encode())
        for name, factors in adapter.factors.items():
            digest.update(name.encode())
            for t in factors:
                digest.update(t.tobytes())
        self.extras = adapter.extras or Extras()
        for where, t in self.extras.parts():
            digest.update(where.encode())
            digest.update(t.tobytes())
        super().__init__(base, base.config, f"with adapter {digest.hexdigest()[:16]}")
        self.adapter = adapter

    def rows(self, name: str, expert: int | None, first: int, last: int) -> Array:
        frozen = self.extras.in_place(name, expert, first, super().rows(name, expert, first, last))
        if name not in self.adapter.factors:
            return frozen
        a, b = self.adapter.factors[name]
        if expert is not None:
            a, b = a[expert], b[expert]
        rows = as_float32(frozen) + np.float32(self.adapter.spec.scale) * (b[first:last] @ a)
        return self.extras.stretched(name, expert, first, rows).astype(frozen.dtype)
