"""Texts and their places over HTTP, with a vocabulary that writes a space before the first word."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch

from quadriga import LLM
from quadriga.kernels.arrays import arrays
from quadriga.nn.transformer import random_parameters
from quadriga.runners.compiled import CompiledModel, pack_parameters
from quadriga.text.tokenizer import load_directory
from tests.checkpoint.models import TINY
from tests.golden import vocabularies as golden
from tests.server.conftest import Live, running

THE = next(i for i, piece in enumerate(golden.model().pieces) if piece.text == "▁the")


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    folder = tmp_path_factory.mktemp("vocabulary")
    tokenizer = load_directory(golden.write("tokenizer.model, legacy", folder))
    assert tokenizer is not None
    torch.manual_seed(0)
    config = replace(TINY["dbrx"], vocab_size=tokenizer.n_vocab, eos_ids=(), max_seq_len=256)
    runner = CompiledModel(
        config, pack_parameters(arrays(random_parameters(config, std=0.3)), "q8"), threads=1, n_blocks=64
    )
    with running(LLM(runner, tokenizer)) as server:
        yield server


BODY = {"model": "tiny", "prompt": "hello 你 World\n", "max_tokens": 3, "logit_bias": {str(THE): 100}, "logprobs": 1}


def test_a_completion_continues_its_prompt(live: Live) -> None:
    assert live.post("/v1/completions", BODY).json()["choices"][0]["text"] == " the the the"


def test_an_echo_is_the_prompt_and_every_token_begins_where_its_text_does(live: Live) -> None:
    choice = live.post("/v1/completions", {**BODY, "echo": True}).json()["choices"][0]
    text, shown = choice["text"], choice["logprobs"]
    assert text == "hello 你 World\n the the the"
    offsets = shown["text_offset"]
    assert len(offsets) == len(shown["tokens"])
    assert shown["tokens"][0] == "<s>"
    for token, start, end in zip(shown["tokens"], offsets, [*offsets[1:], len(text)], strict=True):
        if token == "<s>" or token.startswith("bytes:"):
            continue
        assert text[start:end] == (token if start else token.removeprefix(" "))
    assert offsets[-3:] == [len(text) - 12, len(text) - 8, len(text) - 4]


def test_offsets_of_an_answer_count_from_its_own_beginning(live: Live) -> None:
    whole = live.post("/v1/completions", BODY).json()["choices"][0]["logprobs"]["text_offset"]
    assert whole == [0, 4, 8]
    with live.client.stream("POST", "/v1/completions", json={**BODY, "stream": True}) as response:
        lines = [line.removeprefix("data: ") for line in response.iter_lines() if line.startswith("data: {")]
    chunks = [json.loads(line)["choices"][0] for line in lines]
    assert "".join(chunk["text"] for chunk in chunks) == " the the the"
    assert [at for chunk in chunks if chunk["logprobs"] for at in chunk["logprobs"]["text_offset"]] == whole


def test_a_prompt_may_hold_special_tokens_and_a_message_may_not(live: Live) -> None:
    def count(**body: object) -> int:
        return live.post("/v1/completions", {**BODY, **body}).json()["usage"]["prompt_tokens"]

    def ids(**body: object) -> list[int]:
        return live.post("/tokenize", {"model": "tiny", **body}).json()["tokens"]

    text = "the</s>the"
    assert ids(prompt=text).count(2) == 1
    assert ids(prompt=text, parse_special=False).count(2) == 0
    assert count(prompt=text) == len(ids(prompt=text)) == 4
    assert count(prompt=text, parse_special=False) == len(ids(prompt=text, parse_special=False)) > 4


def test_detokenize_gives_back_what_tokenize_took(live: Live) -> None:
    for text in ("hello World", "  the\n    return", "你好 é"):
        for dressed in (True, False):
            body = {"model": "tiny", "prompt": text, "add_special_tokens": dressed}
            ids = live.post("/tokenize", body).json()["tokens"]
            assert (ids[0] == 1) == dressed
            assert live.post("/detokenize", {"model": "tiny", "tokens": ids}).json()["prompt"] == text
