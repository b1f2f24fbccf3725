from __future__ import annotations

import json
import re
import subprocess
import sys
import traceback
from pathlib import Path

import pytest

from copal.config import CalibrationConfig, PruneConfig
from copal.errors import DataError, SettingsError
from flows.params import VARIABLES, load_settings, recorded_settings
from flows.settings import (
    DomainSettings,
    EvaluateSettings,
    GateSettings,
    LedgerSettings,
    ModelSettings,
    RegistrySettings,
    RunSettings,
    Settings,
    SigningSettings,
    WatchSettings,
    check_domain_name,
)
from flows.start.init import default_params
from flows.uris import cause, has_secrets, split_login, without_secrets
from flows.workspace import Workspace, WorkspaceError, open_workspace


@pytest.fixture(autouse=True)
def _no_registry(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def params(tmp_path: Path) -> Path:
    return tmp_path / "params.yaml"


def _load(params: Path, text: str) -> Settings:
    params.write_text(text, encoding="utf-8")
    return load_settings(params)


NULLS = "".join(f"{section}:\n" for section in Settings.model_fields)


@pytest.mark.parametrize("text", ["", "# nothing but a comment\n", "model:\ndomains:\n", NULLS])
def test_what_is_left_out_has_its_default(params: Path, text: str) -> None:
    assert _load(params, text) == Settings()


def test_the_repository_ships_every_setting_at_its_default() -> None:
    settings = load_settings(Path(__file__).parents[2] / "params.yaml")
    assert settings == Settings(model=ModelSettings(name="copal-demo"))


def test_every_setting_stands_in_a_new_params_file_with_its_default() -> None:
    import yaml

    assert yaml.safe_load(default_params("copal")) == Settings().as_dict()


def test_every_setting_is_read(params: Path) -> None:
    settings = _load(
        params,
        """
        model: {name: house-7b.v1, dtype: float32, processes: 4, batch: 2}
        calibration: {window_length: 64, windows: 4, evaluation_windows: 8, evaluation_share: 0.5, seed: 3,
                      storage: compact, text_field: body, id_field: key}
        prune: {sparsity: 0.25, criterion: gradient, rounds: [0.5, 1.0], iterations: 2, damping: 0.1}
        domains: {legal: {weight: 2}, code: {weight: 0.5}, medical: null}
        gates: {forgetting: 0.5, champion: null, dense: 3, tasks: 0.1, improvement: false, generation: false,
                promote: auto}
        evaluate: {task_limit: 50}
        watch: {repository: ../data, branch: release/1, interval: 5, cron: "*/15 7-19,22 * jan,Mar-12 mon-fri/2"}
        run: {lease: 30, time_limit: 3600, check_resources: false}
        registry: {uri: "http://localhost:5000"}
        ledger: {uri: "postgresql+psycopg2://copal@db/copal"}
        signing: {key: keys/private.pem, public_key: ~/public.pem}
        """,
    )
    assert settings == Settings(
        model=ModelSettings(name="house-7b.v1", dtype="float32", processes=4, batch=2),
        calibration=CalibrationConfig(
            window_length=64,
            windows=4,
            evaluation_windows=8,
            evaluation_share=0.5,
            seed=3,
            storage="compact",
            text_field="body",
            id_field="key",
        ),
        prune=PruneConfig(sparsity=0.25, criterion="gradient", rounds=(0.5, 1.0), iterations=2, damping=0.1),
        domains={
            "legal": DomainSettings(weight=2.0),
            "code": DomainSettings(weight=0.5),
            "medical": DomainSettings(weight=1.0),
        },
        gates=GateSettings(
            forgetting=0.5, champion=None, dense=3, tasks=0.1, improvement=False, generation=False, promote="auto"
        ),
        evaluate=EvaluateSettings(task_limit=50),
        watch=WatchSettings(
            repository="../data", branch="release/1", interval=5, cron="*/15 7-19,22 * jan,Mar-12 mon-fri/2"
        ),
        run=RunSettings(lease=30, time_limit=3600, check_resources=False),
        registry=RegistrySettings(uri="http://localhost:5000"),
        ledger=LedgerSettings(uri="postgresql+psycopg2://copal@db/copal"),
        signing=SigningSettings(key="keys/private.pem", public_key="~/public.pem"),
    )
    assert settings.weights == {"legal": 2.0, "code": 0.5, "medical": 1.0}
    assert settings.weight("legal") == 2.0
    assert settings.weight("never-named") == 1.0


def test_as_dict_is_plain_json_that_loads_as_the_same_settings(params: Path) -> None:
    settings = _load(params, "model: {dtype: bfloat16}\ndomains: {legal: {weight: 2.0}}\nprune: {rounds: [0.5, 1.0]}\n")
    # JSON is YAML.
    assert _load(params, json.dumps(settings.as_dict())) == settings


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("prun: {sparsity: 0.5}", "prun is not a section"),
        ("1: {sparsity: 0.5}", "1 is not a section"),
        ("benchmark: {windows: 2}", "benchmark is not a section; there are model, calibration, prune, domains, gates"),
        ('"pr\\nune": {sparsity: 0.5}', "pr une is not a section"),
        ("prune: {sparsty: 0.5}", "prune.sparsty is not a setting; prune has sparsity, criterion, spread, rounds"),
        (f"prune: {{spread: 1{'0' * 400}}}", "prune.spread must be in [0, 1), not 1000"),
        ("gates: {1: 0.5}", "gates.1 is not a setting; gates has forgetting, champion"),
        ("gates: 0.5", "gates must be a mapping"),
        ("prune: {1: 0.5, sparsty: 0.5}", "prune.1 is not a setting"),
        ("prune: 0.5", "prune must be a mapping"),
        ("prune: {sparsity: 1.0}", "prune.sparsity"),
        ("prune: {sparsity: half}", "prune.sparsity"),
        ("calibration: {windows: 0}", "calibration.windows"),
        ("calibration: {windows: true}", "calibration.windows"),
        ("calibration: {windows: '5'}", "calibration.windows"),
        ("calibration: {storage: tiny}", "calibration.storage"),
        ("calibration: {text_field: ''}", "calibration.text_field"),
        ("calibration: {id_field: 5}", "calibration.id_field"),
        ("calibration: {text_field: id}", "calibration.text_field and id_field must be two fields"),
        ("model: {dtype: float16}", "model.dtype"),
        ("model: {processes: 0}", "model.processes"),
        ("model: {processes: two}", "model.processes"),
        ("model: {nodes: 0}", "model.nodes must be a whole number of at least 1, not 0"),
        ("run: {nodes_address: node0.example}", "run.nodes_address must be HOST:PORT or null"),
        ("model: {batch: 1.5}", "model.batch"),
        ("model: {batch: true}", "model.batch"),
        ("model: {batch: '5'}", "model.batch must be a whole number of at least 1, not '5'"),
        ("model: {batch: null}", "model.batch"),
        ("model: {name: a/b}", "model.name"),
        ("model: {name: 7}", "model.name"),
        ("model: {name: ''}", "model.name"),
        ("watch: {interval: 0}", "watch.interval"),
        ("watch: {interval: .nan}", "watch.interval"),
        ("watch: {branch: 1.0}", "watch.branch"),
        ("watch: {repository: 7}", "watch.repository"),
        *(
            (f"watch: {{cron: {cron}}}", "watch.cron")
            for cron in ("5", "daily", "'* * * *'", "'60 * * * *'", "'* * * 13 *'", "'*/0 * * * *'", "'* * * * * *'")
        ),
        ("gates: {forgetting: 0}", "gates.forgetting"),
        ("gates: {tasks: true}", "gates.tasks must be a finite number above 0 or null, not True"),
        ("evaluate: {task_limit: 0}", "evaluate.task_limit must be a whole number of at least 1 or null, not 0"),
        ("gates: {champion: -0.1}", "gates.champion"),
        ("gates: {dense: .nan}", "gates.dense"),
        ("gates: {dense: true}", "gates.dense"),
        ("gates: {dense: '2'}", "gates.dense must be a finite number above 0 or null, not '2'"),
        ("gates: {improvement: 1}", "gates.improvement"),
        ("gates: {generation: null}", "gates.generation"),
        ("gates: {promote: yes}", "gates.promote"),
        ("gates: {sparsity: 0.5}", "gates.sparsity is not a setting; gates has forgetting, champion"),
        ("run: {lease: 0.5}", "run.lease"),
        ("run: {lease: soon}", "run.lease"),
        ("run: {time_limit: 0}", "run.time_limit"),
        ("run: {check_resources: 1}", "run.check_resources must be true or false, not 1"),
        ("signing: {key: 1}", "signing.key"),
        ("signing: {public_key: ' '}", "signing.public_key"),
        ("registry: {uri: ''}", "registry.uri"),
        *(
            (f"ledger: {{uri: {uri}}}", "ledger.uri must be the URL of an SQLite file")
            for uri in (
                "7",
                "''",
                "ledger.db",
                "http://db",
                "mysql://u:secret@db/copal",
                "postgres://u:secret@db/copal",
                "'sqlite://'",
                "'sqlite:///:memory:'",
                "'sqlite:///file:ledger?mode=memory&uri=true'",
            )
        ),
        ("registry: {uri: http://mlflow}", "ledger.uri must be set"),
        ("domains: [legal]", "domains must be a mapping"),
        ("domains: {legal: 2.0}", "domains.legal must be a mapping"),
        ("domains: {legal: {wieght: 2.0}}", "domains.legal.wieght"),
        ("domains: {legal: {weight: 0}}", "domains.legal.weight"),
        ("domains: {legal: {weight: .inf}}", "domains.legal.weight"),
        ("domains: {legal: {weight: true}}", "domains.legal.weight"),
        ("domains: {Legal: {weight: 2.0}}", "domains: 'Legal' cannot name a domain"),
        ("domains: {2024: {weight: 2.0}}", "domains: 2024 cannot name a domain"),
        ("model: {batch: 1}\nmodel: {batch: 2}", "model stands there twice, again in line 2"),
        ("gates:\n  dense: 3\n  champion: 1\n  dense: 4", "dense stands there twice, again in line 4"),
        ("domains:\n  legal: {weight: 1.0, weight: 2.0}", "weight stands there twice, again in line 2"),
        ("- model", "must be a mapping of sections"),
        ("model: {name: [}", "is not YAML"),
        ("since: 2024-13-45", "is not YAML"),
    ],
)
def test_bad_settings_name_file_and_setting_in_one_line(params: Path, text: str, names: str) -> None:
    with pytest.raises(SettingsError) as caught:
        _load(params, text)
    assert str(caught.value).startswith(f"{params}: ")
    assert names in str(caught.value)
    assert "\n" not in str(caught.value)
    assert "secret" not in str(caught.value)


