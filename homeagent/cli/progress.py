"""Progress of long work on standard error, if standard error is a terminal and the arguments do not contain --json."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import typer

if TYPE_CHECKING:
    from homeagent.maintenance.copy_store import CopyProgress


@contextmanager
def shown_activity(context: typer.Context, text: str) -> Iterator[None]:
    """Show a moving bar and the elapsed time while the block runs, for work whose end is unknown."""
    if not _is_shown(context):
        yield
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as shown:
        shown.add_task(text, total=None)
        yield


@contextmanager
def shown_progress(context: typer.Context) -> Iterator[Callable[[CopyProgress], object] | None]:
    """Show a progress bar for each step of a copy. Return the function that the copy calls to report progress, or None
    if no bar is shown.
    """
    if not _is_shown(context):
        yield None
        return
    # Import lazily, because most commands draw no progress bar.
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    bars: dict[str, TaskID] = {}
    with Progress(*columns, console=Console(stderr=True)) as shown:

        def report(done: CopyProgress) -> None:
            if done.step not in bars:
                bars[done.step] = shown.add_task(done.step, total=done.total)
            shown.update(bars[done.step], completed=done.rows)

        yield report


def _is_shown(context: typer.Context) -> bool:
    return not context.obj.as_json and sys.stderr is not None and sys.stderr.isatty()
