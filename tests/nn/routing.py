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

    Its ``probs`` are what it would have chosen by: corrected scores, where the router has a correction. In place of
    logits it returns how far each chosen expert lags behind (N, k): see :func:`lags`.
    """

    def __init__(self, router: Router, stats: RouterStats) -> None:
        super().__init__()
        self.router, self.ids, self.logits = router, stats.expert_ids, stats.logits

    def forward(self, x: Tensor) -> ops.Routing:
        free, how = self.router(x), self.router.how
        if how.score == "sparse_mixer":  # what is near a chosen expert is a choice too
            weights = reference.mix_sparsely(free.logits, self.ids, how, self.logits.to(free.logits.dtype))
            return ops.Routing(self.ids, weights, free.logits, lags(free.logits, self.ids, how))
        scores = reference.score(free.logits, how)
        chosen = reference.weigh(scores.gather(1, self.ids), how)
        if self.router.expert_scale is not None:
            chosen = chosen * self.router.expert_scale[self.ids]
        by = scores if self.router.correction is None else scores + self.router.correction
        return ops.Routing(self.ids, chosen, by, lags(by, self.ids, how))


def lags(by: Tensor, ids: Tensor, how: ops.Choice) -> Tensor:
    """(N, k) how much more an expert lacks to be among the k best; 0: it is one of them.

    Of groups, an expert lags by what its group lacks to be open, and behind the k best of the groups that were then
    open: those of the chosen experts, and the best of the others where there is room for more.

    Args:
        by: (N, E) corrected scores. ids: (N, k).
    """
    behind_groups = torch.zeros_like(by.gather(1, ids))
    if how.n_groups > 1:
        groups = by.view(len(by), how.n_groups, -1)
        worth = groups.topk(2 if how.group_worth == "two_best" else 1, dim=-1).values.sum(-1)
        least = worth.topk(how.top_k_groups, dim=-1).values[:, -1:]
        own = ids // groups.shape[-1]
        behind_groups = (least - worth.gather(1, own)).clamp(min=0)
        first = worth.scatter(1, own, float("inf")).topk(how.top_k_groups, dim=-1).indices
        closed = torch.ones_like(worth, dtype=torch.bool).scatter(1, first, False)
        by = groups.masked_fill(closed[..., None], float("-inf")).flatten(1)
    kth_best = by.topk(ids.shape[1], dim=-1).values[:, -1:]
    return torch.maximum(behind_groups, (kth_best - by.gather(1, ids)).clamp(min=0))


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
    found = [0.0]
    for mine, wide in zip(choices, free, strict=True):
        # Where another number of experts was chosen, nothing was forced, and the logits are logits.
        forced = wide.logits if torch.equal(mine.expert_ids, wide.expert_ids) else _behind_k_best(mine, wide)
        found.append(float(forced.max() / wide.probs.std()))
    return max(found)


def _behind_k_best(mine: RouterStats, wide: RouterStats) -> Tensor:
    kth_best = wide.probs.topk(mine.expert_ids.shape[1], dim=-1).values[:, -1:]
    return (kth_best - wide.probs.gather(1, mine.expert_ids)).clamp(min=0)


def row_errors(ours: Tensor, theirs: Tensor) -> Tensor:
    """Root mean square difference of each row (T,), in units of the reference's standard deviation."""
    return (ours - theirs).square().mean(-1).sqrt() / theirs.std()
