"""The directory of a database: creation, and warnings about an existing directory."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import pytest

from homeagent.engine.files import directories
from homeagent.engine.files.directories import prepare_directory
from homeagent.errors import DatabaseError, InsecureFileError, InvalidArgumentError
from tests.conftest import in_threads
from tests.engine.files.conftest import NOBODY, UNPRIVILEGED, make, mode_of, needs_root, run, snapshot


class TestDirectories:
    def test_readable_directory_is_left_alone(self, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
        """If other users can read the directory, its mode and its time stay, without a warning."""
        directory = tmp_path / "shared"
        directory.mkdir()
        directory.chmod(0o755)
        before = snapshot(tmp_path)
        prepare_directory(directory)
        assert snapshot(tmp_path) == before
        assert caplog.records == []

    @pytest.mark.parametrize("mode", [0o775, 0o777, 0o702, 0o1777])
    def test_directory_that_others_can_write_is_reported_once(self, open_directory: Path, mode: int) -> None:
        """An ordinary user gets one warning if other users can replace the database or can add files (sticky bit)."""
        open_directory.chmod(mode)
        output = run(
            """
            import logging, sys
            from pathlib import Path
            from homeagent.engine.files.directories import prepare_directory
            logging.basicConfig(stream=sys.stdout, format="%(name)s %(levelname)s %(message)s")
            """,
            UNPRIVILEGED,
            """
            for _ in range(2):
                prepare_directory(Path(sys.argv[1]))
            """,
            arguments=[str(open_directory)],
        )
        [problem] = output.splitlines()
        assert problem.startswith("homeagent WARNING ")
        assert f"{mode:04o}" in problem
        assert ("directory of your own" if mode & 0o1000 else "chmod go-w") in problem
        assert mode_of(open_directory) == mode

    @needs_root
    @pytest.mark.parametrize("beneath", ["", "sub/deeper"])
    @pytest.mark.parametrize("mode", [0o775, 0o777, 0o702])
    def test_root_refuses_a_directory_that_others_can_write(self, tmp_path: Path, mode: int, beneath: str) -> None:
        """If other users can write to the directory, root gets an error that names chmod, and no directory is made."""
        directory = tmp_path / "open"
        directory.mkdir()
        directory.chmod(mode)
        before = snapshot(tmp_path)
        with pytest.raises(InsecureFileError, match=f"mode {mode:04o}.*chmod go-w"):
            prepare_directory(directory / beneath)
        assert snapshot(tmp_path) == before

    @needs_root
    def test_root_gets_a_warning_for_a_sticky_directory(self, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
        """In a sticky directory such as /tmp, root gets a warning: others can add files, but not rename root's."""
        directory = tmp_path / "sticky"
        directory.mkdir()
        directory.chmod(0o1777)
        prepare_directory(directory)
        assert "put files next to the database" in caplog.text

    @needs_root
    def test_directory_of_another_user_is_reported(self, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
        """If another user owns the directory, the caller gets a warning: the owner can replace its files."""
        directory = tmp_path / "theirs"
        directory.mkdir(0o700)
        os.chown(directory, NOBODY, NOBODY)
        prepare_directory(directory)
        assert f"belongs to user {NOBODY}" in caplog.text

    def test_only_missing_directories_are_made(self, tmp_path: Path) -> None:
        """New directories below an existing parent are private (0700), and the parent keeps its mode."""
        tmp_path.chmod(0o755)
        for _ in range(2):
            prepare_directory(tmp_path / "a" / "b")
            assert [mode_of(made) for made in (tmp_path / "a", tmp_path / "a" / "b")] == [0o700, 0o700]
            assert mode_of(tmp_path) == 0o755

    @pytest.mark.parametrize("beneath", ["", "sub", "sub/deeper"])
    def test_file_in_the_way_is_named(self, tmp_path: Path, beneath: str) -> None:
        """If a component of the path is a file, the error reports a wrong argument and names the file."""
        blocker = make(tmp_path / "blocker")
        before = snapshot(tmp_path)
        with pytest.raises(InvalidArgumentError, match=r"blocker.* a file"):
            prepare_directory(blocker / beneath)
        assert snapshot(tmp_path) == before

    @pytest.mark.parametrize("beneath", ["", "sub"])
    def test_dangling_link_is_refused(self, tmp_path: Path, beneath: str) -> None:
        """If the path is a dangling link, an error is raised and no directory is created at its target."""
        (tmp_path / "link").symlink_to(tmp_path / "nowhere")
        before = snapshot(tmp_path)
        with pytest.raises((InvalidArgumentError, DatabaseError), match="leads nowhere"):
            prepare_directory(tmp_path / "link" / beneath)
        assert snapshot(tmp_path) == before

    def test_directory_made_by_another_thread_is_kept(self, tmp_path: Path) -> None:
        """If threads prepare one directory at the same time, all succeed."""
        directory = tmp_path / "a" / "b" / "c"
        barrier = threading.Barrier(6)
        done: list[int] = []

        def prepare() -> None:
            barrier.wait()
            prepare_directory(directory)
            done.append(mode_of(directory))

        in_threads(*[prepare] * 6)
        assert done == [0o700] * 6

    def test_file_system_without_modes_is_refused(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """If a new directory cannot be closed to other users, an error is raised."""
        monkeypatch.setattr(directories, "_is_private_directory", lambda directory: False)
        with pytest.raises(InsecureFileError, match="does not keep modes"):
            prepare_directory(tmp_path / "new")
