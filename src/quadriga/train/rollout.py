"""Sampling during training, and checkable rewards, for GRPO.

Prompts are processed one at a time: the prompt runs once, its keys and values are shared by all samples, and each pass
adds one token to every sample. This is not the serving engine (``quadriga.engine``, which training never imports): here
the sampled policy is the module being trained itself, with its adapters.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Sequence

import torch
from torch import Tensor

from quadriga.model.config import RecurrentState
from quadriga.nn.context import PackedContext, Scan, Scoring, beginning
from quadriga.nn.transformer import Transformer


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
        temperature: above 0.
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
        scaled = logits.cpu() / temperature
        drawn = torch.multinomial(scaled.index_fill_(1, never, -math.inf).softmax(-1), 1, generator=generator)[:, 0]
        for i, token in enumerate(drawn.tolist()):
            if not done[i]:
                found[i].append(token)
                done[i] = token in end_ids
        if bool(done.all()) or step == max_new_tokens - 1:
            break
        context.advance(len(prompt) + step)
        logits = model(drawn.to(device), context).logits
    return found


_NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")


def number_reward(text: str, answer: str) -> float:
    """1 if the last number in a text equals the last number of the answer (GSM8K: the text after ####), else 0."""
    wanted, got = (_last_number(one) for one in (answer.rpartition("####")[2], text))
    return float(wanted is not None and got is not None and abs(wanted - got) < 1e-6)


def _last_number(text: str) -> float | None:
    found = _NUMBER.findall(text)
    return float(found[-1].replace(",", "")) if found else None
