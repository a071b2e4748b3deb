"""The engine over the kernels for GPUs says what it says over plain torch: text, log-probabilities, alternatives."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from quadriga.engine.engine import Engine
from quadriga.engine.request import Request, SamplingParams, TokenEvent
from quadriga.model.config import ModelConfig
from quadriga.nn.transformer import Transformer, random_parameters
from quadriga.runners.base import Runner
from quadriga.runners.cuda.device_array import DeviceArray
from quadriga.runners.cuda.runner import CudaRunner
from quadriga.runners.cuda.weights import DeviceWeights
from quadriga.runners.torch import TorchRunner
from tests.checkpoint.models import TINY
from tests.runners.test_compiled import sequence

SHORT = {"max_new_tokens": 6, "ignore_eos": True}
ASKED = [
    Request(prompt=tuple(sequence(1, 19)), params=SamplingParams(temperature=0.0, logprobs=2, **SHORT)),  # type: ignore[arg-type]
    Request(prompt=tuple(sequence(2, 1)), params=SamplingParams(temperature=0.9, top_p=0.9, seed=5, **SHORT)),  # type: ignore[arg-type]
    Request(
        prompt=tuple(sequence(3, 33)),
        params=SamplingParams(
            temperature=1.2, top_k=20, min_p=0.02, seed=6, frequency_penalty=0.5, repetition_penalty=1.2, **SHORT
        ),  # type: ignore[arg-type]
    ),
    Request(
        prompt=tuple(sequence(1, 19)), params=SamplingParams(temperature=0.0, prompt_logprobs=True, logprobs=1, **SHORT)
    ),  # type: ignore[arg-type]
]


def answers(runner: Runner) -> list[list[TokenEvent]]:
    engine = Engine(runner, max_batch_tokens=24, max_sequences=4)
    numbers = [engine.submit(one) for one in ASKED]
    said: dict[int, list[TokenEvent]] = {number: [] for number in numbers}
    while engine.has_work:
        for number, event in engine.step():
            assert isinstance(event, TokenEvent), event
            said[number].append(event)
    return [said[number] for number in numbers]


def parameters(config: ModelConfig) -> dict[str, torch.Tensor]:
    return random_parameters(config, std=0.3)


def weights(config: ModelConfig) -> DeviceWeights:
    return DeviceWeights(parameters(config))


@pytest.mark.parametrize(
    "family", ["dbrx", *(pytest.param(name, marks=pytest.mark.slow) for name in ("deepseek_v2", "qwen3next"))]
)
def test_answers_are_those_of_plain_torch(family: str) -> None:
    config = replace(TINY[family], max_seq_len=80)
    mine = answers(CudaRunner(config, weights(config), 24, n_slots=12))
    theirs = answers(TorchRunner(Transformer.from_parameters(config, parameters(config)), 24, n_slots=12))
    for one, other in zip(mine, theirs, strict=True):
        assert [e.token_id for e in one] == [e.token_id for e in other] and len(one) == 6
        for a, b in zip(one, other, strict=True):
            assert a.logprob == pytest.approx(b.logprob, abs=1e-3)
            assert [t for t, _ in a.top_logprobs] == [t for t, _ in b.top_logprobs]


def test_a_step_reads_nothing_but_what_was_sampled(monkeypatch: pytest.MonkeyPatch) -> None:
    """One fetch a step, of the ids with what is said of them; rows of logits stay where they are."""
    fetched: list[int] = []
    monkeypatch.setattr(DeviceArray, "host", lambda self: pytest.fail("logits were read"))
    plain = torch.Tensor.cpu
    monkeypatch.setattr(torch.Tensor, "cpu", lambda self: fetched.append(self.numel()) or plain(self))
    engine = Engine(CudaRunner(TINY["dbrx"], weights(TINY["dbrx"]), 24), max_batch_tokens=64, max_sequences=4)
    for one in ASKED[:3]:
        engine.submit(one)
    steps = 0
    while engine.has_work:
        before = len(fetched)
        engine.step()
        steps += 1
        assert len(fetched) - before <= 1
    assert steps >= 6 and max(fetched) <= 3 * (3 + 2 * 2)
