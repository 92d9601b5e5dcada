"""Durability after a power cut."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from homeagent.engine.files import sync
from homeagent.engine.files.sync import fsync_directory
from homeagent.errors import DatabaseError


@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOTSUP])
def test_directory_without_sync_is_accepted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    """If a file system cannot sync a directory, the sync is skipped; any other failure raises an error."""

    def fail(descriptor: int) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(sync, "sync", fail)
    code = number
    fsync_directory(tmp_path)
    code = errno.EIO
    with pytest.raises(DatabaseError, match="sync the directory"):
        fsync_directory(tmp_path)
