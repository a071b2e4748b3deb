"""The ``quadriga`` command: parse, call, print.

Each command lives in a module of this package and imports what it needs inside its function, so that ``--help`` and the
commands that only compute stay quick: nothing here imports torch, prompt_toolkit or huggingface_hub when it is loaded.
"""

from __future__ import annotations

import os
import sys
from typing import Annotated

import typer

from quadriga import __version__, runtime
from quadriga.cli.bench import bench_app
from quadriga.cli.chat import chat_command
from quadriga.cli.claims import claims_app
from quadriga.cli.command import Commands
from quadriga.cli.compare import compare_command
from quadriga.cli.convert import convert_command
from quadriga.cli.data import data_app
from quadriga.cli.diff import diff_command
from quadriga.cli.divergence import divergence_command
from quadriga.cli.eval import eval_command
from quadriga.cli.experts import experts_app
from quadriga.cli.generate import generate_command
from quadriga.cli.imatrix import imatrix_command
from quadriga.cli.info import info_command
from quadriga.cli.judge import judge_command
from quadriga.cli.models import (
    list_command,
    models_app,
    ps_command,
    pull_command,
    remove_command,
    run_command,
    show_command,
)
from quadriga.cli.plan import plan_command
from quadriga.cli.serve import serve_command
from quadriga.cli.train import train_command
from quadriga.cli.tune import adapter_app, tune_command
from quadriga.cli.upcycle import merge_experts_command, prune_command, upcycle_command
from quadriga.errors import InputError, QuadrigaError

app = Commands(
    name="quadriga",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    suggest_commands=True,
    help="An open DBRX: run and look inside fine-grained mixture-of-experts language models.",
    epilog='Start with:  quadriga chat "What is the capital of France?"',
)


def _example(*lines: str) -> str:
    return "Examples:\n\n" + "\n\n".join(f"  {line}" for line in lines)


app.command(
    "chat",
    epilog=_example(
        'quadriga chat "What is the capital of France?"',
        "quadriga chat                                   a conversation; /help lists its commands",
        "cat notes.txt | quadriga chat --system 'Summarise in one sentence.'",
        "quadriga chat --model ./my-model --temperature 0.7 --seed 1",
        "quadriga chat --url http://127.0.0.1:8000          with a server that runs already",
    ),
)(chat_command)
app.command(
    "generate",
    epilog=_example(
        'quadriga generate "The capital of France is" --max-tokens 20',
        'quadriga generate "def fib(n):" --stop "\\n\\n" --json',
    ),
)(generate_command)
app.command(
    "serve",
    epilog=_example(
        "quadriga serve                                 the default model, on this machine only",
        "quadriga serve dbrx-q4 --port 9000 --kv-memory 8GB",
        "quadriga serve dbrx-q4 --host 0.0.0.0 --allow-host llm.example.org --api-key $KEY",
    ),
)(serve_command)
app.command(
    "convert",
    epilog=_example(
        "quadriga convert dbrx-instruct dbrx-q4 --format q4     packed for the CPU: loads in a second",
        "quadriga convert dbrx-instruct dbrx-mix --budget 70GB --calibrate sample.txt",
        "quadriga convert model.gguf out-hf --to hf",
        "quadriga convert dbrx-instruct dbrx.gguf --to gguf --gguf-format q8_0",
        "quadriga convert dbrx-instruct dbrx-split --to hf --layout split",
        "quadriga convert dbrx-instruct --dry-run        needs config.json and the index only",
    ),
)(convert_command)
app.command(
    "imatrix",
    epilog=_example(
        "quadriga imatrix dbrx-instruct dbrx.imatrix.gguf --calibrate sample.txt",
        "quadriga convert dbrx-instruct dbrx.gguf --to gguf --gguf-format q4_k_m --calibrate dbrx.imatrix.gguf",
    ),
)(imatrix_command)
app.command(
    "train",
    epilog=_example(
        "quadriga train recipes/nano.toml                 the same command goes on after an interruption",
        "torchrun --nproc-per-node 2 -m quadriga train recipes/nano.toml --threads 1",
        "quadriga train recipes/nano.toml --export nano   the newest checkpoint as a Hugging Face directory",
    ),
)(train_command)
app.command(
    "tune",
    epilog=_example(
        "quadriga tune recipes/tune/dolly.toml                 an adapter on Dolly's answers",
        "quadriga tune recipes/tune/dpo.toml --steps 20        a short try",
    ),
)(tune_command)
app.add_typer(adapter_app, name="adapter")
app.command(
    "upcycle",
    epilog=_example(
        "quadriga upcycle smollm2-135m-instruct smol-moe                    16 experts, 4 at work, the same function",
        "quadriga upcycle smollm2-135m-instruct smol-moe --router-text mix.jsonl --router-label lang",
        "quadriga upcycle ./llama ./moe --experts 8 --experts-per-token 2 --granules 1 --drop 0.5 --to hf",
    ),
)(upcycle_command)
app.command("prune", epilog=_example("quadriga prune smol-moe smaller --experts 12 --calibrate sample.txt"))(
    prune_command
)
app.command("merge-experts", epilog=_example("quadriga merge-experts smol-moe dense --calibrate sample.txt --to hf"))(
    merge_experts_command
)
app.command(
    "eval",
    epilog=_example(
        "quadriga eval                                  the tasks there are, each with its protocol",
        "quadriga eval --tasks hellaswag,mmlu --limit 200",
        "quadriga eval --tasks leaderboard --model dbrx-q4 --picture dbrx.svg",
        "quadriga eval --tasks gauntlet --out runs/gauntlet     killed, the same command goes on",
        "quadriga eval --tasks humaneval --samples 20 --k 1 --k 10",
        "quadriga eval --tasks my-questions.jsonl --shots 3",
        "quadriga eval --tasks gsm8k --model https://api.example.org/v1 --api-model gpt-4 --chat",
    ),
)(eval_command)
app.command(
    "compare",
    epilog=_example(
        "quadriga compare                               the launch's table: DBRX, Mixtral, LLaMA2, Grok-1",
        "quadriga compare eval/dbrx-q4 --picture table.svg",
        "quadriga compare --table closed --markdown runs/a runs/b",
    ),
)(compare_command)
app.command(
    "diff",
    epilog=_example(
        "quadriga diff eval/float32 eval/q4             which items flipped, and p of the paired sign test",
        "quadriga diff runs/a runs/b --json             with both runs' logs of each such item",
    ),
)(diff_command)
app.command(
    "divergence",
    epilog=_example(
        "quadriga divergence smollm2-135m-instruct smollm2-135m-instruct --format q4",
        "quadriga divergence ./bf16 model.gguf --document-file mine.txt --windows 100",
    ),
)(divergence_command)
app.command(
    "judge",
    epilog=_example(
        "quadriga judge eval/a eval/b --judge https://api.example.org/v1 --judge-model gpt-4",
        "quadriga judge eval/a eval/b --judge smollm2-135m-instruct --task gsm8k",
    ),
)(judge_command)
app.command(
    "info",
    epilog=_example(
        "quadriga info dbrx-132b", "quadriga info model.gguf --json", "quadriga info grok-1 --context 4096"
    ),
)(info_command)
for _name, _command in (("ls", list_command), ("show", show_command), ("rm", remove_command)):
    app.command(_name, rich_help_panel="Short for `quadriga models`")(_command)
