"""``quadriga plan``: what training or serving a model takes. Parse, call, print; the arithmetic is ``model.plan``'s."""

from __future__ import annotations

from itertools import islice
from typing import TYPE_CHECKING, Annotated, Any

import typer

from quadriga.cli import options

if TYPE_CHECKING:
    from rich.table import Table

    from quadriga.model.config import ModelConfig
    from quadriga.model.plan.hardware import Gpu
    from quadriga.model.plan.training import TrainingPlan

_SEQ_LEN = 4096
_CONTEXT = 4096
_LEAST_BATCH = 16_000_000
_LEAST_STEPS = 10_000
_FORMATS_ABREAST = (3, 5, 5)
"""Of the formats that weights are served in, in each table."""


def plan_command(
    model: options.ModelArgument,
    gpus: Annotated[
        str | None, typer.Option(help="Train on this cluster, e.g. 3072xH100; leave out for serving only.")
    ] = None,
    tokens: options.Tokens = "1T",
    seq_len: Annotated[
        int | None, typer.Option(min=1, help="Tokens of a training row.", show_default="4096, or the model's context")
    ] = None,
    batch_tokens: Annotated[
        str | None,
        typer.Option(help="Tokens of a step; default: the least whole batch from 16M, or a 10,000th of all."),
    ] = None,
    stack: Annotated[str, typer.Option(help="How well the program uses the hardware: tuned or foundry.")] = "tuned",
    price: Annotated[float | None, typer.Option(min=0, max=1e6, help="US dollars of an accelerator's hour.")] = None,
    availability: Annotated[float, typer.Option(help="Share of the time that is not lost to faults.")] = 0.95,
    context: options.Context = None,
    top: Annotated[int, typer.Option(min=1, max=10_000, help="How many meshes to show.")] = 5,
    picture: options.Picture = None,
    json: options.Json = False,
    verify: options.Verify = False,
) -> None:
    """Memory, time, cost and the best mesh for training; formats, boxes and speed limits for serving. By arithmetic.

    With --verify the exit code is 1 if the trainer refuses a row, or counts other bytes than the plan. MODEL may be the
    name of a shape, such as dbrx-132b. Serving is planned for 4096 positions, or as many as the model has.
    """
    from quadriga.cli.info_report import load_config
    from quadriga.errors import ConfigError

    options.require_picture(picture, (".svg",))
    config = load_config(model)
    context = min(_CONTEXT, config.max_seq_len) if context is None else context
    seq_len = min(_SEQ_LEN, config.max_seq_len) if seq_len is None else seq_len
    if context > config.max_seq_len:
        raise ConfigError(f"--context must be from 1 to this model's {config.max_seq_len}, got {context}")
    table: dict[str, Any] = {"model": model, "serving": _serving(config, context), "context": context}
    plans: list[TrainingPlan] = []
    if gpus is not None:
        table["training"], plans, gpu = _training(
            config, gpus, tokens, seq_len, batch_tokens, stack, price, availability, top
        )
        if verify:
            for plan, shown in zip(plans, table["training"]["plans"], strict=False):
                shown["verified"] = _verified(config, plan)
        if picture is not None:
            from quadriga.model.plan.picture import plan_svg

            picture.write_text(plan_svg(f"{model} on {gpus}, {tokens} tokens", plans[0], gpu))
    if json:
        print(options.as_json(table))
    else:
        if gpus is not None:
            _print_training(model, table["training"])
        _print_serving(model, table)
        if picture is not None:
            print(f"drawn: {picture}")
    if verify and not all(plan["verified"]["accepted"] for plan in table["training"]["plans"]):
        raise typer.Exit(1)


def _verified(config: ModelConfig, plan: TrainingPlan) -> dict[str, Any]:
    """What the trainer makes of a row of the plan."""
    from quadriga.errors import ConfigError
    from quadriga.model.parallel_spec import MOST_PADDING
    from quadriga.train.verify import measure

    try:
        found = measure(config, plan.mesh)
    except ConfigError as error:
        return {"accepted": False, "reason": str(error)}
    planned = plan.memory.state
    near = abs(found.state_bytes - planned) <= 0.05 * planned
    return {
        "accepted": near and found.padding <= MOST_PADDING,
        "state_bytes": found.state_bytes,
        "planned_state_bytes": planned,
        "padding": found.padding,
        "reason": None if near else f"state of {found.state_bytes / 1e9:.1f} GB, planned {planned / 1e9:.1f}",
    }


