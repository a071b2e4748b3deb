"""A block of the cache that changes hands brings nothing of its last owner along."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from quadriga.engine.engine import Engine
from quadriga.engine.request import Request, SamplingParams, TokenEvent
from quadriga.kernels.arrays import arrays
from quadriga.nn.transformer import Transformer, random_parameters
from quadriga.runners.compiled import CompiledModel, pack_parameters
from quadriga.runners.torch import TorchRunner
from tests.checkpoint.models import TINY


@pytest.mark.parametrize("kv_format", ["float32", "bfloat16", "q8", "torch"])
@pytest.mark.parametrize("name", ["dbrx", "deepseek_v3"])
def test_nobody_reads_what_a_blocks_last_owner_left(name: str, kv_format: str) -> None:
    """A NaN there, of a prompt with broken rows say, would be the next owner's: 0 times NaN is NaN."""
    config = replace(TINY[name], max_seq_len=400)
    made = random_parameters(config, std=0.3)

    def answers(poisoned: bool) -> list[list[tuple[int, float]]]:
        if kv_format == "torch":
            runner: Any = TorchRunner(Transformer.from_parameters(config, made), 60)
            stored = [*runner._keys, *runner._values]
            if poisoned:
                for tensor in stored:
                    tensor.fill_(float("nan"))
        else:
            packed = pack_parameters(arrays(made), "q8")
            runner = CompiledModel(config, packed, threads=1, n_blocks=60, kv_format=kv_format)
            if poisoned:
                runner._kv[:] = 0xFF  # a NaN as float32, as bfloat16 and as a scale
        engine = Engine(runner)
        assert engine.scheduler.pool.allocate() == 0, "somebody else holds the first block, and never writes it"
        seen: dict[int, list[tuple[int, float]]] = {}
        for n in (1, 5, 16, 17, 40, 300):
            prompt = tuple(i % 97 for i in range(3, 3 + n))
            params = SamplingParams(max_new_tokens=20, ignore_eos=True)
            seen[engine.submit(Request(prompt=prompt, params=params))] = []
        while engine.has_work:
            for number, event in engine.step():
                assert isinstance(event, TokenEvent), event
                seen[number].append((event.token_id, event.logprob))
        return list(seen.values())

    assert answers(poisoned=True) == answers(poisoned=False)
