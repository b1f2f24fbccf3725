"""Settings of a step: frozen, validated, fingerprinted.

Everything here alters statistics, masks or weights unless its comment says otherwise; the fingerprints are part of the
key of a step and of the state on disk, so the same settings give the same fingerprint on every machine.
"""

from __future__ import annotations

import hashlib
import json
import re
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, TypeVar

from copal.errors import SettingsError

__all__ = [
    "CalibrationConfig",
    "Pattern",
    "PruneConfig",
    "canonical_json",
    "fingerprint",
    "from_mapping",
]

_CRITERIA = ("output", "gradient", "loss")
_STORAGES = ("full", "compact")

_T = TypeVar("_T")


@dataclass(frozen=True, kw_only=True, slots=True)
class CalibrationConfig:
    """How a domain's text becomes token windows.

    Attributes:
        window_length: tokens of one window, BOS included where the tokenizer has one.
        windows: calibration windows of a domain, at most.
        evaluation_windows: evaluation windows of a domain, at most. Alters no statistic.
        evaluation_share: share of the documents that is kept for evaluation, in (0, 1).
        seed: orders the documents and picks the part of each that is read.
        storage: what a state keeps of a domain: `full`, or `compact` (what each keeps and loses: `copal.packing`).
        text_field: the field of a row (JSON lines, Parquet) that holds the text.
        id_field: the field that holds a row's id, where it has one.
        overlap_limit: share of a domain's documents that may be left out since another domain has their text on the
            other side, in (0, 1); with more the domain is refused. Alters no statistic.
    """

    window_length: int = 512
    windows: int = 24
    evaluation_windows: int = 16
    evaluation_share: float = 0.2
    seed: int = 0
    storage: str = "full"
    text_field: str = "text"
    id_field: str = "id"
    overlap_limit: float = 0.25

    def __post_init__(self) -> None:
        _check_whole("calibration.window_length", self.window_length, at_least=8)
        _check_whole("calibration.windows", self.windows, at_least=1)
        _check_whole("calibration.evaluation_windows", self.evaluation_windows, at_least=8)
        _check_open_interval("calibration.evaluation_share", self.evaluation_share)
        _check_whole("calibration.seed", self.seed, at_least=0)
        _check_open_interval("calibration.overlap_limit", self.overlap_limit)
        if self.storage not in _STORAGES:
            raise SettingsError(f"calibration.storage must be one of {', '.join(_STORAGES)}, not {self.storage!r}")
        for name in ("text_field", "id_field"):
            value = getattr(self, name)
            if not isinstance(value, str) or not value:
                raise SettingsError(f"calibration.{name} must be the name of a field, not {value!r}")
        if self.text_field == self.id_field:
            raise SettingsError(f"calibration.text_field and id_field must be two fields, not both {self.id_field!r}")

    def fingerprint(self) -> str:
        """SHA-256 of what alters the statistics: two states with the same value may be summed."""
        settings = asdict(self)
        del settings["evaluation_windows"], settings["overlap_limit"]
        for name, usual in (("text_field", "text"), ("id_field", "id")):  # states are older than these
            if settings[name] == usual:
                del settings[name]
        return fingerprint(settings)


@dataclass(frozen=True, slots=True)
class Pattern:
    """N:M sparsity: of every M neighbours in a row, N stay (Zhou et al. 2021, arXiv 2102.04010)."""

    kept: int
    of: int

    @property
    def sparsity(self) -> float:
        """Share of zeros."""
        return 1 - self.kept / self.of


