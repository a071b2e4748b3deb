"""The sample continuations of a run contain only ids that have a token."""

from __future__ import annotations

from typing import Any

import torch

from quadriga.text.tokenizer import Tokenizer
from quadriga.train.held_out import samples
from quadriga.train.layout import Layout
from quadriga.train.world import World
from tests.text.test_unused_ids import Gaps


class Likes:
    """A module whose model prefers one id, then the others in descending order."""

    def __init__(self, best: int) -> None:
        self.objective: Any = None
        self.layout = Layout()
        self.logits = -torch.arange(10.0)
        self.logits[best] = 5.0

    def eval(self) -> None: ...

    def train(self) -> None: ...

    def __call__(self, batch: Any) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        return self.logits, {}


def test_samples_contain_neither_unused_ids_nor_padding() -> None:
    tokenizer, world = Tokenizer(Gaps(), special_ids={}), World.join("cpu", 10)
    for best, said in ((5, "x"), (8, "x"), (4, "x")):
        step: Any = Likes(best)
        assert samples(step, tokenizer, ["p"], 1, [], world) == {"p": said}
