"""What deploy/ names is there: options, files, metrics, exit codes; and the wheel's scripts, what they copy."""

from __future__ import annotations

import json
import re
import shlex
from functools import cache
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families
from typer.testing import CliRunner

from quadriga.cli import app
from quadriga.hub.catalogue import BUNDLED, CATALOGUE, DELTAS
from quadriga.server.metrics import Metrics
from tests.server.conftest import tiny_llm

ROOT = Path(__file__).parent.parent
DEPLOY = ROOT / "deploy"
DOCKERFILES = (DEPLOY / "Dockerfile", DEPLOY / "huggingface-space/Dockerfile")


@cache
def help_of(command: str) -> str:
    result = CliRunner().invoke(app, [command, "--help"], env={"COLUMNS": "200", "TERM": "dumb"})
    assert result.exit_code == 0, command
    return result.output


def check_command(words: list[str]) -> None:
    """Options exist, and a model is the catalogue's."""
    text = help_of(words[0])
    for word in words[1:]:
        if word.startswith("--"):
            assert word in text, word
    if len(words) > 1 and not words[1].startswith("-"):
        assert words[1] in {**CATALOGUE, **DELTAS, **BUNDLED}, words[1]


def test_the_images_call_commands_that_exist() -> None:
    (plain,) = re.findall(r"^CMD (\[.*\])$", DOCKERFILES[0].read_text(), re.MULTILINE)
    assert json.loads(re.findall(r"^ENTRYPOINT (.*)$", DOCKERFILES[0].read_text(), re.MULTILINE)[0]) == ["quadriga"]
    check_command(json.loads(plain))
    space = DOCKERFILES[1].read_text()
    shell, run = (
        json.loads(re.findall(r"^CMD (\[.*\])$", space, re.MULTILINE)[0])[2],
        re.findall(r"RUN quadriga (.*)", space),
    )
    check_command(shlex.split(shell)[2:])
    (pulled,) = run
    check_command(shlex.split(pulled))
    assert (
        f"--port {re.findall(r'app_port: ([0-9]+)', (DEPLOY / 'huggingface-space/README.md').read_text())[0]} " in shell
    )


def test_the_compose_file_and_the_service_call_options_that_exist() -> None:
    (command,) = re.findall(r"command: (\[.*\])", (DEPLOY / "compose.yaml").read_text())
    words = json.loads(re.sub(r"\$\{QUADRIGA_MODEL:-([^}]*)\}", r"\1", command))
    check_command(words)
    (start,) = re.findall(r"^ExecStart=\S+/quadriga (.*)$", (DEPLOY / "quadriga.service").read_text(), re.MULTILINE)
    check_command(start.split())


def test_whatever_stops_them_waits_longer_than_answers_may_take() -> None:
    """--drain and six seconds, as docs/server.md has it."""
    service = (DEPLOY / "quadriga.service").read_text()
    drain = int(re.findall(r"--drain (\d+)", service)[0])
    assert int(re.findall(r"TimeoutStopSec=(\d+)", service)[0]) > drain + 6
    assert int(re.findall(r"stop_grace_period: (\d+)s", (DEPLOY / "compose.yaml").read_text())[0]) > 30 + 6


@pytest.mark.parametrize("name", ["compose.yaml", "prometheus.yml"])
def test_files_that_are_mounted_exist(name: str) -> None:
    for path in re.findall(r"- (\./\S+?):/", (DEPLOY / name).read_text()):
        assert (DEPLOY / path).exists(), path


def test_what_the_image_is_built_from_exists_and_is_not_ignored() -> None:
    kept = {line[1:] for line in (DEPLOY / "Dockerfile.dockerignore").read_text().splitlines() if line.startswith("!")}
    copied = [
        name
        for line in re.findall(r"^COPY (?!--from)(.*)$", DOCKERFILES[0].read_text(), re.MULTILINE)
        for name in line.split()[:-1]
    ]
    assert set(copied) == kept
    for name in copied:
        assert (ROOT / name).exists(), name


def test_images_run_a_python_that_the_package_allows_and_nobody_is_root() -> None:
    for path in DOCKERFILES:
        text = path.read_text()
        assert all(int(minor) >= 11 for minor in re.findall(r"^FROM python:3\.(\d+)-", text, re.MULTILINE))
        assert re.findall(r"^USER (\S+)$", text, re.MULTILINE)[-1] not in ("root", "0")


def test_every_metric_of_the_dashboard_is_served() -> None:
    """By its whole name, buckets and totals included, and with the labels that the dashboard asks for."""
    metrics = Metrics()
    metrics.add(tiny_llm(), "tiny")
    metrics.done("stop", 0.5, 2.5, 5)
    metrics.answers.labels("/v1/completions", "200").inc()
    metrics.refused.labels("429").inc()
    served: dict[str, set[str]] = {}
    for family in text_string_to_metric_families(metrics.text().decode()):
        for sample in family.samples:
            served.setdefault(sample.name, set()).update(sample.labels)
    board = json.loads((DEPLOY / "grafana/dashboards/quadriga.json").read_text())
    asked = [target["expr"] for panel in board["panels"] for target in panel.get("targets", ())]
    asked += [variable["query"]["query"] for variable in board["templating"]["list"]]
    assert len(asked) > 20
    for expression in asked:
        names = re.findall(r"(?:vllm:|quadriga_)\w+", expression)
        assert names, expression
        for name in names:
            assert name in served, name
        for label in re.findall(r"by \((\w+)\)", expression) + re.findall(r"[{,](\w+)=", expression):
            assert all(label in served[name] for name in names), (label, expression)


def test_nothing_is_advised_from_an_index_that_is_not_ours() -> None:
    """A name on a public index belongs to whoever takes it first: hints name the clone or the wheel."""
    files = [
        path
        for folder in ("src", "docs", "deploy", "tools", "examples", "bench")
        for path in (ROOT / folder).rglob("*")
    ]
    advice = re.compile(r"""(?:pip|pipx|uv tool) install (?:-\S+ )*['"]?quadriga(?![\w-]|\S*\.whl)""")
    assert advice.search("pip install 'quadriga[torch]'") and not advice.search("pip install quadriga-0.1-py3-none.whl")
    for path in [*files, *ROOT.glob("*.md")]:
        if path.suffix in (".py", ".md", ".sh", ".js", ".json", ".yaml", ".service", ".toml", "") and path.is_file():
            assert not advice.search(path.read_text()), path
