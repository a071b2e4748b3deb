"""``quadriga convert``: any checkpoint to any other form, streaming and resumable."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from quadriga.cli import options
from quadriga.cli.calibration import CALIBRATION_TOKENS

if TYPE_CHECKING:
    from quadriga.io.dry_run import DryRun
    from quadriga.quant.feedback import Importance


def convert_command(
    model: options.ModelArgument,
    out: options.OutOrNone = None,
    to: options.To = "quadriga",
    layout: options.Layout = None,
    dtype: options.Dtype = None,
    format: options.Format = None,
    gguf_format: options.GGUFFormat = None,
    embeddings: Annotated[
        str | None,
        typer.Option(
            help="With --format: another format for embeddings and head. Default: q8 beside 4 bits.",
            rich_help_panel="Result",
        ),
    ] = None,
    budget: Annotated[
        str | None,
        typer.Option(
            help="Pack (or with --to gguf store) with the best mix of formats that fits, e.g. 20GB; needs --calibrate.",
            rich_help_panel="Result",
        ),
    ] = None,
    calibrate: options.Calibrate = None,
    calibrate_tokens: options.CalibrateTokens = CALIBRATION_TOKENS,
    pickles: Annotated[
        bool,
        typer.Option("--pickles", help="Read pytorch_model*.bin where there are no safetensors; runs nothing."),
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would happen; weights may be missing.")] = False,
    restart: options.Restart = False,
) -> None:
    """Convert a checkpoint. One part is in memory at a time; run the same command again after an interruption.

    Numbers stay as they are stored without --dtype, --format and --gguf-format. Errors of 4 and 8 bits are weighed by
    what the weights meet in the text of --calibrate.
    """
    from quadriga import runtime
    from quadriga.cli.progress import progress_bar
    from quadriga.errors import ConfigError
    from quadriga.hub import catalogue
    from quadriga.io import convert, convert_options
    from quadriga.option_rules import as_flag

    how = {"to": to, "layout": layout, "dtype": dtype, "gguf_format": gguf_format, "format": format}
    # A budget chooses the formats of the matrices; of embeddings and head too.
    recipe_to_come = {} if budget is None else {"gguf_format" if to == "gguf" else "format": {"budget": budget}}
    convert_options.check(how | {"embeddings": embeddings} | recipe_to_come, as_flag)
    limit = None if budget is None else options.size(budget, "--budget")
    if out is None and not dry_run:
        raise ConfigError("give the path of the result, or --dry-run")
    if dry_run:
        path = catalogue.described(model)
    else:
        with progress_bar("fetching") as show:
            path = catalogue.resolve(model, progress=show)

    if pickles:
        print(
            "warning: .bin files are pickles. Tensors are read from them and nothing is run, but other programs run "
            "what they say: keep the result, not the source.",
            file=sys.stderr,
        )
    if dry_run:
        from quadriga.io.dry_run import dry_run as map_names

        _print_dry_run(map_names(path, pickles=pickles))
        return
    assert out is not None, "checked above"
    started = time.perf_counter()
    runtime.keep_freed_memory()  # matrices come and go
    wanted: str | dict[str, str] | None = format
    stored: str | dict[str, str] | None = gguf_format
    importance = None
    if calibrate is not None:
        recipe, importance = _calibrated(path, calibrate, calibrate_tokens, limit, to, pickles)
        if to == "gguf":
            stored = recipe or gguf_format
        else:
            wanted = recipe or format
    with progress_bar("converting") as show:
        plan = convert.convert(
            path,
            out,
            to=to,
            layout=layout,
            dtype=dtype,
            gguf_format=stored,
            format=wanted,
            embeddings=embeddings,
            importance=importance,
            resume=not restart,
            pickles=pickles,
            progress=show,
        )
    for note in plan.notes:
        print(f"note: {note}", file=sys.stderr)
    nbytes, elapsed = sum(plan.files.sizes.values()), time.perf_counter() - started
    print(
        f"{out}: {len(plan.tensors)} tensors in {len(plan.files.sizes)} files, {nbytes / 1e9:.2f} GB, layout "
        f"{plan.layout}, {elapsed:.1f} s ({nbytes / 1e6 / elapsed:.0f} MB/s)"
    )


def _calibrated(
    model: Path, text: Path, n_tokens: int, budget: int | None, to: str, pickles: bool
) -> tuple[dict[str, str], Mapping[str, Importance]]:
    from quadriga.cli.calibration import for_conversion
    from quadriga.io.open import open_checkpoint

    checkpoint = open_checkpoint(model, pickles=pickles)
    try:
        return for_conversion(checkpoint, text, n_tokens, budget, to)
    finally:
        checkpoint.close()


def _print_dry_run(report: DryRun) -> None:
    print(f"layout {report.layout}: {report.n_tensors} stored tensors fill {report.n_parameters} parameters")
    print(f"{report.n_numbers:,} numbers: {2 * report.n_numbers / 1e9:.1f} GB in 16 bits")
    print(f"{report.files_present} of {report.n_files} weight files are here")
    for parameter, sources in report.source_of.items():
        if parameter.startswith("layers.") and not parameter.startswith("layers.0."):
            continue
        shown = sources[0] if len(sources) == 1 else f"{sources[0]} ... {sources[-1]} ({len(sources)} tensors)"
        print(f"  {parameter} <- {shown}")
    print("Layers above 0 follow the same pattern. Every tensor is used once, every parameter filled once.")
