"""What all commands share in reading their arguments: nothing that was given is dropped, and nothing is given twice.

A command whose argument is MODEL takes it as ``--model`` too, so that one name means the same everywhere. Which options
go with which others stands in ``cli.rules``, a table for each command.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import typer
from typer.core import TyperCommand

from quadriga.cli import settings
from quadriga.cli.rules import RULES
from quadriga.option_rules import refuse_unused

_MAY_BE_EMPTY = ("prompt", "system")
"""The user's own texts: an empty system prompt replaces a template's own; what becomes of a prompt its command says."""

_MODEL = ("--model", "-m")


class Command(TyperCommand):
    """A command that refuses options given twice, empty values, and options that would have no effect."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Read the arguments; see the module docstring.

        Raises:
            UsageError: not what the command takes.
            ConfigError: an option that would have no effect beside the others.
        """
        if any(param.name == "model" and param.param_type_name == "argument" for param in self.params):
            args = self._model_first(ctx, args)
        raw, _, order = self.make_parser(ctx).parse_args(args=list(args))
        for param in order:
            if order.count(param) > 1 and param.param_type_name == "option" and not param.multiple:
                ctx.fail(f"{spelled(param)} is given twice. Leave one of the two out.")
            values = raw.get(param.name)
            values = values if isinstance(values, (list, tuple)) else [values]
            if param.name not in _MAY_BE_EMPTY and any(isinstance(v, str) and not v.strip() for v in values):
                ctx.fail(f"{spelled(param)} must not be empty. Give a value, or leave it out.")
        if not ctx.resilient_parsing:
            ctx.default_map = settings.defaults(ctx, _path(ctx), self.params)
        rest = super().parse_args(ctx, args)
        if not ctx.resilient_parsing:
            given = {param.name for param in self.params if _came_from_the_line(ctx, param.name)}
            names = {param.name: spelled(param) for param in self.params}
            refuse_unused(RULES.get(_path(ctx), ()), ctx.params, lambda option: names.get(option, option), given)
        return rest

    def _model_first(self, ctx: Any, args: list[str]) -> list[str]:
        """``--model X`` where MODEL is the first argument."""
        end = args.index("--") if "--" in args else len(args)
        found, rest, i = [], [], 0
        while i < end:
            name, equals, value = args[i].partition("=")
            if name in _MODEL and (equals or i + 1 < end):
                found.append(value if equals else args[i + 1])
                i += 1 if equals else 2
            elif name in _MODEL:
                ctx.fail(f"{name} must be followed by a model.")
            else:
                rest.append(args[i])
                i += 1
        if len(found) > 1:
            ctx.fail("--model is given twice. Leave one of the two out.")
        return [*found, *rest, *args[end:]]


class Commands(typer.Typer):
    """A Typer whose commands are of :class:`Command`."""

    def command(self, name: str | None = None, **how: Any) -> Callable[[Any], Any]:
        """Like Typer's."""
        return super().command(name, cls=Command, **how)


def spelled(param: Any) -> str:
    """A parameter as it is typed: --threads, MODEL."""
    if param.param_type_name != "option":
        return str(param.name).upper()
    return str(next((name for name in param.opts if name.startswith("--")), param.opts[0]))


def _came_from_the_line(ctx: Any, name: str) -> bool:
    source = ctx.get_parameter_source(name)
    return source is not None and source.name in ("COMMANDLINE", "ENVIRONMENT")


def _path(ctx: Any) -> str:
    """The command's words: "convert", "bench serve"."""
    words = []
    while ctx.parent is not None:
        words.append(ctx.info_name)
        ctx = ctx.parent
    return " ".join(reversed(words))
