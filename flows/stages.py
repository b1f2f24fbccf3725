"""The stages of one step, as plain functions: what `flows.adapt` wraps in Prefect tasks.

A stage takes and gives paths, ids and small values, never tensors. Everything is staged in a run folder under the
workspace and becomes visible only when the registry has the version, which is what moves `latest`.

    runs/<model>-<key>/step.json  what the folder is for, and the code that works on it
                       version/   model/, state/ and the report, once pruning is whole
                       evaluation.json    once evaluation is

Each appears by a rename. A run that finds them goes on from there: `staged_report`, `staged_evaluation`.
"""

from __future__ import annotations

import json
import platform
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError
from importlib.metadata import version as installed_version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from copal.errors import CopalError, DataError, StateError
from copal.files import write_atomic
from copal.progress import Progress, silent
from flows.claims import claimed
from flows.git import run_git
from flows.lineage import (
    DomainRecord,
    build_record,
    domain_records,
    record_digest,
    step_key,
    version_files,
    withdrawal_key,
)
from flows.settings import Settings, Workspace, check_domain_name, load_settings, without_secrets

if TYPE_CHECKING:
    import torch

    from copal.calibration import DomainWindows
    from copal.step import StepReport
    from flows.base import BaseModel
    from flows.datasets import DatasetVersion
    from flows.registry import ModelVersion, Registry

__all__ = [
    "Evaluation",
    "NoBaseError",
    "Step",
    "WithdrawError",
    "dataset_of",
    "discard",
    "evaluate_step",
    "fetch_data",
    "has_gpu",
    "prune_domain",
    "register_root",
    "register_step",
    "resolve",
    "resolve_withdrawal",
    "run_folders",
    "stage",
    "staged_evaluation",
    "staged_report",
    "step_on",
    "surroundings",
]

_STEP, _EVALUATION = "step.json", "evaluation.json"
_LONGEST_WHY = 1000  # characters
LIBRARIES = ("torch", "transformers", "tokenizers", "datasets", "accelerate", "safetensors", "prefect", "mlflow", "dvc")


class NoBaseError(CopalError):
    """The lineage has no root yet."""


