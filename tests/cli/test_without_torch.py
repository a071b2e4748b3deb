"""Commands where torch cannot be imported: on a CPU they answer as the model in plain torch does, or say what to install.

A folder at the head of PYTHONPATH has a ``torch`` that is not there, for the command and for every process it starts.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx2
import numpy as np
import pytest

import quadriga
from quadriga import LLM, SamplingParams
from quadriga.engine.text_model import TextModel
from quadriga.hub import catalogue
from quadriga.io.convert import convert
from quadriga.io.safetensors import SafetensorsSource
from tests.server.conftest import command
from tests.waiting import HANG_S

ROOT = Path(__file__).parents[2]
NANO = ("--model", "quadriga-nano", "--threads", "1")
PROMPT = "The old man and the"


@pytest.fixture(scope="session")
def bare(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What is added to the environment to have no torch."""
    folder = tmp_path_factory.mktemp("no-torch")
    missing = "raise ModuleNotFoundError(\"No module named 'torch'\", name='torch')\n"
    (folder / "torch.py").write_text(missing)
    path = os.pathsep.join([str(folder), str(ROOT / "src"), os.environ.get("PYTHONPATH", "")])
    return {"PYTHONPATH": path.rstrip(os.pathsep)}


@pytest.fixture(scope="module")
def plain() -> LLM:
    """The same model in plain torch: another implementation, from the same file."""
    return quadriga.load("quadriga-nano", dtype="float32", threads=1)


def run(bare: dict[str, str], *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "quadriga", *words], env=os.environ | bare, cwd=ROOT, capture_output=True, text=True,
        timeout=HANG_S,
    )  # fmt: skip


def said(bare: dict[str, str], *words: str) -> str:
    done = run(bare, *words)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_torch_is_not_there(bare: dict[str, str]) -> None:
    done = subprocess.run([sys.executable, "-c", "import torch"], env=os.environ | bare, capture_output=True, text=True)
    assert done.returncode == 1 and "No module named 'torch'" in done.stderr


def test_generate_continues_as_plain_torch_does(bare: dict[str, str], plain: LLM) -> None:
    wanted = plain.generate(PROMPT, SamplingParams(max_new_tokens=12))
    found = json.loads(said(bare, "generate", PROMPT, *NANO, "--max-tokens", "12", "--temperature", "0", "--json"))
    assert [token["id"] for token in found["tokens"]] == wanted.token_ids
    assert [token["logprob"] for token in found["tokens"]] == pytest.approx(wanted.logprobs, abs=2e-3)
    sampled = [
        said(
            bare, "generate", PROMPT, *NANO, "--max-tokens", "12", "--top-p", "0.9", "--temperature", "1", "--seed", "1"
        )
        for _ in range(2)
    ]
    assert sampled[0] == sampled[1] != ""


def test_chat_answers_as_plain_torch_does(bare: dict[str, str], plain: LLM) -> None:
    wanted = plain.chat("The old man", SamplingParams(max_new_tokens=12)).text
    shown = said(bare, "chat", "The old man", *NANO, "--max-tokens", "12", "--temperature", "0")
    assert shown.strip() == wanted.strip() != ""


def test_serve_answers_as_plain_torch_does(bare: dict[str, str], plain: LLM) -> None:
    """With all that a request can ask of the engine, a grammar and a vector too."""
    with command("quadriga-nano", env=bare) as (url, _):

        def ask(route: str, **body: object) -> Any:
            answer = httpx2.post(f"{url}/v1/{route}", json={"model": "quadriga-nano", **body}, timeout=HANG_S)
            assert answer.status_code == 200, answer.text
            return answer.json()

        wanted = plain.generate(PROMPT, SamplingParams(max_new_tokens=12)).text
        (choice,) = ask("completions", prompt=PROMPT, max_tokens=12, temperature=0, logprobs=3)["choices"]
        assert choice["text"] == wanted and len(choice["logprobs"]["token_logprobs"]) == 12
        form = {"type": "regex", "regex": "[ab]{4}"}
        (choice,) = ask("completions", prompt=PROMPT, max_tokens=9, response_format=form)["choices"]
        assert len(choice["text"]) == 4 and set(choice["text"]) <= set("ab")
        (vector,) = ask("embeddings", input=PROMPT)["data"]
        assert np.dot(vector["embedding"], plain.embed(PROMPT)) > 0.9999


def test_convert_writes_the_same_files(bare: dict[str, str], tmp_path: Path, plain: LLM) -> None:
    said(bare, "convert", "quadriga-nano", str(tmp_path / "bare"), "--to", "hf")
    convert(catalogue.resolve("quadriga-nano"), tmp_path / "here", to="hf")
    (one,), (other,) = (sorted((tmp_path / name).glob("*.safetensors")) for name in ("bare", "here"))
    assert one.read_bytes() == other.read_bytes() and SafetensorsSource(one).tensors
    said(bare, "convert", "quadriga-nano", str(tmp_path / "packed"), "--format", "q8")
    model = str(tmp_path / "packed")
    text = said(
        bare, "generate", PROMPT, "--model", model, "--max-tokens", "12", "--temperature", "0", "--threads", "1"
    )
    assert text.strip() == plain.generate(PROMPT, SamplingParams(max_new_tokens=12)).text.strip()


def test_eval_scores_as_plain_torch_does(bare: dict[str, str], plain: LLM, tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [
        {"query": f"The {who} went to the", "choices": ["sea", "house of the king", "quickly"], "gold": i % 3}
        for i, who in enumerate(("old man", "king", "girl", "dog", "ship"))
    ]
    (tmp_path / "mine.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    shown = said(bare, "eval", *NANO, "--tasks", str(tmp_path / "mine.jsonl"), "--out", str(tmp_path / "out"), "--json")
    assert json.loads(shown)
    _, *items = map(json.loads, (tmp_path / "out/items/mine.jsonl.jsonl").read_text().splitlines())
    model = TextModel(plain)
    for item, row in zip(items, rows, strict=True):
        scored = model.loglikelihoods([(row["query"], f" {choice}") for choice in row["choices"]])
        assert item["scores"]["acc"] == float(np.argmax([one.logprob for one in scored]) == row["gold"])


@pytest.mark.parametrize(
    ("words", "extra"),
    [
        (("train", "recipes/nano.toml"), "train"),
        (("tune", "recipes/tune/dolly.toml"), "train"),
        (("convert", "quadriga-nano", "never-written", "--format", "q4", "--calibrate", "README.md"), "torch"),
        (("generate", "x", *NANO, "--dtype", "float32"), "torch"),
        (("chat", "x", *NANO, "--device", "cuda"), "torch"),
    ],
    ids=["train", "tune", "calibrating", "a dtype", "a GPU"],
)
def test_what_needs_torch_says_in_one_line_what_to_install(
    bare: dict[str, str], words: tuple[str, ...], extra: str
) -> None:
    done = run(bare, *words)
    assert done.returncode == 1 and done.stdout == ""
    (line,) = done.stderr.strip().splitlines()
    assert "needs torch, which is not installed" in line and f"pip install '.[{extra}]' in a clone" in line


def test_a_device_that_is_chosen_here_is_the_cpu(bare: dict[str, str], plain: LLM) -> None:
    shown = said(bare, "generate", PROMPT, *NANO, "--device", "auto", "--max-tokens", "4", "--temperature", "0")
    assert shown.strip() == plain.generate(PROMPT, SamplingParams(max_new_tokens=4)).text.strip()
