"""The command line. Each command or group of commands has a module. `application.py` holds the common parts."""

from __future__ import annotations

import signal
import sys


def main() -> None:
    """Run the command in `sys.argv`, and exit with the status of the command."""
    # Ctrl-C raises KeyboardInterrupt only while the command runs. During the imports and the exit of the interpreter,
    # Ctrl-C ends the process at once, because Python would otherwise print a traceback.
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
