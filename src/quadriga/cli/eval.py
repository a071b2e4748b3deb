"""``quadriga eval``: benchmarks over a model in this process or behind an address."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from quadriga.cli import options
from quadriga.cli.rules import is_address
from quadriga.option_rules import Rule

if TYPE_CHECKING:
    from quadriga.evaluate.data import Data
    from quadriga.evaluate.harness import Options, TaskResult
    from quadriga.evaluate.model import LanguageModel
    from quadriga.evaluate.sandbox import Sandbox
    from quadriga.evaluate.tasks.base import Task

_TASKS = "Tasks"
_REMOTE = "A model behind an address"

_ONLY_CODE = "it is about coding tasks, and there is none among {tasks}. Leave it out"
_CODING = (
    *(Rule(name, lambda o: o["code"], _ONLY_CODE) for name in ("samples", "k", "temperature", "seed", "unsafe_exec")),
    Rule(
        "seed",
        lambda o: o["code_temperature"] > 0,
        "at {temperature} 0 nothing is drawn. Give {temperature} above 0, or leave it out",
    ),
)


_JUDGED = (
    Rule("judge", lambda o: o["judged"], "no task among {tasks} is graded by a judge. Leave it out"),
    Rule("judge_model", lambda o: o["judge"] is not None, "it names a judge's model. Give {judge} ADDRESS too"),
)


def eval_command(
    model: options.ModelArgument = "smollm2-135m-instruct",
    tasks: Annotated[
        str | None,
        typer.Option(
            "--tasks",
            "-t",
            help="Names or groups with commas between, or paths of .jsonl and .toml files. Without it: what there is.",
            rich_help_panel=_TASKS,
        ),
    ] = None,
    limit: Annotated[
        int | None, typer.Option(min=1, help="The first items of each task only.", rich_help_panel=_TASKS)
    ] = None,
    shots: Annotated[
        int | None,
        typer.Option(
            min=0, max=1000, help="Examples before each question, instead of the task's.", rich_help_panel=_TASKS
        ),
    ] = None,
    samples: Annotated[
        int, typer.Option(min=1, max=10_000, help="Programs for each coding question.", rich_help_panel=_TASKS)
    ] = 1,
    k: Annotated[
        list[int] | None, typer.Option("--k", help="k of pass@k; may be repeated.", rich_help_panel=_TASKS)
    ] = None,
    temperature: options.Temperature = None,
    seed: options.Seed = None,
    chat: Annotated[
        bool,
        typer.Option("--chat", help="Ask as a user's message, in the model's chat template.", rich_help_panel=_TASKS),
    ] = False,
    data_dir: Annotated[
        Path | None,
        typer.Option(
            help="Folder of benchmark files; default: QUADRIGA_DATA/bench, fetched ones, samples.",
            rich_help_panel=_TASKS,
        ),
    ] = None,
    unsafe_exec: Annotated[
        bool,
        typer.Option(
            "--unsafe-exec",
            help="Run models' programs without a sandbox, where this machine has none.",
            rich_help_panel=_TASKS,
        ),
    ] = False,
    judge: options.Judge = None,
    judge_model: options.JudgeModel = None,
    out: options.OutFolder = None,
    restart: options.Restart = False,
    picture: options.Picture = None,
    json: options.Json = False,
    api: Annotated[
        str, typer.Option(help="openai or anthropic; auto looks at the address.", rich_help_panel=_REMOTE)
    ] = "auto",
    api_model: options.APIModel = None,
    api_key: options.APIKey = None,
    concurrency: options.Concurrency = 8,
    format: options.Format = None,
    activations: options.Activations = None,
    kv_format: options.KVFormat = None,
    kv_memory: options.KVMemory = None,
    expert_memory: options.ExpertMemory = None,
    dtype: options.Dtype = None,
    device: options.Device = "cpu",
    threads: options.Threads = None,
) -> None:
    """Run benchmarks. Kill it and give the same command: it goes on where it stopped.

    MODEL may be the http(s) address of an interface; QUADRIGA_API_KEY has its key too. Results are in eval/MODEL, or in
    --out. Weights are packed as float32 where that takes at most a third of the free memory, and the cache with them.
    Coding tasks are answered at temperature 0, or 0.8 for several samples.
    """
    from quadriga.evaluate.data import Data
    from quadriga.evaluate.harness import Options
    from quadriga.evaluate.sandbox import Sandbox

    options.require_picture(picture)
    if tasks is None:
        list_tasks()
        return
    chosen = _chosen(tasks)
    how = Options(
        limit=limit, shots=shots, samples=samples, ks=tuple(k or (1,)), temperature=temperature, seed=seed or 0
    )
    coding = {"k": k, "temperature": temperature, "seed": seed, "unsafe_exec": unsafe_exec}
    coding |= {"samples": None if samples == 1 else samples, "code_temperature": how.code_temperature}
    _require_used(chosen, coding, {"judge": judge, "judge_model": judge_model})
    sandbox = Sandbox.find(unsafe=unsafe_exec) if any(task.kind == "code" for task in chosen) else None
    data = Data(data_dir)
    _require_ready(chosen, data, shots, picture)
    if is_address(model):
        from quadriga.evaluate.endpoints import connect

        language_model: LanguageModel = connect(
            model, api=api, model=api_model, key=api_key, chat=chat, parallel=concurrency
        )
    else:
        language_model = _local(
            model,
            chat,
            format=format,
            activations=activations,
            kv_format=kv_format,
            kv_memory=kv_memory,
            expert_memory=expert_memory,
            dtype=dtype,
            device=device,
            threads=threads,
        )
    grader = None if judge is None else open_judge(judge, judge_model)
    folder = out or Path("eval") / language_model.name
    if restart:
        for task in chosen:
            (folder / "items" / f"{task.name}.jsonl").unlink(missing_ok=True)
    results = _results(chosen, language_model, data, folder, how, sandbox, grader)
    _show(language_model, results, folder, as_json=json, picture=picture)


def _chosen(tasks: str) -> list[Task]:
    """The tasks of a list with commas."""
    from quadriga.errors import EvaluationError
    from quadriga.evaluate.tasks import select

    chosen = select([name.strip() for name in tasks.split(",") if name.strip()])
    if not chosen:
        raise EvaluationError("--tasks must name at least one task; without it they are listed")
    return chosen


def _require_used(chosen: list[Task], coding: dict[str, Any], judging: dict[str, str | None]) -> None:
    """Refuse what these tasks would ignore, and a missing judge.

    Args:
        coding: options of coding tasks, and the temperature that their programs are written at.
        judging: options that name a judge.
    """
    from quadriga.errors import EvaluationError
    from quadriga.option_rules import as_flag, refuse_unused

    refuse_unused(_CODING, coding | {"code": any(task.kind == "code" for task in chosen)}, as_flag)
    judged = [task.name for task in chosen if task.judged]
    refuse_unused(_JUDGED, judging | {"judged": bool(judged)}, as_flag)
    if judged and judging["judge"] is None:
        raise EvaluationError(f"{judged[0]} is graded by a judge: give one with --judge (a model, or an API's address)")


def _require_ready(chosen: list[Task], data: Data, shots: int | None, picture: Path | None) -> None:
    """Miss now, and not after a model is loaded or hours have passed, what the tasks and their picture need."""
    from quadriga.evaluate import report
    from quadriga.evaluate.sandbox import package_folders

    for name in {name for task in chosen for name in task.packages}:
        package_folders(name)
    if picture is not None:
        report.pyplot()
    for task in chosen:
        if task.build_for is None:
            task.items(data, None, shots)


def _results(
    chosen: list[Task],
    model: LanguageModel,
    data: Data,
    folder: Path,
    how: Options,
    sandbox: Sandbox | None,
    grader: LanguageModel | None,
) -> list[TaskResult]:
    """Run the tasks one after the other; what is known so far is in the folder after each."""
    from quadriga import __version__
    from quadriga.cli.progress import progress_count
    from quadriga.evaluate import report
    from quadriga.evaluate.harness import run_task

    results: list[TaskResult] = []
    for task in chosen:
        with progress_count(task.title) as show:
            results.append(run_task(task, model, data, folder, how, runner=sandbox, judge=grader, progress=show))
        report.write(folder, model, results, __version__)
    return results


def _show(
    model: LanguageModel, results: list[TaskResult], folder: Path, *, as_json: bool, picture: Path | None
) -> None:
    from quadriga import __version__
    from quadriga.evaluate import report

    if as_json:
        print(options.as_json(report.as_json(model, results, __version__)))
    else:
        print_table(report.table(results))
        if any(result.sample for result in results):
            print(
                "(sample): questions in this package, not all of the task's; `quadriga data fetch` lists what can be "
                "brought here whole",
                file=sys.stderr,
            )
        print(f"results in {folder}", file=sys.stderr)
    if picture is not None:
        report.picture(picture, model.name, results)


def open_judge(judge: str, model: str | None) -> LanguageModel:
    """The judge: a chat API's model, or a model in this process with its chat template."""
    if is_address(judge):
        from quadriga.errors import EvaluationError
        from quadriga.evaluate.endpoints import connect

        if model is None:
            raise EvaluationError("an API serves many models: name the judge's with --judge-model")
        return connect(judge, model=model, chat=True)
    from quadriga.engine.text_model import TextModel

    return TextModel(options.load_model(judge, options.load_options()), chat=True)


