"""The live view of a step: how far each task has come."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING

from copal.progress import Progress, silent
from flows.project import Project
from flows.registry.versions import ModelVersion
from flows.step.resolve import Inputs, Step
from flows.step.run import Tasks, plain_tasks
from flows.terminal.progress import Stages, progress_bar

if TYPE_CHECKING:
    from copal.step import StepReport
    from flows.gates.judge import GateResult
    from flows.ledger import Claim
    from flows.step.staging import Evaluation

__all__ = ["shown_tasks"]

_STAGES = ("fetch", "statistics", "prune", "evaluate", "register", "gates")


def _nowhere(_: str) -> Progress:
    return silent


def shown_tasks(tell: Callable[[str], None], page: Callable[[str], Progress] = _nowhere) -> Tasks:
    """The tasks of a step as plain functions that show on the terminal how far they have come.

    Args:
        tell: called with a line that somebody should see.
        page: lineage -> where else the progress of a task is shown.
    """

    @contextmanager
    def progress(project: Project, of: Step | ModelVersion, first: str, domains: int = 0) -> Iterator[Progress]:
        calibration = project.settings.calibration
        tokens = {
            "statistics": calibration.windows * calibration.window_length,
            "evaluate": domains * calibration.evaluation_windows * calibration.window_length,
        }
        about = of.version.domain if isinstance(of, Step) else f"version {of.number}"
        also = page(project.name)
        with progress_bar(Stages(about=about, order=_STAGES, tokens=tokens)) as bar:

            def report(stage: str, done: int, total: int) -> None:
                bar(stage, done, total)
                also(stage, done, total)

            bar(first, 0, 1)
            yield report

    def inputs(project: Project, parent: ModelVersion) -> Inputs:
        with progress(project, parent, "fetch") as report:
            return plain_tasks(report).inputs(project, parent)

    def fetch(project: Project, step: Step) -> Mapping[str, str]:
        with progress(project, step, "fetch") as report:
            return plain_tasks(report).fetch(project, step)

    def prune(project: Project, step: Step, data: Mapping[str, str], claim: Claim) -> StepReport:
        with progress(project, step, "statistics") as report:
            return plain_tasks(report).prune(project, step, data, claim)

    def evaluate(project: Project, step: Step, found: StepReport, data: Mapping[str, str], claim: Claim) -> Evaluation:
        with progress(project, step, "evaluate", len(data)) as report:
            return plain_tasks(report).evaluate(project, step, found, data, claim)

    def register(project: Project, step: Step, found: StepReport, evaluation: Evaluation, claim: Claim) -> ModelVersion:
        with progress(project, step, "register") as report:
            return plain_tasks(report).register(project, step, found, evaluation, claim)

    def gates(project: Project, version: ModelVersion, claim: Claim) -> tuple[GateResult, ...]:
        said: list[str] = []
        try:
            with progress(project, version, "gates") as report:
                return plain_tasks(report, said.append).gates(project, version, claim)
        finally:  # below the view
            for line in said:
                tell(line)

    return Tasks(inputs=inputs, fetch=fetch, prune=prune, evaluate=evaluate, register=register, gates=gates)
