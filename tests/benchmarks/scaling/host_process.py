"""A host whose pool is full, with nothing in its memory but what it needs: says so, and stays so until input ends."""

from __future__ import annotations

import sys
import threading

from homeagent import Database


def main(target: str) -> None:
    """Hold as many units at once as the pool has places, until standard input ends."""
    with Database.open(target) as database:
        lanes = [(database._engine.writers, False), (database._engine.readers, True)]
        places = sum(lane._size for lane, _ in lanes)
        inside = threading.Barrier(places + 1)
        leave = threading.Event()

        def hold(read_only: bool) -> None:
            with database.unit_of_work(read_only=read_only) as unit:
                unit.devices.list()
                unit.sessions.list(limit=50)
                unit.agents.list()
                inside.wait(60)
                leave.wait(60)

        threads = [
            threading.Thread(target=hold, args=(read_only,)) for lane, read_only in lanes for _ in range(lane._size)
        ]
        for thread in threads:
            thread.start()
        try:
            inside.wait(60)
            print("full", flush=True)  # noqa: T201  its parent reads it
            sys.stdin.read()
        finally:
            leave.set()
            for thread in threads:
                thread.join()


if __name__ == "__main__":
    main(sys.argv[1])
