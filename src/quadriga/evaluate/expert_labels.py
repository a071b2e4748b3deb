"""What each expert of a mixture is chosen for, from texts of several domains: a label made of counts.

    texts ─► routing of every token ─► per expert: tokens by lift, domains by mutual information, examples ─► a label

A token's lift is how much more often it is among those that chose the expert than among all. Of the tokens with the
most of count * ln(lift), which is each one's part of the divergence between the two distributions, the label shows the
first ones. If most of what an expert sees is of one kind (digits, punctuation, ...), or of one domain, far more than
elsewhere, the label says so. That experts can be named from such statistics automatically is the idea of arXiv
2604.02178; the measures here are our own.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from quadriga.errors import ConfigError
from quadriga.model.config import ModelConfig, MoESpec
from quadriga.runners.base import LayerRouting

Ints = NDArray[np.int64]

N_TOKENS, N_EXAMPLES, AROUND = 12, 4, 10
"""Of each expert: tokens, examples, and tokens shown on either side of an example."""

LEAST_USES = 20
"""An expert that was chosen more seldom gets no label of its own."""

_FUNCTION_WORDS = """
the of and to in a is that for it as was with be by on not he his at or this which from but are an have had they you
were their one all we can her has there been if more when will would who so no out up into do any what its about them
"""
FUNCTION_WORDS = frozenset(_FUNCTION_WORDS.split())


@dataclass
class Seen:
    """The tokens of all texts and what their routers chose, in order."""

    ids: list[Ints] = field(default_factory=list)
    domains: list[int] = field(default_factory=list)
    """Of each text."""
    experts: list[NDArray[np.int32]] = field(default_factory=list)
    """(T, layers, k) of each text."""
    weights: list[NDArray[np.float32]] = field(default_factory=list)

    def add(self, ids: Sequence[int], domain: int, routing: Sequence[LayerRouting]) -> None:
        """Take a text's tokens and their routing; layers that choose fewer are filled with -1."""
        width = max(layer.expert_ids.shape[1] for layer in routing)
        experts = np.full((len(ids), len(routing), width), -1, dtype=np.int32)
        weights = np.zeros((len(ids), len(routing), width), dtype=np.float32)
        for i, layer in enumerate(routing):
            experts[:, i, : layer.expert_ids.shape[1]] = layer.expert_ids
            weights[:, i, : layer.expert_ids.shape[1]] = layer.expert_weights
        self.ids.append(np.asarray(ids, dtype=np.int64))
        self.domains.append(domain)
        self.experts.append(experts)
        self.weights.append(weights)

    @property
    def n_tokens(self) -> int:
        """Of all texts."""
        return sum(map(len, self.ids))


class _Corpus:
    """All texts end to end, and what the measures of every expert need of them."""

    def __init__(self, seen: Seen, names: Sequence[str], text_of: Callable[[int], str]) -> None:
        self.names, self.seen = names, seen
        self.ids = np.concatenate(seen.ids)  # (N,)
        self.domains = np.repeat(np.asarray(seen.domains), [len(ids) for ids in seen.ids])  # (N,)
        self.starts = np.cumsum([0, *map(len, seen.ids)])
        self.vocabulary, self.token = np.unique(self.ids, return_inverse=True)  # (U,), (N,)
        self.texts = [text_of(int(token)) for token in self.vocabulary]
        self.kinds = [kind_of(text) for text in self.texts]
        self.counts = np.bincount(self.token, minlength=len(self.vocabulary))
        self.of_domain = np.bincount(self.domains, minlength=len(names))
        kinds = sorted({kind for kind in self.kinds if kind})
        self.kind_names, self.kind = kinds, np.array([kinds.index(k) if k else -1 for k in self.kinds])[self.token]

    def window(self, position: int) -> tuple[str, str]:
        """What stands before and after a token in its text."""
        at = int(np.searchsorted(self.starts, position, side="right")) - 1
        low, high = max(self.starts[at], position - AROUND), min(self.starts[at + 1], position + AROUND + 1)
        before = "".join(self.texts[t] for t in self.token[low:position])
        return before, "".join(self.texts[t] for t in self.token[position + 1 : high])


def labels_of(seen: Seen, config: ModelConfig, domains: Sequence[str], text_of: Callable[[int], str]) -> dict[str, Any]:
    """What ``io.expert_labels`` stores: see docs/experts.md for the fields.

    Args:
        domains: names, in the order of their numbers in ``seen``.
        text_of: a token's text.

    Raises:
        ConfigError: a dense model, or nothing was read.
    """
    if not config.moe_layers:
        raise ConfigError("there are no experts to label: this model is dense")
    if not seen.n_tokens:
        raise ConfigError("there is nothing to label experts from: the data has no text")
    corpus = _Corpus(seen, domains, text_of)
    layers = []
    for row, (index, spec) in enumerate(config.moe_layers):
        experts = np.concatenate([one[:, row] for one in seen.experts])  # (N, k)
        weights = np.concatenate([one[:, row] for one in seen.weights])
        layers.append(_layer(index, spec, corpus, experts, weights))
    return {
        "domains": [{"name": n, "tokens": int(c)} for n, c in zip(domains, corpus.of_domain, strict=True)],
        "n_tokens": seen.n_tokens,
        "layers": layers,
    }


def _layer(
    index: int, spec: MoESpec, corpus: _Corpus, experts: NDArray[np.int32], weights: NDArray[np.float32]
) -> dict[str, Any]:
    table = np.zeros((spec.n_experts, len(corpus.names)))
    slots, domains = experts.reshape(-1), np.repeat(corpus.domains, experts.shape[1])
    np.add.at(table, (slots[slots >= 0], domains[slots >= 0]), 1)
    found = []
    for expert in range(spec.n_experts):
        position, slot = np.nonzero(experts == expert)
        found.append(_expert(corpus, position, weights[position, slot]))
    return {"layer": index, "bits": _round(mutual_information(table)), "experts": found}


