"""What the page of a run shows: tables, and how far a long stage has come. No step fails because it is not shown."""

from __future__ import annotations

import hashlib
import re
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, cast

import httpx
from prefect.artifacts import create_progress_artifact, create_table_artifact, update_progress_artifact
from prefect.exceptions import PrefectException
from prefect.logging import get_logger

from copal.progress import Progress
from flows.gates.judge import GateResult, failed
from flows.lineage.figures import four_digits

if TYPE_CHECKING:
    from uuid import UUID

    from flows.step.run import Made

__all__ = ["artifact_key", "gate_rows", "perplexity_rows", "progress_artifacts", "show_gates", "show_perplexity"]

_EVERY = 5.0  # seconds between two updates of a progress artifact, and of a stage before it has one
_LOST = (httpx.HTTPError, PrefectException, OSError)  # the server is away for a while

_log = get_logger("copal")


def artifact_key(lineage: str, kind: str) -> str:
    """The key of an artifact of a lineage: lower-case letters, digits and dashes, as Prefect wants it.

    Two lineages have two keys: a name with other characters, or one that looks as if it had been changed here, gets
    eight digits of its SHA-256. `kind` is one word of lower-case letters, so that the last dash tells where it begins.
    """
    plain = re.sub(r"[^a-z0-9-]", "-", lineage.lower())
    if plain != lineage or re.search(r"-[0-9a-f]{8}$", plain):
        plain = f"{plain}-{hashlib.sha256(lineage.encode()).hexdigest()[:8]}"
    return f"{plain}-{kind}"


def perplexity_rows(made: Made) -> list[dict[str, Any]]:
    """The new version's figures: a row a domain."""
    evaluation = made.evaluation
    return [
        {
            "domain": domain.name,
            "dense": round(evaluation.dense[domain.name], 2),
            "this version": round(evaluation.perplexity[domain.name], 2),
            "ratio": round(evaluation.perplexity[domain.name] / evaluation.dense[domain.name], 3),
            "data": domain.dvc_md5,
        }
        for domain in evaluation.domains
    ]


def show_perplexity(lineage: str, made: Made) -> None:
    """The new version's perplexity on every domain, as a table."""
    report, before = made.report, made.evaluation.before
    said = [
        f"{lineage} version {made.number}: perplexity by domain. "
        f"Sparsity as counted {report.sparsity:.4f}; {report.weights_back:,} weights came back"
        + ("." if before is None else f"; the new domain before the step: perplexity {before:.2f}."),
        *([f"Few tokens of the new domain reach {len(report.short)} linears of experts."] if report.short else []),
    ]
    _table(artifact_key(lineage, "perplexity"), perplexity_rows(made), " ".join(said))


def gate_rows(results: Sequence[GateResult]) -> list[dict[str, Any]]:
    """What each gate said: a row a gate."""
    return [
        {
            "gate": result.name,
            "": "passed" if result.passed else "FAILED",
            "value": four_digits(result.value),
            "limit": four_digits(result.limit),
            "detail": result.detail,
        }
        for result in results
    ]


def show_gates(lineage: str, version: int, results: Sequence[GateResult]) -> None:
    """What the gates said of a version, as a table."""
    bad = len(failed(results))
    verdict = f"{bad} of {len(results)} gates failed" if bad else f"all {len(results)} gates passed"
    _table(artifact_key(lineage, "gates"), gate_rows(results), f"{lineage} version {version}: {verdict}")


def _table(key: str, rows: list[dict[str, Any]], description: str) -> None:
    try:
        create_table_artifact(key=key, table=rows, description=description)
    except _LOST as error:
        _log.warning("the table %s is not shown: %s", key, error)


def progress_artifacts(lineage: str, clock: Callable[[], float] = time.monotonic) -> Progress:
    """A callback that shows each stage that takes more than five seconds as a progress artifact of the run.

    A server that is away costs the step nothing: the next update comes five seconds later.
    """
    shown: dict[str, UUID] = {}
    last: dict[str, float] = {}  # stage -> when it began, or was told of

    def report(stage: str, done: int, total: int) -> None:
        now = clock()
        began = last.setdefault(stage, now)
        if now - began < _EVERY and not (stage in shown and done >= total):
            return
        last[stage] = now
        share = 100.0 * done / max(total, 1)
        try:
            if stage in shown:
                update_progress_artifact(shown[stage], share)
            else:
                key = artifact_key(lineage, re.sub("[^a-z]", "", stage.lower()))
                shown[stage] = cast("UUID", create_progress_artifact(share, key, f"{lineage}: {stage}"))
        except _LOST as error:
            _log.debug("the progress of %s is not shown: %s", stage, error)

    return report
