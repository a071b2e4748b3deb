"""What users import stays importable, and importing it costs nothing."""

from __future__ import annotations

import subprocess
import sys

import quadriga


def test_the_public_names() -> None:
    assert sorted(quadriga.__all__) == ["LLM", "ModelConfig", "SamplingParams", "__version__", "load"]
    for name in quadriga.__all__:
        assert getattr(quadriga, name) is not None
    assert dir(quadriga) == sorted(quadriga.__all__)


def test_an_unknown_name_is_an_attribute_error() -> None:
    assert not hasattr(quadriga, "nonsense")


def test_importing_the_package_and_its_commands_imports_nothing_heavy() -> None:
    program = (
        "import sys, quadriga, quadriga.cli\n"
        "heavy = {'torch', 'numpy', 'prompt_toolkit', 'huggingface_hub', 'tokenizers'} & set(sys.modules)\n"
        "sys.exit(str(sorted(heavy)) if heavy else 0)"
    )
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
