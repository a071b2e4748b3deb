"""``kernels.ops`` in Triton: ``ops.use("triton")``, QUADRIGA_OPS=triton. What has no kernel is the reference's."""

from quadriga.kernels.reference import (
    activate,
    adapted_experts,
    attention,
    causal_conv,
    delta_rule,
    gated,
    grouped_linear,
    norm,
    rope,
)
from quadriga.kernels.triton.experts import experts
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
]