def test_a_file_that_cannot_be_read_is_named(params: Path) -> None:
    with pytest.raises(SettingsError, match=r"params\.yaml: cannot be read"):
        load_settings(params)
    params.write_bytes(b"model: {name: \xff}")
    with pytest.raises(SettingsError, match=r"params\.yaml: is not UTF-8"):
        load_settings(params)


def test_the_environment_goes_before_the_file(params: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = "registry: {uri: 'sqlite:///file.db'}\nledger: {uri: 'sqlite:///ledger.db'}"
    assert _load(params, text).registry.uri == "sqlite:///file.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://mlflow")
    assert _load(params, text).registry.uri == "http://mlflow"
    monkeypatch.setenv("COPAL_REGISTRY_URI", "http://copal")
    assert _load(params, text).registry.uri == "http://copal"
    monkeypatch.setenv("COPAL_REGISTRY_URI", "")  # set to nothing is not set
    assert _load(params, text).registry.uri == "http://mlflow"
    assert _load(params, text).ledger.uri == "sqlite:///ledger.db"
    monkeypatch.setenv("COPAL_LEDGER_URI", "postgresql://db/copal")
    assert _load(params, text).ledger.uri == "postgresql://db/copal"
    monkeypatch.setenv("COPAL_LEDGER_URI", "mysql://me:secret@db/copal")
    with pytest.raises(SettingsError, match=r"params\.yaml: COPAL_LEDGER_URI must be the URL") as caught:
        _load(params, text)
    assert "secret" not in str(caught.value)
    # A record holds what was, whatever the environment is now.
    assert (
        recorded_settings({"registry": {"uri": "sqlite:///then.db"}}, "version 2").registry.uri == "sqlite:///then.db"
    )


