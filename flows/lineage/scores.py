"""How good a version is against the dense base: in one figure, at its worst, and domain by domain. Pure."""

from __future__ import annotations

from typing import Any

from flows.lineage.history import History, find_version, gates_of, since_newest, step_texts
from flows.lineage.record import Record
from flows.lineage.tasks import task_rows

__all__ = ["scores", "standing"]


def standing(record: Record) -> dict[str, Any]:
    """A version's perplexities in a few figures, all None where it has no domain.

    Returns:
        {geometric_mean, dense_geometric_mean, times_dense (the ratio of these), worst}; `worst`: the domain that is
        furthest from the dense base, {domain, times_dense}.
    """
    mean, dense = record.mean_perplexity, record.mean_dense_perplexity
    ratios = {name: value / record.dense_perplexity[name] for name, value in record.perplexity.items()}
    worst = max(ratios, key=lambda name: ratios[name], default=None)
    return {
        "geometric_mean": mean,
        "dense_geometric_mean": dense,
        "times_dense": mean / dense if mean and dense else None,
        "worst": None if worst is None else {"domain": worst, "times_dense": ratios[worst]},
    }


def scores(history: History, wanted: str) -> dict[str, Any]:
    """One version, domain by domain, as plain JSON values.

    Returns:
        {model, version, parent, step, created, sparsity, weights_back, seconds, aliases, gates, failed, domains, tasks}
        and what `standing` gives. `step`: what made it, in a few words. `gates`: passed or failed, None where they
        never ran; `failed`: {gate: why}. `domains`, the one furthest from the dense base first, each with domain,
        dvc_md5, came_in (the version that its data made), perplexity, dense_perplexity, times_dense, when_newest
        (perplexity in `came_in`, None where that was measured on other tokens, or is gone) and change (since then, a
        share). `tasks`: see `flows.lineage.tasks.task_rows`.

    Raises:
        HistoryError: there is no such version.
    """
    version = find_version(history, wanted)
    record, gates = version.record, gates_of(history, version)
    first = {(name, spell.version): spell for name, spell, _ in since_newest(history)}
    domains = []
    for domain in record.domains:
        if domain.name not in record.perplexity:
            continue
        value, dense = record.perplexity[domain.name], record.dense_perplexity[domain.name]
        came_in = domain.made_in(version.number)
        newest = first.get((domain.name, came_in))
        comparable = newest is not None and newest.digest == domain.evaluation_digest
        then = newest.perplexity if newest is not None and comparable else None
        domains.append(
            {
                "domain": domain.name,
                "dvc_md5": domain.dvc_md5,
                "came_in": came_in,
                "perplexity": value,
                "dense_perplexity": dense,
                "times_dense": value / dense,
                "when_newest": then,
                "change": None if then is None else value / then - 1,
            }
        )
    return {
        "model": history.model,
        "version": version.number,
        "parent": version.parent,
        "step": step_texts(history)[version.number],
        "created": record.created,
        "sparsity": record.sparsity.counted,
        "weights_back": record.weights_back,
        "seconds": record.seconds.as_json(),
        "aliases": list(version.aliases),
        "gates": None if gates is None else "passed" if gates.passed else "failed",
        "failed": {} if gates is None else {gate.name: gate.detail for gate in gates.failed},
        **standing(record),
        "domains": sorted(domains, key=lambda one: -one["times_dense"]),
        "tasks": task_rows(record.tasks),
    }
