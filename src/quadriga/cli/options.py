"""Options that several commands share, stated once: the same name means the same in every command.

What differs between commands is the default; where it is not a plain value, the command's own text says what it is.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from quadriga.engine.llm import LLM
    from quadriga.engine.load_options import LoadOptions
    from quadriga.engine.request import SamplingParams
    from quadriga.io.suggested import Suggested

_SAMPLING = "Sampling"
_MACHINE = "Model and machine"
_RESULT = "Result"
_REMOTE = "A model behind an address"

_MODEL_HELP = "A catalogue name, hf:ORG/REPO (of GGUF files: hf:ORG/REPO:Q4_K_M), ollama:NAME, a directory, a GGUF file"

# A model and how it runs ---------------------------------------------------------------------------------------------

Model = Annotated[str, typer.Option("--model", "-m", help=f"{_MODEL_HELP}.", rich_help_panel=_MACHINE)]
ModelArguments = Annotated[
    list[str] | None,
    typer.Argument(metavar="MODEL...", help=f"{_MODEL_HELP}; also as --model."),
]
ModelArgument = Annotated[str, typer.Argument(metavar="MODEL", help=f"{_MODEL_HELP}; also as --model.")]
Format = Annotated[
    str | None,
    typer.Option(
        help="Pack weights for kernels: keep (as they are stored), float32, bfloat16, q8, q4, q4m, q5, q5m, mx4, or "
        "GGUF's q2k to q6k, iq4nl or iq4xs.",
        rich_help_panel=_MACHINE,
    ),
]
Dtype = Annotated[
    str | None,
    typer.Option(
        help="Weights as plain numbers instead: float32, bfloat16, float16; a model then runs on torch.",
        rich_help_panel=_MACHINE,
    ),
]
Activations = Annotated[
    str | None,
    typer.Option(
        help="What quantised weights are multiplied with: int8, int16 or auto, which is the default.",
        rich_help_panel=_MACHINE,
    ),
]
KVFormat = Annotated[
    str | None,
    typer.Option(
        "--kv-format",
        help="The kernels' cache of keys and values: bfloat16, q8 or float32.",
        rich_help_panel=_MACHINE,
    ),
]
KVMemory = Annotated[
    str | None,
    typer.Option(
        "--kv-memory",
        help="Memory for keys and values, e.g. 4GB; default: 4 contexts, at most a quarter of what is free.",
        rich_help_panel=_MACHINE,
    ),
]
ExpertMemory = Annotated[
    str | None,
    typer.Option(
        help="Leave experts on disk, at most this much of them in memory, e.g. 12GB (packed directories).",
        rich_help_panel=_MACHINE,
    ),
]
Device = Annotated[str, typer.Option(help="cpu, cuda, cuda:1 or auto.", rich_help_panel=_MACHINE)]
Threads = Annotated[
    int | None,
    typer.Option(min=1, max=1024, help="CPU threads of each process; default: all.", rich_help_panel=_MACHINE),
]

Parallel = Annotated[
    str | None,
    typer.Option(
        help="Share the model among the processes of torchrun, e.g. tp=2 or tp=2,ep=2,pp=3; memory is of each.",
        rich_help_panel=_MACHINE,
    ),
]

Ray = Annotated[
    str | None,
    typer.Option(help="Work on this Ray cluster (auto, HOST:PORT, local); needs the extra cluster."),
]

# Answers -------------------------------------------------------------------------------------------------------------

System = Annotated[str | None, typer.Option(help="System prompt.")]
MaxTokens = Annotated[
    int, typer.Option("--max-tokens", "--max-new-tokens", help="Longest answer, in tokens.", rich_help_panel=_SAMPLING)
]
Temperature = Annotated[
    float | None, typer.Option(help="0 takes the most probable token; 1 samples.", rich_help_panel=_SAMPLING)
]
TopK = Annotated[int | None, typer.Option(help="Sample among the k best; 0: all.", rich_help_panel=_SAMPLING)]
TopP = Annotated[float | None, typer.Option(help="Sample within this much probability.", rich_help_panel=_SAMPLING)]
MinP = Annotated[
    float | None,
    typer.Option(help="Drop tokens below this share of the best's probability.", rich_help_panel=_SAMPLING),
]
RepetitionPenalty = Annotated[
    float | None, typer.Option(help="Above 1 disfavours tokens seen in prompt or answer.", rich_help_panel=_SAMPLING)
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
Seed = Annotated[
    int | None,
    typer.Option(
        min=0, max=2**63 - 1, help="Of what is drawn at random: same seed, same result.", rich_help_panel=_SAMPLING
    ),
]
Speculate = Annotated[
    int,
    typer.Option(
        help="Guess this many tokens a step from what was said before; the answer stays the same.",
        rich_help_panel=_SAMPLING,
    ),
]

# A model that is written ---------------------------------------------------------------------------------------------

_OUT = typer.Argument(help="What to make; must not exist yet.")
Out = Annotated[Path, _OUT]
OutOrNone = Annotated[Path | None, _OUT]
AdapterFolder = Annotated[Path, typer.Argument(help="The adapter's folder, ours or peft's.")]
_TO = typer.Option("--to", help="quadriga, hf (safetensors) or gguf.", rich_help_panel=_RESULT)
To = Annotated[str, _TO]
ToOrNone = Annotated[str | None, _TO]
Layout = Annotated[
    str | None, typer.Option(help="With hf: one of the family's Hugging Face layouts.", rich_help_panel=_RESULT)
]


# Judges ---------------------------------------------------------------------------------------------------------------

Judge = Annotated[
    str | None,
    typer.Option(
        help="Who grades answers: a chat API's address, or a model here. The API's key is QUADRIGA_API_KEY.",
        rich_help_panel=_REMOTE,
    ),
]
RunA = Annotated[Path, typer.Argument(help="Folder that `quadriga eval` wrote.")]
RunB = Annotated[Path, typer.Argument(help="Another, of the same tasks.")]
JudgeModel = Annotated[str | None, typer.Option(help="The judge's name in its API.", rich_help_panel=_REMOTE)]

# The launch's claims -------------------------------------------------------------------------------------------------

ClaimArgument = Annotated[str, typer.Argument(metavar="CLAIM", help="A name that `quadriga claims` lists.")]
ClaimRuns = Annotated[Path, typer.Option("--runs", help="Folder of the claims' runs; each has its own in it.")]


def gguf_format(name: str | None) -> str | None:
    """A format's name as llama.cpp's users write it (Q4_K_M, F16, BF16), as we do."""
    if name is None:
        return None
    return {"f32": "float32", "f16": "float16", "bf16": "bfloat16"}.get(name.lower(), name.lower())


GGUFFormat = Annotated[
    str | None,
    typer.Option(
        "--gguf-format",
        callback=gguf_format,
        help="With --to gguf: float32, float16, bfloat16 (default), q8_0, q4_0, q4_1, q5_0, q5_1, q2_k to q6_k, "
        "iq4_nl, iq4_xs, mxfp4 or llama.cpp's mixtures q3_k_s, _m, _l, q4_k_s, _m, q5_k_s, _m; Q4_K_M, F16, BF16 too.",
        rich_help_panel=_RESULT,
    ),
]
CALIBRATE = typer.Option(
    help="A text like those to come: what the model does on it weighs what is kept. Or, for convert, an importance "
    "matrix (imatrix) of llama.cpp."
)
"""Required in some commands."""
Calibrate = Annotated[Path | None, CALIBRATE]
CalibrateTokens = Annotated[
    int, typer.Option("--calibrate-tokens", min=1, max=10**8, help="How many tokens of that text are read.")
]
Experts = Annotated[int, typer.Option(min=1, max=2**20, help="Experts of each layer in the result.")]
Granules = Annotated[
    int | None,
    typer.Option(min=1, max=2**20, help="Parts the dense network is cut into; default: the experts a token visits."),
]

# Results and runs ----------------------------------------------------------------------------------------------------

OUT = typer.Option("--out", "-o", help="Folder of what is written.")
"""Required in some commands."""
OutFolder = Annotated[Path | None, OUT]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of text.")]
Csv = Annotated[Path | None, typer.Option("--csv", help="Write the rows to this file.")]
Picture = Annotated[
    Path | None, typer.Option(help="Draw the result into this file; its ending says how: .svg (or .png).")
]
Restart = Annotated[bool, typer.Option("--restart", help="Forget what an earlier run left, and begin again.")]
Run = Annotated[
    str | None,
    typer.Option(
        "--run-folder", "--run", help="Another folder than the file's; torchrun takes --run for one of its own options."
    ),
]
Verify = Annotated[
    bool,
    typer.Option(
        "--verify",
        help="Check what is shown: a corpus's files by their sha256, a plan's rows by the trainer, which needs torch.",
    ),
]
AllowChange = Annotated[
    bool,
    typer.Option(
        "--allow-change",
        help="Resume with settings that would have changed the run so far; without it they are listed and refused.",
    ),
]
Rounds = Annotated[int, typer.Option(min=1, max=10**6, help="Measurements; the median counts.")]
Counts = Annotated[
    list[int] | None,
    typer.Option(
        "--n",
        "--count",  # torchrun takes --n for one of its own options
        min=1,
        max=2**31 - 1,
        help="Tokens made, prompt tokens, sequences at once or positions in the cache; may be repeated.",
    ),
]
Context = Annotated[int | None, typer.Option(min=1, max=2**31 - 1, help="Positions of a sequence to plan for.")]
Tokens = Annotated[str, typer.Option(help="Tokens to train on, e.g. 12T.")]
TextField = Annotated[str, typer.Option(help="Field of the text, for inputs that are no recipe.")]
DOMAIN_FIELD = typer.Option(help="Field that names each row's domain.")
Domain = Annotated[str | None, typer.Option(help="Name of a domain of text.")]

# Interfaces ----------------------------------------------------------------------------------------------------------

APIModel = Annotated[
    str | None,
    typer.Option(
        "--api-model", help="What the interface calls the model; default: its first.", rich_help_panel=_REMOTE
    ),
]
_API_KEY = typer.Option("--api-key", help="Key of the interface, sent as a bearer token.", rich_help_panel=_REMOTE)
APIKey = Annotated[str | None, _API_KEY]
APIKeys = Annotated[list[str] | None, _API_KEY]
_CONCURRENCY = typer.Option("--concurrency", "-c", min=1, max=10_000, help="Requests at once.", rich_help_panel=_REMOTE)
Concurrency = Annotated[int, _CONCURRENCY]
Concurrencies = Annotated[list[int] | None, _CONCURRENCY]

_LOAD, _REQUESTS = "Load", "Requests"
Requests = Annotated[
    int, typer.Option(help="Requests of each level; 0: 4 for each client, at least 16.", rich_help_panel=_LOAD)
]
Timeout = Annotated[float, typer.Option(help="Seconds an answer may take.", rich_help_panel=_LOAD)]
PromptTokens = Annotated[int, typer.Option(help="Length of the prompts.", rich_help_panel=_REQUESTS)]
Completions = Annotated[
    bool,
    typer.Option("--completions", help="/completions instead of /chat/completions.", rich_help_panel=_REQUESTS),
]


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


def size(text: str, option: str = "a size") -> int:
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
        raise ConfigError(f"{option} must be a size like 20GB or 512MiB, got {text!r}") from None


def text_of(path: Path, option: str) -> str:
    """What a text file holds.

    Raises:
        ConfigError: it cannot be read, or is not UTF-8.
    """
    from quadriga.errors import ConfigError

    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{option} must be a UTF-8 text file: {error}") from None


def require_picture(path: Path | None, endings: tuple[str, ...] = (".svg", ".png")) -> None:
    """Refuse a picture's file whose ending names no kind that can be drawn.

    Raises:
        ConfigError: naming the option.
    """
    from quadriga.errors import ConfigError

    if path is not None and path.suffix not in endings:
        raise ConfigError(f"--picture must be a file that ends in {' or '.join(endings)}, got {path.name!r}")


def load_options(*, kv_memory: str | None = None, expert_memory: str | None = None, **others: Any) -> LoadOptions:
    """How a model is loaded, as a command line says it, checked before anything is fetched or read.

    Args:
        kv_memory, expert_memory: sizes such as 4GB.
        others: the other fields of ``LoadOptions``.

    Raises:
        ConfigError: an option that cannot be, or that would have no effect.
        HardwareError: a device that is not there.
    """
    from quadriga.engine.load_options import LoadOptions
    from quadriga.option_rules import as_flag

    options = LoadOptions(
        kv_memory=None if kv_memory is None else size(kv_memory, "--kv-memory"),
        expert_memory=None if expert_memory is None else size(expert_memory, "--expert-memory"),
        **others,
    )
    options.check(as_flag)
    return options


def sampling(
    *,
    max_tokens: int,
    temperature: float | None,
    top_k: int | None,
    top_p: float | None,
    min_p: float | None,
    repetition_penalty: float | None,
    logit_bias: list[str] | None,
    stop: list[str] | None,
    **others: Any,
) -> SamplingParams:
    """How an answer is drawn, as a command line says it, where None is an option that was not given.

    Args:
        others: the fields of ``SamplingParams`` that are written as they are.

    Raises:
        RequestError: a value that cannot be.
    """
    from quadriga.engine.request import SamplingParams

    return SamplingParams(
        max_new_tokens=max_tokens,
        temperature=temperature or 0.0,
        top_k=top_k or 0,
        top_p=1.0 if top_p is None else top_p,
        min_p=min_p or 0.0,
        repetition_penalty=1.0 if repetition_penalty is None else repetition_penalty,
        logit_bias=biases(logit_bias),
        stop=stops(stop),
        **others,
    )


def as_suggested(params: SamplingParams, suggested: Suggested, given: Iterable[str]) -> SamplingParams:
    """Sampling with what the model's makers suggest for all that was not given.

    Args:
        given: names of the options that were typed.
    """
    from dataclasses import asdict, replace

    return replace(params, **{name: value for name, value in asdict(suggested).items() if name not in set(given)})


def load_model(model: str, options: LoadOptions) -> LLM:
    """Load a model with a progress bar."""
    from dataclasses import asdict

    from quadriga import runtime
    from quadriga.cli.progress import progress_bar
    from quadriga.engine.load import load

    if options.parallel is not None and runtime.follows():
        return load(model, **asdict(options))
    with progress_bar(f"loading {Path(model).name}") as show:
        return load(model, **asdict(options), progress=show)


def follow_if_rank(model: str, how: LoadOptions) -> None:
    """On every rank but the first: load a part of the model and take part in what the first rank does, to its end.

    To be called before anything that one process alone may do: reading standard input, listening at a port.
    """
    from quadriga import runtime

    if how.parallel is not None and runtime.follows():
        load_model(model, how)


def summary(n_tokens: int, tokens_per_s: float, first_token_s: float, finish_reason: str) -> str:
    """The one line after an answer."""
    rate = f"{tokens_per_s:.1f} tok/s" if tokens_per_s else "- tok/s"
    return f"{n_tokens} tokens · {rate} · first token {first_token_s:.2f} s · {finish_reason}"


def as_json(fields: dict[str, Any]) -> str:
    """A result for programs."""
    import json

    return json.dumps(fields, ensure_ascii=False)