@pytest.mark.parametrize(
    "registry", ["http://127.0.0.1:5000", "https://a:secret@mlflow", "postgresql://m:se/cret@db/mlflow", "databricks"]
)
def test_a_registry_that_hosts_share_needs_a_ledger_that_is_named(
    params: Path, monkeypatch: pytest.MonkeyPatch, registry: str
) -> None:
    with pytest.raises(SettingsError, match=r"ledger\.uri must be set, for registry\.uri names a store") as caught:
        _load(params, f"registry: {{uri: '{registry}'}}")
    assert "COPAL_LEDGER_URI" in str(caught.value)
    assert "cret" not in str(caught.value)
    assert _load(params, f"registry: {{uri: '{registry}'}}\nledger: {{uri: 'postgresql://db/copal'}}")
    for variable in ("MLFLOW_TRACKING_URI", "COPAL_REGISTRY_URI"):  # the message says where the server comes from
        monkeypatch.setenv(variable, registry)
        with pytest.raises(SettingsError, match=f"for {variable} names a store"):
            _load(params, "")
    monkeypatch.setenv("COPAL_LEDGER_URI", "sqlite:////srv/ledger.db")
    assert _load(params, "").ledger.uri == "sqlite:////srv/ledger.db"


@pytest.mark.parametrize(
    "registry", ["sqlite:///a.db", "sqlite+pysqlite:////a.db", "file:///mlruns", "/srv/a:b/mlruns"]
)
def test_a_registry_in_files_of_this_machine_needs_no_other_ledger(params: Path, registry: str) -> None:
    assert _load(params, f"registry: {{uri: '{registry}'}}").ledger.uri is None


