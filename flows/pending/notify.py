"""Tells a Prefect server that datasets changed. The event only wakes the watcher, which then compares by itself."""

from __future__ import annotations

import os
from collections.abc import Sequence

from copal.errors import CopalError, first_line
from flows.pending.missing_data import forget
from flows.project import Project
from flows.stack.access import access_of
from flows.stack.prefect_server import client_settings
from flows.stack.state import is_up

__all__ = ["EVENT", "NotifyError", "changed_since", "notify"]

EVENT = "copal.dataset.version.created"


class NotifyError(CopalError):
    """An event cannot be sent."""


def changed_since(project: Project, rev: str) -> list[str]:
    """The domains whose data at the watched branch is not that of commit `rev`; all of them where `rev` is empty.

    Raises:
        DatasetError: there is no such commit, or the repository cannot be read.
    """
    from flows.data.commits import resolve_commit, watched_revision
    from flows.data.repositories import data_root
    from flows.data.versions import dataset_versions

    settings = project.settings
    root = data_root(project.workspace, settings.watch)
    now = dataset_versions(root, watched_revision(root, settings.watch.branch))
    if not rev:
        return [version.domain for version in now]
    before = {version.domain: version.md5 for version in dataset_versions(root, resolve_commit(root, rev))}
    return [version.domain for version in now if before.get(version.domain) != version.md5]


def notify(project: Project, domains: Sequence[str]) -> str:
    """Send the event of each domain; when this returns the server has them.

    Where the data of such a domain was missing, the watcher looks for it at once.

    Returns:
        URL of the server's API: `PREFECT_API_URL`, else that of `copal up` in this workspace.

    Raises:
        NotifyError: there is no server, or it does not answer.
        DatasetError: a domain is not tracked, or the repository cannot be read.
    """
    from flows.data.commits import watched_revision
    from flows.data.dataset import DatasetError
    from flows.data.repositories import data_root
    from flows.data.versions import dataset_versions

    workspace, settings = project.workspace, project.settings
    stack = is_up(workspace)
    url = os.environ.get("PREFECT_API_URL") or (stack.prefect if stack else None)
    if not url:
        raise NotifyError(f"no Prefect server to notify: run `copal up` in {workspace.root}, or set PREFECT_API_URL")
    root = data_root(workspace, settings.watch)
    watched = watched_revision(root, settings.watch.branch)
    versions = {version.domain: version for version in dataset_versions(root, watched)}
    for domain in domains:
        if domain not in versions:
            raise DatasetError(
                f"DVC does not track data/{domain} in {root}; it tracks {', '.join(sorted(versions)) or 'no domain'}"
            )
    for domain in domains:
        forget(workspace, settings.model.name, domain)
    access = access_of(workspace, url)
    _send(
        url,
        access.auth_string if access is not None else None,
        [
            {
                "domain": domain,
                "md5": versions[domain].md5,
                "git_rev": versions[domain].git_rev,
                "repository": versions[domain].repository,
            }
            for domain in domains
        ],
    )
    return url


def _send(url: str, auth: str | None, payloads: Sequence[dict[str, str]]) -> None:
    """Let in by `auth`, or else as the environment or the profile says.

    Over HTTP, which answers when the server has the events; Prefect's own emitter sends them in the background.
    """
    import httpx
    from prefect.client.orchestration import get_client
    from prefect.events import Event, Resource
    from prefect.settings import PREFECT_API_AUTH_STRING, PREFECT_API_URL, temporary_settings

    events = [
        Event(
            event=EVENT,
            resource=Resource({"prefect.resource.id": f"copal.dataset.{payload['domain']}"}),
            payload=payload,
        )
        for payload in payloads
    ]
    try:
        with (
            temporary_settings({PREFECT_API_URL: url} | ({PREFECT_API_AUTH_STRING: auth} if auth else {})),
            get_client(httpx_settings=client_settings(url), sync_client=True) as client,
        ):
            body = [event.model_dump(mode="json") for event in events]
            client.request("POST", "/events", json=body).raise_for_status()
    except (httpx.HTTPError, OSError, RuntimeError) as error:
        raise NotifyError(f"the Prefect server at {url} was not notified: {first_line(error)}") from error
