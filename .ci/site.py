"""Prepare the sources of the documentation site: `python .ci/site.py FOLDER` writes them to FOLDER/docs.

The folder gets the pages of `docs`, the pages of the project's root, and the drawings of the diagrams. A diagram is a
fenced block of the language `mermaid` in a page. GitHub draws such a block itself. For the site, the program `mmdc` of
the npm package `@mermaid-js/mermaid-cli` renders each block to two SVG files, for light and for dark colours, so that
a reader's browser loads no script for them. The environment variable `MMDC` can name the program, and `CHROMIUM` can
name the browser that the program starts.
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
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
OUTSIDE = {name: f"{name.lower()}.md" for name in ("CHANGELOG", "CONTRIBUTING", "SECURITY")}
"""Pages in the root of the project, and their names in the site."""

FENCE = re.compile(r"^```mermaid\n(.*?)^```$", re.MULTILINE | re.DOTALL)
TITLE = re.compile(r"^\s*accTitle: (.+)$", re.MULTILINE)
THEMES = {"light": "default", "dark": "dark"}


def prepare(target: Path) -> None:
    """Write the sources of the site to `target`, which must not exist."""
    shutil.copytree(ROOT / "docs", target, ignore=shutil.ignore_patterns("__pycache__", "*.pyc"))
    for name, page in OUTSIDE.items():
        text = (ROOT / f"{name}.md").read_text(encoding="utf-8").replace("](docs/", "](")
        (target / page).write_text(text, encoding="utf-8")
    pages = {page: page.read_text(encoding="utf-8") for page in target.rglob("*.md")}
    drawings = render(sorted({block for text in pages.values() for block in FENCE.findall(text)}))
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
    return FENCE.sub(lambda fence: images(fence[1], f"{up}assets/diagrams/"), text)


def images(source: str, folder: str) -> str:
    """Return the Markdown of a diagram's two images. The theme shows the image for the present colours."""
    title = TITLE.search(source)
    if title is None:
        sys.exit(f"a diagram has no line `accTitle:`, which screen readers need: {source[:60]!r}")
    return "".join(f"![{title[1]}]({folder}{digest(source)}-{colours}.svg#only-{colours})" for colours in THEMES)


def digest(source: str) -> str:
    """Return a file name for a diagram that changes with the source."""
    return hashlib.sha256(source.encode()).hexdigest()[:16]


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
