"""Distillation: the student's distribution of every answer's token is drawn to a teacher's.

    KL(p || q) = sum_v p_v (log p_v - log q_v)      p = softmax(teacher's logits / T), q = softmax(student's / T)
    loss       = w T^2 KL + (1 - w) CE              T^2 keeps the gradient's size; CE is of the row's own answer
    top k      the teacher's k most probable tokens, and all others as one event: a lower bound of KL

Teacher and student must have one vocabulary; rows of their heads beyond it take no part. Logits of both are computed
for some hundred tokens at a time, and again in the backward pass. Source: Hinton et al. 2015 (arXiv 1503.02531).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from torch.utils.checkpoint import checkpoint

from quadriga.errors import ConfigError
from quadriga.nn.transformer import Transformer
from quadriga.text.tokenizer import Tokenizer
from quadriga.train.batch import IGNORE, BatchSource, TrainingBatch
from quadriga.train.losses import final_hidden, head_weight, logits_of
from quadriga.train.parallel import ModelWithLoss
from quadriga.train.services import TopTokens

_LOGITS_BYTES = 32 << 20
"""Of one chunk's logits, of the student or the teacher."""


class FinalHidden:
    """Used in place of an objective: returns the final hidden states (N, D)."""

    def __call__(self, model: Transformer, batch: TrainingBatch) -> tuple[Tensor, dict[str, Tensor]]:
        return final_hidden(model, batch)[0], {}


@dataclass(frozen=True)
class Teacher:
    """A frozen model with the student's vocabulary, whole or sharded like the student.

    Args:
        module: the model, with :class:`FinalHidden`.
    """

    module: ModelWithLoss

    @torch.no_grad()
    def __call__(self, batch: TrainingBatch) -> tuple[Tensor, Tensor]:
        """(final hidden states (N, D), the head's matrix (V, D))."""
        hidden: Tensor = self.module(batch)[0]
        if isinstance(self.module, FSDPModule):
            self.module.unshard()  # the head is the root's, which may stay gathered after its forward pass
        return hidden, head_weight(self.module.model).detach()


