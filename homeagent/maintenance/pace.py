"""Choose the batch size and the pause of the sweep, depending on writers that wait for the write lock."""

from __future__ import annotations

# Longest time for finding and deleting the rows of a batch while other writers wait, in seconds. The limit does not
# include the commit, because the duration of a commit hardly depends on the number of rows.
_LONGEST_WORK = 0.004
_FEWEST_ROWS = 10

# Pauses after a batch, in seconds. Without contention the pause is short. The pause is above zero, because writers of
# another process can wait unnoticed. After contention the pause is a multiple of the time for which the batch held the
# write lock.
_SHORTEST_PAUSE = 0.001
_PAUSE_FACTOR = 4
_LONGEST_PAUSE = 0.25


class Pace:
    """Object that chooses the sizes of a sweep's batches and the pauses between the batches. The argument is the
    maximum number of rows of a batch.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._fewest = min(_FEWEST_ROWS, most)
        self.rows: int = most
        """Number of rows of the next batch."""

    def after_batch(self, *, worked: float, held: float, contended: bool) -> float:
        """Choose the size of the next batch, and return the pause before the next batch, in seconds.

        Args:
            worked: duration of the batch's statement, in seconds.
            held: time for which the batch held the write lock, including the commit, in seconds.
            contended: True if the batch waited for another writer, or if another writer waited for the batch.
        """
        rows = self.rows * 2
        if contended and worked > 0:
            rows = min(rows, int(self.rows * _LONGEST_WORK / worked))
        self.rows = max(self._fewest, self.rows // 2, min(rows, self._most))
        return self.rest_after(held) if contended else _SHORTEST_PAUSE

    def rest_after(self, held: float) -> float:
        """Return the pause in seconds after a batch that held the write lock for the given time, in seconds."""
        return min(max(held * _PAUSE_FACTOR, _SHORTEST_PAUSE), _LONGEST_PAUSE)
