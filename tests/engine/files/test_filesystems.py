"""Refused kinds of file systems, found in the kernel's mount table."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from homeagent.engine.files.filesystems import filesystem_kind, is_network_filesystem, refuse_network_filesystem
from homeagent.errors import DatabaseError


def mount(point: Path | str, kind: str, device: str = "0:99", optional: str = "shared:1") -> str:
    """Return a line of the kernel's mount table, with blanks escaped as in the kernel's output."""
    escaped = str(point).replace("\\", "\\134").replace(" ", "\\040")
    return f"30 1 {device} / {escaped} rw,relatime {optional} - {kind} source rw\n".replace("  ", " ")


class TestFileSystems:
    def table(self, tmp_path: Path, *lines: str) -> Path:
        path = tmp_path / "mountinfo"
        path.write_text("".join(lines))
        return path

    def test_longest_mount_point_decides(self, tmp_path: Path) -> None:
        """The innermost mount of a path decides, also for a path that does not exist yet."""
        share = tmp_path / "my share"
        share.mkdir()
        (tmp_path / "my share 2").mkdir()
        table = self.table(tmp_path, mount("/", "ext4"), mount(share, "nfs4", optional=""), mount("/proc", "proc"))
        assert filesystem_kind(share, mount_table=table) == "nfs4"
        assert filesystem_kind(share / "missing" / "homeagent.db", mount_table=table) == "nfs4"
        assert filesystem_kind(tmp_path / "my share 2", mount_table=table) == "ext4"

    def test_link_is_followed_to_its_file_system(self, tmp_path: Path) -> None:
        """A link is resolved, and the file system of its target decides."""
        share = tmp_path / "share"
        share.mkdir()
        (tmp_path / "link").symlink_to(share)
        table = self.table(tmp_path, mount("/", "ext4"), mount(share, "cifs"))
        assert filesystem_kind(tmp_path / "link" / "homeagent.db", mount_table=table) == "cifs"

    def test_later_mount_hides_the_earlier(self, tmp_path: Path) -> None:
        """If a network share covers an automounter's placeholder at the same mount point, the share decides."""
        table = self.table(tmp_path, mount("/", "ext4"), mount(tmp_path, "autofs"), mount(tmp_path, "nfs"))
        assert filesystem_kind(tmp_path, mount_table=table) == "nfs"

    def test_device_number_selects_the_visible_mount(self, tmp_path: Path) -> None:
        """If a mount is hidden by another one, the device number of the path shows which of the two decides."""
        device = tmp_path.stat().st_dev
        hidden = tmp_path / "hidden"
        hidden.mkdir()
        table = self.table(
            tmp_path, mount(hidden, "nfs"), mount(tmp_path, "xfs", f"{os.major(device)}:{os.minor(device)}")
        )
        assert filesystem_kind(hidden, mount_table=table) == "xfs"

    def test_unknown_kind_is_accepted(self, tmp_path: Path) -> None:
        """Without a mount table, or without a line for the path, the kind is None and the path is accepted."""
        assert filesystem_kind(tmp_path, mount_table=tmp_path / "absent") is None
        refuse_network_filesystem(tmp_path, mount_table=tmp_path / "absent")
        table = self.table(tmp_path, "not a line of a mount table\n", mount("/elsewhere", "nfs"))
        assert filesystem_kind(tmp_path, mount_table=table) is None

    def test_mount_table_of_this_machine_is_read(self, tmp_path: Path) -> None:
        """On Linux the kind of any directory is found; other systems have no mount table."""
        kind = filesystem_kind(tmp_path)
        assert (kind is not None and kind.isprintable() and kind != "") is sys.platform.startswith("linux")

    @pytest.mark.parametrize(
        "kind",
        [
            *("nfs", "nfs4", "cifs", "smb3", "9p", "virtiofs", "fuse.sshfs", "ceph", "glusterfs", "lustre", "afs"),
            *("fuse.glusterfs", "fuse.ceph", "fuse.rclone", "fuse.s3fs", "fuse.gcsfuse", "fuse.davfs2", "fuse.mfs"),
            *("fuse.gvfsd-fuse", "fuse.seaweedfs", "fuse.geesefs", "fuse.blobfuse2", "fuse.mountpoint-s3"),
        ],
    )
    def test_network_file_system_is_refused(self, tmp_path: Path, kind: str) -> None:
        """On a network file system, WAL could corrupt the database: the error names path, kind and remedy."""
        assert is_network_filesystem(kind)
        table = self.table(tmp_path, mount("/", "ext4"), mount(tmp_path, kind))
        with pytest.raises(DatabaseError, match=r"sqlite\.org/wal\.html.*local disk") as refusal:
            refuse_network_filesystem(tmp_path / "homeagent.db", mount_table=table)
        assert f"({kind})" in str(refusal.value)
        assert str(tmp_path / "homeagent.db") in str(refusal.value)

    @pytest.mark.parametrize(
        "kind",
        [
            *("ext4", "xfs", "btrfs", "zfs", "f2fs", "tmpfs", "overlay", "apfs"),
            *("fuse", "fuseblk", "fuse.mergerfs", "fuse.bindfs", "fuse.gocryptfs", "fuse.fuse-overlayfs"),
        ],
    )
    def test_local_file_system_is_accepted(self, tmp_path: Path, kind: str) -> None:
        """A local file system is accepted."""
        assert not is_network_filesystem(kind)
        refuse_network_filesystem(tmp_path, mount_table=self.table(tmp_path, mount("/", kind)))
