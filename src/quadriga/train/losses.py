"""The pre-training objective: next-token cross-entropy and the routers' auxiliary losses.

    total = sum_n w_n CE_n  +  W (balance_weight * balance + z_weight * z)      W: weight of the micro-step's targets

The trainer divides by the weight of the global batch, so the balance loss enters as its mean over micro-steps. Balance
and z losses are computed over all tokens of a micro-step on all ranks: counts are summed over the ranks once per
micro-step, in one message for all layers, and each rank adds the share of its own tokens. So value and gradient are the
same for any number of ranks, also with idle experts or ranks. Documents are balanced where they are: no rank may have a
part of one.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from quadriga.errors import ConfigError
from quadriga.kernels import training
from quadriga.model.config import ModelConfig
from quadriga.nn.linear import whole
from quadriga.nn.moe import RouterStats
from quadriga.nn.router_loss import Form, Usage, balance_loss, document_balance
from quadriga.nn.transformer import Transformer
from quadriga.train.batch import TrainingBatch
from quadriga.train.config import RouterSection
from quadriga.train.context import DocumentContext
from quadriga.train.world import World


def final_hidden(model: Transformer, batch: TrainingBatch) -> tuple[Tensor, list[RouterStats]]:
    """Run the model up to the last norm: (hidden states (N, D), router statistics of each MoE layer)."""
    hidden, stats = through_layers(model, batch)
    return model.final_norm(hidden), stats


def through_layers(model: Transformer, batch: TrainingBatch) -> tuple[Tensor, list[RouterStats]]:
    """Run the layers that this rank has: (hidden states (N, D), router statistics of each of its MoE layers)."""
    entry = model.embedded(batch.tokens) if batch.entry is None else batch.entry
    return model.through(entry, DocumentContext(batch))


def head_weight(model: Transformer) -> Tensor:
    """The matrix that turns final hidden states into logits (V, D).

    Raises:
        ConfigError: the head has a bias.
    """
    head = model.embed if model.lm_head is None else model.lm_head
    if head.bias is not None:
        raise ConfigError("training needs a head without a bias: the fused loss multiplies by the matrix alone")
    return whole(head.weight)


def logits_of(config: ModelConfig, hidden: Tensor, weight: Tensor) -> Tensor:
    """Logits (N, V), at least float32, of final hidden states (N, D) and rows of the head (V, D)."""
    made = (hidden @ weight.t()).to(torch.promote_types(hidden.dtype, torch.float32)) * config.logit_scale
    return made if config.logit_cap is None else config.logit_cap * torch.tanh(made / config.logit_cap)


class NextToken:
    """Next-token cross-entropy with balance and z losses; an ``Objective``."""

    def __init__(self, model: ModelConfig, section: RouterSection, world: World) -> None:
        self.world = world
        self.balance_weight = self.z_weight = 0.0
        self.balance_form: Form = section.balance_form
        self.top_k = 1
        if model.is_moe:
            ffn = model.only_moe("the router's losses")
            self.top_k = ffn.top_k
            self.balance_weight = ffn.aux_loss_weight if section.balance_loss is None else section.balance_loss
            self.z_weight = section.z_loss

    def __call__(self, model: Transformer, batch: TrainingBatch) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss and metrics of a batch, as ``Objective`` specifies."""
        hidden, stats = final_hidden(model, batch)
        weight, scale = head_weight(model), model.config.logit_scale
        if (cap := model.config.logit_cap) is not None:
            losses = training.capped_losses(
                hidden, weight, batch.targets, cap=cap, logit_scale=scale, kept=batch.with_target
            )
            loss = losses.sum() if batch.weights is None else (losses * batch.weights).sum()
        else:
            loss, _ = training.linear_cross_entropy(
                hidden, weight, batch.targets, batch.weights, logit_scale=scale, kept=batch.with_target
            )
        metrics = {"loss": loss.detach()}
        if stats:
            extra, router_metrics = self.router_losses(stats, batch)
            loss = loss + extra
            metrics |= router_metrics
        return loss, metrics

    def on_the_way(self, stats: Sequence[RouterStats], batch: TrainingBatch) -> tuple[Tensor, dict[str, Tensor]]:
        """The routers' part of the loss in a stage without the head; see ``StagedObjective``."""
        return self.router_losses(stats, batch)

    def router_losses(self, stats: Sequence[RouterStats], batch: TrainingBatch) -> tuple[Tensor, dict[str, Tensor]]:
        """Balance and z losses: (the term to add to the summed loss, metrics to sum)."""
        mask = batch.real()
        usage = Usage.of(stats, mask)
        own = torch.cat(
            [usage.counts.flatten(), usage.n_tokens[None], usage.n_tokens.new_tensor([batch.target_weight()])]
        )
        together = self.world.sum(own, None if batch.stage is None else batch.stage.ranks)
        counts = together[:-2].view_as(usage.counts)
        n_tokens, weight = together[-2].clamp(min=1), together[-1]
        if self.balance_form == "document":
            balance = document_balance(stats, mask, batch.bounds) / n_tokens
        else:
            balance = balance_loss(counts, usage.probs, n_tokens, self.top_k, self.balance_form)
        if batch.stage is not None:
            balance = balance * batch.stage.mixture_share  # it is a mean over the layers
        squares = [layer.logits.logsumexp(-1).square() for layer in stats]
        z = torch.stack([torch.where(mask, square, 0.0).sum() for square in squares]).sum() / n_tokens
        extra = weight * (self.balance_weight * balance + self.z_weight * z)
        metrics = {
            "balance": (weight * balance).detach(),
            "router_z": (weight * z).detach(),
            "expert_counts": usage.counts.detach(),
        }
        return extra, metrics