@dataclass(frozen=True, kw_only=True, slots=True)
class PruneConfig:
    """How masks are decided and how the weights that stay are solved for.

    Attributes:
        sparsity: share of zeros among the weights of the pruned linears, in (0, 1), and in every one of them unless the
            criterion is `loss`; or a pattern N:M such as "2:4".
        criterion: `output` or `gradient` (what they score: `copal.sensitivity.scores`), or `loss`: scores are those of
            `output`, and what the loss minds of each row decides how many of its weights go (`copal.allocation`). A
            pattern fixes how many go, so there `loss` is `output`.
        spread: with `loss`, a row's share of zeros is at most this far from `sparsity`; in [0, 1).
        rounds: sparsity reached by each round, as shares of `sparsity`: rising, the last one 1.
        iterations: conjugate-gradient iterations of a round, at most.
        exponent: of a channel's second moment in the score, in (0, 1]; 0.5 is Wanda's.
        damping: added to every entry of the diagonal of the second moment, as a share of it.
    """

    sparsity: float | str = 0.5
    criterion: str = "loss"
    spread: float = 0.3
    rounds: tuple[float, ...] = (0.6, 0.8, 0.9, 1.0)
    iterations: int = 8
    exponent: float = 0.35
    damping: float = 0.1

    def __post_init__(self) -> None:
        if self.pattern is None:
            _check_sparsity(self.sparsity)
        if self.criterion not in _CRITERIA:
            raise SettingsError(f"prune.criterion must be one of {', '.join(_CRITERIA)}, not {self.criterion!r}")
        object.__setattr__(self, "rounds", _shares("prune.rounds", self.rounds))
        if not self.rounds or list(self.rounds) != sorted(set(self.rounds)) or self.rounds[0] <= 0:
            raise SettingsError(f"prune.rounds must be rising shares in (0, 1], not {self.rounds!r}")
        if self.rounds[-1] != 1:
            raise SettingsError(f"prune.rounds must end with 1 (the whole of prune.sparsity), not {self.rounds[-1]!r}")
        _check_whole("prune.iterations", self.iterations, at_least=1)
        if not _is_number(self.spread) or not 0 <= self.spread < 1:
            raise SettingsError(f"prune.spread must be in [0, 1), not {self.spread!r}")
        object.__setattr__(self, "spread", float(self.spread))
        for name in ("exponent", "damping"):
            value = getattr(self, name)
            if not _is_number(value) or not 0 < value <= 1:
                raise SettingsError(f"prune.{name} must be in (0, 1], not {value!r}")
            object.__setattr__(self, name, float(value))  # 1 and 1.0: one fingerprint

    @property
    def pattern(self) -> Pattern | None:
        """The N:M pattern; None where sparsity is unstructured."""
        found = re.fullmatch(r"([1-9]\d?):([1-9]\d?)", self.sparsity) if isinstance(self.sparsity, str) else None
        return Pattern(int(found[1]), int(found[2])) if found and int(found[1]) < int(found[2]) else None

    @property
    def share(self) -> float:
        """Share of zeros among the weights of the pruned linears."""
        if self.pattern:
            return self.pattern.sparsity
        assert not isinstance(self.sparsity, str)
        return self.sparsity

    def fingerprint(self) -> str:
        """SHA-256 of all fields."""
        return fingerprint(asdict(self))


def from_mapping(kind: type[_T], section: str, values: Mapping[str, Any] | None) -> _T:
    """Build the settings dataclass `kind` from one section of params.yaml.

    Raises:
        SettingsError: `values` is no mapping, has a field that `kind` has not, or a value out of range.
    """
    if values is None:
        return kind()
    if not isinstance(values, Mapping):
        raise SettingsError(f"{section} must be a mapping of settings, not {values!r}")
    known = [field.name for field in fields(kind)]  # type: ignore[arg-type]
    unknown = [key for key in values if key not in known]
    if unknown:
        raise SettingsError(f"{section}.{unknown[0]} is not a setting; {section} has {', '.join(known)}")
    return kind(**values)


def canonical_json(value: Any) -> bytes:
    """The one spelling of a JSON value that is hashed: keys sorted, no spaces, UTF-8, no NaN."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    return text.encode()


def fingerprint(value: Any) -> str:
    """SHA-256 (hexadecimal) of the canonical JSON of `value`."""
    return hashlib.sha256(canonical_json(value)).hexdigest()


def _is_number(value: object) -> bool:
    # A whole number may be larger than any float, and NaN is not within anything.
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


def _shares(name: str, values: object) -> tuple[float, ...]:
    if not isinstance(values, (list, tuple)) or not all(map(_is_number, values)):
        raise SettingsError(f"{name} must be a list of numbers, not {values!r}")
    return tuple(map(float, values))


def _check_open_interval(name: str, value: object) -> None:
    if not _is_number(value) or not 0 < value < 1:  # type: ignore[operator]
        raise SettingsError(f"{name} must be between 0 and 1 (both left out), not {value!r}")


def _check_sparsity(value: object) -> None:
    if not _is_number(value) or not 0 < value < 1:  # type: ignore[operator]
        raise SettingsError(
            "prune.sparsity must be between 0 and 1 (both left out) "
            f'or a pattern N:M in quotes such as "2:4" (YAML 1.1 reads 2:4 without them as 124), not {value!r}'
        )


def _check_whole(name: str, value: object, *, at_least: int) -> None:
    """Check the setting `name`.

    Raises:
        SettingsError: `value` is no whole number, or too small.
    """
    if not isinstance(value, int) or isinstance(value, bool) or value < at_least:
        raise SettingsError(f"{name} must be a whole number of at least {at_least}, not {value!r}")
