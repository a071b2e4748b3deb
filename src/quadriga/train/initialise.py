"""The initial configuration and weights of a run's model.

New matrices are drawn from N(0, init_std^2); the projections back into the residual stream (wo, w_down) are divided by
sqrt(2 n_layers), so that its variance does not grow with depth (GPT-2; LLM Foundry does so for DBRX's family). Norms
are 1 (DBRX's first official file drew them from N(0, 0.02), a mistake). Each parameter has its own random generator,
seeded with its name, so weights depend neither on the order of creation nor on the number of ranks.
"""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from quadriga.errors import ConfigError
from quadriga.hub import catalogue
from quadriga.io.open import open_checkpoint
from quadriga.model import families
from quadriga.model.config import ModelConfig, MoESpec, RopeSpec, uniform
from quadriga.model.weight_map import parameter_shapes
from quadriga.nn.load import load_parameters
from quadriga.train.config import ModelSection


def model_config(section: ModelSection, n_vocab: int, end_ids: tuple[int, ...] = ()) -> ModelConfig:
    """The configuration of a new model: a preset with the section's sizes replacing its own.

    Args:
        n_vocab: size of the corpus's vocabulary; the embedding table gets at least as many rows.
        end_ids: the ids that end a text.

    Raises:
        ConfigError: unknown preset, impossible sizes, or an embedding table smaller than the vocabulary.
    """
    assert section.preset is not None, "ModelSection checks that preset or start is given"
    base = families.preset(section.preset)
    rows = section.vocab_size or -(-n_vocab // 64) * 64
    if rows < n_vocab:
        raise ConfigError(f"model.vocab_size must be at least the corpus's {n_vocab} ids, got {rows}")
    d_model = section.d_model or base.d_model
    layer = base.only_layer("a model made from a preset")
    attention = layer.attention
    n_heads = section.n_heads or attention.n_heads
    ffn = replace(layer.ffn, d_ff=section.d_ff or layer.ffn.d_ff * d_model // base.d_model)
    if isinstance(ffn, MoESpec):
        ffn = replace(ffn, n_experts=section.n_experts or ffn.n_experts, top_k=section.top_k or ffn.top_k)
    elif section.n_experts or section.top_k:
        raise ConfigError(f"model.n_experts and model.top_k need a preset with experts; {section.preset} is dense")
    position = attention.position
    if section.rope_theta is not None:
        if not isinstance(position, RopeSpec):
            raise ConfigError(f"model.rope_theta needs a preset with rotary positions; {section.preset} has none")
        position = replace(position, theta=section.rope_theta)
    mixer = replace(
        attention,
        n_heads=n_heads,
        n_kv_heads=section.n_kv_heads or min(attention.n_kv_heads, n_heads),
        head_dim=section.head_dim or d_model // n_heads,
        position=position,
    )
    return replace(
        base,
        vocab_size=rows,
        d_model=d_model,
        max_seq_len=section.max_seq_len or base.max_seq_len,
        layers=uniform(replace(layer, mixer=mixer, ffn=ffn), section.n_layers or base.n_layers),
        bos_id=None,
        eos_ids=end_ids,
        pad_id=None,
    )


def new_parameters(config: ModelConfig, *, seed: int, std: float) -> dict[str, Tensor]:
    """Draw the float32 weights of a new model, as the module docstring says; name -> tensor."""

    def fill(name: str, shape: tuple[int, ...]) -> Tensor:
        if name.endswith("norm.weight"):
            return torch.ones(shape)
        if name.endswith(("fuse.weight", "router.correction", ".bias", ".sinks")) or ".b_" in name:
            return torch.zeros(shape)
        digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))
        back = name.endswith((".attn.wo.weight", ".w_down"))
        return torch.empty(shape).normal_(0.0, std / (2 * config.n_layers) ** 0.5 if back else std, generator=generator)

    return {name: fill(name, shape) for name, shape in parameter_shapes(config).items()}


def start_from(source: str) -> tuple[ModelConfig, dict[str, Tensor]]:
    """The configuration and float32 weights of a checkpoint of any format; ``source`` is a path or a catalogue name."""
    path = Path(source)
    checkpoint = open_checkpoint(path if path.exists() else catalogue.resolve(source))
    try:
        return checkpoint.config, load_parameters(checkpoint, dtype=torch.float32)
    finally:
        checkpoint.close()
