"""Options that several commands share, and what they become."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from quadriga.engine.llm import LLM

_SAMPLING = "Sampling"
_MACHINE = "Model and machine"

Model = Annotated[
    str,
    typer.Option("--model", "-m", help="Catalogue name, hf:ORG/REPO, or a path.", rich_help_panel=_MACHINE),
]
Dtype = Annotated[
    str | None,
    typer.Option(
        help="Compute in plain torch with float32, bfloat16, float16 or auto; default: the CPU's own kernels.",
        rich_help_panel=_MACHINE,
    ),
]
Format = Annotated[
    str,
    typer.Option(
        help="What the kernels hold weights as: keep (as stored), bfloat16, q8, q4, q4m or float32.",
        rich_help_panel=_MACHINE,
    ),
]
Activations = Annotated[
    str, typer.Option(help="What quantised weights are multiplied with: int8, int16, auto.", rich_help_panel=_MACHINE)
]
KVFormat = Annotated[
    str, typer.Option("--kv-format", help="The cache: bfloat16, q8 or float32.", rich_help_panel=_MACHINE)
]
ExpertMemory = Annotated[
    str | None,
    typer.Option(
        help="Leave experts on disk, at most this much of them in memory, e.g. 12GB (packed directories).",
        rich_help_panel=_MACHINE,
    ),
]
Speculate = Annotated[
    int,
    typer.Option(
        help="Guess this many tokens a step from what was said before; the answer stays the same.",
        rich_help_panel=_SAMPLING,
    ),
]
Device = Annotated[str, typer.Option(help="cpu, cuda, cuda:1 or auto.", rich_help_panel=_MACHINE)]
Threads = Annotated[int | None, typer.Option(help="CPU threads; default: all.", rich_help_panel=_MACHINE)]
MaxTokens = Annotated[
    int, typer.Option("--max-tokens", "--max-new-tokens", help="Longest answer.", rich_help_panel=_SAMPLING)
]
Temperature = Annotated[
    float, typer.Option(help="0 takes the most probable token; 1 samples.", rich_help_panel=_SAMPLING)
]
TopK = Annotated[int, typer.Option(help="Sample among the k best; 0: all.", rich_help_panel=_SAMPLING)]
TopP = Annotated[float, typer.Option(help="Sample within this much probability.", rich_help_panel=_SAMPLING)]
MinP = Annotated[
    float, typer.Option(help="Drop tokens below this share of the best's probability.", rich_help_panel=_SAMPLING)
]
RepetitionPenalty = Annotated[
    float, typer.Option(help="Above 1 disfavours tokens seen in prompt or answer.", rich_help_panel=_SAMPLING)
]
PresencePenalty = Annotated[float, typer.Option(help="Disfavours tokens in the answer.", rich_help_panel=_SAMPLING)]
FrequencyPenalty = Annotated[
    float, typer.Option(help="Disfavours tokens by their count in the answer.", rich_help_panel=_SAMPLING)
]
LogitBias = Annotated[list[str] | None, typer.Option(help="TOKEN_ID=BIAS, may be repeated.", rich_help_panel=_SAMPLING)]
Stop = Annotated[
    list[str] | None,
    typer.Option(
        help="End the answer before this text; may be repeated. \\n is a new line.", rich_help_panel=_SAMPLING
    ),
]
Seed = Annotated[int | None, typer.Option(help="Same seed, same answer.", rich_help_panel=_SAMPLING)]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of text.")]


def stops(values: list[str] | None) -> tuple[str, ...]:
    """Stop strings as typed on a command line, where a new line is written \\n."""
    return tuple(value.replace("\\n", "\n").replace("\\t", "\t") for value in values or ())


def biases(values: list[str] | None) -> dict[int, float]:
    """TOKEN_ID=BIAS pairs as a table."""
    from quadriga.errors import RequestError

    table: dict[int, float] = {}
    for value in values or ():
        token, _, bias = value.partition("=")
        try:
            table[int(token)] = float(bias)
        except ValueError:
            raise RequestError(f"--logit-bias takes TOKEN_ID=BIAS, e.g. 42=-5; got {value!r}") from None
    return table


def size(text: str) -> int:
    """Bytes from "20GB", "512 MiB", "1e9"."""
    from quadriga.errors import ConfigError

    units = {"": 1, "b": 1, "k": 1e3, "kb": 1e3, "m": 1e6, "mb": 1e6, "g": 1e9, "gb": 1e9, "t": 1e12, "tb": 1e12}
    units |= {"kib": 2**10, "mib": 2**20, "gib": 2**30, "tib": 2**40}
    match = re.fullmatch(r"\s*([0-9.]+(?:e[0-9]+)?)\s*([a-z]*)\s*", text.lower())
    try:
        if match is None or match[2] not in units:
            raise ValueError
        return int(float(match[1]) * units[match[2]])
    except (ValueError, OverflowError):
        raise ConfigError(f"a size looks like 20GB or 512MiB, got {text!r}") from None


def load_model(
    model: str,
    dtype: str | None,
    device: str,
    threads: int | None,
    *,
    format: str = "keep",
    activations: str = "auto",
    kv_format: str = "bfloat16",
    kv_memory: str | None = None,
    expert_memory: str | None = None,
    max_sequences: int = 64,
    max_batch_tokens: int = 2048,
) -> LLM:
    """Load a model with a progress bar."""
    from quadriga.cli.progress import progress_bar
    from quadriga.engine.llm import load

    with progress_bar(f"loading {Path(model).name}") as show:
        return load(
            model,
            dtype=dtype,
            device=device,
            threads=threads,
            format=format,
            activations=activations,
            kv_format=kv_format,
            kv_memory=None if kv_memory is None else size(kv_memory),
            expert_memory=None if expert_memory is None else size(expert_memory),
            max_sequences=max_sequences,
            max_batch_tokens=max_batch_tokens,
            progress=show,
        )


def summary(n_tokens: int, tokens_per_s: float, first_token_s: float, finish_reason: str) -> str:
    """The one line after an answer."""
    rate = f"{tokens_per_s:.1f} tok/s" if tokens_per_s else "- tok/s"
    return f"{n_tokens} tokens · {rate} · first token {first_token_s:.2f} s · {finish_reason}"


def as_json(fields: dict[str, Any]) -> str:
    """A result for programs."""
    import json

    return json.dumps(fields, ensure_ascii=False)
