"""Users and roles of an MLflow server with basic-auth, over its REST API: MLflow's own client knows no roles.

Roles are MLflow's; what they may do in the ledger is the database's matter (infra/README.md).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from copal.errors import CopalError

__all__ = ["ROLES", "MlflowServer", "UsersError", "ensure_roles", "ensure_user"]

_SECONDS = 30.0
_WORKSPACE = "default"  # the only one where MLflow's workspaces are off
_RESOURCES = ("experiment", "registered_model")

# What each may do with every experiment and registered model. A worker may delete, for it purges and collects garbage;
# a promoter moves aliases and writes tags, which is an update of the model.
ROLES: Mapping[str, str] = {"reader": "READ", "worker": "MANAGE", "promoter": "EDIT"}


class UsersError(CopalError):
    """The MLflow server does not answer, or refuses what its administrator asks for."""


@dataclass(frozen=True, slots=True)
class MlflowServer:
    """A server, and the administrator as whom it is asked."""

    uri: str
    user: str
    password: str = field(repr=False)


def ensure_roles(server: MlflowServer, roles: Mapping[str, str] = ROLES) -> None:
    """Create the roles that are not there, and give each its permission where it has another.

    Args:
        roles: name -> MLflow's permission for every experiment and registered model.

    Raises:
        UsersError: see there.
    """
    for name, permission in roles.items():
        number = _role(server, name)
        if number is None:
            answer = _ask(server, "POST", "roles/create", {"name": name, "workspace": _WORKSPACE})
            number = int(answer["role"]["id"])
        there = {
            found["resource_type"]: found
            for found in _ask(server, "GET", "roles/permissions/list", {"role_id": number})["role_permissions"]
            if found["resource_pattern"] == "*"
        }
        for resource in _RESOURCES:
            found = there.get(resource)
            if found is None:
                grant = {
                    "role_id": number,
                    "resource_type": resource,
                    "resource_pattern": "*",
                    "permission": permission,
                }
                _ask(server, "POST", "roles/permissions/add", grant)
            elif found["permission"] != permission:
                change = {"role_permission_id": found["id"], "permission": permission}
                _ask(server, "PATCH", "roles/permissions/update", change)


def ensure_user(server: MlflowServer, name: str, password: str, role: str) -> None:
    """Create the user if he is not there; give him this password and this one of the `ROLES`, and take him the others.

    Raises:
        UsersError: see there; or no such role.
    """
    wanted = _role(server, role)
    if wanted is None:
        raise UsersError(f"{server.uri} has no role {role}: there are {', '.join(ROLES)} once the roles are set up")
    account = {"username": name, "password": password}
    if name in {user["username"] for user in _ask(server, "GET", "users/list", {}, version="2.0")["users"]}:
        _ask(server, "PATCH", "users/update-password", account, version="2.0")
    else:
        _ask(server, "POST", "users/create", account, version="2.0")
    held = {
        found["name"]: int(found["id"]) for found in _ask(server, "GET", "users/roles/list", _account(name))["roles"]
    }
    if role not in held:
        _ask(server, "POST", "roles/assign", {**_account(name), "role_id": wanted})
    for other in held.keys() & ROLES.keys() - {role}:
        _ask(server, "DELETE", "roles/unassign", {**_account(name), "role_id": held[other]})


def _account(name: str) -> dict[str, Any]:
    return {"username": name}


def _role(server: MlflowServer, name: str) -> int | None:
    found = _ask(server, "GET", "roles/list", {"workspace": _WORKSPACE})["roles"]
    return next((int(role["id"]) for role in found if role["name"] == name), None)


def _ask(
    server: MlflowServer, method: str, what: str, values: Mapping[str, Any], *, version: str = "3.0"
) -> dict[str, Any]:
    import requests

    given: dict[str, Any] = {"params": values} if method == "GET" else {"json": values}
    try:
        answer = requests.request(
            method,
            f"{server.uri.rstrip('/')}/api/{version}/mlflow/{what}",
            auth=(server.user, server.password),
            timeout=_SECONDS,
            **given,
        )
    except requests.RequestException as error:
        raise UsersError(f"the MLflow server at {server.uri} does not answer ({type(error).__name__})") from None
    if answer.status_code == 401:
        raise UsersError(f"the MLflow server at {server.uri} does not know {server.user} with this password")
    if not answer.ok:
        said = " ".join(answer.text.split())[:200]
        raise UsersError(f"the MLflow server at {server.uri} refuses {what} ({answer.status_code}): {said}")
    found: dict[str, Any] = answer.json()
    return found