def _local(model: str, chat: bool, **given: Any) -> LanguageModel:
    """A model in this process, loaded as given and, where nothing is given, as scoring is quickest.

    Scoring is arithmetic, not reading: float32 was three times as quick as Q4_1 with 16-bit activations on an AVX2
    machine, and its numbers are those that other programs give for the same weights.
    """
    from quadriga.engine.text_model import TextModel

    how = options.load_options(**given)
    kernels = how.why_torch() is None
    chosen = {"format", "expert_memory", "activations"} & {name for name, value in given.items() if value is not None}
    if kernels and not chosen and _fits_three_times(model):
        how = replace(how, format="float32")
    if kernels and how.kv_format is None and how.format == "float32":
        how = replace(how, kv_format="float32")
    llm = options.load_model(model, how)
    loaded = {"dtype": how.dtype or "auto"} | ({} if how.format is None else {"format": how.format})
    if kernels:
        loaded = {"format": how.format or "keep", "activations": how.activations or "auto", "dtype": "kernels"}
        loaded["kv_format"] = how.kv_format or "bfloat16"
    return TextModel(llm, chat=chat, options=loaded)


def _fits_three_times(model: str) -> bool:
    """True if the weights in float32 take at most a third of the free memory."""
    from quadriga import runtime
    from quadriga.cli.progress import progress_bar
    from quadriga.hub import catalogue
    from quadriga.io.open import open_checkpoint
    from quadriga.model import cost

    with progress_bar(f"loading {Path(model).name}") as show:
        checkpoint = open_checkpoint(catalogue.resolve(model, progress=show))
    checkpoint.close()
    return 3 * cost.weight_bytes(checkpoint.config, "f32") <= runtime.memory_bytes()[1]


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
