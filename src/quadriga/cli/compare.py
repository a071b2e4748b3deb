"""``quadriga compare``: the published tables, beside what was measured here."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from quadriga.cli import options


def compare_command(
    results: Annotated[
        list[Path] | None, typer.Argument(help="Folders or results.json files that `quadriga eval` wrote.")
    ] = None,
    table: Annotated[str, typer.Option(help="open, closed, long or rag.")] = "open",
    markdown: Annotated[bool, typer.Option("--markdown", help="Print Markdown.")] = False,
    picture: options.Picture = None,
    json: options.Json = False,
) -> None:
    """Show a published table of DBRX's launch, with columns of your own beside it."""
    from quadriga.cli.eval import print_table
    from quadriga.evaluate import compare

    options.require_picture(picture)
    comparison = compare.compare(table, results or [])
    if json:
        print(options.as_json(compare.as_json(comparison)))
    elif markdown:
        print(compare.as_markdown(comparison), end="")
    else:
        print_table(compare.rows(comparison))
        print("\n" + "\n".join(compare.notes(comparison)))
    if picture is not None:
        compare.picture(picture, comparison)
        print(f"drawn in {picture}", file=sys.stderr)
