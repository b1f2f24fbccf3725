"""The settings of a workspace: typed, validated, fingerprinted values. `flows.params` reads them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from datetime import datetime
from typing import Annotated, Any, Literal, TypeVar

from annotated_types import Predicate
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    ValidatorFunctionWrapHandler,
    WrapValidator,
    model_validator,
)
from pydantic_core import PydanticCustomError

from copal.config import CalibrationConfig, PruneConfig, fingerprint, from_mapping
from copal.errors import DataError, SettingsError

__all__ = [
    "CacheSettings",
    "DomainSettings",
    "EvaluateSettings",
    "GateSettings",
    "LedgerSettings",
    "ModelSettings",
    "RegistrySettings",
    "RunSettings",
    "Settings",
    "SigningSettings",
    "WatchSettings",
    "check_domain_name",
]

_T = TypeVar("_T")


# --- what a value may be: the type checks it, the sentence tells the user


def _must_be(what: str, *, shown: bool = True) -> WrapValidator:
    """A value that its type refuses "must be `what`"; where not `shown`, because it may hold a password, only that."""

    def check(value: Any, handler: ValidatorFunctionWrapHandler) -> Any:
        try:
            return handler(value)
        except ValidationError:
            but = f", not {value!r}" if shown else ""
            raise PydanticCustomError("setting", "{message}", {"message": f"must be {what}{but}"}) from None

    return WrapValidator(check)


def _of_copal(kind: type[_T], section: str) -> BeforeValidator:
    """The settings of the algorithm check themselves."""
    return BeforeValidator(lambda value: value if isinstance(value, kind) else from_mapping(kind, section, value))


def _is_cron(value: str) -> bool:
    from cronsim import CronSim, CronSimError

    try:
        return len(value.split()) == 5 and bool(CronSim(value, datetime(2026, 1, 1)))
    except CronSimError:
        return False


def _is_ledger(uri: str) -> bool:
    """SQLite in a file, for in memory each process has its own; or PostgreSQL."""
    found = re.fullmatch(r"(sqlite|postgresql)(?:\+\w+)?://(.*)", uri)
    return found is not None and (found[1] == "postgresql" or bool(re.match(r"/(?!:memory:|file:)[^?]", found[2])))


_Number = Annotated[float, Field(gt=0, allow_inf_nan=False)]
_Whole = Annotated[int, Field(ge=1), _must_be("a whole number of at least 1")]
_Switch = Annotated[bool, _must_be("true or false")]
_Limit = Annotated[_Number | None, _must_be("a finite number above 0 or null")]
_Text = Annotated[str, Predicate(str.strip)]
_PemFile = Annotated[_Text | None, _must_be("the path of a PEM file or null")]
_LEDGER = (
    "the URL of an SQLite file such as sqlite:////srv/copal/ledger.db, or of a PostgreSQL database such as "
    "postgresql://USER@HOST/DATABASE, or null"
)


class _Section(BaseModel):
    # A value of the wrong type is not converted: "5" is no number, and true is no 1.
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, hide_input_in_errors=True)

    @model_validator(mode="before")
    @classmethod
    def _null_is_default(cls, values: Any) -> Any:
        return {} if values is None else values


class ModelSettings(_Section):
    """Which lineage this workspace grows, and how it computes.

    Attributes:
        name: the registered model; one name is one lineage. It also becomes part of folder names.
        dtype: of the forward passes: `auto` (ask the machine), `bfloat16` or `float32`.
        processes: how many share a step's work on each machine; with GPUs, each process has one.
        nodes: machines that share it.
        batch: windows that run through a block at a time; a step halves it where memory runs out. Like `processes` and
            `nodes`, it changes results by rounding only.
    """

    name: Annotated[
        str,
        Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$"),  # MLflow forbids / and :
        _must_be("1 to 64 letters, digits, '.', '_' or '-', the first a letter or a digit"),
    ] = "copal"
    dtype: Annotated[Literal["auto", "bfloat16", "float32"], _must_be("one of auto, bfloat16, float32")] = "auto"
    processes: _Whole = 1
    nodes: _Whole = 1
    batch: _Whole = 8


class DomainSettings(_Section):
    """How much a domain counts.

    Attributes:
        weight: in the loss.
    """

    weight: Annotated[_Number, _must_be("a finite number above 0")] = 1.0


class EvaluateSettings(_Section):
    """How a version is measured beyond perplexity.

    Attributes:
        task_limit: questions of a task that are asked, the first so many; None is all.
    """

    task_limit: Annotated[_Whole | None, _must_be("a whole number of at least 1 or null")] = 200


class GateSettings(_Section):
    """What a version must hold before it may serve; a gate that is null or false is off.

    Attributes:
        forgetting: how much worse a domain may be than when it was the newest, as a share of that perplexity.
        champion: the same against the champion.
        dense: perplexity at most this many times that of the dense base.
        improvement: the new domain must be better than in the parent, where that is a pruned version.
        tasks: how much worse than the dense base a version may do a task of a domain, as a share of that figure.
        generation: greedy text after a prompt of each domain must be finite and not one token over and over.
        promote: `manual`: what passes waits for `copal promote`; `auto`: it becomes the champion.
    """

    forgetting: _Limit = 0.15
    champion: _Limit = 0.12
    dense: _Limit = 2.0
    improvement: _Switch = True
    tasks: _Limit = None
    generation: _Switch = True
    promote: Annotated[Literal["manual", "auto"], _must_be("one of manual, auto")] = "manual"


class WatchSettings(_Section):
    """What the watcher looks at.

    Attributes:
        repository: the git repository with the domains, a path (relative ones from the workspace) or a URL; None is
            the workspace itself.
        branch: the branch whose pointers are wanted; None is whatever HEAD is.
        interval: seconds between two checks, above 0.
        cron: when the watcher of `copal up` checks, five fields, UTC; None: every `interval` seconds.
    """

    repository: Annotated[_Text | None, _must_be("a path, a URL or null")] = Field(default=None, repr=False)
    branch: Annotated[_Text | None, _must_be("the name of a branch or null")] = None
    interval: Annotated[_Number, _must_be("a number of seconds above 0")] = 60.0
    cron: Annotated[
        Annotated[str, Predicate(_is_cron)] | None,
        _must_be("five fields (minute, hour, day, month, weekday) or null"),
    ] = None


class RunSettings(_Section):
    """How long a step may take, and how much.

    Attributes:
        lease: seconds after which a worker that gives no sign of life may be taken over, at least 1.
        time_limit: seconds after which a step is stopped; None is never.
        check_resources: a step that would not fit into disk or memory is refused before it begins.
        nodes_address: HOST:PORT where the other nodes find the one that runs the step.
        nodes_wait: seconds in which all nodes must have come.
    """

    lease: Annotated[float, Field(ge=1, allow_inf_nan=False), _must_be("a number of seconds of at least 1")] = 60.0
    time_limit: Annotated[_Number | None, _must_be("a number of seconds above 0 or null")] = None
    check_resources: _Switch = True
    nodes_address: Annotated[
        Annotated[str, Field(pattern=r"^[^\s:]+:[0-9]{1,5}$")] | None, _must_be("HOST:PORT or null")
    ] = None
    nodes_wait: Annotated[_Number, _must_be("a number of seconds above 0")] = 600.0


class RegistrySettings(_Section):
    """Where versions are registered.

    Attributes:
        uri: an MLflow tracking URI; None is SQLite in the workspace.
        artifacts: where the files of a new lineage's versions go: a folder (relative ones from the workspace) or a URI
            such as `s3://bucket/path`; None is where an MLflow server says, else the workspace. A lineage that has
            begun stays where it is.
        pictures: whether pictures of the lineage go with each version's run; `copal plot` draws them at any time.
    """

    uri: Annotated[_Text | None, _must_be("an MLflow tracking URI or null", shown=False)] = Field(
        default=None, repr=False
    )
    artifacts: Annotated[_Text | None, _must_be("a folder, a URI or null", shown=False)] = Field(
        default=None, repr=False
    )
    pictures: _Switch = True


class CacheSettings(_Section):
    """What is kept of what was fetched.

    Attributes:
        size: gigabytes (10^9 bytes) of data and versions in the workspace's cache; the least recently used go first,
            but none that is in use. None is any number.
    """

    size: Annotated[_Number | None, _must_be("a number of gigabytes above 0 or null")] = 100.0


class LedgerSettings(_Section):
    """Where claims and the log are kept.

    Attributes:
        uri: a SQLAlchemy URL of an SQLite file (relative ones from the workspace) or of a PostgreSQL database; None
            is SQLite in the workspace.
    """

    uri: Annotated[Annotated[str, Predicate(_is_ledger)] | None, _must_be(_LEDGER, shown=False)] = Field(
        default=None, repr=False
    )


class SigningSettings(_Section):
    """Whether versions are signed. Paths are relative to the workspace.

    Attributes:
        key: the private key, a PEM file of an elliptic curve without a password; None: versions are not signed.
        public_key: the PEM file that `copal verify` checks signatures with; None: the public half of `key`.
    """

    key: _PemFile = None
    public_key: _PemFile = None


def _domain_name(name: object) -> str:
    try:
        return check_domain_name(name)
    except DataError as error:
        raise SettingsError(f"domains: {error}") from error


class Settings(_Section):
    """All settings of a workspace, in the layout of params.yaml: what is null or left out has its defaults."""

    model: ModelSettings = ModelSettings()
    calibration: Annotated[CalibrationConfig, _of_copal(CalibrationConfig, "calibration")] = CalibrationConfig()
    prune: Annotated[PruneConfig, _of_copal(PruneConfig, "prune")] = PruneConfig()
    domains: Annotated[
        Mapping[Annotated[str, BeforeValidator(_domain_name)], DomainSettings], BeforeValidator(lambda it: it or {})
    ] = Field(default_factory=dict)
    gates: GateSettings = GateSettings()
    evaluate: EvaluateSettings = EvaluateSettings()
    watch: WatchSettings = WatchSettings()
    run: RunSettings = RunSettings()
    registry: RegistrySettings = RegistrySettings()
    ledger: LedgerSettings = LedgerSettings()
    cache: CacheSettings = CacheSettings()
    signing: SigningSettings = SigningSettings()

    @property
    def weights(self) -> Mapping[str, float]:
        """The domains that params.yaml names, and their share in the loss; `weight` knows the default."""
        return {name: domain.weight for name, domain in self.domains.items()}

    def weight(self, domain: str) -> float:
        """Weight of a domain in the loss; 1.0 unless params.yaml says otherwise."""
        return self.weights.get(domain, 1.0)

    def fingerprint(self) -> str:
        """SHA-256 of what alters statistics, masks or weights: one part of the key of a step.

        A weight of 1.0 that is written down is the same as none.
        """
        return fingerprint(
            {
                "calibration": self.calibration.fingerprint(),
                "prune": self.prune.fingerprint(),
                "weights": {domain: weight for domain, weight in self.weights.items() if weight != 1.0},
                "dtype": self.model.dtype,
            }
        )

    def as_dict(self) -> dict[str, Any]:
        """Every setting as plain JSON, in the layout of params.yaml."""
        return self.model_dump(mode="json")


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
