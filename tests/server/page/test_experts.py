"""Experts seen for what they do: labels in the lens, the atlas, switched off and boosted; what the server and the page say of it."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from quadriga.io import expert_labels
from tests.server.conftest import Live, running, tiny_llm
from tests.server.page.conftest import LAST, Open, Tab
from tests.server.page.test_page import tiny_dense

DOMAINS = [{"name": "prose", "tokens": 700}, {"name": "code", "tokens": 300}]


def expert(layer: int, number: int) -> dict[str, Any]:
    """Labels that differ in every expert."""
    kind = {0: "digits", 1: "punctuation"}.get(number)
    domain = "code" if number == 2 else None
    tokens = [{"id": 65 + i, "text": f" w{layer}{number}{i}", "n": 9 - i, "lift": 4.5 - i} for i in range(3)]
    return {
        "label": " · ".join(part for part in (kind, domain, f"w{layer}{number}0") if part),
        "kind": kind, "domain": domain, "share": 0.6, "bits": 0.0123, "tokens": tokens,
        "domains": [{"name": "prose", "share": 0.25, "lift": 0.4}, {"name": "code", "share": 0.75, "lift": 2.5}],
        "examples": [{"before": "so ", "token": f" w{layer}{number}0", "after": " it is", "weight": 0.875}],
    }  # fmt: skip


LABELS = {
    "model": "tiny", "data": "test", "domains": DOMAINS, "n_tokens": 1000,
    "layers": [{"layer": i, "bits": 0.1, "experts": [expert(i, e) for e in range(5)]} for i in range(3)],
}  # fmt: skip


@pytest.fixture(scope="module")
def labelled(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    """A model whose experts have labels."""
    llm = tiny_llm()
    llm.path = tmp_path_factory.mktemp("model")
    expert_labels.write(LABELS, expert_labels.place_of(llm.path))
    with running(llm) as live:
        yield live


def test_labels_are_those_beside_the_model_and_follow_the_file(labelled: Live) -> None:
    assert labelled.client.get("/v1/experts/labels").json() == {"format": expert_labels.FORMAT, "version": 1, **LABELS}
    assert labelled.service.llm.path is not None
    place = expert_labels.place_of(labelled.service.llm.path)
    good = place.read_text()
    place.write_text(json.dumps({**json.loads(good), "layers": []}))
    wrong = labelled.client.get("/v1/experts/labels")
    assert wrong.status_code == 500 and wrong.json()["error"]["code"] == "bad_labels"
    assert "labels 0 experts in 0 layers; this model has 15 in 3" in wrong.json()["error"]["message"]
    place.unlink()
    assert labelled.client.get("/v1/experts/labels").json() == {"model": "tiny", "layers": None}
    place.write_text(good)
    assert labelled.client.get("/v1/experts/labels").json()["n_tokens"] == 1000


def test_the_lens_says_what_an_expert_is_known_for(visit: Open, labelled: Live) -> None:
    tab = visit({"lens": True}, live=labelled)
    tab.send("Labels")
    (trace,) = [node["trace"] for node in tab.saved()[0]["nodes"].values() if "trace" in node]
    tab.page.fill(".lens-bar input[type=range]", "1")
    tab.page.locator(".token").first.click()
    first = trace["experts"][3:6]
    shown = tab.texts(".lens-card .label")
    kinds = {0: "digits · ", 1: "punctuation · ", 2: "code · "}
    assert shown == [f"{kinds.get(e, '')}w1{e}0 w1{e}1 w1{e}2" for e in first]
    tab.page.click("[data-mode=one]")
    assert tab.texts(".lens-bar option")[2] == "Expert 2 · code · w120 w121 w122"


def open_atlas(tab: Tab) -> None:
    tab.page.keyboard.press("Alt+KeyA")
    tab.page.wait_for_selector(".atlas .tile")


def test_the_atlas_shows_finds_and_follows_every_expert(visit: Open, labelled: Live) -> None:
    tab = visit(live=labelled)
    open_atlas(tab)
    assert tab.texts(".tile b") == [str(e) for e in range(5)]
    assert [text.split("\n")[-1].strip() for text in tab.texts(".tile")] == [
        "digits · w000 w001 w002", "punctuation · w010 w011 w012", "code · w020 w021 w022", "w030 w031 w032", "w040 w041 w042",
    ]  # fmt: skip
    tab.page.fill(".atlas-tools input[type=range]", "2")
    tab.page.click(".tile:has-text('w230')")
    facts = tab.texts(".expert-card")[0]
    assert "Layer 2, expert 3" in facts and "4.5×" in facts and "0.012 bits" in facts and "75.0 %" in facts
    assert tab.texts(".expert-card mark") == ["␣w230"]
    tab.page.fill(".atlas-tools input[type=search]", "w11")
    assert tab.texts(".atlas [role=status]") == ["Experts found: 1"]
    tab.page.fill(".atlas-tools input[type=search]", "DIGITS")
    assert tab.texts(".atlas [role=status]") == ["Experts found: 3"]
    assert (
        tab.page.eval_on_selector_all(".tile", "tiles => tiles.map((tile) => tile.dataset.dim)")
        == ["false"] + ["true"] * 4
    )
    box = tab.page.locator(".chart canvas").bounding_box()
    cell = (box["width"] - 34) / 5
    tab.page.locator(".chart canvas").click(position={"x": 30 + 4.5 * cell, "y": 25})
    assert "Layer 1, expert 4" in tab.texts(".expert-card")[0]
    tab.page.click(".expert-card > button")
    tab.page.wait_for_selector("[data-mode=one][aria-checked=true]")
    assert tab.page.input_value(".lens-bar select") == "4" and tab.page.input_value(".lens-bar input") == "1"
    assert tab.count(".atlas") == 0


def test_the_atlas_goes_as_json_and_as_a_picture(visit: Open, labelled: Live, tmp_path: Path) -> None:
    tab = visit(live=labelled)
    open_atlas(tab)
    files = {}
    for kind in ("JSON", "PNG"):
        with tab.page.expect_download() as found:
            tab.page.click(f".atlas-tools >> text={kind}")
        found.value.save_as(tmp_path / kind)
        files[kind] = found.value.suggested_filename
    assert files == {"JSON": "atlas-tiny.json", "PNG": "atlas-tiny.png"}
    atlas = json.loads((tmp_path / "JSON").read_text())
    assert atlas["labels"]["layers"] == LABELS["layers"] and atlas["model"] == "tiny"
    assert [len(layer) for layer in atlas["counts"]] == [5, 5, 5]
    png = (tmp_path / "PNG").read_bytes()
    assert png[:8] == b"\x89PNG\r\n\x1a\n" and int.from_bytes(png[16:20]) == 30 + 5 * 132 + 12


def test_without_labels_the_atlas_says_how_to_make_them(visit: Open) -> None:
    tab = visit()
    open_atlas(tab)
    assert "quadriga experts label" in tab.texts(".atlas")[0] and tab.texts(".tile span")[0] == "no label"
    with running(tiny_dense(None)) as dense:
        plain = visit(live=dense)
        plain.page.keyboard.press("Alt+KeyA")
        plain.page.wait_for_selector(".atlas:has-text('is a dense model')")


def nll(live: Live, prompt: list[int], first: int, experts: list[dict[str, float]]) -> float:
    body = {"model": "tiny", "prompt": prompt, "max_tokens": 0, "echo": True, "logprobs": 0, "experts": experts}
    values = live.post("/v1/completions", body).json()["choices"][0]["logprobs"]["token_logprobs"][first:]
    return -sum(values) / len(values)


def test_an_expert_is_switched_off_in_the_lens_and_answer_and_loss_change(visit: Open) -> None:
    tab = visit({"lens": True})
    tab.send("Which experts?")
    before = tab.texts(f"{LAST} .lens-text")[0]
    (trace,) = [node["trace"] for node in tab.saved()[0]["nodes"].values() if "trace" in node]
    tab.page.locator(".token").first.click()
    off = trace["experts"][0]
    tab.page.click(f".lens-card [aria-label='Switch expert {off} of layer 0 off']")
    tab.page.keyboard.press("Escape")
    assert tab.texts(".chip span")[0] == f"Layer 0, expert {off}"

    tab.page.click("text=Measure")
    tab.page.wait_for_selector(".loss")
    shown = re.search(r"loss ([\d.]+) → ([\d.]+) \(([+-][\d.]+)\)", tab.texts(".loss")[0])
    assert shown
    said = [node["content"] for node in tab.saved()[0]["nodes"].values() if node["role"] == "assistant"]
    turns = [{"role": "user", "content": "Which experts?"}, {"role": "assistant", "content": said[0]}]
    ask = {"model": "tiny", "messages": turns[:1]}
    first = len(tab.live.post("/tokenize", ask).json()["tokens"])
    ids = tab.live.post("/tokenize", {"model": "tiny", "messages": turns, "continue_final_message": True}).json()[
        "tokens"
    ]
    losses = [nll(tab.live, ids, first, experts) for experts in ([], [{"layer": 0, "expert": off, "factor": 0}])]
    assert [float(shown[1]), float(shown[2])] == pytest.approx(losses, abs=0.0006)
    assert math.isclose(float(shown[3]), losses[1] - losses[0], abs_tol=0.0011) and losses[0] != losses[1]

    tab.page.click("text=Answer again")
    tab.page.wait_for_selector(".message.assistant .branches:has-text('2 / 2')")
    tab.done()
    assert f"layer 0: expert {off} off" in tab.texts(".steered")[0]
    traces = [node["trace"] for node in tab.saved()[0]["nodes"].values() if "steering" in node]
    layer_0 = [traces[0]["experts"][token * 9 + slot] for token in range(24) for slot in range(3)]
    assert off not in layer_0 and off in [
        trace["experts"][token * 9 + slot] for token in range(24) for slot in range(3)
    ]
    assert tab.texts(f"{LAST} .lens-text")[0] != before
    body = {"model": "tiny", "messages": turns[:1], "max_tokens": 24, "temperature": 0, "top_p": 0.95}
    expected = tab.live.post(
        "/v1/chat/completions", {**body, "experts": [{"layer": 0, "expert": off, "factor": 0}]}
    ).json()
    content = next(node["content"] for node in tab.saved()[0]["nodes"].values() if "steering" in node)
    assert content == expected["choices"][0]["message"]["content"]

    tab.page.reload()
    tab.page.click(".row .open")
    assert tab.count(".chip") == 1, "it stays with its conversation"
    tab.page.click("text=Undo all")
    assert tab.count(".chip") == 0


def test_a_boost_is_chosen_changed_and_forgotten(visit: Open, labelled: Live) -> None:
    tab = visit(live=labelled)
    bodies = tab.answers("Yes.")
    open_atlas(tab)
    tab.page.click("[aria-label='Boost expert 0 of layer 0']")
    tab.page.keyboard.press("Escape")
    tab.send("One")
    tab.page.select_option(".chip select", "16")
    tab.send("Two")
    assert "digits" in tab.texts(".chip small")[0] and "layer 0: expert 0 × 16" in tab.texts(".steered")[1]
    tab.page.click("[aria-label='Leave expert 0 of layer 0 as it is']")
    tab.send("Three")
    assert [body.get("experts") for body in bodies] == [
        [{"layer": 0, "expert": 0, "factor": 4}],
        [{"layer": 0, "expert": 0, "factor": 16}],
        None,
    ]


# The interface --------------------------------------------------------------------------------------------------------

BODY = {"model": "tiny", "prompt": "four horses", "max_tokens": 6, "temperature": 0}


@pytest.mark.parametrize(
    ("experts", "said"),
    [
        ([{"layer": 3, "expert": 0, "factor": 0}], "layer must be from 0 to 2"),
        ([{"layer": 0, "expert": 5, "factor": 0}], "expert must be from 0 to 4"),
        ([{"layer": 0, "expert": 1, "factor": -2}], "factor must be 0"),
        ([{"layer": 0, "expert": e, "factor": 0} for e in range(3)], "only 2 are left on"),
        ([{"layer": 0, "expert": 1}], "missing required field `factor`"),
        ([{"layer": 0, "expert": 1, "factor": "off"}], "Expected `float`"),
    ],
)
def test_what_cannot_be_steered_is_a_400(tiny: Live, experts: list[dict[str, Any]], said: str) -> None:
    response = tiny.post("/v1/completions", {**BODY, "experts": experts})
    assert response.status_code == 400 and said in response.json()["error"]["message"]


def test_a_dense_model_refuses_and_nothing_asked_is_nothing_done(tiny: Live) -> None:
    with running(tiny_dense(None)) as dense:
        refused = dense.post("/v1/completions", {**BODY, "experts": [{"layer": 0, "expert": 0, "factor": 2}]})
        assert refused.status_code == 400 and "this model is dense" in refused.json()["error"]["message"]
        assert dense.post("/v1/completions", {**BODY, "experts": []}).status_code == 200
        assert dense.client.get("/v1/experts/labels").json() == {"model": "tiny", "layers": None}
    plain = tiny.post("/v1/completions", BODY).json()["choices"][0]["text"]
    same = [{"layer": 1, "expert": 2, "factor": 1}]
    assert tiny.post("/v1/completions", {**BODY, "experts": same}).json()["choices"][0]["text"] == plain
