"""Run a step's micro-steps through the stages of a pipeline, by torch.distributed.pipelining.

Micro-steps are the pipeline's micro-batches: one forward, one backward in turn (1F1B), or all forwards first where
there are fewer of them than stages. A schedule cuts tensors, but a batch of packed documents is more than tensors of
equal parts: so what it cuts is the list of micro-steps' numbers, and each stage looks up its own batch. A router's
losses arise in every stage: they join the hidden states on their way, as in Megatron-LM, so that the backward pass of
the hidden states is theirs too.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleGPipe

from quadriga.train.batch import TrainingBatch
from quadriga.train.parallel import ModelWithLoss


class Pipeline:
    """A rank's stage at work.

    Args:
        module: the model's layers of this stage, sharded.
        dtype: of the hidden states that are passed on.
        device: of the rank.
    """

    def __init__(self, module: ModelWithLoss, dtype: torch.dtype, device: torch.device) -> None:
        self.module, self.dtype, self.device = module, dtype, device
        self._schedules: dict[tuple[int, int], Schedule1F1B | ScheduleGPipe] = {}
        self._batches: Sequence[TrainingBatch] = ()
        self._sums: dict[str, Tensor] = {}

    def backward(self, batches: Sequence[TrainingBatch], weight: Tensor) -> dict[str, Tensor]:
        """Accumulate the gradient of the batches' summed loss / weight; returns this stage's metrics, summed."""
        stage, numbers = self.module.layout.stage, torch.arange(len(batches))
        schedule = self._schedule(len(batches), len(batches[0].tokens))
        self._batches, self.module.loss_scale = batches, weight.reciprocal()
        self._sums = {}
        given = (numbers,) if stage.first else ()
        target = numbers if stage.last else None
        schedule.step(*given, target=target, return_outputs=False, number=numbers)
        self._batches = ()
        return self._sums

    def micro_step(self, entry: Tensor, number: int) -> Tensor:
        """Forward pass of one micro-step: hidden states, or in the last stage its loss / weight."""
        batch = self._batches[number]
        if not self.module.layout.stage.first:
            batch = replace(batch, entry=entry)
        computed, metrics = self.module(batch)
        for name, value in self.whole(metrics).items():
            self._sums[name] = self._sums[name] + value if name in self._sums else value
        out: Tensor = computed * self.module.loss_scale if self.module.layout.stage.last else computed
        last = number == len(self._batches) - 1
        # Backward passes have the same order.
        out.register_hook(lambda _: self.module.sum_over_copies(last))  # type: ignore[no-untyped-call]
        return out

    def whole(self, metrics: dict[str, Tensor]) -> dict[str, Tensor]:
        """Metrics of a stage as every stage has them: zero where they arise in another."""
        stage, config = self.module.layout.stage, self.module.model.config
        found = {"loss": torch.zeros((), device=self.device)}
        if config.is_moe:
            n_experts = config.moe_layers[0][1].n_experts
            zeros = torch.zeros(stage.n_mixtures, n_experts, device=self.device)
            found |= {"balance": torch.zeros_like(found["loss"]), "router_z": torch.zeros_like(found["loss"])}
            found["expert_counts"] = zeros
        found |= metrics
        if "expert_counts" in metrics:
            found["expert_counts"] = stage.over_all_mixtures(metrics["expert_counts"])
        return found

    def _schedule(self, n_micro: int, n_tokens: int) -> Schedule1F1B | ScheduleGPipe:
        """The schedule of so many micro-steps of so many tokens of this rank."""
        key = (n_micro, n_tokens)
        if key not in self._schedules:
            stage = self.module.layout.stage
            hidden = torch.empty(n_tokens, self.module.model.config.d_model, dtype=self.dtype, device="meta")
            hidden.requires_grad_()
            number, loss = torch.empty(1, dtype=torch.int64, device="meta"), torch.empty((), device="meta")
            torch_stage = PipelineStage(
                _Submodule(self), stage.index, stage.count, self.device, group=stage.line,
                input_args=number if stage.first else hidden, output_args=loss if stage.last else hidden,
            )  # fmt: skip
            kind = Schedule1F1B if n_micro >= stage.count else ScheduleGPipe
            self._schedules = {key: kind(torch_stage, n_micro, loss_fn=_first, scale_grads=False)}
        return self._schedules[key]


class _Submodule(nn.Module):
    """What a schedule calls. It holds no module: FSDP2 reduces every micro-step's gradients, as without a pipeline."""

    def __init__(self, pipeline: Pipeline) -> None:
        super().__init__()
        self.pipeline = [pipeline]

    def forward(self, entry: Tensor, number: Tensor) -> Tensor:
        return self.pipeline[0].micro_step(entry, int(number))


def _first(loss: Tensor, number: Tensor) -> Tensor:
    """The loss that the last stage computed."""
    return loss


@torch.no_grad()
def passed(module: ModelWithLoss, batch: TrainingBatch) -> tuple[Tensor | None, dict[str, Any]]:
    """One forward pass of a batch, through all stages if there are several: the last stage's result, elsewhere None."""
    stage = module.layout.stage
    if stage.count == 1:
        out, metrics = module(batch)
        return out, metrics
    if not stage.first:
        width = module.model.config.d_model
        entry = torch.empty(len(batch.tokens), width, dtype=module.layout.dtype, device=batch.tokens.device)
        dist.recv(entry, group=stage.line, group_src=stage.index - 1)
        batch = replace(batch, entry=entry)
    out, metrics = module(batch)
    if stage.last:
        return out, metrics
    dist.send(out.contiguous(), group=stage.line, group_dst=stage.index + 1)
    return None, metrics
