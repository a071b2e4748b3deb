"""``quadriga convert``: any checkpoint to any other form, streaming and resumable."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from quadriga.quant.dtypes import Array


def convert_command(
    source: Annotated[str, typer.Argument(help="A catalogue name, hf:ORG/REPO, a directory or a GGUF file.")],
    out: Annotated[Path | None, typer.Argument(help="What to make; must not exist yet.")] = None,
    to: Annotated[str, typer.Option(help="quadriga, hf (safetensors) or gguf.")] = "quadriga",
    layout: Annotated[str | None, typer.Option(help="With --to hf: one of the family's layouts.")] = None,
    dtype: Annotated[str, typer.Option(help="keep, float32, bfloat16 or float16.")] = "keep",
    format: Annotated[
        str | None,
        typer.Option(
            help="Pack for the CPU's kernels: keep, bfloat16, q8, q4, q4m (4 bits with a minimum) or float32."
        ),
    ] = None,
    gguf_format: Annotated[
        str, typer.Option(help="With --to gguf: float32, float16, bfloat16, q8_0 or q4_0.")
    ] = "bfloat16",
    embeddings: Annotated[
        str | None,
        typer.Option(help="With --format: another format for embeddings and head. Default: q8 beside 4 bits."),
    ] = None,
    budget: Annotated[
        str | None,
        typer.Option(help="Pack with the best mix of formats that fits, e.g. 20GB; needs --calibrate."),
    ] = None,
    calibrate: Annotated[
        Path | None, typer.Option(help="A text like those to come: weighs errors by what the weights meet in it.")
    ] = None,
    calibrate_tokens: Annotated[int, typer.Option(help="How much of it is read.")] = 2048,
    pickles: Annotated[
        bool,
        typer.Option("--pickles", help="Read pytorch_model*.bin where there are no safetensors; runs nothing."),
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would happen; weights may be missing.")] = False,
    no_resume: Annotated[bool, typer.Option("--no-resume", help="Start over instead of going on.")] = False,
) -> None:
    """Convert a checkpoint. One part is in memory at a time; run the same command again after an interruption."""
    from quadriga import runtime
    from quadriga.cli.progress import progress_bar
    from quadriga.errors import ConfigError
    from quadriga.hub import catalogue

    with progress_bar("fetching") as show:
        path = catalogue.resolve(source, progress=show)
    from quadriga.io import convert

    if pickles:
        print(
            "warning: .bin files are pickles. Tensors are read from them and nothing is run, but other programs run "
            "what they say: keep the result, not the source.",
            file=sys.stderr,
        )
    if dry_run:
        _print_dry_run(convert.dry_run(path))
        return
    if out is None:
        raise ConfigError("give the path of the result, or --dry-run")
    started = time.perf_counter()
    runtime.keep_freed_memory()  # matrices come and go
    wanted: str | dict[str, str] | None = format
    importance = None
    if budget is not None and (calibrate is None or format is not None):
        raise ConfigError("--budget chooses the formats itself and needs --calibrate FILE, a text like those to come")
    if calibrate is not None:
        if budget is None and format is None:
            raise ConfigError("--calibrate goes with --format or --budget")
        recipe, importance = _calibrate(path, calibrate, calibrate_tokens, budget, pickles)
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
            resume=not no_resume,
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
    model: Path, text: Path, n_tokens: int, budget: str | None, pickles: bool
) -> tuple[dict[str, str], dict[str, Array]]:
    """The recipe for a budget (empty without one) and the weights of errors, from a text."""
    from quadriga.cli.options import size
    from quadriga.cli.progress import progress_bar
    from quadriga.edits.calibrate import calibrate
    from quadriga.errors import ConfigError
    from quadriga.hub import catalogue
    from quadriga.io.directory import packed_shapes
    from quadriga.io.open import open_checkpoint
    from quadriga.model.weight_map import stays_float32
    from quadriga.quant.recipe import choose

    checkpoint = open_checkpoint(model, pickles=pickles)
    try:
        tokenizer = checkpoint.load_tokenizer(catalogue.cl100k_ranks)
        if tokenizer is None:
            raise ConfigError("calibration reads a text, and this checkpoint has no tokenizer")
        try:
            ids = tokenizer.encode(text.read_text())[:n_tokens]
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"cannot read the text {text}: {error}") from None
        with progress_bar("calibrating") as show:
            found = calibrate(checkpoint, ids, errors=budget is not None, progress=show)
        if budget is None:
            return {}, found.importance
        fixed = {
            name: 4 * shape[0] if len(shape) == 1 else 64 * shape[1] * -(-shape[0] // 16)
            for name, shape in packed_shapes(checkpoint.config).items()
            if len(shape) == 1 or stays_float32(name)
        }
        recipe = choose(found.candidates, size(budget) - sum(fixed.values()))
        count: dict[str, int] = {}
        for form in recipe.values():
            count[form] = count.get(form, 0) + 1
        print(", ".join(f"{n} matrices {form}" for form, n in sorted(count.items())), file=sys.stderr)
        return {**recipe, **{n: "float32" for n in fixed if stays_float32(n)}}, found.importance
    finally:
        checkpoint.close()


def _print_dry_run(report: object) -> None:
    from quadriga.io.convert import DryRun

    assert isinstance(report, DryRun)
    print(f"layout {report.layout}: {report.n_tensors} stored tensors fill {report.n_parameters} parameters")
    print(f"{report.n_numbers:,} numbers: {2 * report.n_numbers / 1e9:.1f} GB in 16 bits")
    print(f"{report.files_present} of {report.n_files} weight files are here")
    for parameter, sources in report.source_of.items():
        if parameter.startswith("layers.") and not parameter.startswith("layers.0."):
            continue
        shown = sources[0] if len(sources) == 1 else f"{sources[0]} ... {sources[-1]} ({len(sources)} tensors)"
        print(f"  {parameter} <- {shown}")
    print("Layers above 0 follow the same pattern. Every tensor is used once, every parameter filled once.")