class Distillation:
    """The loss of the module docstring, summed over targets; an ``Objective``.

    Args:
        n_vocab: tokens of the vocabulary; rows of the heads beyond it take no part.
        top_k: 0: all tokens.
        weight: w, of the divergence beside the loss of the row's own answer.
    """

    def __init__(self, teacher: Teacher, n_vocab: int, *, top_k: int, temperature: float, weight: float) -> None:
        self.teacher, self.n_vocab = teacher, n_vocab
        self.top_k, self.temperature, self.weight = top_k, temperature, weight

    def __call__(self, model: Transformer, batch: TrainingBatch) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss and metrics of a batch, as ``Objective`` specifies."""
        taught, their_head = self.teacher(batch)
        hidden, _ = final_hidden(model, batch)
        head = head_weight(model)

        def of(own: Tensor, theirs: Tensor, targets: Tensor, own_head: Tensor) -> Tensor:
            q = logits_of(model.config, own, own_head[: self.n_vocab])
            p = logits_of(self.teacher.module.model.config, theirs, their_head[: self.n_vocab])
            return torch.stack([self.divergence(p, q), F.cross_entropy(q, targets, reduction="none")])

        kl = nll = hidden.sum() * 0.0  # a rank without targets has a gradient too
        for kept in chunks(batch.targets, head):
            both = checkpoint(of, hidden[kept], taught[kept], batch.targets[kept], head, use_reentrant=False)
            kl, nll = kl + both[0].sum(), nll + both[1].sum()
        loss = self.weight * kl + (1 - self.weight) * nll
        return loss, {"loss": loss.detach(), "kl": kl.detach(), "nll": nll.detach()}

    def divergence(self, teacher: Tensor, student: Tensor) -> Tensor:
        """T^2 KL of logits (C, V) each: (C,)."""
        p, q = ((one / self.temperature).log_softmax(-1) for one in (teacher, student))
        if self.top_k:
            best, ids = p.topk(min(self.top_k, p.shape[-1]), dim=-1)
            p, q = (torch.cat([some, _others(some)], -1) for some in (best, q.gather(-1, ids)))
        return self.temperature**2 * (p.exp() * (p - q)).sum(-1)


def chunks(targets: Tensor, head: Tensor) -> Iterator[Tensor]:
    """Indices of tokens with a target, so many at a time."""
    kept = (targets != IGNORE).nonzero()[:, 0]
    yield from torch.split(kept, max(16, _LOGITS_BYTES // (4 * len(head))))


@dataclass(frozen=True, kw_only=True)
class TaughtBatch(TrainingBatch):
    """A batch with what a served teacher says of the token after each position."""

    ids: Tensor
    """(N, k) int64; -1: nothing is known of this place."""
    logps: Tensor
    """(N, k) float32."""

    def to(self, device: torch.device) -> TaughtBatch:
        """See ``TrainingBatch.to``."""
        plain = TrainingBatch.to(self, device)
        return replace(
            self, tokens=plain.tokens, targets=plain.targets, positions=plain.positions, weights=plain.weights,
            ids=self.ids.to(device), logps=self.logps.to(device),
        )  # fmt: skip


class TaughtSource:
    """A ``BatchSource`` that asks a served teacher about each document it hands out.

    Its tokens come as texts: one that several tokens of the vocabulary have, or none, counts among the others.

    Args:
        ask: (texts as token ids, k) -> the teacher's k most probable tokens of every place.
    """

    def __init__(
        self,
        source: BatchSource,
        ask: Callable[[Sequence[Sequence[int]], int], list[TopTokens]],
        tokenizer: Tokenizer,
        top_k: int,
    ) -> None:
        self.source, self.ask, self.top_k = source, ask, top_k
        self.domains, self.fingerprint = source.domains, source.fingerprint
        self._id_of = _ids_by_text(tokenizer)

    def n_rows(self, step: int) -> int:
        """See ``BatchSource``."""
        return self.source.n_rows(step)

    def seq_len(self, step: int) -> int:
        """See ``BatchSource``."""
        return self.source.seq_len(step)

    def rows(self, step: int, first: int, last: int) -> TaughtBatch:
        """See ``BatchSource``."""
        batch = self.source.rows(step, first, last)
        spans = [
            (a, b) for a, b in itertools.pairwise(batch.bounds.tolist()) if bool((batch.targets[a:b] != IGNORE).any())
        ]
        # The last position's token is the next document's: its target is the token that the document ends with.
        texts = [[*batch.tokens[a:b].tolist(), *_after(batch, b)] for a, b in spans]
        ids = torch.full((len(batch.tokens), self.top_k), -1)
        logps = torch.zeros(len(batch.tokens), self.top_k)
        for (a, b), said in zip(spans, self.ask(texts, self.top_k), strict=True):
            for place, top in zip(range(a, b), said[1:], strict=False):
                known = [(self._id_of[text], logp) for text, logp in (top or {}).items() if text in self._id_of]
                for i, (token, logp) in enumerate(sorted(known, key=lambda one: -one[1])[: self.top_k]):
                    ids[place, i], logps[place, i] = token, logp
        fields = {name: getattr(batch, name) for name in ("tokens", "targets", "positions", "bounds", "domains")}
        return TaughtBatch(**fields, weights=batch.weights, ids=ids, logps=logps)


def _after(batch: TrainingBatch, end: int) -> list[int]:
    last = int(batch.targets[end - 1])
    return [] if last == IGNORE else [last]


def _ids_by_text(tokenizer: Tokenizer) -> dict[str, int]:
    """Text -> token, of those texts that one token alone has."""
    found: dict[str, list[int]] = {text: [token] for text, token in tokenizer.special_ids.items()}
    for token in range(tokenizer.n_vocab):
        try:
            same = found.setdefault(tokenizer.token_bytes(token).decode(), [])
        except UnicodeDecodeError:
            continue
        if token not in same:
            same.append(token)
    return {text: tokens[0] for text, tokens in found.items() if len(tokens) == 1 and text}


class ServedDistillation:
    """:class:`Distillation` from what a :class:`TaughtBatch` knows: k tokens, and all others as one event."""

    def __init__(self, n_vocab: int, *, weight: float) -> None:
        self.n_vocab, self.weight = n_vocab, weight

    def __call__(self, model: Transformer, batch: TrainingBatch) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss and metrics of a batch, as ``Objective`` specifies."""
        assert isinstance(batch, TaughtBatch), "from a TaughtSource"
        hidden, _ = final_hidden(model, batch)
        head = head_weight(model)

        def of(own: Tensor, ids: Tensor, logps: Tensor, targets: Tensor, own_head: Tensor) -> Tensor:
            logits = logits_of(model.config, own, own_head[: self.n_vocab])
            known = ids >= 0
            p = logps.to(logits.dtype).masked_fill(~known, float("-inf"))
            q = logits.log_softmax(-1).gather(-1, ids.clamp(min=0)).masked_fill(~known, float("-inf"))
            left, ours = _others(p), _others(q)
            kl = torch.where(known, p.exp() * (p - q).masked_fill(~known, 0.0), 0.0).sum(-1)
            return torch.stack(
                [kl + (left.exp() * (left - ours))[:, 0], F.cross_entropy(logits, targets, reduction="none")]
            )

        kl = nll = hidden.sum() * 0.0
        for kept in chunks(batch.targets, head):
            given = hidden[kept], batch.ids[kept], batch.logps[kept], batch.targets[kept], head
            both = checkpoint(of, *given, use_reentrant=False)
            kl, nll = kl + both[0].sum(), nll + both[1].sum()
        loss = self.weight * kl + (1 - self.weight) * nll
        return loss, {"loss": loss.detach(), "kl": kl.detach(), "nll": nll.detach()}


def _others(logps: Tensor) -> Tensor:
    """log of what is left of 1: (C, k) -> (C, 1)."""
    left: Tensor = torch.log1p(-logps.exp().sum(-1, keepdim=True).clamp(max=1 - 1e-6))
    return left


def same_ids(one: Tokenizer, other: Tokenizer) -> bool:
    """True if every id stands for the same bytes in both."""
    return one.n_vocab == other.n_vocab and all(one.token_bytes(i) == other.token_bytes(i) for i in range(one.n_vocab))


def require_same_vocabulary(student: Tokenizer, teacher: Tokenizer, name: str) -> None:
    """A token must mean the same to both.

    Raises:
        ConfigError: it does not.
    """
    if student.special_ids != teacher.special_ids or not same_ids(student, teacher):
        raise ConfigError(
            f"distill.teacher must have the vocabulary of the model: {name} has another one ({teacher.n_vocab} tokens, "
            f"the model {student.n_vocab}). Take a teacher of the same family"
        )
