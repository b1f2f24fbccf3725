"""MLflow's store of one registered model: its client, its errors as one line, and where artifacts go."""

from __future__ import annotations

import contextlib
import io
import logging
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from copal.files import flush
from flows.outages import outages
from flows.registry.errors import RegistryError
from flows.registry.sqlite import is_own, locked_advice, open_database, sqlite_file
from flows.uris import cause, is_server, local_path, without_secrets

if TYPE_CHECKING:
    from mlflow import MlflowClient

__all__ = ["Places", "Store", "end_run", "flush_all", "never_fails", "pages"]

_log = logging.getLogger(__name__)

_ANSWER = 5.0  # seconds that a server has to answer
_MODEL_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")


@dataclass(frozen=True, slots=True)
class Places:
    """Where MLflow keeps things.

    Attributes:
        tracking_uri: `sqlite:////absolute/path.db`, or a server.
        artifact_root: the folder of this machine in which copal may write and delete artifacts.
        location: URI under which the artifacts of a new lineage go; None: where the server says.
    """

    tracking_uri: str
    artifact_root: Path
    location: str | None

    @property
    def are_own(self) -> bool:
        """Whether the database lies beside its artifacts: then it is their workspace's own, and wanders with them."""
        return is_own(self.tracking_uri, self.artifact_root)


class Store:
    """Access to MLflow for one registered model; nothing is opened before the first call, and reading makes no store.

    Attributes:
        places: where it is.
        model_name: the registered model; the experiment has the same name.
    """

    def __init__(self, places: Places, model_name: str) -> None:
        if not _MODEL_NAME.fullmatch(model_name):
            raise RegistryError(
                f"model.name must be 1 to 128 letters, digits, '.', '_' or '-', the first a letter or digit, "
                f"not {model_name!r}"
            )
        self.places, self.model_name = places, model_name
        self._client: MlflowClient | None = None

    @contextlib.contextmanager
    def client(self) -> Iterator[MlflowClient]:
        """MLflow's client; its log is kept off the terminal.

        Raises:
            RegistryError: in place of every error of MLflow, its database or its artifact store that leaves the `with`.
        """
        uri = self.places.tracking_uri
        open_database(uri, self.places.artifact_root)  # MLflow tries a broken one for 100 s, with tracebacks
        if self._client is None:
            _check_server(uri)  # and one that does not answer for minutes, without a word
        from mlflow import MlflowClient

        with _quiet():
            try:
                if self._client is None:
                    self._client = MlflowClient(tracking_uri=uri, registry_uri=uri)
                yield self._client
            except _failures() as error:
                reason = _reason(error)
                advice = locked_advice(str(error))
                message = f"MLflow store {uri}: {reason}{f'; {advice}' if advice else ''}"
                raise RegistryError(without_secrets(message)) from cause(error)

    @property
    def is_there(self) -> bool:
        """Whether there is a store to read: to look into one that is not there would make it."""
        path = sqlite_file(self.places.tracking_uri)
        return path is None or path.exists()

    def model(self, client: MlflowClient) -> Any:
        """MLflow's registered model; None where there is none yet."""
        from mlflow.exceptions import MlflowException

        try:
            return client.get_registered_model(self.model_name)
        except MlflowException as error:
            if error.error_code == "RESOURCE_DOES_NOT_EXIST":
                return None
            raise

    def experiment(self, client: MlflowClient) -> str:
        """Id of the model's experiment, which is made where it is missing."""
        from mlflow.exceptions import MlflowException

        found = client.get_experiment_by_name(self.model_name)
        if found is None:
            try:
                client.create_experiment(self.model_name, artifact_location=self._artifact_location())
            except MlflowException:  # another process was faster
                if client.get_experiment_by_name(self.model_name) is None:
                    raise
            found = client.get_experiment_by_name(self.model_name)
            assert found is not None
        if found.lifecycle_stage != "active":
            raise RegistryError(
                f"MLflow's experiment {self.model_name} was deleted: bring it back with `"
                f"MLFLOW_TRACKING_URI={without_secrets(self.places.tracking_uri)} mlflow experiments restore -x "
                f"{found.experiment_id}`, then go on"
            )
        self._check_shared(found.artifact_location)
        return str(found.experiment_id)

    def _artifact_location(self) -> str | None:
        location = self.places.location
        return None if location is None else f"{location.rstrip('/')}/{self.model_name}"

    def _check_shared(self, location: str) -> None:
        """Check that what is stored at the location of an experiment can be read wherever its server is.

        Raises:
            RegistryError: the server names a folder of its own, and no setting says that it is one of this machine.
        """
        local, uri = local_path(location), self.places.tracking_uri
        if local is not None and is_server(uri) and not self.is_inside(local):
            raise RegistryError(
                f"the MLflow server at {without_secrets(uri)} keeps artifacts in the folder {local}, of which nobody "
                "says that it is the same one here: start it with --serve-artifacts and --artifacts-destination, or, "
                "where all hosts share that folder under this path, set registry.artifacts to it"
            )

    def artifacts(self, location: str) -> Any:
        """MLflow's access to the artifacts at a URI."""
        from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository

        return get_artifact_repository(location, tracking_uri=self.places.tracking_uri)

    def upload(self, location: str, folder: Path) -> None:
        """Store the files in `folder` at a URI. Not by the id of a run or model: for that, MLflow would remember where
        it lay in another copy of the workspace.

        Raises:
            RegistryError: as `check_writable`.
        """
        self.check_writable(location)
        self.artifacts(location).log_artifacts(str(folder))

    def check_writable(self, location: str) -> None:
        """Check that files may be stored at a URI.

        Raises:
            RegistryError: the store is the workspace's own, and the URI leads out of it.
        """
        if self.places.are_own:
            self.check_inside(location)

    def is_inside(self, path: Path) -> bool:
        """Whether a path on this machine leads, links followed, to the artifacts of this workspace."""
        return path.resolve().is_relative_to(self.places.artifact_root)

    def check_inside(self, location: str) -> None:
        """Check that files at a URI may be deleted.

        Raises:
            RegistryError: it is a place on this machine, outside of the workspace.
        """
        local = local_path(location)
        if local is not None and not self.is_inside(local):
            raise RegistryError(
                f"{local} is not among the artifacts of this workspace ({self.places.artifact_root}), and copal "
                "writes and deletes nothing outside of them: do it in the workspace that they belong to, or by hand"
            )

    def download(self, uri: str, folder: Path, *, quiet: bool) -> Path:
        """Where the artifact at `uri` lies in `folder` after it was fetched there.

        Args:
            quiet: without MLflow's progress bar, which is noise for one small file.
        """
        hidden = contextlib.redirect_stderr(io.StringIO()) if quiet else contextlib.nullcontext()
        with self.client(), hidden:
            from mlflow.artifacts import download_artifacts

            return Path(download_artifacts(uri, dst_path=str(folder), tracking_uri=self.places.tracking_uri))

    def model_names(self) -> list[str]:
        """The registered models of the store that could be lineages, by name."""
        with self.client() as client:
            found = [entry.name for entry in pages(lambda token: client.search_registered_models(page_token=token))]
        return [name for name in sorted(found) if _MODEL_NAME.fullmatch(name)]


