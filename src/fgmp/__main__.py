"""`python -m fgmp` is the `fgmp` command."""

from fgmp.app.cli import main

if __name__ == "__main__":
    main()
