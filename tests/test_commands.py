"""Every command that README and the docs show is run as a reader would, in a folder with nothing but this clone's recipes.

What takes long is shortened (``SHORTER``), placeholders become tiny models (``NAMES``), and what needs another machine, a
cluster or somebody's API is listed with the reason (``ELSEWHERE``).
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from quadriga.nn.transformer import random_parameters
from tests import waiting
from tests.checkpoint.models import TINY, write_hf
from tests.text import vocabularies

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]

ELSEWHERE = {
    r"pip install": ".ci/run and tools/wheels.sh install",
    r"ray |torchrun|.* --ray ": "several machines or processes; tests/train has its own",
    r"quadriga bench claim": "needs 8 GB; tests/cli has a small one",
    r"quadriga data fetch \w": "the network; tests/hub/test_data_sets.py has a stand-in",
    r".*(api\.example\.org|api\.anthropic\.com)": "somebody's API; tests/evaluate/test_endpoints.py has stand-ins",
    r"quadriga eval --tasks humaneval --samples": "an hour; tests/evaluate runs programs",
    r"quadriga eval --tasks leaderboard": "an hour",
    r"quadriga eval --tasks hellaswag --model http": "tests/evaluate/test_endpoints.py asks our own server",
    r"quadriga data prepare books|quadriga data tokenizer": "a reader's own files; tests/train/corpus has such",
    r"quadriga upcycle .* --router-text": "a reader's own file; tests/checkpoint/test_fit_router.py has one",
    r"quadriga serve (\S+ )?(big=)?dbrx-q4": "other options of the same command; tests/cli/test_serve.py has them",
    r"quadriga bench serve .*(--concurrency|--rate)": "minutes; tests/cli has a short one",
    r"quadriga tune recipes/tune/(full|qlora-experts|dpo|orpo|grpo|arithmetic|distill)": "the same command on other "
    "recipes; tests/train has each",
    r"quadriga serve .* --adapter": "tests/server serves adapters",
    r"quadriga convert SOURCE OUT --to hf --pickles": "tests/checkpoint/test_bins.py has such files",
    r"quadriga experts label \./my-moe": "a reader's own files; tests/cli/test_experts.py has such",
    r"quadriga train recipes/nano.toml": "first.toml is trained; this is the same with larger sizes",
    r"quadriga claims run (moe-flops|mpt-compute|inference)": "hours, or 8 GB; tests/bench/test_claims.py has small ones",
    r"quadriga (compare|diff) eval/": "results of hours; tests/evaluate has test_compare.py and test_flips.py",
    r"quadriga divergence ./bf16": "a reader's own files; tests/evaluate/test_divergence.py has small ones",
    r"make ": "what .ci/run does, and tests/triton",
}
SHORTER = {  # command -> what is added, or put in place of what is there
    r"quadriga (chat|generate)": {"--max-tokens": "4"},
    r"quadriga train": {"--stop-after": "2"},
    r"quadriga experts label": {"--domain-tokens": "200"},
    r"quadriga tune": {"--steps": "1"},
    r"quadriga eval --tasks": {"--limit": "2"},
    r"quadriga bench decode": {"--rounds": "1", "--n": "4"},
    r"quadriga bench serve": {"--requests": "4", "--concurrency": "2", "--max-tokens": "8"},
    r"quadriga bench invariance": {"--requests": "4", "--concurrency": "2", "--max-tokens": "6"},
    r"quadriga convert .*--budget": {"--budget": "10MB"},
}
NAMES = {"SOURCE": "dbrx-instruct", "OUT.gguf": "out.gguf", "OUT": "out", "TEXT": "sample.txt"}


def commands(page: Path) -> list[str]:
    """The commands of a page's blocks, without comments."""
    found, language = [], None
    for line in page.read_text().splitlines():
        if line.startswith("```"):
            language = line[3:] if language is None else None
        elif language in ("", "sh") and re.match(r"(quadriga|pip|make|torchrun|ray) ", line):
            found.append(re.split(r"\s+#|\s{4,}", line)[0].strip())
    return found


