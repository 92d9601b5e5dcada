"""How far a run is, on standard error: in one line that changes on a terminal, in a line now and then elsewhere."""

from __future__ import annotations

import time
from collections.abc import Sequence
from types import TracebackType
from typing import Self

from rich.console import Console

__all__ = ["Progress"]

PAUSE = 15.0
"""The seconds between two lines where nobody watches."""


class Progress:
    """Tells the section, what is being done in it, what remains and how long it took so far; a context manager.

    Args:
        sections: all that are to be measured, in their order.
    """

    def __init__(self, sections: Sequence[str]) -> None:
        self._sections = sections
        self._console = Console(stderr=True, highlight=False)
        self._status = self._console.status("")
        self._begun = time.monotonic()
        self._place = ""
        self._last = float("-inf")

    def begin(self, section: str) -> None:
        """Tell that a section begins."""
        number = self._sections.index(section)
        remaining = ", ".join(self._sections[number + 1 :]) or "nothing"
        self._place = f"{section} ({number + 1} of {len(self._sections)}; then {remaining})"
        self._last = float("-inf")

    def say(self, what: str) -> None:
        """Tell what is being done."""
        now = time.monotonic()
        minutes, seconds = divmod(int(now - self._begun), 60)
        line = f"{minutes}:{seconds:02} {self._place}: {what}"
        if self._console.is_terminal:
            self._status.update(line)
        elif now - self._last >= PAUSE:
            self._console.print(line, markup=False, soft_wrap=True)
            self._last = now

    def warn(self, what: str) -> None:
        """Tell what must not be missed."""
        self._console.print(what, markup=False, soft_wrap=True)

    def __enter__(self) -> Self:
        if self._console.is_terminal:
            self._status.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._console.is_terminal:
            self._status.stop()
