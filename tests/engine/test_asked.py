"""What is handed to the offline API and is something else is an error of ours, never an answer to another question."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from quadriga import LLM, SamplingParams
from quadriga.engine import asked
from quadriga.errors import RequestError, TemplateError
from quadriga.nn.transformer import Transformer, random_parameters
from quadriga.runners.torch import TorchRunner
from quadriga.text.chat import CHATML, render
from quadriga.text.tokenizer import Tokenizer
from tests.checkpoint.models import TINY
from tests.engine.test_llm import Letters

SHORT = SamplingParams(max_new_tokens=2)


@pytest.fixture(scope="module")
def tiny() -> LLM:
    model = Transformer.from_parameters(TINY["dbrx"], random_parameters(TINY["dbrx"], std=0.4)).eval()
    return LLM(TorchRunner(model), Tokenizer(Letters(), special_ids={}, bos_id=5, eos_ids=(7,), chat_template=CHATML))


WRONG: dict[str, tuple[Callable[[LLM, Any], object], list[Any], str]] = {
    "settings": (
        lambda llm, given: llm.generate([3, 1], given),
        [{"temperature": 0.7}, {}, [], 0, "greedy", [SHORT]],
        r"params must be SamplingParams\(\.\.\.\) or None",
    ),
    "settings of a conversation": (
        lambda llm, given: llm.chat("Hi", given),
        [{"temperature": 0.7}, {}, 0],
        r"params must be SamplingParams",
    ),
    "settings of many": (
        lambda llm, given: llm.generate_many([[3, 1], [4]], given),
        [{"temperature": 0.7}, {0: SHORT, 1: SHORT}, 0, "xy", [SHORT, None, SHORT], [SHORT, {}]],
        r"params must be SamplingParams|2 prompts need as many params, got 3",
    ),
    "prompts": (
        lambda llm, given: llm.generate_many(given, SHORT),
        [None, 5, np.array(3)],
        "prompts must be several",
    ),
    "an adapter's name": (
        lambda llm, given: llm.generate([3, 1], SHORT, adapter=given),
        [0, 1, b"mine", ["mine"]],
        "an adapter is asked for by its name, a text",
    ),
    "adapters' names": (
        lambda llm, given: llm.generate_many([[3, 1]], SHORT, adapters=given),
        [[0], [b"mine"]],
        "an adapter is asked for by its name, a text",
    ),
    "steering": (
        lambda llm, given: llm.generate([3, 1], SHORT, steering=given),
        [["layer 0"], [(0, 1, 0.0)], 3],
        "steering must be",
    ),
    "a continuation": (
        lambda llm, given: llm.loglikelihood([3, 1], given),
        [b"x", {4: 1}, {4, 9}, [1.0], [97], []],
        "token",
    ),
    "a context that is scored": (
        lambda llm, given: llm.score([(given, [4])]),
        [b"x", {4: 1}, {4, 9}, [1.0], [True], [97], [], "text"],
        "token",
    ),
    "pairs": (
        lambda llm, given: llm.score(given),
        ["ab", [[3, 1, 4]], [3], 3],
        "pairs must be",
    ),
}


@pytest.mark.parametrize("what", WRONG)
def test_something_else_is_refused_before_anything_runs(tiny: LLM, what: str) -> None:
    ask, wrong, says = WRONG[what]
    before = tiny.engine.stats().n_steps
    for given in wrong:
        with pytest.raises(RequestError, match=says):
            ask(tiny, given)
    assert tiny.engine.stats().n_steps == before and not tiny.engine.has_work


def test_messages_that_are_none(tiny: LLM) -> None:
    for given in (None, 3, b"Hi", {"role": "user", "content": "Hi"}):
        with pytest.raises(TemplateError, match="messages must be a text or a list of messages"):
            tiny.chat(given, SHORT)  # type: ignore[arg-type]
    for given in (["Hi"], [None], [3]):
        with pytest.raises(TemplateError, match=r"messages\[0\] must have a role and a content"):
            tiny.chat(given, SHORT)  # type: ignore[arg-type]
    for field in (b"x", {1}, object()):
        with pytest.raises(TemplateError, match=r"messages\[0\] must be made of JSON values"):
            tiny.chat([{"role": "user", "content": "Hi", "name": field}], SHORT)  # type: ignore[dict-item]


def test_a_calls_arguments_are_what_json_makes_of_them(tiny: LLM) -> None:
    template = "{% for m in messages %}{{ m.tool_calls | tojson }}{% endfor %}"
    call = {"function": {"name": "f", "arguments": {1: (2, None)}}}
    assert tiny.tokenizer is not None
    shown = render([{"role": "assistant", "content": "", "tool_calls": [call]}], tiny.tokenizer, template)
    assert shown.text == '[{"function": {"name": "f", "arguments": {"1": [2, null]}}}]'


def test_nothing_to_score_is_no_scores(tiny: LLM) -> None:
    assert tiny.score([]) == [] == tiny.score(iter(()))  # type: ignore[arg-type]


def test_arrays_are_ids_wherever_ids_are(tiny: LLM) -> None:
    plain = tiny.score([([3, 1], [4, 9])])[0]
    assert tiny.score([(np.array([3, 1]), np.array([4, 9]))])[0] == plain  # type: ignore[list-item]
    assert tiny.loglikelihood(np.array([3, 1]), np.array([4, 9])) == (plain.logprob, plain.greedy)  # type: ignore[arg-type]


def test_the_first_answer_has_the_seed_itself() -> None:
    one = SamplingParams(seed=4)
    assert asked.of_choice(one, 0) is one and asked.of_choice(SHORT, 3) is SHORT
    assert asked.of_choice(one, 1).seed not in (None, 4, 5)
