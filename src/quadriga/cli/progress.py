"""Progress of long work: a bar on a terminal, a line now and then elsewhere. Always on stderr."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterator

_LINE_EVERY_S = 10.0
_PATIENCE_S = 0.5
"""Work that ends sooner shows nothing."""


@contextlib.contextmanager
def progress_bar(title: str) -> Iterator[Callable[[int, int, str], None]]:
    """A callback (bytes done, bytes in all, what) that shows itself for as long as the ``with`` block runs."""
    if not sys.stderr.isatty():
        yield _lines(title)
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
        TextColumn("[dim]{task.fields[what]}"),
    )
    started = time.monotonic()
    with Progress(*columns, console=Console(stderr=True), transient=True) as bars:
        task = bars.add_task(title, total=None, what="", visible=False)

        def show(done: int, total: int, what: str) -> None:
            late = time.monotonic() - started > _PATIENCE_S
            bars.update(task, completed=done, total=total or None, what=what[-40:], visible=late)

        yield show


@contextlib.contextmanager
def count_bar(title: str) -> Iterator[Callable[[int, int, str], None]]:
    """The same for things that are counted: (done, in all, what)."""
    if not sys.stderr.isatty():
        yield _lines(title)
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bars:
        task = bars.add_task(title, total=None)

        def show(done: int, total: int, what: str) -> None:
            bars.update(task, completed=done, total=total or None, description=what[-40:])

        yield show


def _lines(title: str) -> Callable[[int, int, str], None]:
    last = time.monotonic()

    def show(done: int, total: int, what: str) -> None:
        nonlocal last
        if time.monotonic() - last >= _LINE_EVERY_S:
            last = time.monotonic()
            share = f"{100 * done / total:.0f} %" if total else f"{done / 1e6:.0f} MB"
            print(f"{title}: {share} ({what})", file=sys.stderr, flush=True)

    return show


@contextlib.contextmanager
def progress_count(title: str) -> Iterator[Callable[[int, int, str], None]]:
    """A callback (items done, items in all, what) that shows itself for as long as the ``with`` block runs."""
    if not sys.stderr.isatty():
        yield _counts(title)
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as bars:
        task = bars.add_task(title, total=None)
        yield lambda done, total, what: bars.update(task, completed=done, total=total)


def _counts(title: str) -> Callable[[int, int, str], None]:
    started = last = time.monotonic()
    first: int | None = None

    def show(done: int, total: int, what: str) -> None:
        nonlocal last, first
        now = time.monotonic()
        first = done if first is None else first
        if now - last >= _LINE_EVERY_S or done == total:
            last = now
            rate = (done - first) / max(now - started, 1e-9)
            print(f"{title}: {done} of {total} ({rate:.2f} a second)", file=sys.stderr, flush=True)

    return show
