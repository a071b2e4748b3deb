"""axe-core finds no serious fault on the page, in its views, themes, languages and widths.

Skipped where axe is missing: `pip install axe-playwright-python` brings it.
"""

from __future__ import annotations

from collections.abc import Iterator
from importlib import resources
from typing import Any

import pytest

from tests.server.conftest import Live, running, tiny_llm
from tests.server.page.conftest import Open, Tab

ANSWER = "# Heading\n\nSome *text*, [a link](https://example.org), `code` and $x^2$.\n\n```python\nx = 1  # one\n```\n\n| a | b |\n|---|---|\n| 1 | 2 |\n"
SERIOUS = ("serious", "critical")


@pytest.fixture(scope="module")
def axe() -> str:
    """The library, as a script."""
    package = pytest.importorskip("axe_playwright_python", reason="axe-playwright-python is not installed")
    return (resources.files(package) / "axe.min.js").read_text()


@pytest.fixture(scope="module")
def mixture() -> Iterator[Live]:
    """A server of its own, so that nothing else moves."""
    with running(tiny_llm()) as live:
        yield live


def faults(tab: Tab, axe: str) -> list[str]:
    tab.drawn()
    tab.page.evaluate(axe)
    found: dict[str, Any] = tab.page.evaluate("axe.run(document, { resultTypes: ['violations'] })")
    return [
        f"{one['impact']} {one['id']}: {node['html'][:160]} {node['failureSummary']}"
        for one in found["violations"]
        if one["impact"] in SERIOUS
        for node in one["nodes"]
    ]


@pytest.mark.parametrize("width", [390, 1280])
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_no_serious_fault_in_any_view(visit: Open, axe: str, mixture: Live, width: int, dark: bool) -> None:
    tab = visit({"lens": False}, live=mixture, width=width, dark=dark, locale="zh-CN" if dark else "en-US")
    page = tab.page
    found = {"empty": faults(tab, axe)}
    tab.answers(ANSWER)
    page.set_input_files("#attach", {"name": "a.py", "mimeType": "", "buffer": b"x = 1\n"})
    page.wait_for_selector(".attached li")
    found["attached"] = faults(tab, axe)
    tab.send("Show me")
    page.wait_for_selector(".katex")
    page.click(".file summary")
    found["answer"] = faults(tab, axe)
    page.unroute("**/v1/chat/completions")
    page.keyboard.press("Alt+KeyL")
    page.keyboard.press("Alt+KeyN")
    tab.send("Through the lens")
    page.locator(".token").first.click()
    page.locator(".lens-card .steer-buttons button").first.click()
    found["lens"] = faults(tab, axe)
    page.keyboard.press("Escape")
    page.keyboard.press("Alt+KeyS")
    page.wait_for_selector("dialog")
    found["settings"] = faults(tab, axe)
    page.keyboard.press("Escape")
    page.wait_for_selector("dialog", state="detached")
    page.keyboard.press("Alt+KeyA")
    page.wait_for_selector(".tile")
    found["atlas"] = faults(tab, axe)
    page.keyboard.press("Escape")
    page.keyboard.press("Alt+KeyM")
    page.wait_for_selector(".history canvas")
    found["experts"] = faults(tab, axe)
    assert {view: list_ for view, list_ in found.items() if list_} == {}
