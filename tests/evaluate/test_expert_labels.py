"""Labels of experts: made of routing that is known, so that what they must say is known too."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from quadriga.errors import CheckpointError, ConfigError
from quadriga.evaluate.expert_labels import LEAST_USES, Seen, kind_of, labels_of, mutual_information
from quadriga.io import expert_labels as files
from quadriga.model.config import MoESpec, in_order
from quadriga.runners.base import LayerRouting
from tests.checkpoint.models import TINY
from tests.configs import first_dense

WORDS = [" lamp", " river", "1", "22", "307", ".", ",", "的", "了", " the", " of", "self", "(", "\n", " Paris"]
CONFIG = replace(
    first_dense(TINY["dbrx"]),
    layers=in_order(
        (first_dense(TINY["dbrx"]).layers[0],)
        + tuple(
            replace(layer, ffn=MoESpec(d_ff=80, n_experts=6, top_k=2, activation="silu"))
            for layer in TINY["dbrx"].layers[1:]
        )
    ),
)


def routing(ids: list[int], of: list[list[int]]) -> LayerRouting:
    """Each token's two experts, the first with three quarters of the weight."""
    n = len(ids)
    experts = np.array([of[i] for i in ids])
    flat = np.full((n, 6), 1 / 6, np.float32)
    return LayerRouting(experts, np.tile(np.float32([0.75, 0.25]), (n, 1)), flat, np.log(flat))


# By token: digits to expert 0, Chinese to 1, function words to 2, all else to 3; always beside expert 5. Nothing to 4.
BY_KIND = [[{"digits": 0, "chinese": 1, "function": 2}.get(kind_of(word) or "", 3), 5] for word in WORDS]


@pytest.fixture(scope="module")
def labels() -> dict:
    seen, rng = Seen(), np.random.default_rng(0)
    domains = {"en": [0, 1, 9, 10, 14, 5, 6], "zh": [7, 8, 5], "math": [2, 3, 4, 0, 5]}
    for number, vocabulary in enumerate(domains.values()):
        for _ in range(20):
            ids = rng.choice(vocabulary, 30).tolist()
            by_domain = [[number, 4] for _ in WORDS]
            seen.add(ids, number, [routing(ids, BY_KIND), routing(ids, by_domain)])
    return labels_of(seen, CONFIG, list(domains), lambda token: WORDS[token])


def test_kinds_words_and_domains_are_what_was_routed(labels: dict) -> None:
    first, second = labels["layers"]
    assert [layer["layer"] for layer in labels["layers"]] == [1, 2], "the first layer is dense"
    experts = first["experts"]
    assert [one["kind"] for one in experts[:3]] == ["digits", "chinese", "function"]
    assert {token["text"] for token in experts[0]["tokens"]} == {"1", "22", "307"}
    assert experts[0]["domain"] == "math" and experts[1]["domain"] == "zh" and experts[2]["domain"] == "en"
    assert experts[0]["label"].startswith("digits · math · ")
    assert experts[4] == {
        "label": "rare", "kind": "rare", "domain": None, "share": 0.0, "bits": 0.0, "tokens": [], "examples": [],
        "domains": [{"name": name, "share": 0.0, "lift": 0.0} for name in ("en", "zh", "math")],
    }  # fmt: skip
    everywhere = experts[5]
    assert everywhere["share"] == 1 and everywhere["kind"] is None and everywhere["domain"] is None
    assert everywhere["tokens"] == [] and everywhere["bits"] == 0
    assert [one["domain"] for one in second["experts"][:3]] == ["en", "zh", "math"]


def test_shares_lifts_and_bits_are_computed_by_hand(labels: dict) -> None:
    second = labels["layers"][1]["experts"][1]
    assert second["share"] == pytest.approx(1 / 3, abs=1e-4)
    assert second["domains"][0] == {"name": "zh", "share": 1.0, "lift": 3.0}
    # Whether a token chose it says exactly whether it is of its domain: H(1/3) bits.
    entropy = -(np.log2(1 / 3) / 3 + 2 * np.log2(2 / 3) / 3)
    assert second["bits"] == pytest.approx(entropy, abs=2e-3)
    # Of three domains chosen evenly, half of the slots say which.
    assert labels["layers"][1]["bits"] == pytest.approx(0.5 * np.log2(3), abs=5e-3)
    assert labels["n_tokens"] == 1800 and [one["tokens"] for one in labels["domains"]] == [600, 600, 600]
    digit = next(token for token in labels["layers"][0]["experts"][0]["tokens"] if token["text"] == "307")
    n_digits = sum(token["n"] for token in labels["layers"][0]["experts"][0]["tokens"])
    assert digit["lift"] == pytest.approx(1800 / n_digits, abs=1e-3), "all of it is here"


