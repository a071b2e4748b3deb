"""``quadriga info MODEL``: the command line of ``cli.info_report``."""

from __future__ import annotations

from quadriga.cli import options


def info_command(
    model: options.ModelArgument,
    json: options.Json = False,
    context: options.Context = None,
) -> None:
    """What a model is and what it costs: shapes, parameters, memory, and whether it fits here.

    MODEL may be the name of a shape, such as dbrx-132b. The cache is planned for all positions that the model has, or
    for --context.
    """
    from quadriga.cli.info_report import info

    info(model, json, context)
