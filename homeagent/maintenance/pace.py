"""How much of cleaning is done at a time, and how long it rests in between: by what others notice of it."""

from __future__ import annotations

__all__ = ["Pace"]

# For how long a batch may look for its rows and remove them while others wait, in seconds. What its commit takes
# depends on the disk and hardly on the rows, so that is no reason for fewer.
_LONGEST_WORK = 0.004
_FEWEST_ROWS = 10

# The rest after a batch, in seconds, where nobody was seen to wait: another process may, which shows only when it is
# met. Where somebody waited, it is so many times what the batch took of their time, and bounded.
_REST = 0.001
_SHARE = 4
_LONGEST_REST = 0.25


class Pace:
    """Adapts the batches of a sweep to those who write beside it.

    Args:
        most: how many rows a batch has at most.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._fewest = min(_FEWEST_ROWS, most)
        self.rows = most
        """How many rows the next batch has."""

    def after_batch(self, *, worked: float, held: float, contended: bool) -> float:
        """Choose the next batch, and return for how many seconds to rest before it.

        Args:
            worked: how long its statement took, in seconds.
            held: how long it kept others from writing, its commit included, in seconds.
            contended: whether somebody waited for it, or it for somebody.
        """
        rows = self.rows * 2
        if contended and worked > 0:
            rows = min(rows, int(self.rows * _LONGEST_WORK / worked))
        self.rows = max(self._fewest, self.rows // 2, min(rows, self._most))
        return self.rest_after(held) if contended else _REST

    def rest_after(self, held: float) -> float:
        """Return for how many seconds to rest after others were kept waiting for so many."""
        return min(max(held * _SHARE, _REST), _LONGEST_REST)
