"""The run folder of a step: what one run of the step has finished stays there for the next run.

    runs/<model>-<key>/step.json  what the folder is for, and the code and the dtype that work on it
                       unfinished/        until pruning is whole: the blocks that are (`copal.resume`)
                       version/   model/, state/ and the report, once pruning is whole
                       evaluation.json    once evaluation is

Each of the last two appears whole, by a rename. Nobody sees anything of it before the version is in the registry.

Another node of a step (`flows.step.node`) has a folder of that name too:

    nodes/<number>/<model>-<key>/step.json, unfinished/
                                 task/      what its processes are told, and the new version when it is evaluated
    nodes/.<number>.lock                    held by the process that is this node
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from copal.bounded import read_json
from copal.errors import CopalError, StateError
from copal.files import locked_if_free, write_atomic
from flows.lineage.fields import LineageError, parse
from flows.lineage.record import Domain
from flows.lineage.tasks import TaskFigures
from flows.machine import code_version, forward_dtype
from flows.project import Project
from flows.step.resolve import Step
from flows.workspace import Workspace

if TYPE_CHECKING:
    from copal.step import StepReport

__all__ = [
    "EVALUATION_FILE",
    "STEP_FILE",
    "TASK",
    "Evaluation",
    "discard",
    "evaluation_text",
    "folders_of_nodes",
    "node_lock",
    "prepare",
    "run_folders",
    "staged_evaluation",
    "staged_report",
]


STEP_FILE, EVALUATION_FILE, TASK = "step.json", "evaluation.json", "task"


@dataclass(frozen=True, kw_only=True, slots=True)
class Evaluation:
    """Perplexities by domain after the step and of the dense base; of the new domain, if any, before the step; and what
    came of the tasks of domains that have some."""

    perplexity: Mapping[str, float]
    dense: Mapping[str, float]
    before: float | None
    domains: tuple[Domain, ...]
    tasks: Mapping[str, Mapping[str, TaskFigures]]
    seconds: float


def prepare(project: Project, step: Step) -> None:
    """Make the step's run folder ready: what an earlier run finished stays, and what it left half done goes.

    What another version of copal made goes too, and what was made in another dtype, as `auto` is on another machine: it
    might not be what this run would make, and what the record will say of it.
    """
    meant = {
        "model": step.model,
        "base": step.base_fingerprint,
        "key": step.key,
        "head": step.head,
        "code": code_version(),
        "dtype": forward_dtype(project.settings),
    }
    if meant_for(step.run) != meant:
        discard(step)
        step.run.mkdir(parents=True)
        write_atomic(step.run / STEP_FILE, json.dumps(meant))
    stays = [STEP_FILE, EVALUATION_FILE, step.out.name if step.out.is_dir() else step.unfinished.name]
    for path in step.run.iterdir():
        if path.name not in stays:
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def staged_report(project: Project, step: Step) -> StepReport | None:
    """The report of the version that an earlier run staged; None where there is none, or it is damaged."""
    from copal.step import read_report

    try:
        return read_report(step.out) if step.out.is_dir() else None
    except StateError:
        discard(step)
        prepare(project, step)
        return None


def staged_evaluation(step: Step) -> Evaluation | None:
    """The evaluation of the staged version by an earlier run; None where there is none, or it is damaged."""
    path = step.run / EVALUATION_FILE
    try:
        values = read_json(path, LineageError)
        domains = tuple(parse(Domain, domain, str(path)) for domain in values["domains"])
        tasks = {
            domain: {name: parse(TaskFigures, task, str(path)) for name, task in named.items()}
            for domain, named in values["tasks"].items()
        }
        return Evaluation(**values | {"domains": domains, "tasks": tasks})
    except (LineageError, AttributeError, KeyError, TypeError):
        return None


def evaluation_text(evaluation: Evaluation) -> str:
    """What `staged_evaluation` reads."""
    tasks = {
        domain: {name: task.as_json() for name, task in named.items()} for domain, named in evaluation.tasks.items()
    }
    domains = [domain.as_json() for domain in evaluation.domains]
    return json.dumps(asdict(evaluation) | {"domains": domains, "tasks": tasks})


def run_folders(project: Project) -> dict[Path, int | None]:
    """The run folders but those of other lineages, with the version that a step builds on.

    None: nobody will go on with it.
    """
    return _built_on(project, project.workspace.runs.glob("*"))


def folders_of_nodes(project: Project) -> Iterator[tuple[Path, int | None]]:
    """As `run_folders`, of the nodes that were here; not of one that lives, and none begins as long as the caller is
    busy with a folder of it.
    """
    for folder in sorted(project.workspace.nodes.glob("[0-9]*")):
        with locked_if_free(node_lock(project.workspace, folder.name)) as free:
            if free:
                yield from _built_on(project, folder.glob("*")).items()


def node_lock(workspace: Workspace, number: int | str) -> Path:
    """The file that the process locks which is node `number` here."""
    return workspace.nodes / f".{number}.lock"


def _built_on(project: Project, paths: Iterable[Path]) -> dict[Path, int | None]:
    folders = [path for path in sorted(paths) if path.is_dir() and not path.is_symlink()]
    found = {path: meant_for(path) or {} for path in folders}
    return {
        path: meant.get("head") for path, meant in found.items() if meant.get("model", project.name) == project.name
    }


def meant_for(run: Path) -> dict[str, Any] | None:
    try:
        meant = read_json(run / STEP_FILE, CopalError)
    except CopalError:
        return None
    return meant if isinstance(meant, dict) else None


def discard(step: Step) -> None:
    """Remove the step's run folder."""
    shutil.rmtree(step.run, ignore_errors=True)
