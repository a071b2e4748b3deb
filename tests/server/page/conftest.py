"""The chat page, open in a browser.

Skipped with the reason where playwright or Chromium is missing. Every test ends with: no error on the console, no
violation of the content security policy, no request to any other host.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest

from tests.server.conftest import Live
from tests.waiting import HANG_S, until

CHROMIUM = os.environ.get("QUADRIGA_TEST_CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome")
ARGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"]
ARGS += ["--disable-component-update", "--disable-sync"]

LAST = ".message.assistant[data-last=true]"
KEY = "correct-horse-battery"


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """One Chromium for all tests."""
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    if CHROMIUM is None:
        pytest.skip("no Chromium in the path")
    with playwright.sync_playwright() as driver:
        chromium = driver.chromium.launch(executable_path=CHROMIUM, args=ARGS)
        yield chromium
        chromium.close()


@dataclass
class Tab:
    """The page, open; what it complained about."""

    page: Any
    live: Live
    complaints: list[str] = field(default_factory=list)
    expected: list[str] = field(default_factory=list)
    """Parts of complaints that a test provokes."""

    def send(self, text: str, *, wait: bool = True) -> None:
        """Type a message and press Enter."""
        before = self.count(".message.user")
        self.page.fill("#composer", text)
        self.page.press("#composer", "Enter")
        self.page.locator(".message.user").nth(before).wait_for()
        if wait:
            self.done()

    def done(self) -> None:
        """Wait until the last answer is complete."""
        self.page.wait_for_selector(f"{LAST}[aria-busy=false]")

    def drawn(self) -> None:
        """Wait until the page shows what it knows: it draws once a frame."""
        self.page.evaluate("new Promise((resolve) => requestAnimationFrame(() => requestAnimationFrame(resolve)))")

    def until(self, condition: str) -> None:
        """Wait for a condition in JavaScript; wait_for_function would evaluate it as the policy forbids."""
        assert until(lambda: self.page.evaluate(condition)), condition

    def count(self, selector: str) -> int:
        """How many elements there are."""
        self.drawn()
        n: int = self.page.locator(selector).count()
        return n

    def texts(self, selector: str) -> list[str]:
        """What some elements say."""
        self.drawn()
        return [text.strip() for text in self.page.locator(selector).all_inner_texts()]

    def saved(self) -> list[dict[str, Any]]:
        """The conversations in this browser's storage."""
        script = """() => new Promise((resolve) => {
            const opening = indexedDB.open("quadriga");
            opening.onsuccess = () => {
                const names = ["conversations", "messages", "traces"], found = {};
                const transaction = opening.result.transaction(names);
                for (const name of names) transaction.objectStore(name).getAll().onsuccess = (e) => found[name] = e.target.result;
                transaction.oncomplete = () => {
                    opening.result.close();
                    // Typed arrays as plain ones.
                    resolve(JSON.parse(JSON.stringify(found, (_, v) => ArrayBuffer.isView(v) ? Array.from(v) : v)));
                };
            };
        })"""
        found = self.page.evaluate(script)
        traces = {row["id"]: {"trace": row["trace"]} for row in found["traces"]}
        saved: list[dict[str, Any]] = []
        for one in found["conversations"]:
            rows = [row for row in found["messages"] if row["conversation"] == one["id"]]
            saved.append({**one, "nodes": {row["id"]: {**row, **traces.get(row["id"], {})} for row in rows}})
        return saved

    def beside(self) -> Tab:
        """A second tab of the same browser profile."""
        other = Tab(self.page.context.new_page(), self.live, self.complaints, self.expected)
        watch(other)
        other.page.goto(self.live.url)
        other.page.wait_for_selector("#composer")
        return other

    def answers(self, *contents: str, status: int = 200, headers: dict[str, str] | None = None) -> list[dict[str, Any]]:
        """Answer the page's next requests ourselves, one content each; the bodies it sends are collected."""
        left, bodies = list(contents), []

        def handle(route: Any) -> None:
            bodies.append(json.loads(route.request.post_data))
            content = left.pop(0) if len(left) > 1 else left[0]
            if status != 200:
                route.fulfill(status=status, headers=headers or {}, json=json.loads(content))
            else:
                route.fulfill(status=200, content_type="text/event-stream", body=events(content))

        self.page.route("**/v1/chat/completions", handle)
        return bodies


