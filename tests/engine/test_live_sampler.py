"""The engine over weights that change: what it samples is what a model loaded with them samples."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from quadriga.engine.live_sampler import LiveSampler
from quadriga.engine.llm import LLM
from quadriga.engine.request import SamplingParams
from quadriga.errors import ConfigError
from quadriga.kernels.cpu.packing import Packed
from quadriga.model.config import ModelConfig
from quadriga.nn.transformer import random_parameters
from quadriga.runners.compiled import CompiledModel, pack_parameters
from quadriga.runners.live_weights import LiveWeights
from quadriga.text.tokenizer import Tokenizer, load_directory
from tests.checkpoint.models import TINY
from tests.text.vocabularies import write_bpe

PROMPTS = [[5, 9, 11, 30, 7], [77, 3, 8]]


@pytest.fixture
def tokenizer(tmp_path: Path) -> Tokenizer:
    found = load_directory(write_bpe(tmp_path, eos_token="<|im_end|>"))
    assert found is not None
    return found


def config_of(family: str) -> ModelConfig:
    return replace(TINY[family], vocab_size=448, max_seq_len=64, eos_ids=(2,))


def weights(config: ModelConfig, seed: int) -> dict[str, np.ndarray]:
    return {name: values.numpy() for name, values in random_parameters(config, seed=seed, std=0.1).items()}


def fresh(config: ModelConfig, tokenizer: Tokenizer, parameters: dict[str, np.ndarray]) -> list[list[list[int]]]:
    """Three answers to each prompt by a model that was loaded with these weights."""
    model = CompiledModel(config, pack_parameters(parameters, "float32"), threads=1, n_blocks=64, kv_format="float32")
    params = [SamplingParams(max_new_tokens=6, temperature=0.9, seed=seed) for seed in (4, 9)]
    found = LLM(model, tokenizer).generate_many(PROMPTS, params, n=3)
    return [[one.token_ids for one in found[i : i + 3]] for i in (0, 3)]


@pytest.mark.parametrize("family", ["mixtral", "qwen2", "gemma4", "lfm2moe"])
def test_samples_are_those_of_a_model_with_the_weights_of_now(tokenizer: Tokenizer, family: str) -> None:
    config = config_of(family)
    sampler = LiveSampler(config, tokenizer, max_len=20, threads=1)
    first, second = (weights(config, seed) for seed in (1, 2))

    def drawn() -> list[list[list[int]]]:
        return sampler.sample(PROMPTS, n=3, seeds=[4, 9], max_new_tokens=6, temperature=0.9)

    sampler.load(first.items())
    assert drawn() == fresh(config, tokenizer, first)
    # An adapter's matrices: overwritten where they lie; the prefixes of before are forgotten.
    changed = {n: v for n, v in second.items() if n.endswith(("wqkv.weight", "w_up", "router.weight", "embed.weight"))}
    sampler.load(changed.items())
    assert drawn() == fresh(config, tokenizer, first | changed)
    sampler.load(second.items())  # norms among them
    assert drawn() == fresh(config, tokenizer, second) != fresh(config, tokenizer, first)


def test_an_answer_has_the_token_that_ended_it(tokenizer: Tokenizer) -> None:
    config = config_of("mixtral")
    sampler = LiveSampler(config, tokenizer, max_len=60, threads=1)
    sampler.load(weights(config, 1).items())
    found = sampler.sample([[5]] * 40, n=2, seeds=list(range(40)), max_new_tokens=50, temperature=1.5)
    ended = [answer for group in found for answer in group if len(answer) < 50]
    ends = {0, 2}  # the checkpoint's, and the tokenizer's
    assert ended and all(answer[-1] in ends and not ends & set(answer[:-1]) for answer in ended)


def test_matrices_stay_where_they_lie(tokenizer: Tokenizer) -> None:
    config = config_of("mixtral")
    built = []

    def build(parameters: dict[str, object]) -> CompiledModel:
        built.append(dict(parameters))
        return CompiledModel(config, parameters, threads=1, n_blocks=8)  # type: ignore[arg-type]

    live = LiveWeights("q8", build)  # type: ignore[arg-type]
    values = weights(config, 1)
    model = live.load(values.items())
    name = "layers.0.attn.wqkv.weight"
    before = built[0][name]
    assert isinstance(before, Packed) and before.format == "q8"
    assert live.load([(name, 2 * values[name])]) is model and len(built) == 1
    np.testing.assert_allclose(before.unpack(), 2 * values[name], atol=0.02)
    assert live.load([("final_norm.weight", 2 * values["final_norm.weight"])]) is not model
    assert built[1][name] is before


def test_a_context_that_is_too_short_is_refused(tokenizer: Tokenizer) -> None:
    with pytest.raises(ConfigError, match="must fit the model's context of 64 tokens: got 65"):
        LiveSampler(config_of("mixtral"), tokenizer, max_len=65)
