"""Commands that are run one after another, each once: a finished one is left alone, a cut one is given again.

OUT/NAME.toml              the training runs' files, made from recipes
OUT/steps/STEP.json        what was run, and how long it took; written when it ended well
OUT/steps/STEP.log         what it said
OUT/../shared              the same of steps that several claims have: corpora, and the run that they compare with
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
import tomllib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from quadriga.errors import EvaluationError, QuadrigaError
from quadriga.train.data_config import parse_count

Tell = Callable[[str], None]
Values = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Step:
    """One command of this program.

    Attributes:
        argv: the words after ``quadriga``; {out} is the step's folder, {shared} that of shared steps.
        output: a file in the step's folder that its standard output is written to.
        shared: its folder is not the claim's own, so that a claim with an equal step finds it done.
        recipe: a training run's file that ``{out}/NAME.toml`` is made from.
        changes: what replaces the recipe's values, by dotted key, e.g. {"model.d_ff": 320}.
        tokens: each stage of the recipe is this many times as long.
    """

    name: str
    argv: tuple[str, ...]
    output: str | None = None
    recipe: str | None = None
    changes: Values = field(default_factory=dict)
    tokens: float = 1.0
    shared: bool = False

    def words(self, folders: Folders) -> list[str]:
        """The command's words, filled in with its own folders."""
        return [_filled(word, folders) for word in self.argv]


@dataclass(frozen=True, kw_only=True)
class Folders:
    """What a step's words stand for: where it writes, where shared steps write, and the recipes."""

    out: Path
    shared: Path
    recipes: Path


def shared_folder(claim: Path) -> Path:
    """Where the steps lie that the claim in this folder has in common with its neighbours."""
    return claim.parent / "shared"


def _folders(step: Step, claim: Path, recipes: Path) -> Folders:
    shared = shared_folder(claim)
    return Folders(out=shared if step.shared else claim, shared=shared, recipes=recipes)


def _filled(value: Any, folders: Folders) -> Any:
    """A text, or a list of texts, with the folders filled in; other values as they are."""
    if isinstance(value, list):
        return [_filled(one, folders) for one in value]
    if isinstance(value, str):
        for name, folder in vars(folders).items():
            value = value.replace(f"{{{name}}}", str(folder))
    return value


def run_steps(steps: Sequence[Step], out: Path, recipes: Path, tell: Tell) -> None:
    """Run the steps that have not been.

    Args:
        out: the claim's folder; shared steps lie beside it.
        recipes: the folder of recipes.

    Raises:
        EvaluationError: a recipe is missing, or ``out`` has steps of other settings.
        QuadrigaError: a command failed.
    """
    for number, step in enumerate(steps, 1):
        folders = _folders(step, out, recipes)
        (folders.out / "steps").mkdir(parents=True, exist_ok=True)
        done = folders.out / "steps" / f"{step.name}.json"
        made = _made(step, folders)
        words = step.words(folders)
        wanted: Values = {"argv": words, "file": made}
        if done.exists():
            found = json.loads(done.read_text())
            if {key: found.get(key) for key in wanted} != wanted:
                raise EvaluationError(
                    f"{done} is of other settings: give another --runs, or remove the folder to start over"
                )
            continue
        tell(f"[{number}/{len(steps)}] quadriga {' '.join(words)}")
        seconds = _run(step, folders)
        write(done, json.dumps(wanted | {"seconds": round(seconds, 1)}) + "\n")


def _made(step: Step, folders: Folders) -> Values | None:
    """Write the file of a training run, and return its content."""
    if step.recipe is None:
        return None
    path = folders.recipes / step.recipe
    try:
        values = tomllib.loads(path.read_text())
    except OSError as error:
        raise EvaluationError(
            f"cannot read {path}: {error.strerror}. Give the folder of this project's recipes as --recipes."
        ) from None
    for key, value in step.changes.items():
        _set(values, key, _filled(value, folders))
    _stretch(values, step.tokens)
    values["run"] = str(folders.out / "runs" / step.name)
    target = folders.out / f"{step.name}.toml"
    if not target.exists():  # a run that has begun refuses another file
        write(target, toml(values))
    return values


def _set(values: Values, key: str, value: Any) -> None:
    *rooms, last = key.split(".")
    for room in rooms:
        values = values.setdefault(room, {})
    if value is None:
        values.pop(last, None)
    else:
        values[last] = value


def _stretch(values: Values, times: float) -> None:
    """Make every stage ``times`` as long, and what is counted in steps with it."""
    for stage in values["data"]["stages"]:
        batch = parse_count(stage["batch_tokens"])
        stage["tokens"] = max(1, round(parse_count(stage["tokens"]) * times / batch)) * batch
    for section, key in (("schedule", "warmup_steps"), ("checkpoint", "every"), ("evaluate", "every")):
        if key in values.get(section, {}):
            values[section][key] = max(1, round(values[section][key] * times))


def _run(step: Step, folders: Folders) -> float:
    out = folders.out
    log = out / "steps" / f"{step.name}.log"
    started = time.monotonic()
    with log.open("w") as said:
        target = said if step.output is None else (out / f".{step.output}.new").open("w")
        command = [sys.executable, "-m", "quadriga", *step.words(folders)]
        code = _ended(command, target, said)
        if target is not said:
            target.close()
    if code:
        tail = " / ".join(log.read_text().strip().splitlines()[-3:])
        raise QuadrigaError(f"the step {step.name} ended with code {code}: {tail[-500:]} ({log} has all of it)")
    if step.output is not None:
        (out / f".{step.output}.new").replace(out / step.output)
    return time.monotonic() - started


def _ended(command: Sequence[str], output: IO[str], errors: IO[str]) -> int:
    """Run a command to its end; where this process is asked to stop, so is the command, which saves first."""
    with subprocess.Popen(command, stdout=output, stderr=errors, stdin=subprocess.DEVNULL) as child:
        try:
            return child.wait()
        except BaseException:
            child.terminate()  # a second request: at a terminal, Ctrl-C reached it too
            raise  # after the command's end, which the block waits for


def write(path: Path, text: str) -> None:
    """A file whole or not at all."""
    new = path.with_name(f".{path.name}.new")
    new.write_text(text)
    new.replace(path)


def toml(values: Values) -> str:
    """Plain values as TOML: scalars, lists, tables, and lists of tables."""
    lines = [f"{key} = {_scalar(value)}" for key, value in values.items() if not isinstance(value, dict)]
    for key, value in values.items():
        if isinstance(value, dict):
            plain = {name: one for name, one in value.items() if not _is_tables(one)}
            lines += ["", f"[{key}]", *(f"{name} = {_scalar(one)}" for name, one in plain.items())]
            for name in value.keys() - plain.keys():
                for table in value[name]:
                    lines += ["", f"[[{key}.{name}]]", *(f"{inner} = {_scalar(it)}" for inner, it in table.items())]
    return "\n".join(lines) + "\n"


def _is_tables(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and isinstance(value[0], dict)


def _scalar(value: Any) -> str:
    if isinstance(value, dict):
        return "{ " + ", ".join(f"{key} = {_scalar(one)}" for key, one in value.items()) + " }"
    if isinstance(value, list):
        return "[" + ", ".join(map(_scalar, value)) + "]"
    return json.dumps(value, ensure_ascii=False)
