"""Near ties of routing: rounding may choose another expert, and then everything after it is another number.

So what a backend chose is given to the exact model, whose every row must then be the same; and each choice must have
been a near tie, or the exact model's own.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from quadriga.kernels import ops, reference
from quadriga.model.config import ModelConfig
from quadriga.nn.context import PackedContext
from quadriga.nn.moe import Router, RouterStats
from quadriga.nn.transformer import ModelOutput, Transformer


class ForcedRouter(nn.Module):
    """A router whose choice of experts is given, so that two precisions can be compared where a near tie flips.

    Its ``probs`` are what it would have chosen by: corrected scores, where the router has a correction.
    """

    def __init__(self, router: Router, stats: RouterStats) -> None:
        super().__init__()
        self.router, self.ids, self.logits = router, stats.expert_ids, stats.logits

    def forward(self, x: Tensor) -> ops.Routing:
        free, how = self.router(x), self.router.how
        if how.score == "sparse_mixer":  # what is near a chosen expert is a choice too
            weights = reference.mix_sparsely(free.logits, self.ids, how, self.logits.to(free.logits.dtype))
            return ops.Routing(self.ids, weights, free.logits, free.logits)
        scores = reference.score(free.logits, how)
        chosen = reference.weigh(scores.gather(1, self.ids), how)
        return ops.Routing(self.ids, chosen, reference.standing(scores, how, self.router.correction), free.logits)


@torch.inference_mode()
def exact(
    model: Transformer, config: ModelConfig, tokens: Sequence[int], choices: Sequence[RouterStats]
) -> ModelOutput:
    """float64 results of a model of ``config`` with the (rounded) weights of ``model`` and given expert choices."""
    wide = Transformer.from_parameters(config, {name: t.double() for name, t in model.state_dict().items()})
    mixtures = [layer for layer in wide.layers if layer.moe is not None]
    for layer, stats in zip(mixtures, choices, strict=False):
        layer.moe.router = ForcedRouter(layer.moe.router, stats)
    return wide(torch.tensor(tokens), PackedContext([len(tokens)]), with_stats=True)


def worst_lag(choices: Sequence[RouterStats], free: Sequence[RouterStats]) -> float:
    """How much less probable a chosen expert was than the least of the k most probable ones, at worst.

    Args:
        free: of :func:`exact`, whose probabilities are what it would have chosen by.

    Returns:
        the lag in units of the exact probabilities' standard deviation; 0: the k most probable ones were chosen.
    """
    lags = [0.0]
    for mine, wide in zip(choices, free, strict=True):
        kth_best = wide.probs.topk(mine.expert_ids.shape[1], dim=-1).values[:, -1:]
        lag = (kth_best - wide.probs.gather(1, mine.expert_ids)).clamp(min=0)
        lags.append(float(lag.max() / wide.probs.std()))
    return max(lags)


def row_errors(ours: Tensor, theirs: Tensor) -> Tensor:
    """Root mean square difference of each row (T,), in units of the reference's standard deviation."""
    return (ours - theirs).square().mean(-1).sqrt() / theirs.std()
