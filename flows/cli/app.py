"""The command line as a whole: which commands there are, in which groups, and the options of all of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated

from cyclopts import App, Group, Parameter, UnknownOptionError
from cyclopts.help import DefaultFormatter, PanelSpec
from cyclopts.validators import mutually_exclusive
from rich.box import Box

from flows.cli import lineage, promotion, start, team, work

__all__ = ["Call", "Options", "make_app", "parse"]

_HELP = "One pruned language model for a growing list of domains, and which data made which version of it."
_AUDITED = "What made a version"
_GROUPS: tuple[tuple[str, tuple[Callable[..., int], ...]], ...] = (
    ("Getting started", (start.init, start.add, start.base, start.sizes, start.doctor, start.demo, start.completion)),
    ("Adapting to domains", (work.watch, work.adapt, work.status, work.plan, work.withdraw, work.gc)),
    ("Which version serves", (promotion.gates, promotion.promote, promotion.rollback, promotion.export)),
    (_AUDITED, (lineage.lineage, lineage.plot, lineage.verify, lineage.replay)),
    ("Running it for a team", (team.up, team.down, team.node, team.notify, team.metrics, team.hook)),
)
_OPTIONS = Group("Options of every command", sort_key=len(_GROUPS))
_VERBOSITY = Group("Verbosity", show=False, validator=mutually_exclusive)
_Flag = Annotated[bool, Parameter(group=(_OPTIONS, _VERBOSITY))]
_QUESTIONS: tuple[Callable[..., int], ...] = (lineage.used, lineage.data, lineage.diff, lineage.worse, lineage.whose)


@dataclass(frozen=True, kw_only=True, slots=True)
class Options:
    """What every command can be told.

    Attributes:
        verbose: show what goes on inside, on standard error.
        quiet: print results only.
        debug: show the traceback of a bug.
    """

    verbose: bool = False
    quiet: bool = False
    debug: bool = False


@dataclass(frozen=True, slots=True)
class Call:
    """A command line that was understood.

    Attributes:
        run: does it; gives the exit code, None for 0.
        folder: the workspace that it is about.
    """

    run: Callable[[], int | None]
    options: Options
    folder: Path


def parse(words: Sequence[str]) -> Call:
    """Understand a command line.

    Raises:
        CycloptsError: it is wrong; says how.
    """
    app = make_app()
    command, bound, _ = app.meta.parse_args(words)
    if command is not _options:  # --help or --version
        return Call(partial(command, *bound.args, **bound.kwargs), Options(), Path())
    rest, options = _options(*bound.args, **bound.kwargs)
    try:
        command, bound, _ = app.parse_args(rest)
    except UnknownOptionError as error:  # what was meant may be an option of every command
        error.argument_collection.extend(app.meta.assemble_argument_collection())
        raise
    run = partial(command, *bound.args, **bound.kwargs)
    bound.apply_defaults()
    # The folder of `copal init` is, or becomes, a workspace.
    folder = bound.arguments.get("workspace", bound.arguments.get("folder"))
    return Call(run, options, Path(folder) if isinstance(folder, (str, Path)) else Path())


def make_app() -> App:
    """The commands in their groups; `app.meta` takes the options of all of them."""
    app = App(
        name="copal",
        help=_HELP,
        version=_version,
        help_format="plaintext",
        help_formatter=DefaultFormatter(panel_spec=PanelSpec(box=Box("    \n" * 8), padding=(0, 1, 0, 3))),
        default_parameter=Parameter(negative=(), show_default=_default),
        exit_on_error=False,
        print_error=False,
        suppress_keyboard_interrupt=False,
        result_action="return_value",
    )
    groups = {title: Group(title, sort_key=number) for number, (title, _) in enumerate(_GROUPS)}
    for title, commands in _GROUPS:
        for number, command in enumerate(commands):
            app.command(command, group=groups[title], sort_key=number)
    audit = App(name="audit", help="Answer an auditor's question about the lineage.", group=groups[_AUDITED])
    for number, question in enumerate(_QUESTIONS):
        audit.command(question, sort_key=number)
    app.command(audit)
    for flag in ("--help", "--version"):
        app[flag].group = (_OPTIONS,)
    app.meta.default(_options)
    return app


def _options(
    *words: Annotated[str, Parameter(show=False, allow_leading_hyphen=True)],
    verbose: _Flag = False,
    quiet: _Flag = False,
    debug: Annotated[bool, Parameter(group=_OPTIONS)] = False,
) -> tuple[tuple[str, ...], Options]:
    """The options of every command, and what is left.

    Args:
        verbose: Show what goes on inside, on standard error.
        quiet: Print results only: no progress, no hints.
        debug: Show the traceback of a bug here, in place of writing it to a file.
    """
    return words, Options(verbose=verbose, quiet=quiet, debug=debug)


def _default(value: object) -> str | None:
    """How a default is shown in a help text; None: not at all, a flag is off unless it is given."""
    return None if value is False else str(value)


def _version() -> str:
    from importlib import metadata

    try:
        return f"copal {metadata.version('copal')}"
    except metadata.PackageNotFoundError:
        return "copal (not installed)"