def test_settings_do_not_show_the_passwords_they_hold(params: Path) -> None:
    settings = _load(
        params,
        "registry: {uri: 'http://me:secret@mlflow'}\nledger: {uri: 'postgresql://me:secret@db/copal'}\n"
        "watch: {repository: 'https://me:secret@git/data'}",
    )
    assert "secret" not in repr(settings)


def test_the_fingerprint_is_of_what_alters_a_version_and_of_nothing_else(params: Path) -> None:
    base = _load(params, "").fingerprint()
    for same in (
        "model: {name: another, processes: 2, batch: 1}",
        "calibration: {evaluation_windows: 32}",
        "calibration: {text_field: text, id_field: id}",
        "domains: {legal: {weight: 1.0}}",
        "watch: {repository: elsewhere, branch: main, interval: 1}",
        "registry: {uri: 'http://mlflow'}\nledger: {uri: 'postgresql://db/copal'}",
        "gates: {forgetting: 0.01, promote: auto}",
    ):
        assert _load(params, same).fingerprint() == base, same
    different = (
        "model: {dtype: float32}",
        "calibration: {windows: 23}",
        "calibration: {evaluation_share: 0.3}",
        "calibration: {storage: compact}",
        "calibration: {text_field: body}",
        "calibration: {id_field: key}",
        "prune: {sparsity: 0.6}",
        "domains: {legal: {weight: 2}}",
        "domains: {code: {weight: 2}}",
    )
    fingerprints = {_load(params, text).fingerprint() for text in different}
    assert len(fingerprints | {base}) == len(different) + 1
    whole, spelled = "domains: {legal: {weight: 2}}", "domains: {legal: {weight: 2.0}}"
    assert _load(params, whole).fingerprint() == _load(params, spelled).fingerprint()


@pytest.mark.parametrize("name", ["a", "0", "legal", "icd-10_cm", "a" * 64])
def test_good_domain_names(name: str) -> None:
    assert check_domain_name(name) == name


@pytest.mark.parametrize("name", ["", "Legal", "_a", "-a", "a.b", "a/b", "..", "a\n", "é", "a" * 65, 7, None])
def test_bad_domain_names(name: object) -> None:
    with pytest.raises(DataError) as caught:
        check_domain_name(name)
    assert "\n" not in str(caught.value)


