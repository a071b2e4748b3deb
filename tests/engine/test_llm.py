"""The offline API: on a tiny model everything that can be checked exactly, on the default model the answer itself."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

import quadriga
from quadriga import LLM, SamplingParams
from quadriga.engine.engine import Engine
from quadriga.errors import ConfigError, HardwareError, RequestError, TemplateError, TokenizerError
from quadriga.nn.transformer import Transformer, random_parameters
from quadriga.runners.torch import TorchRunner
from quadriga.text.tokenizer import Tokenizer
from tests.checkpoint.models import TINY, write_hf


class Letters:
    """97 tokens, each one printable character."""

    n_vocab = 97

    def encode(self, text: str, allow_special: bool) -> list[int]:
        return [(ord(c) - 32) % 97 for c in text]

    def token_bytes(self, token_id: int) -> bytes:
        return bytes([32 + token_id])


@pytest.fixture(scope="module")
def tiny() -> LLM:
    config = TINY["dbrx"]
    model = Transformer.from_parameters(config, random_parameters(config, std=0.4)).eval()
    return LLM(TorchRunner(model), Tokenizer(Letters(), special_ids={}, bos_id=5, eos_ids=(7,), add_bos=True))


def greedy(model: LLM, ids: Sequence[int], n: int) -> list[int]:
    """Greedy decoding by reading everything again for every token."""
    made: list[int] = []
    for _ in range(n):
        made.append(int(model.logits([*ids, *made])[-1].argmax()))
    return made


def test_cached_decoding_equals_reading_everything_again(tiny: LLM) -> None:
    done = tiny.generate([3, 1, 4], SamplingParams(max_new_tokens=12, ignore_eos=True))
    assert done.token_ids == greedy(tiny, [3, 1, 4], 12)
    assert (done.finish_reason, done.n_prompt_tokens, len(done.logprobs)) == ("length", 3, 12)
    first = torch.from_numpy(tiny.logits([3, 1, 4]))[-1].log_softmax(-1)
    assert done.logprobs[0] == pytest.approx(float(first.max()), abs=1e-5)


def test_long_prompts_are_read_in_chunks_with_the_same_result(tiny: LLM) -> None:
    prompt = [i * 7 % 97 for i in range(40)]
    whole = tiny.generate(prompt, SamplingParams(max_new_tokens=5)).token_ids
    chunked = LLM(tiny.runner, tiny.tokenizer)
    chunked.engine = Engine(tiny.runner, tiny.tokenizer, max_batch_tokens=7, max_sequences=2)
    assert chunked.generate(prompt, SamplingParams(max_new_tokens=5)).token_ids == whole
    assert chunked.engine.stats().n_steps == 6 + 4


def test_many_prompts_are_answered_as_if_each_were_alone(tiny: LLM) -> None:
    prompts = [[3, 1, 4], [2, 7], [9] * 20]
    params = [SamplingParams(max_new_tokens=n, temperature=0.8, seed=n, ignore_eos=True) for n in (9, 4, 6)]
    seen: list[tuple[int, int]] = []
    together = tiny.generate_many(prompts, params, progress=lambda done, total: seen.append((done, total)))
    alone = [tiny.generate(prompt, one) for prompt, one in zip(prompts, params, strict=True)]
    assert [c.token_ids for c in together] == [c.token_ids for c in alone]
    assert seen == [(1, 3), (2, 3), (3, 3)]
    with pytest.raises(RequestError, match="3 prompts need as many params, got 1"):
        tiny.generate_many(prompts, params[:1])


def test_two_streams_may_be_read_in_turns(tiny: LLM) -> None:
    params = SamplingParams(max_new_tokens=6, ignore_eos=True)
    first, second = tiny.stream([3, 1, 4], params), tiny.stream([2, 7], params)
    turns = list(zip(first, second, strict=True))
    assert [a.token_id for a, _ in turns] == tiny.generate([3, 1, 4], params).token_ids
    assert [b.token_id for _, b in turns] == tiny.generate([2, 7], params).token_ids


def test_leaving_a_stream_frees_its_blocks(tiny: LLM) -> None:
    events = tiny.stream([3, 1, 4], SamplingParams(max_new_tokens=30, ignore_eos=True))
    next(events)
    assert tiny.engine.stats().kv_blocks_used > 0
    events.close()
    assert tiny.engine.stats().kv_blocks_used == 0
    assert not tiny.engine.has_work


def test_end_tokens_stop_unless_ignored(tiny: LLM) -> None:
    free = tiny.generate([3, 1, 4], SamplingParams(max_new_tokens=20, ignore_eos=True)).token_ids
    end = free[4]
    stopped = tiny.generate([3, 1, 4], SamplingParams(max_new_tokens=20, stop_ids=(end,)))
    assert stopped.token_ids == free[: free.index(end) + 1]
    assert stopped.finish_reason == "stop"
    assert len(stopped.text) == len(stopped.token_ids) - 1  # the end token has no text


def test_stop_strings_end_the_answer_and_stay_out_of_it(tiny: LLM) -> None:
    free = tiny.generate([3, 1, 4], SamplingParams(max_new_tokens=20, ignore_eos=True))
    stop = free.text[6:9]
    stopped = tiny.generate([3, 1, 4], SamplingParams(max_new_tokens=20, ignore_eos=True, stop=(stop,)))
    assert stopped.text == free.text[: free.text.index(stop)]
    assert stopped.finish_reason == "stop"


def test_seeds_decide_and_differ(tiny: LLM) -> None:
    def sample(seed: int) -> list[int]:
        return tiny.generate([3], SamplingParams(max_new_tokens=20, temperature=2.0, seed=seed)).token_ids

    assert sample(1) == sample(1)
    assert sample(1) != sample(2)


def test_text_prompts_begin_with_bos(tiny: LLM) -> None:
    assert tiny.prompt_ids("AB") == [5, 33, 34]
    assert tiny.prompt_ids([33, 34]) == [33, 34]


def test_the_context_is_a_limit_that_ends_the_answer(tiny: LLM) -> None:
    done = tiny.generate([1] * 60, SamplingParams(max_new_tokens=50, ignore_eos=True))
    assert (len(done.token_ids), done.finish_reason) == (4, "length")
    with pytest.raises(RequestError, match="no room for an answer"):
        tiny.generate([1] * 64)


@pytest.mark.parametrize(
    ("prompt", "says"),
    [
        ([], "at least one token"),
        ([97], "from 0 to 96, got 97"),
        ([-1], "got -1"),
        ([1.5], "whole numbers"),
        ([True], "whole numbers"),
        ([2**70], "whole numbers"),
        ([[1, 2], [3, 4]], "text or a list"),
        ([[1], [3, 4]], "text or a list"),
        (np.array(3), "text or a list"),
    ],
)
def test_prompts_that_cannot_be(tiny: LLM, prompt: list[int], says: str) -> None:
    with pytest.raises(RequestError, match=says):
        tiny.generate(prompt)
    with pytest.raises(RequestError):
        tiny.logits([1] * 65)


def test_ids_may_be_an_array_or_a_tensor(tiny: LLM) -> None:
    wanted = tiny.logits([3, 1, 4])
    assert np.array_equal(tiny.logits(np.array([3, 1, 4], dtype=np.uint16)), wanted)
    assert np.array_equal(tiny.logits(torch.tensor([3, 1, 4])), wanted)  # type: ignore[arg-type]


def test_without_a_tokenizer_only_ids_work(tiny: LLM) -> None:
    bare = LLM(tiny.runner, None, name="bare")
    assert bare.generate([3, 1, 4], SamplingParams(max_new_tokens=3)).text == ""
    with pytest.raises(TokenizerError, match="bare came without a tokenizer"):
        bare.generate("hello")


def test_a_base_model_does_not_chat(tiny: LLM) -> None:
    with pytest.raises(TemplateError, match="no chat template"):
        tiny.chat("hi")


def test_a_tokenizer_of_another_model_is_refused(tiny: LLM) -> None:
    class More(Letters):
        n_vocab = 98

    with pytest.raises(TokenizerError, match="98 tokens, the model's embedding only 97"):
        LLM(tiny.runner, Tokenizer(More(), special_ids={}))


def test_routing_covers_every_layer_and_token(tiny: LLM) -> None:
    stats = tiny.routing([3, 1, 4, 1, 5])
    assert [s.expert_ids.shape for s in stats] == [(5, 3)] * 3
    assert all(int(s.load().sum()) == 15 for s in stats)


def test_load_from_a_directory(tmp_path: Path) -> None:
    values = random_parameters(TINY["mixtral"], std=0.3)
    write_hf(tmp_path, TINY["mixtral"], parameters=values)
    seen: list[int] = []
    model = quadriga.load(tmp_path, progress=lambda done, total, what: seen.append(done))
    assert model.tokenizer is None
    assert model.logits([1, 2, 3]).shape == (3, 97)
    assert model.logits([1, 2, 3]).dtype == np.float32
    assert seen == sorted(seen)
    half = quadriga.load(tmp_path, dtype="bf16")
    assert isinstance(half.runner, TorchRunner) and half.runner.model.embed.weight.dtype == torch.bfloat16
    assert half.logits([1, 2, 3]).dtype == np.float32
    with pytest.raises(ConfigError, match="dtype must be one of"):
        quadriga.load(tmp_path, dtype="int3")
    with pytest.raises(ConfigError, match="device must be like"):
        quadriga.load(tmp_path, device="toaster")
    if not torch.cuda.is_available():
        with pytest.raises(HardwareError, match="0 CUDA devices"):
            quadriga.load(tmp_path, device="cuda")


@pytest.mark.weights
def test_the_default_model_knows_paris(smollm2: Path) -> None:
    model = quadriga.load(smollm2)
    answer = model.chat("What is the capital of France?")
    assert "Paris" in answer.text
    assert answer.finish_reason == "stop"
    assert model.generate("The capital of France is", SamplingParams(max_new_tokens=1)).text == " Paris"
