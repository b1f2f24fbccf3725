"""A version is published whole, or not at all.

MLflow reserves the alias `latest`: it cannot be set, it always names the newest version. So a version is published by
creating it, and it is created last: artifacts, metrics and links are there before, and MLflow writes the version and
its tags in one transaction. What fails earlier leaves `latest` where it was.

Only who holds the lineage publishes. Should two versions still be created on the same parent (by another copal, or by
hand), numbers decide: a version whose parent is older than the version before it lost. It is never shown, and is
withdrawn.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from copal.files import sha256_file
from flows.lineage.description import model_description, run_title, version_description
from flows.lineage.files import SIGNATURE_FILE, verify_files
from flows.lineage.record import RECORD_FILE, Record, write_record
from flows.lineage.signing import sign
from flows.registry.errors import HeadMovedError, LineageConflictError, RegistryError
from flows.registry.runs import log_results, run_name, run_start, run_tags
from flows.registry.store import Store, end_run, flush_all, never_fails, pages
from flows.registry.versions import LINKED, WHY, ModelVersion, Snapshot, created, look, published, tags_of
from flows.uris import local_path

if TYPE_CHECKING:
    from mlflow import MlflowClient

__all__ = ["adopt", "check_base", "check_head", "publish", "sealed_files", "sweep"]


def sealed_files(folder: Path, record: Record, key: Path | None) -> dict[str, str]:
    """Complete the folder of a version: write its record and, with a `key`, its signature.

    Returns:
        The tags of the version.

    Raises:
        RegistryError: the files are not those of the record.
        SigningError: the version cannot be signed.
    """
    differences = verify_files(record, folder)
    if differences:
        raise RegistryError(f"{folder}: not the files of its record: {differences[0]} ({len(differences)} such)")
    write_record(folder / RECORD_FILE, record)
    tags = tags_of(record)
    (folder / SIGNATURE_FILE).unlink(missing_ok=True)  # of an attempt before
    if key is not None:
        sign(folder, key)
        tags["copal.signature"] = sha256_file(folder / SIGNATURE_FILE)
    return tags


def publish(
    store: Store,
    folder: Path,
    record: Record,
    tags: Mapping[str, str],
    *,
    parent: ModelVersion | None,
    expected_head: int | None,
    seal: Callable[[str], None] | None,
    why: str | None,
) -> tuple[Snapshot, ModelVersion]:
    """Store the files in `folder` and create the version; see `Registry.register`."""
    with store.client() as client:
        experiment_id = store.experiment(client)
        run_id = client.create_run(
            experiment_id, start_time=run_start(record), run_name=run_name(record), tags=run_tags(record)
        ).info.run_id
        model: Any = None
        try:
            model = client.create_logged_model(
                experiment_id,
                name=run_name(record).removeprefix("adapt ").replace(" ", "-"),
                source_run_id=run_id,
                tags={**tags, **({} if why is None else {WHY: why})},
            )
            store.check_writable(model.artifact_location)
            client.log_model_artifacts(model.model_id, str(folder))
            flush_all(local_path(model.artifact_location))
            client.finalize_logged_model(model.model_id, "READY")
            log_results(client, run_id, model.model_id, parent, record)
            end_run(client, run_id, "FINISHED")
            seen = look(store, client)
            if not seen.there:
                _make_name(store, client, record)
            check_head(store.model_name, seen.versions, expected_head)
            if seal:
                seal(model.model_id)
        except BaseException:
            _undo(store, client, run_id, model)
            raise
        try:
            seen, version = _create(store, client, seen, model, version_description(None, record, None))
        except BaseException as error:
            if seal is None or isinstance(error, HeadMovedError):
                _undo(store, client, run_id, model)
            raise
        with never_fails("tidying up after a registration"):
            _link(store, client, version, model)
            if parent is None:  # of the others, it is done with their gates
                _tell_number(store, client, version, record)
            _sweep(store, client, experiment_id, seen, version)
        return seen, version


def adopt(store: Store, logged_model: str) -> None:
    """Publish the artifacts that a process had sealed before it died; nothing where they are published or void.

    Raises:
        RegistryError: the store fails.
    """
    from mlflow.exceptions import MlflowException

    with store.client() as client:
        seen = look(store, client)
        if any(version.tags["copal.logged_model"] == logged_model for version in seen.every):
            return
        try:
            model = client.get_logged_model(logged_model)
        except MlflowException as error:
            if error.error_code == "RESOURCE_DOES_NOT_EXIST":  # withdrawn
                return
            raise
        shown = seen.versions
        if int(model.tags.get("copal.parent_version", 0)) == (shown[-1].number if shown else 0):
            _, version = _create(store, client, seen, model)
            _link(store, client, version, model)


def sweep(store: Store, seen: Snapshot) -> None:
    """Discard what killed registrations left. Only for who holds the lineage.

    Raises:
        RegistryError: the store fails.
    """
    shown = seen.versions
    if shown:
        with store.client() as client:
            _sweep(store, client, store.experiment(client), seen, shown[-1])


def check_base(model_name: str, record: Record, version: ModelVersion) -> None:
    """Check that a record is of the same dense base as a version.

    Raises:
        LineageConflictError: it is not.
    """
    ours, theirs = record.base.fingerprint, version.tags["copal.base_fingerprint"]
    if ours != theirs:
        raise LineageConflictError(
            f"another base under the same model name: {model_name} was started from base {theirs}, "
            f"this one is {ours}; choose another model.name"
        )


def check_head(model_name: str, versions: Sequence[ModelVersion], expected: int | None) -> None:
    """Check that the newest version is the one that a step began with.

    Raises:
        HeadMovedError: it is not.
    """
    number = versions[-1].number if versions else None
    if number != expected:
        raise HeadMovedError(
            f"the head of {model_name} is version {number}, the step began with {expected}; "
            "nothing was registered, run the step again"
        )


def _make_name(store: Store, client: MlflowClient, record: Record) -> None:
    from mlflow.exceptions import MlflowException

    try:
        client.create_registered_model(
            store.model_name, description=model_description(store.model_name, record.base.source)
        )
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise


def _create(
    store: Store, client: MlflowClient, seen: Snapshot, model: Any, description: str | None = None
) -> tuple[Snapshot, ModelVersion]:
    """Create the version of a logged model, which carries the version's tags."""
    tags = {name: value for name, value in model.tags.items() if name.startswith("copal.")}
    # The location, not models:/<id>: MLflow would look the id up in the process-wide store, not in this client's.
    made = client.create_model_version(
        store.model_name,
        source=model.artifact_location,
        run_id=model.source_run_id,
        tags=tags | {"copal.logged_model": model.model_id},
        description=description,
        model_id=model.model_id,
    )
    seen = replace(seen, there=True, every=created(store, client))
    twin = next(version for version in seen.every if version.tags["copal.logged_model"] == model.model_id)
    if twin.number != int(made.version):
        client.delete_model_version(store.model_name, made.version)
        raise RegistryError(
            f"version {twin.number} of {store.model_name} is this one: the process that took over published it"
        )
    versions = seen.versions
    for version in versions:
        if version.number == int(made.version):
            return seen, version
    raise HeadMovedError(
        f"version {versions[-1].number} of {store.model_name} was registered at the same moment; "
        "this one was withdrawn, run the step again"
    )