def _training(
    config: ModelConfig,
    cluster: str,
    tokens: str,
    seq_len: int,
    batch: str | None,
    stack: str,
    price: float | None,
    availability: float,
    top: int,
) -> tuple[dict[str, Any], list[TrainingPlan], Gpu]:
    from quadriga.errors import ConfigError
    from quadriga.model.plan.hardware import STACKS, parse_cluster
    from quadriga.model.plan.training import search, train_flops_per_token
    from quadriga.train.data_config import parse_count

    ranks, gpu = parse_cluster(cluster)
    total = parse_count(tokens)
    if stack not in STACKS:
        raise ConfigError(f"stack must be one of {', '.join(STACKS)}; got {stack!r}")
    if not 0 < availability <= 1:
        raise ConfigError(f"availability must be above 0 and at most 1, got {availability}")
    if not 1 <= seq_len <= config.max_seq_len:
        raise ConfigError(f"seq_len must be from 1 to this model's {config.max_seq_len}, got {seq_len}")
    row = ranks * seq_len
    wanted = parse_count(batch) if batch else -(-max(row, min(_LEAST_BATCH, total // _LEAST_STEPS)) // row) * row
    plans = search(config, ranks, gpu, seq_len, wanted, STACKS[stack])
    hourly = gpu.price_per_hour if price is None else price
    flops = train_flops_per_token(config, seq_len) * total

    def days_at(mfu: float) -> float:
        return flops / (mfu * gpu.peak_flops * ranks) / 86400

    shown = []
    for plan in plans[: max(1, top)]:
        days = total / plan.tokens_per_s / 86400
        shown.append(
            {
                "mesh": {name: getattr(plan.mesh, name) for name in plan.mesh.__dataclass_fields__},
                "recompute": plan.work.recompute,
                "micro_rows": plan.work.micro_rows,
                "accumulate": plan.work.accumulate,
                "batch_tokens": plan.batch_tokens,
                "steps": -(-total // plan.batch_tokens),
                "step_s": plan.time.total,
                "step_parts_s": {name: getattr(plan.time, name) for name in plan.time.__dataclass_fields__},
                "memory_bytes": plan.memory.total,
                "memory_parts_bytes": {name: getattr(plan.memory, name) for name in plan.memory.__dataclass_fields__},
                "mfu": plan.mfu,
                "tokens_per_s": plan.tokens_per_s,
                "days": days,
                "days_with_faults": days / availability,
                "gpu_hours": days / availability * 24 * ranks,
                "cost": days / availability * 24 * ranks * hourly,
            }
        )
    facts = {
        "cluster": {"ranks": ranks, "gpu": gpu.name, "memory_bytes": gpu.memory_bytes, "peak_flops": gpu.peak_flops},
        "tokens": total,
        "seq_len": seq_len,
        "stack": stack,
        "flops": flops,
        "flops_6nd": 6 * _active(config) * total,
        "days_at_40_percent": days_at(0.4),
        "price_per_hour": hourly,
        "availability": availability,
        "n_plans_that_fit": len(plans),
        "plans": shown,
    }
    return facts, plans, gpu


def _active(config: ModelConfig) -> int:
    from quadriga.model.cost import n_params

    return n_params(config).active_without_input


def _serving(config: ModelConfig, context: int) -> list[dict[str, Any]]:
    from quadriga.model.plan.hardware import BOXES
    from quadriga.model.plan.serving import SERVED_FORMATS, serve

    rows = []
    for box in BOXES:
        for weight_format in SERVED_FORMATS:
            found = serve(config, weight_format, box, context)
            rows.append(
                {
                    "box": box.name,
                    "format": weight_format,
                    "fits": found.fits,
                    "weight_bytes": found.weight_bytes,
                    "cache_tokens": found.cache_tokens,
                    "tokens_per_s_alone": found.tokens_per_s_alone,
                    "batch": found.batch,
                    "tokens_per_s_batch": found.tokens_per_s_batch,
                    "runs_on": found.runs_on,
                }
            )
    return rows


def _print_training(model: str, facts: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console, cluster, best = Console(), facts["cluster"], facts["plans"][0]
    title = f"train {model} on {cluster['ranks']} x {cluster['gpu']}, {facts['tokens']:.3g} tokens"
    console.print(Text(title, style="bold"))
    console.print(
        f"{facts['flops_6nd']:.3g} FLOP by 6 x active parameters x tokens; {facts['flops']:.3g} with attention at "
        f"{facts['seq_len']}; {facts['days_at_40_percent']:.1f} days at 40 % MFU",
        highlight=False,
    )
    table = Table()
    for column in ("mesh", "recompute", "rows"):
        table.add_column(column, no_wrap=True)
    for column in ("GB", "step", "MFU", "Mtok/s", "days"):
        table.add_column(column, justify="right", no_wrap=True)
    for plan in facts["plans"]:
        mesh = plan["mesh"]
        table.add_row(
            _mesh_word(mesh),
            plan["recompute"],
            f"{plan['micro_rows']}x{plan['accumulate']}",
            f"{plan['memory_bytes'] / 1e9:.1f}",
            f"{plan['step_s']:.2f} s",
            f"{plan['mfu']:.1%}",
            f"{plan['tokens_per_s'] / 1e6:,.3f}",
            f"{plan['days']:.1f}",
        )
    console.print(table)
    console.print("mesh: replicas x shards x expert ranks; rows: of a rank's micro-step x micro-steps", highlight=False)
    if any("+" in _mesh_word(plan["mesh"]) for plan in facts["plans"]):
        console.print("+tT, cC: T ranks share heads, C ranks have parts of rows; rows are those of T x C ranks")
        console.print("+pP: P stages of a pipeline, each of such a mesh")
    for plan in (plan for plan in facts["plans"] if "verified" in plan):
        mesh, seen = plan["mesh"], plan["verified"]
        word, counted = "REFUSED", seen["reason"]
        if seen["accepted"]:
            word = "accepted"
            counted = f"{seen['state_bytes'] / 1e9:.2f} GB of state, gathers padded x{seen['padding']:.3f}"
        console.print(f"{_mesh_word(mesh)} {word}: {counted}", highlight=False)
    console.print(f"in a run's file: {_section(best, cluster['ranks'])}", highlight=False, markup=False)
    parts = ", ".join(f"{name} {value / best['step_s']:.0%}" for name, value in best["step_parts_s"].items())
    bytes_ = ", ".join(f"{name} {value / 1e9:.1f}" for name, value in best["memory_parts_bytes"].items())
    console.print(f"best: step of {best['batch_tokens']:,} tokens, {best['steps']:,} steps: {parts}", highlight=False)
    console.print(f"memory of a rank in GB: {bytes_}", highlight=False)
    console.print(
        f"{best['days_with_faults']:.1f} days at {facts['availability']:.0%} availability: {best['gpu_hours']:,.0f} "
        f"accelerator hours, {best['cost'] / 1e6:,.2f} M$ at {facts['price_per_hour']:g} $/h; "
        f"{facts['n_plans_that_fit']} plans fit",
        highlight=False,
    )


def _mesh_word(mesh: dict[str, int]) -> str:
    """A mesh in one word, and behind it who shares rows."""
    word = f"{mesh['replicate']}x{mesh['shard']}x{mesh['ep']}"
    shared = [f"{name[0]}{mesh[name]}" for name in ("tp", "cp", "pp") if mesh[name] > 1]
    return f"{word}+{''.join(shared)}" if shared else word


def _section(plan: dict[str, Any], ranks: int) -> str:
    """The best row as a run's [parallel] section, on one line."""
    mesh = plan["mesh"]
    rows = plan["micro_rows"] * ranks // (mesh["tp"] * mesh["cp"] * mesh["pp"])
    keys = {"tp": "tensor", "cp": "context", "pp": "pipeline"}
    shared = "".join(f"{key} = {mesh[name]}, " for name, key in keys.items() if mesh[name] > 1)
    return (
        f"[parallel] replicate = {mesh['replicate']}, experts = {mesh['ep']}, {shared}micro_rows = {rows}, "
        f'recompute = "{plan["recompute"]}", dtype = "bfloat16"'
    )


def _print_serving(model: str, table: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console, forms = Console(), list(dict.fromkeys(row["format"] for row in table["serving"]))
    title = Text(f"serve {model}, sequences of {table['context']} positions", style="bold")
    assert sum(_FORMATS_ABREAST) == len(forms), "every format has its column"
    left = iter(forms)
    for n in _FORMATS_ABREAST:
        some = list(islice(left, n))
        rows = [row for row in table["serving"] if row["format"] in some]
        shown = Table(title=title, title_justify="left")
        _fill_serving(shown, some, rows)
        console.print(shown)
    console.print("one sequence; then the batch that fits and its tokens a second, as memory and peak allow at best")
    console.print(
        "*: not with this engine, which runs bf16 on one GPU, and all formats on processors; several machines"
    )
    console.print("are ranks of one model: torchrun ... --parallel tp=3")


def _fill_serving(shown: Table, forms: list[str], rows: list[dict[str, Any]]) -> None:
    """A row for each box, a column for each format."""
    shown.add_column("box")
    for form in forms:
        shown.add_column(form, justify="right")
    by_box: dict[str, list[str]] = {}
    for row in rows:
        speed = f"{row['tokens_per_s_alone']:,.0f} tok/s; {row['batch']}: {row['tokens_per_s_batch']:,.0f}"
        speed += "" if row["runs_on"] else " *"
        by_box.setdefault(row["box"], []).append(speed if row["fits"] else f"{row['weight_bytes'] / 1e9:.0f} GB: no")
    for box, cells in by_box.items():
        shown.add_row(box, *cells)
