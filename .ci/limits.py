"""Compare sizes and commit subjects with the limits in pyproject.toml, `[tool.homeagent.limits]`.

Run `python3 .ci/limits.py` in a checkout. The exit status is 1 if a function or a module of homeagent/ has more lines
than the limit, if a private function that two functions use has no docstring, or if a commit's subject has more
characters than the limit. The commit that added this script and all earlier commits are exempt.
"""

from __future__ import annotations

import ast
import subprocess
import sys
import tomllib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]


def read_limits(root: Path = ROOT) -> dict[str, Any]:
    """Return the table `[tool.homeagent.limits]` of pyproject.toml."""
    settings: dict[str, Any] = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))
    limits: dict[str, Any] = settings["tool"]["homeagent"]["limits"]
    return limits


def long_modules(package: Path, limit: int) -> Iterator[str]:
    """Yield a complaint about each module that has more lines than `limit`."""
    for path in sorted(package.rglob("*.py")):
        lines = len(path.read_text(encoding="utf-8").splitlines())
        if lines > limit:
            yield f"{path}: the module has {lines} lines (limit {limit}): split it"


def long_functions(package: Path, limit: int) -> Iterator[str]:
    """Yield a complaint about each function that has more lines than `limit`. Docstrings count, decorators do not."""
    for path in sorted(package.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                lines = (node.end_lineno or node.lineno) - node.lineno + 1
                if lines > limit:
                    yield f"{path}:{node.lineno}: {node.name} has {lines} lines (limit {limit}): split it"


def undescribed_functions(package: Path) -> Iterator[str]:
    """Yield a complaint about each private function without a docstring that two functions of its module use."""
    for path in sorted(package.rglob("*.py")):
        functions = [
            node
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
        ]
        users = Counter(name for function in functions for name in _names(function) - {function.name})
        for function in functions:
            is_private = function.name.startswith("_") and not function.name.startswith("__")
            if is_private and users[function.name] > 1 and ast.get_docstring(function) is None:
                yield f"{path}:{function.lineno}: {function.name} has {users[function.name]} users: add a docstring"


def _names(function: ast.AST) -> set[str]:
    nodes = list(ast.walk(function))
    return {node.id for node in nodes if isinstance(node, ast.Name)} | {
        node.attr for node in nodes if isinstance(node, ast.Attribute)
    }


def long_subjects(root: Path, limit: int) -> Iterator[str]:
    """Yield a complaint about each commit with a too long subject, if the commit is later than this script."""
    if not (root / ".git").exists():
        return  # This is an unpacked sdist, which has no commits.

    def git(*arguments: str) -> list[str]:
        done = subprocess.run(["git", *arguments], cwd=root, check=True, capture_output=True, text=True)
        return done.stdout.splitlines()

    # In a shallow clone the oldest commit seems to add every file. Then this loop reads only the later commits.
    introduced = git("log", "--diff-filter=A", "--format=%H", "--", ".ci/limits.py")
    span = f"{introduced[-1]}..HEAD" if introduced else "HEAD..HEAD"
    for line in git("log", "--no-merges", "--format=%h %s", span):
        commit, _, subject = line.partition(" ")
        if len(subject) > limit:
            yield f"{commit}: the subject has {len(subject)} characters (limit {limit}): {subject}"


def main() -> int:
    """Print each complaint. Return the exit status: 1 if there is a complaint, otherwise 0."""
    limits = read_limits()
    complaints = [
        *long_modules(ROOT / "homeagent", limits["module_lines"]),
        *long_functions(ROOT / "homeagent", limits["function_lines"]),
        *undescribed_functions(ROOT / "homeagent"),
        *long_subjects(ROOT, limits["commit_subject"]),
    ]
    print(*complaints, sep="\n", end="\n" if complaints else "")
    return bool(complaints)


if __name__ == "__main__":
    sys.exit(main())
