"""What the browser keeps: two tabs at once, conversations of an older page, a thousand of them, folders, pins, the way back."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.server.page.conftest import LAST, Open, Tab, events
from tests.waiting import until


def held(tab: Tab) -> list[Any]:
    """From now on the page's questions wait; the routes on which they can be answered."""
    routes: list[Any] = []
    tab.page.unroute("**/v1/chat/completions")
    tab.page.route("**/v1/chat/completions", lambda route: routes.append(route))
    return routes


def answer(tab: Tab, routes: list[Any], content: str) -> None:
    tab.page.bring_to_front()  # a hidden page draws nothing
    assert until(lambda: bool(tab.page.evaluate("1")) and bool(routes))
    routes.pop().fulfill(status=200, content_type="text/event-stream", body=events(content))
    tab.done()


def said(tab: Tab) -> set[str]:
    (conversation,) = tab.saved()
    return {node["content"] for node in conversation["nodes"].values()}


def test_two_tabs_that_go_on_with_one_conversation_lose_nothing(visit: Open) -> None:
    first = visit()
    first.answers("Welcome.")
    first.send("Begin")
    second = first.beside()
    second.page.click(".row .open")
    second.page.wait_for_selector(".prose:has-text('Welcome.')")
    one, two = held(first), held(second)
    first.page.bring_to_front()
    first.send("From the first", wait=False)
    second.page.bring_to_front()
    second.page.fill("#composer", "From the second")
    second.page.press("#composer", "Enter")
    second.page.wait_for_selector(".said:text-is('From the second')")
    answer(second, two, "To the second.")
    answer(first, one, "To the first.")
    everything = {"Begin", "Welcome.", "From the first", "To the first.", "From the second", "To the second."}
    assert until(lambda: said(first) == everything), said(first)
    for tab, own, other in ((first, "To the first.", "To the second."), (second, "To the second.", "To the first.")):
        tab.page.bring_to_front()
        tab.page.wait_for_selector(f"{LAST} .prose:has-text('{own}')")  # what a tab shows stays
        tab.page.wait_for_selector(".message.user .branches:has-text('/ 2')")
        side = "Previous version" if tab.texts(".message.user .branches") == ["2 / 2"] else "Next version"
        tab.page.click(f".message.user button[aria-label='{side}']")
        tab.page.wait_for_selector(f"{LAST} .prose:has-text('{other}')")
    first.page.reload()
    first.page.click(".row .open")
    first.page.wait_for_selector(".message.user .branches:has-text('/ 2')")


def test_an_answer_under_way_survives_what_another_tab_does_to_its_conversation(visit: Open) -> None:
    first = visit()
    first.answers("Welcome.")
    first.send("Begin")
    second = first.beside()
    routes = held(first)
    first.page.bring_to_front()
    first.send("Slowly", wait=False)
    second.page.bring_to_front()
    second.page.hover(".row")
    second.page.click(".row button[aria-label=Rename]")
    second.page.fill(".rename", "Renamed there")
    second.page.press(".rename", "Enter")
    answer(first, routes, "Late, but whole.")
    assert first.texts(".row .title") == ["Renamed there"]
    (conversation,) = first.saved()
    assert conversation["title"] == "Renamed there" and "Late, but whole." in said(first)

    routes = held(first)
    first.send("Once more", wait=False)
    second.page.bring_to_front()
    second.page.hover(".row")
    second.page.click(".row button[aria-label=Delete]")
    assert until(lambda: first.saved() == [])
    answer(first, routes, "Still here.")
    everything = {"Begin", "Welcome.", "Slowly", "Late, but whole.", "Once more", "Still here."}
    assert until(lambda: bool(first.saved()) and said(first) == everything)


OLD = """() => new Promise((resolve) => {
    indexedDB.deleteDatabase("quadriga").onsuccess = () => {
        const opening = indexedDB.open("quadriga", 1);
        opening.onupgradeneeded = () => opening.result.createObjectStore("conversations", { keyPath: "id" });
        opening.onsuccess = () => {
            const trace = { n_experts: 5, n_layers: 1, top_k: 2, n_tokens: 1, texts: ["Old"], token_ids: [7],
                experts: new Uint16Array([4, 1]), weights: new Uint8Array([204, 51]), entropy: new Uint8Array([51]) };
            const nodes = {
                m11111111: { id: "m11111111", parent: "", role: "user", content: "From before", finish: null },
                m22222222: { id: "m22222222", parent: "m11111111", role: "assistant", content: "Old", finish: "stop", trace },
            };
            const selected = { "": "m11111111", m11111111: "m22222222" };
            const one = { id: "c11111111", title: "From before", system: "", created: 1, updated: 2, nodes, selected };
            const transaction = opening.result.transaction("conversations", "readwrite");
            transaction.objectStore("conversations").put(one);
            transaction.oncomplete = () => { opening.result.close(); resolve(); };
        };
    };
})"""


