"""Who imports whom among the files of src: no circle, and no torch on the way from a file on disk to an answer."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

SRC = Path(__file__).parents[1] / "src"

WITHOUT_TORCH = {
    "chat": ["cli.chat", "cli.options", "engine.load"],
    "generate": ["cli.generate", "cli.options", "engine.load"],
    "serve": ["cli.serve", "engine.load", "server.run", "server.app", "server.grammars"],
    "convert": ["cli.convert", "io.convert", "hub.catalogue"],
    "eval": ["cli.eval", "engine.text_model", "evaluate.harness", "evaluate.tasks"],
    "bench": ["cli.bench", "cli.bench_claim", "cli.bench_serve", "bench.speed", "bench.claim", "bench.serve"],
    "info": ["cli.info", "cli.info_report", "cli.models", "cli.plan"],
    "adapter": ["cli.tune", "io.adapter", "io.adapter_files", "edits.delta", "edits.upcycle"],
    "data": ["cli.data", "train.corpus.pipeline", "train.corpus.report"],
    "the names of the package": ["engine.load", "engine.request", "model.config"],
}
"""What each command imports when it is started, and inside its functions on the way that needs no gradient and no GPU."""

TORCH = ("nn", "train", "kernels.arrays", "kernels.reference", "kernels.training", "kernels.triton", "runners.cuda",
         "runners.distributed", "runners.on_tensors", "runners.torch", "edits.block_trace", "edits.calibrate",
         "edits.fit_router", "edits.format_errors", "edits.sensitivity")  # fmt: skip
"""The only files that name torch, with those in them."""


def name_of(path: Path) -> str:
    parts = path.relative_to(SRC).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


FILES = {name_of(path): path for path in SRC.rglob("*.py")}


def statements(body: list[ast.stmt], *, functions: bool) -> Iterator[ast.Import | ast.ImportFrom]:
    """The imports that run: those under TYPE_CHECKING never do, and those in functions only when these are called."""
    for node in body:
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            yield node
        elif isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            if functions:
                yield from statements(node.body, functions=True)
        elif isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            yield from statements(node.orelse, functions=functions)
        else:
            for part in ("body", "orelse", "finalbody"):
                yield from statements(getattr(node, part, []), functions=functions)
            for one in (*getattr(node, "handlers", []), *getattr(node, "cases", [])):
                yield from statements(one.body, functions=functions)


@cache
def imported(name: str, *, functions: bool = False) -> frozenset[str]:
    """The files of ours, and the packages of others, that a file imports."""
    found = set()
    for node in statements(ast.parse(FILES[name].read_text()).body, functions=functions):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        else:
            assert node.level == 0 and node.module is not None, f"{name}: imports are absolute"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        for one in names:
            while one.startswith("quadriga.") and one not in FILES:
                one = one.rpartition(".")[0]
            found.add(one if one in FILES else one.partition(".")[0])
    return frozenset(found - {name})


def closure(names: list[str]) -> dict[str, str]:
    """Everything that is imported with some files, their packages included, each with one that imports it."""
    reached: dict[str, str] = {}
    ahead = [(name, "") for name in names]
    while ahead:
        name, by = ahead.pop()
        if name in reached:
            continue
        reached[name] = by
        if name in FILES:
            ahead += [(one, name) for one in imported(name)]
            if "." in name:
                ahead.append((name.rpartition(".")[0], name))
    return reached


def test_no_file_imports_one_that_imports_it() -> None:
    assert len(FILES) > 250
    try:
        TopologicalSorter({name: imported(name) for name in FILES}).prepare()
    except CycleError as error:
        pytest.fail("a circle: " + " <- ".join(error.args[1]))


@pytest.mark.parametrize("command", WITHOUT_TORCH)
def test_no_torch_on_the_way_of(command: str) -> None:
    reached = closure(["quadriga.cli", *(f"quadriga.{name}" for name in WITHOUT_TORCH[command])])
    assert "numpy" in reached or command == "info", "the way was walked"
    way = ["torch"]
    while way[-1] in reached and reached[way[-1]]:
        way.append(reached[way[-1]])
    assert "torch" not in reached, " <- ".join(way)


def test_torch_is_named_in_its_rooms_only() -> None:
    naming = {name.removeprefix("quadriga.") for name in FILES if "torch" in imported(name, functions=True)}
    assert [n for n in sorted(naming) if not any(n == room or n.startswith(room + ".") for room in TORCH)] == []
    assert [room for room in TORCH if not any(n == room or n.startswith(room + ".") for n in naming)] == []
