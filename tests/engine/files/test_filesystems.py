"""Refused kinds of file systems, found in the kernel's mount table."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from homeagent.engine.files import filesystems
from homeagent.engine.files.filesystems import filesystem_kind, refuse_network_filesystem
from homeagent.errors import DatabaseError

Mount = Callable[..., None]


@pytest.fixture
def mount(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Mount:
    """A function that adds a line to the mount table, with blanks escaped as in the kernel's output."""
    table = tmp_path / "mountinfo"
    monkeypatch.setattr(filesystems, "MOUNT_TABLE", table)

    def add(point: Path | str, kind: str, device: str = "0:99", optional: str = "shared:1 ") -> None:
        escaped = str(point).replace("\\", "\\134").replace(" ", "\\040")
        with table.open("a") as file:
            file.write(f"30 1 {device} / {escaped} rw,relatime {optional}- {kind} source rw\n")

    return add


def test_longest_mount_point_decides(tmp_path: Path, mount: Mount) -> None:
    """The innermost mount of a path, or of a link's target, decides, also for a path that does not exist yet."""
    share = tmp_path / "my share"
    share.mkdir()
    (tmp_path / "my share 2").mkdir()
    (tmp_path / "link").symlink_to(share)
    mount("/", "ext4")
    mount(share, "nfs4", optional="")
    mount("/proc", "proc")
    for path in (share, share / "missing" / "homeagent.db", tmp_path / "link" / "homeagent.db"):
        assert filesystem_kind(path) == "nfs4"
    assert filesystem_kind(tmp_path / "my share 2") == "ext4"


def test_later_mount_hides_the_earlier(tmp_path: Path, mount: Mount) -> None:
    """If a network share covers an automounter's placeholder at the same mount point, the share decides."""
    for point, kind in (("/", "ext4"), (tmp_path, "autofs"), (tmp_path, "nfs")):
        mount(point, kind)
    assert filesystem_kind(tmp_path) == "nfs"


def test_device_number_selects_the_visible_mount(tmp_path: Path, mount: Mount) -> None:
    """If a mount is hidden by another one, the device number of the path shows which of the two decides."""
    device = tmp_path.stat().st_dev
    hidden = tmp_path / "hidden"
    hidden.mkdir()
    mount(hidden, "nfs")
    mount(tmp_path, "xfs", f"{os.major(device)}:{os.minor(device)}")
    assert filesystem_kind(hidden) == "xfs"


def test_unknown_kind_is_accepted(tmp_path: Path, mount: Mount) -> None:
    """Without a mount table, or without a line for the path, the kind is None and the path is accepted."""
    assert filesystem_kind(tmp_path) is None
    refuse_network_filesystem(tmp_path)
    filesystems.MOUNT_TABLE.write_text("not a line of a mount table\n")
    mount("/elsewhere", "nfs")
    assert filesystem_kind(tmp_path) is None


def test_mount_table_of_this_machine_is_read(tmp_path: Path) -> None:
    """On Linux the kind of any directory is found; other systems have no mount table."""
    kind = filesystem_kind(tmp_path)
    assert (kind is not None and kind.isprintable() and kind != "") is sys.platform.startswith("linux")


NETWORK = """
    nfs nfs4 cifs smb3 9p virtiofs fuse.sshfs ceph glusterfs lustre afs fuse.glusterfs fuse.ceph fuse.rclone fuse.s3fs
    fuse.gcsfuse fuse.davfs2 fuse.mfs fuse.gvfsd-fuse fuse.seaweedfs fuse.geesefs fuse.blobfuse2 fuse.mountpoint-s3
"""
LOCAL = """
    ext4 xfs btrfs zfs f2fs tmpfs overlay apfs
    fuse fuseblk fuse.mergerfs fuse.bindfs fuse.gocryptfs fuse.fuse-overlayfs
"""


@pytest.mark.parametrize("kind", NETWORK.split())
def test_network_file_system_is_refused(tmp_path: Path, mount: Mount, kind: str) -> None:
    """On a network file system, WAL could corrupt the database: the error names path, kind and remedy."""
    mount("/", "ext4")
    mount(tmp_path, kind)
    with pytest.raises(DatabaseError, match=r"sqlite\.org/wal\.html.*local disk") as refusal:
        refuse_network_filesystem(tmp_path / "homeagent.db")
    assert f"({kind})" in str(refusal.value)
    assert str(tmp_path / "homeagent.db") in str(refusal.value)


@pytest.mark.parametrize("kind", LOCAL.split())
def test_local_file_system_is_accepted(tmp_path: Path, mount: Mount, kind: str) -> None:
    """A local file system is accepted."""
    mount("/", kind)
    refuse_network_filesystem(tmp_path)
