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
def shown_progress(
    context: typer.Context, activity: str | None = None
) -> Iterator[Callable[[CopyProgress], object] | None]:
    """Show progress bars while the block runs. Return the function that a copy calls to report progress, or None if no
    bar is shown.

    Args:
        context: context of the command.
        activity: description of work whose end is unknown. The bar of the work moves until the block ends.
    """
    if context.obj.as_json or sys.stderr is None or not sys.stderr.isatty():
        yield None
        return
    # Import lazily, because most commands draw no progress bar.
    from rich.console import Console
    from rich.progress import Progress, TaskID

    bars: dict[str, TaskID] = {}
    with Progress(console=Console(stderr=True), transient=activity is not None) as shown:
        if activity is not None:
            shown.add_task(activity, total=None)

        def report(done: CopyProgress) -> None:
            if done.step not in bars:
                bars[done.step] = shown.add_task(done.step, total=done.total)
            shown.update(bars[done.step], completed=done.rows)

        yield report
