"""The deployments of a workspace: infra/prefect.yaml, filled in."""

from __future__ import annotations

import sysconfig
from pathlib import Path

from flows.settings import Settings
from flows.stack.prefect_server import GPU_POOL, UpError
from flows.uris import has_secrets
from flows.workspace import Workspace

__all__ = [
    "deployment_names",
    "prefect_file",
    "render_prefect_file",
    "render_team_file",
    "shipped_file",
]


def prefect_file() -> Path:
    """infra/prefect.yaml: see `shipped_file`."""
    return shipped_file("prefect.yaml")


def shipped_file(name: str) -> Path:
    """A file of infra/: of the checkout, or as installed with the package.

    Raises:
        UpError: it is not there.
    """
    places = (
        Path(__file__).parents[2] / "infra" / name,
        Path(sysconfig.get_path("data")) / "share" / "copal" / name,
    )
    for place in places:
        if place.is_file():
            return place
    raise UpError(f"{places[0]} is missing, and so is {places[1]}: install copal anew")


def render_prefect_file(
    template: Path, workspace: Workspace, settings: Settings, *, registry: str | None, devices: str | None
) -> str:
    """The deployments of a workspace: infra/prefect.yaml with its folder, schedule, stores and devices filled in."""
    import yaml

    content = yaml.safe_load(template.read_text(encoding="utf-8"))
    for deployment in content["deployments"]:
        deployment["parameters"]["workspace"] = str(workspace.root)
        variables = deployment["work_pool"]["job_variables"]["env"]
        variables["PREFECT_RESULTS_LOCAL_STORAGE_PATH"] = str(workspace.private / "results")
        if registry is not None:
            stores = {"COPAL_REGISTRY_URI": registry, "COPAL_LEDGER_URI": workspace.ledger_uri(settings)}
            # Prefect would show a password. The workers of `copal up` have both anyway, from its environment.
            variables |= {name: uri for name, uri in stores.items() if not has_secrets(uri)}
        if deployment["name"] == "watch":
            watch = settings.watch
            deployment["schedules"] = [{"cron": watch.cron} if watch.cron else {"interval": watch.interval}]
        elif devices is not None and deployment["work_pool"]["name"] == GPU_POOL:
            variables["CUDA_VISIBLE_DEVICES"] = devices
    return yaml.safe_dump(content, sort_keys=False)


def render_team_file(template: Path, workspace: str, *, interval: float | None) -> str:
    """The deployments of a team: infra/prefect.yaml for hosts that share no files.

    Args:
        workspace: its URL, which each host clones for itself, or its folder on every worker.
        interval: seconds between two checks; None leaves what the template says.
    """
    import yaml

    content = yaml.safe_load(template.read_text(encoding="utf-8"))
    for deployment in content["deployments"]:
        deployment["parameters"]["workspace"] = workspace
        variables = deployment["work_pool"]["job_variables"]["env"]
        variables.pop("PREFECT_RESULTS_LOCAL_STORAGE_PATH", None)  # deployments share what an anchor names
        if deployment["name"] == "watch" and interval is not None:
            deployment["schedules"] = [{"interval": interval}]
    return yaml.safe_dump(content, sort_keys=False)


def deployment_names(text: str) -> list[str]:
    """The names of the deployments in a rendered file."""
    import yaml

    return [deployment["name"] for deployment in yaml.safe_load(text)["deployments"]]
