"""`python -P -m flows.stack.team`: sets the servers of a team up, and may be run again at any time.

Buckets, MLflow's roles and users, work pools, deployments, alerts: what is there already stays or is
brought to what the environment says. `python -P -m flows.stack.team user NAME ROLE` adds one user; his password is
the first line of standard input. infra/README.md has the variables.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from copal.errors import CopalError, SettingsError
from flows.data.clones import is_url
from flows.isolated import isolated_environment, isolated_python
from flows.stack.alerts import ensure_alerts
from flows.stack.buckets import Bucket, ensure_bucket, parse_buckets
from flows.stack.deployments import deployment_names, prefect_file, render_team_file
from flows.stack.mlflow_users import ROLES, MlflowServer, ensure_roles, ensure_user
from flows.stack.prefect_server import POOLS, UpError, create_pools
from flows.uris import has_secrets, without_secrets

__all__ = ["Team", "pool_template", "read_team", "set_up"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Team:
    """What a team's servers are to be like.

    Attributes:
        mlflow: the server and its administrator; None: users are not copal's matter.
        passwords: role -> password of the user who has the role's name.
        prefect: URL of the API; `auth`: its auth string.
        pool: Prefect's type of the work pools; `templates`: pool -> base job template.
        workspace: its URL, which each host clones for itself, or its folder on every worker.
        interval: seconds between two checks; None is what infra/prefect.yaml says.
        webhook: a URL that is told of what infra/alerts.yaml names; None: nobody is told.
    """

    buckets: tuple[Bucket, ...]
    mlflow: MlflowServer | None
    passwords: Mapping[str, str] = field(repr=False)
    prefect: str
    auth: str | None = field(repr=False)
    pool: str
    templates: Mapping[str, dict[str, Any]]
    workspace: str
    interval: float | None
    webhook: str | None = field(repr=False)


def set_up(team: Team, tell: Callable[[str], None]) -> None:
    """Bring buckets, users, pools and deployments to what `team` says.

    Raises:
        CopalError: a server does not answer or refuses; what was done before stays.
    """
    for bucket in team.buckets:
        ensure_bucket(bucket)
    tell(f"buckets: {', '.join(bucket.name for bucket in team.buckets) or 'none'}")
    if team.mlflow is not None:
        ensure_roles(team.mlflow)
        for role, password in team.passwords.items():
            ensure_user(team.mlflow, role, password, role)
        tell(f"roles of MLflow: {', '.join(ROLES)}; users: {', '.join(team.passwords) or 'none'}")
    create_pools(team.prefect, team.auth, team.pool, team.templates)
    tell(f"work pools: {', '.join(POOLS)}, of the type {team.pool}")
    text = render_team_file(prefect_file(), team.workspace, interval=team.interval)
    _deploy(text, team)
    tell(f"deployments: {', '.join(deployment_names(text))}")
    if team.webhook is not None:
        tell(f"alerts: {', '.join(ensure_alerts(team.prefect, team.auth, team.webhook))}")


def read_team(environment: Mapping[str, str]) -> Team:
    """What the variables say; infra/README.md has their table.

    Raises:
        SettingsError: one is missing or is nothing that it may be.
    """

    def wanted(name: str) -> str:
        if not environment.get(name):
            raise SettingsError(f"{name} is not set: infra/README.md says what it is")
        return environment[name]

    pool = environment.get("COPAL_POOL_TYPE", "process")
    if pool not in ("process", "kubernetes"):
        raise SettingsError(f"COPAL_POOL_TYPE must be process or kubernetes, not {pool!r}")
    workspace = wanted("COPAL_WORKSPACE")
    if has_secrets(workspace):
        raise SettingsError(
            f"COPAL_WORKSPACE ({without_secrets(workspace)}) holds a password, which the deployments' pages would "
            "show: leave it out, and give git a file of credentials, see infra/README.md"
        )
    if not (is_url(workspace) or workspace.startswith("/")):
        raise SettingsError(f"COPAL_WORKSPACE must be a git URL, or an absolute path on the workers, not {workspace!r}")
    return Team(
        buckets=parse_buckets(environment.get("COPAL_BUCKETS", "")),
        mlflow=_mlflow(environment),
        passwords={
            role: environment[name] for role in ROLES if environment.get(name := f"MLFLOW_{role.upper()}_PASSWORD")
        },
        prefect=wanted("PREFECT_API_URL"),
        auth=environment.get("PREFECT_API_AUTH_STRING") or None,
        pool=pool,
        templates=_templates(wanted("COPAL_JOB_TEMPLATE"), wanted("COPAL_JOB_DEFAULTS")) if pool != "process" else {},
        workspace=workspace,
        interval=_seconds(environment.get("COPAL_WATCH_INTERVAL")),
        webhook=environment.get("COPAL_WEBHOOK_URL") or None,
    )


def pool_template(template: dict[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    """A base job template with these values in the place of its variables' defaults.

    Raises:
        SettingsError: the template has no such variable.
    """
    properties = dict(template["variables"]["properties"])
    for name, value in defaults.items():
        if name not in properties:
            raise SettingsError(f"the job template has no variable {name}: there are {', '.join(properties)}")
        properties[name] = {**properties[name], "default": value}
    return {**template, "variables": {**template["variables"], "properties": properties}}


def _mlflow(environment: Mapping[str, str]) -> MlflowServer | None:
    names = ("COPAL_REGISTRY_URI", "MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD")
    uri, user, password = (environment.get(name) for name in names)
    return MlflowServer(uri, user, password) if uri and user and password else None


def _seconds(text: str | None) -> float | None:
    try:
        seconds = float(text) if text else None
    except ValueError:
        seconds = -1.0
    if seconds is not None and not 0 < seconds < float("inf"):
        raise SettingsError(f"COPAL_WATCH_INTERVAL must be a number of seconds above 0, not {text!r}")
    return seconds


def _templates(template: str, defaults: str) -> dict[str, dict[str, Any]]:
    try:
        base, by_pool = (json.loads(Path(name).read_text(encoding="utf-8")) for name in (template, defaults))
    except (OSError, ValueError) as error:
        raise SettingsError(f"{template} or {defaults} cannot be read as JSON ({error})") from error
    return {pool: pool_template(base, by_pool.get(pool, {})) for pool in POOLS}


def _deploy(text: str, team: Team) -> None:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "prefect.yaml"
        file.write_text(text, encoding="utf-8")
        environment = isolated_environment() | {"PREFECT_API_URL": team.prefect}
        if team.auth is not None:
            environment["PREFECT_API_AUTH_STRING"] = team.auth
        done = subprocess.run(
            isolated_python("prefect", "--no-prompt", "deploy", "--all", "--prefect-file", str(file)),
            cwd=folder,
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
    if done.returncode != 0:
        said = (done.stderr.strip() or done.stdout.strip() or "it said nothing").splitlines()
        raise UpError(f"the deployments were refused: {said[-1]}")


def main(*arguments: str) -> int:
    try:
        match arguments:
            case ():
                set_up(read_team(os.environ), print)
            case ("user", name, role):
                server = _mlflow(os.environ)
                if server is None:
                    raise SettingsError("COPAL_REGISTRY_URI and MLFLOW_TRACKING_USERNAME, _PASSWORD are not all set")
                password = sys.stdin.readline().rstrip("\n")
                if not password:
                    raise SettingsError(f"the first line of standard input must be the password of {name}")
                ensure_user(server, name, password, role)
                print(f"{name} is a {role}")
            case _:
                raise SettingsError("usage: python -P -m flows.stack.team [user NAME ROLE]")
    except CopalError as error:
        print(f"copal: {error}", file=sys.stderr)
        return 2 if isinstance(error, SettingsError) else 1
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
