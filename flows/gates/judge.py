"""The gates: what a version must hold before it may serve, judged from records alone. Pure.

A gate that has nothing to compare passes and says so; one that is turned off does too. Figures compare only where they
were measured on the same windows (the same evaluation digest).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from copal.config import PruneConfig
from flows.lineage.entries import GateResult
from flows.lineage.figures import four_digits
from flows.lineage.record import Domain, Record
from flows.settings import GateSettings

__all__ = [
    "GateResult",
    "failed",
    "judge",
]


_EXACT = 1e-9


def judge(
    record: Record,
    others: Mapping[int, Record],
    champion: int | None,
    settings: GateSettings,
    *,
    rounding: float,
    generation: Mapping[str, str | None],
    problems: Sequence[str],
) -> tuple[GateResult, ...]:
    """What every gate says of the version with this record.

    Args:
        record: of a version that has a parent.
        others: the records of the versions before it that are there, by number.
        champion: number of the version that serves now.
        rounding: how far whole weights may be from the wanted share of zeros, see `as counted`.
        generation: domain -> what is wrong with the text after its prompt, None where nothing is.
        problems: what is wrong with the version's files and the chain of records.
    """
    return (
        _forgetting(record, others, settings.forgetting),
        _against_champion(record, others, champion, settings.champion),
        _improvement(record, others, settings),
        _sparsity(record, rounding),
        _dense(record, settings.dense),
        *([_tasks(record, settings.tasks)] if record.tasks else []),
        _finite(record),
        _generation(generation, settings.generation),
        _lineage(problems),
    )


def failed(results: Sequence[GateResult]) -> tuple[GateResult, ...]:
    """Those that did not pass."""
    return tuple(result for result in results if not result.passed)


def _forgetting(record: Record, others: Mapping[int, Record], limit: float | None) -> GateResult:
    when_newest = {}
    for domain in record.domains:
        made = domain.contribution_version
        made_in = None if made is None else others.get(made)
        if made_in is not None and made_in.step is not None:
            when_newest[domain.name] = (made_in.step, made_in.perplexity.get(domain.name))
    return _worse("forgetting", record, when_newest, limit, "when it was the newest", "no earlier domain")


def _against_champion(
    record: Record, others: Mapping[int, Record], champion: int | None, limit: float | None
) -> GateResult:
    if champion is None or champion not in others:
        there = "there is no champion" if champion is None else f"the record of champion {champion} is not there"
        return _result(name="champion", passed=True, limit=limit, detail=there)
    theirs = others[champion]
    before = {domain.name: (domain, theirs.perplexity.get(domain.name)) for domain in theirs.domains}
    return _worse(
        "champion", record, before, limit, f"in champion {champion}", f"champion {champion} knows none of the domains"
    )


def _worse(
    name: str,
    record: Record,
    before: Mapping[str, tuple[Domain, float | None]],
    limit: float | None,
    then: str,
    nothing: str,
) -> GateResult:
    """No domain is worse than `before` ({domain: (its entry, its perplexity)}) by more than `limit`, as a share."""
    if limit is None:
        return _off(name)
    changes, other_windows = {}, []
    for domain in record.domains:
        entry, figure = before.get(domain.name, (None, None))
        if entry is None or figure is None:
            continue
        if entry.evaluation_digest == domain.evaluation_digest:
            changes[domain.name] = record.perplexity[domain.name] / figure - 1
        else:
            other_windows.append(domain.name)
    aside = f"; not comparable (other windows): {', '.join(sorted(other_windows))}" if other_windows else ""
    if not changes:
        return _result(name=name, passed=True, limit=limit, detail=(aside.removeprefix("; ") or nothing))
    worst = _largest(changes)
    figure = before[worst][1]
    return _result(
        name=name,
        passed=all(change <= limit for change in changes.values()),
        value=changes[worst],
        limit=limit,
        detail=f"{worst}: {four_digits(record.perplexity[worst])}, {four_digits(figure)} {then}{aside}",
    )


def _improvement(record: Record, others: Mapping[int, Record], settings: GateSettings) -> GateResult:
    """The new domain is better than in the parent. New data of a domain that the parent knows may be no better:
    it must not be worse by more than any domain may."""
    if not settings.improvement:
        return _off("improvement")
    step, before = record.step, record.perplexity_before
    parent = None if record.parent is None else others.get(record.parent.version)
    reason = None
    if step is None:
        reason = "no domain was added"
    elif parent is None:
        reason = "the parent's record is not there"
    elif parent.parent is None:
        reason = "the parent is the dense base"
    elif before is None:
        reason = "the parent was not measured"
    if reason is not None or step is None or parent is None or before is None:
        return _result(name="improvement", passed=True, detail=reason or "")
    new, after = step.name, record.perplexity[step.name]
    knew = any(domain.name == new for domain in parent.domains)
    limit = (settings.forgetting or 0.0) if knew else 0.0
    change = after / before - 1
    return _result(
        name="improvement",
        passed=change <= limit if knew else change < 0,
        value=change,
        limit=limit,
        detail=f"{new}: {four_digits(after)}, {four_digits(before)} in the parent{', which knew it' if knew else ''}",
    )


def _sparsity(record: Record, rounding: float) -> GateResult:
    target, counted = record.sparsity.target, record.sparsity.counted
    assert target is not None  # only the dense root has none
    wanted = PruneConfig(sparsity=target)
    tolerance = _EXACT if wanted.pattern else rounding + _EXACT
    prune = record.settings.get("prune", {})
    # Where the loss decides, rows and so layers differ; the model as a whole does not.
    spread = prune.get("spread", 0.0) if prune.get("criterion") == "loss" and not wanted.pattern else 0.0
    shares = [layer.sparsity for layer in record.layers]
    worst = max([counted, *shares], key=lambda share: _or_infinite(abs(share - wanted.share)))
    return _result(
        name="sparsity",
        passed=abs(counted - wanted.share) <= tolerance
        and all(abs(share - wanted.share) <= tolerance + spread for share in shares),
        value=counted,
        limit=wanted.share,
        detail=f"counted {counted:.6f}, wanted {target}; the layer that is farthest off: {worst:.6f}",
    )


def _dense(record: Record, limit: float | None) -> GateResult:
    if limit is None:
        return _off("dense")
    dense = record.dense_perplexity
    times = {name: figure / dense[name] for name, figure in record.perplexity.items()}
    if not times:
        return _result(name="dense", passed=True, limit=limit, detail="no domain")
    worst = _largest(times)
    return _result(
        name="dense",
        passed=all(value <= limit for value in times.values()),
        value=times[worst],
        limit=limit,
        detail=f"{worst}: {four_digits(record.perplexity[worst])}, {four_digits(dense[worst])} in the dense base",
    )


def _tasks(record: Record, limit: float | None) -> GateResult:
    """No task of a domain is done worse than by the dense base by more than `limit`, as a share of its figure."""
    if limit is None:
        return _off("tasks")
    asked = {(domain, name): task for domain, tasks in record.tasks.items() for name, task in tasks.items()}
    worst = max(sorted(asked), key=lambda task: asked[task].shortfall)
    task, (domain, name) = asked[worst], worst
    return _result(
        name="tasks",
        passed=task.shortfall <= limit,
        value=task.shortfall,
        limit=limit,
        detail=f"{name} of {domain}: {task.metric} {four_digits(task.figures[task.metric])}, "
        f"{four_digits(task.dense[task.metric])} in the dense base, {task.documents} questions",
    )


def _finite(record: Record) -> GateResult:
    bad = sorted(place for place, value in _numbers(record.model_dump(), "") if not math.isfinite(value))
    return _result(
        name="finite",
        passed=not bad,
        value=float(len(bad)),
        limit=0.0,
        detail=f"NaN or infinity: {', '.join(bad[:3])}" if bad else "every figure is finite",
    )


def _generation(found: Mapping[str, str | None], wanted: bool) -> GateResult:
    if not wanted:
        return _off("generation")
    bad = [f"{domain}: {problem}" for domain, problem in sorted(found.items()) if problem is not None]
    return _result(
        name="generation",
        passed=not bad,
        value=float(len(bad)),
        limit=0.0,
        detail="; ".join(bad) or f"text after a prompt of {', '.join(sorted(found)) or 'no domain'}",
    )


def _lineage(problems: Sequence[str]) -> GateResult:
    return _result(
        name="lineage",
        passed=not problems,
        value=float(len(problems)),
        limit=0.0,
        detail="; ".join(problems[:3]) or "files and records are those that were registered",
    )


def _off(name: str) -> GateResult:
    return _result(name=name, passed=True, detail="turned off")


def _largest(values: Mapping[str, float]) -> str:
    """The name of the largest value; NaN counts as that, and of equals the first by name."""
    return max(sorted(values), key=lambda name: _or_infinite(values[name]))


def _or_infinite(value: float) -> float:
    return math.inf if math.isnan(value) else value


def _numbers(value: Any, place: str) -> Iterator[tuple[str, float]]:
    if isinstance(value, Mapping):
        for name, item in value.items():
            yield from _numbers(item, f"{place}.{name}" if place else str(name))
    elif isinstance(value, (list, tuple)):
        for number, item in enumerate(value):
            yield from _numbers(item, f"{place}[{number}]")
    elif isinstance(value, (int, float)):
        yield place, value


def _result(
    *, name: str, passed: bool, detail: str, value: float | None = None, limit: float | None = None
) -> GateResult:
    return GateResult(
        name=name, passed=passed, value=_finite_or_none(value), limit=_finite_or_none(limit), detail=detail
    )


def _finite_or_none(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None
