"""Measure how hard sentences are to read. The limits are in pyproject.toml, `[tool.homeagent.limits.prose]`.

Run `python3 .ci/prose.py` in a checkout. The option `--list` also prints each sentence that raises a measure. The
script takes three measures of the documentation (README, CONTRIBUTING, CHANGELOG, SECURITY, docs/), and the same three
of the docstrings and comments of homeagent/:

clauses    percentage of the sentences that begin with a who, what or where clause
pronouns   number of pronouns (it, that, one, they and similar words) per 1,000 words
negatives  number of words such as nobody, something and never, per 1,000 words

A sentence that names its subject is understood at first reading. The exit status is 1 if a measure exceeds its limit.
"""

from __future__ import annotations

import ast
import io
import re
import sys
import tokenize
import tomllib
from collections.abc import Iterable, Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

CLAUSE = re.compile(r"^(?:(?:who|what)(?:ever)?|where|whichever)\b(?!.*\?$)", re.IGNORECASE)
PRONOUN = re.compile(r"\b(?:it|its|itself|that|this|those|these|ones?|they|them|their)\b", re.IGNORECASE)
NEGATIVE = re.compile(r"\b(?:(?:no|some|any|every)body|nothing|something|none|never)\b", re.IGNORECASE)
WORD = re.compile(r"[A-Za-z][A-Za-z'-]*")


def sentences(text: str) -> Iterator[str]:
    """Yield the sentences of a paragraph that have at least four words."""
    text = re.sub(r"\[([^\]]+)\]\([^)]*\)", r"\1", text)  # Keep only the text of a link.
    text = " ".join(re.sub(r"`+([^`]*)`+", r"\1", text).split())
    for sentence in re.split(r"(?<=[.!?])[\"')\]]?\s+(?=[A-Z\"'(0-9])", text):
        if len(WORD.findall(sentence)) >= 4:
            yield sentence


def of_markdown(source: str) -> Iterator[str]:
    """Yield the sentences of paragraphs, list items and table cells, without code blocks and headings."""
    source = re.sub(r"^\s*```.*?```|<!--.*?-->", "\n\n", source, flags=re.DOTALL | re.MULTILINE)
    # A heading, a list item and a table's row each end the paragraph before.
    source = re.sub(r"^\s*(?:[-*+]|\d+\.)\s", "\n\n", source, flags=re.MULTILINE)
    source = re.sub(r"^#.*$", "\n\n", source, flags=re.MULTILINE)
    source = re.sub(r"^\s*\|.*\|\s*$", lambda row: row[0].replace("|", "\n\n"), source, flags=re.MULTILINE)
    for paragraph in re.split(r"\n\s*\n", source):
        yield from sentences(paragraph)


def of_python(source: str) -> Iterator[str]:
    """Yield the sentences of docstrings and comments. Each entry of `Args:`, `Raises:` and so on is a new paragraph."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            docstring = ast.get_docstring(node) or ""
            docstring = re.sub(r"^(?:Args|Returns|Raises|Yields|Attributes)\b.*:$", "", docstring, flags=re.MULTILINE)
            docstring = re.sub(r"^    [\w*, `.()|]{1,60}: ", "\n\n", docstring, flags=re.MULTILINE)
            for paragraph in re.split(r"\n\s*\n", docstring):
                if ">>>" not in paragraph:
                    yield from sentences(paragraph)
    yield from of_comments(source)


def of_comments(source: str) -> Iterator[str]:
    """Yield the sentences of comments. Comments on consecutive lines form one paragraph."""
    paragraph, last = "", 0
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        text = token.string.lstrip("# ")
        if token.type == tokenize.COMMENT and not text.startswith(("noqa", "type:", "pragma")):
            if token.start[0] != last + 1:
                yield from sentences(paragraph)
                paragraph = ""
            paragraph, last = f"{paragraph} {text}", token.start[0]
    yield from sentences(paragraph)


def measure(found: Iterable[str]) -> dict[str, float]:
    """Return the three measures of the sentences in `found`."""
    found = list(found)
    words = sum(len(WORD.findall(sentence)) for sentence in found) or 1
    return {
        "clauses": 100 * sum(bool(CLAUSE.match(sentence)) for sentence in found) / (len(found) or 1),
        "pronouns": 1000 * sum(len(PRONOUN.findall(sentence)) for sentence in found) / words,
        "negatives": 1000 * sum(len(NEGATIVE.findall(sentence)) for sentence in found) / words,
    }


def main(arguments: list[str]) -> int:
    """Print the measures with their limits. Return the exit status: 1 if a measure exceeds its limit, otherwise 0."""
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    limits: dict[str, dict[str, float]] = settings["tool"]["homeagent"]["limits"]["prose"]
    pages = [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")]
    texts = {
        "docs": [sentence for path in pages for sentence in of_markdown(path.read_text(encoding="utf-8"))],
        "code": [
            sentence
            for path in ROOT.glob("homeagent/**/*.py")
            for sentence in of_python(path.read_text(encoding="utf-8"))
        ],
    }
    failed = False
    for kind, found in texts.items():
        for name, value in measure(found).items():
            too_high = value > limits[kind][name]
            failed |= too_high
            print(f"{'FAILED' if too_high else 'ok    '}  {kind} {name}: {value:.1f} (limit {limits[kind][name]})")
        if "--list" in arguments:
            print(
                *(line for line in found if any(map(measure([line]).get, ("clauses", "pronouns", "negatives")))),
                sep="\n",
            )
    return failed


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
