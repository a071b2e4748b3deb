"""The chat page in a browser, against a real server with a tiny mixture of experts. See conftest for what every test ends with."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from quadriga import LLM
from quadriga.kernels.arrays import arrays
from quadriga.nn.transformer import random_parameters
from quadriga.runners.compiled import CompiledModel, pack_parameters
from quadriga.server.guard import Limits
from quadriga.text.tokenizer import Tokenizer
from tests.checkpoint.models import TINY
from tests.server.conftest import Bytes, Gate, Live, running, tiny_llm
from tests.server.page.conftest import KEY, LAST, Open, Tab, file_of_version_1, watch
from tests.waiting import until

# Conversations -------------------------------------------------------------------------------------------------------


def test_a_chat_is_answered_by_the_model_and_is_there_after_a_reload(visit: Open) -> None:
    tab = visit()
    tab.send("Tell me of four horses")
    body = {"model": "tiny", "messages": [{"role": "user", "content": "Tell me of four horses"}], "max_tokens": 24}
    sampling = {"temperature": 0, "top_p": 0.95, "top_k": 0, "min_p": 0, "repetition_penalty": 1}
    expected = tab.live.post("/v1/chat/completions", body | sampling).json()["choices"][0]["message"]["content"]
    (conversation,) = tab.saved()
    said = {node["role"]: node["content"] for node in conversation["nodes"].values()}
    assert said == {"user": "Tell me of four horses", "assistant": expected}
    assert tab.texts(".row .title") == ["Tell me of four horses"]
    cost = tab.texts(f"{LAST} .cost")[0]
    assert "tokens/s" in cost and "24 tokens" in cost and "of 1.02K" in cost and "token limit reached" in cost
    tab.page.reload()
    tab.page.click(".row .open")
    assert tab.texts(".said") == ["Tell me of four horses"]
    assert tab.page.locator(LAST).count() == 1


def test_what_is_said_and_set_is_what_the_server_gets(visit: Open) -> None:
    tab = visit({"sampling": {"temperature": 0.3, "seed": 7, "max_tokens": None, "top_k": 40}})
    bodies = tab.answers("First answer.", "Second answer.")
    tab.page.keyboard.press("Alt+KeyS")
    tab.page.fill("textarea[name=system]", "Be brief.")
    tab.page.fill("input[name=temperature]", "3")  # outside the range: not taken
    tab.page.fill("input[name=top_p]", "0.5")
    tab.page.keyboard.press("Escape")
    tab.send("One")
    tab.send("Two")
    assert bodies[1]["messages"] == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "One"},
        {"role": "assistant", "content": "First answer."},
        {"role": "user", "content": "Two"},
    ]
    sampling = {
        name: bodies[1].get(name) for name in ("temperature", "top_p", "top_k", "seed", "max_tokens", "routing")
    }
    assert sampling == {"temperature": 0.3, "top_p": 0.5, "top_k": 40, "seed": 7, "max_tokens": None, "routing": None}


def test_stop_keeps_what_came_and_frees_the_server(visit: Open) -> None:
    tab = visit({"sampling": {"temperature": 0, "max_tokens": 900}})
    with Gate(tab.live) as gate:
        tab.send("Go on", wait=False)
        shown = "[...document.querySelectorAll('.cost span')].some((s) => /^([5-9]|\\d\\d) tokens$/.test(s.innerText))"

        def one_more() -> bool:
            gate.open()  # what has come is drawn when something comes, not more often than a screen shows
            return bool(tab.page.evaluate(shown))

        assert until(one_more)
        tab.page.click("button[aria-label=Stop]")
        tab.done()
        gate.let(1)
    (conversation,) = tab.saved()
    (answer,) = [node for node in conversation["nodes"].values() if node["role"] == "assistant"]
    assert answer["finish"] == "stopped" and 5 <= answer["stats"]["tokens"] < 900 and answer["content"]
    assert "stopped" in tab.texts(f"{LAST} .cost")[0]
    assert tab.live.settled()


def test_regenerating_and_editing_make_branches_that_can_be_walked(visit: Open) -> None:
    tab = visit()
    bodies = tab.answers("alpha", "beta", "gamma", "delta")
    tab.send("Question")
    tab.page.click(f"{LAST} button[aria-label='Another answer']")
    tab.until("document.querySelector('.prose')?.textContent.includes('beta')")
    tab.done()
    assert tab.texts(".message.assistant .branches") == ["2 / 2"]
    tab.page.click(".message.assistant button[aria-label='Previous version']")
    assert tab.texts(".prose") == ["alpha"]

    tab.send("More")  # goes on from alpha
    assert [m["content"] for m in bodies[2]["messages"]] == ["Question", "alpha", "More"]
    tab.page.locator(".message.user").first.hover()
    tab.page.locator("button[aria-label=Edit]").first.click()
    tab.page.fill(".editor textarea", "Another question")
    tab.page.press(".editor textarea", "Enter")
    tab.done()
    assert tab.texts(".said") == ["Another question"] and tab.texts(".prose") == ["delta"]
    assert [m["content"] for m in bodies[3]["messages"]] == ["Another question"]
    assert tab.texts(".message.user .branches") == ["2 / 2"]
    tab.page.keyboard.press("Alt+Comma")  # the version before, with everything that followed it
    assert tab.texts(".said") == ["Question", "More"] and tab.texts(".prose") == ["alpha", "gamma"]

    tab.page.reload()
    tab.page.click(".row .open")
    assert tab.texts(".said") == ["Question", "More"] and tab.texts(".prose") == ["alpha", "gamma"]


def test_what_is_typed_and_sent_between_two_frames_is_sent(visit: Open) -> None:
    tab = visit()
    bodies = tab.answers("It is about verdigris.")
    tab.send("Green")
    tab.page.evaluate(
        """() => {
            const press = (key, code, keys) => document.activeElement.dispatchEvent(
                new KeyboardEvent("keydown", {key, code, bubbles: true, cancelable: true, ...keys}));
            press("n", "KeyN", {altKey: true});
            const area = document.getElementById("composer");
            area.focus();
            area.value = "Brown";
            area.dispatchEvent(new InputEvent("input", {bubbles: true}));
            press("Enter", "Enter", {});
        }"""
    )
    tab.until("document.querySelectorAll('.row').length === 2")
    tab.done()
    assert [[m["content"] for m in body["messages"]] for body in bodies] == [["Green"], ["Brown"]]
    assert tab.page.input_value("#composer") == ""


def test_conversations_are_searched_renamed_deleted_and_brought_back(visit: Open) -> None:
    tab = visit()
    tab.answers("It is about verdigris.", "It is about bronze.")
    tab.send("Green")
    tab.page.keyboard.press("Alt+KeyN")
    tab.send("Brown")
    tab.page.keyboard.press("Control+KeyK")
    tab.until("document.activeElement.id === 'search'")
    tab.page.keyboard.type("VERDI")
    assert tab.texts(".row .title") == ["Green"] and tab.texts(".row mark") == ["verdi"]
    tab.page.fill("#search", "")
    tab.page.hover(".row:has-text('Green')")
    tab.page.click(".row:has-text('Green') button[aria-label=Rename]")
    tab.page.fill(".rename", "Patina")
    tab.page.press(".rename", "Enter")
    assert tab.texts(".row .title") == ["Brown", "Patina"]
    tab.page.hover(".row:has-text('Patina')")
    tab.page.click(".row:has-text('Patina') button[aria-label=Delete]")
    assert tab.texts(".row .title") == ["Brown"] and len(tab.saved()) == 1
    tab.page.click(".toast button")
    tab.page.wait_for_selector(".row:has-text('Patina')")
    assert {one["title"] for one in tab.saved()} == {"Brown", "Patina"}


def test_export_and_import_give_the_same_conversations_with_their_routing(visit: Open, tmp_path: Path) -> None:
    tab = visit({"lens": True})
    tab.send("Keep this")
    tab.page.click(".files >> text=Export")
    with tab.page.expect_download() as download:
        tab.page.click("[data-format=own]")
    file = tmp_path / "conversations.json"
    download.value.save_as(file)
    other = visit({"lens": True})
    other.page.set_input_files("#import", file)
    other.page.click(".row .open")
    assert other.saved() == tab.saved()
    assert other.count(f"{LAST} .token") == tab.count(f"{LAST} .token") == 24


@pytest.mark.parametrize(
    "damage",
    [
        lambda file: file.update(format="something else"),
        lambda file: file.update(version=3),
        lambda file: file["conversations"][0]["nodes"][0].update(role="root"),
        lambda file: file["conversations"][0]["nodes"][0].update(id="__proto__"),
        lambda file: file["conversations"][0]["nodes"][1].update(parent="m00000000"),
        lambda file: file["conversations"][0].update(selected={"": "m99999999"}),
        lambda file: file["conversations"][0]["nodes"][1]["trace"].update(n_tokens=3),
    ],
    ids=["format", "version", "role", "id", "parent", "selected", "trace"],
)
def test_a_damaged_file_is_refused_whole(imports: Tab, damage: Callable[[dict[str, Any]], None]) -> None:
    file = file_of_version_1(entropy="gA==")
    damage(file)
    imports.page.set_input_files(
        "#import", {"name": "x.json", "mimeType": "application/json", "buffer": json.dumps(file).encode()}
    )
    imports.page.wait_for_selector(".toast:has-text('Nothing was imported')")
    assert imports.count(".row") == 0
    imports.page.evaluate("document.querySelector('.toast').remove()")


@pytest.fixture(scope="module")
def imports(browser: Any, tiny: Live) -> Iterator[Tab]:
    """One page for files that are all refused."""
    context = browser.new_context()
    tab = Tab(context.new_page(), tiny)
    watch(tab)
    tab.page.goto(tiny.url)
    tab.page.wait_for_selector("#composer")
    yield tab
    assert tab.complaints == []
    context.close()


def test_a_second_tab_sees_what_the_first_one_does(visit: Open) -> None:
    tab = visit()
    tab.answers("Yes.")
    second = tab.page.context.new_page()
    second.goto(tab.live.url)
    second.wait_for_selector("#composer")
    tab.page.bring_to_front()  # a hidden page draws nothing
    tab.send("Shared?")
    second.bring_to_front()
    second.wait_for_selector(".row:has-text('Shared?')")
    second.close()


# What a model writes -------------------------------------------------------------------------------------------------

MARKDOWN = """# Heading

