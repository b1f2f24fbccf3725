"""The `copal` command: one file for each group of commands.

What is heavy is imported by the command that needs it, so that `copal --help` is quick.
"""

from flows.cli.entry import command, main

__all__ = ["command", "main"]
