"""``quadriga claims``: what the launch claimed, what came here, and the commands that try it again."""

from __future__ import annotations

import signal
import sys
from pathlib import Path
from typing import Annotated

import typer

from quadriga.cli import options
from quadriga.cli.command import Commands

claims_app = Commands(help="The launch's claims: list them with their last results, run one, write the page.")

_RUNS = Path("runs/claims")


@claims_app.callback(invoke_without_command=True)
def claims_command(context: typer.Context) -> None:
    """List each claim, its command, its last result with the spread, and whether it was reproduced."""
    if context.invoked_subcommand is None:
        list_command()


@claims_app.command("list")
def list_command(runs: options.ClaimRuns = _RUNS, json: options.Json = False) -> None:
    """List each claim, its command, its last result with the spread, and whether it was reproduced."""
    from quadriga.bench.claims import results
    from quadriga.cli.eval import print_table

    head, *body = results.rows(runs)
    if json:
        print(options.as_json({"claims": [dict(zip(head, row, strict=True)) for row in body]}))
    else:
        print_table([head, *body])


@claims_app.command("run")
def run_command(
    claim: options.ClaimArgument,
    runs: options.ClaimRuns = _RUNS,
    recipes: Annotated[Path, typer.Option(help="The folder of this project's recipes.")] = Path("recipes"),
    seeds: Annotated[int, typer.Option(min=1, max=100, help="Training runs of each kind.")] = 3,
    share: Annotated[
        float, typer.Option(min=0.001, max=10.0, help="Of the recipes' tokens; below 1 it is a short try.")
    ] = 1.0,
    threads: options.Threads = None,
    weights: Annotated[str, typer.Option(help="The model that claims about quality are tried with.")] = "dbrx-instruct",
    judge: options.Judge = None,
    judge_model: options.JudgeModel = None,
    precision: Annotated[str, typer.Option(help="Of training: bfloat16 or float32.")] = "bfloat16",
    json: options.Json = False,
) -> None:
    """Run a claim's commands, or those that are left of them, and record the result.

    Ctrl-C and SIGTERM stop the command under way, which saves first; the same command goes on.
    """
    from quadriga.bench.claims import registry, results

    one = registry.claim(claim)
    scale = registry.Scale(
        seeds=seeds,
        share=share,
        threads=threads,
        model=weights,
        dtype=precision,
        judge=judge,
        judge_model=judge_model,
    )
    # Both: in a shell's background SIGINT is ignored from the start.
    before = {n: signal.signal(n, signal.default_int_handler) for n in (signal.SIGTERM, signal.SIGINT)}
    try:
        found = results.run(one, scale, runs, recipes, lambda text: print(text, file=sys.stderr, flush=True))
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    said = results.verdict(one, found)
    if json:
        print(options.as_json(vars(found) | {"verdict": said, "published": one.published}))
        return
    print(f"{one.says}: published {one.published}, here {results.shown(one, found)}: {said}")
    for part, value in found.parts.items():
        print(f"  {part}: {value:.4g}")
    if found.note:
        print(f"  {found.note}")


@claims_app.command("record")
def record_command(
    claim: options.ClaimArgument,
    files: Annotated[Path, typer.Argument(metavar="FILES", help="Folder of its files: a run's, or bench/results.")],
    into: Annotated[Path, typer.Option("--into", help="Folder that CLAIM.json is written to.")],
    machine: Annotated[str | None, typer.Option(help="Where it was measured; default: this machine.")] = None,
    load: Annotated[str, typer.Option(help="What else ran there.")] = "",
    scale: Annotated[str, typer.Option(help="How much was run.")] = "",
    commit: Annotated[str | None, typer.Option(help="Of the program that measured it; default: this one's.")] = None,
    date: Annotated[str | None, typer.Option(help="When it was measured, as 2026-11-29; default: today.")] = None,
) -> None:
    """Write the record of a claim from files that are there: for results that were measured elsewhere."""
    from quadriga.bench.claims import registry, results

    one = registry.claim(claim)
    own = machine or results.machine()
    measured = one.measure(files)
    found = results.record(one, measured, scale=scale, machine=own, load=load, of_commit=commit, date=date)
    into.mkdir(parents=True, exist_ok=True)
    (into / f"{claim}.json").write_text(results.as_text(found))
    print(f"{into / f'{claim}.json'}: {results.shown(one, found)}, {results.verdict(one, found)}")


@claims_app.command("page")
def page_command(
    write: Annotated[
        Path | None, typer.Option("--write", help="Into this file, with its pictures beside it, in images/.")
    ] = None,
) -> None:
    """The page of all claims (docs/claims.md), from the records that come with this package."""
    from quadriga.bench.claims.page import page
    from quadriga.bench.claims.picture import draw_all

    if write is None:
        print(page(), end="")
        return
    for picture in draw_all(write.parent):
        print(picture, file=sys.stderr)
    write.write_text(page())
