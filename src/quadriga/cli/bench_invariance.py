"""``quadriga bench invariance``: whether answers depend on who else asks, of any server or of a model here."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer

from quadriga.cli import options
from quadriga.cli.rules import is_address

if TYPE_CHECKING:
    from quadriga.bench.invariance import Difference, Question


def bench_invariance_command(
    target: Annotated[
        str, typer.Argument(metavar="URL|MODEL", help="http://127.0.0.1:8000, or a model to run in this process.")
    ] = "smollm2-135m-instruct",
    api_model: options.APIModel = None,
    api_key: options.APIKey = None,
    concurrency: options.Concurrencies = None,
    requests: options.Requests = 0,
    timeout: options.Timeout = 600.0,
    prompt_tokens: options.PromptTokens = 128,
    max_tokens: options.MaxTokens = 64,
    temperature: options.Temperature = None,
    completions: options.Completions = False,
    seed: options.Seed = 0,
    format: options.Format = None,
    dtype: options.Dtype = None,
    threads: options.Threads = None,
    json: options.Json = False,
) -> None:
    """Ask the same seeded requests alone and in crowds, and count tokens and log-probabilities that differ.

    Exit code 1: something differs. --concurrency may be given several times, one crowd each; without it, 4 and 16.
    Without --temperature half of the requests are greedy, and half drawn at 0.8 from seeds of their own.
    """
    from quadriga.bench.invariance import questions
    from quadriga.cli.bench_serve import check_ranges

    crowds = concurrency or [4, 16]
    check_ranges(prompt_tokens=prompt_tokens, max_tokens=max_tokens, timeout=timeout, requests=requests + 1)
    n = requests or max(16, 4 * max(crowds))
    asked = questions(n, prompt_tokens=prompt_tokens, max_tokens=max_tokens, temperature=temperature, seed=seed or 0)
    if is_address(target):
        name, rows = _of_server(target, api_key, api_model, asked, crowds, chat=not completions, timeout_s=timeout)
    else:
        name, rows = target, _of_model(target, asked, crowds, format=format, dtype=dtype, threads=threads)
    if json:
        print(options.as_json(_as_fields(target, name, asked, rows)))
    else:
        _print(name, rows)
    if any(row.found for row in rows):
        raise typer.Exit(1)


def _of_server(
    url: str,
    api_key: str | None,
    api_model: str | None,
    asked: list[Question],
    crowds: list[int],
    *,
    chat: bool,
    timeout_s: float,
) -> tuple[str, list[Difference]]:
    import asyncio

    from quadriga import runtime
    from quadriga.bench.http_client import target
    from quadriga.bench.invariance import ServerAsked, measure
    from quadriga.bench.serve import first_model
    from quadriga.cli.progress import count_bar

    at = target(url, api_key or runtime.setting("API_KEY"))
    model = api_model or asyncio.run(first_model(at))

    async def run() -> list[Difference]:
        ask = ServerAsked(at, model, chat=chat, timeout_s=timeout_s)
        try:
            with count_bar("asking") as show:
                return await measure(ask, asked, crowds, show)
        finally:
            ask.close()

    return model, asyncio.run(run())


def _of_model(model: str, asked: list[Question], crowds: list[int], **how: Any) -> list[Difference]:
    import asyncio
    from concurrent.futures import ThreadPoolExecutor

    from quadriga.bench.invariance import measure, model_in_process
    from quadriga.cli.progress import count_bar

    most = max(64, *crowds)
    llm = options.load_model(model, options.load_options(**how, max_sequences=most, max_batch_tokens=max(2048, most)))
    with ThreadPoolExecutor(max(crowds)) as threads, count_bar("asking") as show:
        return asyncio.run(measure(model_in_process(llm, threads), asked, crowds, show))


def _print(name: str, rows: list[Difference]) -> None:
    from quadriga.bench.invariance import label
    from quadriga.cli.eval import print_table

    head = ("round", "requests that differ", "tokens", "log-probabilities", "largest difference")
    table: list[tuple[str, ...]] = [head]
    for row in rows:
        scored = f"{row.logprobs_that_differ} of {row.logprobs}" if row.logprobs else "none given"
        table.append(
            (
                label(row.crowd),
                f"{row.requests_that_differ} of {row.requests}",
                f"{row.tokens_that_differ} of {row.tokens}",
                scored,
                f"{row.largest_difference:.3g}" if row.logprobs else "-",
            )
        )
    print_table(table)
    differ = [label(row.crowd) for row in rows if row.found]
    verdict = f"differs: {', '.join(differ)}" if differ else "the same, to the bit, alone and in every crowd"
    print(f"{name}: {verdict}", file=sys.stderr)


def _as_fields(target: str, name: str, asked: list[Question], rows: list[Difference]) -> dict[str, Any]:
    from dataclasses import asdict

    from quadriga import __version__
    from quadriga.bench.invariance import label

    return {
        "quadriga": __version__,
        "target": target,
        "model": name,
        "requests": len(asked),
        "max_tokens": asked[0].max_tokens,
        "rounds": [{"round": label(row.crowd), **asdict(row)} for row in rows],
        "differs": any(row.found for row in rows),
    }
