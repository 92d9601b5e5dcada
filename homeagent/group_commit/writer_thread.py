"""A thread that does for others what may block, starts with the first of it, and ends when there is none for long."""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import Generic, TypeVar

__all__ = ["WriterThread"]

logger = logging.getLogger("homeagent")

T = TypeVar("T")

# After so many seconds without work the thread ends; the next piece starts another one.
_IDLE = 5.0


class WriterThread(Generic[T]):
    """Does one piece of work after the other, in a daemon thread.

    Args:
        act: does a piece of work. What it raises is logged, and the next piece is done all the same.
    """

    def __init__(self, act: Callable[[T], object]) -> None:
        self._act = act
        # A signal's handler may come while its own thread holds it, and close the database.
        self._mutex = threading.RLock()
        self._inbox: queue.SimpleQueue[T | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._closed = False

    def hand(self, work: T) -> None:
        """Have a piece of work done.

        Raises:
            RuntimeError, MemoryError: the system has no thread or no memory left. The piece was not taken.
        """
        if self._thread is threading.current_thread():
            self._inbox.put(work)  # it looks there before it ends
            return
        with self._mutex:
            self._inbox.put(work)
            if self._thread is None:
                # Before it starts: who waits for that may be interrupted, and the thread does the work all the same.
                self._thread = threading.Thread(target=self._work, name="homeagent-writer", daemon=True)
                try:
                    self._thread.start()
                except Exception:  # raised again: whatever kept it from starting, nobody will take what is in there
                    self._thread = None
                    with suppress(queue.Empty):
                        while True:
                            self._inbox.get_nowait()
                    raise

    def _work(self) -> None:
        while True:
            try:
                work = self._inbox.get(timeout=0 if self._closed else _IDLE)
            except queue.Empty:
                work = None
            if work is not None:
                try:
                    self._act(work)
                except BaseException as error:
                    # Nobody would start another thread in the place of one that ended here.
                    logger.exception(
                        "the thread that does units for others met an error, and goes on",
                        extra={"event": "writer_failed", "error": type(error).__name__},
                    )
                continue
            with self._mutex:
                if self._inbox.empty():
                    self._thread = None
                    return

    def close(self, timeout: float) -> None:
        """End the thread once it has done what it was given, and wait for that so many seconds."""
        with self._mutex:
            self._closed = True
            thread = self._thread
            if thread is not None:
                self._inbox.put(None)
        if thread is None or thread is threading.current_thread():
            return
        thread.join(timeout)
        if thread.is_alive():
            logger.warning(
                "a unit of work did not end within %.3f s of closing the database: its function hangs",
                timeout,
                extra={"event": "unit_hangs", "waited_seconds": timeout},
            )
