"""The operations that training needs in addition to those of inference, with hand-written gradients.

    experts               the MoE feed-forward, dropless, one expert at a time so that rows stay in cache
    adapted_experts       the same over frozen weights, with LoRA factors for each expert
    document_attention    causal attention within packed documents, by blocks of queries; backward recomputes it
    linear_cross_entropy  head and loss together; logits are computed for a few hundred tokens at a time

Between their matrix products they call C++ (``fused``). Each equals the plain torch code in ``kernels.reference`` (or
torch's own function) up to rounding, in any float dtype; tests compare values and gradients with naive loops in
float64. They are written for CPUs, where ``ops.experts`` and ``ops.adapted_experts`` are the first two. On a GPU, a
grouped product without host synchronisation and torch's fused attention are used instead.
"""

from quadriga.kernels.training.adapted_experts import adapted_experts
from quadriga.kernels.training.document_attention import document_attention
from quadriga.kernels.training.expert_layer import experts
from quadriga.kernels.training.token_loss import capped_losses, linear_cross_entropy, token_losses

__all__ = ["adapted_experts", "capped_losses", "document_attention", "experts", "linear_cross_entropy", "token_losses"]
