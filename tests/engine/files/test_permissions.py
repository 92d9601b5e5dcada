"""Every new file and directory is private to its owner."""

from __future__ import annotations

import json
from pathlib import Path

from tests.engine.files.conftest import UNPRIVILEGED, run


class TestAnyUmask:
    def test_everything_is_private_under_any_umask(self, open_directory: Path) -> None:
        """New directories get 0700 and files 0600, SQLite's own files included, and the umask does not change."""
        output = run(
            """
            import json, os, sqlite3, stat, sys
            from datetime import timedelta
            from pathlib import Path
            from homeagent.engine.files.directories import prepare_directory
            from homeagent.engine.files.database_file import create_file, sidecars
            from homeagent.engine.files.locks import FileLock
            """,
            UNPRIVILEGED,
            """
            set_umask = os.umask
            def forbidden(mask):
                raise AssertionError("the umask belongs to the whole process")
            os.umask = forbidden
            found = {}
            for umask in (0o000, 0o022, 0o077, 0o777):
                set_umask(umask)
                top = Path(sys.argv[1]) / format(umask, "03o")
                directory = top / "one" / "two"
                prepare_directory(directory)
                path = directory / "homeagent.db"
                assert create_file(path) is True
                with FileLock(directory / "homeagent.lock", timeout=timedelta(0)) as lock:
                    lock.write_marker("initialised")
                connection = sqlite3.connect(path)
                assert connection.execute("PRAGMA journal_mode=WAL").fetchone() == ("wal",)
                connection.execute("CREATE TABLE t (a)")
                made = [top, top / "one", top / "one" / "two", *(top / "one" / "two").iterdir()]
                found[format(umask, "03o")] = {
                    str(each.relative_to(top)): stat.S_IMODE(each.lstat().st_mode) for each in made
                }
                connection.close()
                assert set_umask(umask) == umask
            print(json.dumps(found))
            """,
            arguments=[str(open_directory)],
        )
        expected = {
            ".": 0o700,
            "one": 0o700,
            "one/two": 0o700,
            "one/two/homeagent.db": 0o600,
            "one/two/homeagent.db-wal": 0o600,
            "one/two/homeagent.db-shm": 0o600,
            "one/two/homeagent.lock": 0o600,
        }
        assert json.loads(output) == dict.fromkeys(("000", "022", "077", "777"), expected)
