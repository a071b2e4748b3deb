"""What the sections of ``gpu_day`` share: a row of the file, the device with its time that is left, random weights."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from quadriga.kernels.triton import weights
from quadriga.kernels.triton.weights import GroupedWeight
from quadriga.model.plan.hardware import GPUS


@dataclass(frozen=True, kw_only=True)
class Row:
    """A line of the file; what a section does not know stays empty."""

    section: str
    what: str
    form: str = ""
    tokens: int | str = ""
    value: float | str = ""
    """The worst error as a share of the largest number; how many numbers differ; milliseconds."""
    unit: str = ""
    gb_per_s: float | str = ""
    of_bandwidth: float | str = ""
    tflop_per_s: float | str = ""
    of_peak: float | str = ""
    note: str = ""


class Day:
    """What the sections share: the device, its limits, and the time that is left."""

    def __init__(self, dry: bool, seconds: float) -> None:
        self.dry, self.device = dry, "cpu" if dry else "cuda"
        self.until = time.monotonic() + seconds
        self.dtype = torch.float32 if dry else torch.bfloat16
        name = "" if dry else torch.cuda.get_device_name()
        self.gpu = next((gpu for key, gpu in GPUS.items() if key in name), None)

    def left(self) -> bool:
        """True while there is time for one more row."""
        return time.monotonic() < self.until

    def milliseconds(self, run: Callable[[], object]) -> float:
        """The median of 9 runs; 0 on the host, where times mean nothing."""
        run()
        if self.dry:
            return 0.0
        run()
        times = []
        for _ in range(9):
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            run()
            end.record()
            torch.cuda.synchronize()
            times.append(begin.elapsed_time(end))
        return statistics.median(times)

    def speed(self, milliseconds: float, n_bytes: float, flops: float) -> dict[str, Any]:
        """Columns of a row: rates, and shares of what the maker publishes."""
        if self.dry:
            return {"value": "", "unit": "ms"}
        gb, tflop = n_bytes / milliseconds / 1e6, flops / milliseconds / 1e9
        shares: dict[str, Any] = {}
        if self.gpu is not None:
            shares = {
                "of_bandwidth": round(gb * 1e9 / self.gpu.hbm_bytes_per_s, 3),
                "of_peak": round(tflop * 1e12 / self.gpu.peak_flops, 3),
            }
        rates = {"gb_per_s": round(gb, 1), "tflop_per_s": round(tflop, 1)}
        return {"value": round(milliseconds, 4), "unit": "ms", **rates, **shares}


def random_weight(day: Day, form: str, n_experts: int, rows: int, columns: int, *, meta: bool = False) -> GroupedWeight:
    """Planes of any bits, with scales that leave numbers of at most about 0.1; with ``meta`` only their sizes."""
    shape = weights.empty(form, n_experts, rows, columns, dtype=day.dtype)
    if meta:
        return shape
    generator = torch.Generator(device=day.device).manual_seed(rows + columns)

    def filled(name: str, plane: Tensor | None) -> Tensor | None:
        if plane is None:
            return None
        if not plane.dtype.is_floating_point:
            low, high = (-127, 128) if plane.dtype == torch.int8 else (0, 256)
            if name == "scales" and form == "mxfp4":
                low, high = 121, 124
            elif name in ("scales", "minima"):
                high = 64
            elif form == "fp8":
                high = 0x78  # numbers up to 256
            return torch.randint(low, high, plane.shape, dtype=plane.dtype, device=day.device, generator=generator)
        size = {"codes": 0.05, "scales": {"fp8": 4e-4, "q8": 1e-3}.get(form, 1e-2), "minima": 5e-2}.get(name, 1e-4)
        numbers = torch.rand(plane.shape, device=day.device, generator=generator) * size
        return (numbers - size / 2 if name == "codes" else numbers).to(plane.dtype)

    planes = {name: filled(name, getattr(shape, name)) for name in ("codes", "scales", "minima", "d", "dmin")}
    return GroupedWeight(form, columns=columns, **planes)  # type: ignore[arg-type]
