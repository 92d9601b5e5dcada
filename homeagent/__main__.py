"""Run homeagent's command line if a user calls `python -m homeagent`."""

from homeagent.cli import main

if __name__ == "__main__":
    main()
