"""Running it for a team: `copal up`, `down`, `node`, `notify`, `metrics` and `hook`."""

from __future__ import annotations

import os
from typing import Annotated, Literal

from cyclopts import Parameter
from cyclopts.validators import Number

from flows.cli.context import CommandError, Folder, open_project
from flows.cli.output import hint, say
from flows.terminal.progress import working

__all__ = ["down", "hook", "metrics", "node", "notify", "up"]

_Port = Annotated[int, Parameter(validator=Number(gte=1, lte=65535))]


def up(
    *,
    port: _Port = 4200,
    mlflow_port: _Port = 5000,
    devices: str | None = None,
    detach: bool = False,
    workspace: Folder = ".",
) -> int:
    """Run servers, watcher and workers for a team, on this machine, until interrupted.

    Args:
        port: Of the Prefect server.
        mlflow_port: Of the MLflow server.
        devices: CUDA devices that a step may see, as 0,1; default: all.
        detach: Return when all is up; `copal down` ends it.
    """
    from flows.stack.up import up as run
    from flows.stack.up import up_detached

    project = open_project(workspace)
    opened, settings = project.workspace, project.settings
    if detach:
        ports = ("--port", str(port), "--mlflow-port", str(mlflow_port))
        up_detached(opened, (*ports, *(("--devices", devices) if devices is not None else ())), hint)
    else:
        run(opened, settings, port=port, mlflow_port=mlflow_port, devices=devices, tell=hint, working=working)
    return 0


def down(*, workspace: Folder = ".") -> int:
    """End what `copal up` runs in the workspace."""
    from flows.data.workspaces import workspace_folder
    from flows.stack.up import down as end
    from flows.workspace import open_workspace

    opened = open_workspace(workspace_folder(workspace))  # whatever has become of its settings
    with working("ending what runs"):
        ended = end(opened)
    say(f"{'ended what ran' if ended else 'nothing runs'} in {opened.root}")
    return 0


def node(
    number: Annotated[int, Parameter(validator=Number(gte=1))],
    /,
    *,
    wait: Annotated[float, Parameter(validator=Number(gt=0))] = 600.0,
    workspace: Folder = ".",
) -> int:
    """Take a step together with the machine that runs it (model.nodes), until that is done.

    Args:
        number: Of this machine: 1 and up, each its own; 0 runs the step.
        wait: Seconds in which node 0 must be there, at COPAL_NODES_ADDRESS.
    """
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # else torch writes a stack for a connection that ends
    from flows.step.node import serve

    project = open_project(workspace)
    address = project.settings.run.nodes_address
    if address is None:
        raise CommandError("set COPAL_NODES_ADDRESS to HOST:PORT, where node 0 is")
    serve(project, number, address, wait, hint)
    hint(f"node {number}: the step is over")
    return 0


def notify(*domains: str, since: str | None = None, workspace: Folder = ".") -> int:
    """Tell the Prefect server of new dataset versions, so that the watcher looks.

    Args:
        domains: The folders under data/.
        since: Instead: those whose data changed since this git revision; empty: all.
    """
    from flows.pending.notify import changed_since
    from flows.pending.notify import notify as tell

    if (since is None) == (not domains):
        raise CommandError("name domains, or --since REV")
    project = open_project(workspace)
    found = list(domains) if since is None else changed_since(project, since)
    if not found:
        say("nothing to notify of: no domain changed")
        return 0
    url = tell(project, found)
    say(f"notified {url} of {', '.join(found)}")
    return 0


def metrics(*, port: _Port | None = None, host: str = "127.0.0.1", workspace: Folder = ".") -> int:
    """Print the lineage's figures in Prometheus's text format, or serve them.

    Args:
        port: Serve them at /metrics on this port, asked anew at each scrape, until interrupted; default: print once.
        host: The address to serve them on.
    """
    from prometheus_client import start_http_server

    from flows.pending.metrics import exposition, registry_of

    open_project(workspace)  # what is wrong with it is said at once, and not at each scrape
    if port is None:
        say(exposition(workspace).rstrip())
        return 0
    try:
        server, thread = start_http_server(port, host, registry_of(workspace))
    except OSError as error:
        raise CommandError(f"cannot serve on {host}:{port} ({error.strerror}): choose another --port") from error
    hint(f"http://{host}:{port}/metrics; Ctrl-C ends it")
    try:
        thread.join()
    finally:
        server.shutdown()
    return 0


def hook(action: Literal["install", "uninstall"], /, *, workspace: Folder = ".") -> int:
    """Notify from git: add to the hooks post-commit and post-merge, or remove that.

    Args:
        action: What to do.
    """
    from flows.pending.hook import install, uninstall

    project = open_project(workspace)
    if action == "install":
        for path in install(project):
            say(f"{path}: notifies the watcher")
        return 0
    removed = uninstall(project)
    for path in removed:
        say(f"{path}: copal's part is removed")
    if not removed:
        say(f"no hook of copal's in {project.workspace.root}")
    return 0