app.command(
    "run",
    epilog=_example('quadriga run quadriga-nano "The capital of France is"', "quadriga run hf:ORG/REPO"),
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
)(run_command)
app.command(
    "ps",
    epilog=_example("quadriga ps", "quadriga ps --url http://10.0.0.5:8000 --api-key $KEY"),
)(ps_command)
app.command(
    "pull",
    epilog=_example(
        "quadriga pull smollm2-135m-instruct",
        "quadriga pull hf:Qwen/Qwen3-30B-A3B@main",
        "quadriga pull hf:unsloth/Qwen3-30B-A3B-GGUF:Q4_K_M",
    ),
)(pull_command)
app.command(
    "plan",
    epilog=_example(
        "quadriga plan dbrx-132b --gpus 3072xH100 --tokens 12T",
        "quadriga plan mixtral-8x7b --gpus 64xH100 --tokens 300B --picture plan.svg",
        "quadriga plan dbrx-132b --context 32768            serving only",
    ),
)(plan_command)
app.add_typer(models_app, name="models")
app.add_typer(bench_app, name="bench")
app.add_typer(claims_app, name="claims")
app.add_typer(data_app, name="data")
app.add_typer(experts_app, name="experts")


def _show_version(wanted: bool) -> None:
    if wanted:
        print(f"quadriga {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit.")
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks of errors.")] = False,
) -> None:
    if debug:
        runtime.set_debug()


def main() -> None:
    """Run the command line; errors of ours become one line on stderr and exit code 2 (bad input) or 1."""
    try:
        runtime.start_logging()
        app()
    except ModuleNotFoundError as error:
        if error.name != "torch" or runtime.debug():
            raise
        command = next((word for word in sys.argv[1:] if not word.startswith("-")), "")
        extra = "train" if command in ("train", "tune") else "torch"
        print(f"error: {runtime.without_torch(f'quadriga {command} as asked for', extra)}", file=sys.stderr)
        sys.exit(1)
    except QuadrigaError as error:
        if runtime.debug():
            raise
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2 if isinstance(error, InputError) else 1)
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:
        # The reader of our output left (`| head`). Python would complain once more when it flushes stdout at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
    except OSError as error:
        if runtime.debug() or error.filename is None:
            raise
        print(f"error: {error.filename} cannot be used: {error.strerror}", file=sys.stderr)
        sys.exit(2)
