"""What a version makes of the tasks of its domains, beside what the dense base makes of them. Pure."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Annotated, Any

from flows.lineage.fields import Frozen, Must, Number, Sha256, Text, Whole

__all__ = ["TaskFigures", "TasksOfDomains", "task_rows"]

_Figures = Annotated[Mapping[str, Number], Must("a JSON object of finite numbers by metric")]


class TaskFigures(Frozen):
    """One task of a domain.

    Attributes:
        digest: SHA-256 of all that was asked: the task, its data, how much of it, by which harness. Figures with the
            same one compare.
        harness: the version of lm-evaluation-harness that asked.
        documents: questions that were asked.
        metric: the one that gates look at.
        higher_is_better: of that metric.
        figures, dense: of this version and of the dense base, by metric.
    """

    digest: Sha256
    harness: Text
    documents: Whole
    metric: Text
    higher_is_better: Annotated[bool, Must("true or false")]
    figures: _Figures
    dense: _Figures

    @property
    def shortfall(self) -> float:
        """How much worse than the dense base, as a share of its figure; below 0: better."""
        value, dense = self.figures[self.metric], self.dense[self.metric]
        worse = dense - value if self.higher_is_better else value - dense
        if worse == 0:
            return 0.0
        return worse / abs(dense) if dense else math.copysign(math.inf, worse)

    def _problem(self) -> str | None:
        if self.metric not in self.figures or set(self.figures) != set(self.dense):
            return "figures and dense must have the same metrics, and the one that gates look at"
        return None


TasksOfDomains = Annotated[
    Mapping[str, Annotated[Mapping[str, TaskFigures], Must("a JSON object of tasks by name")]],
    Must("a JSON object of tasks by domain"),
]


def task_rows(tasks: Mapping[str, Mapping[str, TaskFigures]]) -> list[dict[str, Any]]:
    """A row for each metric of each task, as plain JSON values.

    Returns:
        [{domain, task, metric, documents, figure, dense}], that which gates look at first within a task.
    """
    return [
        {
            "domain": domain,
            "task": name,
            "metric": metric,
            "documents": found.documents,
            "figure": value,
            "dense": found.dense[metric],
        }
        for domain, by_name in sorted(tasks.items())
        for name, found in sorted(by_name.items())
        for metric, value in sorted(found.figures.items(), key=lambda figure: (figure[0] != found.metric, figure[0]))
    ]
