"""A SentencePiece vocabulary in a model: what it writes continues its prompt, what it scores is encoded as one text."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from quadriga import LLM, SamplingParams
from quadriga.engine.text_model import TextModel
from quadriga.errors import RequestError
from quadriga.nn.transformer import Transformer, random_parameters
from quadriga.runners.torch import TorchRunner
from quadriga.text.chat import CHATML
from quadriga.text.tokenizer import load_directory
from tests.checkpoint.models import TINY
from tests.golden import vocabularies as golden

PIECES = {piece.text: i for i, piece in enumerate(golden.model().pieces)}
SPACE, THE = PIECES["▁"], PIECES["▁the"]


@pytest.fixture(scope="module")
def llm(tmp_path_factory: pytest.TempPathFactory) -> LLM:
    folder = tmp_path_factory.mktemp("vocabulary")
    tokenizer = load_directory(golden.write("tokenizer.model, legacy, added_tokens_decoder", folder))
    assert tokenizer is not None
    tokenizer.chat_template = CHATML
    config = replace(TINY["llama2"], vocab_size=tokenizer.n_vocab)
    return LLM(TorchRunner(Transformer.from_parameters(config, random_parameters(config, std=0.4, seed=4))), tokenizer)


def always(token_id: int, n: int = 4) -> SamplingParams:
    return SamplingParams(max_new_tokens=n, logit_bias={token_id: 100.0})


def test_an_answer_keeps_the_indentation_it_begins_with(llm: LLM) -> None:
    assert llm.generate("def f(x):\n", always(SPACE)).text == "    "
    assert llm.generate("hello", always(THE, 2)).text == " the the"
    assert "".join(event.text for event in llm.stream("def f(x):\n", always(SPACE))) == "    "
    assert [answer.text for answer in llm.generate_many(["a", "b"], always(THE, 1))] == [" the", " the"]
    assert llm.chat("hi", always(SPACE)).text == "    "
    greedy = llm.generate("def f(x):\n", SamplingParams(max_new_tokens=6, temperature=0.0)).text
    assert TextModel(llm).generate(["def f(x):\n"], max_new_tokens=6) == [greedy] != [""]


def test_an_answer_to_nothing_is_a_text_that_begins(llm: LLM) -> None:
    assert llm.generate([1], always(THE, 2)).text == "the the"
    assert llm.generate([1, 2, 1], always(SPACE)).text == "   "


def test_a_stop_string_sees_the_first_space(llm: LLM) -> None:
    answer = llm.generate("hello", replace(always(THE, 3), stop=(" the",)))
    assert (answer.text, answer.finish_reason, len(answer.token_ids)) == ("", "stop", 1)


def test_a_context_and_its_continuation_are_encoded_as_one_text(llm: LLM) -> None:
    model = TextModel(llm)
    assert model.pair("hello", " the") == (llm.prompt_ids("hello"), [THE])
    assert model.pair("hello ", "the") == (llm.prompt_ids("hello"), [THE])
    expected = torch.from_numpy(llm.logits([*llm.prompt_ids("hello"), THE]))[-2].log_softmax(-1)
    for context, continuation in (("hello", " the"), ("hello ", "the")):
        logprob, greedy = llm.loglikelihood(context, continuation)
        assert logprob == pytest.approx(float(expected[THE]), abs=1e-5)
        assert greedy == (int(expected.argmax()) == THE)
    assert llm.loglikelihood(llm.prompt_ids("hello"), " the")[0] == pytest.approx(float(expected[THE]), abs=1e-5)
    with pytest.raises(RequestError, match="no token of its own"):
        llm.loglikelihood("hello", "")


def test_a_chat_answer_is_scored_without_a_space_of_its_own(llm: LLM) -> None:
    before, after = TextModel(llm, chat=True).pair("hi", " return")
    assert before == llm.chat_ids("hi")
    assert after == [PIECES["return"]]


def test_a_prompt_that_a_program_rendered_is_what_the_template_gives(llm: LLM) -> None:
    rendered = "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    assert llm.prompt_ids(rendered) == [1, *llm.chat_ids("hi")]
    assert llm.prompt_ids("<s>" + rendered) == [1, *llm.chat_ids("hi")], "one bos token is enough"
    marks = {golden.N, golden.N + 1}
    assert not marks & set(llm.prompt_ids(rendered, parse_special=False))
    embedded = llm.embed(rendered)
    assert np.array_equal(embedded, llm.embed(llm.prompt_ids(rendered, parse_special=False))), "words stay words"


def test_what_stands_around_a_text_is_put_there(tmp_path: Path, llm: LLM) -> None:
    tokenizer = load_directory(golden.write("tokenizer.model, legacy, eos after, no bos", tmp_path))
    ended = LLM(llm.runner, tokenizer)
    assert ended.prompt_ids("hello") == [*llm.prompt_ids("hello")[1:], 2]
    assert TextModel(ended).pair("hello", " the") == (llm.prompt_ids("hello")[1:], [THE]), "no end before an answer"
    assert ended.loglikelihood("hello", " the")[0] < 0
