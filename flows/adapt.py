"""The flow `adapt`: one step of continual pruning, from a dataset version to a registered model version.

`flows.step.run.run_step` has the order of a step, and what an earlier run has done already. Its Prefect tasks are in
`flows.runs.tasks`.
"""

from __future__ import annotations

from prefect import flow

from flows.gates.judge import failed
from flows.project import open_project
from flows.runs.artifacts import show_perplexity
from flows.runs.limit import time_limit
from flows.runs.log import about_version, note, tell
from flows.runs.names import adapt_run
from flows.runs.tasks import step_tasks
from flows.step.run import run_step

__all__ = ["adapt"]


@flow(name="adapt", flow_run_name=adapt_run, persist_result=True, result_serializer="json")
def adapt(workspace: str, domain: str, rev: str | None = None) -> int | None:
    """Adapt the newest model version to a dataset version, and register what comes out.

    The result, or the error, is stored for whoever started this on a worker.

    Args:
        workspace: the folder of the workspace.
        domain: the folder under data/.
        rev: the revision at which its data is wanted; None: the watched branch.

    Returns:
        The number of the new version; None where the newest version knows this data already.

    Raises:
        CopalError: something that a user has to mend. What was pruned already waits for the next run; a version that
            was registered already stays, and the next run takes it through its gates.
        TimeLimitError: the step took longer than run.time_limit.
    """
    project = open_project(workspace)
    with time_limit(project.settings.run.time_limit):
        made = run_step(project, domain, rev, step_tasks(), tell=tell)
    if made is None:
        return None
    show_perplexity(project.name, made)
    bad = len(failed(made.gates))
    note(
        f"version {made.number} of {project.name}: adapted to {domain}; {bad or 'no'} gate{'s' * (bad != 1)} failed",
        about_version(project.name, made.version, domain),
    )
    return made.number
