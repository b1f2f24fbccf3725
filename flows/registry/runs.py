"""What MLflow shows of a version: the run that made it, with settings, data, figures, gates and the lineage page."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flows.lineage.description import run_title
from flows.lineage.entries import GateResult
from flows.lineage.record import Domain, Record, flatten
from flows.lineage.tasks import task_rows

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Dataset, Metric, Run

    from flows.registry.store import Store
    from flows.registry.versions import ModelVersion

__all__ = ["log_gates", "log_results", "run_name", "run_start", "run_tags", "shown_run"]

_log = logging.getLogger(__name__)

_METRICS_PER_BATCH = 1000  # MLflow's limit


def run_name(record: Record) -> str:
    """What the step of a record did, in two words; the number of its version is told once it has one."""
    gone = record.withdraws
    return run_title(None, record.step.name if record.step else None, gone.name if gone else None)


def run_start(record: Record) -> int:
    """When a run that ends now began (ms), for it to last as long as the step worked, earlier processes included."""
    return int(1000 * (time.time() - record.seconds.total))


def run_tags(record: Record) -> dict[str, str]:
    """The tags of a run by which MLflow's UI shows where it comes from."""
    commit = record.code.git_commit
    # Both are documented by MLflow; only `mlflow.start_run` sets them by itself, to the repository of the caller.
    return {"mlflow.source.name": "copal", **({"mlflow.source.git.commit": commit} if commit else {})}


def log_results(client: MlflowClient, run_id: str, model_id: str, parent: ModelVersion | None, record: Record) -> None:
    """Log a step's settings and figures, and link its run to the data, the parent and the model: three calls."""
    from mlflow.entities import DatasetInput, InputTag, LoggedModelInput, LoggedModelOutput, Param

    inputs = [
        DatasetInput(_dataset(domain), [InputTag("mlflow.data.context", "evaluation")]) for domain in record.domains
    ]
    parents = [] if parent is None else [LoggedModelInput(parent.tags["copal.logged_model"])]
    if inputs or parents:
        client.log_inputs(run_id, datasets=inputs, models=parents)
    client.log_outputs(run_id, [LoggedModelOutput(model_id, step=0)])
    logged = _figures(run_id, model_id, record)
    params = [Param(name, _param(value)) for name, value in flatten(record.settings)]
    client.log_batch(run_id, metrics=logged[:_METRICS_PER_BATCH], params=params, synchronous=True)
    for start in range(_METRICS_PER_BATCH, len(logged), _METRICS_PER_BATCH):
        client.log_batch(run_id, metrics=logged[start : start + _METRICS_PER_BATCH], synchronous=True)


def _dataset(domain: Domain) -> Dataset:
    from mlflow.entities import Dataset

    source = {"repository": domain.repository, "rev": domain.git_rev, "path": domain.path, "md5": domain.dvc_md5}
    return Dataset(domain.name, domain.dvc_md5, source_type="dvc", source=json.dumps(source))


def _figures(run_id: str, model_id: str, record: Record) -> list[Metric]:
    from mlflow.entities import Metric

    now = int(time.time() * 1000)
    logged = []
    for place, domain in enumerate(record.domains):
        values = {
            "perplexity": record.perplexity[domain.name],
            "dense_perplexity": record.dense_perplexity[domain.name],
            "evaluation_tokens": domain.evaluation_tokens,
        }
        logged += [
            # A millisecond apart: MLflow keeps one value per model, name, time and step, whatever the dataset.
            Metric(
                name,
                value,
                now + place,
                0,
                model_id=model_id,
                dataset_name=domain.name,
                dataset_digest=domain.dvc_md5,
                run_id=run_id,
            )
            for name, value in values.items()
        ]
        logged.append(Metric(f"perplexity.{domain.name}", record.perplexity[domain.name], now, 0, run_id=run_id))
    flat = {
        "sparsity": record.sparsity.counted,
        "weights_back": record.weights_back,
        "perplexity_before": record.perplexity_before,
        "backward_transfer": record.backward_transfer,
        "seconds": record.seconds.total,
        **{f"seconds.{name}": value for name, value in record.seconds.as_json().items()},
    }
    for row in task_rows(record.tasks):
        name = f"task.{row['domain']}.{row['task']}.{row['metric']}"
        flat |= {name: row["figure"], f"dense_{name}": row["dense"]}
    logged += [
        Metric(name, value, now, 0, model_id=model_id, run_id=run_id)
        for name, value in flat.items()
        if value is not None
    ]
    return logged


def log_gates(
    store: Store, client: MlflowClient, version: ModelVersion, gates: Sequence[GateResult], files: Path
) -> None:
    """Show gate results on the run that made a version, as metrics, keep the files in a folder as its artifacts, and
    give it the version's number: three calls.
    """
    from mlflow.entities import Metric, RunTag

    run = shown_run(client, version)
    if run is None:
        return
    now = int(time.time() * 1000)
    figures = {f"gate.{gate.name}.passed": float(gate.passed) for gate in gates}
    figures |= {f"gate.{gate.name}": gate.value for gate in gates if gate.value is not None}
    tags = {
        "mlflow.runName": run_title(version.number, version.tags.get("copal.domain"), version.withdrawn),
        # By hand, for `log_table` would add to the rows of an earlier judgement, and costs three calls.
        "mlflow.loggedArtifacts": json.dumps([{"path": "gates.json", "type": "table"}]),
    }
    store.upload(run.info.artifact_uri, files)
    client.log_batch(
        run.info.run_id,
        metrics=[Metric(name, value, now, 0) for name, value in figures.items()],
        tags=[RunTag(name, value) for name, value in tags.items()],
        synchronous=True,
    )


def shown_run(client: MlflowClient, version: ModelVersion) -> Run | None:
    """The run that made a version; None where somebody deleted it: what would be shown there, the log has."""
    from mlflow.exceptions import MlflowException

    if version.run_id is None:
        return None
    try:
        run = client.get_run(version.run_id)
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        _log.warning("version %s: its MLflow run was deleted for good, its figures are not shown", version.number)
        return None
    if run.info.lifecycle_stage != "active":
        _log.warning("version %s: its MLflow run is deleted, its figures are not shown", version.number)
        return None
    return run


def _param(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)
