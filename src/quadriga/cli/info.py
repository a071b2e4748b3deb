"""``quadriga info NAME|PATH``: the command line of ``cli.info_report``."""

from __future__ import annotations

from typing import Annotated

import typer


def info_command(
    name_or_path: Annotated[str, typer.Argument(metavar="NAME|PATH", help="A preset, a model directory or a GGUF.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    context: Annotated[int | None, typer.Option(help="Positions to plan the cache for; default: the model's.")] = None,
) -> None:
    """What a model is and what it costs: shapes, parameters, memory, and whether it fits here."""
    from quadriga.cli.info_report import info

    info(name_or_path, as_json, context)
