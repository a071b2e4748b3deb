"""Samples drawn from the module that is being trained itself, on one rank, on whatever device it is.

Prompts are processed one at a time: the prompt runs once, its keys and values are shared by all samples, and each pass
adds one token to every sample. This is not the serving engine (``quadriga.engine``), which runs many prompts at once
and is what ``quadriga tune`` samples with; training never imports it, and is handed one (``train.services``).
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence

import torch
from torch import Tensor

from quadriga.model.config import RecurrentState
from quadriga.nn.context import PackedContext, Scan, Scoring, beginning
from quadriga.nn.transformer import Transformer
from quadriga.train.services import Weights


class _Samples:
    """A ``ForwardContext`` for G samples of one prompt, which each get one token per pass."""

    def __init__(self, prompt: PackedContext, n_samples: int) -> None:
        self.positions = prompt.positions
        self._prompt, self._n = prompt, n_samples
        self._keys: dict[int, Tensor] = {}
        self._values: dict[int, Tensor] = {}
        self._states: dict[int, list[Sequence[Tensor]]] = {}
        self._decoding = False

    def advance(self, position: int) -> None:
        """Set the position of the next pass, which runs one token of each sample."""
        self._decoding = True
        self.positions = torch.full((self._n,), position, device=self.positions.device)

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, scoring: Scoring) -> Tensor:
        """Attention of one token per sample over the shared prompt and the sample's own tokens."""
        if not self._decoding:
            # (G, K, T, d): the prompt, shared by all samples
            self._keys[layer] = k.transpose(0, 1)[None].expand(self._n, -1, -1, -1)
            self._values[layer] = v.transpose(0, 1)[None].expand(self._n, -1, -1, -1)
            return self._prompt.attend(layer, q, k, v, scoring)
        self._keys[layer] = torch.cat((self._keys[layer], k[:, :, None]), dim=2)
        self._values[layer] = torch.cat((self._values[layer], v[:, :, None]), dim=2)
        return scoring.attention(q[:, :, None], self._keys[layer], self._values[layer])[:, :, 0]

    def recur(self, layer: int, x: Tensor, state: RecurrentState, scan: Scan) -> Tensor:
        """A recurrent layer over the prompt, then over one token of each sample from its own state."""
        if not self._decoding:
            out, after = scan(x, beginning(state, x))
            self._states[layer] = [after] * self._n
            return out
        done = [scan(row[None], before) for row, before in zip(x, self._states[layer], strict=True)]
        self._states[layer] = [after for _, after in done]
        return torch.cat([out for out, _ in done])


@torch.no_grad()
def sample(
    model: Transformer,
    prompt: Sequence[int],
    n_samples: int,
    *,
    max_new_tokens: int,
    temperature: float,
    end_ids: Collection[int],
    unused: Collection[int] = (),
    generator: torch.Generator | None = None,
) -> list[list[int]]:
    """Sample continuations of one prompt; each ends after an end token or ``max_new_tokens``.

    Args:
        temperature: 0: the most probable tokens.
        unused: ids without a token (padding of the head); they are never sampled.

    Returns:
        the token ids of each sample, without the prompt.
    """
    device = next(model.parameters()).device
    before = PackedContext([len(prompt)], device)
    context = _Samples(before, n_samples)
    tokens = torch.tensor(list(prompt), device=device)
    logits = model(tokens, context, rows=torch.tensor([len(prompt) - 1], device=device)).logits
    logits = logits.expand(n_samples, -1)
    done = torch.zeros(n_samples, dtype=torch.bool)
    never = torch.tensor(sorted(set(unused) - set(end_ids)), dtype=torch.int64)
    found: list[list[int]] = [[] for _ in range(n_samples)]
    for step in range(max_new_tokens):
        drawn = _draw(logits.cpu().index_fill(1, never, -math.inf), temperature, generator)
        for i, token in enumerate(drawn.tolist()):
            if not done[i]:
                found[i].append(token)
                done[i] = token in end_ids
        if bool(done.all()) or step == max_new_tokens - 1:
            break
        context.advance(len(prompt) + step)
        logits = model(drawn.to(device), context).logits
    return found


def _draw(logits: Tensor, temperature: float, generator: torch.Generator | None) -> Tensor:
    """A token of each row of logits (R, V): (R,)."""
    if temperature == 0.0:
        return logits.argmax(-1)
    return torch.multinomial((logits / temperature).softmax(-1), 1, generator=generator)[:, 0]


class ModelSampler:
    """A ``Sampler`` over the trained module; its weights are always the current ones.

    Args:
        end_ids: tokens that end an answer.
        unused: ids without a token; they are never sampled.
    """

    def __init__(self, model: Transformer, end_ids: Collection[int], unused: Collection[int] = ()) -> None:
        self.model, self.end_ids, self.unused = model, end_ids, unused

    def load(self, weights: Weights) -> None:
        """Nothing to do."""

    def sample(
        self, prompts: Sequence[Sequence[int]], *, n: int, seeds: Sequence[int], max_new_tokens: int, temperature: float
    ) -> list[list[list[int]]]:
        """See ``services.Sampler``; without dropout."""
        training_now = self.model.training
        self.model.eval()
        try:
            return [
                sample(
                    self.model, prompt, n, max_new_tokens=max_new_tokens, temperature=temperature, end_ids=self.end_ids,
                    unused=self.unused, generator=torch.Generator().manual_seed(seed),
                )
                for prompt, seed in zip(prompts, seeds, strict=True)
            ]  # fmt: skip
        finally:
            self.model.train(training_now)
