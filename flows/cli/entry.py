"""What `copal` runs: understand the command line, set libraries up, run the command, give its exit code."""

from __future__ import annotations

import gc
import logging
import os
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from cyclopts import CycloptsError

from flows.cli.app import Call, Options, parse
from flows.cli.errors import run_to_exit_code, usage_error
from flows.terminal.lines import LogLines
from flows.terminal.progress import QUIET

__all__ = ["command", "main"]

# For the libraries, before they are imported; what the user has set wins.
_ENVIRONMENT = {
    "DO_NOT_TRACK": "1",
    "DVC_NO_ANALYTICS": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "PREFECT_LOGGING_LEVEL": "WARNING",
    "PYTHONSAFEPATH": "1",  # processes that are started in the user's folder import nothing from there
    "TOKENIZERS_PARALLELISM": "false",  # else a warning when a process is started
}
_LOOPBACK = ("127.0.0.1", "localhost", "::1")
_SELDOM = (20_000, 20, 20)  # Python's own are 700, 10, 10


def command() -> int:
    """`main` as a process of its own, which looks for garbage seldom.

    Most of what a command allocates are the libraries that it imports, and those stay until it ends. To look for
    garbage among them again and again, and once more at the end, took four of the twelve seconds of a toy's step.
    """
    gc.set_threshold(*_SELDOM)
    try:
        return main()
    finally:
        gc.freeze()  # what is frozen is not looked at


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; gives the exit code.

    0, or what the command says; 1 for a bug (its traceback is in a file), 2 for what a user can mend (one line on
    stderr), 130 when interrupted.
    """
    words = sys.argv[1:] if argv is None else list(argv)
    try:
        call = parse(words)
    except CycloptsError as error:
        return usage_error(error)
    with _surroundings(call.options):
        return run_to_exit_code(lambda: _run(call), words, call.folder, debug=call.options.debug)


def _run(call: Call) -> int:
    with _terminate_as_interrupt():
        return call.run() or 0


@contextmanager
def _surroundings(options: Options) -> Iterator[None]:
    """What libraries and loggers are told: the first for good, what the options say while the command runs."""
    if options.verbose:
        os.environ["PREFECT_LOGGING_LEVEL"] = "INFO"
    elif "PREFECT_LOGGING_LEVEL" not in os.environ:
        # An error of a run reaches the user as one line, not as a traceback before it; a server's log has it.
        for name in ("prefect.flow_runs", "prefect.task_runs"):
            logging.getLogger(name).propagate = False
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    for name in ("NO_PROXY", "no_proxy"):  # a proxy of the user's is not for what runs on this machine
        os.environ[name] = ",".join(dict.fromkeys([*filter(None, os.environ.get(name, "").split(",")), *_LOOPBACK]))
    if options.quiet:
        os.environ[QUIET] = "1"
    try:
        with _logged(options.verbose):
            yield
    finally:
        if options.quiet:
            os.environ.pop(QUIET, None)


@contextmanager
def _logged(verbose: bool) -> Iterator[None]:
    """Where asked for, what copal logs is on standard error; Prefect has a handler of its own."""
    if not verbose:
        yield
        return
    handler = logging.StreamHandler()
    handler.setFormatter(LogLines("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    loggers = [logging.getLogger(name) for name in ("copal", "flows")]
    before = [logger.level for logger in loggers]
    for logger in loggers:
        logger.addHandler(handler)
        logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        for logger, level in zip(loggers, before, strict=True):
            logger.removeHandler(handler)
            logger.setLevel(level)


@contextmanager
def _terminate_as_interrupt() -> Iterator[None]:
    """SIGTERM (a container that stops) ends the command as Ctrl-C does: what it holds is freed."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