class WithdrawError(CopalError):
    """A domain cannot be withdrawn as things are."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Step:
    """One step, resolved: what it builds on and what it adds, or takes out.

    Attributes:
        model: name of the lineage.
        head: number of the version that it builds on.
        base: the dense base model's folder; `base_fingerprint`: of that folder.
        parent: folder of the head (model/, state/); None where the head is the dense base itself.
        states: version -> state folder, of every version whose contribution the head's state names.
        run: the step's own folder, named by the lineage and the key.
        version: the dataset version to adapt to, or to take out.
        key: names the step.
        earlier: the other domains in the head's state.
        withdraws: whether `version` is taken out.
        why: it is, in the words of who asked for it.
    """

    model: str
    head: int
    base: Path
    base_fingerprint: str
    parent: Path | None
    states: Mapping[int, Path]
    run: Path
    version: DatasetVersion
    key: str
    earlier: tuple[DomainRecord, ...]
    withdraws: bool = False
    why: str | None = None

    @property
    def new(self) -> str | None:
        """The domain that it adds or replaces; None where it takes one out."""
        return None if self.withdraws else self.version.domain

    @property
    def out(self) -> Path:
        """Where the new version is staged."""
        return self.run / "version"


@dataclass(frozen=True, kw_only=True, slots=True)
class Evaluation:
    """Perplexities by domain after the step and of the dense base; of the new domain, if any, before the step."""

    perplexity: Mapping[str, float]
    dense: Mapping[str, float]
    before: float | None
    domains: tuple[DomainRecord, ...]
    seconds: float


def resolve(workspace: Workspace, settings: Settings, registry: Registry, domain: str, rev: str | None) -> Step | None:
    """Find the head and the dataset version; None where the head already knows it, made with these settings.

    Raises:
        DataError: no domain may have that name.
        DatasetError: the domain is not tracked at `rev`.
        NoBaseError: no base is registered yet.
        LineageConflictError: the lineage has another sparsity.
        SigningError: versions are to be signed, and cannot be.
    """
    from flows.datasets import data_root, dataset_version

    check_domain_name(domain)
    version = dataset_version(data_root(workspace, settings.watch, rev), domain, rev or settings.watch.branch or "HEAD")
    head = _head(workspace, settings, registry)
    record = registry.record(head)
    known = {entry.name: entry for entry in domain_records(record, head.number)}
    settings_fingerprint = settings.fingerprint()
    same_data = domain in known and known[domain].dvc_md5 == version.md5
    if same_data and record["settings_fingerprint"] == settings_fingerprint:
        return None
    key = step_key(head.number, domain, version.md5, settings_fingerprint)
    return step_on(registry, head, version, key, _run_folder(workspace, settings, key))


def resolve_withdrawal(
    workspace: Workspace, settings: Settings, registry: Registry, domain: str, why: str
) -> Step | None:
    """The step that takes a domain out of the head; None where it was withdrawn already.

    Raises:
        DataError: no domain may have that name.
        WithdrawError: the head does not know the domain, or knows nothing else; or `why` says nothing.
        NoBaseError: no base is registered yet.
        LineageConflictError: the lineage has another sparsity.
    """
    check_domain_name(domain)
    if not 0 < len(why.strip()) <= _LONGEST_WHY:
        raise WithdrawError(f"say why {domain} is withdrawn, in 1 to {_LONGEST_WHY} characters: the log keeps it")
    head = _head(workspace, settings, registry)
    record = registry.record(head)
    known = {entry.name: entry for entry in domain_records(record, head.number)}
    if domain not in known:
        if any(entry["name"] == domain for entry in record["withdrawn"]):
            return None
        raise WithdrawError(
            f"version {head.number} of {settings.model.name} does not know {domain}; "
            f"it knows {', '.join(known) or 'no domain'}"
        )
    if len(known) == 1:
        root = registry.root()
        assert root is not None
        raise WithdrawError(
            f"{domain} is the only domain of version {head.number}: without it, the model is the dense base, "
            f"version {root.number}; serve that one, or adapt to another domain first"
        )
    version = dataset_of(known[domain])
    key = withdrawal_key(head.number, domain, version.md5, settings.fingerprint())
    return step_on(registry, head, version, key, _run_folder(workspace, settings, key), withdraws=True, why=why.strip())


def _run_folder(workspace: Workspace, settings: Settings, key: str) -> Path:
    return workspace.runs / f"{settings.model.name}-{key[:16]}"


def _head(workspace: Workspace, settings: Settings, registry: Registry) -> ModelVersion:
    head = registry.head()
    if head is None:
        raise NoBaseError(
            f"{settings.model.name} has no base model yet: run `copal init {workspace.root} --base SOURCE`"
        )
    registry.check_sparsity(head, settings.prune.sparsity)
    registry.check_signing()
    return head


def step_on(
    registry: Registry,
    parent: ModelVersion,
    version: DatasetVersion,
    key: str,
    run: Path,
    *,
    withdraws: bool = False,
    why: str | None = None,
) -> Step:
    """The step from `parent`, a version of the lineage; see `Step`."""
    root = registry.root()
    assert root is not None
    record = registry.record(parent)
    known = domain_records(record, parent.number)
    versions = {entry.contribution_version for entry in known if entry.contribution_version is not None}
    return Step(
        head=parent.number,
        base=registry.folder(root) / "model",
        base_fingerprint=record["base"]["fingerprint"],
        parent=registry.folder(parent) if known else None,
        states={number: registry.folder(registry.version(number)) / "state" for number in sorted(versions)},
        model=registry.model_name,
        run=run,
        version=version,
        key=key,
        earlier=tuple(entry for entry in known if entry.name != version.domain),
        withdraws=withdraws,
        why=why,
    )


def dataset_of(entry: DomainRecord) -> DatasetVersion:
    """The dataset version that a record names."""
    from flows.datasets import DatasetVersion

    return DatasetVersion(
        domain=entry.name,
        path=entry.path,
        md5=entry.dvc_md5,
        git_rev=entry.git_rev,
        repository=entry.repository,
    )


def fetch_data(workspace: Workspace, step: Step) -> dict[str, str]:
    """Fetch every domain of the new version at its data version: domain -> folder. The work tree is not touched.

    What a step takes out is not fetched.

    Raises:
        MissingDataError: a pointer's data is nowhere.
        DatasetError: what was fetched is not what the pointer says.
    """
    from flows.datasets import fetch_version

    watch = load_settings(workspace.params).watch
    wanted = [*([] if step.withdraws else [step.version]), *map(dataset_of, step.earlier)]
    return {version.domain: str(fetch_version(workspace, watch, version)) for version in wanted}


def stage(step: Step) -> None:
    """Make the step's run folder ready: what an earlier run finished stays, what it left half done goes.

    What another version of copal made goes too: it might not be what this one would make.
    """
    meant = {"model": step.model, "base": step.base_fingerprint, "key": step.key, "head": step.head, "code": _code()}
    if _meant(step.run) != meant:
        discard(step)
        step.run.mkdir(parents=True)
        write_atomic(step.run / _STEP, json.dumps(meant))
    for path in step.run.iterdir():
        if path.name not in (_STEP, _EVALUATION, step.out.name):
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def staged_report(step: Step) -> StepReport | None:
    """The report of the version that an earlier run staged; None where there is none, or it is damaged."""
    from copal.step import read_report

    try:
        return read_report(step.out) if step.out.is_dir() else None
    except StateError:
        discard(step)
        stage(step)
        return None


def staged_evaluation(step: Step) -> Evaluation | None:
    """The evaluation of the staged version by an earlier run; None where there is none."""
    path = step.run / _EVALUATION
    if not path.is_file():
        return None
    values = json.loads(path.read_text(encoding="utf-8"))
    return Evaluation(**values | {"domains": tuple(DomainRecord(**domain) for domain in values["domains"])})


def run_folders(workspace: Workspace, model: str) -> dict[Path, int | None]:
    """The run folders but those of other lineages, with the version that a step builds on.

    None: nobody will go on with it.
    """
    found = {path: _meant(path) or {} for path in sorted(workspace.runs.glob("*")) if path.is_dir()}
    return {path: meant.get("head") for path, meant in found.items() if meant.get("model", model) == model}


def _meant(run: Path) -> dict[str, Any] | None:
    try:
        meant = json.loads((run / _STEP).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return meant if isinstance(meant, dict) else None


def prune_domain(settings: Settings, step: Step, data: str | None, progress: Progress = silent) -> StepReport:
    """Prune the base for every domain so far and the one in the folder `data`, or without the one that the step takes
    out (`data` None); stages model/ and state/.

    Raises:
        CopalError: see `copal.step.prune_step` and `copal.calibration.domain_windows`.
    """
    from copal.step import Base, NewDomain, Parent, WithdrawnDomain, prune_step

    domain: NewDomain | WithdrawnDomain
    if step.withdraws:
        domain = WithdrawnDomain(name=step.version.domain)
    else:
        assert data is not None
        domain = NewDomain(
            name=step.version.domain,
            md5=step.version.md5,
            weight=settings.weight(step.version.domain),
            windows=_windows(step, step.version.domain, Path(data), settings).calibration,
        )
    parent = None
    if step.parent:
        parent = Parent(version=step.head, model=step.parent / "model", state=step.parent / "state", states=step.states)
    base = Base(folder=step.base, fingerprint=step.base_fingerprint)
    if settings.model.processes > 1:
        from flows.worker import prune_in_processes

        return prune_in_processes(step.run / "prune", settings, base, parent, domain, step.out, progress)
    device, dtype = _device(settings)
    return prune_step(
        base,
        parent,
        domain,
        step.out,
        calibration=settings.calibration,
        prune=settings.prune,
        device=device,
        dtype=dtype,
        batch=settings.model.batch,
        progress=progress,
    )


def evaluate_step(
    settings: Settings,
    registry: Registry,
    step: Step,
    report: StepReport,
    data: Mapping[str, str],
    progress: Progress = silent,
) -> Evaluation:
    """Evaluate the staged version on every domain, and the new domain, if any, on the parent and on the dense base.

    The dense base's figures on earlier domains are taken from the head's record where the evaluation windows are the
    same.
    """
    from flows.worker import evaluate_in_processes, evaluate_jobs

    began = time.perf_counter()
    new = step.new
    windows = {name: _windows(step, name, Path(folder), settings) for name, folder in sorted(data.items())}
    tokens = {name: found.evaluation for name, found in windows.items()}

    recorded = registry.record(registry.version(step.head))["dense_perplexity"]
    unchanged = {
        entry.name for entry in step.earlier if entry.evaluation_digest == windows[entry.name].evaluation_digest
    }
    dense = {name: recorded[name] for name in unchanged}
    jobs: dict[str, tuple[Path, list[str]]] = {"after": (step.out / "model", list(tokens))}
    if tokens.keys() - unchanged:
        jobs["dense"] = (step.base, [name for name in tokens if name not in unchanged])
    if new and step.parent:
        jobs["before"] = (step.parent / "model", [new])
    model, todo = settings.model, list(jobs.values())
    if model.processes > 1:
        scores = evaluate_in_processes(step.run / "evaluate", settings, todo, tokens, progress)
    else:
        scores = evaluate_jobs(todo, tokens, dtype=model.dtype, batch=model.batch, progress=progress)
    found = {
        job: {name: score.perplexity for name, score in by_domain.items()}
        for job, by_domain in zip(jobs, scores, strict=True)
    }
    dense |= found.get("dense", {})
    before = None if new is None else found.get("before", dense)[new]
    domains = [
        replace(
            entry,
            evaluation_digest=windows[entry.name].evaluation_digest,
            evaluation_tokens=_predicted(windows[entry.name]),
        )
        for entry in step.earlier
    ]
    if new is not None:
        own = next(entry for entry in report.manifest.domains if entry.name == new)
        domains.append(
            DomainRecord(
                name=new,
                path=step.version.path,
                dvc_md5=step.version.md5,
                git_rev=step.version.git_rev,
                repository=step.version.repository,
                weight=own.weight,
                tokens=own.tokens,
                windows=own.windows,
                contribution_version=None,
                evaluation_digest=windows[new].evaluation_digest,
                evaluation_tokens=_predicted(windows[new]),
            )
        )
    evaluation = Evaluation(
        perplexity=found["after"],
        dense=dict(sorted(dense.items())),
        before=before,
        domains=tuple(sorted(domains, key=lambda domain: domain.name)),
        seconds=time.perf_counter() - began,
    )
    write_atomic(step.run / _EVALUATION, json.dumps(asdict(evaluation)))
    return evaluation


def register_step(
    settings: Settings,
    registry: Registry,
    step: Step,
    report: StepReport,
    evaluation: Evaluation,
    seal: Callable[[str], None] | None = None,
    progress: Progress = silent,
) -> ModelVersion:
    """Register the staged version with its record; it becomes `latest` last of all.

    Args:
        seal: see `flows.registry.Registry.register`.

    Raises:
        HeadMovedError: another version was registered since `resolve`.
        ClaimLostError: the lineage was taken over.
        RegistryError: the registry cannot be written.
    """
    from copal.evaluation import backward_transfer
    from flows.registry import DomainMetrics

    progress("register", 0, 1)
    head = registry.version(step.head)
    parent_record = registry.record(head)
    when_newest = _perplexity_when_newest(registry, step.earlier)
    now = {name: evaluation.perplexity[name] for name in when_newest}
    data = {"name": step.version.domain, "dvc_md5": step.version.md5}  # of a domain's other data the tombstone stays
    withdrawn = [entry for entry in parent_record["withdrawn"] if entry != data] + ([data] if step.withdraws else [])
    record = build_record(
        model=settings.model.name,
        parent={"version": step.head, "digest": record_digest(parent_record)},
        base=parent_record["base"],
        key=step.key,
        step=next((domain for domain in evaluation.domains if domain.contribution_version is None), None),
        domains=evaluation.domains,
        withdrawn=withdrawn,
        settings=_recorded(settings),
        settings_fingerprint=settings.fingerprint(),
        sparsity={"target": settings.prune.sparsity, "counted": report.sparsity},
        weights_back=report.weights_back if step.parent else None,
        perplexity=evaluation.perplexity,
        dense_perplexity=evaluation.dense,
        matrix=_matrix(parent_record, step.head, evaluation.perplexity),
        perplexity_before=evaluation.before,
        backward_transfer=backward_transfer(when_newest, now),
        seconds={**report.seconds, "evaluate": evaluation.seconds},
        layers=[
            {
                "name": layer.name,
                "tokens": layer.tokens,
                "sparsity": layer.zeros / layer.weights,
                "weights_back": layer.weights_back if step.parent else None,
                "layer_error_before": layer.error_before,
                "layer_error_after": layer.error_after,
                "response_shift": layer.response_shift,
                "damping": layer.damping,
            }
            for layer in report.layers
        ],
        **surroundings(settings),
        files=version_files(step.out),
    )
    metrics = [
        DomainMetrics(
            domain=domain.name,
            dvc_md5=domain.dvc_md5,
            git_rev=domain.git_rev,
            path=domain.path,
            repository=domain.repository,
            perplexity=evaluation.perplexity[domain.name],
            dense_perplexity=evaluation.dense[domain.name],
            tokens=domain.evaluation_tokens,
        )
        for domain in evaluation.domains
    ]
    registered = registry.register(
        step.out, record, metrics=metrics, parent=head, expected_head=step.head, seal=seal, why=step.why
    )
    progress("register", 1, 1)
    return registered


def register_root(
    workspace: Workspace, settings: Settings, registry: Registry, base: BaseModel, progress: Progress = silent
) -> ModelVersion:
    """Register the dense base as version 1, the root of the lineage; again: gives the version that is there.

    Raises:
        LineageConflictError: the name's lineage has another base.
    """
    progress("register base", 0, 1)
    workspace.runs.mkdir(parents=True, exist_ok=True)
    scratch = TemporaryDirectory(prefix="base-", dir=workspace.runs)
    with claimed(registry, "register the base", lease=settings.run.lease) as claim, scratch as folder:
        staged = Path(folder)
        shutil.copytree(base.folder, staged / "model", copy_function=_link_or_copy)
        record = build_record(
            model=settings.model.name,
            parent=None,
            base={"fingerprint": base.fingerprint, "source": base.source},
            key=None,
            step=None,
            domains=(),
            withdrawn=(),
            settings=_recorded(settings),
            settings_fingerprint=settings.fingerprint(),
            sparsity={"target": None, "counted": 0.0},
            weights_back=None,
            perplexity={},
            dense_perplexity={},
            matrix=(),
            perplexity_before=None,
            backward_transfer=None,
            seconds={"statistics": 0.0, "solve": 0.0, "evaluate": 0.0},
            layers=(),
            **surroundings(settings),
            files=version_files(staged),
        )
        registered = registry.register(staged, record, metrics=[], parent=None, expected_head=None, seal=claim.seal)
        claim.unseal()
    progress("register base", 1, 1)
    return registered


def discard(step: Step) -> None:
    """Remove the step's run folder."""
    shutil.rmtree(step.run, ignore_errors=True)


