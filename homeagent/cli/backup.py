"""The command `homeagent backup`, which makes a verified copy while other processes write."""

from __future__ import annotations

from typing import Annotated

import typer

from homeagent.cli.application import app, open_named
from homeagent.cli.arguments import argument
from homeagent.cli.output import count, print_result
from homeagent.cli.progress import shown_progress
from homeagent.models.types import MAX_LIMIT


@app.command()
def backup(
    context: typer.Context,
    destination: Annotated[
        str,
        argument(
            metavar="DESTINATION",
            help="Directory, or file that does not exist. A path with a slash at the end is a directory, "
            "and is created if it does not exist.",
        ),
    ],
    keep: Annotated[
        int | None,
        typer.Option(
            min=1,
            max=MAX_LIMIT,
            metavar="N",
            help=(
                "After the backup, remove the oldest backups of this database in the directory until N"
                " backups are left."
            ),
            show_default="all",
        ),
    ] = None,
    replace: Annotated[bool, typer.Option("--replace", help="Replace DESTINATION if it is a file.")] = False,
) -> None:
    """Copy the database while other processes use it.

    The copy gets its final name only after the command has verified it. The manifest is the file next to the backup
    whose name ends in .json. The manifest records time, revision, rows, size and SHA-256.
    """
    from homeagent.engine.sqlite.manifests import manifest_path, read_manifest

    with open_named(context) as opened, shown_progress(context, "copying and verifying"):
        made = opened.backup(destination, keep=keep, replace=replace)
    manifest = read_manifest(made)
    facts = {} if manifest is None else manifest.model_dump(mode="json")
    size = "" if manifest is None else f", {count(manifest.size, 'byte')}"
    values = {"backup": str(made), "manifest": str(manifest_path(made)), **facts}
    print_result(context, values, f"Backed up to {made}{size}, verified.")
