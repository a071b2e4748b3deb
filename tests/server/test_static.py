"""The chat page's files: complete, unchanged copies of libraries, words in every language, nothing inline."""

from __future__ import annotations

import hashlib
import json
import posixpath
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from quadriga.server.page import PAGE
from tests.server.conftest import Live

SOURCES = sorted([*PAGE.glob("*.js"), *(PAGE / "views").glob("*.js")])
STRINGS = {path.stem: json.loads(path.read_text()) for path in sorted((PAGE / "strings").glob("*.json"))}
CODE = "\n".join(path.read_text() for path in SOURCES)


def test_both_languages_have_the_same_keys_and_the_same_values_to_fill_in() -> None:
    assert set(STRINGS) == {"en", "zh-CN"}
    english, chinese = STRINGS["en"], STRINGS["zh-CN"]
    assert english.keys() - chinese.keys() == set()
    assert chinese.keys() - english.keys() == set()
    for key, text in english.items():
        assert text.strip() and chinese[key].strip(), key
        assert sorted(re.findall(r"\{\w+\}", text)) == sorted(re.findall(r"\{\w+\}", chinese[key])), key


def test_every_key_in_the_code_has_words_and_all_words_are_used() -> None:
    used = set(re.findall(r"\bt\(\s*\"([^\"]+)\"", CODE))
    assert len(used) > 100
    assert used - STRINGS["en"].keys() == set(), "keys without words"
    assert STRINGS["en"].keys() - used == set(), "words that nothing shows"
    assert not re.search(r"\bt\(\s*[^\"\s)]", CODE.replace("function t(key", "")), (
        "keys must be literal, so that this test sees them"
    )


def test_values_given_to_words_are_those_the_words_ask_for() -> None:
    calls = re.findall(r"\bt\(\s*\"([^\"]+)\",\s*\{(.*?)\}\s*\)", CODE, re.DOTALL)
    assert len(calls) > 20
    for key, given in calls:
        for name in re.findall(r"\{(\w+)\}", STRINGS["en"][key]):
            assert re.search(rf"\b{name}\b", given), (key, name)


def test_chinese_is_chinese() -> None:
    same = {key for key, text in STRINGS["en"].items() if STRINGS["zh-CN"][key] == text}
    assert same == set()


def test_libraries_are_the_published_files_with_their_licences() -> None:
    folder = PAGE / "vendor"
    manifest = json.loads((folder / "manifest.json").read_text())
    here = {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file() and p.parent.name != "licences"}
    assert {row["file"] for row in manifest} == here - {"manifest.json"}
    licences = {name for row in manifest for name in row["licence_files"]}
    assert licences == {p.name for p in (folder / "licences").iterdir()}
    for row in manifest:
        assert hashlib.sha256((folder / row["file"]).read_bytes()).hexdigest() == row["sha256"], row["file"]
        assert re.fullmatch(r"\d+\.\d+\.\d+", row["version"])
        for name in row["licence_files"]:
            assert re.search(r"copyright|Apache License", (folder / "licences" / name).read_text(), re.IGNORECASE)


def test_the_page_stays_small() -> None:
    """KaTeX and its fonts are more than half of it, and fetched when a formula is seen first."""
    assert sum(path.stat().st_size for path in PAGE.rglob("*") if path.is_file()) < 1_500_000
    first = [path for path in PAGE.rglob("*") if path.is_file() and "katex" not in path.name.lower()]
    assert sum(path.stat().st_size for path in first) < 800_000


class _Tags(HTMLParser):
    """Collects what a strict policy forbids, and what the page loads."""

    def __init__(self) -> None:
        super().__init__()
        self.loads: list[str] = []
        self.inline: list[str] = []
        self._inside = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        self.loads += [value for name, value in attrs if name in ("src", "href") and value]
        self.inline += [name for name in given if name == "style" or name.startswith("on")]
        self._inside = tag if tag == "style" or (tag == "script" and "src" not in given) else ""

    def handle_data(self, data: str) -> None:
        if self._inside and data.strip():
            self.inline.append(self._inside)


def test_nothing_is_inline_and_everything_loaded_is_ours() -> None:
    tags = _Tags()
    tags.feed((PAGE / "index.html").read_text())
    assert tags.inline == []
    assert len(tags.loads) >= 7
    for target in tags.loads:
        assert target.startswith("/page/") and (PAGE / target.removeprefix("/page/")).is_file(), target


@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.relative_to(PAGE).as_posix())
def test_every_import_leads_to_a_file(source: Path) -> None:
    text = source.read_text()
    here = source.relative_to(PAGE).parent.as_posix()
    targets = re.findall(r"^(?:import|\}) .*\bfrom \"([^\"]+)\"", text, re.MULTILINE)
    targets += re.findall(r"\bimport\(\"([^\"]+)\"\)", text)
    assert targets or "import" not in text
    for target in targets:
        assert target.startswith("."), f"{target}: bare names need an import map, which the policy forbids"
        assert (PAGE / posixpath.normpath(posixpath.join(here, target))).is_file(), target
    assert text.startswith("//"), "a module begins by saying what it is"


def test_no_source_asks_another_host() -> None:
    assert re.findall(r"https?://(?!www\.w3\.org)[\w.]+", CODE) == []


def test_the_server_hands_out_exactly_these_files_under_a_strict_policy(tiny: Live) -> None:
    index = tiny.client.get("/")
    policy = index.headers["content-security-policy"]
    assert "default-src 'none'" in policy and "script-src 'self';" in policy and "unsafe" not in policy
    for path in sorted(PAGE.rglob("*")):
        if path.is_file():
            response = tiny.client.get(f"/page/{path.relative_to(PAGE).as_posix()}")
            assert response.content == path.read_bytes()
            assert response.headers["content-security-policy"] == policy
            if path.suffix in (".js", ".mjs"):
                assert response.headers["content-type"].startswith("text/javascript")
    again = tiny.client.get("/page/app.js", headers={"if-none-match": tiny.client.get("/page/app.js").headers["etag"]})
    assert again.status_code == 304 and again.content == b""
    for wrong in ("/page/", "/page/nothing.js", "/page/..%2fapp.py", "/page/%2e%2e/app.py", "/page/../app.py"):
        assert tiny.client.get(wrong).status_code == 404, wrong
