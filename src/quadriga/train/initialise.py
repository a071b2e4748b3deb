"""A run's model before its first step: its configuration and its weights.

New matrices are N(0, init_std); projections back into the residual stream (wo, w_down) are divided by
sqrt(2 n_layers), so that the stream's variance does not grow with depth (GPT-2; LLM Foundry does so for DBRX's family);
norms are 1 (DBRX's first official file drew them from N(0, 0.02) too: do not). Each parameter has a generator of its
own, seeded by its name: weights do not depend on the order or the ranks they are made in.
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


def model_config(section: ModelSection, n_words: int, end_ids: tuple[int, ...] = ()) -> ModelConfig:
    """The configuration of a new model: a preset with the section's sizes in place of its own.

    Args:
        n_words: ids the corpus's vocabulary has; the table gets at least as many rows.
        end_ids: the ids that end a text in it.

    Raises:
        ConfigError: an unknown preset, sizes that cannot be, or a table too small for the vocabulary.
    """
    assert section.preset is not None, "a section has a preset or a start"
    base = families.preset(section.preset)
    rows = section.vocab_size or -(-n_words // 64) * 64
    if rows < n_words:
        raise ConfigError(f"model.vocab_size must be at least the corpus's {n_words} ids, got {rows}")
    d_model = section.d_model or base.d_model
    layer = base.only_layer("a model made from a preset")
    n_heads = section.n_heads or layer.mixer.n_heads
    ffn = replace(layer.ffn, d_ff=section.d_ff or layer.ffn.d_ff * d_model // base.d_model)
    if isinstance(ffn, MoESpec):
        ffn = replace(ffn, n_experts=section.n_experts or ffn.n_experts, top_k=section.top_k or ffn.top_k)
    elif section.n_experts or section.top_k:
        raise ConfigError(f"model.n_experts and top_k go with a preset that has experts; {section.preset} is dense")
    position = layer.mixer.position
    if section.rope_theta is not None:
        if not isinstance(position, RopeSpec):
            raise ConfigError(f"model.rope_theta goes with rotary positions; {section.preset} has none")
        position = replace(position, theta=section.rope_theta)
    mixer = replace(
        layer.mixer,
        n_heads=n_heads,
        n_kv_heads=section.n_kv_heads or min(layer.mixer.n_kv_heads, n_heads),
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
    """Float32 weights for a model that will be trained; see the module docstring."""

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
    """The configuration and float32 weights of a checkpoint of any kind: a path or a catalogue name."""
    path = Path(source)
    checkpoint = open_checkpoint(path if path.exists() else catalogue.resolve(source))
    try:
        return checkpoint.config, load_parameters(checkpoint, dtype=torch.float32)
    finally:
        checkpoint.close()
