"""Entry point of `python -m fastbert` and of the `fastbert` script."""

from fastbert.cli.commands import main

if __name__ == "__main__":
    main()