def _check_server(uri: str) -> None:
    """Check that a server answers, whatever it says.

    Raises:
        RegistryError: it does not, within 5 seconds.
    """
    if not is_server(uri):
        return
    import requests

    try:
        requests.get(f"{uri.rstrip('/')}/health", timeout=_ANSWER)
    except requests.exceptions.SSLError:  # it answers; what MLflow makes of its certificate, MLflow says
        return
    except (requests.exceptions.ConnectionError, requests.exceptions.Timeout) as error:
        raise RegistryError(
            f"the MLflow server at {without_secrets(uri)} does not answer within {_ANSWER:g} s: start it, or mend "
            "registry.uri (COPAL_REGISTRY_URI and MLFLOW_TRACKING_URI go before it)"
        ) from cause(error)


def pages(search: Callable[[str | None], Any]) -> Iterator[Any]:
    """The results of a search of MLflow, page by page."""
    token: str | None = None
    while True:
        page = search(token)
        yield from page
        token = page.token
        if not token:
            return


def end_run(client: MlflowClient, run_id: str, status: str) -> None:
    """Set the state of a run to FINISHED, FAILED or KILLED."""
    with contextlib.redirect_stdout(io.StringIO()):  # of a server, MLflow prints the run's address
        client.set_terminated(run_id, status)


def flush_all(folder: Path | None) -> None:
    """Bring a folder's files to the disk before a version names them; a power cut must not leave one half there."""
    if folder is None:
        return
    for path in (folder, *folder.rglob("*")):
        flush(path)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """MLflow logs each step of its migrations, and a traceback for errors that are raised as well."""
    loggers = [logging.getLogger(name) for name in ("mlflow", "alembic")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


@contextlib.contextmanager
def never_fails(doing: str) -> Iterator[None]:
    """Cleaning up must not hide the error that made it needed, nor undo what was published."""
    try:
        yield
    except _failures() as error:
        _log.warning("%s: %s", doing, without_secrets(_reason(error)))


def _reason(error: Exception) -> str:
    """What failed. SQLAlchemy says before it at which moment that was."""
    said = re.sub(r"^\(raised as a result of [^\n]*\)\s*", "", str(error).strip())
    return said.splitlines()[0] if said else type(error).__name__


def _failures() -> tuple[type[Exception], ...]:
    """What MLflow, its database and its artifact store raise, for `except`."""
    from mlflow.exceptions import MlflowException
    from sqlalchemy.exc import SQLAlchemyError

    return MlflowException, SQLAlchemyError, OSError, *outages()
