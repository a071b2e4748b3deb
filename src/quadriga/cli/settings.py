"""Options from files and the environment.

    command line > QUADRIGA_COMMAND_OPTION > ./quadriga.toml > ~/.config/quadriga/config.toml > the command's default

    [all]                 # every command that has the option
    threads = 2
    [serve]               # one command
    port = 9000
    kv-memory = "4GB"
    [bench.decode]

What stands there is a default: where it has no effect beside what was typed, it is not refused as a typed option is.
A table or a key that no command has is an error that names the file.
"""

from __future__ import annotations

import difflib
import logging
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quadriga import runtime
from quadriga.errors import ConfigError

_log = logging.getLogger(__name__)

PROJECT = "quadriga.toml"
ALL = "all"
_NOT_OF_A_PROJECT = frozenset(
    {
        "admin_key",
        "allow_host",
        "allow_origin",
        "api_key",
        "host",
        "open_probes",
        "otlp_traces_endpoint",
        "ray",
        "unix_socket",
        "unsafe_exec",
        "url",
    }
)
"""A folder that somebody else made must not open this machine or send what is typed elsewhere. So it names no address
either, whatever the option: a judge's, or a model's."""


@dataclass(frozen=True)
class _File:
    path: Path
    own: bool
    """The user's, not the project's."""


def defaults(ctx: Any, words: str, params: list[Any]) -> dict[str, Any]:
    """What files and the environment say of a command's options.

    Args:
        ctx: the command's context, from which all commands are found.
        words: the command, "bench decode".
        params: its parameters.

    Returns:
        Parameter name -> value, converted as a typed one.

    Raises:
        ConfigError: a file that cannot be read, a table or key that no command has, or a value that cannot be.
    """
    settable = {key: param for param in params if (key := key_of(param)) is not None}
    found: dict[str, Any] = {}
    for file in (_File(runtime.config_file(), True), _File(Path(PROJECT), False)):
        tables = _read(file.path)
        if tables:
            _check_names(file.path, tables, ctx.find_root().command)
        for name in (ALL, words):
            table = _table(tables, name)
            for key, value in table.items():
                param = settable.get(key.replace("_", "-"))
                if param is None or isinstance(value, dict):
                    continue
                where = f"{file.path}, [{name.replace(' ', '.')}] {key}"
                if not file.own and (param.name in _NOT_OF_A_PROJECT or _has_address(value)):
                    raise ConfigError(
                        f"{where} must not be set by a project's file: it opens this machine or sends data elsewhere. "
                        f"Give it on the command line, or set it in {runtime.config_file()}."
                    )
                found[param.name] = _converted(ctx, param, value, where)
    _check_environment(ctx, words, settable)
    for key, param in settable.items():
        variable = _variable(words, key)
        text = runtime.setting(variable)
        if text is not None:
            value = text.split(",") if _takes_several(param) else text
            found[param.name] = _converted(ctx, param, value, f"QUADRIGA_{variable}")
    return found


def _has_address(value: Any) -> bool:
    """True for http://host, s3://bucket, ..., and for a list with one of them."""
    return any(isinstance(one, str) and "://" in one for one in (value if isinstance(value, list) else [value]))


def _variable(words: str, key: str = "") -> str:
    return f"{words} {key}".upper().replace(" ", "_").replace("-", "_")


def _check_environment(ctx: Any, words: str, settable: dict[str, Any]) -> None:
    """Say which variables begin as this command's do and name none of its options: other programs set some as well."""
    begin, known = _variable(words), {_variable(words, key) for key in settable}
    own = [name for name in runtime.settings() if name.startswith(begin) and name not in known]
    if own:
        others = [_variable(other) for other, _ in _commands(ctx.find_root().command)]
        longer = tuple(other for other in others if len(other) > len(begin))  # bench decode's are not bench's
        for name in own:
            if not name.startswith(longer):
                key = name[len(begin) :].lower().replace("_", "-")
                _log.warning(
                    "QUADRIGA_%s has no effect: `quadriga %s` has no %s.%s", name, words, key, _near(key, settable)
                )


def key_of(param: Any) -> str | None:
    """A parameter's name in a file: an option's first long name, or model; None for other arguments."""
    if param.param_type_name != "option":
        return "model" if param.name == "model" else None
    name = next((name for name in param.opts if name.startswith("--")), None)
    return None if name in (None, "--help", "--version", "--debug") else name[2:]


def _read(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} must be TOML: {error}") from None


def _table(tables: dict[str, Any], words: str) -> dict[str, Any]:
    for word in words.split():
        tables = tables.get(word, {})
    return tables


def _check_names(path: Path, tables: dict[str, Any], root: Any) -> None:
    commands = dict(_commands(root))
    keys: dict[str, set[str]] = {
        words: {key for p in command.params if (key := key_of(p))} for words, command in commands.items()
    }
    keys[ALL] = set().union(*keys.values())
    groups = {words.split()[0] for words in commands if " " in words}
    for name, table in tables.items():
        if not isinstance(table, dict):
            raise ConfigError(f"{path}: {name} must stand in a table, such as [{ALL}] or [serve]")
        if name not in keys and name not in groups:
            raise ConfigError(f"{path}: there is no command for [{name}].{_near(name, (*keys, *groups))}")
        inner = {f"{name} {key}": value for key, value in table.items() if isinstance(value, dict)}
        own = {key: value for key, value in table.items() if not isinstance(value, dict)}
        for words, some in ({name: own} if own or not inner else {}).items():
            _check_keys(path, words, some, keys.get(words, set()))
        for words, some in inner.items():
            if words not in keys:
                raise ConfigError(f"{path}: there is no command for [{words.replace(' ', '.')}].{_near(words, keys)}")
            _check_keys(path, words, some, keys[words])


def _check_keys(path: Path, words: str, table: dict[str, Any], known: set[str]) -> None:
    for key in table:
        if key.replace("_", "-") not in known:
            raise ConfigError(f"{path}: [{words.replace(' ', '.')}] has no {key}.{_near(key.replace('_', '-'), known)}")


def _near(name: str, known: Any) -> str:
    close = difflib.get_close_matches(name, list(known), n=1)
    return f" Did you mean {close[0]}?" if close else f" There are: {', '.join(sorted(known))}."


def _commands(group: Any, before: str = "") -> Iterator[tuple[str, Any]]:
    for name, command in group.commands.items():
        words = f"{before} {name}".strip()
        if hasattr(command, "commands"):
            yield from _commands(command, words)
        else:
            yield words, command


def _converted(ctx: Any, param: Any, value: Any, where: str) -> Any:
    multiple = _takes_several(param)
    if isinstance(value, list) and not multiple:
        raise ConfigError(f"{where} must be one value, got a list")
    try:
        return param.process_value(ctx, value if isinstance(value, list) or not multiple else [value])
    except Exception as error:
        message = getattr(error, "message", None)
        if message is None:
            raise
        raise ConfigError(f"{where}: {message}") from None


def _takes_several(param: Any) -> bool:
    return param.nargs == -1 or (param.param_type_name == "option" and bool(param.multiple))
