"""`python -m homeagent` runs the command `homeagent`."""

from homeagent.cli import main

if __name__ == "__main__":
    main()
