"""``quadriga divergence``: a model's predictions beside a baseline's, token by token."""

from __future__ import annotations

import hashlib
import sys
from pathlib import Path
from typing import Annotated

import typer

from quadriga.cli import options


def divergence_command(
    base: Annotated[str, typer.Argument(metavar="BASE", help="The model that is right by definition; in float32.")],
    other: Annotated[str, typer.Argument(metavar="MODEL", help="The model that is compared with it.")],
    format: options.Format = None,
    threads: options.Threads = None,
    document: Annotated[
        Path | None, typer.Option("--document-file", help="The text; default: WikiText-2's test text.")
    ] = None,
    window: Annotated[int, typer.Option(min=4, help="Tokens that are read at once, half of them scored.")] = 512,
    windows: Annotated[int, typer.Option(min=1, help="Windows of the text that are read at most.")] = 16,
    out: options.OutFolder = None,
    json: options.Json = False,
) -> None:
    """Perplexity of both, KL divergence, changes of probability, and how often both would choose the same token.

    --format packs MODEL only. The figures are llama-perplexity's; a killed run goes on with the same command.
    """
    from quadriga.cli.eval import print_table
    from quadriga.cli.progress import progress_count
    from quadriga.engine.llm import LLM
    from quadriga.engine.text_model import TextModel
    from quadriga.errors import EvaluationError
    from quadriga.evaluate import divergence
    from quadriga.evaluate.data import Data

    data = Data()
    text = data.text("wikitext2/test.txt") if document is None else options.text_of(document, "--document-file")
    models: list[LLM] = []
    for name, packed in ((base, "float32"), (other, format)):
        how = options.load_options(format=packed, threads=threads)
        models.append(options.load_model(name, how))
    ids = [model.tokenizer.encode(text) if model.tokenizer is not None else [] for model in models]
    if ids[0] != ids[1] or not ids[0]:
        raise EvaluationError(f"{base} and {other} must cut the text into the same tokens: their vocabularies differ")
    tokens = ids[0][: window * windows]
    question = {
        "base": TextModel(models[0], options={"format": "float32"}).identity,
        "model": TextModel(models[1], options={"format": format or "keep"}).identity,
        "text": hashlib.sha256(text.encode()).hexdigest()[:16],
    }
    folder = out or Path("eval") / f"{Path(other).name}-{format or 'keep'}-divergence"
    with progress_count("divergence") as show:
        found = divergence.compare(
            models[0].logits, models[1].logits, tokens, window=window, out=folder, question=question, progress=show
        )
    if json:
        figures = {name: {"value": value, "stderr": error} for name, (value, error) in found.figures.items()}
        print(options.as_json({"tokens": found.n, "figures": figures}))
        return
    rows: list[tuple[str, ...]] = [("figure", f"{other} beside {base}, {found.n} tokens")]
    for name, (value, error) in found.figures.items():
        rows.append((name, f"{value:.5g}" + ("" if error is None else f" ± {error:.2g}")))
    print_table(rows)
    print(f"each token's numbers in {folder / 'divergence.jsonl'}", file=sys.stderr)
