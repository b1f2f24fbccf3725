"""The process in which lm-evaluation-harness asks models the tasks of domains.

A process of its own: the harness and `datasets` read the environment when they are imported, and the model is loaded
whole. What it is to do stands in request.json of its folder, and it answers in result.json.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from copal.errors import CopalError, DataError, one_line
from copal.files import write_atomic
from copal.out_of_memory import memory_for
from flows.step.launch import Fault, leave, tell

if TYPE_CHECKING:
    from lm_eval.api.task import ConfigurableTask
    from lm_eval.models.huggingface import HFLM

__all__ = ["REQUEST_FILE", "RESULT_FILE"]

REQUEST_FILE, RESULT_FILE = "request.json", "result.json"

# What templates and data that do not fit one another raise in there, beside errors of jinja2 and datasets.
_UNFIT = (ArithmeticError, AssertionError, AttributeError, LookupError, OSError, SyntaxError, TypeError, ValueError)
_SEED = 1234  # of the examples that come before a question, where a task wants some


def _main(folder: Path) -> int:
    request = json.loads((folder / REQUEST_FILE).read_text())
    try:
        _sandbox()
        found = _ask(request, folder) if request["models"] else _check(request, folder)
    except CopalError as error:
        leave(folder, Fault(type(error).__name__, (str(error),)))
        return 2
    write_atomic(folder / RESULT_FILE, json.dumps(found))
    return 0


def _sandbox() -> None:
    """Templates of others must not reach Python: in jinja2's plain environment, which the harness has, they can."""
    from jinja2 import StrictUndefined
    from jinja2.sandbox import ImmutableSandboxedEnvironment
    from lm_eval import utils

    sandbox = ImmutableSandboxedEnvironment(undefined=StrictUndefined, keep_trailing_newline=True)
    sandbox.filters.update(utils.env.filters)
    utils.env = sandbox


def _check(request: Mapping[str, Any], folder: Path) -> list[Any]:
    """Make every question of every task, without a model."""
    for one in request["tasks"]:
        with _plainly(one):
            _task(one, folder).build_all_requests(limit=request["limit"])
    return []


def _ask(request: Mapping[str, Any], folder: Path) -> list[list[dict[str, Any]]]:
    """For each model what it makes of each of its tasks: {documents, figures: {metric: figure}}."""
    from lm_eval.models.huggingface import HFLM

    from copal.processes import device
    from copal.streaming import compute_dtype

    here = device()
    found, done, total = [], 0, sum(len(model["tasks"]) for model in request["models"])
    tell("progress", ["tasks", 0, total])
    for model in request["models"]:
        with memory_for("a model that is asked the tasks of domains", "it is loaded whole: take a larger device"):
            asked = HFLM(
                model["folder"],
                device=str(here),
                dtype=compute_dtype(request["dtype"], here),
                batch_size=request["batch"],
            )
        answers = []
        for number in model["tasks"]:
            one = request["tasks"][number]
            with memory_for(f"the questions of {_name(one)}", "lower model.batch, or take a larger device"):
                answers.append(_answered(asked, one, request["limit"], folder))
            done += 1
            tell("progress", ["tasks", done, total])
        found.append(answers)
        del asked  # before the next one is loaded
    return found


def _answered(model: HFLM, one: Mapping[str, Any], limit: int | None, folder: Path) -> dict[str, Any]:
    from lm_eval import evaluate
    from lm_eval.tasks import TaskManager

    name = one["config"]["task"]
    with _plainly(one):
        tasks = TaskManager(include_defaults=False).load([_task(one, folder)])
        found = evaluate(model, tasks, limit=limit, bootstrap_iters=0, log_samples=False)
    # As `acc,none`: the second part is a filter of answers, of which there are none.
    figures = {key.partition(",")[0]: value for key, value in found["results"][name].items() if "," in key}
    figures = {key: value for key, value in figures.items() if not key.endswith("_stderr")}
    for key, value in figures.items():
        if not isinstance(value, (int, float)) or not math.isfinite(value):
            raise DataError(f"{_name(one)}: {key} is {value!r} and no finite number")
    return {
        "documents": int(found["n-samples"][name]["effective"]),
        "figures": {key: float(value) for key, value in figures.items()},
    }


def _task(one: Mapping[str, Any], folder: Path) -> ConfigurableTask:
    from lm_eval.api.task import ConfigurableTask

    data = {**one["config"]["dataset_kwargs"], "cache_dir": str(folder / "cache")}
    task = ConfigurableTask(config={"num_fewshot": 0, **one["config"], "dataset_kwargs": data})
    task.set_fewshot_seed(_SEED)
    return task


@contextmanager
def _plainly(one: Mapping[str, Any]) -> Iterator[None]:
    from datasets.exceptions import DatasetsError
    from jinja2 import TemplateError

    try:
        yield
    except (*_UNFIT, DatasetsError, TemplateError) as error:
        said = one_line(error)[:300]
        raise DataError(f"{_name(one)} cannot be asked: {type(error).__name__}: {said}") from error


def _name(one: Mapping[str, Any]) -> str:
    return f"task {one['config']['task']} of data/{one['domain']}"


if __name__ == "__main__":
    sys.exit(_main(Path(sys.argv[1])))
