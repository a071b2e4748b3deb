"""``quadriga bench serve``: load on any server with OpenAI's interface, and what became of it."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from quadriga.cli import options

if TYPE_CHECKING:
    from quadriga.bench.http_client import Target
    from quadriga.bench.serve import Load, Objectives, Shape

_LOAD, _REQUESTS, _GOALS = "Load", "Requests", "What a good answer keeps"


def bench_serve_command(
    url: Annotated[str, typer.Argument(help="http://127.0.0.1:8000, https://llm.example.org/v1, ...")],
    api_model: options.APIModel = None,
    api_key: options.APIKey = None,
    concurrency: options.Concurrencies = None,
    rate: Annotated[
        list[float] | None,
        typer.Option(help="Requests a second at random times (Poisson); may be repeated.", rich_help_panel=_LOAD),
    ] = None,
    requests: options.Requests = 0,
    warmup: Annotated[int, typer.Option(help="Requests before the first level.", rich_help_panel=_LOAD)] = 2,
    timeout: options.Timeout = 600.0,
    prompt_tokens: options.PromptTokens = 128,
    max_tokens: options.MaxTokens = 64,
    ignore_eos: Annotated[
        bool,
        typer.Option(
            "--ignore-eos", help="Answers of exactly --max-tokens (not all servers).", rich_help_panel=_REQUESTS
        ),
    ] = False,
    text: Annotated[
        Path | None, typer.Option(help="Cut prompts from this file; default: common words.", rich_help_panel=_REQUESTS)
    ] = None,
    shared_prefix: Annotated[
        float, typer.Option(help="Part of every prompt that is the same, 0 to 1.", rich_help_panel=_REQUESTS)
    ] = 0.0,
    completions: options.Completions = False,
    seed: options.Seed = 0,
    slo_first_token: Annotated[
        float | None, typer.Option(help="Milliseconds to the first token.", rich_help_panel=_GOALS)
    ] = None,
    slo_per_token: Annotated[
        float | None, typer.Option(help="Milliseconds a token after it, on average.", rich_help_panel=_GOALS)
    ] = None,
    slo_whole: Annotated[
        float | None, typer.Option(help="Milliseconds to the end of an answer.", rich_help_panel=_GOALS)
    ] = None,
    report: Annotated[Path | None, typer.Option(help="Write every number to this JSON file.")] = None,
    picture: options.Picture = None,
) -> None:
    """Put load on a server: first-token and inter-token latency, throughput, goodput, errors.

    --concurrency and --rate may be given several times, one level of load each; without either, 1 and 8 clients. The
    model is the server's first without --api-model. QUADRIGA_API_KEY has the key too.
    """
    import asyncio

    from quadriga import runtime
    from quadriga.bench.http_client import target
    from quadriga.bench.serve import Objectives, Shape, first_model
    from quadriga.errors import EngineError

    loads = _loads(concurrency, rate, requests)
    check_ranges(prompt_tokens=prompt_tokens, max_tokens=max_tokens, timeout=timeout, warmup=warmup + 1)
    if picture is not None:
        _need_matplotlib(picture)
    at = target(url, api_key or runtime.setting("API_KEY"))
    share, source = _share(shared_prefix), None if text is None else options.text_of(text, "--text")
    shape = Shape(
        model=api_model or asyncio.run(first_model(at)),
        prompt_tokens=prompt_tokens,
        max_tokens=max_tokens,
        chat=not completions,
        ignore_eos=ignore_eos,
        shared_prefix=share,
        text=source,
        seed=seed or 0,
        timeout_s=timeout,
    )
    goal = Objectives(first_token_ms=slo_first_token, per_token_ms=slo_per_token, whole_ms=slo_whole)
    rows = asyncio.run(_measure(at, shape, loads, goal, warmup))
    if report is not None:
        report.write_text(_as_json(url, shape, goal, rows))
    if picture is not None:
        _draw(rows, shape.model, picture)
    if all(row["errors"] and not row["output_tokens"] for row in rows):
        raise EngineError("no request was answered; the table says why")


def _loads(concurrency: list[int] | None, rate: list[float] | None, requests: int) -> list[Load]:
    from quadriga.bench.serve import Load

    clients = concurrency if concurrency or rate else [1, 8]
    check_ranges(**{f"concurrency {n}": n for n in clients or ()}, **{f"rate {r:g}": r for r in rate or ()})
    check_ranges(requests=requests + 1)
    loads = [Load(n_requests=requests or max(16, 4 * n), concurrency=n) for n in clients or ()]
    return loads + [Load(n_requests=requests or max(16, round(16 * r)), rate=r) for r in rate or ()]


def check_ranges(**values: float) -> None:
    """Refuse options out of range, by their names.

    Raises:
        ConfigError: one is not above 0, or a thousand millions or more.
    """
    from quadriga.errors import ConfigError

    for name, value in values.items():
        if not 0 < value < 1e9:
            raise ConfigError(f"{name.replace('_', ' ')} is too small or too large")


def _share(value: float) -> float:
    from quadriga.errors import ConfigError

    if not 0 <= value <= 1:
        raise ConfigError(f"--shared-prefix is a part of the prompt, from 0 to 1; got {value:g}")
    return value


async def _measure(at: Target, shape: Shape, loads: list[Load], goal: Objectives, warmup: int) -> list[dict[str, Any]]:
    from quadriga.bench.serve import LoadTest
    from quadriga.cli.progress import count_bar

    rows = []
    with count_bar("warming up") as show:
        test = LoadTest(at, shape)
        got = await test.prepare(warmup)
        if got and abs(got - shape.prompt_tokens) > max(8, shape.prompt_tokens // 10):
            print(f"prompts have about {got} tokens, not {shape.prompt_tokens}", file=sys.stderr)
        for load in loads:
            rows.append((await test.run(load, partial(_shown, show, load.label))).numbers(goal))
        test.close()
    _print(rows, shape.model, goal)
    return rows


def _shown(show: Callable[[int, int, str], None], label: str, done: int, total: int) -> None:
    show(done, total, label)


def _print(rows: list[dict[str, Any]], model: str, goal: Objectives) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"{model}: milliseconds are p50 / p99", title_justify="left")
    for name in ("load", "requests", "tokens/s", "requests/s", "first token", "between tokens", "whole"):
        table.add_column(name, justify="left" if name == "load" else "right", no_wrap=True)
    aims = any(value is not None for value in (goal.first_token_ms, goal.per_token_ms, goal.whole_ms))
    if aims:
        table.add_column("goodput/s", justify="right")
    for row in rows:
        failed = sum(row["errors"].values())
        cells = [row["load"], f"{row['requests'] - failed}" + (f" + {failed} failed" if failed else "")]
        cells += [f"{row['output_tokens_per_s']:.1f}", f"{row['requests_per_s']:.2f}"]
        cells += [_pair(row[name]) for name in ("first_token_ms", "between_tokens_ms", "whole_ms")]
        if aims:
            cells.append(f"{row['goodput_requests_per_s']:.2f} ({row['good_share']:.0%})")
        table.add_row(*cells)
    Console(soft_wrap=not sys.stdout.isatty()).print(table)
    for row in rows:
        for kind, n in row["errors"].items():
            print(f"{row['load']}: {n} x {kind}", file=sys.stderr)
    if not all(row["tokens_counted_by_server"] for row in rows):
        print("the server reports no usage: tokens are events with text", file=sys.stderr)


def _pair(spread: dict[str, float | None]) -> str:
    return "-" if spread["p50"] is None else f"{spread['p50']:.1f} / {spread['p99']:.1f}"


def _as_json(url: str, shape: Shape, goal: Objectives, rows: list[dict[str, Any]]) -> str:
    import json
    from dataclasses import asdict

    from quadriga import __version__

    fields = asdict(shape)
    fields["text"] = "words" if shape.text is None else f"{len(shape.text)} characters of a file"
    whole = {"quadriga": __version__, "url": url, "requests": fields, "objectives": asdict(goal), "levels": rows}
    return json.dumps(whole, indent=2) + "\n"


def _need_matplotlib(path: Path) -> None:
    import importlib.util

    from quadriga import runtime
    from quadriga.errors import ConfigError

    options.require_picture(path, (".svg",))
    if importlib.util.find_spec("matplotlib") is None:
        raise ConfigError(f"--picture needs matplotlib: {runtime.install_hint('bench')}, or leave --picture out")


def _draw(rows: list[dict[str, Any]], model: str, path: Path) -> None:
    """Three panels over the levels: tokens a second, first token, between tokens."""
    import matplotlib

    matplotlib.use("svg")
    import matplotlib.pyplot as plt

    panels = {
        "output_tokens_per_s": "tokens a second",
        "first_token_ms": "first token, ms",
        "between_tokens_ms": "between tokens, ms",
    }
    figure, axes = plt.subplots(1, len(panels), figsize=(12, 3.4), constrained_layout=True)
    places = range(len(rows))
    for axis, (name, title) in zip(axes, panels.items(), strict=True):
        if name == "output_tokens_per_s":
            axis.bar(places, [row[name] for row in rows], 0.6, color="#1b6ca8")
        else:
            for p, colour in (("p50", "#1b6ca8"), ("p90", "#d98e04"), ("p99", "#b3383d")):
                axis.plot(places, [row[name][p] for row in rows], marker="o", color=colour, label=p)
            axis.set_ylim(bottom=0)
            axis.legend(frameon=False, fontsize=8)
        axis.set_xticks(places, [row["load"].replace(" ", "\n") for row in rows], fontsize=8)
        axis.set_title(title, fontsize=10)
        axis.spines[["top", "right"]].set_visible(False)
    figure.suptitle(model, fontsize=10, x=0.01, ha="left")
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)