def test_a_workspace_knows_its_places(tmp_path: Path) -> None:
    for part in (".git", ".dvc"):
        (tmp_path / part).mkdir()
    (tmp_path / "params.yaml").touch()
    (tmp_path / "inside").mkdir()
    workspace = open_workspace(tmp_path / "inside" / "..")
    assert workspace == Workspace(tmp_path)
    assert load_settings(workspace.params) == Settings()
    assert workspace.registry_uri(Settings()) == f"sqlite:///{tmp_path}/.copal/mlflow.db"
    assert workspace.registry_uri(Settings(registry=RegistrySettings(uri="http://mlflow"))) == "http://mlflow"
    assert workspace.ledger_uri(Settings()) == f"sqlite:///{tmp_path}/.copal/ledger.db"
    for uri, of_this in (
        ("sqlite:///.copal/other.db", f"sqlite:///{tmp_path}/.copal/other.db"),
        ("sqlite:////srv/ledger.db", "sqlite:////srv/ledger.db"),
        ("postgresql://db/copal", "postgresql://db/copal"),
    ):
        assert workspace.ledger_uri(Settings(ledger=LedgerSettings(uri=uri))) == of_this
    for place in (workspace.artifacts, workspace.runs, workspace.cache, workspace.lock):
        assert place.parent == workspace.private == tmp_path / ".copal"
    assert not workspace.private.exists()  # opening writes nothing


def test_what_is_no_workspace_says_what_it_lacks(tmp_path: Path) -> None:
    root = tmp_path / "w"
    steps = [
        ("is not a folder", root.mkdir),
        ("is not the root of a git repository", (root / ".git").mkdir),
        ("has no .dvc folder", (root / ".dvc").mkdir),
        ("has no params.yaml", (root / "params.yaml").touch),
    ]
    for lack, mend in steps:
        with pytest.raises(WorkspaceError, match=lack) as caught:
            open_workspace(root)
        assert f"copal init {root}" in str(caught.value)
        mend()
    assert open_workspace(root).root == root


def test_settings_import_nothing_heavy() -> None:
    code = "import sys, flows.settings; print(*{'torch', 'dvc', 'mlflow', 'prefect', 'yaml'} & set(sys.modules))"
    found = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert found.stdout.split() == []


@pytest.mark.parametrize(
    ("text", "public"),
    [
        ("https://ada:secret@example.org:8443/data.git", "https://example.org:8443/data.git"),
        ("fatal: 'https://se@cret@a.org/x' and http://secret@b.org", "fatal: 'https://a.org/x' and http://b.org"),
        ("ssh://git:secret@example.org/data.git", "ssh://git@example.org/data.git"),
        ("postgresql+psycopg2://mlflow:secret@db/mlflow", "postgresql+psycopg2://mlflow@db/mlflow"),
        ("postgresql://copal:a/b?c#d@db:5432/copal", "postgresql://copal@db:5432/copal"),
        ("postgresql://db:5432/mlflow", "postgresql://db:5432/mlflow"),
        ("postgresql://db/mlflow?user=a&password=secret&x=1", "postgresql://db/mlflow?user=a&password=...&x=1"),
        ("git@example.org:data.git", "git@example.org:data.git"),
        ("s3://bucket/a@b", "s3://bucket/a@b"),
        ("/srv/data@home", "/srv/data@home"),
        ("http://me:p#a/s?s@mlflow:5000/x", "http://mlflow:5000/x"),
        ("mysql+pymysql://me:12345@db/x", "mysql+pymysql://me@db/x"),
        ("'http://me:secret@h:5000': no, ask ada@example.org", "'http://h:5000': no, ask ada@example.org"),
        ("see http://h:5000: it fails, mail ada@example.org", "see http://h:5000: it fails, mail ada@example.org"),
        ("http://h:5000/a@b and http://[::1]:5000/", "http://h:5000/a@b and http://[::1]:5000/"),
        (
            "s3://b/x?X-Amz-Signature=abc&X-Amz-Security-Token=d",
            "s3://b/x?X-Amz-Signature=...&X-Amz-Security-Token=...",
        ),
        ("https://h/x?access_token=abc#y", "https://h/x?access_token=..."),
        ("https://h/x?api-key=abc&branch=main", "https://h/x?api-key=...&branch=main"),
    ],
)
def test_passwords_and_tokens_are_left_out(text: str, public: str) -> None:
    assert without_secrets(text) == public
    assert without_secrets(public) == public
    assert has_secrets(text) == (text != public)


@pytest.mark.parametrize(
    ("url", "bare", "login"),
    [
        ("https://ada:s%40cret@example.org:8443/x.git?y=1", "https://example.org:8443/x.git?y=1", ("ada", "s@cret")),
        ("https://TOKEN@example.org/x.git", "https://example.org/x.git", ("TOKEN", None)),
        ("http://ada:@example.org/x.git", "http://example.org/x.git", ("ada", "")),
        ("ssh://git:secret@example.org/x.git", "ssh://git@example.org/x.git", None),
        ("git@example.org:x.git", "git@example.org:x.git", None),
        ("file:///srv/a@b", "file:///srv/a@b", None),
    ],
)
def test_a_url_for_a_command_line_is_without_its_login(
    url: str, bare: str, login: tuple[str, str | None] | None
) -> None:
    assert split_login(url) == (bare, login)


