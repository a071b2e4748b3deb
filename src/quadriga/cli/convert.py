"""``quadriga convert``: any checkpoint to any other form, streaming and resumable."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from quadriga.cli import options

if TYPE_CHECKING:
    from quadriga.io.dry_run import DryRun
    from quadriga.quant.dtypes import Array

_CALIBRATION_TOKENS = 2048


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
            help="Pack with the best mix of formats that fits, e.g. 20GB; needs --calibrate.", rich_help_panel="Result"
        ),
    ] = None,
    calibrate: options.Calibrate = None,
    calibrate_tokens: options.CalibrateTokens = _CALIBRATION_TOKENS,
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
    recipe_to_come = {} if budget is None else {"format": {"budget": budget}}
    convert_options.check(how | {"embeddings": embeddings} | recipe_to_come, as_flag)
    limit = None if budget is None else options.size(budget, "--budget")
    if out is None and not dry_run:
        raise ConfigError("give the path of the result, or --dry-run")
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
    importance = None
    if calibrate is not None:
        recipe, importance = _calibrate(path, calibrate, calibrate_tokens, limit, pickles)
        wanted = recipe or format
    with progress_bar("converting") as show:
        plan = convert.convert(
            path,
            out,
            to=to,
            layout=layout,
            dtype=dtype,
            gguf_format=gguf_format,
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


def _calibrate(
    model: Path, text: Path, n_tokens: int, budget: int | None, pickles: bool
) -> tuple[dict[str, str], dict[str, Array]]:
    """The recipe for a budget (empty without one) and the weights of errors, from a text."""
    from quadriga.cli.calibration import measured
    from quadriga.errors import ConfigError
    from quadriga.io import imatrix
    from quadriga.io.directory import packed_shapes
    from quadriga.io.open import open_checkpoint
    from quadriga.model.weight_map import stays_float32
    from quadriga.quant.format_choice import choose

    checkpoint = open_checkpoint(model, pickles=pickles)
    try:
        if text.is_file() and imatrix.is_imatrix(text):
            if budget is not None or n_tokens != _CALIBRATION_TOKENS:
                raise ConfigError(
                    f"{text.name} is an importance matrix, which weighs columns and no more: --budget measures on a "
                    "text what every format loses, and --calibrate-tokens says how much of a text is read. Leave them "
                    "out, or give --calibrate a text"
                )
            return {}, dict(imatrix.read_imatrix(text, checkpoint.config))
        found = measured(checkpoint, text, n_tokens, errors=budget is not None)
        if budget is None:
            return {}, found.importance
        fixed = {
            name: 4 * shape[0] if len(shape) == 1 else 64 * shape[1] * -(-shape[0] // 16)
            for name, shape in packed_shapes(checkpoint.config).items()
            if len(shape) == 1 or stays_float32(name)
        }
        recipe = choose(found.candidates, budget - sum(fixed.values()))
        count: dict[str, int] = {}
        for form in recipe.values():
            count[form] = count.get(form, 0) + 1
        print(", ".join(f"{n} matrices {form}" for form, n in sorted(count.items())), file=sys.stderr)
        return {**recipe, **{n: "float32" for n in fixed if stays_float32(n)}}, found.importance
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
