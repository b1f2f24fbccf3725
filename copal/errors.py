"""The errors that copal raises on purpose.

    CopalError                 anything a user can act on; the command line prints one line and exits with 2
    ├── SettingsError          a setting is out of range (names the setting)
    ├── DataError              a domain's data cannot be used (names the file or folder)
    ├── ModelError             a checkpoint is not a causal language model that copal can take apart
    ├── StateError             a sensitivity state does not belong to this base model or settings, or is damaged
    ├── NumericsError          NaN or infinity (names the layer)
    └── ResourceError          memory or disk is not enough (names the setting)

    SmallerBatchWarning        memory ran out, and what was done about it

`flows` adds its own subclasses of CopalError beside the code that raises them. An invariant of copal itself is an
`assert`: it has no class here, and its traceback is a bug report.
"""

from __future__ import annotations

from copal.printable import printable_lines

__all__ = [
    "CopalError",
    "DataError",
    "ModelError",
    "NumericsError",
    "ResourceError",
    "SettingsError",
    "SmallerBatchWarning",
    "StateError",
    "first_line",
    "one_line",
]


def one_line(error: BaseException) -> str:
    """What an error says, on one line; its type where it says nothing."""
    return " ".join(str(error).split()) or type(error).__name__


def first_line(error: BaseException) -> str:
    """The first line of what an error says, for those of libraries that explain themselves at length after it."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


class CopalError(Exception):
    """Says what happened, where, and what to do; one line. What it names of others is made printable."""

    def __str__(self) -> str:
        return printable_lines(super().__str__())


class SettingsError(CopalError):
    """A setting is missing, of the wrong type or out of range."""


class DataError(CopalError):
    """A domain's data cannot be used as it is."""


class ModelError(CopalError):
    """A folder is not a checkpoint of a causal language model that copal can take apart."""


class StateError(CopalError):
    """A sensitivity state belongs to another base model or other settings, or its files are damaged."""


class NumericsError(CopalError):
    """An activation, a statistic or a solution is not finite."""


class ResourceError(CopalError):
    """Memory is not enough for the smallest piece of work, or memory or disk for what is about to begin."""


class SmallerBatchWarning(UserWarning):
    """Memory ran out; the work goes on in smaller pieces."""
