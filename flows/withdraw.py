"""The flow `withdraw`: a version as if a domain had never been seen."""

from __future__ import annotations

from prefect import flow

from flows.project import open_project
from flows.runs.artifacts import show_perplexity
from flows.runs.limit import time_limit
from flows.runs.log import about_version, note, tell
from flows.runs.names import withdraw_run
from flows.runs.tasks import step_tasks
from flows.step.run import Withdrawal, run_withdrawal

__all__ = ["withdraw"]


@flow(name="withdraw", flow_run_name=withdraw_run, result_serializer="json")
def withdraw(workspace: str, domain: str, why: str, purge: bool = False) -> Withdrawal:
    """Make a version without a domain, and register it: see `flows.step.run.run_withdrawal`.

    Args:
        workspace: the folder of the workspace.
        domain: a domain that the newest version knows, or one withdrawn earlier that is to be purged now.
        why: the reason, for the log. The log names the user of the worker, so say here who wants it.
        purge: also delete what is kept of the domain's data.

    Raises:
        CopalError: something that a user has to mend. What was pruned already waits for the next run.
        TimeLimitError: it took longer than run.time_limit.
    """
    project = open_project(workspace)
    with time_limit(project.settings.run.time_limit):
        done = run_withdrawal(project, domain, why, step_tasks(), purge=purge, tell=tell)
    if done.made is not None:
        show_perplexity(project.name, done.made)
        version = done.made.version
        note(
            f"version {version.number} of {project.name}: without {domain}",
            about_version(project.name, version, domain),
        )
    return done
