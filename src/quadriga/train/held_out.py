"""Evaluation during a run: the loss on held-out text by domain, and sample continuations."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor

from quadriga.nn.moe import RouterStats
from quadriga.nn.transformer import Transformer
from quadriga.train.batch import IGNORE, BatchSource, TrainingBatch
from quadriga.train.losses import final_hidden, head_weight, logits_of
from quadriga.train.parallel import ModelWithLoss
from quadriga.train.pipeline import passed
from quadriga.train.world import World

if TYPE_CHECKING:
    from quadriga.text.tokenizer import Tokenizer


@dataclass(frozen=True)
class HeldOutLoss:
    """The held-out loss of one domain."""

    loss: float
    """Nats per token."""
    bits_per_byte: float | None
    """The loss in bits per byte of text, comparable between vocabularies; None if the number of bytes is not known."""

    @property
    def shown(self) -> float:
        """The number that screens and trackers show."""
        return self.loss

    def values(self) -> dict[str, float]:
        """Name -> value, for the metrics file."""
        found = {"loss": round(self.loss, 5)}
        return found if self.bits_per_byte is None else {**found, "bits_per_byte": round(self.bits_per_byte, 5)}


@dataclass(frozen=True)
class HeldOutReward:
    """What the most probable answers to held-out questions are worth (``train.rollouts``)."""

    reward: float
    """Mean over questions."""
    n: int
    """Number of questions."""

    @property
    def shown(self) -> float:
        """See :class:`HeldOutLoss`."""
        return self.reward

    def values(self) -> dict[str, float]:
        """See :class:`HeldOutLoss`."""
        return {"reward": round(self.reward, 5), "questions": self.n}


HeldOut = HeldOutLoss | HeldOutReward


@torch.no_grad()
def held_out_losses(module: ModelWithLoss, sources: Mapping[str, BatchSource], world: World) -> dict[str, HeldOutLoss]:
    """Mean loss of each domain under the objective of ``module``. All ranks must call this; they share the rows."""
    module.eval()
    found, layout = {}, module.layout
    for domain, source in sources.items():
        n_rows = source.n_rows(0)
        layout.check_rows(layout.n_row_groups, layout.n_row_groups, source.seq_len(0))
        share = -(-n_rows // layout.n_row_groups)
        first = layout.row_group * share
        counts = first < n_rows  # ranks without rows compute too: a sharded model needs every rank
        rows = source.rows(0, first if counts else 0, min(first + share, n_rows) if counts else 1)
        batch = layout.own(rows).to(world.device)
        _, metrics = passed(module, batch)
        own = torch.zeros(2, dtype=torch.float64)
        if counts and layout.stage.last:
            own = torch.stack([metrics["loss"].double().cpu(), torch.tensor(batch.target_weight()).double()])
        total, weight = world.sum(own.to(world.device)).tolist()
        loss = total / max(weight, 1.0)
        found[domain] = HeldOutLoss(loss, _bits_per_byte(loss, source))
    module.train()
    return found


def _bits_per_byte(loss: float, source: BatchSource) -> float | None:
    tokens, n_bytes = getattr(source, "n_tokens", None), getattr(source, "n_text_bytes", None)
    return loss / math.log(2) * tokens / n_bytes if tokens and n_bytes else None


class _LastLogits:
    """Used in place of an objective: returns the logits after the last token."""

    def on_the_way(self, stats: Sequence[RouterStats], batch: TrainingBatch) -> tuple[Tensor, dict[str, Tensor]]:
        return torch.zeros(()), {}

    def __call__(self, model: Transformer, batch: TrainingBatch) -> tuple[Tensor, dict[str, Tensor]]:
        hidden, _ = final_hidden(model, batch)
        return logits_of(model.config, hidden[-1:].float(), head_weight(model).float())[0], {}


@torch.no_grad()
def continuation(
    module: ModelWithLoss,
    prompt: Sequence[int],
    n_tokens: int,
    *,
    n_vocab: int,
    end_ids: Collection[int],
    world: World,
    unused: Collection[int] = (),
) -> list[int]:
    """Greedy continuation of a prompt, without a KV cache; all ranks must call this.

    Args:
        n_vocab: size of the vocabulary; larger ids only pad the embedding table.
        unused: ids below ``n_vocab`` that have no token.
    """
    ids, holes = list(prompt), torch.tensor(sorted(unused), dtype=torch.int64, device=world.device)
    objective, module.objective = module.objective, _LastLogits()
    module.eval()
    try:
        for _ in range(n_tokens):
            logits, _ = passed(module, module.layout.copied(_one_document(ids)).to(world.device))
            logits = _from_last(module, logits)
            ids.append(int(logits[:n_vocab].index_fill(0, holes, -math.inf).argmax()))
            if ids[-1] in end_ids:
                break
    finally:
        module.objective = objective
        module.train()
    return ids[len(prompt) :]


def _from_last(module: ModelWithLoss, logits: Tensor | None) -> Tensor:
    """The last stage's logits, on all stages."""
    stage = module.layout.stage
    if stage.count == 1:
        assert logits is not None, "there is one stage"
        return logits
    if logits is None:
        logits = torch.empty(module.model.config.vocab_size, device=next(module.parameters()).device)
    dist.broadcast(logits, group=stage.line, group_src=stage.count - 1)
    return logits


def _one_document(ids: Sequence[int]) -> TrainingBatch:
    n = len(ids)
    return TrainingBatch(
        tokens=torch.tensor(list(ids)),
        targets=torch.full((n,), IGNORE),
        positions=torch.arange(n),
        bounds=torch.tensor([0, n], dtype=torch.int32),
        domains=torch.zeros(1, dtype=torch.int16),
    )


def samples(
    module: ModelWithLoss,
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    n_tokens: int,
    end_ids: Collection[int],
    world: World,
) -> dict[str, str]:
    """Prompt -> the text of its greedy continuation."""
    found = {}
    for prompt in prompts:
        words = tokenizer.encode(prompt)
        ids = continuation(
            module,
            words,
            n_tokens,
            n_vocab=tokenizer.n_vocab,
            end_ids=end_ids,
            world=world,
            unused=tokenizer.unused_ids,
        )
        found[prompt] = tokenizer.decode(ids, after=words)
    return found
