"""flows.registry on a real MLflow SQLite store: versions are published whole, in one line, or not at all."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlflow.artifacts
import pytest
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException

from flows.cache import Cache
from flows.lineage.files import verify_files
from flows.lineage.keys import step_key
from flows.lineage.record import Base, LineageError, Parent
from flows.registry.errors import HeadMovedError, LineageConflictError, RegistryError
from flows.registry.registry import Registry
from flows.registry.store import Places
from flows.registry.versions import ModelVersion
from support.registries import BASE, a_record, a_registry, staged


@pytest.fixture
def workspace(tmp_path: Path, mlflow_template: Path) -> Path:
    folder = tmp_path / "work space"  # a space: locations are URIs
    folder.mkdir()
    shutil.copy(mlflow_template, folder / "mlflow.db")
    return folder


@pytest.fixture
def registry(workspace: Path) -> Registry:
    return a_registry(workspace)


@pytest.fixture
def client(workspace: Path) -> MlflowClient:
    uri = f"sqlite:///{workspace}/mlflow.db"
    return MlflowClient(tracking_uri=uri, registry_uri=uri)


def publish(
    registry: Registry, staging: Path, parent: ModelVersion | None, domains: list[str], **changes: Any
) -> ModelVersion:
    folder = staged(staging, " ".join(domains))
    record = a_record(folder, parent, domains, **changes)
    return registry.register(
        folder,
        record,
        parent=parent,
        expected_head=None if parent is None else parent.number,
    )


def lineage_of_three(registry: Registry, staging: Path) -> tuple[ModelVersion, ModelVersion, ModelVersion]:
    root = publish(registry, staging / "0", None, [])
    code = publish(registry, staging / "1", root, ["code"])
    return root, code, publish(registry, staging / "2", code, ["code", "legal"])


def latest(client: MlflowClient) -> int:
    return int(client.get_model_version_by_alias("tiny", "latest").version)


def stored_models(workspace: Path) -> set[str]:
    return {path.name for path in workspace.glob("artifacts/tiny/models/*")}


def test_versions_are_listed_found_and_read(registry: Registry, tmp_path: Path) -> None:
    assert registry.head() is None
    root, code, legal = lineage_of_three(registry, tmp_path)
    assert [version.number for version in registry.versions()] == [1, 2, 3]
    assert [version.aliases for version in registry.versions()] == [(), (), ("latest",)]
    assert [version.parent for version in (root, code, legal)] == [None, 1, 2]
    assert registry.head() == legal
    assert registry.root() == replace(root, aliases=())
    assert registry.version(2) == replace(code, aliases=())
    with pytest.raises(RegistryError, match="has no version 9; versions: 1, 2, 3"):
        registry.version(9)


def test_records_form_a_chain_of_digests(registry: Registry, tmp_path: Path) -> None:
    versions = lineage_of_three(registry, tmp_path)
    records = [registry.record(version) for version in versions]
    for version, record in zip(versions, records, strict=True):
        assert record.digest == version.tags["copal.lineage_digest"]
    for parent, child, record in zip(versions, versions[1:], records[1:], strict=False):
        assert record.parent == Parent(version=parent.number, digest=parent.tags["copal.lineage_digest"])
        assert child.parent == parent.number


def test_the_folder_of_a_local_store_is_the_artifacts_themselves(
    registry: Registry, workspace: Path, tmp_path: Path
) -> None:
    version = publish(registry, tmp_path / "staging", None, [])
    folder = registry.folder(version)
    assert workspace / "artifacts" in folder.parents
    assert {path.name for path in folder.iterdir()} == {"model", "state", "lineage.json", "report.md"}
    assert verify_files(registry.record(version), folder) == []
    assert not [path for path in (workspace / "cache").iterdir() if path.is_dir()]  # no copy


def test_users_of_mlflow_load_the_head_by_its_alias(
    registry: Registry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    *_, head = lineage_of_three(registry, tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", registry.tracking_uri)
    folder = mlflow.artifacts.download_artifacts("models:/tiny@latest")
    assert Path(folder).samefile(registry.folder(head))


def test_mlflow_shows_tags_metrics_datasets_and_links(registry: Registry, client: MlflowClient, tmp_path: Path) -> None:
    _, code, legal = lineage_of_three(registry, tmp_path)
    tags = client.get_model_version("tiny", str(legal.number)).tags
    assert tags == {
        "copal.domain": "legal",
        "copal.dvc_md5": "l" * 32 + ".dir",
        "copal.git_rev": "c" * 40,
        "copal.parent_version": "2",
        "copal.key": step_key(2, "legal", "l" * 32 + ".dir", "f" * 64),
        "copal.settings_fingerprint": "f" * 64,
        "copal.sparsity": "0.4998",
        "copal.base_fingerprint": BASE,
        "copal.lineage_digest": legal.tags["copal.lineage_digest"],
        "copal.logged_model": legal.tags["copal.logged_model"],
    }

    run = client.get_run(legal.run_id)
    assert run.info.run_name == "adapt legal"
    assert run.info.status == "FINISHED"
    assert run.data.params["prune.rounds"] == "[0.6, 1.0]"
    assert run.data.params["prune.criterion"] == "output"
    assert (
        run.data.metrics.items()
        >= {
            "sparsity": 0.4998,
            "weights_back": 7,
            "backward_transfer": -0.25,
            "seconds": 6,
            "seconds.solve": 2,
            "perplexity.code": 8,
            "perplexity.legal": 9,
        }.items()
    )
    datasets = {item.dataset.name: item.dataset for item in run.inputs.dataset_inputs}
    assert datasets["legal"].digest == "l" * 32 + ".dir"
    assert datasets["legal"].source_type == "dvc"
    assert json.loads(datasets["legal"].source) == {
        "repository": "https://git.example/data",
        "rev": "c" * 40,
        "path": "data/legal",
        "md5": "l" * 32 + ".dir",
    }
    assert [item.model_id for item in run.inputs.model_inputs] == [code.tags["copal.logged_model"]]
    assert [item.model_id for item in run.outputs.model_outputs] == [legal.tags["copal.logged_model"]]

    model = client.get_logged_model(legal.tags["copal.logged_model"])
    assert model.status == "READY"
    assert json.loads(model.tags["mlflow.modelVersions"]) == [{"name": "tiny", "version": 3}]
    by_dataset = {(item.key, item.dataset_name, item.dataset_digest): item.value for item in model.metrics}
    assert by_dataset["perplexity", "code", "c" * 32 + ".dir"] == 8
    assert by_dataset["perplexity", "legal", "l" * 32 + ".dir"] == 9
    # The same value for two domains is kept for both.
    assert by_dataset["evaluation_tokens", "code", "c" * 32 + ".dir"] == 8176
    assert by_dataset["evaluation_tokens", "legal", "l" * 32 + ".dir"] == 8176


@pytest.mark.parametrize(
    "call",
    [
        "create_run",
        "create_logged_model",
        "log_model_artifacts",
        "finalize_logged_model",
        "log_inputs",
        "log_outputs",
        "log_batch",
        "set_terminated",
        "create_model_version",
    ],
)
def test_a_failure_in_the_middle_changes_nothing_and_is_no_obstacle(
    call: str,
    registry: Registry,
    client: MlflowClient,
    workspace: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    root = publish(registry, tmp_path / "0", None, [])
    models = stored_models(workspace)
    with monkeypatch.context() as patch:
        patch.setattr(MlflowClient, call, broken(getattr(MlflowClient, call)))
        with pytest.raises(RegistryError, match="it broke"):
            publish(registry, tmp_path / "1", root, ["code"])
    assert registry.versions() == [root]
    assert latest(client) == root.number
    assert stored_models(workspace) == models
    assert publish(registry, tmp_path / "1", root, ["code"]) == registry.head()
    assert latest(client) == registry.versions()[1].number


def broken(method: Callable[..., Any]) -> Callable[..., Any]:
    """`method` that works but whose answer is lost, the first time: the worst place to fail."""
    calls: list[str] = []

    def call(*args: Any, **kwargs: Any) -> Any:
        result = method(*args, **kwargs)
        calls.append(method.__name__)
        if len(calls) == 1:
            raise MlflowException("it broke")
        return result

    return call


def test_a_version_whose_answer_was_lost_is_withdrawn(
    registry: Registry, client: MlflowClient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = publish(registry, tmp_path / "0", None, [])
    with monkeypatch.context() as patch:
        patch.setattr(MlflowClient, "create_model_version", broken(MlflowClient.create_model_version))
        with pytest.raises(RegistryError):
            publish(registry, tmp_path / "1", root, ["code"])
    assert latest(client) == root.number
    runs = client.search_runs([client.get_experiment_by_name("tiny").experiment_id])
    assert {run.info.run_name: run.info.status for run in runs} == {
        "version 1: base": "FINISHED",
        "adapt code": "FAILED",
    }


def test_what_a_killed_registration_left_is_discarded_later(
    registry: Registry, workspace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = publish(registry, tmp_path / "0", None, [])
    with monkeypatch.context() as patch:  # as if the process had ended there
        patch.setattr("flows.registry.publish._undo", lambda *args: None)
        patch.setattr(MlflowClient, "finalize_logged_model", broken(MlflowClient.finalize_logged_model))
        with pytest.raises(RegistryError):
            publish(registry, tmp_path / "1", root, ["code"])
    assert len(stored_models(workspace)) == 2
    code = publish(registry, tmp_path / "1", root, ["code"])
    legal = publish(registry, tmp_path / "2", code, ["code", "legal"])
    assert registry.head() == legal
    assert stored_models(workspace) == {v.tags["copal.logged_model"] for v in registry.versions()}


def test_a_version_whose_process_was_killed_after_publishing_it_stays(
    registry: Registry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = publish(registry, tmp_path / "0", None, [])
    with monkeypatch.context() as patch:
        patch.setattr("flows.registry.publish._link", lambda *args: None)
        patch.setattr("flows.registry.publish._sweep", lambda *args: None)
        code = publish(registry, tmp_path / "1", root, ["code"])
    legal = publish(registry, tmp_path / "2", code, ["code", "legal"])
    publish(registry, tmp_path / "3", legal, ["code", "legal", "medical"])
    for version in registry.versions():
        assert verify_files(registry.record(version), registry.folder(version)) == []


def test_a_moved_head_is_seen_before_anything_is_made(registry: Registry, workspace: Path, tmp_path: Path) -> None:
    root = publish(registry, tmp_path / "0", None, [])
    code = publish(registry, tmp_path / "1", root, ["code"])
    with pytest.raises(HeadMovedError, match="head of tiny is version 2, the step began with 1"):
        publish(registry, tmp_path / "2", root, ["legal"])
    assert registry.head() == code
    assert len(stored_models(workspace)) == 2


def test_of_two_versions_created_at_the_same_moment_the_first_stays(
    registry: Registry, client: MlflowClient, workspace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = publish(registry, tmp_path / "0", None, [])
    create = MlflowClient.create_model_version
    other: list[ModelVersion] = []

    def race(*args: Any, **kwargs: Any) -> Any:
        monkeypatch.setattr(MlflowClient, "create_model_version", create)
        other.append(publish(a_registry(workspace), tmp_path / "other", root, ["code"]))
        return create(*args, **kwargs)

    monkeypatch.setattr(MlflowClient, "create_model_version", race)
    with pytest.raises(HeadMovedError, match="registered at the same moment"):
        publish(registry, tmp_path / "1", root, ["legal"])
    assert registry.head() == other[0]
    assert latest(client) == other[0].number
    assert len(stored_models(workspace)) == 2


def test_a_loser_that_was_killed_is_never_shown(
    registry: Registry, client: MlflowClient, workspace: Path, tmp_path: Path
) -> None:
    _, code, legal = lineage_of_three(registry, tmp_path)
    client.create_model_version(
        "tiny", legal.location, run_id=legal.run_id, tags=dict(code.tags), model_id=legal.tags["copal.logged_model"]
    )
    assert [version.number for version in registry.versions()] == [1, 2, 3]
    medical = publish(registry, tmp_path / "3", legal, ["code", "legal", "medical"])
    assert medical.number == 5
    assert [version.number for version in registry.versions()] == [1, 2, 3, 5]
    assert {int(version.version) for version in client.search_model_versions("name = 'tiny'")} == {1, 2, 3, 5}


def test_a_version_registered_by_hand_is_not_of_the_lineage(
    registry: Registry, client: MlflowClient, tmp_path: Path
) -> None:
    root = publish(registry, tmp_path / "0", None, [])
    client.create_model_version("tiny", root.location, run_id=root.run_id)
    assert registry.head() == root
    assert publish(registry, tmp_path / "1", root, ["code"]).number == 3


def test_the_same_root_again_is_the_first_one(registry: Registry, workspace: Path, tmp_path: Path) -> None:
    root, *_ = lineage_of_three(registry, tmp_path)
    models = stored_models(workspace)
    again = publish(registry, tmp_path / "again", None, [], created="2026-02-02T00:00:00+00:00")
    assert again == replace(root, aliases=())
    assert [version.number for version in registry.versions()] == [1, 2, 3]
    assert stored_models(workspace) == models


def test_another_base_under_the_same_name_is_refused(registry: Registry, workspace: Path, tmp_path: Path) -> None:
    root = publish(registry, tmp_path / "0", None, [])
    other = {"fingerprint": "0" * 64, "source": "another folder"}
    for parent, domains in ((None, []), (root, ["code"])):
        with pytest.raises(LineageConflictError, match=r"another base .* choose another model\.name") as error:
            publish(registry, tmp_path / "1", parent, domains, base=other)
        assert BASE in str(error.value)
        assert "0" * 64 in str(error.value)
    assert registry.versions() == [root]
    assert len(stored_models(workspace)) == 1


def test_another_sparsity_under_the_same_name_is_refused(registry: Registry, tmp_path: Path) -> None:
    root = publish(registry, tmp_path / "0", None, [])
    code = publish(registry, tmp_path / "1", root, ["code"])
    for target in (0.6, "2:4"):
        with pytest.raises(LineageConflictError, match=f"pruned to 0.5, not to {target}"):
            publish(registry, tmp_path / "2", code, ["code", "legal"], sparsity={"target": target, "counted": 0.5})
        with pytest.raises(LineageConflictError):
            registry.check_sparsity(code, target)
        registry.check_sparsity(root, target)
    registry.check_sparsity(code, 0.5)
    assert registry.head() == code


def test_files_that_are_not_those_of_the_record_are_refused(registry: Registry, tmp_path: Path) -> None:
    folder = staged(tmp_path / "0", "")
    record = a_record(folder, None, [])
    (folder / "model/model.safetensors").write_text("other weights")
    with pytest.raises(RegistryError, match=r"changed: model/model\.safetensors"):
        registry.register(folder, record, parent=None, expected_head=None)
    assert registry.head() is None


def test_a_record_of_another_parent_or_model_is_refused(registry: Registry, tmp_path: Path) -> None:
    root = publish(registry, tmp_path / "0", None, [])
    folder = staged(tmp_path / "1", "code")
    record = a_record(folder, replace(root, tags={"copal.lineage_digest": "0" * 64}), ["code"])
    with pytest.raises(RegistryError, match="the record's parent is"):
        registry.register(folder, record, parent=root, expected_head=root.number)
    with pytest.raises(RegistryError, match=r"the record is of model 'other', model\.name is 'tiny'"):
        publish(registry, tmp_path / "1", root, ["code"], model="other")


def test_an_altered_record_is_seen(registry: Registry, tmp_path: Path) -> None:
    root = publish(registry, tmp_path / "0", None, [])
    path = registry.folder(root) / "lineage.json"
    path.write_text(path.read_text().replace("a folder", "elsewhere"))
    with pytest.raises(LineageError, match="its digest differs"):
        registry.record(root)


def test_artifacts_that_are_gone_are_named(registry: Registry, tmp_path: Path) -> None:
    root = publish(registry, tmp_path / "0", None, [])
    shutil.rmtree(registry.folder(root))
    with pytest.raises(RegistryError, match="moved or deleted"):
        registry.folder(root)


def test_a_remote_version_is_fetched_once_and_verified(
    registry: Registry, workspace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = publish(registry, tmp_path / "0", None, [])
    monkeypatch.setattr("flows.registry.artifacts.local_path", lambda uri: None)  # as if it were on another machine
    downloads: list[str] = []
    download = mlflow.artifacts.download_artifacts

    def counted(uri: str, dst_path: str, tracking_uri: str) -> str:
        downloads.append(uri)
        source = Path(download(uri, tracking_uri=tracking_uri))  # without dst_path: where the local store has it
        target = Path(dst_path) / source.name
        if source.is_dir():
            shutil.copytree(source, dst_path, dirs_exist_ok=True)
            return dst_path
        shutil.copy(source, target)
        return str(target)

    monkeypatch.setattr(mlflow.artifacts, "download_artifacts", counted)
    assert registry.record(root) == registry.record(root)
    assert downloads == [f"{root.location}/lineage.json"]
    folder = registry.folder(root)
    assert workspace / "cache" in folder.parents
    assert registry.folder(root) == folder
    assert len(downloads) == 2
    assert verify_files(registry.record(root), folder) == []
    shown = [path.name for path in folder.parent.iterdir() if not path.name.startswith(".")]
    assert sorted(shown) == [folder.name, f"{folder.name}.json", "tiny.seen.json"]
    assert not list(folder.parent.glob(".*.partial"))

    shutil.rmtree(folder)
    (workspace / "artifacts/tiny" / root.location.partition("/tiny/")[2] / "model/config.json").write_text("damaged")
    with pytest.raises(RegistryError, match=r"changed: model/config\.json"):
        registry.folder(root)
    assert not folder.exists()


def test_reading_where_there_is_no_store_makes_none(tmp_path: Path) -> None:
    registry = a_registry(tmp_path / "nothing")
    assert registry.head() is None
    assert registry.versions() == []
    assert registry.log_anchor() == ""
    assert registry.alias("champion") is None
    assert not (tmp_path / "nothing").exists()


def test_a_broken_store_is_one_clear_line(tmp_path: Path) -> None:
    (tmp_path / "mlflow.db").write_text("not a database, but long enough to look at " * 9)
    with pytest.raises(RegistryError, match=r"mlflow\.db: file is not a database") as error:
        a_registry(tmp_path).head()
    assert "\n" not in str(error.value)


def test_a_store_error_does_not_show_passwords() -> None:
    nowhere = Path("/nowhere")
    registry = Registry(Places("nosuch://user:secret@host/db", nowhere, None), "tiny", Cache(nowhere))
    with pytest.raises(RegistryError) as error:
        registry.head()
    assert "secret" not in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["", "a/b", "a:b", "-a", "a b", "x" * 129, "a'b", "a\n"])
def test_a_name_that_mlflow_cannot_have_is_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(RegistryError, match=r"model\.name"):
        a_registry(tmp_path, name)


def test_two_models_share_a_store(registry: Registry, workspace: Path, tmp_path: Path) -> None:
    publish(registry, tmp_path / "0", None, [])
    other = a_registry(workspace, "tiny-1.5B")
    assert other.head() is None
    folder = staged(tmp_path / "1", "")
    record = a_record(folder, None, [], model="tiny-1.5B", base=Base(fingerprint="0" * 64, source="x"))
    assert other.register(folder, record, parent=None, expected_head=None).number == 1


def test_a_pending_check_is_quiet_and_loads_neither_torch_nor_prefect(
    registry: Registry, workspace: Path, tmp_path: Path
) -> None:
    publish(registry, tmp_path / "0", None, [])
    program = f"""
import sys
from pathlib import Path
from flows.cache import Cache
from flows.registry.store import Places
from flows.registry.registry import Registry
from flows.registry.store import Places
assert "mlflow" not in sys.modules
workspace = Path({str(workspace)!r})
def registry(name):
    return Registry(Places(f"sqlite:///{{workspace}}/{{name}}.db", workspace, None), "tiny", Cache(workspace))
print(registry("mlflow").head().number)
new = registry("new")
with new._store.client():  # migrates
    pass
print(sorted({{"torch", "transformers", "prefect", "dvc"}} & set(sys.modules)))
"""
    done = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        env={**os.environ, "MLFLOW_DISABLE_TELEMETRY": "true"},
        cwd=tmp_path,
        check=False,
    )
    assert (done.stdout, done.stderr) == ("1\n[]\n", "")
    assert not (tmp_path / "mlflow.db").exists()
