"""What training needs beside the ops of inference: four functions with hand-written gradients.

    experts                 the mixture's feed-forward, dropless, one expert at a time inside the processor's cache
    adapted_experts         the same over frozen weights, each expert with low-rank factors of its own
    document_attention      causal attention within packed documents, block by block, nothing of it kept for backward
    linear_cross_entropy    head and loss together; logits exist for a few hundred tokens at a time

What lies between their matrix products is C++ (``between``). Each computes what the plain statement in
``kernels.reference`` (or torch's own function) computes, to rounding, in any float dtype; tests hold values and
gradients to naive loops in float64. They are written for processors, where ``ops.experts`` and ``ops.adapted_experts``
are the first two; on a GPU a grouped product that asks the host for nothing and torch's fused attention take
their places.
"""

from quadriga.kernels.training.adapted_experts import adapted_experts
from quadriga.kernels.training.document_attention import document_attention
from quadriga.kernels.training.expert_layer import experts
from quadriga.kernels.training.token_loss import linear_cross_entropy, token_losses

__all__ = ["adapted_experts", "document_attention", "experts", "linear_cross_entropy", "token_losses"]
