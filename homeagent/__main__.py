"""`python -m homeagent`: the same as the command `homeagent`."""

from homeagent.cli import main

if __name__ == "__main__":
    main()
