"""``quadriga eval``: benchmarks over a model in this process or behind an address."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from quadriga.cli import options

if TYPE_CHECKING:
    from quadriga.evaluate.harness import TaskResult
    from quadriga.evaluate.model import LanguageModel

_TASKS = "Tasks"
_MACHINE = "Model and machine"
_REMOTE = "A model behind an address"


def eval_command(
    tasks: Annotated[
        str | None,
        typer.Option(
            "--tasks",
            "-t",
            help="Names or groups with commas between, or paths of .jsonl files. Without it: what there is.",
            rich_help_panel=_TASKS,
        ),
    ] = None,
    model: Annotated[
        str,
        typer.Option(
            "--model",
            "-m",
            help="Catalogue name, hf:ORG/REPO, a path, or the http(s) address of an interface.",
            rich_help_panel=_MACHINE,
        ),
    ] = "smollm2-135m-instruct",
    limit: Annotated[
        int | None, typer.Option(help="The first items of each task only.", rich_help_panel=_TASKS)
    ] = None,
    shots: Annotated[
        int | None, typer.Option(help="Examples before each question, instead of the task's.", rich_help_panel=_TASKS)
    ] = None,
    samples: Annotated[int, typer.Option(help="Programs for each coding question.", rich_help_panel=_TASKS)] = 1,
    k: Annotated[
        list[int] | None, typer.Option("--k", help="k of pass@k; may be repeated.", rich_help_panel=_TASKS)
    ] = None,
    temperature: Annotated[
        float | None,
        typer.Option(help="Of coding tasks; default 0, or 0.8 for several samples.", rich_help_panel=_TASKS),
    ] = None,
    seed: Annotated[int, typer.Option(help="Of sampled programs.", rich_help_panel=_TASKS)] = 0,
    chat: Annotated[
        bool,
        typer.Option("--chat", help="Ask as a user's message, in the model's chat template.", rich_help_panel=_TASKS),
    ] = False,
    data_dir: Annotated[
        Path | None,
        typer.Option(help="Folder of benchmark files; default: QUADRIGA_DATA/bench.", rich_help_panel=_TASKS),
    ] = None,
    unsafe_exec: Annotated[
        bool,
        typer.Option(
            "--unsafe-exec",
            help="Run models' programs without a sandbox, where this machine has none.",
            rich_help_panel=_TASKS,
        ),
    ] = False,
    out: Annotated[
        Path | None, typer.Option(help="Folder of results; the same one goes on. Default: eval/MODEL.")
    ] = None,
    restart: Annotated[bool, typer.Option("--restart", help="Forget these tasks' earlier results in --out.")] = False,
    picture: Annotated[Path | None, typer.Option(help="Draw bars and a radar into this .svg or .png.")] = None,
    json: options.Json = False,
    api: Annotated[
        str, typer.Option(help="openai or anthropic; auto looks at the address.", rich_help_panel=_REMOTE)
    ] = "auto",
    api_model: Annotated[
        str | None, typer.Option(help="What the interface calls the model.", rich_help_panel=_REMOTE)
    ] = None,
    api_key: Annotated[str | None, typer.Option(help="Also QUADRIGA_API_KEY.", rich_help_panel=_REMOTE)] = None,
    parallel: Annotated[int, typer.Option(help="Requests at once.", rich_help_panel=_REMOTE)] = 8,
    format: Annotated[
        str,
        typer.Option(
            help="As elsewhere; auto: float32 where that takes at most a third of the free memory, else keep.",
            rich_help_panel=_MACHINE,
        ),
    ] = "auto",
    activations: options.Activations = "auto",
    kv_format: Annotated[
        str,
        typer.Option("--kv-format", help="As elsewhere; auto goes with --format.", rich_help_panel=_MACHINE),
    ] = "auto",
    expert_memory: options.ExpertMemory = None,
    dtype: options.Dtype = None,
    device: options.Device = "cpu",
    threads: options.Threads = None,
) -> None:
    """Run benchmarks. Kill it and give the same command: it goes on where it stopped."""
    from quadriga import __version__
    from quadriga.evaluate import report
    from quadriga.evaluate.data import Data
    from quadriga.evaluate.harness import Options, run_task
    from quadriga.evaluate.sandbox import Sandbox
    from quadriga.evaluate.tasks import select

    if tasks is None:
        list_tasks()
        return
    chosen = select([name.strip() for name in tasks.split(",") if name.strip()])
    how = Options(limit=limit, shots=shots, samples=samples, ks=tuple(k or (1,)), temperature=temperature, seed=seed)
    sandbox = Sandbox.find(unsafe=unsafe_exec) if any(task.kind == "code" for task in chosen) else None
    if picture is not None:
        report.pyplot()  # missing, it is missed now and not after hours
    language_model: LanguageModel
    results: list[TaskResult]
    if model.startswith(("http://", "https://")):
        from quadriga.evaluate.endpoints import connect

        language_model = connect(model, api=api, model=api_model, key=api_key, chat=chat, parallel=parallel)
    else:
        language_model = _local(model, chat, dtype, device, threads, format, activations, kv_format, expert_memory)
    folder = out or Path("eval") / language_model.name
    if restart:
        for task in chosen:
            (folder / "items" / f"{task.name}.jsonl").unlink(missing_ok=True)
    data, results = Data(data_dir), []
    from quadriga.cli.progress import progress_count

    for task in chosen:
        with progress_count(task.title) as show:
            results.append(run_task(task, language_model, data, folder, how, runner=sandbox, progress=show))
        report.write(folder, language_model, results, __version__)
    if json:
        print(options.as_json(report.as_json(language_model, results, __version__)))
    else:
        print_table(report.table(results))
        print(f"results in {folder}", file=sys.stderr)
    if picture is not None:
        report.picture(picture, language_model.name, results)


def _local(
    model: str,
    chat: bool,
    dtype: str | None,
    device: str,
    threads: int | None,
    format: str,
    activations: str,
    kv_format: str,
    expert_memory: str | None,
) -> LanguageModel:
    from quadriga.engine.text_model import TextModel
    from quadriga.kernels import dispatch

    plain = dtype is not None or device != "cpu" or not dispatch.compiled() or expert_memory is not None
    format, kv_format = _formats(model, format, kv_format, plain=plain)
    llm = options.load_model(
        model,
        dtype,
        device,
        threads,
        format=format,
        activations=activations,
        kv_format=kv_format,
        expert_memory=expert_memory,
    )
    loaded = {"format": format, "activations": activations, "kv_format": kv_format, "dtype": dtype or "kernels"}
    return TextModel(llm, chat=chat, options=loaded)


def _formats(model: str, format: str, kv_format: str, *, plain: bool) -> tuple[str, str]:
    """What auto stands for. Scoring is arithmetic, not reading: float32 was three times as quick as Q4_1 with 16-bit
    activations on an AVX2 machine, and its numbers are those that other programs give for the same weights."""
    from quadriga import runtime
    from quadriga.cli.progress import progress_bar
    from quadriga.hub import catalogue
    from quadriga.io.open import open_checkpoint
    from quadriga.model import cost

    if format == "auto":
        with progress_bar(f"loading {Path(model).name}") as show:
            config = open_checkpoint(catalogue.resolve(model, progress=show)).config
        small = 3 * cost.weight_bytes(config, "f32") <= runtime.memory_bytes()[1]
        format = "float32" if small and not plain else "keep"
    if kv_format == "auto":
        kv_format = "float32" if format == "float32" else "bfloat16"
    return format, kv_format


def list_tasks() -> None:
    """Print every task with its protocol."""
    from quadriga.evaluate.tasks import GROUPS, TASKS
    from quadriga.evaluate.tasks.gauntlet import MISSING

    rows: list[tuple[str, ...]] = [("task", "shots", "figure", "protocol")]
    rows += [(t.name, str(t.shots), t.main, t.protocol) for t in TASKS.values()]
    rows += [(name, "", "", f"the tasks {', '.join(tasks)}") for name, tasks in GROUPS.items()]
    print_table(rows)
    print(f"The Gauntlet's tasks without data here: {', '.join(MISSING)}.")


def print_table(rows: list[tuple[str, ...]]) -> None:
    """A table on standard output: drawn on a terminal, tab-separated elsewhere."""
    if not sys.stdout.isatty():
        for row in rows:
            print("\t".join(row))
        return
    from rich.console import Console
    from rich.table import Table

    table = Table(*rows[0], box=None, header_style="bold")
    for row in rows[1:]:
        table.add_row(*row)
    Console().print(table)
