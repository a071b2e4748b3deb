"""Options from files and the environment: which one counts, and what a wrong one says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from quadriga.cli import app
from quadriga.engine import load as load_module
from quadriga.errors import ConfigError


class Reached(BaseException):
    def __init__(self, given: dict[str, Any]) -> None:
        super().__init__()
        self.given = given


@pytest.fixture(autouse=True)
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Folders of their own; commands end where they would load a model."""
    (tmp_path / "home/quadriga").mkdir(parents=True)
    (tmp_path / "project").mkdir()
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path / "project")

    def load(model: Any, **given: Any) -> None:
        raise Reached({"model": model, **given})

    monkeypatch.setattr(load_module, "load", load)


def write(tmp_path: Path, *, own: str = "", project: str = "") -> None:
    (tmp_path / "home/quadriga/config.toml").write_text(own)
    (tmp_path / "project/quadriga.toml").write_text(project)


def loaded(*words: str) -> dict[str, Any]:
    try:
        result = CliRunner().invoke(app, [*words])
    except Reached as reached:
        return reached.given
    raise AssertionError((result.exception, result.output))


def refused(*words: str) -> str:
    result = CliRunner().invoke(app, [*words])
    assert isinstance(result.exception, ConfigError), (result.exception, result.output)
    return str(result.exception)


def test_the_nearest_place_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert loaded("generate", "x")["threads"] is None
    write(tmp_path, own="[all]\nthreads = 3\nkv-memory = '2GB'\n[generate]\nmodel = 'mine'\n")
    assert loaded("generate", "x")["model"] == "mine"
    assert loaded("generate", "x")["threads"] == 3
    assert loaded("generate", "x")["kv_memory"] == 2_000_000_000
    write(tmp_path, own="[all]\nthreads = 3\n", project="[generate]\nthreads = 4\n[serve]\nport = 1\n")
    assert loaded("generate", "x")["threads"] == 4
    write(tmp_path, own="[generate]\nthreads = 4\nkv_memory = '3GB'\n[all]\nthreads = 3\nkv-memory = '2GB'\n")
    assert loaded("generate", "x")["threads"] == 4, "a command's own table, wherever it stands"
    assert loaded("generate", "x")["kv_memory"] == 3_000_000_000, "written like an attribute too"
    monkeypatch.setenv("QUADRIGA_GENERATE_THREADS", "5")
    assert loaded("generate", "x")["threads"] == 5
    assert loaded("generate", "x", "--threads", "6")["threads"] == 6


def test_the_model_of_a_command_whose_argument_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, own="[serve]\nmodel = 'theirs'\nport = 0\n")
    assert loaded("serve")["model"] == "theirs"
    assert loaded("serve", "this")["model"] == "this"
    monkeypatch.setenv("QUADRIGA_SERVE_MODEL", "that")
    assert loaded("serve")["model"] == "that"


@pytest.mark.parametrize(
    ("own", "project", "says"),
    [
        ("threads = 2", "", r"config\.toml: threads must stand in a table"),
        ("[serv]\nport = 1", "", r"config\.toml: there is no command for \[serv\]\. Did you mean serve\?"),
        ("[bench.decod]\nn = 1", "", r"no command for \[bench\.decod\]\. Did you mean bench decode\?"),
        ("[serve]\nprt = 1", "", r"config\.toml: \[serve\] has no prt\. Did you mean port\?"),
        ("[all]\nnothing = 1", "", r"\[all\] has no nothing"),
        ("[generate]\nthreads = 'two'", "", r"config\.toml, \[generate\] threads: Input should be a valid integer"),
        (
            "[generate]\nthreads = 9999",
            "",
            r"config\.toml, \[generate\] threads: Input should be less than or equal to 1024",
        ),
        ("[generate]\nthreads = [1, 2]", "", "threads must be one value, got a list"),
        ("[generate", "", r"config\.toml must be TOML"),
        ("", "[serve]\nhost = '0.0.0.0'", r"quadriga\.toml, \[serve\] host must not be set by a project's file"),
        ("", "[chat]\nurl = 'http://x'", r"\[chat\] url must not be set by a project's file"),
    ],
)
def test_mistakes_name_file_and_key(tmp_path: Path, own: str, project: str, says: str) -> None:
    import re

    write(tmp_path, own=own, project=project)
    command = "serve" if "serve" in project else "chat" if "chat" in project else "generate"
    words = ["generate", "x"] if command == "generate" else [command]
    assert re.search(says, refused(*words)), refused(*words)


@pytest.mark.parametrize(
    ("command", "line"),
    [
        ("serve", "host = '0.0.0.0'"),
        ("serve", "api-key = 'k'"),
        ("serve", "api_key = 'k'"),
        ("serve", "allow-host = ['*']"),
        ("serve", "allow-origin = ['*']"),
        ("chat", "url = 'http://x'"),
        ("chat", "api-key = 'k'"),
        ("serve", "admin-key = 'k'"),
        ("serve", "open-probes = true"),
        ("serve", "otlp-traces-endpoint = 'x:4318'"),
        ("serve", "ray = 'x:10001'"),
        ("serve", "unix-socket = 'x'"),
        ("eval", "unsafe-exec = true"),
        ("eval", "api-key = 'k'"),
        ("eval", "judge = 'https://x/v1'"),
        ("eval", "model = 'http://x/v1'"),
    ],
)
def test_a_project_opens_no_machine_and_sends_nothing_elsewhere(tmp_path: Path, command: str, line: str) -> None:
    for table in (command, "all"):
        write(tmp_path, project=f"[{table}]\n{line}\n")
        said = refused(command, *(["--tasks", "gsm8k"] if command == "eval" else []))
        assert f"[{table}] {line.split()[0]} must not be set by a project's file" in said


def test_a_wrong_variable_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QUADRIGA_GENERATE_THREADS", "many")
    assert refused("generate", "x").startswith("QUADRIGA_GENERATE_THREADS: Input should be a valid integer")


def test_a_variable_of_no_option_is_said(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    for name in ("GENERATE_THREDS", "GENERATE_TOP_P", "SERVE_PROT", "DATA", "BENCH_DECODE_ROUNDS"):
        monkeypatch.setenv(f"QUADRIGA_{name}", "0.5")
    loaded("generate", "x")
    assert [r.getMessage() for r in caplog.records if r.name == "quadriga.cli.settings"] == [
        "QUADRIGA_GENERATE_THREDS has no effect: `quadriga generate` has no threds. Did you mean threads?"
    ]
    caplog.clear()
    loaded("serve", "x")
    assert [r.getMessage() for r in caplog.records if r.name == "quadriga.cli.settings"] == [
        "QUADRIGA_SERVE_PROT has no effect: `quadriga serve` has no prot. Did you mean port?"
    ]


def test_a_shape_and_an_apple_gpu_are_explained() -> None:
    from quadriga.errors import CatalogueError
    from quadriga.hub.catalogue import resolve

    with pytest.raises(CatalogueError, match=r"dbrx-132b is the name of a shape.*quadriga info dbrx-132b"):
        resolve("dbrx-132b")
    assert "Apple's GPUs are not supported" in refused("generate", "x", "--dtype", "float32", "--device", "mps")
