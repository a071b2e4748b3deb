"""``quadriga experts``: what each expert of a mixture does."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from quadriga.cli import options
from quadriga.cli.command import Commands

if TYPE_CHECKING:
    from quadriga.engine.llm import LLM
    from quadriga.evaluate.expert_labels import Seen
    from quadriga.text.tokenizer import Tokenizer

experts_app = Commands(no_args_is_help=True, help="What the experts of a mixture do.")

TEXT_TOKENS = 512
"""Of one text that are read: many texts say more than one long one."""


@experts_app.command("label")
def label_command(
    model: options.ModelArgument,
    data: Annotated[
        str, typer.Option(help="JSON lines with a text and its domain; data:... is a data set by name.")
    ] = "data:corpus/mix.jsonl",
    text_field: Annotated[str, typer.Option(help="The field that holds the text.")] = "text",
    domain_field: Annotated[str, typer.Option(help="The field that names the domain.")] = "domain",
    tokens: Annotated[int, typer.Option(min=1, help="Tokens that are read of each domain.")] = 8192,
    out: Annotated[Path | None, typer.Option(help="Where the labels go; by default beside the model.")] = None,
    format: options.Format = None,
    activations: options.Activations = None,
    kv_format: options.KVFormat = None,
    kv_memory: options.KVMemory = None,
    expert_memory: options.ExpertMemory = None,
    dtype: options.Dtype = None,
    device: options.Device = "cpu",
    threads: options.Threads = None,
    json: options.Json = False,
) -> None:
    """Label every expert from data: the tokens, domains and kinds that it is chosen for. `serve` shows the labels."""
    from quadriga.errors import ConfigError
    from quadriga.evaluate import expert_labels
    from quadriga.io import expert_labels as files

    how = options.load_options(
        format=format,
        activations=activations,
        kv_format=kv_format,
        kv_memory=kv_memory,
        expert_memory=expert_memory,
        dtype=dtype,
        device=device,
        threads=threads,
    )
    llm = options.load_model(model, how)
    if not llm.config.moe_layers:
        raise ConfigError(f"{model} is dense: it has no experts to label")
    tokenizer = llm.tokenizer
    if tokenizer is None:
        raise ConfigError(f"{model} has no tokenizer, so no text can be read with it")
    texts = _texts(data, text_field, domain_field)
    seen, domains = _read(llm, tokenizer, texts, tokens)
    labels = expert_labels.labels_of(seen, llm.config, domains, lambda token: tokenizer.decode([token]))
    labels = {"model": llm.name, "data": data, **labels}
    place = out or _place(llm)
    files.write(labels, place)
    if json:
        print(options.as_json(labels))
        return
    _print(labels, place)


def _place(llm: LLM) -> Path:
    from quadriga.errors import ConfigError
    from quadriga.io import expert_labels as files

    if llm.path is None:
        raise ConfigError("this model has no folder; give a place for the labels with --out")
    return files.place_of(llm.path)


def _texts(data: str, text_field: str, domain_field: str) -> Iterator[tuple[str, str]]:
    """(domain, text) of every line."""
    import json as codec

    from quadriga.errors import ConfigError
    from quadriga.hub import data_sets

    path = data_sets.path_of(data.removeprefix("data:")) if data.startswith("data:") else Path(data)
    try:
        with path.open(encoding="utf-8") as lines:
            for number, line in enumerate(lines, 1):
                row = codec.loads(line)
                if not isinstance(row, dict) or not isinstance(row.get(text_field), str) or domain_field not in row:
                    raise ConfigError(
                        f"{path}:{number}: a line needs a text {text_field!r} and a domain {domain_field!r}; "
                        f"got {line[:80]!r}. Name other fields with --text-field and --domain-field"
                    )
                yield str(row[domain_field]), row[text_field]
    except (OSError, ValueError) as error:
        raise ConfigError(f"cannot read the data {path}: {error}") from None


def _read(llm: LLM, tokenizer: Tokenizer, texts: Iterator[tuple[str, str]], n_tokens: int) -> tuple[Seen, list[str]]:
    """Run the texts, so many tokens of each domain, and gather what was chosen; and the names of the domains."""
    from quadriga.cli.progress import count_bar
    from quadriga.evaluate.expert_labels import Seen

    by_domain: dict[str, list[list[int]]] = {}
    for domain, text in texts:
        read = by_domain.setdefault(domain, [])
        left = n_tokens - sum(map(len, read))
        if left > 0:
            most = min(TEXT_TOKENS, left, llm.config.max_seq_len - 1)
            ids = [*tokenizer.prefix_ids, *tokenizer.encode(text[: 16 * most])][:most]
            if ids:
                read.append(ids)
    seen, total, done = Seen(), sum(len(ids) for read in by_domain.values() for ids in read), 0
    with count_bar("reading") as show:
        for number, read in enumerate(by_domain.values()):
            for ids in read:
                seen.add(ids, number, llm.routing(ids))
                done += len(ids)
                show(done, total, "tokens read")
    return seen, list(by_domain)


def _print(labels: dict[str, Any], place: Path) -> None:
    n_experts = sum(len(layer["experts"]) for layer in labels["layers"])
    for layer in labels["layers"]:
        print(f"layer {layer['layer']}: domains are worth {layer['bits']:.3f} bits of the choice")
        for number, expert in enumerate(layer["experts"]):
            print(f"  {number:>3}  {100 * expert['share']:5.1f} %  {expert['label'] or '-'}")
    print(f"{n_experts} experts from {labels['n_tokens']:,} tokens: {place}")
