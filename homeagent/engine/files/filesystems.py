"""Find the kind of a path's file system. Refuse network file systems, on which SQLite's WAL does not work."""

from __future__ import annotations

import os
import re
from pathlib import Path

from homeagent.engine.files.system_errors import explained, quoted
from homeagent.errors import DatabaseError

# The WAL index needs memory that all connections share. Network file systems do not provide such memory
# (https://sqlite.org/wal.html, section 1). Even with one machine, WAL databases were corrupted on 9p and virtiofs.
_NETWORK_KINDS = frozenset(
    {
        # Network file systems, and shared folders of virtual machines:
        "9p", "afpfs", "afs", "beegfs", "ceph", "cifs", "coda", "cvfs", "davfs", "fakeowner", "glusterfs", "gpfs",
        "grpcfuse", "lustre", "mfs", "ncpfs", "nfs", "nfs4", "orangefs", "osxfs", "panfs", "prl_fs", "pvfs2", "smb3",
        "smbfs", "vboxsf", "virtiofs", "vmhgfs", "vmhgfs-fuse", "wekafs",
        # FUSE file systems of remote storage (the mount table shows "fuse.<kind>"):
        "alluxio-fuse", "blobfuse", "blobfuse2", "ceph-fuse", "cephfs", "cosfs", "curlftpfs", "davfs2", "fuse-nfs",
        "fuse_dfs", "gcsfuse", "geesefs", "google-drive-ocamlfuse", "goofys", "gvfsd-fuse", "juicefs", "lizardfs",
        "moosefs", "mountpoint-s3", "onedriver", "ossfs", "quobyte", "rclone", "rozofs", "s3fs", "s3ql", "saunafs",
        "seaweedfs", "smbnetfs", "sshfs",
    }
)  # fmt: skip

MOUNT_TABLE = Path("/proc/self/mountinfo")


def filesystem_kind(path: Path) -> str | None:
    """Return the kind of a path's file system, such as "ext4" (proc_pid_mountinfo(5)). Return None without /proc."""
    try:
        table = MOUNT_TABLE.read_bytes()
    except OSError:
        return None  # the list of mounts can't be read, so the kind is unknown
    with explained("inspect", path):
        place = Path(os.path.realpath(path))
        while not place.is_dir() and place != place.parent:
            place = place.parent
        status = place.stat()
    device = f"{os.major(status.st_dev)}:{os.minor(status.st_dev)}".encode()
    # Compare bytes, because Path.is_relative_to is too slow for Database.open.
    inside = os.fsencode(place).rstrip(b"/") + b"/"
    found: tuple[bool, int, bytes] | None = None
    for line in table.splitlines():
        fields, separator, rest = line.partition(b" - ")
        if not separator:
            continue
        _, _, number, _, escaped, *_ = fields.split()
        # The kernel writes a blank or a backslash as an octal code.
        point = re.sub(rb"\\([0-7]{3})", lambda code: bytes([int(code[1], 8) & 0xFF]), escaped)
        if inside.startswith(point.rstrip(b"/") + b"/"):
            # Prefer a mount with the path's device number. A later mount can hide the mount with the longest path. On
            # Btrfs, `stat()` returns another device number than the mount table. If no device number matches, use the
            # mount with the longest path. If two mounts have the same path, use the later mount.
            rank = (number == device, len(point))
            if found is None or rank >= found[:2]:
                found = (*rank, rest.split()[0])
    return None if found is None else found[2].decode("ascii", "replace")


def is_network_filesystem(kind: str) -> bool:
    """Return True for a file system that several machines can share. A virtual machine counts as a machine."""
    return kind.removeprefix("fuse.") in _NETWORK_KINDS


def refuse_network_filesystem(path: Path) -> None:
    """Raise DatabaseError for a network file system or a shared folder. Accept an unknown file system."""
    kind = filesystem_kind(path)
    if kind is not None and is_network_filesystem(kind):
        raise DatabaseError(
            f"{quoted(path)} is on a network file system or shared folder ({kind}), where SQLite's write-ahead log "
            "can corrupt the database (https://sqlite.org/wal.html): keep it on a local disk, in a container on a "
            "named volume, or use PostgreSQL"
        )