Some **bold** and `code`, a [link](https://example.org/a) and a [bad one](javascript:alert(1)).

```python
def reverse(text):
    return text[::-1]  # back to front
```

| a | b |
|---|--:|
| 1 | 2 |

- [x] done
"""


def test_markdown_is_formatted_code_is_coloured_and_copied_as_it_is(visit: Open) -> None:
    tab = visit()
    tab.answers(MARKDOWN)
    tab.send("Show me")
    assert tab.texts(f"{LAST} h1") == ["Heading"] and tab.texts(f"{LAST} strong") == ["bold"]
    assert tab.texts(f"{LAST} .hljs-keyword") == ["def", "return"]
    assert tab.texts(f"{LAST} td") == ["1", "2"] and "☑ done" in tab.texts(f"{LAST} li")[0]
    links = tab.page.locator(f"{LAST} a")
    assert links.count() == 1 and links.first.get_attribute("rel") == "noopener noreferrer nofollow"
    assert "bad one" in tab.texts(f"{LAST} .prose")[0]
    tab.page.click(f"{LAST} button.copy")
    tab.page.wait_for_selector(f"{LAST} button.copy:has-text('Copied')")
    code = "def reverse(text):\n    return text[::-1]  # back to front"
    assert tab.page.evaluate("navigator.clipboard.readText()").replace("\r", "") == code
    tab.page.click(f"{LAST} button[aria-label=Copy]")
    assert until(lambda: tab.page.evaluate("navigator.clipboard.readText()") == MARKDOWN)


HOSTILE = [
    "<script>window.pwned = 1</script>",
    '<img src=x onerror="window.pwned = 1">',
    '<svg onload="window.pwned = 1"><a xlink:href="javascript:window.pwned=1">x</a></svg>',
    '<iframe srcdoc="<script>parent.pwned = 1</script>"></iframe>',
    '<div style="position:fixed;inset:0" onclick="window.pwned = 1">over everything</div>',
    '<form action="https://evil.example"><input name=q></form>',
    "<style>body { display: none }</style>",
    "<math><mtext><table><mglyph><style><img src=x onerror=window.pwned=1></style></mglyph></table></mtext></math>",
    "[click](javascript:window.pwned=1) ![picture](https://evil.example/pixel.png) <javascript:window.pwned=1>",
    '```"><img src=x onerror=window.pwned=1>\n</code></pre><script>window.pwned = 1</script>\n```',
    '[a](https://x.example/"onmouseover="window.pwned=1) <a href="#" id="composer" name="body">clobber</a>',
]


def test_markup_in_an_answer_a_question_or_a_title_stays_text(visit: Open) -> None:
    tab = visit()
    text = "\n\n".join(HOSTILE)
    tab.answers(text)
    tab.send(text)
    for element in (
        "script",
        "img",
        "iframe",
        "style",
        "form",
        "input",
        "math",
        "svg:not(.icon)",
        "[onclick]",
        "[style]",
        "[id]",
    ):
        assert tab.count(f".message {element}") == 0, element
    assert tab.count(".row .title *") == 0
    allowed = {"https://evil.example/pixel.png", 'https://x.example/"onmouseover="window.pwned=1'}
    assert tab.count(".message [onmouseover]") == 0
    assert {link.get_attribute("href") for link in tab.page.locator(".prose a").all()} <= allowed
    shown = tab.texts(".prose")[0]
    for markup in ("<script>window.pwned = 1</script>", "<iframe srcdoc=", "<style>body { display: none }</style>"):
        assert markup in shown
    assert tab.texts(".said") == [re.sub(r"\r", "", text).strip()]
    for item in tab.page.locator(".prose *").all():
        item.dispatch_event("click")
    assert tab.page.evaluate("window.pwned") is None
    assert tab.page.locator("#composer").is_visible()


# Writing -------------------------------------------------------------------------------------------------------------


def test_the_enter_that_picks_a_word_of_an_input_method_sends_nothing(visit: Open) -> None:
    tab = visit(locale="zh-CN")
    bodies = tab.answers("好的。")
    tab.page.focus("#composer")
    session = tab.page.context.new_cdp_session(tab.page)
    session.send("Input.imeSetComposition", {"text": "ni hao", "selectionStart": 6, "selectionEnd": 6})
    # Some browsers report an Enter inside a composition, some the key code 229 after it: neither may send.
    for event in ({"isComposing": True, "keyCode": 13}, {"isComposing": False, "keyCode": 229}):
        tab.page.dispatch_event("#composer", "keydown", {"key": "Enter", **event})
    session.send("Input.insertText", {"text": "你好"})
    assert tab.page.input_value("#composer") == "你好"
    assert bodies == [] and tab.count(".message") == 0
    tab.page.press("#composer", "Shift+Enter")
    tab.page.keyboard.type("!")
    tab.page.press("#composer", "Enter")
    tab.done()
    assert bodies[0]["messages"] == [{"role": "user", "content": "你好\n!"}]


def test_keys(visit: Open) -> None:
    tab = visit()
    tab.answers("Answer one.", "Answer two.")
    tab.send("Ask")
    tab.page.press("#composer", "ArrowUp")
    assert tab.page.input_value(".editor textarea") == "Ask"
    tab.page.keyboard.press("Escape")
    assert tab.count(".editor") == 0
    tab.page.keyboard.press("Alt+KeyR")
    tab.page.wait_for_selector(".branches:has-text('2 / 2')")
    tab.done()
    tab.page.locator(".fine").click()  # away from the field
    tab.page.evaluate("document.activeElement.blur()")
    tab.page.keyboard.press("?")
    assert tab.count("dialog .keys-list dt") >= 12
    tab.page.keyboard.press("Escape")
    tab.page.wait_for_selector("dialog", state="detached")
    tab.page.keyboard.press("Alt+KeyN")
    assert tab.count(".message") == 0 and tab.count(".welcome") == 1


# Languages, themes, widths -------------------------------------------------------------------------------------------


def test_the_language_follows_the_browser_and_the_settings(visit: Open) -> None:
    tab = visit(locale="zh-CN")
    assert tab.page.get_attribute("html", "lang") == "zh-CN"
    assert tab.page.get_attribute("#composer", "placeholder") == "输入消息"
    tab.page.fill("#composer", "a draft")
    tab.page.click("nav [aria-label=设置]")
    tab.page.select_option("label:has-text('语言') select", "en")
    tab.page.wait_for_selector("dialog h2:has-text('Settings')")
    assert tab.page.input_value("#composer") == "a draft"
    assert not re.search("[\u4e00-\u9fff]", tab.page.inner_text(".sidebar") + tab.page.inner_text("nav"))
    tab.page.reload()
    tab.page.wait_for_selector("#composer[placeholder='Write a message']")
    assert tab.page.get_attribute("html", "lang") == "en"


CONTRAST = """(selector) => {
    const channel = (v) => (v /= 255) <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4;
    const light = (c) => { const [r, g, b] = c.match(/[\\d.]+/g).map(Number).map(channel); return 0.2126*r + 0.7152*g + 0.0722*b; };
    let at = document.querySelector(selector);
    const ink = light(getComputedStyle(at).color);
    while (getComputedStyle(at).backgroundColor === "rgba(0, 0, 0, 0)") at = at.parentElement;
    const paper = light(getComputedStyle(at).backgroundColor);
    return (Math.max(ink, paper) + 0.05) / (Math.min(ink, paper) + 0.05);
}"""


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [390, 1280])
def test_everything_fits_and_can_be_read(visit: Open, width: int, dark: bool) -> None:
    tab = visit(width=width, dark=dark)
    tab.answers(MARKDOWN + "\n\n" + "averyveryverylongword" * 12)
    tab.send("Please " + "wordwithoutend" * 12)
    page = tab.page
    overflow = "document.documentElement.scrollWidth - innerWidth"
    assert page.evaluate(overflow) <= 0
    box, height = page.locator(".composer .box").bounding_box(), page.viewport_size["height"]
    assert box["x"] >= 0 and box["x"] + box["width"] <= width and box["y"] + box["height"] <= height
    assert page.locator(".sidebar").is_visible() == (width > 600)
    for selector in (".said", ".prose", ".cost", ".model small", ".hljs-comment", ".row .snippet", ".icon-button.go"):
        assert page.evaluate(CONTRAST, selector) >= (3 if selector in (".hljs-comment", ".icon-button.go") else 4.5), (
            selector
        )
    assert (page.evaluate("getComputedStyle(document.body).colorScheme") == "dark") == dark
    page.click(".icon-button.theme")  # system, light, dark
    page.click(".icon-button.theme")
    assert page.get_attribute("html", "data-theme") == "dark"
    page.reload()
    assert page.get_attribute("html", "data-theme") == "dark"
    if width == 390:
        page.click(".icon-button.menu")
        tab.until("document.querySelector('.sidebar').getBoundingClientRect().left === 0")
        page.click(".row .open")
        tab.until("document.querySelector('.sidebar').getBoundingClientRect().right <= 0")
        assert page.locator(".message").count() == 2
    page.click("nav button:nth-child(2)")
    page.wait_for_selector(".experts canvas")
    assert page.evaluate(overflow) <= 0
    page.locator("nav button[aria-label=Settings]").dispatch_event("click")
    page.wait_for_selector("dialog")
    assert page.evaluate(overflow) <= 0 and page.evaluate("document.querySelector('dialog').scrollWidth") <= width


# Failures ------------------------------------------------------------------------------------------------------------


def test_a_busy_server_is_named_and_asked_again_when_it_said(visit: Open) -> None:
    tab = visit()
    tab.expected = ["429"]
    tab.answers(
        json.dumps({"error": {"message": "16 requests wait", "code": "queue_full"}}),
        status=429,
        headers={"retry-after": "1"},
    )
    tab.send("Hello", wait=False)
    tab.page.wait_for_selector(".problem:has-text('The server has its hands full.')")
    assert "16 requests wait" in tab.texts(".problem")[0]
    assert tab.count(".message.assistant") == 0
    assert tab.page.locator(".problem button").is_disabled()
    tab.page.unroute("**/v1/chat/completions")
    tab.answers("Now.")
    tab.page.click(".problem button:not([disabled])")
    tab.done()
    assert tab.texts(".prose") == ["Now."] and tab.count(".problem") == 0


def test_a_server_that_is_gone_and_a_stream_that_breaks_are_named(visit: Open) -> None:
    tab = visit()
    tab.expected = ["ERR_CONNECTION_REFUSED", "Failed to load resource"]
    tab.page.route("**/v1/chat/completions", lambda route: route.abort("connectionrefused"))
    tab.send("Hello", wait=False)
    tab.page.wait_for_selector(".problem:has-text('Is quadriga serve still running?')")
    tab.page.unroute("**/v1/chat/completions")
    begun = 'data: {"choices": [{"delta": {"content": "half an ans"}, "finish_reason": null}]}\n\n'
    tab.page.route(
        "**/v1/chat/completions", lambda r: r.fulfill(status=200, content_type="text/event-stream", body=begun)
    )
    tab.page.click(".problem button")
    tab.page.wait_for_selector(".problem:has-text('The connection broke off.')")
    assert tab.texts(".prose") == ["half an ans"] and "broken off" in tab.texts(f"{LAST} .cost")[0]
    tab.page.unroute("**/v1/chat/completions")
    refused = begun + 'data: {"error": {"message": "the answer was not complete", "code": "deadline_exceeded"}}\n\n'
    tab.page.route(
        "**/v1/chat/completions", lambda r: r.fulfill(status=200, content_type="text/event-stream", body=refused)
    )
    tab.page.click(".problem button")
    tab.page.wait_for_selector(".problem:has-text('not complete in time')")


def test_a_refusal_of_the_real_server_is_shown_in_its_words(visit: Open) -> None:
    tab = visit()
    tab.expected = ["400"]
    tab.send("x" * 1100, wait=False)
    tab.page.wait_for_selector(".problem:has-text('no longer fits')")
    assert "1024" in tab.texts(".problem .detail")[0]


def test_a_server_with_a_key_asks_for_it_once(visit: Open) -> None:
    with running(tiny_llm(), Limits(keys=(KEY,))) as locked:
        tab = visit(live=locked)
        tab.expected = ["401"]
        tab.page.wait_for_selector(".problem:has-text('asks for an API key')")
        tab.page.fill(".problem input", KEY)
        tab.page.click(".problem button")
        tab.page.wait_for_selector(".problem", state="detached")
        tab.send("Hello")
        assert tab.page.locator(LAST).count() == 1
        tab.page.reload()
        tab.page.wait_for_selector(".model b")
        assert tab.count(".problem") == 0


# The experts ---------------------------------------------------------------------------------------------------------


def test_the_lens_shows_the_experts_that_the_model_chose(visit: Open) -> None:
    tab = visit()
    tab.send("Before the lens")
    tab.page.click("nav [aria-label=Lens]")
    assert "made without the lens" in tab.texts(LAST)[0]
    tab.page.click("nav [aria-label=Lens]")
    tab.page.keyboard.press("Alt+KeyN")
    tab.page.keyboard.press("Alt+KeyL")
    tab.send("Which experts?")
    body = {"model": "tiny", "messages": [{"role": "user", "content": "Which experts?"}], "max_tokens": 24}
    sampling = {"temperature": 0, "top_p": 0.95, "routing": True}
    routing = tab.live.post("/v1/chat/completions", body | sampling).json()["choices"][0]["routing"]
    tokens = tab.page.locator(f"{LAST} .token")
    assert tokens.count() == len(routing) == 24

    tab.page.fill(".lens-bar input[type=range]", "2")
    tokens.nth(3).click()
    listed = tab.texts(".lens-card li")
    for said, (expert, weight) in zip(listed, routing[3]["layers"][2], strict=True):
        shown = re.search(r"Expert (\d+)\s+([\d.]+) %", said)
        assert shown and int(shown[1]) == expert and float(shown[2]) == pytest.approx(100 * weight, abs=0.006)
    entropy = re.search(r"([\d.]+) here, ([\d.]+) on average", tab.texts(".lens-card p")[0])
    assert entropy and float(entropy[1]) == pytest.approx(routing[3]["entropy"][2], abs=0.0051)
    assert float(entropy[2]) == pytest.approx(sum(routing[3]["entropy"]) / 3, abs=0.0051)

    tab.page.focus(".lens-text")
    tab.page.keyboard.press("ArrowRight")
    assert "token 5" in tab.texts(".lens-card header")[0]
    tab.page.keyboard.press("Escape")
    assert tab.count(".lens-card") == 0


def test_the_lens_colours_by_expert_entropy_or_one_expert(visit: Open) -> None:
    tab = visit({"lens": True})
    tab.send("Colours")
    (conversation,) = tab.saved()
    (trace,) = [node["trace"] for node in conversation["nodes"].values() if "trace" in node]

    def colours() -> list[str]:
        found: list[str] = tab.page.eval_on_selector_all(".token", "spans => spans.map(s => s.style.background)")
        return found

    by_layer = []
    for layer in range(3):
        tab.page.fill(".lens-bar input[type=range]", str(layer))
        first = [trace["experts"][(token * 3 + layer) * 3] for token in range(24)]
        tab.drawn()
        hues = [re.findall(r"[\d.]+", colour)[2] for colour in colours()]
        pairs = set(zip(first, hues, strict=True))
        assert len(pairs) == len(set(first)) == len(set(hues)), "one hue for each expert"
        by_layer.append(hues)
    assert by_layer[0] != by_layer[1] != by_layer[2]
    tab.page.click("[data-mode=entropy]")
    tab.page.wait_for_selector(".lens-bar:has-text('All layers')")
    strengths = [float(re.findall(r"[\d.]+", colour)[3]) for colour in colours()]
    means = [sum(trace["entropy"][token * 3 + layer] for layer in range(3)) / 3 for token in range(24)]
    assert strengths == pytest.approx([0.9 * mean for mean in means], abs=0.01)
    tab.page.click("[data-mode=one]")
    tab.page.select_option(".lens-bar select", "2")
    tab.drawn()
    for token, colour in enumerate(colours()):
        slots = range(token * 9, token * 9 + 3)  # layer 0
        weight = sum(trace["weights"][i] for i in slots if trace["experts"][i] == 2)
        assert float(re.findall(r"[\d.]+", colour)[3]) == pytest.approx(0.9 * weight, abs=0.01)


def test_the_load_map_counts_what_the_server_counts(visit: Open) -> None:
    tab = visit()
    tab.page.click("nav [aria-label='Experts at work']")
    tab.page.wait_for_selector(".experts canvas")
    tab.page.click("text=Count from here")
    tab.page.wait_for_selector(".fact:has-text('Tokens') dd:text-is('0')")
    tab.send("Work for the experts")
    report = tab.live.client.get("/v1/experts").json()
    tab.page.wait_for_selector(f".fact:has-text('Tokens') dd:text-is('{report['n_tokens']}')")
    facts = dict(zip(tab.texts(".fact dt"), tab.texts(".fact dd"), strict=True))
    assert float(facts["Max / mean"]) == pytest.approx(sum(report["balance"]) / 3, abs=0.006)
    assert float(facts["Jain"]) == pytest.approx(sum(report["jain"]) / 3, abs=0.006)
    dead = sum(n == 0 and sum(layer) >= 50 for layer in report["counts"] for n in layer)
    assert facts["Dead"] == str(dead)

    canvas = tab.page.locator(".heatmap canvas")
    box = canvas.bounding_box()
    cell = (box["width"] - 24 - 46) / 5
    canvas.hover(position={"x": 24 + 3.5 * cell, "y": 22 + 11})  # layer 1, expert 3
    n = report["counts"][1][3]
    assert tab.texts(".cell")[0].startswith(f"Layer 1, expert 3: {n} times")
    canvas.click(position={"x": 24 + 3.5 * cell, "y": 22 + 11})
    tab.page.wait_for_selector("[data-mode=one][aria-checked=true]")
    assert tab.page.input_value(".lens-bar select") == "3" and tab.page.input_value(".lens-bar input") == "1"
    tab.page.wait_for_selector(".history canvas")
    tab.page.click("text=Last 30 s")
    assert dict(zip(tab.texts(".fact dt"), tab.texts(".fact dd"), strict=True))["Tokens"] == str(report["n_tokens"])


def test_an_expert_nobody_chose_is_dead_only_once_it_should_have_been(visit: Open) -> None:
    tab = visit()
    verdicts = tab.page.evaluate(
        """async () => {
            const { isDead, jain, maxOverMean } = await import("/page/balance.js");
            return [isDead([0, 9, 20], 0), isDead([0, 10, 20], 0), isDead([1, 10, 20], 0), jain([1, 2, 3, 6]), maxOverMean([1, 2, 3, 6])];
        }"""
    )
    assert verdicts == [False, True, False, pytest.approx(144 / 200), 2]


def tiny_dense(chat_template: str | None) -> LLM:
    """A random LLaMA over bytes."""
    torch.manual_seed(0)
    config = replace(TINY["llama2"], vocab_size=257, max_seq_len=256)
    runner = CompiledModel(
        config, pack_parameters(arrays(random_parameters(config, std=0.3)), "q8"), threads=1, n_blocks=32
    )
    special = {"<|end|>": 256}
    return LLM(
        runner, Tokenizer(Bytes(), special_ids=special, eos_ids=(256,), chat_template=chat_template), max_sequences=4
    )


def test_a_dense_model_without_a_chat_template_says_so_and_continues_the_text(visit: Open) -> None:
    with running(tiny_dense(None)) as dense:
        tab = visit({"lens": True, "sampling": {"temperature": 0, "max_tokens": 12, "top_p": 1}}, live=dense)
        tab.page.wait_for_selector(".lens-strip:has-text('is a dense model')")
        assert "brings no chat template" in tab.texts(".welcome")[0]
        tab.page.click("nav [aria-label='Experts at work']")
        tab.page.wait_for_selector(".experts:has-text('is a dense model')")
        tab.send("Once upon a time")
        body = {"model": "tiny", "prompt": "Once upon a time", "max_tokens": 12, "temperature": 0}
        (conversation,) = tab.saved()
        said = [node["content"] for node in conversation["nodes"].values() if node["role"] == "assistant"]
        assert said == [dense.post("/v1/completions", body).json()["choices"][0]["text"]]
