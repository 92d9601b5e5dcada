"""`homeagent backup`: a verified copy, while others write."""

from __future__ import annotations

from typing import Annotated

import typer

from homeagent.cli.application import DatabaseOption, app
from homeagent.cli.opening import open_named
from homeagent.cli.output import JsonOption, count, print_json
from homeagent.models.types import MAX_LIMIT


@app.command()
def backup(
    context: typer.Context,
    destination: Annotated[
        str,
        typer.Argument(
            metavar="DESTINATION",
            help="A directory, or a file that does not exist. What ends in a slash is a directory, made where missing.",
            show_default=False,
        ),
    ],
    keep: Annotated[
        int | None,
        typer.Option(
            min=1,
            max=MAX_LIMIT,
            metavar="N",
            help="Remove this database's oldest backups there afterwards, until N are left.",
            show_default="all",
        ),
    ] = None,
    replace: Annotated[bool, typer.Option("--replace", help="Replace DESTINATION where it is a file.")] = False,
    database: DatabaseOption = None,
    as_json: JsonOption = False,
) -> None:
    """Copy the database while others use it, verify the copy, and put it in place whole or not at all.

    A manifest beside it, with .json after its name, says when it was taken, what is in it, and its SHA-256.
    """
    from homeagent.engine.sqlite.manifests import manifest_path, read_manifest

    with open_named(context, database) as opened:
        made = opened.backup(destination, keep=keep, replace=replace)
    manifest = read_manifest(made)
    if as_json:
        facts = {} if manifest is None else manifest.model_dump(mode="json")
        print_json({"backup": str(made), "manifest": str(manifest_path(made)), **facts})
        return
    size = "" if manifest is None else f", {count(manifest.size, 'byte')}"
    typer.echo(f"Backed up to {made}{size}, and verified.")