def test_conversations_that_an_older_page_kept_are_taken_apart(visit: Open) -> None:
    tab = visit({"lens": True})
    tab.page.goto(f"{tab.live.url}/page/favicon.svg")  # the same origin without the page, which holds the database
    tab.page.evaluate(OLD)
    tab.page.goto(tab.live.url)
    tab.page.click(".row .open")
    assert tab.texts(".said") == ["From before"] and tab.texts(".token") == ["Old"]
    tab.page.click(".token")
    assert [line.split("\n")[1] for line in tab.texts(".lens-card li")] == ["80.00 %", "20.00 %"]
    (conversation,) = tab.saved()
    assert set(conversation["nodes"]) == {"m11111111", "m22222222"} and conversation["title"] == "From before"


MANY = """(n) => new Promise((resolve) => {
    const opening = indexedDB.open("quadriga");
    opening.onsuccess = () => {
        const transaction = opening.result.transaction(["conversations", "messages"], "readwrite");
        const day = 86400000;
        for (let i = 0; i < n; i++) {
            const number = String(i).padStart(8, "0");
            const [id, question, reply] = [`c${number}`, `m1${number}`, `m2${number}`];
            const updated = Date.now() - i * day;
            transaction.objectStore("conversations").put({ id, title: `Talk ${i}`, system: "", created: updated, updated,
                selected: { "": question, [question]: reply } });
            const common = { conversation: id, finish: null };
            transaction.objectStore("messages").put({ ...common, id: question, parent: "", role: "user", content: `Question ${i}` });
            transaction.objectStore("messages").put({ ...common, id: reply, parent: question, role: "assistant", finish: "stop",
                content: i === 873 ? "the needle is here" : `answer number ${i} `.repeat(20) });
        }
        transaction.oncomplete = () => { opening.result.close(); resolve(); };
    };
})"""


def test_of_a_thousand_conversations_only_those_in_sight_are_on_the_page(visit: Open) -> None:
    tab = visit()
    tab.page.evaluate(MANY, 1000)
    tab.page.reload()
    tab.page.wait_for_selector(".row")
    assert 15 < tab.count(".row") < 60
    headings = tab.texts(".heading")
    assert headings[:4] == ["Today", "Yesterday", "Previous 7 days", "Previous 30 days"]
    height = tab.page.evaluate("document.querySelector('.rows').scrollHeight")
    assert height > 1000 * 46
    tab.page.evaluate("document.querySelector('.rows').scrollTop = 1e9")
    tab.page.wait_for_selector(".row:has-text('Talk 999')")
    assert tab.count(".row") < 60
    tab.page.click(".row:has-text('Talk 999') .open")
    assert tab.texts(".said") == ["Question 999"]
    # Words in messages that were never loaded are found.
    tab.page.fill("#search", "NEEDLE")
    tab.page.wait_for_selector(".row mark")
    assert tab.texts(".row .title") == ["Talk 873"] and tab.texts(".row mark") == ["needle"]
    tab.page.click(".row .open")
    tab.page.wait_for_selector(".prose:has-text('the needle is here')")


