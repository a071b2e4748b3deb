"""``quadriga tune``: fine-tune a model from one TOML file; ``quadriga adapter``: what becomes of its result."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from quadriga.io.adapter import Adapter
    from quadriga.io.open import Checkpoint

adapter_app = typer.Typer(
    no_args_is_help=True, help="Low-rank adapters: fold into a model, and to and from peft's files."
)

_Base = Annotated[str, typer.Argument(help="The model it was trained on: a catalogue name, hf:ORG/REPO or a path.")]
_Adapter = Annotated[Path, typer.Argument(help="The adapter's folder, ours or peft's.")]
_Out = Annotated[Path, typer.Argument(help="What to make; must not exist yet.")]


def tune_command(
    config: Annotated[Path, typer.Argument(help="The run's TOML file; recipes/tune/ has some.")],
    threads: Annotated[int | None, typer.Option(help="CPU threads; default: all.")] = None,
    run: Annotated[str | None, typer.Option(help="Another folder than the file's.")] = None,
    steps: Annotated[int | None, typer.Option(help="Other optimiser steps than the file's, e.g. to try it.")] = None,
) -> None:
    """Fine-tune a model: whole or by an adapter, on answers, text, preferences or rewards. The same command resumes."""
    import signal

    import msgspec

    from quadriga import runtime
    from quadriga.train.config import read_toml
    from quadriga.train.tune_config import TuneConfig

    settings = read_toml(config, TuneConfig)
    if run is not None:
        settings = msgspec.structs.replace(settings, run=run)
    if steps is not None:
        settings = msgspec.structs.replace(settings, schedule=msgspec.structs.replace(settings.schedule, steps=steps))
    from quadriga.train.tune import tune

    runtime.set_threads(threads)
    asked: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, _: asked.append(number))
    try:
        outcome = tune(settings, stop=lambda: bool(asked))
    finally:
        signal.signal(signal.SIGTERM, before)
    if outcome.rejected:
        print(f"note: {outcome.rejected}", file=sys.stderr)
    if outcome.result is None:
        print(f"stopped and saved at step {outcome.step} of {outcome.n_steps}; the same command goes on")
    else:
        print(outcome.result)


@adapter_app.command("merge")
def merge_command(
    base: _Base,
    adapter: _Adapter,
    out: _Out,
    to: Annotated[str, typer.Option(help="quadriga, hf (safetensors) or gguf.")] = "quadriga",
    dtype: Annotated[str, typer.Option(help="keep, float32, bfloat16 or float16.")] = "keep",
    format: Annotated[
        str | None, typer.Option(help="Pack for the CPU's kernels: bfloat16, q8, q4, q4m or float32.")
    ] = None,
    gguf_format: Annotated[
        str, typer.Option(help="With --to gguf: float32, float16, bfloat16, q8_0 or q4_0.")
    ] = "bfloat16",
) -> None:
    """Fold an adapter into its model and write the result in any form."""
    from quadriga.cli.upcycle import write_derived
    from quadriga.io.adapter import merge

    checkpoint, loaded = _open(base, adapter)
    try:
        write_derived(merge(checkpoint, loaded), out, to=to, dtype=dtype, format=format, gguf_format=gguf_format)
    finally:
        checkpoint.close()


@adapter_app.command("export")
def export_command(
    base: _Base,
    adapter: _Adapter,
    out: _Out,
    layout: Annotated[
        str | None, typer.Option(help="Which of the family's Hugging Face layouts; hf5: fused expert stacks.")
    ] = None,
) -> None:
    """Write an adapter in peft's layout."""
    from quadriga.io.adapter import to_peft

    checkpoint, loaded = _open(base, adapter)
    checkpoint.close()
    to_peft(loaded, checkpoint.config, out, layout=layout)
    print(out)


@adapter_app.command("import")
def import_command(base: _Base, adapter: _Adapter, out: _Out) -> None:
    """Write peft's adapter in our layout."""
    from quadriga.io.adapter import save

    checkpoint, loaded = _open(base, adapter)
    checkpoint.close()
    save(loaded, out)
    print(out)


def _open(base: str, adapter: Path) -> tuple[Checkpoint, Adapter]:
    from quadriga.cli.upcycle import open_source
    from quadriga.io.adapter import load

    checkpoint = open_source(base)
    try:
        return checkpoint, load(adapter, checkpoint.config)
    except BaseException:
        checkpoint.close()
        raise
