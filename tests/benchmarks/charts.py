"""Bar charts as SVG, drawn with nothing but text: horizontal bars, each with its name and its value."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

__all__ = ["Bar", "Panel", "draw"]

ROW = 20
PLOT = 250
VALUE = 110
LETTER = 6.7
"""The width of a letter of 12 pixels, on average and a little more."""
HEAD = 34
GAP = 18
MARGIN = 16

SURFACE, INK, QUIET = "#ffffff", "#1f2328", "#59636e"
OURS, OTHERS, BASELINE, RULE = "#0b6e99", "#b3bcc6", "#59636e", "#d1d9e0"
FONT = "font-family='system-ui, sans-serif'"


@dataclass(frozen=True)
class Bar:
    """One bar.

    Attributes:
        name: whose.
        value: how long it is.
        text: what is written at its end.
        kind: `ours`, `baseline` or `other`: the colour.
    """

    name: str
    value: float
    text: str
    kind: str = "other"


@dataclass(frozen=True)
class Panel:
    """Bars that share one scale, from zero to the longest of them."""

    title: str
    bars: Sequence[Bar]


def draw(title: str, panels: Sequence[Panel], *, columns: int = 2) -> str:
    """Return an SVG of panels in columns, the tallest of a row of panels deciding its height.

    Args:
        title: what is read out for the whole picture.
        panels: in the order of reading.
        columns: how many stand side by side.
    """
    columns = min(columns, len(panels))
    label = 8 + int(LETTER * max(len(bar.name) for panel in panels for bar in panel.bars))
    step = label + PLOT + VALUE + MARGIN
    width = MARGIN + columns * step
    lines: list[str] = []
    top = MARGIN
    for first in range(0, len(panels), columns):
        row = panels[first : first + columns]
        for place, panel in enumerate(row):
            lines += _panel(panel, MARGIN + place * step, top, label)
        top += HEAD + ROW * max(len(panel.bars) for panel in row) + GAP
    return "\n".join(
        [
            f"<svg xmlns='http://www.w3.org/2000/svg' width='{width}' height='{top}' viewBox='0 0 {width} {top}'"
            f" role='img' aria-label='{escape(title, quote=True)}'>",
            f"<title>{escape(title)}</title>",
            f"<rect width='{width}' height='{top}' fill='{SURFACE}'/>",
            *lines,
            "</svg>\n",
        ]
    )


def _panel(panel: Panel, left: int, top: int, label: int) -> list[str]:
    longest = max(bar.value for bar in panel.bars)
    axis = left + label
    colours = {"ours": OURS, "baseline": BASELINE}
    lines = [f"<text x='{left}' y='{top + 16}' {FONT} font-size='14' font-weight='600' fill='{INK}'>"]
    lines[-1] += f"{escape(panel.title)}</text>"
    for number, bar in enumerate(panel.bars):
        y = top + HEAD + number * ROW
        length = max(1.0, PLOT * bar.value / longest) if longest else 1.0
        weight = "600" if bar.kind == "ours" else "400"
        colour = colours.get(bar.kind, OTHERS)
        text = f"{FONT} font-size='12' font-weight='{weight}'"
        lines += [
            f"<text x='{axis - 8}' y='{y + 10}' {text} fill='{INK}' text-anchor='end'>{escape(bar.name)}</text>",
            f"<rect x='{axis}' y='{y}' width='{length:.1f}' height='13' rx='2' fill='{colour}'/>",
            f"<text x='{axis + length + 6:.1f}' y='{y + 10}' {text} fill='{QUIET}'>{escape(bar.text)}</text>",
        ]
    bottom = top + HEAD + len(panel.bars) * ROW - 4
    lines.append(f"<line x1='{axis}' y1='{top + HEAD - 3}' x2='{axis}' y2='{bottom}' stroke='{RULE}'/>")
    return lines