def elsewhere(command: str) -> bool:
    return any(re.match(pattern, command) for pattern in ELSEWHERE)


def test_the_tables_name_commands_that_are_shown() -> None:
    shown = [command for page in PAGES for command in commands(page)]
    assert len(shown) > 60
    for pattern in (*ELSEWHERE, *SHORTER):
        assert any(re.match(pattern, command) for command in shown), pattern


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory, smollm2: Path) -> Path:
    """A folder as after `git clone`, a cache with the default model in it, and a tiny DBRX where a page has a large one."""
    home = tmp_path_factory.mktemp("home")
    folder = home / "quadriga"
    shutil.copytree(ROOT / "recipes", folder / "recipes")
    shutil.copytree(smollm2.parent, home / "cache/models" / smollm2.parent.name)
    config = replace(TINY["dbrx"], vocab_size=400)
    write_hf(folder / "dbrx-instruct", config, parameters=random_parameters(config, std=0.3))
    (folder / "dbrx-instruct/tokenizer.json").write_text(json.dumps(vocabularies.bpe()))
    (folder / "sample.txt").write_text("The fox and the dog. " * 40)
    questions = [{"query": f"{n} + 1 =", "choices": ["2", str(n + 1)], "gold": 1} for n in range(5, 12)]
    (folder / "my-questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in questions))
    return folder


def environment(clone: Path) -> dict[str, str]:
    kept = {k: v for k, v in os.environ.items() if not k.startswith("QUADRIGA_")}
    return kept | {
        "HOME": str(clone.parent),
        "QUADRIGA_CACHE": str(clone.parent / "cache"),
        "PYTHONPATH": str(ROOT / "src"),
        "COLUMNS": "120",
    }


def words(command: str) -> list[str]:
    """What is run for a command that is shown."""
    for name, stands_for in NAMES.items():
        command = re.sub(rf"(?<![\w.]){re.escape(name)}(?![\w.])", stands_for, command)
    found = shlex.split(command)
    for pattern, options in SHORTER.items():
        for option, value in options.items() if re.match(pattern, command) else ():
            if option in found:
                del found[found.index(option) : found.index(option) + 2]
            found += [option, value]
    return [sys.executable, "-m", "quadriga", *found[1:]]


@contextlib.contextmanager
def server(command: str, clone: Path) -> Iterator[None]:
    """A server as the page starts it, until it has answered and is stopped."""
    started = subprocess.Popen(words(command), cwd=clone, env=environment(clone), stderr=subprocess.DEVNULL)

    def answers() -> bool:
        assert started.poll() is None, "the server ended"
        try:
            with urllib.request.urlopen("http://127.0.0.1:8000/health") as reply:
                return reply.status == 200
        except OSError:
            return False

    try:
        assert waiting.until(answers)
        yield
    finally:
        started.send_signal(signal.SIGINT)
        assert started.wait(waiting.HANG_S) in (0, 130, -signal.SIGINT)


def forget(clone: Path, *made: str) -> None:
    """Remove what commands have written."""
    for name in made:
        shutil.rmtree(clone / name, ignore_errors=True)
        (clone / name).unlink(missing_ok=True)


@pytest.mark.slow
@pytest.mark.weights
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_command_of_a_page_runs(page: Path, clone: Path) -> None:
    forget(clone, "smol-moe", "runs", "merged", "dolly-peft", "dolly-ours", "corpora", "eval")
    with contextlib.ExitStack() as running:
        for command in commands(page):
            if elsewhere(command):
                continue
            if command.startswith("quadriga serve"):
                running.close()  # all listen at the same port
                running.enter_context(server(command, clone))
                continue
            if command.startswith(("quadriga convert", "quadriga imatrix")):
                forget(clone, "out", "out.gguf")  # a page shows many ways to write one
            run = subprocess.run(
                words(command),
                cwd=clone,
                env=environment(clone),
                input="Hello\n",
                capture_output=True,
                text=True,
                timeout=waiting.HANG_S * 3,
            )
            assert run.returncode == 0, f"{page.name}: {command}\n{run.stdout[-1500:]}\n{run.stderr[-1500:]}"
