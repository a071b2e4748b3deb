"""Everything that only a GPU can tell about its kernels, in one run of minutes; rows of CSV.

    bash bench/gpu.sh OUT.csv              on a machine with a GPU
    bash bench/gpu.sh --dry OUT.csv        every line of this on the host, interpreted, at toy sizes; no times

    family       logits of tiny models of every family beside transformers' (tests/golden), float32
    parity       experts in every format beside the same numbers in float64
    invariance   a token alone beside the same token among others, to the bit, in tiles of every size
    speed        a layer's experts at real sizes, 1 to 4096 tokens: ms, GB/s, TFLOP/s, and shares of published peaks
    training     forward and backward of the experts: share of the bf16 peak

A section that finds no time left says so in a row. Weights are random; a time is the median of several, after a
warm-up, by the device's own clock.
"""

from __future__ import annotations

import argparse
import csv
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from tests.golden import checkpoints
from tests.golden.weights import TOKENS
from torch import Tensor

from quadriga.io.open import open_checkpoint
from quadriga.kernels import ops, reference
from quadriga.kernels.triton import weights
from quadriga.kernels.triton.experts import ExpertNetworks, run_experts
from quadriga.kernels.triton.grouped import grouped_product
from quadriga.kernels.triton.router import place
from quadriga.kernels.triton.weights import BITS, GroupedWeight
from quadriga.model.plan.hardware import GPUS
from quadriga.nn.context import PackedContext
from quadriga.nn.load import load_parameters
from quadriga.nn.transformer import Transformer

FORMATS = ("plain", "fp8", "q8", "q4", "q4m", "mxfp4", "q4k")


@dataclass(frozen=True)
class Shape:
    """A layer's experts."""

    name: str
    d_model: int
    d_ff: int
    n_experts: int
    top_k: int


SHAPES = (Shape("dbrx-132b", 6144, 10752, 16, 4), Shape("qwen3-30b-a3b", 2048, 768, 128, 8))
TOY = (Shape("toy", 64, 96, 5, 3),)


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


def random_weight(day: Day, form: str, n_experts: int, rows: int, columns: int) -> GroupedWeight:
    """Planes of any bits, with scales that leave numbers of at most about 0.1."""
    shape = weights.meta(form, n_experts, rows, columns, day.dtype)
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


def networks(day: Day, form: str, shape: Shape) -> ExpertNetworks:
    """Gate, up and down of random numbers."""
    up = (random_weight(day, form, shape.n_experts, shape.d_ff, shape.d_model) for _ in range(2))
    return ExpertNetworks(*up, random_weight(day, form, shape.n_experts, shape.d_model, shape.d_ff), "silu")


def tokens_of(day: Day, shape: Shape, n: int) -> tuple[Tensor, Tensor, Tensor]:
    """(x (n, D), ids (n, k), weights (n, k)), evenly routed."""
    generator = torch.Generator(device=day.device).manual_seed(n)
    scores = torch.rand(n, shape.n_experts, device=day.device, generator=generator)
    ids = scores.topk(shape.top_k).indices
    x = torch.randn(n, shape.d_model, device=day.device, generator=generator).to(day.dtype)
    return x, ids, torch.full((n, shape.top_k), 1 / shape.top_k, device=day.device)


def families(day: Day) -> Iterator[Row]:
    """Logits of tiny models beside what transformers computed on a CPU."""
    names = ("qwen3moe",) if day.dry else tuple(n for n in checkpoints.NAMES if f"{n}.prefill" in checkpoints.results())
    for name in names:
        if not day.left():
            yield Row(section="family", what=name, note="no time left")
            continue
        with tempfile.TemporaryDirectory() as folder, torch.inference_mode(), ops.use("triton"):
            checkpoints.write(name, Path(folder))
            opened = open_checkpoint(Path(folder))
            parameters = {
                key: value.to(day.device) for key, value in load_parameters(opened, dtype=torch.float32).items()
            }
            model = Transformer.from_parameters(opened.config, parameters).eval().to(day.device)
            logits = model(torch.tensor(TOKENS, device=day.device), PackedContext([len(TOKENS)])).logits.cpu()
        truth = checkpoints.results()[f"{name}.prefill"]
        worst = float((logits - truth).abs().max() / (truth.max() - truth.min()))
        note = "" if worst <= 2e-5 else "beyond 2e-5"
        yield Row(section="family", what=name, tokens=len(TOKENS), value=worst, unit="of the range", note=note)


def parity(day: Day) -> Iterator[Row]:
    """Experts beside the same weights' numbers, multiplied in float64 by torch."""
    shape = TOY[0] if day.dry else Shape("parity", 256, 512, 5, 3)
    for form in FORMATS[:2] if day.dry else FORMATS:
        made = networks(day, form, shape)
        numbers = [_numbers(w) for w in (made.gate, made.up, made.down)]
        for n in (1, 23) if day.dry else (1, 23, 300, 1000):
            x, ids, combine = tokens_of(day, shape, n)
            ours = run_experts(x, place(ids, shape.n_experts), combine, made).double()
            truth = reference.experts(x.double(), ids, combine.double(), *(w.double() for w in numbers), "silu")
            worst = float((ours - truth).abs().max() / truth.abs().max())
            yield Row(section="parity", what="experts", form=form, tokens=n, value=worst, unit="of the largest")


