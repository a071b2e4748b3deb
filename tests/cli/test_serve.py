"""What ``quadriga serve`` hands to the server, and which options it refuses, without a model."""

from __future__ import annotations

import socket
from typing import Any
from unittest import mock

import pytest
from typer.testing import CliRunner

from quadriga.cli import app, options
from quadriga.errors import ConfigError
from quadriga.server import hosting, run


@pytest.fixture
def handed(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The options that the service and the server are given."""
    seen: dict[str, Any] = {}

    class Service:
        name = "model"
        aliases = ()
        engine = metrics = mock.Mock()

        def __init__(self, llm: Any, **given: Any) -> None:
            seen.update(given)

    def serve(service: Any, limits: Any, listener: socket.socket, **given: Any) -> None:
        listener.close()
        seen.update(given, limits=limits)

    monkeypatch.setattr(options, "load_model", lambda *args, **given: None)
    monkeypatch.setattr(hosting, "Service", Service)
    monkeypatch.setattr(run, "serve", serve)
    return seen


@pytest.mark.parametrize(
    ("arguments", "timeout", "stays"),
    [
        ([], 300.0, False),
        (["--step-timeout", "0"], 0.0, False),
        (["--step-timeout", "2.5", "--stay-on-failure"], 2.5, True),
    ],
    ids=["defaults", "any time", "both"],
)
def test_how_the_engines_failure_is_met(
    handed: dict[str, Any], arguments: list[str], timeout: float, stays: bool
) -> None:
    result = CliRunner().invoke(app, ["serve", "--port", "0", *arguments])
    assert result.exit_code == 0, result.output
    assert (handed["step_timeout_s"], handed["stay_on_failure"]) == (timeout, stays)


@pytest.mark.parametrize("value", ["-1", "nan", "inf"])
def test_a_limit_that_is_none_is_refused(handed: dict[str, Any], value: str) -> None:
    result = CliRunner().invoke(app, ["serve", "--port", "0", "--step-timeout", value])
    assert isinstance(result.exception, ConfigError) and "--step-timeout" in str(result.exception)
    assert not handed


def test_what_a_client_may_use_is_handed_on(handed: dict[str, Any]) -> None:
    options = ["--requests-per-minute", "7", "--tokens-per-minute", "800", "--concurrent", "9"]
    result = CliRunner().invoke(app, ["serve", "--port", "0", *options])
    assert result.exit_code == 0, result.output
    allowed = handed["limits"].allowance
    assert (allowed.requests_per_minute, allowed.tokens_per_minute, allowed.concurrent) == (7, 800, 9)


@pytest.mark.parametrize("option", ["--requests-per-minute", "--tokens-per-minute", "--concurrent", "--max-waiting"])
def test_limits_below_nothing_are_refused(handed: dict[str, Any], option: str) -> None:
    result = CliRunner().invoke(app, ["serve", "--port", "0", option, "-1"])
    assert isinstance(result.exception, ConfigError) and "cannot be negative" in str(result.exception)
    assert not handed
