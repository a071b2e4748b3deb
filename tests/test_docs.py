"""The documentation tells the truth: its code runs, its links lead somewhere, its commands exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from typer.testing import CliRunner

from quadriga.cli import app

ROOT = Path(__file__).parent.parent
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])


@pytest.mark.weights
def test_every_block_of_the_python_api_page_runs(smollm2: Path) -> None:
    text = (ROOT / "docs/python-api.md").read_text()
    blocks = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert len(blocks) >= 6
    names: dict[str, object] = {}
    for block in blocks:
        exec(compile(block, "docs/python-api.md", "exec"), names)


@pytest.mark.weights
def test_the_block_of_the_tuning_page_runs(smollm2: Path) -> None:
    (block,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs/tuning.md").read_text(), re.DOTALL)
    exec(compile(block, "docs/tuning.md", "exec"), {})


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_files(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text()):
        assert (page.parent / target).exists(), target


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_named_files_exist(page: Path) -> None:
    for name in re.findall(r"`((?:tests|bench|docs)/[\w/.]+\.(?:py|md))", page.read_text()):
        assert (ROOT / name).exists(), name


SECTIONS = ("adapter", "bench", "claims", "data", "experts", "models")
"""Words that are followed by a command of theirs."""


def test_documented_commands_and_options_exist() -> None:
    helps: dict[str, str] = {}
    for page in PAGES:
        for line in re.findall(r"^(?:pip install \. && )?quadriga (.*)$", page.read_text(), re.MULTILINE):
            words = line.split("#")[0].split()
            command = words[:2] if words[0] in SECTIONS else words[:1]
            if " ".join(command) not in helps:
                result = CliRunner().invoke(app, [*command, "--help"], env={"COLUMNS": "200", "TERM": "dumb"})
                assert result.exit_code == 0, command
                helps[" ".join(command)] = result.output
            for option in (word for word in words if word.startswith("--")):
                assert option in helps[" ".join(command)], f"{page.name}: {line}"
    assert {"chat", "info", "generate", "convert", "models list"} <= set(helps)
