"""A template means here what it means where models are trained: jinja2's sandbox as transformers 4.57.6 sets it up.

That set-up is written out below by hand (transformers/utils/chat_template_utils.py, ``_compile_jinja_template``), so these
tests need jinja2 only. Both sides get the same messages; they must render the same text, or both fail.
"""

from __future__ import annotations

import copy
import json
from datetime import datetime
from typing import Any

import jinja2
import jinja2.ext
import jinja2.sandbox
import pytest

from quadriga.errors import TemplateError
from quadriga.text.template_process import Budget, render_texts
from tests.text.template_language import CONSTRUCTS, MESSAGES, STRUCTURES, VARIABLES

BUDGET = Budget(cpu_s=20, memory_bytes=256 << 20, chars=1 << 20)


class Tracker(jinja2.ext.Extension):
    """transformers' AssistantTracker without its notes: the block is a call block, so it has a scope of its own."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Any) -> Any:
        line = next(parser.stream).lineno
        body = parser.parse_statements(["name:endgeneration"], drop_needle=True)
        return jinja2.nodes.CallBlock(self.call_method("_support"), [], [], body).set_lineno(line)

    @jinja2.pass_eval_context
    def _support(self, context: Any, caller: Any) -> Any:
        return caller()


def reference(template: str, **variables: Any) -> str:
    """What transformers renders, or the exception jinja2 raises."""

    def raise_exception(message: str) -> None:
        raise jinja2.exceptions.TemplateError(message)

    def tojson(
        x: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
    ) -> str:
        return json.dumps(x, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    def strftime_now(format: str) -> str:
        return datetime.now().strftime(format)

    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Tracker, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = strftime_now
    return environment.from_string(template).render(**copy.deepcopy(variables))


def ours(template: str, variables: dict[str, Any], messages: list[dict[str, Any]], prompt: bool) -> str:
    return render_texts(template, variables, messages, [(len(messages), prompt)], BUDGET)[0]


def compare(template: str, messages: list[dict[str, Any]], prompt: bool) -> None:
    try:
        expected = reference(template, messages=messages, add_generation_prompt=prompt, **VARIABLES)
    except Exception as error:
        said = str(error).splitlines()[0] if str(error) else type(error).__name__
        with pytest.raises(TemplateError, match=r"^the chat template cannot render these messages: .") as caught:
            ours(template, VARIABLES, messages, prompt)
        assert said[:200] in str(caught.value) or isinstance(error, RecursionError)
    else:
        assert ours(template, VARIABLES, messages, prompt) == expected


@pytest.mark.parametrize("name", CONSTRUCTS)
def test_a_construct_means_what_it_means_in_jinja2(name: str) -> None:
    for prompt in (True, False):
        compare(CONSTRUCTS[name], MESSAGES, prompt)


@pytest.mark.parametrize("name", STRUCTURES)
def test_a_template_of_a_published_structure_renders_the_same(name: str) -> None:
    for messages in (MESSAGES, MESSAGES[1:], MESSAGES[1:3], MESSAGES[:2], MESSAGES[1:2]):
        for prompt in (True, False):
            compare(STRUCTURES[name], messages, prompt)


def test_there_are_templates_that_render_and_templates_that_fail() -> None:
    """The comparison above would also pass if nothing rendered on either side."""

    def renders(template: str) -> bool:
        try:
            reference(template, messages=MESSAGES, add_generation_prompt=True, **VARIABLES)
        except Exception:
            return False
        return True

    good = [name for name, template in CONSTRUCTS.items() if renders(template)]
    assert len(good) >= 60 and len(CONSTRUCTS) - len(good) >= 15
    assert sum(map(renders, STRUCTURES.values())) >= 20


@pytest.mark.parametrize(
    "value",
    [
        0,
        -1,
        2**70,
        1.5,
        -0.0,
        1e300,
        float("inf"),
        True,
        None,
        "",
        "\ud800 \x00\u2028",
        [],
        {},
        [[{"a": [None]}]],
        {"": ""},
    ],
)
def test_values_cross_to_the_process_and_back_unchanged(value: Any) -> None:
    template = "{{ x }}|{{ [x] }}|{{ x is none }}|{{ x is string }}|{{ x | tojson }}"
    expected = reference(template, x=value)
    assert render_texts(template, {"x": value}, [], [(0, False)], BUDGET) == [expected]


def test_jobs_are_renderings_of_the_first_messages() -> None:
    template = "{% for m in messages %}{{ m.role[0] }}{% endfor %}{{ '?' if add_generation_prompt }}"
    jobs = [(4, False), (1, True), (0, True), (2, False)]
    assert render_texts(template, {}, MESSAGES, jobs, BUDGET) == ["suau", "s?", "?", "su"]
