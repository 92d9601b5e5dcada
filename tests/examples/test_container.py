"""The image of `docs/examples/Containerfile`, built and run by podman with the commands in the file."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from uuid import uuid4

import pytest

from tests.conftest import ROOT

TEXT = (ROOT / "docs" / "examples" / "Containerfile").read_text(encoding="utf-8")

pytestmark = [pytest.mark.slow, pytest.mark.skipif(shutil.which("podman") is None, reason="podman is not installed")]


def run(*command: str, status: int = 0, directory: Path = ROOT) -> str:
    done = subprocess.run(command, cwd=directory, capture_output=True, text=True, timeout=600)
    assert done.returncode == status, done.stdout + done.stderr
    return done.stdout


@pytest.fixture
def container(tmp_path: Path) -> Iterator[str]:
    """The name of a running container. Its image and its volume have the same name."""
    base = re.findall(r"^FROM (\S+)$", TEXT, re.MULTILINE)[0]
    if subprocess.run(["podman", "image", "exists", base]).returncode:
        pulled = subprocess.run(["podman", "pull", "--quiet", base], capture_output=True, text=True)
        if pulled.returncode:
            pytest.skip(f"podman can't pull {base}: {pulled.stderr.strip().splitlines()[-1]}")
    name = f"homeagent-test-{uuid4().hex[:8]}"
    run("git", "clone", "--quiet", str(ROOT), str(tmp_path / "checkout"))  # keep the directory `dist` of this checkout
    commands = [shlex.split(line) for line in re.findall(r"^#     (.+)$", TEXT, re.MULTILINE)]
    renamed = {"gateway": name, "gateway:/var/lib/gateway/.homeagent": f"{name}:/var/lib/gateway/.homeagent"}
    try:
        for command in commands:
            words = [renamed.get(word, word).replace("127.0.0.1:8000:", "127.0.0.1::") for word in command]
            pip = [sys.executable, "-m"] if words[0] == "pip" else []
            run(*pip, *words, directory=tmp_path / "checkout")
        yield name
    finally:
        for command in (["rm", "--force"], ["volume", "rm", "--force"], ["rmi", "--force"]):
            subprocess.run(["podman", *command, name], capture_output=True)


def wait_until_healthy(container: str) -> None:
    """Run the health check of the image until the check succeeds, at most 300 times."""
    check = ["podman", "healthcheck", "run", container]
    assert any(subprocess.run(check, capture_output=True).returncode == 0 for _ in range(300))


def test_container(container: str) -> None:
    """A kill keeps the devices in a private volume, the process is not root, and a stop ends the server with 0."""
    inside = ("podman", "exec", container)
    wait_until_healthy(container)
    run(*inside, "homeagent", "devices", "pair", "phone", "--role", "node", "--approve")
    run("podman", "kill", "--signal", "KILL", container)
    run("podman", "start", container)
    wait_until_healthy(container)
    (device,) = json.loads(run(*inside, "homeagent", "devices", "list", "--json"))
    assert (device["id"], device["status"]) == ("phone", "approved")
    run(*inside, "homeagent", "backup", "/var/lib/gateway/.homeagent/backups")
    files = run(*inside, "find", "/var/lib/gateway/.homeagent", "-type", "f", "-printf", "%m %U %f\n").splitlines()
    assert {line.rsplit(" ", 1)[0] for line in files} == {"600 1000"}
    assert run(*inside, "id", "-u") == "1000\n"
    run(*inside, "touch", "/srv/gateway/api.py", status=1)
    run("podman", "stop", "--time", "60", container)
    assert run("podman", "inspect", "--format", "{{.State.ExitCode}}", container) == "0\n"
