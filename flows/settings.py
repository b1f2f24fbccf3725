"""The settings of a workspace: params.yaml and the environment -> typed, validated, fingerprinted values."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from datetime import datetime
from pathlib import Path
from typing import Any, TypeVar

from copal.config import CalibrationConfig, PruneConfig, check_whole, fingerprint, from_mapping
from copal.errors import CopalError, DataError, SettingsError

__all__ = [
    "GateSettings",
    "ModelSettings",
    "RegistrySettings",
    "RunSettings",
    "Settings",
    "SigningSettings",
    "WatchSettings",
    "check_domain_name",
    "load_settings",
    "recorded_settings",
    "without_secrets",
]


PROMOTE = ("manual", "auto")


DTYPES = ("auto", "bfloat16", "float32")


SECTIONS = ("model", "calibration", "prune", "domains", "gates", "watch", "run", "registry", "signing")


IGNORED_SECTIONS = ("benchmark",)  # read by a stage of dvc.yaml, not by copal


_T = TypeVar("_T")


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelSettings:
    """Which lineage this workspace grows, and how it computes.

    Attributes:
        name: the registered model; one name is one lineage.
        dtype: of the forward passes: `auto` (ask the machine), `bfloat16` or `float32`.
        processes: that share a step's work on this machine; a GPU each where there are GPUs. Changes results by
            rounding only, and so does
        batch: windows that run through a block at a time; a step halves it where memory runs out.
    """

    name: str = "copal"
    dtype: str = "auto"
    processes: int = 1
    batch: int = 8

    def __post_init__(self) -> None:
        # MLflow forbids / and : in the name of a registered model; it also becomes part of folder names.
        if not isinstance(self.name, str) or not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}", self.name):
            raise SettingsError(f"model.name must be 1 to 64 letters, digits, '.', '_' or '-', not {self.name!r}")
        if self.dtype not in DTYPES:
            raise SettingsError(f"model.dtype must be one of {', '.join(DTYPES)}, not {self.dtype!r}")
        check_whole("model.processes", self.processes, at_least=1)
        check_whole("model.batch", self.batch, at_least=1)


@dataclass(frozen=True, kw_only=True, slots=True)
class GateSettings:
    """What a version must hold before it may serve; a gate that is null or false is off.

    Attributes:
        forgetting: how much worse a domain may be than when it was the newest, as a share of that perplexity.
        champion: the same against the champion.
        dense: perplexity at most this many times that of the dense base.
        improvement: the new domain must be better than in the parent, where that is a pruned version.
        generation: greedy text after a prompt of each domain must be finite and not one token over and over.
        promote: `manual`: what passes waits for `copal promote`; `auto`: it becomes the champion.
    """

    forgetting: float | None = 0.15
    champion: float | None = 0.12
    dense: float | None = 2.0
    improvement: bool = True
    generation: bool = True
    promote: str = "manual"

    def __post_init__(self) -> None:
        for name in ("forgetting", "champion", "dense"):
            value = getattr(self, name)
            if value is not None and not _is_positive(value):
                raise SettingsError(f"gates.{name} must be a finite number above 0 or null, not {value!r}")
        for name in ("improvement", "generation"):
            if not isinstance(getattr(self, name), bool):
                raise SettingsError(f"gates.{name} must be true or false, not {getattr(self, name)!r}")
        if self.promote not in PROMOTE:
            raise SettingsError(f"gates.promote must be one of {', '.join(PROMOTE)}, not {self.promote!r}")


@dataclass(frozen=True, kw_only=True, slots=True)
class WatchSettings:
    """What the watcher looks at.

    Attributes:
        repository: the git repository with the domains, a path (relative ones from the workspace) or a URL; None is
            the workspace itself.
        branch: the branch whose pointers are wanted; None is whatever HEAD is.
        interval: seconds between two checks, above 0.
        cron: when the watcher of `copal up` checks, five fields, UTC; None: every `interval` seconds.
    """

    repository: str | None = None
    branch: str | None = None
    interval: float = 60.0
    cron: str | None = None

    def __post_init__(self) -> None:
        if self.repository is not None and (not isinstance(self.repository, str) or not self.repository.strip()):
            raise SettingsError(f"watch.repository must be a path, a URL or null, not {self.repository!r}")
        if self.branch is not None and (not isinstance(self.branch, str) or not self.branch.strip()):
            raise SettingsError(f"watch.branch must be the name of a branch or null, not {self.branch!r}")
        if not _is_positive(self.interval):
            raise SettingsError(f"watch.interval must be a number of seconds above 0, not {self.interval!r}")
        if self.cron is not None and not _is_cron(self.cron):
            raise SettingsError(
                f"watch.cron must be five fields (minute, hour, day, month, weekday) or null, not {self.cron!r}"
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class RunSettings:
    """How long a step may take.

    Attributes:
        lease: seconds after which a worker that gives no sign of life may be taken over, at least 1.
        time_limit: seconds after which a step is stopped; None is never.
    """

    lease: float = 60.0
    time_limit: float | None = None

    def __post_init__(self) -> None:
        if not _is_positive(self.lease) or self.lease < 1:
            raise SettingsError(f"run.lease must be a number of seconds of at least 1, not {self.lease!r}")
        if self.time_limit is not None and not _is_positive(self.time_limit):
            raise SettingsError(f"run.time_limit must be a number of seconds above 0 or null, not {self.time_limit!r}")


@dataclass(frozen=True, kw_only=True, slots=True)
class RegistrySettings:
    """Where versions are registered.

    Attributes:
        uri: an MLflow tracking URI; None is SQLite in the workspace.
    """

    uri: str | None = None

    def __post_init__(self) -> None:
        if self.uri is not None and (not isinstance(self.uri, str) or not self.uri.strip()):
            raise SettingsError(f"registry.uri must be an MLflow tracking URI or null, not {self.uri!r}")


@dataclass(frozen=True, kw_only=True, slots=True)
class SigningSettings:
    """Whether versions are signed. Paths are relative to the workspace.

    Attributes:
        key: the private key, a PEM file of an elliptic curve without a password; None: versions are not signed.
        public_key: the PEM file that `copal verify` checks signatures with; None: the public half of `key`.
    """

    key: str | None = None
    public_key: str | None = None

    def __post_init__(self) -> None:
        for name, value in (("key", self.key), ("public_key", self.public_key)):
            if value is not None and (not isinstance(value, str) or not value.strip()):
                raise SettingsError(f"signing.{name} must be the path of a PEM file or null, not {value!r}")


@dataclass(frozen=True, kw_only=True, slots=True)
class _DomainSettings:
    weight: float = 1.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Settings:
    """All settings of a workspace.

    Attributes:
        weights: the domains that params.yaml names, and their share in the loss; `weight` knows the default.
    """

    model: ModelSettings = field(default_factory=ModelSettings)
    calibration: CalibrationConfig = field(default_factory=CalibrationConfig)
    prune: PruneConfig = field(default_factory=PruneConfig)
    gates: GateSettings = field(default_factory=GateSettings)
    watch: WatchSettings = field(default_factory=WatchSettings)
    run: RunSettings = field(default_factory=RunSettings)
    registry: RegistrySettings = field(default_factory=RegistrySettings)
    signing: SigningSettings = field(default_factory=SigningSettings)
    weights: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for domain, weight in self.weights.items():
            try:
                check_domain_name(domain)
            except DataError as error:
                raise SettingsError(f"domains: {error}") from error
            if not _is_positive(weight):
                raise SettingsError(f"domains.{domain}.weight must be a finite number above 0, not {weight!r}")

    def weight(self, domain: str) -> float:
        """Weight of a domain in the loss; 1.0 unless params.yaml says otherwise."""
        return self.weights.get(domain, 1.0)

    def fingerprint(self) -> str:
        """SHA-256 of what alters statistics, masks or weights: one part of the key of a step.

        A weight of 1.0 that is written down is the same as none.
        """
        weights = {domain: float(weight) for domain, weight in self.weights.items() if weight != 1.0}
        return fingerprint(
            {
                "calibration": self.calibration.fingerprint(),
                "prune": self.prune.fingerprint(),
                "weights": weights,
                "dtype": self.model.dtype,
            }
        )

    def as_dict(self) -> dict[str, Any]:
        """Every setting as plain JSON, in the layout of params.yaml."""
        prune = asdict(self.prune)
        prune["rounds"] = list(self.prune.rounds)
        return {
            "model": asdict(self.model),
            "calibration": asdict(self.calibration),
            "prune": prune,
            "domains": {domain: {"weight": weight} for domain, weight in self.weights.items()},
            "gates": asdict(self.gates),
            "watch": asdict(self.watch),
            "run": asdict(self.run),
            "registry": asdict(self.registry),
            "signing": asdict(self.signing),
        }


def without_secrets(text: str) -> str:
    """`text` without the passwords and tokens in the URLs that it holds."""

    def bare(found: re.Match[str]) -> str:
        scheme, user = found.groups()
        named = "" if scheme.lower() in ("http", "https") else f"{user.split(':')[0]}@"  # https://TOKEN@... has no user
        return f"{scheme}://{named}"

    text = re.sub(r"([A-Za-z][A-Za-z0-9+.-]*)://([^/?#\s]*)@", bare, text)
    return re.sub(r"([?&](?:password|token|sslpassword)=)[^&\s]*", r"\1...", text, flags=re.IGNORECASE)


def check_domain_name(name: object) -> str:
    """Give `name` back if it may name a domain.

    Raises:
        DataError: it may not; domains name folders, tags and metrics, so their names are plain.
    """
    if isinstance(name, str) and re.fullmatch(r"[a-z0-9][a-z0-9_-]{0,63}", name):
        return name
    raise DataError(
        f"{name!r} cannot name a domain: use 1 to 64 of a-z, 0-9, '_' and '-', the first a letter or a digit"
    )


def load_settings(params: Path) -> Settings:
    """Read params.yaml; what it leaves out has its default. `COPAL_REGISTRY_URI`, else `MLFLOW_TRACKING_URI`, goes
    before `registry.uri`.

    Raises:
        SettingsError: the file cannot be read, or a setting is unknown, of the wrong type or out of range. Names both.
    """
    try:
        return _settings(_read(params))
    except CopalError as error:
        raise SettingsError(f"{params}: {error}") from error


def recorded_settings(values: Mapping[str, Any], where: str) -> Settings:
    """The settings that a record holds, checked as those of params.yaml are.

    Raises:
        SettingsError: as `load_settings`; names `where`.
    """
    try:
        return _settings(dict(values))
    except CopalError as error:
        raise SettingsError(f"{where}: {error}") from error


def _read(params: Path) -> dict[Any, Any]:
    import yaml

    try:
        content = yaml.safe_load(params.read_text(encoding="utf-8"))
    except OSError as error:
        raise SettingsError(f"cannot be read ({error.strerror})") from error
    except UnicodeDecodeError as error:
        raise SettingsError(f"is not UTF-8 (byte {error.start})") from error
    except (yaml.YAMLError, ValueError) as error:  # ValueError: a date that is none
        raise SettingsError(f"is not YAML: {' '.join(str(error).split())}") from error
    if content is None:  # nothing but comments
        return {}
    if not isinstance(content, dict):
        raise SettingsError(f"must be a mapping of sections ({', '.join(SECTIONS)}), not {type(content).__name__}")
    return content


def _settings(content: dict[Any, Any]) -> Settings:
    unknown = [str(section) for section in content if section not in SECTIONS + IGNORED_SECTIONS]
    if unknown:
        raise SettingsError(f"{unknown[0]} is not a section; there are {', '.join(SECTIONS)}")
    domains = content.get("domains") or {}
    if not isinstance(domains, dict):
        raise SettingsError(f"domains must be a mapping of domain names, not {domains!r}")
    registry = _section(RegistrySettings, "registry", content.get("registry"))
    uri = os.environ.get("COPAL_REGISTRY_URI") or os.environ.get("MLFLOW_TRACKING_URI")
    return Settings(
        model=_section(ModelSettings, "model", content.get("model")),
        calibration=_section(CalibrationConfig, "calibration", content.get("calibration")),
        prune=_section(PruneConfig, "prune", content.get("prune")),
        gates=_section(GateSettings, "gates", content.get("gates")),
        watch=_section(WatchSettings, "watch", content.get("watch")),
        run=_section(RunSettings, "run", content.get("run")),
        registry=replace(registry, uri=uri) if uri else registry,
        signing=_section(SigningSettings, "signing", content.get("signing")),
        weights={name: _section(_DomainSettings, f"domains.{name}", domains[name]).weight for name in domains},
    )


def _section(kind: type[_T], name: str, values: Any) -> _T:
    for key in values if isinstance(values, dict) else ():
        if not isinstance(key, str):  # YAML reads `on:` and `1:` as something else
            raise SettingsError(f"{name}.{key} is not a setting")
    return from_mapping(kind, name, values)


def _is_cron(value: object) -> bool:
    from cronsim import CronSim, CronSimError

    try:
        return isinstance(value, str) and len(value.split()) == 5 and bool(CronSim(value, datetime(2026, 1, 1)))
    except CronSimError:
        return False


def _is_positive(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value) and value > 0