def events(content: str, finish: str = "stop") -> str:
    """A canned stream with a usage, as the server writes it."""
    pieces = [content[i : i + 7] for i in range(0, len(content), 7)]
    chunks: list[dict[str, Any]] = [{"choices": [{"delta": {"content": p}, "finish_reason": None}]} for p in pieces]
    timings = {"predicted_per_second": 12.5}
    chunks.append({"choices": [{"delta": {}, "finish_reason": finish}], "timings": timings})
    usage = {"prompt_tokens": 100, "completion_tokens": 28, "total_tokens": 128}
    chunks.append({"choices": [], "usage": usage, "timings": timings})
    return "".join(f"data: {json.dumps(chunk)}\n\n" for chunk in chunks) + "data: [DONE]\n\n"


Open = Callable[..., Tab]


@pytest.fixture
def visit(browser: Any, tiny: Live) -> Iterator[Open]:
    """``visit(settings, live=..., width=..., dark=...)``: a fresh browser profile on the page."""
    contexts: list[Any] = []
    tabs: list[Tab] = []

    def opened(
        settings: dict[str, Any] | None = None,
        *,
        live: Live = tiny,
        width: int = 1280,
        dark: bool = False,
        locale: str = "en-US",
        url: str = "",
    ) -> Tab:
        context = browser.new_context(
            viewport={"width": width, "height": 800 if width > 600 else 844},
            color_scheme="dark" if dark else "light",
            locale=locale,
            has_touch=width < 600,
            reduced_motion="reduce",
            permissions=["clipboard-read", "clipboard-write"],
        )
        context.set_default_timeout(1000 * HANG_S)
        contexts.append(context)
        tab = Tab(context.new_page(), live)
        tabs.append(tab)
        watch(tab)
        sampling = {"temperature": 0, "max_tokens": 24}
        saved = json.dumps(json.dumps({"sampling": sampling} | (settings or {})))
        tab.page.add_init_script(
            f"localStorage.getItem('quadriga.settings') ?? localStorage.setItem('quadriga.settings', {saved})"
        )
        tab.page.goto(url or live.url)
        tab.page.wait_for_selector("#composer")
        return tab

    yield opened
    for tab in tabs:
        unexpected = [c for c in tab.complaints if not any(part in c for part in tab.expected)]
        assert unexpected == []
    for context in contexts:
        context.close()


def watch(tab: Tab) -> None:
    """Collect what goes wrong, and let nothing out of this machine."""

    def other_host(route: Any) -> None:
        tab.complaints.append(f"asked {route.request.url}")
        route.abort()

    tab.page.route(lambda url: not url.startswith((tab.live.url, "blob:", "data:")), other_host)
    tab.page.on("pageerror", lambda error: tab.complaints.append(f"error: {error}"))
    tab.page.on("console", lambda m: m.type in ("error", "warning") and tab.complaints.append(f"console: {m.text}"))
    tab.page.add_init_script(
        "addEventListener('securitypolicyviolation', (e) => console.error('CSP', e.violatedDirective, e.blockedURI))"
    )


def file_of_version_1(*, entropy: str) -> dict[str, Any]:
    """An exported file as the first version of the page wrote it: one conversation of a question and an answer.

    Args:
        entropy: of the answer's one token, base64.
    """
    trace = {"n_experts": 5, "n_layers": 1, "top_k": 1, "n_tokens": 1, "texts": ["a"], "token_ids": [97]}
    trace |= {"experts": "AQA=", "weights": "/w==", "entropy": entropy}
    question = {"id": "m11111111", "parent": "", "role": "user", "content": "hello"}
    answer = {"id": "m22222222", "parent": "m11111111", "role": "assistant", "content": "a"}
    conversation = {
        "id": "c11111111",
        "title": "hello",
        "system": "",
        "created": 1,
        "updated": 2,
        "nodes": [question, answer | {"finish": "stop", "trace": trace}],
        "selected": {"": "m11111111", "m11111111": "m22222222"},
    }
    return {"format": "quadriga-conversations", "version": 1, "conversations": [conversation]}
