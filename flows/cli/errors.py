"""How a command that fails ends: one line on standard error, and an exit code."""

from __future__ import annotations

import errno
import os
import platform
import sys
import tempfile
import traceback
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path

from cyclopts import CycloptsError, UnusedCliTokensError

from copal.errors import CopalError
from copal.files import write_atomic
from flows.cli.output import refuse
from flows.terminal.lines import write

__all__ = ["run_to_exit_code", "usage_error"]

# These are no bugs of copal, and one line says enough: a full disk, a folder that is gone or may not be written to.
_SURROUNDINGS = frozenset(
    {
        *(errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS, errno.EIO),
        *(errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG, errno.ELOOP),
        *(errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ECONNREFUSED),
    }
)


def run_to_exit_code(run: Callable[[], int], words: Sequence[str], folder: Path, *, debug: bool) -> int:
    """Run a command; gives its exit code, or else 2 for what a user can mend, 130 when interrupted, 1 for a bug.

    Args:
        words: the command line, for the file about a bug.
        folder: the workspace, if it is one.
        debug: show the traceback of a bug on the terminal, and write no file.
    """
    try:
        return run()
    except CopalError as error:
        return refuse(str(error))
    except BrokenPipeError:  # whoever read what this prints has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except KeyboardInterrupt:
        return refuse("interrupted", code=130)
    except Exception as error:  # noqa: BLE001 - the last one: nobody but a developer should see a traceback
        if _interrupted(error):
            return refuse("interrupted", code=130)
        if (
            isinstance(error, OSError)
            and error.errno in _SURROUNDINGS
            and (error.filename or error.errno != errno.ENOENT)
        ):
            return refuse(f"{error.filename or 'the disk'}: {error.strerror}")
        if debug:
            write("".join(traceback.format_exception(error)).rstrip(), sys.stderr)
            return 1
        return _bug(error, words, folder)


def _interrupted(error: BaseException | None) -> bool:
    """Whether an error is what a library's clean-up made of Ctrl-C, which can arrive in the middle of it."""
    while error is not None and not isinstance(error, KeyboardInterrupt):
        error = error.__context__
    return error is not None


def usage_error(error: CycloptsError) -> int:
    """Say what is wrong with a command line, and which help tells more; gives the exit code 2."""
    error.verbose = False
    if isinstance(error, UnusedCliTokensError):
        said = f"unexpected: {' '.join(error.unused_tokens or ())}."
    else:
        said, _, _ = str(error).partition(" Available commands:")  # the help shows them in their groups
    said = said if said.endswith((".", "?")) else f"{said}."
    command = " ".join(("copal", *(error.command_chain or ())))
    return refuse(f"{said[:1].lower()}{said[1:]} See `{command} --help`.")


def _bug(error: Exception, words: Sequence[str], folder: Path) -> int:
    from flows.uris import without_secrets

    said = " ".join(str(error).split())
    name = type(error).__name__
    text = (
        f"command: copal {' '.join(words)}\npython: {platform.python_version()} ({sys.executable})\n\n"
        f"{''.join(traceback.format_exception(error))}"
    )
    file = _write(f"error-{datetime.now(UTC):%Y%m%dT%H%M%S}-{os.getpid()}.log", without_secrets(text), folder)
    return refuse(f"unexpected {name}{said and f': {said}'} (a bug; its traceback is in {file}, --debug shows it)", 1)


def _write(name: str, text: str, folder: Path) -> Path:
    """Write a log into the workspace, or into a temporary folder where there is none that can be written to."""
    from flows.workspace import make_private, open_workspace

    try:
        workspace = open_workspace(folder)
        logs = make_private(workspace, workspace.private / "logs")
        write_atomic(logs / name, text)
        return logs / name
    except (CopalError, OSError):
        file = Path(tempfile.mkdtemp(prefix="copal-")) / name
        file.write_text(text, encoding="utf-8")
        return file
