"""Everything that only a GPU can tell about its kernels, in one run of minutes; rows of CSV.

    bash bench/gpu.sh OUT.csv              on a machine with a GPU
    bash bench/gpu.sh --dry OUT.csv        every line of this on the host, interpreted, at toy sizes; no times

    family       logits of tiny models of every family beside transformers' (tests/golden), float32
    parity       experts in every format beside the same numbers in float64
    invariance   a token alone beside the same token among others, to the bit, in tiles of every size
    speed        a layer's experts at real sizes, 1 to 4096 tokens: ms, GB/s, TFLOP/s, and shares of published peaks
    training     forward and backward of the experts: share of the bf16 peak
    model        decode at several batches and a prompt of whole models, in bfloat16 and four bits (gpu_models)

A section that finds no time left says so in a row. Weights are random; a time is the median of several, after a
warm-up, by the device's own clock.
"""

from __future__ import annotations

import argparse
import csv
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import numpy as np
import torch
from bench.gpu_models import models
from bench.gpu_rows import Day, Row, random_weight
from tests.golden import checkpoints
from tests.golden.weights import TOKENS
from torch import Tensor

import quadriga
from quadriga.errors import ConfigError
from quadriga.kernels import ops, reference
from quadriga.kernels.triton.experts import ExpertNetworks, run_experts
from quadriga.kernels.triton.grouped import grouped_product
from quadriga.kernels.triton.router import place
from quadriga.kernels.triton.weights import BITS, GroupedWeight

FORMATS = ("plain", "fp8", "q8", "q8m", "q4", "q4m", "mxfp4", "q4k", "k8", "k8m")


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
    """Logits of tiny models on the whole runner beside what transformers computed on a CPU."""
    names = ("qwen3moe",) if day.dry else tuple(n for n in checkpoints.NAMES if f"{n}.prefill" in checkpoints.results())
    for name in names:
        if not day.left():
            yield Row(section="family", what=name, note="no time left")
            continue
        with tempfile.TemporaryDirectory() as folder, ops.use("triton"):
            checkpoints.write(name, Path(folder))
            try:
                logits = quadriga.load(folder, dtype="float32", device=day.device, kv_memory=2**24).logits(TOKENS)
            except ConfigError as error:
                yield Row(section="family", what=name, note=str(error))
                continue
        truth = checkpoints.results()[f"{name}.prefill"].numpy()
        worst = float(np.abs(logits - truth).max() / np.ptp(truth))
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
        for section in (families, parity, invariance, models, speed, training):
            for row in section(day):
                writer.writerow(asdict(row))
                file.flush()
                print(*(str(value) for value in asdict(row).values() if value != ""), flush=True)


if __name__ == "__main__":
    main()
