"""The fork server of the tests: its children behave as processes of a fresh interpreter."""

from __future__ import annotations

import signal

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


def test_child_ends_like_an_interpreter() -> None:
    """At the end, threads are joined, exit handlers run and output is written; an error is printed with status 1."""
    done = fork_server.run(
        "import atexit, threading, time\natexit.register(print, 'handler')\n"
        "threading.Thread(target=lambda: (time.sleep(0.01), print('thread'))).start()\nraise RuntimeError('reason')"
    )
    assert (done.returncode, done.stdout) == (1, "thread\nhandler\n")
    assert done.stderr.endswith("RuntimeError: reason\n")


def test_signals_reach_the_child() -> None:
    """The exit status of a killed child is the negative number of the signal, also for many children at once."""
    children = [Child("import signal\nprint('ready', flush=True)\nsignal.pause()") for _ in range(4)]
    for child in children:
        assert child.stdout.readline() == "ready\n"
        assert child.poll() is None
        child.send_signal(signal.SIGKILL if child is children[0] else signal.SIGTERM)
    for child in children:
        child.communicate(timeout=30)
    assert [child.returncode for child in children] == [-9, -15, -15, -15]
