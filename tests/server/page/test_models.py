"""Models that come when they are asked for, as the page shows them."""

from __future__ import annotations

from tests.server.page.conftest import LAST, Open
from tests.server.test_on_demand import serving


def test_the_list_says_what_is_not_loaded_and_an_answer_what_is_being(visit: Open) -> None:
    with serving() as (live, shelf):
        gate = shelf.hold("b")
        tab = visit(live=live)
        options = tab.page.locator("header select option")
        assert options.all_inner_texts()[:4] == [
            "a (not loaded)",
            "first (not loaded)",
            "b (not loaded)",
            "c (not loaded)",
        ]
        tab.page.select_option("header select", "b")
        tab.send("Hello", wait=False)
        tab.page.wait_for_selector(f"{LAST} .waiting:has-text('b is being loaded')")
        gate.set()
        tab.done()
        tab.page.wait_for_selector("header select option:text-is('b')", state="attached")
        assert "a (not loaded)" in options.all_inner_texts()
        tab.page.close()