def test_examples_show_each_token_once_where_it_weighs_most(labels: dict) -> None:
    for one in labels["layers"][0]["experts"][0]["examples"]:
        assert one["weight"] == 0.75 and one["token"] in ("1", "22", "307")
        assert len(one["before"]) + len(one["after"]) > 0
    tokens = [one["token"] for one in labels["layers"][0]["experts"][3]["examples"]]
    assert len(tokens) == len(set(tokens)) == 4


def test_windows_end_where_a_text_does() -> None:
    seen = Seen()
    for ids in ([0, 2, 1], [6, 6, 3]):
        seen.add(ids * 10, 0, [routing(ids * 10, BY_KIND)] * 2)
    found = labels_of(seen, CONFIG, ["all"], lambda token: WORDS[token])
    example = next(e for e in found["layers"][0]["experts"][0]["examples"] if e["token"] == "1")
    assert "," not in example["before"] + example["after"] and " lamp" in example["before"] + example["after"]


def test_tokens_that_cannot_be_seen_are_shown_in_labels() -> None:
    seen = Seen()
    ids = [13] * 30 + [2] * 30
    seen.add(ids, 0, [routing(ids, BY_KIND)] * 2)
    experts = labels_of(seen, CONFIG, ["one"], lambda token: WORDS[token])["layers"][0]["experts"]
    assert experts[3]["label"] == "space · ⏎" and experts[3]["tokens"][0]["text"] == "\n"


def test_seldom_chosen_ones_get_no_claims() -> None:
    seen = Seen()
    ids = [2] * (LEAST_USES - 1) + [0] * 40
    seen.add(ids, 0, [routing(ids, BY_KIND)] * 2)
    experts = labels_of(seen, CONFIG, ["one"], lambda token: WORDS[token])["layers"][0]["experts"]
    assert experts[0]["kind"] == "rare" and experts[0]["domain"] is None and experts[3]["kind"] != "rare"


@pytest.mark.parametrize(
    ("table", "bits"),
    [
        ([[50, 50], [50, 50]], 0),
        ([[100, 0], [0, 100]], 1 - 1 / (400 * np.log(2))),
        ([[300, 100], [100, 300]], 1 - (-(0.25 * np.log2(0.25) + 0.75 * np.log2(0.75))) - 1 / (1600 * np.log(2))),
        ([[0, 0], [0, 0]], 0),
        ([[7, 3], [0, 0]], 0),
    ],
)
def test_mutual_information(table: list[list[int]], bits: float) -> None:
    assert mutual_information(np.array(table)) == pytest.approx(bits, abs=1e-12)


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        (" 42", "digits"), ("，", "punctuation"), ("...", "punctuation"), (" =>", "symbols"), ("\n\n", "space"), ("", "space"),
        (" The", "function"), (" Paris", "names"), ("ing", "pieces"), (" house", None), ("天地", "chinese"), ("x1", None),
    ],
)  # fmt: skip
def test_kinds(text: str, kind: str | None) -> None:
    assert kind_of(text) == kind


def test_nothing_to_label_is_said() -> None:
    with pytest.raises(ConfigError, match="this model is dense"):
        labels_of(Seen(), TINY["llama2"], ["en"], str)
    with pytest.raises(ConfigError, match="the data has no text"):
        labels_of(Seen(), CONFIG, ["en"], str)


def test_labels_of_a_model_in_the_package_lie_in_the_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, labels: dict
) -> None:
    monkeypatch.setenv("QUADRIGA_CACHE", str(tmp_path / "cache"))
    place = files.place_of(files.PACKAGE / "hub" / "models" / "nano.gguf")
    assert place == tmp_path / "cache" / "labels" / "nano.gguf.expert-labels.json"
    files.write(labels, place)
    assert files.read(place, CONFIG) is not None


def test_a_file_is_read_as_it_was_written_and_no_other(tmp_path: Path, labels: dict) -> None:
    assert files.place_of(tmp_path) == tmp_path / "expert-labels.json"
    assert files.place_of(tmp_path / "a.gguf") == tmp_path / "a.gguf.expert-labels.json"
    place = files.place_of(tmp_path)
    assert files.read(place, CONFIG) is None
    files.write(labels, place)
    assert files.read(place, CONFIG) == {"format": "quadriga-expert-labels", "version": 1, **labels}
    assert list(tmp_path.iterdir()) == [place]
    with pytest.raises(CheckpointError, match="labels 12 experts in 2 layers; this model has 15 in 3"):
        files.read(place, TINY["dbrx"])
    for wrong, said in (
        ("{", "cannot be read"),
        ("[]", "must be a file of"),
        (json.dumps({"format": files.FORMAT, "version": 1}), "damaged"),
    ):
        place.write_text(wrong)
        with pytest.raises(CheckpointError, match=said):
            files.read(place, CONFIG)
    with pytest.raises(ConfigError, match="--labels-file"):
        files.write(labels, tmp_path / "nowhere" / "x.json")
