"""Write docs/command-line.md, the reference of the command line, from the help texts of the commands.

Run `python .ci/reference.py` in a checkout with the package installed. With `--check` the script writes no file, and
the exit status is 1 if the page is not up to date.
"""

from __future__ import annotations

import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from homeagent.cli.commands import command

PAGE = Path(__file__).resolve().parents[1] / "docs" / "command-line.md"

HEAD = """# Command line

This page is for the administrator of a homeagent store. The script `.ci/reference.py` writes the page from the help
texts of the commands, so change the help texts and not the page. The page [Operations](operations.md) explains how to
use the commands, and the [glossary](glossary.md) defines the terms.

Each command takes these options, before or after the name of the command. The commands `copy` and `migrations new` do
not take `--database`.
"""


def usage(names: str, parameters: list[Any]) -> str:
    """Return the line that shows how to call a command, broken after 100 characters."""
    words = [names]
    for parameter in parameters:
        if parameter.param_type_name == "argument":
            words.append(parameter.metavar if parameter.required else f"[{parameter.metavar}]")
        else:
            words.append(call(parameter) if parameter.required else f"[{call(parameter)}]")
    lines = textwrap.wrap("\0".join(words).replace(" ", "\1").replace("\0", " "), 100, break_on_hyphens=False)
    return " \\\n    ".join(lines).replace("\1", " ")


def call(option: Any) -> str:
    """Return an option with a name for its value."""
    return option.opts[0] if option.is_flag else f"{option.opts[0]} {option.metavar or option.name.upper()}"


def table(parameters: list[Any]) -> Iterator[str]:
    """Yield the lines of a table of arguments and options."""
    yield "| argument or option | meaning |"
    yield "|---|---|"
    for parameter in parameters:
        is_argument = parameter.param_type_name == "argument"
        name = parameter.metavar if is_argument else ", ".join(f"`{name}`" for name in parameter.opts)
        text = " ".join(parameter.help.split())
        if not is_argument and parameter.show_default and not parameter.is_flag:
            default = parameter.show_default if isinstance(parameter.show_default, str) else parameter.default
            text += f" Default: {default}." if default is not None else ""
        yield f"| {name} | {text} |".replace("|`", "| `")


def commands(group: Any, names: str, common: set[str]) -> Iterator[str]:
    """Yield the lines about each command of a group."""
    for name, inner in group.commands.items():
        path = f"{names} {name}"
        if hasattr(inner, "commands"):
            yield from ("", f"## {path.removeprefix('homeagent ').capitalize()}", "", inner.help)
            yield from commands(inner, path, common)
            continue
        parameters = [parameter for parameter in inner.params if parameter.name not in common]
        yield from ("", f"### {path}", "", "```sh", usage(path, parameters), "```")
        for paragraph in inner.help.split("\n\n"):
            yield from ("", textwrap.fill(paragraph, 120, break_on_hyphens=False))
        if parameters:
            yield from ("", *table(parameters))


def page() -> str:
    """Return the text of the page."""
    common = [parameter for parameter in command.params if parameter.name in {"database", "as_json"}]
    names = {parameter.name for parameter in common}
    summary = "\n\n".join(textwrap.fill(part, 120) for part in command.help.split("\n\n")[1:])
    lines = [HEAD, *table(common), "", summary, "", "## The database", *commands(command, "homeagent", names)]
    return "\n".join(lines) + "\n"


def main(arguments: list[str]) -> int:
    """Write the page, or check the page with `--check`. Return the exit status."""
    text = page()
    if "--check" not in arguments:
        PAGE.write_text(text, encoding="utf-8")
        return 0
    if PAGE.read_text(encoding="utf-8") == text:
        return 0
    print(f"{PAGE} is not up to date: run python .ci/reference.py")
    return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
