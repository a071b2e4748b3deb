"""Several adapters in one batch: each request's answer is what its adapter alone gives, whoever shares the pass."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from quadriga.engine.llm import LLM
from quadriga.engine.request import Request, SamplingParams
from quadriga.errors import RequestError
from quadriga.io.adapter_files import Adapter, save
from quadriga.model.adapter_spec import LoraSpec
from quadriga.nn.adapter_bank import AdapterBank
from quadriga.nn.context import PackedContext
from quadriga.nn.lora import attach
from quadriga.runners.torch import TorchRunner
from tests.checkpoint.models import TINY
from tests.nn.test_lora import ALL, IDS, model_of, random_factors, stored_factors


def spec_of(name: str, rank: int = 4) -> LoraSpec:
    return LoraSpec(rank=rank, alpha=6.0, targets=ALL[name])


@pytest.mark.parametrize("name", ["mixtral", "dbrx", "llama2", "llama2-tied"])
@torch.inference_mode()
def test_every_token_runs_with_its_own_adapter(name: str) -> None:
    model = model_of(name)
    bank = AdapterBank(model)
    kinds = {"one": (spec_of(name), 1), "two": (spec_of(name, 2), 2)}
    for key, (spec, seed) in kinds.items():
        bank.add(key, spec, stored_factors(TINY[name], spec, seed))
    lengths = [12, 9, 7, 9]
    uses = ["one", None, "two", "one"]
    numbers = [0 if use is None else bank.number(use) for use in uses]
    of_token = torch.tensor([n for n, length in zip(numbers, lengths, strict=True) for _ in range(length)])
    bank.choose(of_token)
    mixed = model(IDS, PackedContext(lengths)).logits
    start = 0
    for use, length in zip(uses, lengths, strict=True):
        alone = model_of(name)
        if use is not None:
            spec, seed = kinds[use]
            made = attach(alone, spec, random_factors(TINY[name], spec, seed))
            for one in made.values():
                one.double()
        ids = IDS[start : start + length]
        wanted = alone(ids, PackedContext([length])).logits
        # The bank's factors are float32, as files are.
        torch.testing.assert_close(mixed[start : start + length], wanted, rtol=0, atol=1e-5 * float(wanted.std()))
        start += length


def answers(llm: LLM, uses: list[str | None]) -> list[list[int]]:
    params = SamplingParams(max_new_tokens=12, temperature=0.0)
    prompts = [[5, 9, 2, 11, 40, 3][: 3 + i % 3] for i in range(len(uses))]
    return [one.token_ids for one in llm.generate_many(prompts, params, adapters=uses)]


def test_the_engine_serves_several_at_once_and_forgets_them(tmp_path: Path) -> None:
    for i, key in enumerate(("one", "two")):
        save(
            Adapter(spec=spec_of("mixtral"), factors=stored_factors(TINY["mixtral"], spec_of("mixtral"), i + 1)),
            tmp_path / key,
        )
    llm = LLM(TorchRunner(model_of("mixtral", torch.float32)), None)
    before = answers(llm, [None, None, None])
    llm.add_adapter("one", tmp_path / "one")
    llm.add_adapter("two", tmp_path / "two")
    uses: list[str | None] = ["one", None, "two", "one", "two", None]
    together = answers(llm, uses)
    params = SamplingParams(max_new_tokens=12, temperature=0.0)
    for i, use in enumerate(uses):
        prompt = [5, 9, 2, 11, 40, 3][: 3 + i % 3]
        assert llm.generate(prompt, params, adapter=use).token_ids == together[i]
    assert together[1] == before[1], "who asks for none gets the model itself"
    assert len({tuple(together[0]), tuple(together[3]), tuple(before[0])}) == 2
    with pytest.raises(RequestError, match="is here already"):
        llm.add_adapter("one", tmp_path / "one")
    request = llm.engine.submit(Request(prompt=(5, 9), params=params, adapter="two"))
    with pytest.raises(RequestError, match="1 requests use the adapter 'two'"):
        llm.remove_adapter("two")
    llm.engine.cancel(request)
    llm.remove_adapter("two")
    with pytest.raises(RequestError, match="no adapter called 'two'; loaded: one"):
        llm.generate([5, 9], params, adapter="two")


def test_cached_prefixes_are_not_shared_between_adapters(tmp_path: Path) -> None:
    spec = spec_of("mixtral")
    save(Adapter(spec=spec, factors=stored_factors(TINY["mixtral"], spec, 1)), tmp_path / "one")
    llm = LLM(TorchRunner(model_of("mixtral", torch.float32)), None)
    llm.add_adapter("one", tmp_path / "one")
    prompt, params = [7] * 33, SamplingParams(max_new_tokens=3, temperature=0.0)
    plain = llm.generate(prompt, params)
    adapted = llm.generate(prompt, params, adapter="one")
    assert adapted.n_cached_tokens == 0
    assert llm.generate(prompt, params, adapter="one").n_cached_tokens == 32
    again = llm.generate(prompt, params)
    assert again.n_cached_tokens == 32 and again.token_ids == plain.token_ids