def _link_or_copy(source: str, target: str) -> None:
    """A second name for a file costs nothing, where the file system allows it; else a copy."""
    try:
        Path(target).hardlink_to(Path(source).resolve())  # the file itself: a link's own second name may lead nowhere
    except OSError:  # across file systems, or one without hard links
        shutil.copy2(source, target)


def _windows(step: Step, domain: str, data: Path, settings: Settings) -> DomainWindows:
    """The windows of `domain`, read from the folder `data`; errors name the user's folder, not the cache's."""
    from transformers import AutoTokenizer

    from copal.calibration import domain_windows

    tokenizer = AutoTokenizer.from_pretrained(step.base, local_files_only=True, trust_remote_code=False)
    try:
        return domain_windows(data, tokenizer, settings.calibration)
    except DataError as error:
        raise DataError(str(error).replace(str(data), f"data/{domain}")) from error


def _predicted(windows: DomainWindows) -> int:
    """Predicted tokens of the evaluation windows: all of a window but its first."""
    return windows.evaluation.shape[0] * (windows.evaluation.shape[1] - 1)


def has_gpu() -> bool:
    """Whether a step would run on a GPU here."""
    from copal.processes import device

    return device().type != "cpu"


def _device(settings: Settings) -> tuple[torch.device, torch.dtype]:
    from copal.processes import device
    from copal.streaming import compute_dtype

    here = device()
    return here, compute_dtype(settings.model.dtype, here)


