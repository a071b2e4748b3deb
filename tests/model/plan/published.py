"""Published training runs, with which the planner's times are compared. MFU in percent, as counted by the source."""

from __future__ import annotations

from dataclasses import dataclass, replace

from quadriga.model.config import AlibiSpec, AttentionSpec, DenseSpec, ModelConfig, NormSpec, uniform_model
from quadriga.model.families import PRESETS
from quadriga.model.plan.training import Work
from tests.configs import changed


@dataclass(frozen=True)
class Run:
    """A measured run: (ranks of one full shard group, the work of a step, MFU)."""

    name: str
    config: ModelConfig
    ranks: int
    work: Work
    mfu: float


def mpt(d_model: int, n_layers: int, n_heads: int, seq_len: int) -> ModelConfig:
    """A model of LLM Foundry's benchmark: learned nothing, ALiBi, GELU, four times as wide inside."""
    return uniform_model(
        family="mpt",
        vocab_size=50368,
        d_model=d_model,
        n_layers=n_layers,
        max_seq_len=seq_len,
        norm=NormSpec(kind="layer"),
        mixer=AttentionSpec(n_heads=n_heads, n_kv_heads=n_heads, head_dim=d_model // n_heads, position=AlibiSpec()),
        ffn=DenseSpec(d_ff=4 * d_model, activation="gelu", gated=False),
        tied_embeddings=True,
    )


_MPT = {
    "70b": (8192, 80, 64),
    "30b": (7168, 48, 56),
    "13b": (5120, 40, 40),
    "7b": (4096, 32, 32),
    "3b": (2560, 32, 20),
    "1b": (2048, 24, 16),
}

# mosaicml/llm-foundry scripts/train/benchmarking/README.md, "H100 80GB BF16": model, sequence, GPUs, micro-batch,
# accumulation, activation checkpointing, MFU.
FOUNDRY = [
    Run(f"{name} T={seq} on {ranks}", mpt(*_MPT[name], seq), ranks, Work(seq, rows, accumulate, recompute), mfu)
    for name, seq, ranks, rows, accumulate, recompute, mfu in (
        ("70b", 2048, 64, 8, 4, "full", 42.57),
        ("70b", 2048, 32, 2, 16, "full", 36.15),
        ("30b", 2048, 8, 3, 21, "full", 38.11),
        ("30b", 2048, 32, 14, 3, "full", 43.92),
        ("30b", 8192, 8, 1, 21, "full", 29.92),
        ("13b", 2048, 8, 2, 1, "none", 39.79),
        ("13b", 2048, 64, 2, 1, "none", 39.86),
        ("13b", 32768, 8, 1, 3, "full", 31.68),
        ("13b", 4096, 8, 10, 3, "full", 41.6),
        ("7b", 2048, 8, 6, 1, "none", 46.44),
        ("7b", 8192, 8, 8, 2, "full", 37.14),
        ("7b", 65536, 8, 1, 2, "full", 28.59),
        ("3b", 2048, 64, 6, 3, "none", 40.8),
        ("3b", 512, 8, 40, 6, "none", 46.32),
        ("1b", 2048, 8, 14, 1, "none", 41.82),
        ("1b", 8192, 8, 3, 4, "none", 37.73),
    )
]

_LLAMA = PRESETS["llama2-70b"]
_LLAMA3 = replace(_LLAMA, vocab_size=128256, max_seq_len=8192)

# pytorch/torchtitan docs/performance.md (2024): 64 A100, FSDP2, local batch 1 or 2.
TORCHTITAN = [
    Run(
        "Llama 2 13B",
        changed(
            _LLAMA,
            d_model=5120,
            n_layers=40,
            mixer=replace(_LLAMA.layers[0].mixer, n_heads=40, n_kv_heads=40),
            ffn=DenseSpec(d_ff=13824, activation="silu"),
        ),
        64,
        Work(4096, 2, 1, "none"),
        61.1,
    ),
    Run(
        "Llama 3 8B",
        changed(
            _LLAMA3,
            d_model=4096,
            n_layers=32,
            mixer=replace(_LLAMA3.layers[0].mixer, n_heads=32, n_kv_heads=8),
            ffn=DenseSpec(d_ff=14336, activation="silu"),
        ),
        64,
        Work(8192, 1, 1, "selective"),
        58.2,
    ),
    Run("Llama 3 70B", _LLAMA3, 64, Work(8192, 1, 1, "full"), 51.7),
    Run("Llama 2 70B", _LLAMA, 64, Work(4096, 2, 1, "full"), 50.5),
]

MIXTRAL_MFU = 468 / 989.4 * 100
"""NVIDIA/Megatron-LM megatron/core/transformer/moe/README.md: 468 TFLOPS a H100 for Mixtral 8x7B in bf16."""
