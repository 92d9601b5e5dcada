"""The fork server of the tests: its children behave as processes of a fresh interpreter."""

from __future__ import annotations

from tests import fork_server
from tests.fork_server import Child

CHECKS = """
import os, sys, threading, warnings
assert names == {"names"}, names
assert sys.modules["__main__"].__dict__ is globals()
assert sys.argv == ["-c", "a b", "2"]
assert (os.environ["NAME"], os.environ["PATH"]) == ("value", "/nowhere")
assert os.getsid(0) == os.getpgid(0) == os.getpid()
assert warnings.filters[0][0] == "error"
assert threading.active_count() == 1
assert sorted(os.listdir("/dev/fd"))[:4] == ["0", "1", "2", "3"], "3 is the directory"
assert len(os.listdir("/dev/fd")) == 4
assert sys.stdin.read() == "input"
print("output")
"""


def test_child_is_like_a_fresh_process() -> None:
    """A child has its own arguments, environment and session, no further names, threads or descriptors."""
    with Child("input()"):
        names = "names = {name for name in globals() if not name.startswith('__')} | {'names'}"
        environment = {"NAME": "value", "PATH": "/nowhere"}
        done = fork_server.run(names + CHECKS, "a b", 2, input="input", environment=environment)
    assert (done.returncode, done.stdout, done.stderr) == (0, "output\n", "")
