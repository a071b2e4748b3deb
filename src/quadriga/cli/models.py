"""``quadriga pull`` and ``quadriga models``: what can be fetched and what is here."""

from __future__ import annotations

from typing import Annotated

import typer

from quadriga.cli import options
from quadriga.cli.command import Commands
from quadriga.cli.progress import progress_bar

models_app = Commands(no_args_is_help=True, help="Models in the catalogue and in the cache: list, show, verify, rm.")


def pull_command(
    model: options.ModelArgument,
) -> None:
    """Fetch a model into the cache and check its hash; a path is only checked to exist.

    hf:ORG/REPO@REVISION names a version, hf:ORG/REPO:Q4_K_M one GGUF file of several; a page's address does as well.
    """
    from quadriga.hub import catalogue

    with progress_bar(f"fetching {model}") as show:
        path = catalogue.resolve(model, progress=show)
    print(path)


def run_command(ctx: typer.Context, model: options.ModelArgument) -> None:
    """Talk to a model: `quadriga chat --model MODEL`, with a question and chat's other options behind it."""
    assert ctx.parent is not None, "it is a command of quadriga"
    chat = ctx.parent.command.commands["chat"]  # type: ignore[attr-defined]
    with chat.make_context("chat", ["--model", model, *ctx.args], parent=ctx.parent) as context:
        chat.invoke(context)


def ps_command(
    url: Annotated[str, typer.Option(help="A server with OpenAI's interface.")] = "http://127.0.0.1:8000",
    api_key: options.APIKey = None,
) -> None:
    """What a running server serves."""
    from rich.console import Console
    from rich.table import Table

    from quadriga.cli.remote import running_models

    table = Table("name", "parameters", "context", "loaded", title=url)
    for model in running_models(url, api_key):
        facts = model.get("quadriga") or {}
        n = facts.get("n_parameters")
        size = f"{n / 1e9:.2f}B" if n else ""
        loaded = "" if "loaded" not in facts else "yes" if facts["loaded"] else "when asked for"
        table.add_row(str(model.get("id")), size, str(model.get("max_model_len") or ""), loaded)
    Console().print(table)


@models_app.command("list")
def list_command() -> None:
    """What the catalogue offers and what is in the cache."""
    from rich.console import Console
    from rich.table import Table

    from quadriga.hub import catalogue

    here = {entry.name: entry for entry in catalogue.cached()}
    table = Table("name", "size", "licence", "here", "about")
    for name, entry in catalogue.CATALOGUE.items():
        table.add_row(name, _megabytes(entry.nbytes), entry.licence, "yes" if name in here else "", entry.about)
    for name, made in catalogue.DELTAS.items():
        table.add_row(name, _megabytes(made.nbytes), made.licence, "yes" if name in here else "", made.about)
    for name, own in catalogue.BUNDLED.items():
        table.add_row(name, _megabytes(own.nbytes), own.licence, "yes", own.about)
    for name, found in here.items():
        if not catalogue.is_known(name):
            table.add_row(name, _megabytes(found.nbytes), found.licence, "yes", found.source)
    Console().print(table)


@models_app.command("show")
def show_command(model: options.ModelArgument) -> None:
    """Source, licence, size, hash and place of one model."""
    from quadriga.errors import CatalogueError
    from quadriga.hub import catalogue

    if (own := catalogue.BUNDLED.get(model)) is not None:
        print(f"name      {own.name}\nabout     {own.about}\nlicence   {own.licence}\nsource    this package")
        print(f"size      {own.nbytes} bytes\nsha256    {own.sha256}\nhere      {catalogue.resolve(model)}")
        return
    here = {found.name: found for found in catalogue.cached()}
    entry = catalogue.CATALOGUE.get(model)
    made = catalogue.DELTAS.get(model)
    if entry is None and made is None and model not in here:
        raise CatalogueError(f"{model!r} is neither in the catalogue nor in the cache; see `quadriga models list`")
    if made is not None:
        print(f"name      {made.name}\nabout     {made.about}\nlicence   {made.licence}")
        print(f"source    {made.base} and {made.file} of this package, packed as {made.format}")
        print(f"size      about {made.nbytes} bytes\nsha256    {made.sha256} (of the delta)")
    elif entry is not None:
        print(f"name      {entry.name}\nabout     {entry.about}\nlicence   {entry.licence}")
        print(f"source    package index, {entry.package}\nfile      {entry.filename}")
        print(f"size      {entry.nbytes} bytes\nsha256    {entry.sha256}")
    else:
        found = here[model]
        print(f"name      {model}\nlicence   {found.licence}\nsource    {found.source}\nsize      {found.nbytes} bytes")
    print(f"here      {here[model].path if model in here else 'no'}")


@models_app.command("verify")
def verify_command(model: options.ModelArgument) -> None:
    """Hash a cached model again and compare."""
    from quadriga.errors import CatalogueError
    from quadriga.hub import catalogue

    with progress_bar(f"hashing {model}") as show:
        wrong = catalogue.verify(model, progress=show)
    if wrong:
        raise CatalogueError(
            f"{model}: {', '.join(wrong[:4])} changed since it was fetched. "
            f"Run `quadriga models rm {model}`, then pull it again."
        )
    print(f"{model}: all files are what was fetched")


@models_app.command("rm")
def remove_command(model: options.ModelArgument) -> None:
    """Take a model out of the cache."""
    from quadriga.hub import catalogue

    print(f"{model}: {_megabytes(catalogue.remove(model))} freed")


def _megabytes(nbytes: int) -> str:
    return f"{nbytes / 1e6:.1f} MB"
