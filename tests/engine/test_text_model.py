"""A model as texts: where a pair is cut, what stands before a text, windows, and what results are named by."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from quadriga import SamplingParams
from quadriga.engine.scoring import Scored
from quadriga.engine.text_model import TextModel, weights_hash
from quadriga.errors import RequestError, TokenizerError
from quadriga.hub import catalogue
from quadriga.text.chat import render
from tests.server.conftest import tiny_llm


@pytest.fixture(scope="module")
def model() -> TextModel:
    """A byte a token; the end token 256 stands before a text that has nothing before it."""
    return TextModel(tiny_llm(n_blocks=80))


def test_trailing_spaces_of_a_context_belong_to_its_continuation(model: TextModel) -> None:
    assert model.pair("ab ", "c") == (list(b"ab"), list(b" c"))
    assert model.pair("ab\n\n", "c") == (list(b"ab"), list(b"\n\nc"))
    assert model.pair("ab", " c") == model.pair("ab ", "c")
    assert model.pair("", "c") == ([256], list(b"c"))
    assert model.pair("  ", "c") == ([256], list(b"  c"))


def test_a_pair_that_is_too_long_loses_its_beginning(model: TextModel) -> None:
    before, after = model.pair("x" * 2000 + "yz", "c" * 10)
    assert len(before) + len(after) == model.context + 1
    assert bytes(before[-2:]) == b"yz"
    assert after == list(b"c" * 10)


def test_likelihoods_are_those_of_the_tokens(model: TextModel) -> None:
    (found,) = model.loglikelihoods([("The ", "end")])
    logprob, greedy = model.llm.loglikelihood(list(b"The"), list(b" end"))
    assert found.logprob == pytest.approx(logprob, abs=1e-4)
    assert (found.greedy, found.n_tokens) == (greedy, 4)


def test_whole_texts_are_scored_in_windows_whose_last_has_as_much_context_as_fits(model: TextModel) -> None:
    text = "abcdefgh" * 200  # 1600 tokens, the context is 1024
    done: list[int] = []
    (found,) = model.rolling([text], done=done.append)
    ids = list(text.encode())
    first = torch.from_numpy(model.llm.engine.score([256, *ids[:1023]])[0]).log_softmax(-1)
    second = torch.from_numpy(model.llm.engine.score(ids[1600 - 1025 : -1])[0]).log_softmax(-1)
    own = [float(first[i, ids[i]]) for i in range(1024)] + [float(second[448 + i, ids[1024 + i]]) for i in range(576)]
    assert found.logprobs == pytest.approx(own, abs=2e-4)
    assert (found.n_tokens, done) == (1600, [1])
    with pytest.raises(RequestError, match="at least one token"):
        model.rolling([""])


def test_windows_of_whole_texts_are_the_harness(model: TextModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """(tokens of context, tokens predicted), as lm_eval 0.4.13's ``get_rolling_token_windows`` and
    ``make_disjoint_window`` give them for a context of 1,024."""
    asked: list[tuple[list[int], list[int]]] = []

    def score(pairs: list[tuple[list[int], list[int]]]) -> list[Scored]:
        asked.extend(pairs)
        return [Scored((0.0,) * len(after), True) for _, after in pairs]

    monkeypatch.setattr(model.llm, "score", score)
    for n, windows in {
        5: [(1, 5)],
        1024: [(1, 1024)],
        1025: [(1, 1024), (1024, 1)],
        2048: [(1, 1024), (1, 1024)],
        2400: [(1, 1024), (1, 1024), (673, 352)],
    }.items():
        asked.clear()
        text = "".join(f"{i:03d}" for i in range(n))[:n]
        model.rolling([text])
        assert [(len(before), len(after)) for before, after in asked] == windows
        assert bytes(b for _, after in asked for b in after).decode() == text
        for before, after in asked[1:]:
            assert bytes(before + after).decode() in text, "the context is what stands before"


def test_generation_is_the_engines(model: TextModel) -> None:
    params = [SamplingParams(max_new_tokens=5, temperature=1.0, seed=3 + i) for i in range(2)]
    expected = [model.llm.generate(list(p.encode()), one).text for p, one in zip(["ab", "cd"], params, strict=True)]
    done: list[int] = []
    assert model.generate(["ab", "cd"], max_new_tokens=5, temperature=1.0, seed=3, done=done.append) == expected
    assert sum(done) == 2
    with pytest.raises(RequestError, match="allow fewer"):
        model.generate(["ab"], max_new_tokens=model.context)


def test_chat_puts_prompts_into_the_template() -> None:
    llm = tiny_llm()
    chat = TextModel(llm, chat=True)
    assert llm.tokenizer is not None
    ids = render([{"role": "user", "content": "Hi "}], llm.tokenizer, add_generation_prompt=True).ids
    assert chat.pair("Hi ", " there") == (ids, list(b"there"))
    answer = llm.generate(ids, SamplingParams(max_new_tokens=4)).text
    assert chat.generate(["Hi "], max_new_tokens=4) == [answer]
    assert (chat.identity["chat"], chat.identity["weights"]) == ("True", "made in memory")


def test_a_conversation_is_answered_in_the_template() -> None:
    llm = tiny_llm()
    model = TextModel(llm)
    talk = [
        {"role": "user", "content": "One?"},
        {"role": "assistant", "content": "Two."},
        {"role": "user", "content": "Three?"},
    ]
    expected = [llm.chat(one, SamplingParams(max_new_tokens=5, temperature=0.0)).text for one in (talk, talk[:1])]
    assert model.converse([talk, talk[:1]], max_new_tokens=5) == expected
    drawn = llm.chat(talk[:1], SamplingParams(max_new_tokens=5, temperature=1.0, seed=8)).text
    assert model.converse([talk, talk[:1]], max_new_tokens=5, temperature=1.0, seed=7)[1] == drawn


def test_the_hash_follows_the_weights(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    weights = tmp_path / "a" / "model.safetensors"
    weights.write_bytes(bytes(3 << 20))
    first = weights_hash(str(tmp_path / "a"))
    assert len(first) == 16
    weights.write_bytes(bytes(3 << 20) + b"x")
    second = weights_hash(str(tmp_path / "a"))
    weights.write_bytes(bytes((3 << 20) - 1) + b"xx")
    assert len({first, second, weights_hash(str(tmp_path / "a"))}) == 3
    assert weights_hash("smollm2-135m-instruct") == "b179c9523d0e6a0f"
    assert weights_hash("quadriga-nano") == weights_hash(str(catalogue.resolve("quadriga-nano")))
    assert weights_hash("no such model") == "made in memory"


def test_the_hash_follows_every_part_of_a_split_file(tmp_path: Path) -> None:
    first, second = (tmp_path / f"m-0000{i}-of-00002.gguf" for i in (1, 2))
    first.write_bytes(b"one")
    second.write_bytes(b"two")
    (tmp_path / "m-00001-of-00003.gguf").write_bytes(b"of another")
    before = weights_hash(str(first))
    assert weights_hash(str(second)) == before
    second.write_bytes(b"owt")
    assert weights_hash(str(first)) != before


def test_a_model_without_a_tokenizer_is_refused() -> None:
    llm = tiny_llm()
    llm.tokenizer = None
    with pytest.raises(TokenizerError, match="without a tokenizer"):
        TextModel(llm)
