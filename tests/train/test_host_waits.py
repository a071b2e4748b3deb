"""A step on a GPU lets its host wait once, for the numbers that it judges the step by.

Counted where no GPU is: the meta device stands for one. Its tensors have no numbers, so whatever asks for one is seen.
"""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from quadriga.kernels.dispatch import use
from quadriga.train import config as sections
from quadriga.train.batch import TrainingBatch
from quadriga.train.world import World
from tests.train import runs

ATEN = torch.ops.aten
OF_UNKNOWN_SIZE = {
    ATEN.nonzero.default, ATEN.masked_select.default, ATEN.bincount.default, ATEN.repeat_interleave.Tensor,
    ATEN._unique2.default, ATEN.equal.default, ATEN.is_nonzero.default,
}  # fmt: skip
"""What returns a tensor, or a number, of which the host must know more than shapes tell."""


class PretendedGpu(TorchDispatchMode):
    """Counts how often a number comes from the meta device to the host; it is a 1 then."""

    def __init__(self) -> None:
        super().__init__()
        self.waits: list[str] = []
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if not any(isinstance(x, Tensor) and x.is_meta for x in tree_leaves((args, kwargs))):
            return func(*args, **kwargs)
        self.calls[func._schema.name] += 1
        by_mask = any(isinstance(x, Tensor) and x.dtype == torch.bool for x in tree_leaves(args[1:2]))
        if func in OF_UNKNOWN_SIZE or (func._schema.name in ("aten::index", "aten::index_put_") and by_mask):
            raise AssertionError(f"the host waits for the size of what {func} returns")
        if func is ATEN._local_scalar_dense.default:
            self.waits.append(str(func))
            return 1.0 if args[0].dtype.is_floating_point else 1
        to_host = func is ATEN._to_copy.default and torch.device(kwargs.get("device") or "meta").type == "cpu"
        if to_host or (func is ATEN.copy_.default and not args[0].is_meta):
            self.waits.append(str(func))
            return torch.ones(args[0].shape, dtype=kwargs.get("dtype") or args[0].dtype)
        return func(*args, **kwargs)


class _Ready:
    """A source whose rows were made before."""

    def __init__(self, batches: dict[tuple[int, int], TrainingBatch]) -> None:
        self.batches, self.domains, self.fingerprint = batches, ("even", "odd"), "-"

    def n_rows(self, step: int) -> int:
        return 8

    def seq_len(self, step: int) -> int:
        return 16

    def rows(self, step: int, first: int, last: int) -> TrainingBatch:
        return self.batches[first, last]


def test_a_step_waits_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    optimisers = sys.modules["torch.optim.optimizer"]
    monkeypatch.setattr(optimisers, "_get_fused_kernels_supported_devices", lambda: ["meta"])
    rows = {(a, a + 4): runs.source().rows(0, a, a + 4) for a in (0, 4)}
    settings = runs.Settings(
        optimiser=sections.OptimiserSection(clip_norm=1e-3),
        router=sections.RouterSection(z_loss=1e-3, bias_rate=1e-3),
        parallel=sections.ParallelSection(micro_rows=4, dtype="bfloat16"),
        ema=sections.EmaSection(decay=0.9),
    )
    # Widths whose grouped products torch does without the counts, and heads that fit Flash Attention.
    config = runs.TINY.with_ffn(d_ff=32).with_mixer(head_dim=8)
    record = runs.Record()
    with PretendedGpu() as gpu, use("reference"):
        world = World(device=torch.device("meta"))
        trainer = runs.trainer(
            tmp_path, settings, config=config, world=world, source=_Ready(rows), record=record, meta=True
        )
        gpu.waits.clear()
        gpu.calls.clear()
        for _ in range(2):
            trainer.run_step()
    assert gpu.waits == ["aten._to_copy.default"] * 2, "the message of a step"
    assert gpu.calls["torch_attn::_varlen_attn"] == 2 * 2 * config.n_layers, "one call a layer and micro-step"
    assert gpu.calls["torch_attn::_varlen_attn_backward"] == 2 * 2 * config.n_layers
    assert not any("scaled_dot_product" in name or name == "aten::softmax" for name in gpu.calls)
    assert len(record.steps) == 2 and record.steps[0].verdict is None
