"""The order of a step, from taking the lineage to the gates: what runs, and what an earlier run has done already."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from copal.errors import CopalError
from copal.files import freed_bytes
from copal.progress import Progress, silent
from flows.data.dataset import UnusableDataError
from flows.gates.run import run_gates
from flows.ledger.errors import ClaimLostError
from flows.project import Project, complete_log, hold_lineage, refusing
from flows.registry.errors import HeadMovedError
from flows.step.events import lineage_events
from flows.step.finish import finish, sweep
from flows.step.purge import Purged, purge_domain
from flows.step.register import register_step
from flows.step.resolve import UNFINISHED, Inputs, Step, find_step, find_withdrawal, inputs_of, run_folder, step_on
from flows.step.resources import check_resources, domains_after
from flows.step.staging import Evaluation, discard, prepare, staged_evaluation, staged_report
from flows.step.work import evaluate_step, fetch_data, prune_domain
from flows.workspace import exclusive

if TYPE_CHECKING:
    from copal.step import StepReport
    from flows.data.dataset import DatasetVersion
    from flows.gates.judge import GateResult
    from flows.ledger import Claim
    from flows.registry.versions import ModelVersion
    from flows.settings import Settings
    from flows.step.gang import Gang

__all__ = ["Made", "Tasks", "Withdrawal", "plain_tasks", "run_step", "run_withdrawal"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Tasks:
    """The six tasks of a step, in their order; the flow `adapt` makes Prefect tasks of them.

    `inputs_of`, `fetch_data`, `prune_domain`, `evaluate_step`, `register_step` and `run_gates` say what each does.
    """

    inputs: Callable[[Project, ModelVersion], Inputs]
    fetch: Callable[[Project, Step], Mapping[str, str]]
    prune: Callable[[Project, Step, Mapping[str, str], Claim], StepReport]
    evaluate: Callable[[Project, Step, StepReport, Mapping[str, str], Claim], Evaluation]
    register: Callable[[Project, Step, StepReport, Evaluation, Claim], ModelVersion]
    gates: Callable[[Project, ModelVersion, Claim], tuple[GateResult, ...]]


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


def plain_tasks(progress: Progress = silent, tell: Callable[[str], None] | None = None) -> Tasks:
    """The tasks as plain functions, without Prefect.

    Args:
        tell: see `flows.gates.run.run_gates`.
    """
    return Tasks(
        inputs=lambda project, parent: inputs_of(project.registry, parent),
        fetch=fetch_data,
        prune=lambda project, step, data, claim: prune_domain(project.settings, step, data, claim.guard(progress)),
        evaluate=lambda project, step, report, data, claim: evaluate_step(
            project, step, report, data, claim.guard(progress)
        ),
        register=lambda project, step, report, evaluation, claim: register_step(
            project, step, report, evaluation, claim.seal, progress
        ),
        gates=lambda project, version, claim: run_gates(project, version, claim, tell),
    )


def run_step(
    project: Project, domain: str, rev: str | None, tasks: Tasks, tell: Callable[[str], None] | None = None
) -> Made | None:
    """Adapt the head of the lineage to a dataset version, alone on the lineage; None where the head knows it already.

    What an earlier run of the same step has finished is not done again. Whatever stops this one, a version that is
    pruned stays staged for the next run, and of one that is not the blocks that are; unless it is the data or the
    model that cannot be used.

    What is left to do for the head (its gates, say) is done first, even where there is no step to take.

    Args:
        tell: called with a line where another process has the lineage.

    Data that is refused is written down in the ledger: a watcher tries it again only with other settings.

    With `model.nodes` above 1 the others come first: until then nothing is done.

    Raises:
        CopalError: see the tasks; nothing was registered, unless it is the gates that could not run: then the next
            run does that.
    """
    with _others(project.settings) as gang, hold_lineage(project, f"adapt to {domain}", tell) as claim:
        finish(project, claim, tasks.gates)
        found = find_step(project, domain, rev)
        if found is None:
            sweep(project)
            return None
        sweep(project, run_folder(project, found[2]))
        with refusing(project, domain, found[1].md5):
            return _take(project, _helped(_fitting(project, found, tasks), gang), claim, tasks)


def run_withdrawal(
    project: Project,
    domain: str,
    why: str,
    tasks: Tasks,
    *,
    purge: bool = False,
    tell: Callable[[str], None] | None = None,
) -> Withdrawal:
    """Make the version without a domain, alone on the lineage, and write it into the log; as resumable as a step.

    Args:
        purge: also delete what is kept of the domain, see `flows.step.purge`; of one withdrawn earlier, too.
        tell: called with a line where another process has the lineage.

    Raises:
        CopalError: see the tasks; nothing was registered.
    """
    alone = exclusive(project.workspace) if purge else nullcontext()  # first, as `copal gc` takes them
    with _others(project.settings) as gang, alone, hold_lineage(project, f"withdraw {domain}", tell) as claim:
        finish(project, claim, tasks.gates)
        found = find_withdrawal(project, domain, why)
        sweep(project, run_folder(project, found[2]) if found else None)
        made = None
        if found:
            made = _take(project, _helped(_fitting(project, found, tasks, why.strip()), gang), claim, tasks)
        claim.check()
        purged = purge_domain(project, domain, why.strip()) if purge else None
        return Withdrawal(made=made, purged=purged)


def _fitting(
    project: Project, found: tuple[ModelVersion, DatasetVersion, str], tasks: Tasks, why: str | None = None
) -> Step:
    """The step that was found, once it is sure that it fits; weights are fetched after that.

    Args:
        why: of a withdrawal.
    """
    head, version, key = found
    run, withdraws = run_folder(project, key), why is not None
    if not (run / "version").is_dir():  # else what takes most is done
        begun = freed_bytes(run / UNFINISHED)
        domains = domains_after(project.registry, head, version.domain, withdraws=withdraws)
        check_resources(project, domains, begun)
    inputs = tasks.inputs(project, head)
    return step_on(project.registry, head, inputs, version, key, run, withdraws=withdraws, why=why)


def _others(settings: Settings) -> AbstractContextManager[Gang | None]:
    """The other machines that take a step, once they are there; None where there are none."""
    if settings.model.nodes == 1:
        return nullcontext()
    from flows.step.gang import open_gang  # torch, which what finds nothing to do can do without

    return open_gang(settings)


def _helped(step: Step, gang: Gang | None) -> Step:
    """The step with the other machines that take it, if there are any."""
    if gang is None:
        return step
    from flows.step.gang import Helpers

    helpers = Helpers(
        gang=gang,
        model=step.model,
        key=step.key,
        head=step.head,
        base_fingerprint=step.base_fingerprint,
        base=step.base,
        parent=step.parent / "model" if step.parent else None,
        new=step.out / "model",
    )
    return replace(step, helpers=helpers)


def _take(project: Project, step: Step, claim: Claim, tasks: Tasks) -> Made:
    prepare(project, step)
    try:
        with lineage_events(project, step) as completed:
            made = _make(project, step, claim, tasks)
            completed(made.version)
    except BaseException as error:
        with suppress(ClaimLostError):  # of whoever took over nothing is thrown away
            claim.check()
            if not _goes_on(step, error):
                discard(step)
        raise
    claim.unseal()
    discard(step)
    complete_log(project)
    return replace(made, gates=tasks.gates(project, made.version, claim))


def _goes_on(step: Step, error: BaseException) -> bool:
    """Whether the next run of the step may go on from what this one has finished, when this `error` ended it.

    After a bug a version that is whole stays, and of blocks none: they may be what it came from.
    """
    if isinstance(error, (HeadMovedError, UnusableDataError)):
        return False
    bug = isinstance(error, Exception) and not isinstance(error, (CopalError, OSError, MemoryError, RuntimeError))
    return step.out.is_dir() or (not bug and step.unfinished.is_dir() and any(step.unfinished.iterdir()))


def _make(project: Project, step: Step, claim: Claim, tasks: Tasks) -> Made:
    report = staged_report(project, step)
    evaluation = staged_evaluation(step)
    if report is None or evaluation is None:
        data = tasks.fetch(project, step)
        report = report or tasks.prune(project, step, data, claim)
        evaluation = tasks.evaluate(project, step, report, data, claim)
    version = tasks.register(project, step, report, evaluation, claim)
    return Made(version=version, report=report, evaluation=evaluation)
