"""`python -m flows.cli`; with `python -P`, a package `flows` in the folder where it runs does no harm."""

import sys

from flows.cli.entry import main

if __name__ == "__main__":
    sys.exit(main())