def test_a_cause_that_tells_a_password_is_no_cause() -> None:
    kept, told, behind = ValueError("http://h/x"), ValueError("http://me:secret@h/x"), ValueError("away")
    behind.__context__ = told
    assert [cause(kept), cause(told), cause(behind)] == [kept, None, None]


@pytest.mark.parametrize(
    "text",
    [
        "registry: http://me:canary@h:5000",
        "ledger: postgresql://me:canary@h/x",
        "watch: https://me:canary@h/x.git",
        "watch: {repository: [https://me:canary@h/x.git]}",
        "registry: {uri: [http://me:canary@h]}",
        "registry: {url: http://me:canary@h}",
        "registry: {uri: http://me:canary@h:5000}",  # a server without a ledger
        "ledger: {uri: mysql://me:canary@h/x}",
        "http://me:canary@h: 1",
        "watch: {repository: https://me:canary@h/x.git, repository: x}",
        "watch: {repository: 'https://me:canary@h/x.git}",
    ],
)
def test_what_is_wrong_with_the_settings_is_said_without_a_password(text: str, tmp_path: Path) -> None:
    (tmp_path / "params.yaml").write_text(text)
    with pytest.raises(SettingsError) as caught:
        load_settings(tmp_path / "params.yaml")
    assert "canary" not in "".join(traceback.format_exception(caught.value))


def test_every_variable_is_in_the_table_of_the_docs():
    table = (Path(__file__).parents[2] / "docs" / "team.md").read_text(encoding="utf-8")
    for variable, (section, setting) in VARIABLES.items():
        assert re.search(rf"^\| .*`{variable}`.* \| .*`{section}\.{setting}`", table, re.MULTILINE), variable


def test_the_nodes_in_the_environment_go_before_those_of_the_file(params, monkeypatch):
    monkeypatch.setenv("COPAL_NODES", "3")
    monkeypatch.setenv("COPAL_NODES_ADDRESS", "node0.example:29400")
    settings = _load(params, "model: {nodes: 2}")
    assert (settings.model.nodes, settings.run.nodes_address) == (3, "node0.example:29400")
    monkeypatch.setenv("COPAL_NODES", "some")
    with pytest.raises(SettingsError, match=r"COPAL_NODES must be a whole number of at least 1, not 'some'"):
        _load(params, "")


def test_a_size_in_the_environment_is_a_number(params, monkeypatch):
    monkeypatch.setenv("COPAL_CACHE_SIZE", "2.5")
    assert _load(params, "").cache.size == 2.5
    monkeypatch.setenv("COPAL_CACHE_SIZE", "much")
    with pytest.raises(SettingsError, match=r"COPAL_CACHE_SIZE must be a number of gigabytes above 0"):
        _load(params, "")


@pytest.mark.parametrize(
    ("registry", "location", "root"),
    [
        ("", "file:///w/.copal/artifacts", "/w/.copal/artifacts"),
        ("uri: http://mlflow", None, "/w/.copal/artifacts"),
        ("uri: http://mlflow, artifacts: /srv/a", "file:///srv/a", "/srv/a"),
        ("artifacts: stored", "file:///w/stored", "/w/stored"),
        ("artifacts: 'file:///srv/b'", "file:///srv/b", "/srv/b"),
        ("artifacts: 's3://bucket/path'", "s3://bucket/path", "/w/.copal/artifacts"),
        ("uri: http://mlflow, artifacts: 'mlflow-artifacts:/team'", "mlflow-artifacts:/team", "/w/.copal/artifacts"),
    ],
)
def test_where_the_artifacts_of_a_new_lineage_go(params, registry, location, root):
    settings = _load(params, f"registry: {{{registry}}}\nledger: {{uri: 'postgresql://db/copal'}}")
    workspace = Workspace(Path("/w"))
    assert workspace.artifact_location(settings) == location
    assert workspace.artifact_root(settings) == Path(root)
