"""`python -P -m flows.cli`: without `-P`, Python would take a package `flows` of the folder where it runs."""

import sys

from flows.cli.entry import command

if __name__ == "__main__":
    sys.exit(command())
