"""What ends an assistant's turn: the vocabulary's eos, special tokens by name, and what the template writes."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from quadriga import LLM, SamplingParams
from quadriga.engine.text_model import TextModel
from quadriga.nn.transformer import Transformer, random_parameters
from quadriga.runners.base import PassResult
from quadriga.runners.torch import TorchRunner
from quadriga.text import turn_ends as module
from quadriga.text.chat import CHATML
from quadriga.text.tokenizer import Tokenizer, load_directory, load_gguf, load_sentencepiece
from quadriga.text.turn_ends import TurnEnds, turn_ends
from tests.checkpoint.models import TINY
from tests.server.conftest import Bytes, running
from tests.text import vocabularies
from tests.text.template_language import STRUCTURES

QUESTION = [{"role": "user", "content": "Hi"}]
EOS = "</s>"


def tokenizer_of(
    folder: Path, template: str | None, special: list[str], others: Sequence[str] = (), **config: Any
) -> Tokenizer:
    """A BPE vocabulary with bos <s>, eos </s>, and these special and other added tokens."""
    folder.mkdir(exist_ok=True)
    spec = vocabularies.bpe(["<s>", EOS, *special])
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": False}
    first = max(spec["model"]["vocab"].values()) + 1
    spec["added_tokens"] += [{"id": first + i, "content": text, **flags} for i, text in enumerate(others)]
    (folder / "tokenizer.json").write_text(json.dumps(spec))
    named = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": EOS}
    (folder / "tokenizer_config.json").write_text(json.dumps({**named, "chat_template": template, **config}))
    tokenizer = load_directory(folder)
    assert tokenizer is not None
    return tokenizer


def named(tokenizer: Tokenizer, ends: TurnEnds) -> set[str]:
    return {tokenizer.token_text(i) for i in ends.ids}


def simple(before: str, behind: str, sign: str = "") -> str:
    return (
        "{% for m in messages %}{% if m.role == 'assistant' %}" + before + "{{ m.content }}" + behind + "{% else %}"
        "<|"
        + sign
        + "{{ m.role }}|>{{ m.content }}{% endif %}{% endfor %}{% if add_generation_prompt %}"
        + before
        + "{% endif %}"
    )


FOUND = {
    # template, special tokens besides <s> and </s>, ends besides </s>
    "chatml": (CHATML, ["<|im_start|>", "<|im_end|>"], {"<|im_end|>"}),
    "chatml over lines": (STRUCTURES["chatml"], ["<|im_start|>", "<|im_end|>"], {"<|im_end|>"}),
    "an answer left open while it is the last": (
        STRUCTURES["chatml whose last answer stays open"],
        ["<|im_start|>", "<|im_end|>"],
        {"<|im_end|>"},
    ),
    "headers": (STRUCTURES["headers with a date"], ["<|header|>", "<|/header|>", "<|eot_id|>", "<|eom_id|>"], {"<|eot_id|>", "<|eom_id|>"}),
    "user and model": (STRUCTURES["turns of user and model"], ["<start_of_turn>", "<end_of_turn>"], {"<end_of_turn>"}),
    "pipes": (STRUCTURES["pipes and end"], ["<|user|>", "<|assistant|>", "<|system|>", "<|end|>"], {"<|end|>"}),
    "eos itself": (STRUCTURES["brackets, system in the first user turn"], ["[INST]", "[/INST]"], set()),
    "channels": (
        STRUCTURES["channels"],
        ["<|start|>", "<|channel|>", "<|message|>", "<|end|>", "<|return|>", "<|call|>"],
        {"<|return|>", "<|call|>"},  # <|end|> ends a thought there
    ),
    "channels whose every message has one end": (
        simple("<|start|>assistant<|channel|>final<|message|>", "<|end|>"),
        ["<|start|>", "<|channel|>", "<|message|>", "<|end|>", "<|return|>", "<|call|>"],
        {"<|return|>", "<|call|>"},
    ),
    "capitals": (STRUCTURES["capitals and bars"], ["<|START_OF_TURN_TOKEN|>", "<|END_OF_TURN_TOKEN|>"], {"<|END_OF_TURN_TOKEN|>"}),
    "fullwidth bars": (STRUCTURES["thinking with fullwidth bars"], ["<｜User｜>", "<｜end▁of▁sentence｜>"], {"<｜end▁of▁sentence｜>"}),
    "marked for training": (STRUCTURES["generation marks"], ["<|im_start|>", "<|im_end|>"], {"<|im_end|>"}),
    "no end but the next turn": (STRUCTURES["no end of turn"], ["[gMASK]", "<sop>", "<|user|>", "<|assistant|>"], {"<|user|>"}),
    "a name nobody knows": (simple("<|bot|>", "<|fertig|>\n"), ["<|bot|>", "<|fertig|>"], {"<|fertig|>"}),
    "behind a line break": (simple("A: ", "\n<stop>\n"), ["<stop>"], {"<stop>"}),
    "endofturn": (simple("<|b|>", "<|endofturn|>"), ["<|b|>", "<|endofturn|>"], {"<|endofturn|>"}),
    "a mark that another begins": (simple("A: ", "<|fin|><|x|>"), ["<|fin|>", "<|fin|><|x|>"], {"<|fin|><|x|>"}),
    "another end while the talk goes on": (
        "{% for m in messages %}{{ m.content }}{{ '<|last|>' if loop.last else '<|more|>' }}{% endfor %}",
        ["<|last|>", "<|more|>"],
        {"<|last|>"},
    ),
    "no brackets at all": (simple("A: ", "STOPTURN"), ["STOPTURN"], {"STOPTURN"}),
    "needs a system prompt": (
        "{% if messages[0].role != 'system' %}{{ raise_exception('system first') }}{% endif %}" + simple("A: ", "<|fertig|>"),
        ["<|fertig|>"],
        {"<|fertig|>"},
    ),
    "refuses a conversation that ends with an answer": (
        simple("A: ", "<|fertig|>") + "{% if messages[-1].role != 'user' %}{{ raise_exception('user last') }}{% endif %}",
        ["<|fertig|>"],
        {"<|fertig|>"},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", FOUND)
def test_ends_are_found_whatever_eos_is(tmp_path: Path, name: str) -> None:
    template, special, expected = FOUND[name]
    tokenizer = tokenizer_of(tmp_path, template, special)
    ends = turn_ends(tokenizer)
    assert named(tokenizer, ends) == {EOS, *expected}
    assert ends.texts == ()


NOT_FOUND = {
    "words only": (STRUCTURES["plain words"].replace("eos_token", "' '"), []),
    "a template that fails": ("{{ raise_exception('no') }}", ["<|fertig|>"]),
    "a template that never ends": (
        "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
        ["<|fertig|>"],
    ),
    "no template": (None, ["<|fertig|>"]),
    "answers left out": (
        "{% for m in messages if m.role == 'user' %}{{ m.content }}<|fertig|>{% endfor %}",
        ["<|fertig|>"],
    ),
    "a token further on": (simple("A: ", " and so on <|fertig|>", sign="x"), ["<|fertig|>"]),
}


@pytest.mark.parametrize("name", NOT_FOUND)
def test_nothing_is_made_up(tmp_path: Path, name: str) -> None:
    template, special = NOT_FOUND[name]
    tokenizer = tokenizer_of(tmp_path, template, special)
    assert turn_ends(tokenizer) == TurnEnds(frozenset({tokenizer.special_ids[EOS]}))


@pytest.mark.parametrize("name", sorted(set(module._NAMES) - {"<|end|>"}))
def test_names_end_an_answer_without_any_template(tmp_path: Path, name: str) -> None:
    special = [text for text in (name, "<|tool|>") if text != EOS]
    tokenizer = tokenizer_of(tmp_path, None, special, eos_token="<s>")
    assert named(tokenizer, turn_ends(tokenizer)) == {"<s>", EOS, name}


@pytest.mark.parametrize("company", [["<|return|>", "<|call|>"], ["<|calls|>", "<|flush|>"], []])
def test_end_ends_a_thought_where_other_tokens_end_the_turn(tmp_path: Path, company: list[str]) -> None:
    tokenizer = tokenizer_of(tmp_path, None, ["<|end|>", *company])
    assert named(tokenizer, turn_ends(tokenizer)) == {EOS, *(company or ["<|end|>"])}


@pytest.mark.parametrize("company", [["<|return|>"], ["<|call|>"], ["<|return|>", "<|calls|>"], ["<|flush|>"]])
def test_end_ends_an_answer_beside_a_part_of_those_others(tmp_path: Path, company: list[str]) -> None:
    tokenizer = tokenizer_of(tmp_path, None, ["<|end|>", *company])
    assert named(tokenizer, turn_ends(tokenizer)) == {EOS, "<|end|>", *company}


def test_an_added_token_that_is_not_special_ends_turns_where_the_template_says_so(tmp_path: Path) -> None:
    """GGUF files have <|im_end|> as a user-defined token; a vocabulary may have </s> for HTML."""
    added = ["<|im_start|>", "<|im_end|>"]
    tokenizer = tokenizer_of(tmp_path, CHATML, [], added)
    assert named(tokenizer, turn_ends(tokenizer)) == {EOS, "<|im_end|>"}
    assert turn_ends(tokenizer).texts == ()
    tokenizer = tokenizer_of(tmp_path, None, [], ["<eos>", "[EOS]"])
    assert named(tokenizer, turn_ends(tokenizer)) == {EOS}


@pytest.mark.parametrize(
    ("template", "text"),
    [
        (CHATML, "<|im_end|>"),
        (simple("A: ", "\n</answer>\n"), "</answer>"),
        (simple("[/INST]", "\n").replace("<|{{", "[INST]{{"), "[INST]"),
    ],
)
def test_a_mark_that_is_no_token_ends_a_chat_answer_by_its_text(tmp_path: Path, template: str, text: str) -> None:
    tokenizer = tokenizer_of(tmp_path, template, [])
    assert turn_ends(tokenizer) == TurnEnds(frozenset({tokenizer.special_ids[EOS]}), (text,))


def test_generation_config_s_tokens_all_end_an_answer(tmp_path: Path) -> None:
    tmp_path.joinpath("generation_config.json").write_text('{"eos_token_id": [2, 3]}')
    tokenizer = tokenizer_of(tmp_path, None, ["<|a|>", "<|b|>"])
    assert named(tokenizer, turn_ends(tokenizer)) == {EOS, "<|a|>", "<|b|>"}


def test_a_gguf_file_s_three_ends_and_its_template_s() -> None:
    metadata = vocabularies.gguf_bpe() | {"tokenizer.ggml.eos_token_id": 0, "tokenizer.ggml.eot_token_id": 5}
    metadata |= {"tokenizer.ggml.eom_token_id": 6, "tokenizer.chat_template": CHATML}
    tokenizer = load_gguf(metadata)
    assert tokenizer is not None
    assert turn_ends(tokenizer) == TurnEnds(frozenset({0, 5, 6, tokenizer.special_ids["<|im_end|>"]}))


def test_sentencepiece_vocabularies_too(tmp_path: Path) -> None:
    tokenizer = load_sentencepiece(vocabularies.sentencepiece_model(tmp_path), chat_template=simple("A: ", "<s>"))
    assert named(tokenizer, turn_ends(tokenizer)) == {"</s>", "<s>"}


# In a model ----------------------------------------------------------------------------------------------------------


class Script(TorchRunner):
    """A tiny model that says one text again and again, a byte a token."""

    def __init__(self, text: str, n_vocab: int) -> None:
        config = replace(TINY["llama2"], vocab_size=n_vocab, max_seq_len=256, eos_ids=(256,))
        super().__init__(Transformer.from_parameters(config, random_parameters(config)), 64)
        self._script, self._at = text.encode(), 0

    def forward(self, batch: Any, **wanted: Any) -> PassResult:
        result = super().forward(batch, **wanted)
        if len(result.logits):
            logits = np.full_like(result.logits, -9.0)
            logits[:, self._script[self._at % len(self._script)]] = 9.0
            self._at += 1
            result = replace(result, logits=logits)
        return result


def script(text: str) -> LLM:
    return LLM(Script(text, 257), Tokenizer(Bytes(), special_ids={EOS: 256}, eos_ids=(256,), chat_template=CHATML))


PARAMS = SamplingParams(max_new_tokens=40)


def test_a_chat_stops_at_the_template_s_token(tmp_path: Path) -> None:
    tokenizer = tokenizer_of(tmp_path, simple("A: ", "<|fertig|>"), ["<|fertig|>"])
    config = replace(TINY["llama2"], vocab_size=448, eos_ids=())
    llm = LLM(TorchRunner(Transformer.from_parameters(config, random_parameters(config))), tokenizer)
    end = tokenizer.special_ids["<|fertig|>"]
    assert llm.end_ids == {end, tokenizer.special_ids[EOS]}
    done = llm.chat("Hi", SamplingParams(max_new_tokens=8, logit_bias={end: 100.0}))
    assert (done.token_ids, done.finish_reason, done.text) == ([end], "stop", "")


def test_every_way_to_chat_stops_at_the_template_s_text_and_nothing_else_does() -> None:
    said = "Good day.<|im_end|>\n<|im_start|>user\n"
    assert script(said).chat("Hi", PARAMS).text == "Good day."
    assert script(said).chat("Hi", replace(PARAMS, stop=(".",))).text == "Good day"
    assert "".join(event.text for event in script(said).chat_stream("Hi", PARAMS)) == "Good day."
    assert TextModel(script(said), chat=True).generate(["Hi"], max_new_tokens=40) == ["Good day."]
    assert script(said).generate("Hi", PARAMS).finish_reason == "length"
    assert TextModel(script(said)).generate(["Hi"], max_new_tokens=20) == ["Good day.<|im_end|>\n"]
    assert script(said).chat("Hi", replace(PARAMS, ignore_eos=True)).finish_reason == "length"


def test_servers_stop_there_too() -> None:
    llm = script("Good day.<|im_end|>\n<|im_start|>user\n")
    with running(llm) as live:
        chat = live.post("/v1/chat/completions", {"model": "tiny", "messages": QUESTION, "max_tokens": 40}).json()
        assert (chat["choices"][0]["message"]["content"], chat["choices"][0]["finish_reason"]) == ("Good day.", "stop")
        llm.runner._at = 0  # type: ignore[attr-defined]
        message = live.post("/v1/messages", {"model": "tiny", "messages": QUESTION, "max_tokens": 40}).json()
        assert (message["content"][0]["text"], message["stop_reason"]) == ("Good day.", "end_turn")
