"""Command that writes a revision of the application's own tables (`homeagent migrations new`)."""

from __future__ import annotations

import re
from collections.abc import Collection
from importlib import import_module
from pathlib import Path
from traceback import extract_tb
from typing import Annotated

import typer

from homeagent.cli.application import WithoutDatabase, group
from homeagent.cli.arguments import MigrationsOption
from homeagent.cli.output import print_result
from homeagent.engine.files.system_errors import explained
from homeagent.errors import InvalidArgumentError
from homeagent.migrations.application import Application

migrations: typer.Typer = group("migrations", help="Write revisions of an application's own tables.")

_TEMPLATE = '''"""{message}."""

import sqlalchemy as sa

from alembic import op
{imports}
revision: str = {revision!r}
down_revision: str | None = {parent!r}


def upgrade() -> None:
{upgrade}


def downgrade() -> None:
{downgrade}
'''


@migrations.command(cls=WithoutDatabase)
def new(
    context: typer.Context,
    message: Annotated[
        str, typer.Option("--message", "-m", metavar="TEXT", help="Description of the change.", show_default=False)
    ],
    migrations: MigrationsOption = None,
    package: Annotated[
        str | None, typer.Option("--package", help="Package with the tables. Default: the package of --migrations.")
    ] = None,
    empty: Annotated[bool, typer.Option("--empty", help="Write a revision that you complete by hand.")] = False,
) -> None:
    """Compare the application's tables with its revisions, and write the next revision.

    The command creates the folder if necessary, and needs no database. Read the revision before you use it.
    The application runs the revision at its next start.
    """
    if migrations is None:
        raise typer.BadParameter("name the folder of the revisions: --migrations PACKAGE:FOLDER.")
    named, folder = _named_folder(migrations)
    package = package or named
    if not package:
        raise typer.BadParameter("name the package with the tables: --package PACKAGE.")
    with explained("create the folder", folder / "versions"):
        (folder / "versions").mkdir(parents=True, exist_ok=True)
    script = _write(Application.of(migrations), folder, package, message, empty=empty)
    text = "The revisions create all tables already: no revision was written. An empty revision needs --empty."
    if script is not None:
        text = f"Wrote {script}. Read the revision before you use it."
    print_result(context, {"script": None if script is None else str(script)}, text)


def import_tables(migrations: str | None) -> None:
    """Import the modules of the package that --migrations names, because the modules define the column types."""
    named, folder = _named_folder(migrations or "")
    if named:
        _application_tables(named, folder)


def _application_tables(package: str, folder: Path) -> Collection[str]:
    from homeagent.migrations.autogenerate import application_tables

    try:
        return application_tables(package, scripts=folder.resolve())
    except Exception as error:
        package_directory = str(_directory_of(package.partition(".")[0]))
        lines = [each for each in extract_tb(error.__traceback__) if each.filename.startswith(package_directory)]
        place = f"{lines[-1].filename}, line {lines[-1].lineno}: " if lines else ""
        raise InvalidArgumentError(
            f"a module of the package {package!r} can't be imported ({place}{type(error).__name__}: {error}), so its "
            "tables are unknown: correct the module, or install what the module imports"
        ) from error


def _named_folder(migrations: str) -> tuple[str, Path]:
    """Return the package and the folder in the value of --migrations. The name of the package can be empty."""
    named, _, inner = migrations.rpartition(":")
    return named, _directory_of(named) / inner if named else Path(inner)


def _directory_of(package: str) -> Path:
    try:
        path = getattr(import_module(package), "__path__", None)
    except ImportError as error:
        raise InvalidArgumentError(
            f"the package {package!r} can't be imported ({type(error).__name__}: {error}): correct its name, or run "
            "the command in the directory that contains the package"
        ) from None
    if path is None:
        raise InvalidArgumentError(
            f"{package!r} is a module without a directory: pass --migrations FOLDER and --package"
        )
    return Path(next(iter(path)))


def _write(application: Application, folder: Path, package: str, message: str, *, empty: bool) -> Path | None:
    from alembic.util import rev_id

    from homeagent.migrations.autogenerate import render_revision

    texts = {"imports": "", "upgrade": "    pass", "downgrade": "    pass"}
    if not empty:
        tables = _application_tables(package, folder)
        if not tables:
            raise InvalidArgumentError(f"the package {package!r} defines no tables: derive a class from Table")
        rendered = render_revision(application, tables)
        if rendered is None:
            return None
        # Remove Alembic's comments, because the output of this command also asks the developer to read the revision.
        texts = {name: re.sub(r" *# ###.*\n?", "", text).rstrip() for name, text in rendered.items()}
        texts["imports"] += "\n" if texts["imports"] else ""
    revision = rev_id()
    slug = "_".join(re.findall(r"\w+", message.lower()))[:40]
    script = folder / "versions" / f"{revision}_{slug}.py"
    content = _TEMPLATE.format(
        message=message.strip().rstrip(".").replace("\\", "").replace('"', "'"),
        revision=revision,
        parent=application.head,
        **texts,
    )
    with explained("write", script), script.open("x", encoding="utf-8", errors="backslashreplace") as file:
        file.write(content)
    return script
