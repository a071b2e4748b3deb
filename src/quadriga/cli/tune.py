"""``quadriga tune``: fine-tune a model from one TOML file; ``quadriga adapter``: what becomes of its result."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from quadriga.cli import options
from quadriga.cli.command import Commands

if TYPE_CHECKING:
    from quadriga.io.adapter_files import Adapter
    from quadriga.io.open import Checkpoint

adapter_app = Commands(no_args_is_help=True, help="Low-rank adapters: fold into a model, and to and from peft's files.")


def tune_command(
    config: Annotated[Path, typer.Argument(help="The run's TOML file; recipes/tune/ has some.")],
    threads: options.Threads = None,
    run: options.Run = None,
    steps: Annotated[
        int | None, typer.Option(min=1, help="Other optimiser steps than the file's, e.g. to try it.")
    ] = None,
    allow_change: options.AllowChange = False,
) -> None:
    """Fine-tune a model: whole or by an adapter, on answers, text, preferences or rewards. The same command resumes.

    Under torchrun every process runs this command: FSDP2 over all of them, expert parallelism as [parallel] says.
    """
    import signal

    import msgspec

    from quadriga import runtime
    from quadriga.cli.tune_services import services
    from quadriga.nn import devices
    from quadriga.train.config import read_toml
    from quadriga.train.tune_config import TuneConfig

    settings = read_toml(config, TuneConfig)
    if run is not None:
        settings = msgspec.structs.replace(settings, run=run)
    if steps is not None:
        schedule = msgspec.structs.replace(settings.schedule, steps=steps)
        data = msgspec.structs.replace(settings.data, epochs=None)
        settings = msgspec.structs.replace(settings, schedule=schedule, data=data)
    from quadriga.train.tune import tune

    devices.set_threads(threads)
    asked: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, _: asked.append(number))
    try:
        outcome = tune(settings, stop=lambda: bool(asked), allow_change=allow_change, services=services(threads))
    finally:
        signal.signal(signal.SIGTERM, before)
    if runtime.follows():
        return
    if outcome.rejected:
        print(f"note: {outcome.rejected}", file=sys.stderr)
    if outcome.result is None:
        print(f"stopped and saved at step {outcome.step} of {outcome.n_steps}; the same command goes on")
    else:
        print(outcome.result)


@adapter_app.command("merge")
def merge_command(
    model: options.ModelArgument,
    adapter: options.AdapterFolder,
    out: options.Out,
    to: options.ToOrNone = None,
    dtype: options.Dtype = None,
    format: options.Format = None,
    gguf_format: options.GGUFFormat = None,
) -> None:
    """Fold an adapter into the model it was trained on and write the result in any form.

    Without --to: safetensors that transformers opens; with --format, Quadriga's own.
    """
    from quadriga.cli.upcycle import result_options, write_derived
    from quadriga.io.adapter import merge

    to = to or ("hf" if format is None else "quadriga")
    how = result_options(to=to, dtype=dtype, format=format, gguf_format=gguf_format)

    checkpoint, loaded = _open(model, adapter)
    try:
        write_derived(merge(checkpoint, loaded), out, **how)
    finally:
        checkpoint.close()


@adapter_app.command("export")
def export_command(
    model: options.ModelArgument,
    adapter: options.AdapterFolder,
    out: options.Out,
    layout: options.Layout = None,
) -> None:
    """Write an adapter in peft's form, for one of its model's layouts: hf5 has fused expert stacks."""
    from quadriga.io.peft_write import to_peft

    checkpoint, loaded = _open(model, adapter)
    checkpoint.close()
    to_peft(loaded, checkpoint.config, out, layout=layout)
    print(out)


@adapter_app.command("import")
def import_command(model: options.ModelArgument, adapter: options.AdapterFolder, out: options.Out) -> None:
    """Write peft's adapter in our layout."""
    from quadriga.io.adapter_files import save

    checkpoint, loaded = _open(model, adapter)
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
