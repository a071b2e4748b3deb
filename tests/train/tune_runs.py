"""Small tuning runs for the tests: a tiny mixture with a vocabulary, rows of questions, a TOML file."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from quadriga.nn.transformer import random_parameters
from quadriga.train.config import parse_toml
from quadriga.train.tune_config import TuneConfig
from tests.checkpoint.models import TINY, write_hf
from tests.text.vocabularies import write_bpe

FACTS = [("sky", "blue"), ("grass", "green"), ("coal", "black"), ("snow", "white")]

DENSE_LORA = '[lora]\nrank = 4\nalpha = 8.0\ntargets = ["attention", "ffn", "embeddings", "head"]\n'
LORA = '[lora]\nrank = 4\nalpha = 8.0\ntargets = ["attention", "experts", "router"]\n'


def write_base(folder: Path, std: float = 0.05, *, dense: bool = False) -> Path:
    """A tiny Mixtral of 6 experts, or a dense Llama, with random weights and a vocabulary of 448."""
    config = replace(TINY["llama2" if dense else "mixtral"], vocab_size=448, max_seq_len=96, eos_ids=(2,))
    config = config if dense else config.with_ffn(n_experts=6)
    write_hf(folder, config, parameters=random_parameters(config, std=std))
    write_bpe(folder, eos_token="<|im_end|>")
    return folder


def rows(path: Path, objective: str) -> Path:
    """24 rows for an objective, and a broken line."""
    made = []
    for thing, colour in FACTS * 6:
        question, wrong = f"Colour of {thing}?", FACTS[(len(made) + 1) % 4][1]
        match objective:
            case "text":
                made.append({"text": f"{thing} is {colour}. " * 4, "domain": "a" if thing < "m" else "b"})
            case "dpo" | "orpo":
                made.append({"prompt": question, "chosen": colour, "rejected": wrong + "!"})
            case "grpo":
                made.append({"prompt": f"Colour {len(made)} of {thing}?", "response": colour})
            case _:
                made.append({"prompt": question, "response": colour})
    path.write_text("\n".join(json.dumps(row) for row in made) + "\nbroken\n")
    return path


def toml(folder: Path, base: Path, objective: str, extra: str = "", run: str = "run") -> str:
    """A run of 12 steps, evaluated at both ends."""
    return f"""
run = "{folder / run}"
model = "{base}"
objective = "{objective}"
[data]
files = ["{rows(folder / "rows.jsonl", objective)}"]
held_out_every = 6
seq_len = 64
rows = 2
{'label = "domain"' if objective == "text" else ""}
[schedule]
steps = 12
warmup_steps = 1
[optimiser]
learning_rate = 2e-2
weight_decay = 0.0
[evaluate]
every = 12
[log]
report = false
{extra}
"""


def settings(*args: Any, **kwargs: Any) -> TuneConfig:
    """:func:`toml`, read."""
    return parse_toml(toml(*args, **kwargs).encode(), TuneConfig)
