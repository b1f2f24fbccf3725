"""Which settings differ from those that made the newest version, and what it takes until they count.

A change of settings alone starts nothing. Pure: a record and the settings of today.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from copal.errors import SettingsError
from flows.lineage.record import Record, flatten
from flows.params import recorded_settings
from flows.settings import Settings

__all__ = ["Change", "changes", "changes_note"]

_SECTIONS = ("calibration", "prune", "gates")
# Of these every domain of a state has the same: copal.state.Manifest.require and Registry.check_sparsity hold it.
_OF_A_LINEAGE = ("calibration.", "prune.sparsity", "prune.criterion")


@dataclass(frozen=True, kw_only=True, slots=True)
class Change:
    """A setting that differs.

    Attributes:
        name: as `prune.damping`.
        then, now: its value when the newest version was made, and in params.yaml.
        takes: what it takes until it counts, in words.
        refused: whether steps are refused until it is put back.
        counts: whether it counts already, or at the next step, without anybody doing anything.
    """

    name: str
    then: Any
    now: Any
    takes: str
    refused: bool = False
    counts: bool = False


def changes(record: Record, settings: Settings, version: int) -> tuple[Change, ...]:
    """What differs between the settings and those that the record of `version` holds.

    What a version does not hang on is left out: where stores are, what is watched, who signs.

    Raises:
        SettingsError: the record's settings cannot be read by this copal.
    """
    then = recorded_settings(record.settings, f"the record of version {version}")
    found = []
    old, new = _values(then), _values(settings)
    for name in sorted(old.keys() | new.keys()):
        before, after = old.get(name, 1.0), new.get(name, 1.0)  # only weights may be missing: 1.0
        if before != after:
            found.append(_change(record, name, before, after))
    return tuple(found)


def changes_note(record: Record, settings: Settings, version: int) -> str | None:
    """One line on what differs and does not count by itself; None where nothing does."""
    try:
        waiting = [change.name for change in changes(record, settings, version) if not change.counts]
    except SettingsError:  # of another copal
        return None
    if not waiting:
        return None
    differ = "differs" if len(waiting) == 1 else "differ"
    return (
        f"{', '.join(waiting)} in params.yaml {differ} from what made version {version}, and that alone starts "
        "nothing: `copal plan` says what it takes"
    )


def _change(record: Record, name: str, before: Any, after: Any) -> Change:
    if name.startswith("gates."):
        return Change(name=name, then=before, now=after, takes="counts for gates that run from now on", counts=True)
    if name == "calibration.evaluation_windows":
        takes = "counts at the next step; figures before and after it are of other windows and do not compare"
        return Change(name=name, then=before, now=after, takes=takes, counts=True)
    if record.parent is None:
        return Change(name=name, then=before, now=after, takes="counts at the first step", counts=True)
    if name.startswith(_OF_A_LINEAGE):
        takes = "every version of a lineage has the same: put it back, or begin another lineage (another model.name)"
        return Change(name=name, then=before, now=after, takes=takes, refused=True)
    if name.startswith("domains."):
        domain = name.split(".")[1]
        if domain not in {entry.name for entry in record.domains}:
            return Change(name=name, then=before, now=after, takes="counts when its data comes", counts=True)
        takes = f"counts when data/{domain} next changes, or now: copal adapt {domain}"
        return Change(name=name, then=before, now=after, takes=takes)
    takes = "counts at the next step; to make one now without new data: copal adapt DOMAIN"
    return Change(name=name, then=before, now=after, takes=takes)


def _values(settings: Settings) -> dict[str, Any]:
    plain = settings.as_dict()
    values = dict(flatten({section: plain[section] for section in _SECTIONS}))
    values |= {f"domains.{domain}.weight": weight for domain, weight in settings.weights.items()}
    return values | {"model.dtype": settings.model.dtype}