def _undo(store: Store, client: MlflowClient, run_id: str, model: Any) -> None:
    """Withdraw a registration that failed; what cannot be withdrawn now, a later registration discards."""
    with never_fails(f"withdrawing run {run_id}"):
        if model is not None:
            # The version first: should that fail, its artifacts stay, for it may be seen. It may be there even if
            # creating it failed, for instance where only a server's answer was lost.
            for version in created(store, client):
                if version.tags.get("copal.logged_model") == model.model_id:
                    client.delete_model_version(store.model_name, str(version.number))
            _discard(store, client, model)
        end_run(client, run_id, "FAILED")


def _tell_number(store: Store, client: MlflowClient, version: ModelVersion, record: Record) -> None:
    """Tell the number of the dense base in the name of its run and in its description."""
    assert version.run_id is not None
    client.update_run(version.run_id, name=run_title(version.number, None, None))
    description = version_description(version.number, record, None)
    client.update_model_version(store.model_name, str(version.number), description)


def _link(store: Store, client: MlflowClient, version: ModelVersion, model: Any) -> None:
    """Link artifacts to their version for MLflow's UI, by the tag that `mlflow.register_model` sets, which would look
    the artifacts up in the process-wide store.
    """
    link = json.dumps([{"name": store.model_name, "version": version.number}])
    client.set_logged_model_tags(model.model_id, {LINKED: link})


def _sweep(store: Store, client: MlflowClient, experiment_id: str, seen: Snapshot, head: ModelVersion) -> None:
    """Discard what killed registrations left: runs, artifacts, versions that lost.

    A leftover is never in the way: it is no version, or one that lost (see `published`). One with an older parent
    than the head can never be published any more.
    """
    shown = {version.number: version.tags["copal.logged_model"] for version in published(seen.every)}
    for version in seen.every:
        if version.number not in shown and version.number < head.number and _has_lost(client, version):
            client.delete_model_version(store.model_name, str(version.number))
    for leftover in pages(lambda token: client.search_logged_models([experiment_id], page_token=token)):
        tags = leftover.tags
        # The link alone would not do: a process may have been killed between publishing and linking.
        is_published = leftover.model_id in shown.values() or LINKED in tags
        ours = "copal.lineage_digest" in tags
        if ours and not is_published and int(tags.get("copal.parent_version", 0)) < head.number:
            _discard(store, client, leftover)
            with never_fails("ending the run of a leftover"):  # somebody may have deleted it
                end_run(client, leftover.source_run_id, "FAILED")
    running = "attributes.status = 'RUNNING' and tags.`mlflow.source.name` = 'copal'"
    for run in pages(lambda token: client.search_runs([experiment_id], running, page_token=token)):
        end_run(client, run.info.run_id, "KILLED")


def _has_lost(client: MlflowClient, version: ModelVersion) -> bool:
    """Whether the artifacts of a version say what its tags say: by tags that were edited by hand nothing is deleted."""
    from mlflow.exceptions import MlflowException

    try:
        tags = client.get_logged_model(version.tags["copal.logged_model"]).tags
    except MlflowException as error:
        if error.error_code == "RESOURCE_DOES_NOT_EXIST":
            return True
        raise
    return int(tags.get("copal.parent_version", 0)) == (version.parent or 0)


def _discard(store: Store, client: MlflowClient, model: Any) -> None:
    local = local_path(model.artifact_location)
    if local is None:
        store.artifacts(model.artifact_location).delete_artifacts()
    elif local.parent.is_dir() and store.is_inside(local.parent):
        shutil.rmtree(local.parent)  # MLflow's folder of this logged model: models/<id>/artifacts
    client.delete_logged_model(model.model_id)
