"""Two servers under Patroni, which clones, promotes and rewinds them according to etcd."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from http.client import HTTPConnection
from pathlib import Path
from typing import IO

from tests.conftest import ROOT
from tests.postgresql.load import wait_for
from tests.postgresql.server import Installation, Server, free_port

_PAGE = (ROOT / "docs" / "postgresql.md").read_text(encoding="utf-8").partition("```yaml\n")[2].partition("```")[0]
# JSON reads the values of the page's settings, which are numbers and `true`.
_SETTINGS = {name: json.loads(value) for name, value in re.findall(r"^(\w+): (\S+)", _PAGE, re.MULTILINE)}


class PatroniCluster:
    """One etcd and two nodes, each a Patroni and its PostgreSQL, all on the loopback address."""

    def __init__(self, installation: Installation, directory: Path, etcd: str) -> None:
        self._installation, self._directory, self._etcd = installation, directory, etcd
        self._etcd_port = free_port()
        self._processes: list[subprocess.Popen[bytes]] = []
        self._patroni: dict[Server, subprocess.Popen[bytes]] = {}
        self._logs: list[IO[bytes]] = []
        self.nodes = [Server(installation, directory / name, port=free_port()) for name in ("a", "b")]
        self._rest_ports = {node: free_port() for node in self.nodes}

    def start(self) -> None:
        """Start every process, and return when a store can be created and a standby is ready."""
        self._keep("etcd", partial(subprocess.Popen, _as(self._installation.user) + self._etcd_command()))
        for node in self.nodes:
            self._installation.make_directory(node.directory)
            self.start_node(node)
            wait_for(f"node {node.directory.name}", partial(_is_primary, node, None), seconds=120)
        self.leader.execute("CREATE DATABASE homeagent")
        wait_for("a synchronous standby", self._has_standby, seconds=120)

    def _keep(self, name: str, start: Callable[..., subprocess.Popen[bytes]]) -> subprocess.Popen[bytes]:
        """Start a process with a log, to be stopped with the others."""
        log = (self._directory / f"{name}.log").open("ab")
        self._logs.append(log)
        process = start(stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, cwd=self._directory)
        self._processes.append(process)
        return process

    def _etcd_command(self) -> list[str]:
        client, peer = (f"http://127.0.0.1:{port}" for port in (self._etcd_port, free_port()))
        data = self._installation.make_directory(self._directory / "etcd")
        return [
            self._etcd,
            f"--data-dir={data}", f"--listen-client-urls={client}", f"--advertise-client-urls={client}",
            f"--listen-peer-urls={peer}", f"--initial-advertise-peer-urls={peer}", f"--initial-cluster=default={peer}",
        ]  # fmt: skip

    def start_node(self, node: Server) -> None:
        name = node.directory.name
        configuration = self._directory / f"{name}.yml"
        # JSON is YAML too.
        configuration.write_text(json.dumps(self._configuration(node)))
        command = [str(Path(sys.executable).with_name("patroni")), str(configuration)]
        self._patroni[node] = self._keep(name, partial(subprocess.Popen, _as(self._installation.user) + command))

    def _configuration(self, node: Server) -> dict[str, object]:
        rest = f"127.0.0.1:{self._rest_ports[node]}"
        return {
            "scope": "homeagent",
            "name": node.directory.name,
            "restapi": {"listen": rest, "connect_address": rest},
            "etcd3": {"host": f"127.0.0.1:{self._etcd_port}"},
            "bootstrap": {
                "dcs": {**_SETTINGS, "postgresql": {"use_pg_rewind": True, "parameters": {"wal_keep_size": "256MB"}}},
                "initdb": ["data-checksums", {"encoding": "UTF8"}, {"locale": "C"}],
            },
            "postgresql": {
                "listen": f"127.0.0.1:{node.port}",
                "connect_address": f"127.0.0.1:{node.port}",
                "data_dir": str(node.data),
                "bin_dir": str(self._installation.programs),
                "pgpass": str(node.directory / "pgpass"),
                "authentication": {name: {"username": "postgres"} for name in ("superuser", "replication", "rewind")},
                "pg_hba": [f"host {name} all 127.0.0.1/32 trust" for name in ("all", "replication")],
                "parameters": {"unix_socket_directories": str(node.directory)},
                # If a rewind is not possible, clone the node again.
                "remove_data_directory_on_rewind_failure": True,
                "remove_data_directory_on_diverged_timelines": True,
            },
        }

    @property
    def url(self) -> str:
        ports = ",".join(str(node.port) for node in self.nodes)
        return f"postgresql://postgres@/homeagent?host=127.0.0.1,127.0.0.1&port={ports}&target_session_attrs=read-write"

    @property
    def leader(self) -> Server:
        """The node that accepts writes."""
        (leader,) = (node for node in self.nodes if _is_primary(node, True))
        return leader

    def wait_for_standby(self) -> None:
        """Wait until the other node may be promoted, and until commits wait for the standby."""
        wait_for("a synchronous standby", self._has_standby, seconds=120)
        wait_for("commits that wait for the standby", lambda: self.leader.execute(_WAITING))

    def _has_standby(self) -> bool:
        # The server's own state is not enough: commits wait for a standby shortly before Patroni records the standby in
        # etcd, and Patroni does not promote a standby without a record.
        connection = HTTPConnection("127.0.0.1", self._rest_ports[self.leader], timeout=10)
        try:
            connection.request("GET", "/cluster")
            members = json.load(connection.getresponse())["members"]
        finally:
            connection.close()
        return any(member["role"] == "sync_standby" for member in members)

    def kill_node(self, node: Server) -> None:
        """Kill a node's Patroni and PostgreSQL, as the loss of a host does."""
        self._patroni[node].kill()
        node.kill()
        self._patroni[node].wait(30)

    def stop(self) -> None:
        for process in reversed(self._processes):
            # A Patroni stops its PostgreSQL first; stop etcd last.
            process.terminate()
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait(30)
        for node in self.nodes:
            if node.is_running:
                # A killed server leaves its PID file behind.
                with suppress(AssertionError):
                    node.stop("immediate")
        for log in self._logs:
            log.close()

    def said(self) -> str:
        return "\n".join(
            f"{path.name}: {path.read_text(errors='replace')[-3000:]}" for path in self._directory.glob("*.log")
        )


_WAITING = "SELECT 1 FROM pg_stat_activity WHERE wait_event = 'SyncRep'"


def _as(user: str | None) -> list[str]:
    """Return the prefix that runs a command as another user, because PostgreSQL refuses to run as root.

    The process can still read every file, since this Python may be in a private home directory.
    """
    if user is None:
        return []
    capability = "+dac_override"
    return [
        "setpriv", f"--reuid={user}", f"--regid={_group_of(user)}", "--clear-groups",
        f"--inh-caps={capability}", f"--ambient-caps={capability}", "--",
    ]  # fmt: skip


def _group_of(user: str) -> int:
    import pwd

    return pwd.getpwnam(user).pw_gid


def _is_primary(node: Server, expected: bool | None) -> bool:
    """Return whether a node reports the expected role: primary or not; for None, whether the node answers."""
    import psycopg

    try:
        ((primary,),) = node.execute("SELECT NOT pg_is_in_recovery()")
    except psycopg.Error:
        return False
    return expected is None or primary is expected