def test_pins_and_folders(visit: Open) -> None:
    tab = visit()
    tab.answers("Yes.")
    for title in ("Alpha", "Beta", "Gamma"):
        tab.page.keyboard.press("Alt+KeyN")
        tab.send(title)
    tab.page.hover(".row:has-text('Alpha')")
    tab.page.click(".row:has-text('Alpha') button[aria-label=Pin]")
    for title in ("Beta", "Gamma"):
        tab.page.hover(f".row:has-text('{title}')")
        tab.page.click(f".row:has-text('{title}') button[aria-label='Folder and files']")
        tab.page.fill("dialog input[name=folder]", "Greek")
        tab.page.press("dialog input[name=folder]", "Tab")
        tab.page.keyboard.press("Escape")
        tab.page.wait_for_selector("dialog", state="detached")
    order = "[...document.querySelectorAll('.rows > li')].map((li) => (li.querySelector('.title') ?? li).innerText.trim().replace(/\\s+/g, ' '))"
    tab.drawn()
    assert tab.page.evaluate(order) == ["Pinned", "Alpha", "Greek 2", "Gamma", "Beta"]
    tab.page.click(".heading button")
    tab.drawn()
    assert tab.page.evaluate(order) == ["Pinned", "Alpha", "Greek 2"]
    tab.page.reload()
    tab.page.wait_for_selector(".row")
    assert tab.page.evaluate(order) == ["Pinned", "Alpha", "Greek 2"]
    tab.page.fill("#search", "beta")
    tab.page.wait_for_selector(".row:has-text('Beta')")  # a search opens folders
    assert tab.page.evaluate(order) == ["Greek 1", "Beta"]
    tab.page.fill("#search", "")
    tab.page.hover(".row:has-text('Alpha')")
    tab.page.click(".row:has-text('Alpha') button[aria-label='Folder and files']")
    assert tab.page.is_checked("dialog input[name=pinned]")
    tab.page.fill("dialog input[name=title]", "Omega")
    tab.page.press("dialog input[name=title]", "Tab")
    tab.page.keyboard.press("Escape")
    tab.page.wait_for_selector(".row:has-text('Omega')")
    found = {one["title"]: (one.get("folder"), one.get("pinned")) for one in tab.saved()}
    assert found == {"Omega": (None, True), "Beta": ("Greek", None), "Gamma": ("Greek", None)}


@pytest.mark.parametrize(
    ("days", "period"),
    [(0, "today"), (1, "yesterday"), (2, "week"), (6, "week"), (7, "month"), (29, "month"), (30, None)],
)
def test_periods_go_by_midnights_not_by_hours(visit: Open, days: int, period: str | None) -> None:
    tab = visit()
    # Ten minutes past midnight: what was said half an hour ago was said yesterday.
    found = tab.page.evaluate(
        """async (days) => {
            const { periodOf } = await import("/page/groups.js");
            const now = new Date(2026, 2, 31, 0, 10).getTime();
            const then = days ? new Date(2026, 2, 31 - days, 23, 40).getTime() : now - 300000;
            return periodOf(then, now);
        }""",
        days,
    )
    first_of_month = tab.page.evaluate("new Date(2026, 2, 1).getTime()")
    assert found == (period or first_of_month)


def test_a_server_that_comes_back_is_asked_again_by_itself(visit: Open) -> None:
    tab = visit()
    tab.expected = ["ERR_CONNECTION_REFUSED", "Failed to load resource"]
    away = ("**/v1/chat/completions", "**/v1/models")
    for path in away:
        tab.page.route(path, lambda route: route.abort("connectionrefused"))
    tab.send("Are you there?", wait=False)
    tab.page.wait_for_selector(".problem:has-text('keeps asking')")
    for path in away:
        tab.page.unroute(path)
    tab.answers("Back again.")
    tab.done()
    assert tab.texts(".prose") == ["Back again."] and tab.count(".problem") == 0


def test_a_page_that_is_opened_before_its_server_waits_for_it(visit: Open) -> None:
    tab = visit()
    tab.expected = ["ERR_CONNECTION_REFUSED", "Failed to load resource"]
    tab.page.route("**/v1/models", lambda route: route.abort("connectionrefused"))
    tab.page.reload()
    tab.page.wait_for_selector(".problem:has-text('keeps asking')")
    tab.page.unroute("**/v1/models")
    tab.page.wait_for_selector(".model b")
    assert tab.count(".problem") == 0


def test_the_models_that_are_served_can_be_chosen_from(visit: Open) -> None:
    tab = visit()
    tab.expected = ["404"]  # the labels of a model that only this test serves
    listed = tab.live.client.get("/v1/models").json()
    other = json.loads(json.dumps(listed["data"][0]))
    other["id"], other["quadriga"]["n_parameters"] = "giant", 7_000_000_000
    listed["data"].append(other)
    tab.page.route("**/v1/models", lambda route: route.fulfill(json=listed))
    tab.page.reload()
    tab.page.wait_for_selector(".model select")
    assert tab.texts(".model select option") == ["tiny", "giant"]
    bodies = tab.answers("One.", "Two.")
    tab.send("To the first")
    tab.page.select_option(".model select", "giant")
    tab.send("To the second")
    assert [body["model"] for body in bodies] == ["tiny", "giant"]
    assert "7B" in tab.texts(".model small")[0]
    tab.page.reload()
    tab.page.wait_for_selector(".model select")
    assert tab.page.input_value(".model select") == "giant"
