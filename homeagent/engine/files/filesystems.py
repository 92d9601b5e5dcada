"""Kinds of file systems: which one a path lies on, and which of them SQLite's write-ahead log does not work on."""

from __future__ import annotations

import os
import re
from pathlib import Path

from homeagent.engine.files.system_errors import explained, quoted
from homeagent.errors import DatabaseError

__all__ = ["filesystem_kind", "is_network_filesystem", "refuse_network_filesystem"]

# Of more than one kernel: a server's, a host's beside its virtual machine's. WAL keeps its index in memory that all
# connections share, which such a file system does not give (https://sqlite.org/wal.html, section 1). 9p and virtiofs
# are refused although only one machine may use the file: reports of WAL databases corrupted within one guest exist
# for WSL 2's drives (9p), for gVisor's volumes (9p) and for Docker Desktop's and Podman's shared folders (virtiofs).
_NETWORK_KINDS = frozenset(
    {
        "9p", "afpfs", "afs", "beegfs", "ceph", "cifs", "coda", "cvfs", "davfs", "fakeowner", "glusterfs", "gpfs",
        "lustre", "mfs", "ncpfs", "nfs", "nfs4", "orangefs", "panfs", "prl_fs", "pvfs2", "smb3", "smbfs", "vboxsf",
        "virtiofs", "vmhgfs", "wekafs",
        # Through FUSE, as "fuse.<kind>": servers,
        "alluxio-fuse", "ceph-fuse", "cephfs", "curlftpfs", "davfs2", "fuse-nfs", "fuse_dfs", "gvfsd-fuse", "lizardfs",
        "moosefs", "quobyte", "rozofs", "saunafs", "seaweedfs", "smbnetfs", "sshfs",
        # object stores and drives on the internet,
        "blobfuse", "blobfuse2", "cosfs", "gcsfuse", "geesefs", "google-drive-ocamlfuse", "goofys", "juicefs",
        "mountpoint-s3", "onedriver", "ossfs", "rclone", "s3fs", "s3ql",
        # and shared folders.
        "grpcfuse", "osxfs", "vmhgfs-fuse",
    }
)  # fmt: skip


def filesystem_kind(path: Path, *, mount_table: Path = Path("/proc/self/mountinfo")) -> str | None:
    """Return the kind of file system that a path lies on, such as "ext4" or "nfs4".

    Args:
        path: an existing path, or one that is yet to be made.
        mount_table: the kernel's list of mounts (proc_pid_mountinfo(5)).

    Returns:
        None where it can't be told: on macOS, and on a Linux without /proc.
    """
    try:
        table = mount_table.read_bytes()
    except OSError:
        return None  # hidden or not there: unknown is an answer, and says nothing bad about the path
    with explained("inspect", path):
        place = Path(os.path.realpath(path))
        while not place.is_dir() and place != place.parent:
            place = place.parent
        status = place.stat()
    device = f"{os.major(status.st_dev)}:{os.minor(status.st_dev)}"
    found: tuple[bool, int, str] | None = None
    for line in table.splitlines():
        fields, separator, rest = line.partition(b" - ")
        if not separator:
            continue
        point = _unescaped(fields.split()[4])
        if place.is_relative_to(point):
            # The device decides, for a mount may hide longer ones below it. Btrfs shows another device in the table
            # than in stat(2): then the longest mount point does, and the later of two on the same one hides the other.
            rank = (fields.split()[2].decode() == device, len(point))
            if found is None or rank >= found[:2]:
                found = (*rank, rest.split()[0].decode("ascii", "replace"))
    return None if found is None else found[2]


def is_network_filesystem(kind: str) -> bool:
    """Tell whether a kind of file system is shared between machines, or between a host and its virtual machine.

    Args:
        kind: as `filesystem_kind` returns it; one mounted through FUSE begins with "fuse.".
    """
    return kind.removeprefix("fuse.") in _NETWORK_KINDS


def refuse_network_filesystem(path: Path, *, mount_table: Path = Path("/proc/self/mountinfo")) -> None:
    """Refuse a database on a file system that WAL does not work on (https://sqlite.org/wal.html, section 1).

    Where the kind can't be told nothing is refused, so on macOS the choice of the place stays with the operator.

    Raises:
        DatabaseError: the path lies on a network file system or a shared folder.
    """
    kind = filesystem_kind(path, mount_table=mount_table)
    if kind is not None and is_network_filesystem(kind):
        raise DatabaseError(
            f"{quoted(path)} is on a network file system or shared folder ({kind}), where SQLite's write-ahead log "
            "can corrupt the database (https://sqlite.org/wal.html): keep it on a local disk, in a container on a "
            "named volume, or use PostgreSQL"
        )


def _unescaped(field: bytes) -> str:
    """Return a path of the mount table, where blanks and backslashes are written in octal."""
    return os.fsdecode(re.sub(rb"\\([0-7]{3})", lambda match: bytes([int(match[1], 8) & 0xFF]), field))