def _perplexity_when_newest(registry: Registry, earlier: tuple[DomainRecord, ...]) -> dict[str, float]:
    """For each earlier domain its perplexity in the version that its data version made, on the same windows."""
    found = {}
    for entry in earlier:
        assert entry.contribution_version is not None
        record = registry.record(registry.version(entry.contribution_version))
        if record["step"]["evaluation_digest"] == entry.evaluation_digest:
            found[entry.name] = record["perplexity"][entry.name]
    return found


def _matrix(parent: Mapping[str, Any], number: int, perplexity: Mapping[str, float]) -> list[dict[str, Any]]:
    """The parent's rows of perplexities, its own with its number now, and the new version's."""
    rows = [row if row["version"] is not None else {**row, "version": number} for row in parent["matrix"]]
    return [*rows, {"version": None, "perplexity": perplexity}]


def _recorded(settings: Settings) -> dict[str, Any]:
    """The settings in full, without the passwords that URLs may hold."""
    return {
        section: {name: without_secrets(value) if isinstance(value, str) else value for name, value in values.items()}
        for section, values in settings.as_dict().items()
    }


def surroundings(settings: Settings) -> dict[str, Any]:
    """What made a version beside data and settings: code, libraries, hardware, seeds, time."""
    import torch

    device, dtype = _device(settings)
    return {
        "code": _code(),
        "libraries": {name: installed_version(name) for name in LIBRARIES} | {"python": platform.python_version()},
        "hardware": {
            "machine": platform.machine(),
            "system": platform.platform(),
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
            "threads": torch.get_num_threads(),
            "dtype": str(dtype).removeprefix("torch."),
        },
        "seeds": {"calibration": settings.calibration.seed},
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def _code() -> dict[str, Any]:
    """Version of copal and, where it runs from its own git checkout, the commit and whether that was changed."""
    here = Path(__file__).resolve().parent

    def ask(*arguments: str) -> str | None:
        done = run_git(here, *arguments)
        return done.stdout.strip() if done.returncode == 0 else None

    try:
        released = installed_version("copal")
    except PackageNotFoundError:
        released = "unknown"
    if ask("ls-files", "--error-unmatch", Path(__file__).name) is None:
        return {"version": released, "git_commit": None, "dirty": None}
    changed = ask("status", "--porcelain", "--untracked-files=no", "--", "..")
    return {"version": released, "git_commit": ask("rev-parse", "HEAD"), "dirty": bool(changed)}
