"""Events for whoever listens to a Prefect server: gates that passed or failed, and a champion that moved.

They only tell of what is registered and logged already: one that is lost changes nothing.
"""

from __future__ import annotations

from collections.abc import Sequence

from prefect.events import emit_event

from flows.gates.judge import GateResult, failed

__all__ = ["CHAMPION_MOVED", "GATES_FAILED", "GATES_PASSED", "tell_champion", "tell_gates"]

GATES_PASSED, GATES_FAILED, CHAMPION_MOVED = "copal.gates.passed", "copal.gates.failed", "copal.champion.moved"


def tell_gates(lineage: str, version: int, results: Sequence[GateResult]) -> None:
    """Tell how the gates of a version went."""
    bad = failed(results)
    _emit(
        GATES_FAILED if bad else GATES_PASSED,
        lineage,
        version,
        {"failed": ", ".join(gate.name for gate in bad), "why": "; ".join(gate.detail for gate in bad)},
    )


def tell_champion(lineage: str, version: int | None, why: str | None) -> None:
    """Tell that a version became the champion; None: there is none any more."""
    _emit(CHAMPION_MOVED, lineage, version, {"why": why or "no reason given"})


def _emit(event: str, lineage: str, version: int | None, said: dict[str, str]) -> None:
    name = f"{lineage} version {version}" if version is not None else f"no version of {lineage}"
    resource = {"prefect.resource.id": f"copal.lineage.{lineage}", "prefect.resource.name": name}
    emit_event(event=event, resource=resource, payload={"model": lineage, "version": version, **said})
