"""Answers: formulas, thoughts, long ones, going on, editing, copying where the browser has no clipboard."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.server.page.conftest import LAST, Open, events

FORMULAS = r"""The root of $x^2 = 2$ is \(\sqrt{2}\), it costs $5 or $6, and `$x$` is code.

$$\sum_{k=1}^{n} k = \frac{n(n+1)}{2}$$

Inside a line: $$a^2+b^2=c^2$$ and

\[
\int_0^1 x\,dx = \tfrac12
\]

- in a list: $\alpha \le \beta$
- broken: $\frac{1$

```
$not a formula$
```
"""


def test_formulas_are_set_and_prices_are_not(visit: Open) -> None:
    tab = visit()
    tab.answers(FORMULAS)
    tab.send("Mathematics")
    tab.page.wait_for_selector(f"{LAST} .katex")
    tab.until("document.querySelectorAll('.katex').length === 6")
    sources = tab.page.eval_on_selector_all(".katex annotation", "all => all.map((one) => one.textContent.trim())")
    assert sources == [
        "x^2 = 2", r"\sqrt{2}", r"\sum_{k=1}^{n} k = \frac{n(n+1)}{2}", "a^2+b^2=c^2", r"\int_0^1 x\,dx = \tfrac12", r"\alpha \le \beta",
    ]  # fmt: skip
    assert tab.page.locator(".katex-display").count() == 3
    text = tab.texts(".prose")[0]
    assert "it costs $5 or $6" in text and "$not a formula$" in text and r"broken: $\frac{1$" in text
    assert tab.page.evaluate("getComputedStyle(document.querySelector('.katex')).fontFamily").startswith("KaTeX_Main")
    assert tab.page.evaluate("document.fonts.check('16px KaTeX_Math')")


HOSTILE_TEX = [
    r"$\href{javascript:window.pwned=1}{x}$",
    r"$\htmlStyle{position:fixed}{x}$",
    r"$\includegraphics{https://evil.example/a.png}$",
    r"$\def\a{\a\a}\a$",
    r"$\pmb{x}\fcolorbox{red}{blue}{y}$",
    r"$<img src=x onerror=window.pwned=1>$",
    r"$\rule{9999em}{9999em}$",
]


def test_formulas_are_untrusted(visit: Open) -> None:
    tab = visit()
    tab.answers("\n\n".join(HOSTILE_TEX))
    tab.send("Try")
    tab.page.wait_for_selector(f"{LAST} .katex")
    assert tab.count(".prose a[href]") == 0 and tab.count(".prose img") == 0
    assert tab.page.evaluate("window.pwned") is None
    assert (
        tab.page.evaluate(
            "document.querySelector('.thread').scrollWidth - document.querySelector('.thread').clientWidth"
        )
        <= 0
    )
    # The test's end sees that no style attribute was tried: the policy would have named it.


def thinking(thought: str, content: str) -> str:
    """A canned stream of a model that thinks first."""
    chunks: list[dict[str, Any]] = [
        {"choices": [{"delta": {"reasoning_content": thought[i : i + 9]}, "finish_reason": None}]}
        for i in range(0, len(thought), 9)
    ]
    return "".join(f"data: {json.dumps(chunk)}\n\n" for chunk in chunks) + events(content)


def test_thoughts_are_folded_kept_and_sent_back(visit: Open) -> None:
    tab = visit()
    bodies: list[dict[str, Any]] = []

    def handle(route: Any) -> None:
        bodies.append(json.loads(route.request.post_data))
        body = thinking("First I **count** the horses.", "There are four.")
        route.fulfill(status=200, content_type="text/event-stream", body=body)

    tab.page.route("**/v1/chat/completions", handle)
    tab.send("How many?")
    thought = tab.page.locator(f"{LAST} .thought")
    assert thought.get_attribute("open") is None and "Thought for" in thought.locator("summary").inner_text()
    assert not tab.page.locator(".thought .prose").is_visible()
    assert tab.texts(f"{LAST} > .prose") == ["There are four."]
    thought.locator("summary").click()
    assert tab.texts(".thought .prose strong") == ["count"]
    (conversation,) = tab.saved()
    (given,) = [node for node in conversation["nodes"].values() if node["role"] == "assistant"]
    assert given["reasoning"] == "First I **count** the horses." and given["content"] == "There are four."
    assert given["stats"]["thoughtMs"] >= 0
    tab.send("Sure?")
    assert bodies[1]["messages"][1] == {
        "role": "assistant", "content": "There are four.", "reasoning_content": "First I **count** the horses.",
    }  # fmt: skip


def test_a_long_answer_grows_without_being_made_anew_and_is_made_where_it_is_seen(visit: Open) -> None:
    tab = visit()
    text = "\n\n".join(f"Paragraph {i} with **some** words and $x_{{{i}}}$." for i in range(800))
    tab.answers(text)
    tab.send("At length")
    tab.page.reload()
    tab.page.click(".row .open")
    tab.page.wait_for_selector(".katex")
    assert tab.count(f"{LAST} .block") == 800
    assert tab.count(".far") > 600, "far from sight it is text, which the browser's own search finds"
    assert tab.page.evaluate("document.querySelector('.far').textContent").startswith("Paragraph 0 with **some**")
    assert tab.page.evaluate("getComputedStyle(document.querySelector('.block')).contentVisibility") == "auto"
    kept = tab.page.evaluate(
        """async () => {
            const { app } = await import("/page/state.js");
            const { put, currentConversation } = await import("/page/conversations.js");
            const { update, path } = await import("/page/tree.js");
            const before = [...document.querySelectorAll(".block")];
            const node = path(currentConversation()).at(-1);
            put(update(currentConversation(), node.id, { content: node.content + "\\n\\nOne *more*." }), { save: false });
            const frame = () => new Promise((resolve) => requestAnimationFrame(resolve));
            await frame(); await frame();
            const after = [...document.querySelectorAll(".block")];
            const texts = before.map((block) => block.firstChild);
            return [after.length, before.every((block, i) => block === after[i] && after[i].firstChild === texts[i])];
        }"""
    )
    assert kept == [801, True]
    tab.page.evaluate("document.querySelector('.scroller').scrollTop = 0")
    tab.page.wait_for_selector(".block:first-child strong:text-is('some')")
    tab.page.wait_for_selector(".block:first-child .katex")


@pytest.mark.parametrize(
    ("first", "rest"),
    [
        ("One\n\nTwo", " goes on"),
        ("- a\n- b\n\n", "- c, of the same list"),
        ("1. a\n\n   inside", "\n\n2. b"),
        ("Title", "\n=====\n\nText"),
        ("```\ncode\n\nmore", "\n```\n\nafter"),
        ("| a |\n|---|\n| 1 |", "\n| 2 |\n\nend"),
        ("See [it][1].\n\nAnd", " more.\n\n[1]: https://example.org/"),
        ("a\r\n\r\nb", "c\r\n\r\nd"),
        ("$$\nx", "\n$$\n\ny"),
        ("> quote\n", "> goes on"),
        ("", "begins"),
    ],
)
def test_a_text_that_grows_reads_as_the_whole_one(visit: Open, first: str, rest: str) -> None:
    tab = visit()
    found = tab.page.evaluate(
        """async ([first, rest]) => {
            const { read, blockHtml } = await import("/page/markdown.js");
            let seen = null;
            for (let n = 0; n <= rest.length; n++) seen = read(first + rest.slice(0, n), seen);
            const html = (one) => one.blocks.map(({ token }) => blockHtml(token)).join("");
            return [html(seen), html(read(first + rest))];
        }""",
        [first, rest],
    )
    assert found[0] == found[1] and found[1]


def test_references_of_another_block_are_heeded_when_they_come(visit: Open) -> None:
    tab = visit()
    tab.answers("See [the page][1].\n\n[1]: https://example.org/a")
    tab.send("Where?")
    assert tab.page.get_attribute(f"{LAST} .prose a", "href") == "https://example.org/a"


def test_an_answer_that_reached_its_limit_is_gone_on_with(visit: Open) -> None:
    tab = visit({"sampling": {"temperature": 0, "max_tokens": 10, "top_p": 1}})
    tab.send("Tell me more")
    (before,) = [node for node in tab.saved()[0]["nodes"].values() if node["role"] == "assistant"]
    tab.page.click(f"{LAST} button[aria-label='Go on']")
    tab.until("[...document.querySelectorAll('.cost span')].some((span) => span.innerText === '20 tokens')")
    tab.done()
    (after,) = [node for node in tab.saved()[0]["nodes"].values() if node["role"] == "assistant"]
    assert after["id"] == before["id"] and after["content"].startswith(before["content"])
    messages = [{"role": "user", "content": "Tell me more"}, {"role": "assistant", "content": before["content"]}]
    body = {"model": "tiny", "messages": messages, "max_tokens": 10, "temperature": 0, "continue_final_message": True}
    went_on = tab.live.post("/v1/chat/completions", body).json()["choices"][0]["message"]["content"]
    assert after["content"] == before["content"] + went_on and after["stats"]["tokens"] == 20


def test_routing_of_what_came_before_and_after_going_on_is_one(visit: Open) -> None:
    tab = visit({"lens": True, "sampling": {"temperature": 0, "max_tokens": 10, "top_p": 1}})
    tab.send("Tell me more")
    assert tab.count(f"{LAST} .token") == 10
    tab.page.click(f"{LAST} button[aria-label='Go on']")
    tab.until("document.querySelectorAll('.token').length === 20")
    tab.done()
    (given,) = [node for node in tab.saved()[0]["nodes"].values() if node["role"] == "assistant"]
    assert given["trace"]["n_tokens"] == 20 and len(given["trace"]["weights"]) == 20 * 3 * 3


def test_an_edited_answer_stands_beside_the_old_one_and_is_what_the_model_reads(visit: Open) -> None:
    tab = visit()
    bodies = tab.answers("It is read.", " Truly.", "Indeed.")
    tab.send("Which colour?")
    assert tab.count(f"{LAST} button[aria-label='Go on']") == 0, "it ended by itself"
    tab.page.click(f"{LAST} button[aria-label=Edit]")
    tab.page.fill(".editor textarea", "It is green.")
    tab.page.press(".editor textarea", "Control+Enter")
    assert tab.texts(f"{LAST} .prose") == ["It is green."] and tab.texts(f"{LAST} .branches") == ["2 / 2"]
    assert "edited" in tab.texts(f"{LAST} .cost")[0] and len(bodies) == 1
    tab.page.click(f"{LAST} button[aria-label='Go on']")
    tab.page.wait_for_selector(f"{LAST} .prose:has-text('It is green. Truly.')")
    tab.done()
    assert bodies[1]["messages"][-1] == {"role": "assistant", "content": "It is green."}
    assert bodies[1]["continue_final_message"] is True and bodies[1]["add_generation_prompt"] is False
    tab.send("Sure?")
    assert bodies[2]["messages"][1]["content"] == "It is green. Truly."
    tab.page.locator(".message.assistant button[aria-label='Previous version']").click()
    assert tab.texts(".prose") == ["It is read."]


def test_copying_works_where_the_browser_has_no_clipboard_for_us(visit: Open) -> None:
    tab = visit()
    tab.page.add_init_script("Object.defineProperty(Navigator.prototype, 'clipboard', { get: () => undefined })")
    tab.page.reload()
    tab.answers("Copied over *plain* http.")
    tab.send("Copy me")
    copied = tab.page.evaluate(
        """() => new Promise((resolve) => {
            document.addEventListener("copy", () => resolve(document.activeElement.value), { once: true });
            document.querySelector(".message.assistant button[aria-label=Copy]").click();
        })"""
    )
    assert copied == "Copied over *plain* http."
    assert tab.count("body > .offscreen") == 0 and tab.count(".toast") == 0


@pytest.mark.parametrize("say", ["stop", "length"])
def test_only_what_did_not_end_by_itself_is_gone_on_with(visit: Open, say: str) -> None:
    tab = visit()

    def handle(route: Any) -> None:
        route.fulfill(status=200, content_type="text/event-stream", body=events("Half a sent", say))

    tab.page.route("**/v1/chat/completions", handle)
    tab.send("Speak")
    assert tab.count(f"{LAST} button[aria-label='Go on']") == (say == "length")
