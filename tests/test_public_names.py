"""What users import stays importable, and importing it costs nothing."""

from __future__ import annotations

import inspect
import subprocess
import sys
import tomllib
from pathlib import Path

import quadriga
from quadriga import errors

ROOT = Path(__file__).parent.parent


def test_the_public_names() -> None:
    raised = {name for name, value in vars(errors).items() if inspect.isclass(value) and issubclass(value, Exception)}
    assert set(quadriga.__all__) == {"LLM", "ModelConfig", "SamplingParams", "__version__", "load"} | raised
    for name in quadriga.__all__:
        assert getattr(quadriga, name) is not None
    assert quadriga.CheckpointError is errors.CheckpointError
    assert dir(quadriga) == sorted(quadriga.__all__)


def test_an_unknown_name_is_an_attribute_error() -> None:
    assert not hasattr(quadriga, "nonsense")


def test_the_package_says_its_version_and_that_it_is_typed() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["version"] == quadriga.__version__
    assert (Path(quadriga.__file__).parent / "py.typed").exists()


def test_no_room_of_the_package_is_left_out_of_it() -> None:
    """A pattern such as "bench", without its place, leaves out quadriga.bench too, and with it two commands."""
    build = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["scikit-build"]
    assert all(pattern.startswith("/") for pattern in build["sdist"]["exclude"])
    rooms = {path.parent.name for path in (ROOT / "src/quadriga").glob("*/__init__.py")}
    assert not rooms & {pattern for pattern in (ROOT / ".gitignore").read_text().splitlines() if pattern[:1] != "/"}


def test_the_tests_run_what_is_edited() -> None:
    assert Path(quadriga.__file__).is_relative_to(ROOT / "src")


def test_importing_the_package_and_its_commands_imports_nothing_heavy() -> None:
    program = (
        "import sys, quadriga, quadriga.cli\n"
        "heavy = {'torch', 'numpy', 'prompt_toolkit', 'huggingface_hub', 'tokenizers'} & set(sys.modules)\n"
        "sys.exit(str(sorted(heavy)) if heavy else 0)"
    )
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
