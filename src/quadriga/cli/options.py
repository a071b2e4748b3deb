"""Options that several commands share, and what they become."""

from __future__ import annotations

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
    str, typer.Option(help="Numbers to compute in: float32, bfloat16, float16 or auto.", rich_help_panel=_MACHINE)
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


def load_model(model: str, dtype: str, device: str, threads: int | None) -> LLM:
    """Load a model with a progress bar."""
    from quadriga import runtime
    from quadriga.cli.progress import progress_bar
    from quadriga.engine.llm import load

    runtime.set_threads(threads)
    with progress_bar(f"loading {Path(model).name}") as show:
        return load(model, dtype=dtype, device=device, progress=show)


def summary(n_tokens: int, tokens_per_s: float, first_token_s: float, finish_reason: str) -> str:
    """The one line after an answer."""
    rate = f"{tokens_per_s:.1f} tok/s" if tokens_per_s else "- tok/s"
    return f"{n_tokens} tokens · {rate} · first token {first_token_s:.2f} s · {finish_reason}"


def as_json(fields: dict[str, Any]) -> str:
    """A result for programs."""
    import json

    return json.dumps(fields, ensure_ascii=False)
