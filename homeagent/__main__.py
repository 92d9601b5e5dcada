"""Run homeagent's command line for `python -m homeagent`."""

from homeagent.cli import main

if __name__ == "__main__":
    main()
