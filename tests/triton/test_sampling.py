"""Tokens chosen by the device's kernel: those of the sampler in NumPy, which the CPU's kernels are held to as well."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from quadriga.engine.request import SamplingParams
from quadriga.engine.sampler import Sample, Sampler, Unused
from quadriga.engine.truncation import uniforms
from quadriga.errors import RequestError
from quadriga.kernels.triton.sampling import Rows, sample
from quadriga.runners.cuda.device_array import DeviceArray
from quadriga.runners.cuda.sampling import DeviceSampler, rows_of
from tests.engine.test_sampling_kernels import settings, shapes
from tests.triton.drawn import ints

VOCABULARIES = [7, 97, 1300]


def by_device(samplers: list[Sampler], rows: np.ndarray, allowed: Any = None) -> list[Sample]:
    asked = [s.ask(allowed) for s in samplers]
    made = DeviceSampler().sample(DeviceArray(torch.from_numpy(rows)), range(len(samplers)), asked)
    return [s.take(one, row, constrained=allowed is not None) for s, one, row in zip(samplers, made, rows, strict=True)]


def near(mine: Sample, theirs: Sample) -> None:
    assert mine.token_id == theirs.token_id
    assert mine.logprob == pytest.approx(theirs.logprob, abs=1e-5)
    assert [token for token, _ in mine.top_logprobs] == [token for token, _ in theirs.top_logprobs]
    assert [x for _, x in mine.top_logprobs] == pytest.approx([x for _, x in theirs.top_logprobs], abs=1e-5)


@pytest.mark.parametrize("v", VOCABULARIES)
def test_the_device_chooses_what_numpy_chooses(v: int) -> None:
    """Some of the settings, which meet each of their values; two tokens of each answer."""
    rows, prompt = shapes(v), [0, 2, 1, 2]
    every = list(settings())[v % 7 :: 37 if v < 1000 else 101]
    for i, params in enumerate(every):
        row = rows[i % len(rows)][None]
        mine, theirs = (Sampler(params, prompt, v, Unused((1,))) for _ in range(2))
        for _ in range(2):
            near(by_device([mine], row)[0], theirs.sample(row[0]))


def test_rows_of_a_pass_do_not_know_each_other() -> None:
    v, every = 97, [p for i, p in enumerate(settings()) if i % 211 == 0]
    rows = np.concatenate([shapes(v)] * 5)[: len(every)]
    made = [Sampler(p, [3, 4], v, Unused((1,)), ends=(5, 6)) for p in every[: len(rows)]]
    alone = [Sampler(p, [3, 4], v, Unused((1,)), ends=(5, 6)) for p in every[: len(rows)]]
    crowd = by_device(made, rows)
    for one, row, together in zip(alone, rows, crowd, strict=True):
        assert by_device([one], row[None])[0] == together


def test_the_draw_is_numpys_for_a_seed_and_a_position() -> None:
    """Flat logits of many tokens: the token says where the draw lay."""
    v = 4096
    logits = DeviceArray(torch.zeros(1, v))
    for seed, position in ((0, 0), (7, 3), (2**63 - 1, 2**20), (123456789, 11)):
        sampler = Sampler(SamplingParams(temperature=1.0, seed=seed), [], v)
        asked = sampler.ask()
        asked.set(position, early=False, allowed=None)
        token = int(sample(logits.tensor, rows_of([0], [asked], logits))[0, 0])
        assert token == int(uniforms(seed, position)[0] * v)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_what_may_not_be_chosen_is_not(temperature: float) -> None:
    row = np.array([[5.0, 9.0, 7.0, 6.0, 8.0, -3.0]], dtype=np.float32)
    params = SamplingParams(temperature=temperature, seed=3, min_new_tokens=1, top_k=1)
    allowed = np.array([True, True, True, False, True, True])
    assert by_device([Sampler(params, [], 6, Unused((1,)), ends=(4,))], row, allowed)[0].token_id == 2
    # Only what ends the answer is allowed: it ends.
    only = np.array([False, True, False, False, True, False])
    assert by_device([Sampler(params, [], 6, Unused((1,)), ends=(4,))], row, only)[0].token_id == 4
    with pytest.raises(RequestError, match="grammar"):
        by_device([Sampler(params, [], 6, Unused((1,)))], row, np.arange(6) == 1)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_broken_logits_are_an_error_not_a_token(bad: float) -> None:
    row = np.zeros((1, 40), dtype=np.float32)
    row[0, 17] = bad
    for temperature in (0.0, 0.8):
        with pytest.raises(RequestError, match="not finite"):
            by_device([Sampler(SamplingParams(temperature=temperature, logprobs=2), [], 40)], row)


@pytest.mark.parametrize("more", [{"typical_p": 0.6}, {"xtc_probability": 1.0, "xtc_threshold": 0.05}])
def test_what_the_kernel_has_not_is_chosen_on_the_host_beside_what_it_has(more: dict[str, float]) -> None:
    rows = np.repeat(shapes(97)[:1], 3, axis=0)
    every = [SamplingParams(temperature=0.9, seed=i, **(more if i == 1 else {})) for i in range(3)]
    mine = by_device([Sampler(p, [], 97) for p in every], rows)
    for params, row, one in zip(every, rows, mine, strict=True):
        near(one, Sampler(params, [], 97).sample(row))


def test_logits_are_left_as_they_are_and_fetched_once() -> None:
    tensor = torch.from_numpy(shapes(97).copy())
    logits = DeviceArray(tensor)
    asked = Sampler(SamplingParams(logit_bias={3: 9.0}, repetition_penalty=2.0, seed=1), [3, 5], 97).ask()
    DeviceSampler().sample(logits, [2], [asked])
    assert logits._host is None, "nothing was read"
    assert np.array_equal(logits.host(), shapes(97))
    assert np.array_equal(logits[1], shapes(97)[1]) and float(logits[2, 5]) == shapes(97)[2, 5]


def test_unequal_masks_and_lists_reach_their_own_rows() -> None:
    logits = torch.arange(12.0).view(2, 6)
    rows = Rows(
        places=ints(1, 0, 1), numbers=torch.tensor([[0.0, 1, 0, 1, 0, 0]] * 3, dtype=torch.float64),
        seeds=torch.zeros(3, 2, dtype=torch.int64),
        bounds=torch.tensor([[0, 1, 1, 1, 1, 0, 2, -1], [1, 1, 1, 1, 2, 0, 0, 1], [2, 2, 2, 2, 2, 0, 1, 0]], dtype=torch.int32),
        ids=ints(5, 2, 0), amounts=torch.tensor([0.0, 50.0, 0.0]), counts=ints(0, 0, 0),
        masks=torch.tensor([[1, 1, 0, 0, 0, 0], [1, 1, 1, 1, 0, 0]], dtype=torch.uint8), most_top=2, most_early=0,
    )  # fmt: skip
    out = sample(logits, rows)
    assert out[:, 0].tolist() == [4.0, 2.0, 1.0]
    assert out[:, 2].tolist() == [10.0, 2.0, 7.0]
    assert out[0, 3:].tolist() == [4.0, 10.0, 3.0, 9.0] and out[2, 3:5].tolist() == [5.0, 11.0]