def _expert(corpus: _Corpus, positions: Ints, weights: NDArray[np.float32]) -> dict[str, Any]:
    n = len(positions)
    tokens = _tokens(corpus, positions)
    own = np.bincount(corpus.domains[positions], minlength=len(corpus.names))
    shares = own / max(1, n)
    base = corpus.of_domain / len(corpus.ids)
    lifts = np.divide(shares, base, out=np.zeros_like(shares), where=base > 0)
    chosen = np.stack([own, corpus.of_domain - own])  # chosen or not, by domain
    kind = "rare" if n < LEAST_USES else _kind(corpus, positions)
    strongest = int(np.argmax(shares * np.log(np.maximum(lifts, 1e-9))))
    stands_out = n >= LEAST_USES and shares[strongest] > 0.5 and lifts[strongest] >= 1.5
    domain = corpus.names[strongest] if stands_out else None
    words = " ".join(token["text"].strip() or token["text"].translate(_SEEN) for token in tokens[:4])
    order = np.argsort(-shares, kind="stable")
    return {
        "label": " · ".join(part for part in (kind, domain, words) if part),
        "kind": kind,
        "domain": domain,
        "share": _round(n / len(corpus.ids)),
        "bits": _round(mutual_information(chosen)),
        "tokens": tokens,
        "domains": [
            {"name": corpus.names[d], "share": _round(float(shares[d])), "lift": _round(float(lifts[d]))} for d in order
        ],
        "examples": _examples(corpus, positions, weights),
    }


def _tokens(corpus: _Corpus, positions: Ints) -> list[dict[str, Any]]:
    """The tokens that an expert is chosen for most, by count * ln(lift); of each at least three uses."""
    own = np.bincount(corpus.token[positions], minlength=len(corpus.vocabulary))
    expected = corpus.counts * (len(positions) / len(corpus.ids))
    lift = np.divide(own, expected, out=np.zeros(len(own)), where=expected > 0)
    worth = np.where((own >= 3) & (lift > 1), own * np.log(np.maximum(lift, 1.0)), 0.0)
    best = [int(t) for t in np.argsort(-worth, kind="stable")[:N_TOKENS] if worth[t] > 0]
    return [
        {"id": int(corpus.vocabulary[t]), "text": corpus.texts[t], "n": int(own[t]), "lift": _round(float(lift[t]))}
        for t in best
    ]


def _kind(corpus: _Corpus, positions: Ints) -> str | None:
    """The kind that most of an expert's tokens are of, if that is far more than elsewhere."""
    if not corpus.kind_names:
        return None
    kinds = corpus.kind[positions]
    own = np.bincount(kinds[kinds >= 0], minlength=len(corpus.kind_names)) / len(positions)
    base = np.bincount(corpus.kind[corpus.kind >= 0], minlength=len(corpus.kind_names)) / len(corpus.ids)
    best = int(np.argmax(own))
    return corpus.kind_names[best] if own[best] >= 0.5 and own[best] >= 1.5 * base[best] else None


def _examples(corpus: _Corpus, positions: Ints, weights: NDArray[np.float32]) -> list[dict[str, Any]]:
    """Where an expert weighs most, each token once."""
    out: list[dict[str, Any]] = []
    taken = set[int]()
    for i in np.argsort(-weights, kind="stable"):
        position = int(positions[i])
        token = int(corpus.token[position])
        if token in taken:
            continue
        taken.add(token)
        before, after = corpus.window(position)
        text = corpus.texts[token]
        out.append({"before": before, "token": text, "after": after, "weight": _round(float(weights[i]))})
        if len(out) == N_EXAMPLES:
            break
    return out


def mutual_information(table: NDArray[Any]) -> float:
    """Bits that rows and columns of a table of counts say about each other, less what chance makes of independent ones.

    The bias of a table of r rows and c columns over n counts is about (r - 1)(c - 1) / (2 n ln 2) (Miller 1955).
    """
    n = float(table.sum())
    if n == 0:
        return 0.0
    joint = table / n
    apart = joint.sum(1, keepdims=True) * joint.sum(0, keepdims=True)
    some = joint > 0
    bits = float((joint[some] * np.log2(joint[some] / apart[some])).sum())
    rows, columns = int((table.sum(1) > 0).sum()), int((table.sum(0) > 0).sum())
    return max(0.0, bits - (rows - 1) * (columns - 1) / (2 * n * float(np.log(2))))


_SEEN = str.maketrans({" ": "␣", "\n": "⏎", "\t": "⇥"})
_CHINESE = re.compile(r"[\u3400-\u9fff\uf900-\ufaff]")


def kind_of(text: str) -> str | None:
    """The kind of a token (space, digits, chinese, function, names, pieces, punctuation, symbols); None: a word."""
    word = text.strip()
    if not word:
        return "space"
    if word.isdigit():
        return "digits"
    if _CHINESE.search(word):
        return "chinese"
    if word.lower() in FUNCTION_WORDS:
        return "function"
    if word.isalpha():
        if word[0].isupper():
            return "names"
        return "pieces" if text[0] == word[0] else None
    if all(letter in ".,;:!?'\"()-–—…“”‘’，。；：！？、（）《》「」" for letter in word):
        return "punctuation"
    return "symbols" if not any(letter.isalnum() for letter in word) else None


def _round(value: float) -> float:
    return round(value, 4)
