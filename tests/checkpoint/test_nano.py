"""quadriga-nano, the model included in the package: it must open and predict text better than noise."""

from __future__ import annotations

import math

import pytest
import torch

import quadriga
from quadriga.hub.catalogue import BUNDLED

TEXTS = {
    "en": "It was a dark night when the old man came to the house, and he said that he would not go out of the door.",
    "code": "import os\n\n\ndef main():\n    for name in os.listdir(path):\n        print(name)\n    return None\n",
    "math": "Let $f(x) = x^2 + 1$. Find the value of $f(2)$. The answer is $5$.",
    "zh": "却说次日，众人都来到城中，将军大喜，便叫人去请他来。",
}


@pytest.fixture(scope="module")
def nano() -> quadriga.LLM:
    return quadriga.load("quadriga-nano")


@pytest.mark.parametrize("domain", TEXTS)
def test_it_predicts_each_domain_it_was_trained_on(nano: quadriga.LLM, domain: str) -> None:
    """An untrained model's loss is ln 8192 = 9.01 per token; shuffled letters must have a higher loss than text."""
    assert nano.tokenizer is not None
    ids = nano.tokenizer.encode(TEXTS[domain])

    def loss(ids: list[int]) -> float:
        log_probs = torch.from_numpy(nano.logits(ids))[:-1].log_softmax(-1)
        return -float(log_probs.gather(1, torch.tensor(ids[1:])[:, None]).mean())

    order = torch.randperm(len(ids), generator=torch.Generator().manual_seed(0)).tolist()
    own, shuffled = loss(ids), loss([ids[i] for i in order])
    assert own < 6.0 < math.log(8192)
    assert own < shuffled - 1.0


def test_it_says_the_same_each_time_and_is_small(nano: quadriga.LLM) -> None:
    few = quadriga.SamplingParams(max_new_tokens=12)
    first, again = (nano.generate("The old man", few).text for _ in range(2))
    assert first == again and first.strip()
    assert all(entry.nbytes <= 12_000_000 for entry in BUNDLED.values())
