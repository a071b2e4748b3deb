"""The ops on a processor: plain torch, and in place of the experts the passes that are quick there.

A captured step of inference does not come here: it runs in the C++ kernels as a whole (``kernels.cpu.program``). What
does is training, LoRA, scoring in a plain dtype, and every model that ``dtype=`` asks for.
"""

from quadriga.kernels.reference import (
    activate,
    attention,
    causal_conv,
    delta_rule,
    gated,
    grouped_linear,
    norm,
    rope,
    route,
    state_space,
)
from quadriga.kernels.training.adapted_experts import adapted_experts
from quadriga.kernels.training.expert_layer import experts

__all__ = [
    "activate",
    "adapted_experts",
    "attention",
    "causal_conv",
    "delta_rule",
    "experts",
    "gated",
    "grouped_linear",
    "norm",
    "rope",
    "route",
    "state_space",
]
