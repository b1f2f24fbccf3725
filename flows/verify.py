"""The flow `verify`: is each version that serves, or may serve, still what was registered? It changes nothing.

Its run fails where anything differs, so that a team's automation or pager for failed runs hears of it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from prefect import flow
from prefect.artifacts import create_table_artifact

from copal.errors import CopalError
from flows.project import open_project
from flows.registry.versions import ModelVersion
from flows.runs.artifacts import artifact_key
from flows.runs.log import tell
from flows.runs.names import verify_run
from flows.verification.verify import Verification
from flows.verification.verify import verify as verify_version

__all__ = ["VerifyError", "verify"]


class VerifyError(CopalError):
    """A version is not what was registered, or cannot be checked."""


@flow(name="verify", flow_run_name=verify_run, result_serializer="json")
def verify(workspace: str, version: str | None = None, data: bool = True) -> list[int]:
    """Verify versions, as `copal verify` does.

    Args:
        workspace: the folder of the workspace.
        version: a number, or an alias such as champion; None: every version that has an alias.
        data: also fetch and hash the data of every domain.

    Returns:
        The numbers of the versions that were checked.

    Raises:
        VerifyError: something differs; says what, of which version.
        CopalError: the registry cannot be read, or there is no such version.
    """
    project = open_project(workspace)
    registry = project.registry
    chosen = (
        [registry.resolve(version)] if version is not None else [each for each in registry.versions() if each.aliases]
    )
    found: dict[int, Verification] = {}
    problems: dict[int, Sequence[str]] = {}
    for each in chosen:
        try:
            found[each.number] = verify_version(project, each, data=data)
            problems[each.number] = found[each.number].findings
        except CopalError as error:  # a key that is not there, say: the other versions are looked at all the same
            problems[each.number] = (f"it cannot be checked: {error}",)
    create_table_artifact(
        key=artifact_key(project.name, "verify"),
        table=_rows(chosen, found, problems),
        description=f"{registry.model_name}: {len(chosen)} versions checked, "
        f"{sum(map(len, problems.values()))} differences",
    )
    for number, lines in problems.items():
        tell(f"version {number}: {'; '.join(lines) or 'nothing differs'}")
    differs = [f"version {number}: {problem}" for number, lines in problems.items() for problem in lines]
    if differs:
        raise VerifyError(f"{registry.model_name}: {'; '.join(differs)}")
    return [each.number for each in chosen]


def _rows(
    versions: Sequence[ModelVersion], found: Mapping[int, Verification], problems: Mapping[int, Sequence[str]]
) -> list[dict[str, Any]]:
    """A row a version: what differs, what was looked at and what was not."""
    rows = []
    for version in versions:
        checked = found.get(version.number)
        rows.append(
            {
                "version": version.number,
                "aliases": ", ".join(version.aliases),
                "differs": "; ".join(problems[version.number]) or "nothing",
                "checked": ", ".join(checked.checked) if checked else "",
                "not checked": "; ".join(checked.skipped) if checked else "all of it",
            }
        )
    return rows
