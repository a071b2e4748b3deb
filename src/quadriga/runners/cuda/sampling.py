"""The engine's settings of rows as the kernel takes them, and what it gives as the engine takes it.

A pass costs one wait: tokens, sums, logits and the most probable come back in one piece. What the kernel has not,
typical-p, XTC and DRY, is chosen by the CPU's kernels from rows that are fetched.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from quadriga.kernels.cpu.library import Context
from quadriga.kernels.cpu.sampling import Logits, RowSampler, RowSettings, Sampled
from quadriga.kernels.triton.sampling import Rows, sample
from quadriga.runners.cuda.device_array import DeviceArray
from quadriga.runners.cuda.inputs import to_device


class DeviceSampler:
    """A ``kernels.cpu.sampling.TokenSampler`` of logits that are on a device."""

    def __init__(self) -> None:
        self._beside: RowSampler | None = None

    def beside(self) -> RowSampler:
        """The CPU's kernels on one thread; theirs are the same tokens, but where a draw is a near tie."""
        if self._beside is None:
            self._beside = RowSampler(Context(1))
        return self._beside

    def sample(self, logits: Logits, places: Sequence[int], settings: Sequence[RowSettings]) -> list[Sampled]:
        """Choose a token for some rows of logits (R, V); one setting for each place."""
        assert isinstance(logits, DeviceArray), "logits of this runner"
        here = [i for i, one in enumerate(settings) if not _is_for_host(one)]
        rest = [i for i, one in enumerate(settings) if _is_for_host(one)]
        out: dict[int, Sampled] = {}
        if here:
            rows = rows_of([places[i] for i in here], [settings[i] for i in here], logits)
            made = sample(logits.tensor, rows).cpu().numpy()
            out.update((i, _sampled(row, settings[i])) for i, row in zip(here, made, strict=True))
        if rest:
            fetched = np.stack([np.asarray(logits[places[i]]) for i in rest])
            chosen = self.beside().sample(fetched, range(len(rest)), [settings[i] for i in rest])
            out.update(zip(rest, chosen, strict=True))
        return [out[i] for i in range(len(settings))]


def _is_for_host(one: RowSettings) -> bool:
    """True if the kernel does not have what this row asks for."""
    s = one.struct
    drawn_there = s.temperature > 0 and (s.typical_p < 1 or s.xtc_probability > 0)
    return bool(drawn_there or s.dry_multiplier > 0)


def _sampled(row: NDArray[np.float64], asked: RowSettings) -> Sampled:
    pairs = row[3 : 3 + 2 * asked.struct.n_top].reshape(-1, 2).tolist()
    top = tuple((int(token), logit) for token, logit in pairs if token >= 0)
    return Sampled(int(row[0]), float(row[1]), float(row[2]), top)


def rows_of(places: Sequence[int], settings: Sequence[RowSettings], logits: DeviceArray) -> Rows:
    """What the kernel is told of the rows of a pass."""
    numbers, seeds, bounds = [], [], []
    ids: list[NDArray[np.int32]] = []
    amounts: list[NDArray[np.float32]] = []
    counts: list[NDArray[np.int32]] = []
    masks: list[NDArray[np.uint8]] = []
    begin = 0
    for one in settings:
        s = one.struct
        unused, early, moved, by = one.lists
        early = early[: s.n_early]
        said, often = (np.zeros(0, np.int32),) * 2 if one.history is None else (h[: s.n_said] for h in one.history)
        parts = (unused, early, said, moved)
        ends = np.cumsum([begin, *map(len, parts)])
        ids += parts
        amounts.append(np.concatenate((np.zeros(len(unused) + len(early) + len(said), np.float32), by)))
        none_before, none_after = np.zeros(len(unused) + len(early), np.int32), np.zeros(len(moved), np.int32)
        counts.append(np.concatenate((none_before, often, none_after)))
        mask = -1
        if one.allowed is not None:
            mask = len(masks)
            masks.append(one.allowed.astype(np.uint8))
        begin = int(ends[-1])
        inverse = 0.0 if s.temperature == 0 else float(np.float32(1.0 / s.temperature))
        numbers.append((inverse, s.top_p, s.min_p, s.repetition_penalty, s.presence_penalty, s.frequency_penalty))
        seeds.append((s.seed, s.position))
        bounds.append((*ends, s.top_k, s.n_top, mask))
    device = logits.tensor.device
    return Rows(
        places=to_device(np.array(places, np.int32), device),
        numbers=to_device(np.array(numbers, np.float64), device),
        seeds=to_device(np.array(seeds, np.int64), device),
        bounds=to_device(np.array(bounds, np.int32), device),
        ids=to_device(_together(ids, np.int32), device),
        amounts=to_device(_together(amounts, np.float32), device),
        counts=to_device(_together(counts, np.int32), device),
        masks=_masks(masks, device),
        most_top=max(one.struct.n_top for one in settings),
        most_early=max(one.struct.n_early for one in settings),
    )


def _together(parts: Sequence[NDArray[np.generic]], dtype: type[np.generic]) -> NDArray[np.generic]:
    """One list, of at least one number: a kernel wants an address."""
    return np.concatenate((*parts, np.zeros(1, dtype))).astype(dtype)


def _masks(masks: Sequence[NDArray[np.uint8]], device: torch.device) -> Tensor:
    return to_device(np.stack(masks) if masks else np.zeros((1, 1), np.uint8), device)
