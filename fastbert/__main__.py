"""`python -m fastbert`, and the script `fastbert`."""

from fastbert.cli.commands import main

if __name__ == "__main__":
    main()
