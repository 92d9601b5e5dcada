"""The command line. The module `application.py` holds the common parts of the commands."""

from __future__ import annotations

import signal
import sys


def main() -> None:
    """Run the command in `sys.argv`, and exit with its status."""
    # Ctrl-C raises KeyboardInterrupt only while the command runs. During the imports and the exit, Ctrl-C must not
    # print a traceback.
    is_default = signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if is_default:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    from homeagent.cli.commands import run

    if is_default:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        run()
    except KeyboardInterrupt:  # Ctrl-C came before the command began or after it ended
        sys.exit(130)
    finally:
        if is_default:
            signal.signal(signal.SIGINT, signal.SIG_DFL)
