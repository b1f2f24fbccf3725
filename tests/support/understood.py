"""Whether a command that a page names would be understood: parsed by the program's own parser, and not run."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import re
import subprocess
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).parents[2]
_OTHERS = {"convert_hf_to_gguf"}  # modules that a page has its reader install, and tests/flows/models runs
_SHELL = {".", "cd", "cp", "export", "mkdir", "openssl", "rm", "set", "source"}  # taken as they are


def problem(words: Sequence[str], *, whole: bool = True) -> str | None:
    """What is wrong with a command; None where nothing is. `whole`: what it needs may not be left out."""
    program, rest = Path(words[0]).name, list(words[1:])
    if program in _SHELL:
        return None
    match program:
        case "copal":
            return _copal(rest, whole)
        case "make":
            return _make(rest)
        case "python":
            return _python(rest)
        case "dvc":
            return _dvc(rest)
        case "git":
            return _git(rest)
        case "mlflow":
            return _mlflow(rest)
        case "prefect":
            return _prefect(rest)
        case "pip":
            return _pip(rest)
    return f"{program}: a program that no page has named before: say here how it is checked"


def _copal(words: list[str], whole: bool) -> str | None:
    from cyclopts import CycloptsError, MissingArgumentError

    from flows.cli.app import parse

    try:
        parse(words)
    except MissingArgumentError as error:
        return str(error) if whole else None
    except CycloptsError as error:
        return str(error)
    return None


def _make(words: list[str]) -> str | None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = re.findall(r"^([a-z-]+):.* ## ", makefile, re.MULTILINE)
    variables = re.findall(r"^([A-Z_]+) \?=", makefile, re.MULTILINE)
    for word in words:
        name, assigned, _ = word.partition("=")
        if name not in (variables if assigned else targets):
            return f"make: no {'variable' if assigned else 'target'} {name}"
    return None


def _python(words: list[str]) -> str | None:
    words = [word for word in words if word != "-P"]
    if words[0] != "-m":
        return None if (ROOT / words[0]).is_file() else f"python: no file {words[0]}"
    try:
        there = words[1] in _OTHERS or importlib.util.find_spec(words[1]) is not None
    except ModuleNotFoundError:
        there = False
    return None if there else f"python: no module {words[1]}"


def _dvc(words: list[str]) -> str | None:
    from dvc.cli.parser import DvcParserError, get_main_parser

    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        try:
            get_main_parser().parse_args(words)
        except DvcParserError:
            return f"dvc: does not understand {' '.join(words)}"
    return None


def _git(words: list[str]) -> str | None:
    done = subprocess.run(["git", "--list-cmds=main"], capture_output=True, text=True, check=True)
    return None if words[0] in done.stdout.split() else f"git: no command {words[0]}"


def _mlflow(words: list[str]) -> str | None:
    import click
    from mlflow.cli import cli

    command: click.Command = cli
    while words and isinstance(command, click.Group):
        name = words.pop(0)
        found = command.get_command(click.Context(command), name)
        if found is None:
            return f"mlflow: no command {name}"
        command = found
    options = {option for parameter in command.params for option in parameter.opts}
    unknown = [word for word in words if word.startswith("-") and word not in options]
    return f"mlflow: no option {unknown[0]}" if unknown else None


def _prefect(words: list[str]) -> str | None:
    from cyclopts import CycloptsError
    from prefect.cli._app import _app

    try:
        _app.parse_args(words, exit_on_error=False, print_error=False)
    except CycloptsError as error:
        return f"prefect: {error}"
    return None


def _pip(words: list[str]) -> str | None:
    from pip._internal.commands import commands_dict, create_command

    if words[0] not in commands_dict:
        return f"pip: no command {words[0]}"
    said = io.StringIO()
    with contextlib.redirect_stderr(said):
        try:
            create_command(words[0]).parse_args(words[1:])
        except SystemExit:
            return f"pip: {said.getvalue().strip().splitlines()[-1]}"
    return None
