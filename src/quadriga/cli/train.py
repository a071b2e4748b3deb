"""``quadriga train``: pre-train a model from one TOML file, resumable at any moment."""

from __future__ import annotations

import enum
import itertools
import sys
from pathlib import Path
from typing import Annotated

import typer

from quadriga.cli import options


class Resume(enum.StrEnum):
    """What becomes of a run that has begun."""

    AUTO = "auto"
    NEVER = "never"
    MUST = "must"


def train_command(
    config: Annotated[Path, typer.Argument(help="The run's TOML file; recipes/ has some.")],
    resume: Annotated[
        Resume, typer.Option(help="auto: go on if the run has a checkpoint. never: it must be new. must: it has one.")
    ] = Resume.AUTO,
    threads: options.Threads = None,
    run: options.Run = None,
    stop_after: Annotated[
        int | None, typer.Option(min=1, help="Save and stop after this many steps; the same command goes on.")
    ] = None,
    check: Annotated[bool, typer.Option("--check", help="Read the file, say what would run, and stop.")] = False,
    export: Annotated[
        Path | None, typer.Option(help="Write the run's newest checkpoint as a Hugging Face directory instead.")
    ] = None,
    step: Annotated[
        int | None,
        typer.Option(min=0, help="With --export or --branch: which checkpoint; default: the newest."),
    ] = None,
    branch: Annotated[
        Path | None,
        typer.Option(help="Begin at a checkpoint of the run in this folder, e.g. to decay where that one goes on."),
    ] = None,
    dtype: options.Dtype = None,
    allow_change: options.AllowChange = False,
) -> None:
    """Pre-train a model. SIGTERM or Ctrl-C saves and stops; the same command goes on.

    Under torchrun every process runs this command: FSDP2 over all of them, expert parallelism as the file says. With
    --export nothing is trained: a checkpoint is written in float32, or as --dtype says.
    """
    from quadriga.errors import ConfigError
    from quadriga.train.config import RunConfig, read_toml

    if dtype not in (None, "float32", "bfloat16"):
        raise ConfigError(f"--dtype must be float32, which is the default, or bfloat16; got {dtype!r}")
    settings = read_toml(config, RunConfig)
    if run is not None:
        import msgspec

        settings = msgspec.structs.replace(settings, run=run)
    if check:
        _print_plan(settings)
        return
    if export is not None:
        _export(settings, export, step, dtype or "float32")
        return
    from quadriga import runtime
    from quadriga.nn import devices
    from quadriga.train.branch import Branch
    from quadriga.train.run import train

    devices.set_threads(threads)
    left = itertools.count(1)
    stop = None if stop_after is None else lambda: next(left) >= stop_after
    begins = None if branch is None else Branch(of=branch, step=step)
    outcome = train(settings, resume=resume.value, stop=stop, allow_change=allow_change, branch=begins)
    if runtime.launched_rank() in (None, 0):
        what = "done" if outcome.done else "stopped and saved; the same command goes on"
        print(f"{outcome.folder}: step {outcome.step} of {settings.n_steps}, {what}", file=sys.stderr)


def _export(settings: object, out: Path, step: int | None, dtype: str) -> None:
    from quadriga.train.config import RunConfig
    from quadriga.train.export import export
    from quadriga.train.loader import open_corpora

    assert isinstance(settings, RunConfig)
    corpus = open_corpora(settings.data)[0]
    names = [file.path for file in corpus.manifest.tokenizer.files]
    files = {name: (corpus.path / name).read_bytes() for name in names}
    made = export(Path(settings.run).expanduser(), out, step=step, dtype=dtype, tokenizer_files=files)
    print(f"{out}: step {made} as {dtype} safetensors")


def _print_plan(settings: object) -> None:
    from quadriga.model.cost import n_params
    from quadriga.train.architecture import model_config, require_stored_bias
    from quadriga.train.config import RunConfig
    from quadriga.train.schedule import unreached

    assert isinstance(settings, RunConfig)
    print(f"run {settings.run}: {settings.n_steps:,} steps, {settings.data.n_tokens:,} tokens")
    if (warning := unreached(settings.n_steps, settings.schedule)) is not None:
        print(f"  warning: {warning}")
    for number, stage in enumerate(settings.data.stages):
        mix = ", ".join(f"{name} {weight:g}" for name, weight in stage.mix.items()) or "all by size"
        print(f"  stage {number}: {stage.n_steps:,} steps of {stage.n_rows} rows of {stage.seq_len} ({mix})")
    if settings.model.preset is not None:
        from quadriga.train.loader import open_corpora

        vocabulary = open_corpora(settings.data)[0].manifest.tokenizer
        found = model_config(settings.model, vocabulary.n_vocab, (vocabulary.end_id,))
        require_stored_bias(found, settings.router)
        count = n_params(found)
        print(f"  model: {count.total:,} parameters, {count.active:,} active, vocabulary {found.vocab_size}")
