"""One step from taking the lineage to the version: what runs, what an earlier run has finished, what is left behind."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from copal.progress import Progress, silent
from flows.gates.champion import settle, unsettled, unshown
from flows.gates.run import conclude
from flows.registry.claims import ALIASES, Claim, claimed
from flows.registry.registry import HeadMovedError
from flows.step.purge import Purged, purge_domain
from flows.step.register import register_step
from flows.step.resolve import Step, resolve, resolve_withdrawal
from flows.step.staging import Evaluation, discard, run_folders, stage, staged_evaluation, staged_report
from flows.step.work import evaluate_step, fetch_data, prune_domain
from flows.workspace import exclusive

if TYPE_CHECKING:
    from copal.step import StepReport
    from flows.gates.judge import GateResult
    from flows.registry.registry import ModelVersion, Registry
    from flows.settings import Settings
    from flows.workspace import Workspace

__all__ = ["Made", "Stages", "Withdrawal", "finish", "plain_stages", "run_step", "run_withdrawal", "sweep"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Stages:
    """The stages of a step; the flow `adapt` makes Prefect tasks of them. See the functions of these names in
    `flows.step.work` and `flows.gates.run`."""

    fetch: Callable[[Workspace, Step], Mapping[str, str]]
    prune: Callable[[Settings, Step, str | None, Claim], StepReport]
    evaluate: Callable[[Settings, Registry, Step, StepReport, Mapping[str, str], Claim], Evaluation]
    register: Callable[[Settings, Registry, Step, StepReport, Evaluation, Claim], ModelVersion]
    conclude: Callable[[Workspace, Settings, Registry, ModelVersion, Claim], tuple[GateResult, ...]]


@dataclass(frozen=True, kw_only=True, slots=True)
class Made:
    """What a step made."""

    version: ModelVersion
    report: StepReport
    evaluation: Evaluation
    gates: tuple[GateResult, ...] = ()

    @property
    def number(self) -> int:
        """Of the version."""
        return self.version.number


@dataclass(frozen=True, kw_only=True, slots=True)
class Withdrawal:
    """What came of a withdrawal: the version, None where an earlier one had withdrawn the domain; what was purged."""

    made: Made | None
    purged: Purged | None


def plain_stages(progress: Progress = silent) -> Stages:
    """The stages as they are, without Prefect."""
    return Stages(
        fetch=fetch_data,
        prune=lambda settings, step, data, claim: prune_domain(settings, step, data, claim.guard(progress)),
        evaluate=lambda settings, registry, step, report, data, claim: evaluate_step(
            settings, registry, step, report, data, claim.guard(progress)
        ),
        register=lambda settings, registry, step, report, evaluation, claim: register_step(
            settings, registry, step, report, evaluation, claim.seal, progress
        ),
        conclude=conclude,
    )


def run_step(
    workspace: Workspace,
    settings: Settings,
    registry: Registry,
    domain: str,
    rev: str | None,
    do: Stages,
    tell: Callable[[str], None] | None = None,
) -> Made | None:
    """Adapt the head of the lineage to a dataset version, alone on the lineage; None where the head knows it already.

    What an earlier run of the same step has finished is not done again. Whatever stops this one, a version that is
    pruned stays staged for the next run, and what is half done goes.

    What is left to do for the head (its gates, say) is done first, even where there is no step to take.

    Args:
        tell: called with a line where another process has the lineage.

    Raises:
        CopalError: see the stages; nothing was registered, unless it is the gates that could not run: then the next
            run does that.
    """
    known = resolve(workspace, settings, registry, domain, rev) is None
    head = registry.head()
    if known and head is not None and head.concluded:  # takes no claim for nothing
        return None
    with claimed(registry, f"adapt to {domain}", lease=settings.run.lease, tell=tell) as claim:
        finish(workspace, settings, registry, claim, do)
        step = resolve(workspace, settings, registry, domain, rev)
        sweep(workspace, registry)
        return _take(settings, registry, workspace, step, claim, do) if step else None


def run_withdrawal(
    workspace: Workspace,
    settings: Settings,
    registry: Registry,
    domain: str,
    why: str,
    do: Stages,
    *,
    purge: bool = False,
    tell: Callable[[str], None] | None = None,
) -> Withdrawal:
    """Make the version without a domain, alone on the lineage, and write it into the log; as resumable as a step.

    Args:
        purge: also delete what is kept of the domain, see `flows.step.purge`; of one that was withdrawn earlier, too.
        tell: called with a line where another process has the lineage.

    Raises:
        CopalError: see the stages; nothing was registered.
    """
    if resolve_withdrawal(workspace, settings, registry, domain, why) is None and not purge:
        return Withdrawal(made=None, purged=None)
    alone = exclusive(workspace) if purge else nullcontext()  # first, as `copal gc` takes them
    with alone, claimed(registry, f"withdraw {domain}", lease=settings.run.lease, tell=tell) as claim:
        finish(workspace, settings, registry, claim, do)
        step = resolve_withdrawal(workspace, settings, registry, domain, why)
        sweep(workspace, registry)
        made = _take(settings, registry, workspace, step, claim, do) if step else None
        claim.check()
        purged = None
        if purge:
            purged = purge_domain(workspace, registry, domain, why.strip())
        return Withdrawal(made=made, purged=purged)


def _take(settings: Settings, registry: Registry, workspace: Workspace, step: Step, claim: Claim, do: Stages) -> Made:
    stage(step)
    try:
        made = _stages(settings, registry, workspace, step, claim, do)
    except BaseException as error:
        if not step.out.is_dir() or isinstance(error, HeadMovedError):
            discard(step)
        raise
    claim.unseal()
    discard(step)
    registry.complete_log()
    return replace(made, gates=do.conclude(workspace, settings, registry, made.version, claim))


def _stages(settings: Settings, registry: Registry, workspace: Workspace, step: Step, claim: Claim, do: Stages) -> Made:
    report = staged_report(step)
    evaluation = staged_evaluation(step)
    if report is None or evaluation is None:
        data = do.fetch(workspace, step)
        report = report or do.prune(settings, step, data.get(step.version.domain), claim)
        evaluation = do.evaluate(settings, registry, step, report, data, claim)
    version = do.register(settings, registry, step, report, evaluation, claim)
    return Made(version=version, report=report, evaluation=evaluation)


def finish(workspace: Workspace, settings: Settings, registry: Registry, claim: Claim, do: Stages) -> None:
    """Do what a killed process left undone after its registration or promotion. Only for who holds the lineage.

    Raises:
        CopalError: see `flows.gates.run.conclude`.
    """
    registry.complete_log()
    entries = registry.log()
    if unsettled(registry, entries) or unshown(registry, entries):
        with claimed(registry, "finish a move", lease=settings.run.lease, on=ALIASES):
            settle(registry, registry.log())
    head = registry.head()
    if head is not None and not head.concluded:
        do.conclude(workspace, settings, registry, head, claim)


def sweep(workspace: Workspace, registry: Registry) -> None:
    """Remove the run folders of steps on versions that are not the head any more: nobody can publish them."""
    head = registry.head()
    for folder, built_on in run_folders(workspace, registry.model_name).items():
        if built_on is not None and head is not None and built_on < head.number:
            shutil.rmtree(folder)
