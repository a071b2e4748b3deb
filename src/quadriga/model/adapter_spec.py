"""What a low-rank adapter changes: its rank, its strength, and which matrices. No torch.

W x  becomes  W x + alpha / rank * B (A x)          A (rank, in), B (out, rank); experts have a pair each

attention    wqkv, wo, and what a recurrent layer has in their place         router       the gate
             (of latents wq, or wq_a and wq_b, wkv_a, wo: the matrices a head has for itself stay)
experts      w_gate, w_up, w_down of every routed expert
shared       the same of the network beside them that every token visits
ffn          the same of a dense layer
embeddings   the table, and the head where they are tied
head         lm_head
"""

from __future__ import annotations

from dataclasses import dataclass

from quadriga.errors import ConfigError
from quadriga.model.config import ModelConfig
from quadriga.model.weight_map import Shape, parameter_shapes

TARGETS = ("attention", "router", "experts", "shared", "ffn", "embeddings", "head")


@dataclass(frozen=True, kw_only=True)
class LoraSpec:
    """A low-rank adapter before it has numbers."""

    rank: int
    alpha: float
    targets: tuple[str, ...] = ("attention", "experts")
    dropout: float = 0.0
    """Share of the inputs of A left out at random, in training only."""

    def __post_init__(self) -> None:
        if not 1 <= self.rank <= 4096:
            raise ConfigError(f"lora.rank must be between 1 and 4096, got {self.rank}")
        if not self.alpha > 0:
            raise ConfigError(f"lora.alpha must be above 0, got {self.alpha}")
        if not 0 <= self.dropout < 1:
            raise ConfigError(f"lora.dropout must be from 0 to below 1, got {self.dropout}")
        unknown = [target for target in self.targets if target not in TARGETS]
        if unknown or not self.targets:
            raise ConfigError(f"lora.targets must be some of {', '.join(TARGETS)}; got {list(self.targets)}")

    @property
    def scale(self) -> float:
        """What B (A x) is multiplied by."""
        return self.alpha / self.rank


def target_of(name: str) -> str | None:
    """The target a parameter belongs to; None for norms, biases and fuse numbers, which no adapter changes."""
    last = name.rsplit(".", 1)[-1]
    if last == "weight" and any(part in name for part in (".attn.w", ".conv.w_", ".delta.w_", ".mamba.w_")):
        return None if name.endswith((".wk_b.weight", ".wv_b.weight")) else "attention"
    if name.endswith("router.weight"):
        return "router"
    if last in ("w_gate", "w_up", "w_down"):
        return "shared" if ".moe.shared." in name else "experts" if ".moe." in name else "ffn"
    return {"embed.weight": "embeddings", "lm_head.weight": "head"}.get(name)


def targets_of(config: ModelConfig) -> set[str]:
    """The targets a model has parameters of."""
    return {target for name in parameter_shapes(config) if (target := target_of(name)) is not None}


def adapted_shapes(config: ModelConfig, spec: LoraSpec) -> dict[str, tuple[Shape, Shape]]:
    """Parameter -> the shapes of its factors (A, B), in the order of a forward pass.

    Raises:
        ConfigError: a target this model does not have.
    """
    wrong = sorted(set(spec.targets) - targets_of(config))
    if wrong:
        kind = "a mixture of experts" if config.is_moe else "a dense model"
        tied = " with tied embeddings (its head is the table: target embeddings)" if config.tied_embeddings else ""
        raise ConfigError(f"lora.targets names {', '.join(wrong)}, which this model has not: it is {kind}{tied}")
    r = spec.rank
    return {
        name: ((*shape[:-2], r, shape[-1]), (*shape[:-1], r))
        for name, shape in parameter_shapes(config).items()
        if target_of(name) in spec.targets
    }
