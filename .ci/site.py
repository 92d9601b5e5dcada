"""Prepare the sources of the documentation site: `python .ci/site.py FOLDER` writes them to FOLDER/docs.

The folder gets the pages of `docs`, the pages of the project's root, and the drawings of the diagrams. A diagram is a
fenced block of the language `mermaid` in a page. GitHub draws such a block itself. For the site, the program `mmdc` of
the npm package `@mermaid-js/mermaid-cli` renders each block to two SVG files, for light and for dark colours, so that
a reader's browser loads no script for them. The environment variable `MMDC` can name the program, and `CHROMIUM` can
name the browser that the program starts. A block of the language `chart` has a title, and a line for each bar with a
name and a number. This module draws the bars; GitHub shows the text.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from html import escape
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
OUTSIDE = {name: f"{name.lower()}.md" for name in ("CHANGELOG", "CONTRIBUTING", "SECURITY")}
"""Pages in the root of the project, and their names in the site."""

FENCE = re.compile(r"^```(mermaid|chart)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
TITLE = re.compile(r"^\s*accTitle: (.+)$", re.MULTILINE)
THEMES = {"light": "default", "dark": "dark"}
CHART_COLOURS = {"light": ("#1f2430", "#4051b5", "#9aa3c0"), "dark": ("#e2e4e9", "#9db2ff", "#5d6785")}
"""Colours of the text, of homeagent's bar and of the other bars."""


def prepare(target: Path) -> None:
    """Write the sources of the site to `target`, which must not exist."""
    shutil.copytree(ROOT / "docs", target, ignore=shutil.ignore_patterns("__pycache__", "*.pyc"))
    for name, page in OUTSIDE.items():
        text = (ROOT / f"{name}.md").read_text(encoding="utf-8").replace("](docs/", "](")
        (target / page).write_text(text, encoding="utf-8")
    pages = {page: page.read_text(encoding="utf-8") for page in target.rglob("*.md")}
    blocks = sorted({block for text in pages.values() for block in FENCE.findall(text)})
    drawings = render([source for language, source in blocks if language == "mermaid"])
    for source in (source for language, source in blocks if language == "chart"):
        drawings |= {f"{digest(source)}-{colours}.svg": draw_chart(source, colours) for colours in THEMES}
    for name, drawing in drawings.items():
        file = target / "assets" / "diagrams" / name
        file.parent.mkdir(exist_ok=True)
        file.write_text(drawing, encoding="utf-8")
    for page, text in pages.items():
        page.write_text(convert(text, "../" * (len(page.relative_to(target).parts) - 1)), encoding="utf-8")


def convert(text: str, up: str) -> str:
    """Replace each diagram's source by its two drawings, and correct the links to pages outside `docs`.

    Args:
        text: Markdown of a page.
        up: Relative path from the page's folder to the folder of all pages.
    """
    for name, page in {**OUTSIDE, "README": "index.md"}.items():
        text = re.sub(rf"\]\((?:\.\./)*{name}\.md", f"]({up}{page}", text)
    return FENCE.sub(lambda fence: images(fence[2], f"{up}assets/diagrams/"), text)


def images(source: str, folder: str) -> str:
    """Return the Markdown of a diagram's two images. The theme shows the image for the present colours."""
    title = TITLE.search(source)
    if title is None:
        sys.exit(f"a diagram has no line `accTitle:`, which screen readers need: {source[:60]!r}")
    return "".join(f"![{title[1]}]({folder}{digest(source)}-{colours}.svg#only-{colours})" for colours in THEMES)


def digest(source: str) -> str:
    """Return a file name for a diagram that changes with the source."""
    return hashlib.sha256(source.encode()).hexdigest()[:16]


def draw_chart(source: str, colours: str) -> str:
    """Return a bar chart as SVG that is readable on a page of 360 px."""
    title, *lines = source.splitlines()
    title = escape(title.removeprefix("accTitle: "))
    bars = [(escape(name.strip()), number) for name, number in (line.rsplit("  ", 1) for line in lines)]
    greatest = max(float(number.replace(",", "")) for _, number in bars)
    text, own, other = CHART_COLOURS[colours]
    shapes = []
    for index, (name, number) in enumerate(bars):
        y, width = 28 * index, 140 * float(number.replace(",", "")) / greatest
        colour = own if name == "homeagent" else other
        shapes.append(
            f'<text x="122" y="{y + 17}" text-anchor="end">{name}</text>'
            f'<rect x="130" y="{y + 2}" width="{max(width, 1):.1f}" height="20" fill="{colour}"/>'
            f'<text x="{136 + width:.1f}" y="{y + 17}">{number}</text>'
        )
    description = escape(", ".join(f"{name} {number}" for name, number in bars))
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="328" height="{28 * len(bars)}" role="img" fill="{text}" '
        f'font-family="sans-serif" font-size="13"><title>{title}</title><desc>{description}</desc>'
        f"{''.join(shapes)}</svg>"
    )


def render(sources: list[str]) -> dict[str, str]:
    """Render the diagrams in one run of the program for each set of colours, and return the drawings by file name."""
    if not sources:
        return {}
    program = os.environ.get("MMDC") or shutil.which("mmdc")
    if program is None:
        sys.exit("the diagrams need mmdc: npm install --global @mermaid-js/mermaid-cli, or set MMDC to its path")
    drawings = {}
    with tempfile.TemporaryDirectory() as folder:
        book, browser = Path(folder, "all.md"), Path(folder, "browser.json")
        book.write_text("\n\n".join(f"```mermaid\n{source}```" for source in sources) + "\n", encoding="utf-8")
        # Chromium refuses to run as root in its sandbox, and the input is this project's own text.
        settings: dict[str, object] = {"args": ["--no-sandbox"]}
        if chromium := os.environ.get("CHROMIUM") or shutil.which("chromium"):
            settings["executablePath"] = chromium
        browser.write_text(json.dumps(settings), encoding="utf-8")
        for colours, theme in THEMES.items():
            output = Path(folder, f"{colours}.md")
            command = [program, "-p", browser, "-i", book, "-o", output, "-t", theme, "-b", "transparent", "-q"]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode != 0:
                sys.exit(f"mmdc could not render the diagrams: {done.stderr.strip()[-2000:]}")
            for number, source in enumerate(sources, start=1):
                drawing = Path(folder, f"{colours}-{number}.svg").read_text(encoding="utf-8")
                # As wide as drawn, not as wide as the page.
                drawing = re.sub(r'width="100%"(.*?max-width: ([0-9.]+)px)', r'width="\2"\1', drawing, count=1)
                drawings[f"{digest(source)}-{colours}.svg"] = drawing
    return drawings


if __name__ == "__main__":
    prepare(Path(sys.argv[1], "docs"))
