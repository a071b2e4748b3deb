"""Accelerators and serving machines as data: published figures, and what fraction of them programs reach.

``gemm`` and ``attention`` are the fractions of the peak that very wide matrix products and fused attention reach; a
``Stack`` says how well a program uses them. docs/plan.md compares the results with published runs.
"""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass, replace

from quadriga.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """One accelerator of a training cluster."""

    name: str
    memory_bytes: int
    peak_flops: float
    """Published dense bfloat16 FLOP/s, the basis of MFU."""
    hbm_bytes_per_s: float
    node_bytes_per_s: float
    """Bandwidth to the other accelerators of its node (NVLink), one direction."""
    network_bytes_per_s: float
    """Its share of the node's bandwidth to other nodes (InfiniBand), one direction."""
    per_node: int
    gemm: float
    attention: float
    price_per_hour: float
    """US dollars; an assumption, which `--price` overrides."""


_A100 = Gpu(
    name="A100",
    memory_bytes=80 * 10**9,
    peak_flops=312e12,
    hbm_bytes_per_s=2.04e12,
    node_bytes_per_s=300e9,
    network_bytes_per_s=25e9,
    per_node=8,
    gemm=0.75,
    attention=0.50,
    price_per_hour=1.8,
)

GPUS = {
    gpu.name: gpu
    for gpu in (
        Gpu(
            name="H100",
            memory_bytes=80 * 10**9,
            peak_flops=989.4e12,
            hbm_bytes_per_s=3.35e12,
            node_bytes_per_s=450e9,
            network_bytes_per_s=50e9,
            per_node=8,
            gemm=0.74,
            attention=0.35,
            price_per_hour=3.0,
        ),
        Gpu(
            name="H200",
            memory_bytes=141 * 10**9,
            peak_flops=989.4e12,
            hbm_bytes_per_s=4.8e12,
            node_bytes_per_s=450e9,
            network_bytes_per_s=50e9,
            per_node=8,
            gemm=0.74,
            attention=0.35,
            price_per_hour=3.5,
        ),
        _A100,
        replace(_A100, name="A100-40GB", memory_bytes=40 * 10**9, hbm_bytes_per_s=1.555e12),
    )
}


@dataclass(frozen=True)
class Box:
    """A machine for serving; several accelerators count as one memory with their total bandwidth."""

    name: str
    memory_bytes: int
    bytes_per_s: float
    peak_flops: float
    n_gpus: int = 0
    """0: processors compute."""
    link: Link | None = None
    """Of several machines, each with an equal part of memory, bandwidth and peak; None: it is one."""


@dataclass(frozen=True)
class Link:
    """A network between machines of one kind."""

    machines: int
    latency_s: float
    """One way, of a small message between two programs."""
    bytes_per_s: float
    """Each way, of one machine."""


def _gpus(name: str, n: int, memory_gb: int, tb_per_s: float, tflops: float) -> Box:
    return Box(name, n * memory_gb * 10**9, n * tb_per_s * 1e12, n * tflops * 1e12, n)


def _machines(name: str, n: int, memory_gb: int, latency_s: float, gbit_per_s: float) -> Box:
    """Desktops with two channels of DDR5-5600 each."""
    link = Link(n, latency_s, gbit_per_s * 1e9 / 8)
    return Box(name, n * memory_gb * 10**9, n * 89e9, n * 1.5e12, link=link)


BOXES = (
    _gpus("8x H200 141GB", 8, 141, 4.8, 989),
    _gpus("8x H100 80GB", 8, 80, 3.35, 989),
    _gpus("4x H100 80GB", 4, 80, 3.35, 989),
    _gpus("2x H100 80GB", 2, 80, 3.35, 989),
    _gpus("1x H100 80GB", 1, 80, 3.35, 989),
    _gpus("8x A100 40GB", 8, 40, 1.555, 312),
    _gpus("4x RTX 4090 24GB", 4, 24, 1.008, 165),
    Box("Apple M2 Ultra 192GB", 192 * 10**9, 800e9, 27e12),
    Box("Apple M3 Max 96GB", 96 * 10**9, 400e9, 16e12),
    Box("server, 12x DDR5-4800, 384GB", 384 * 10**9, 460e9, 10e12),
    Box("desktop, 2x DDR5-5600, 96GB", 96 * 10**9, 89e9, 1.5e12),
    _machines("3x desktop 32GB, 1 Gbit/s", 3, 32, 200e-6, 1),
    _machines("3x desktop 32GB, 10 Gbit/s", 3, 32, 50e-6, 10),
)
"""Memory, bandwidth and 16-bit peak as published by the makers; latencies of a switched Ethernet are assumed."""


@dataclass(frozen=True)
class Stack:
    """How well a training program uses its hardware."""

    name: str
    hidden: float
    """Fraction of the weight traffic that can overlap with computation."""
    attention: float
    """Speed of its attention relative to ``Gpu.attention``."""
    width_half: float = 900.0
    """d_model at which matrix products reach half the rate of a very wide model's."""


STACKS = {
    stack.name: stack
    for stack in (
        Stack("tuned", hidden=0.8, attention=1.0),  # prefetching, FlashAttention-2 or -3: as fast as DBRX's training
        Stack("foundry", hidden=0.0, attention=0.5),  # LLM Foundry's published table of 2023
    )
}


def parse_cluster(text: str) -> tuple[int, Gpu]:
    """Parse COUNTxNAME, such as 3072xH100, into (count, accelerator).

    Raises:
        ConfigError: another format, an unknown accelerator, or incomplete nodes.
    """
    match = re.fullmatch(r"\s*(\d+)\s*[xX]\s*([A-Za-z0-9-]+)\s*", text)
    if match is None or int(match[1]) < 1:
        raise ConfigError(f"a cluster must look like 3072xH100, got {text!r}")
    name = match[2].upper()
    if name not in GPUS:
        near = difflib.get_close_matches(name, GPUS, n=1, cutoff=0.0)
        raise ConfigError(
            f"the accelerator must be one of {', '.join(GPUS)}; got {match[2]!r}. Did you mean {near[0]}?"
        )
    gpu, count = GPUS[name], int(match[1])
    if count > gpu.per_node and count % gpu.per_node:
        raise ConfigError(f"a cluster must have whole nodes of {gpu.per_node} accelerators: got {count}")
    return count, gpu
