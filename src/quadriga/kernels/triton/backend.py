"""``kernels.ops`` in Triton: ``ops.use("triton")``, QUADRIGA_OPS=triton. What has no kernel is the reference's."""

from quadriga.kernels.reference import (
    activate,
    adapted_experts,
    attention,
    causal_conv,
    delta_rule,
    gated,
    norm,
    rope,
    state_space,
)
from quadriga.kernels.triton.experts import experts
from quadriga.kernels.triton.gradients import grouped_linear
from quadriga.kernels.triton.router import route

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