def _numbers(weight: GroupedWeight) -> Tensor:
    """(E, N, K) float32 of a weight, by the kernel itself in float32: its reading of codes is held by tests."""
    eye = torch.eye(weight.columns, device=weight.codes.device)
    return torch.stack([grouped_product(eye, weight.expert(e)).T for e in range(weight.n_experts)])


def invariance(day: Day) -> Iterator[Row]:
    """How many numbers of a token change with its company."""
    for shape in TOY if day.dry else SHAPES:
        for form in ("q4",) if day.dry else ("plain", "fp8", "q8", "q4", "q4k"):
            if not day.left():
                yield Row(section="invariance", what=shape.name, form=form, note="no time left")
                continue
            made = networks(day, form, shape)
            x, ids, combine = tokens_of(day, shape, 23 if day.dry else 4096)
            alone = run_experts(x[:1], place(ids[:1], shape.n_experts), combine[:1], made)
            for n in (5, 23) if day.dry else (8, 64, 256, 4096):
                crowd = run_experts(x[:n], place(ids[:n], shape.n_experts), combine[:n], made)
                differing = int((crowd[0] != alone[0]).sum())
                yield Row(
                    section="invariance", what=shape.name, form=form, tokens=n, value=differing, unit="numbers differ"
                )


def speed(day: Day) -> Iterator[Row]:
    """A layer's experts."""
    for shape in TOY if day.dry else SHAPES:
        for form in ("plain", "q4") if day.dry else FORMATS:
            if not day.left():
                yield Row(section="speed", what=shape.name, form=form, note="no time left")
                continue
            made = networks(day, form, shape)
            for n in (1, 5) if day.dry else (1, 2, 4, 8, 16, 32, 64, 128, 256, 1024, 4096):
                x, ids, combine = tokens_of(day, shape, n)
                places = place(ids, shape.n_experts)
                took = day.milliseconds(lambda made=made, x=x, p=places, c=combine: run_experts(x, p, c, made))
                visited = len(ids.unique())
                bits = BITS[form] if form != "plain" else 8 * x.element_size()
                weight_bytes = visited * 3 * shape.d_ff * shape.d_model * bits / 8
                row_bytes = n * shape.top_k * (2 * shape.d_model + 2 * shape.d_ff) * x.element_size()
                flops = 2 * n * shape.top_k * 3 * shape.d_ff * shape.d_model
                known = day.speed(took, weight_bytes + row_bytes, flops)
                yield Row(section="speed", what=shape.name, form=form, tokens=n, **known)
            del made


def training(day: Day) -> Iterator[Row]:
    """Forward and backward: three times the products of a forward pass."""
    for shape in TOY if day.dry else SHAPES:
        if not day.left():
            yield Row(section="training", what=shape.name, note="no time left")
            continue
        n = 9 if day.dry else 8192
        x, ids, combine = tokens_of(day, shape, n)
        x.requires_grad_()
        made = networks(day, "plain", shape)
        leaves = [w.codes.requires_grad_() for w in (made.gate, made.up, made.down)]

        def step(x: Tensor = x, ids: Tensor = ids, combine: Tensor = combine, leaves: list[Tensor] = leaves) -> None:
            with ops.use("triton"):
                ops.experts(x, ids, combine, *leaves, "silu").sum().backward()

        took = day.milliseconds(step)
        flops = 3 * 2 * n * shape.top_k * 3 * shape.d_ff * shape.d_model
        n_bytes = 3 * sum(leaf.nbytes for leaf in leaves)
        yield Row(section="training", what=shape.name, form="plain", tokens=n, **day.speed(took, n_bytes, flops))


def main() -> None:
    """Run all sections into a file."""
    parser = argparse.ArgumentParser(description="What only a GPU can tell.")
    parser.add_argument("out", type=Path, help="the CSV file")
    parser.add_argument("--dry", action="store_true", help="interpreted on the host, at toy sizes, without times")
    parser.add_argument("--seconds", type=float, default=480, help="no new row is begun after these")
    given = parser.parse_args()
    day = Day(given.dry, given.seconds)
    with given.out.open("w", newline="") as file:
        writer = csv.DictWriter(file, [field.name for field in fields(Row)])
        writer.writeheader()
        for section in (parity, invariance, speed, training, families):
            for row in section(day):
                writer.writerow(asdict(row))
                file.flush()
                print(*(str(value) for value in asdict(row).values() if value != ""), flush=True)


if __name__ == "__main__":
    main()
