"""The command line: real git, DVC, MLflow and, where a step runs, Prefect's harness."""

from __future__ import annotations

import json
import logging
import os
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from copal.errors import CopalError, DataError
from flows import cli
from flows.cli import main, watch_forever
from flows.params import load_settings
from flows.settings import Settings
from flows.start.init import default_params, model_name_for
from flows.workspace import open_workspace


@pytest.fixture(autouse=True)
def _on_its_own(tmp_path_factory, monkeypatch):
    """The commands leave this process's environment and loggers as they were, and git's settings of the user alone."""
    environment = dict(os.environ)
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", os.devnull)
    monkeypatch.setenv("GIT_CONFIG_NOSYSTEM", "1")
    monkeypatch.setattr("flows.terminal.progress._LONG", 1e9)  # no progress on a busy machine: errors stand alone
    yield
    os.environ.clear()
    os.environ.update(environment)
    for name in ("prefect.flow_runs", "prefect.task_runs"):
        logging.getLogger(name).propagate = True


@pytest.fixture
def run(capsys):
    """run(*arguments) -> (exit code, standard output, standard error)."""

    def call(*arguments: object) -> tuple[int, str, str]:
        capsys.readouterr()
        code = main([str(argument) for argument in arguments])
        out, err = capsys.readouterr()
        return code, out, err

    return call


@pytest.fixture
def refused(run):
    """refused(*arguments) -> the one line that a refused command prints."""

    def call(*arguments: object) -> str:
        code, out, err = run(*arguments)
        assert (code, out) == (2, "")
        assert err.startswith("copal: ")
        assert err.count("\n") == 1
        return err

    return call


def git(root, *arguments: str) -> str:
    command = ["git", "-C", str(root), "-c", "user.name=test", "-c", "user.email=test@localhost", *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def tree(root) -> dict[str, bytes]:
    """Every file under `root` but what git and DVC keep for themselves."""
    files = [path for path in root.rglob("*") if path.is_file()]
    named = {path.relative_to(root).as_posix(): path for path in files}
    return {name: path.read_bytes() for name, path in named.items() if not name.startswith((".git/", ".dvc/tmp/"))}


# --- the entry


def test_help_is_quick_and_loads_nothing_heavy():
    program = (
        "import sys\n"
        "from flows.cli import main\n"
        "try:\n    main(['--help'])\nexcept SystemExit as leaving:\n    code = leaving.code\n"
        "heavy = {'torch', 'mlflow', 'dvc', 'prefect', 'transformers', 'accelerate', 'datasets', 'rich', 'yaml'}\n"
        "print(code, sorted(heavy & set(sys.modules)), file=sys.stderr)"
    )
    began = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    seconds = time.perf_counter() - began
    assert done.stderr.strip() == "0 []"
    for command in ("init", "base", "watch", "adapt", "status", "export", "doctor", "demo"):
        assert f" {command} " in done.stdout
    assert seconds < 2  # 0.2 on an idle machine


def test_version(capsys):
    with pytest.raises(SystemExit) as leaving:
        main(["--version"])
    assert leaving.value.code == 0
    assert capsys.readouterr().out == "copal 0.1.0\n"


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["prune"],
        ["init"],
        ["watch", "--interval", "0"],
        ["watch", "--interval", "soon"],
        ["watch", "--interval=nan"],
    ],
)
def test_usage_errors_exit_with_2(arguments, capsys):
    with pytest.raises(SystemExit) as leaving:
        main(arguments)
    assert leaving.value.code == 2
    assert "usage: copal" in capsys.readouterr().err


def test_libraries_are_told_to_phone_nobody_and_what_the_user_set_wins(monkeypatch, run, tmp_path):
    monkeypatch.setenv("DO_NOT_TRACK", "mine")
    monkeypatch.delenv("MLFLOW_DISABLE_TELEMETRY")
    run("status", "--workspace", tmp_path)
    assert os.environ["DO_NOT_TRACK"] == "mine"
    assert os.environ["MLFLOW_DISABLE_TELEMETRY"] == "true"


def test_exit_codes_of_errors(monkeypatch, run, tmp_path):
    def raising(error: BaseException):
        def status(arguments):
            raise error

        monkeypatch.setattr(cli, "_status", status)

    raising(DataError("a line\nand another"))
    assert run("status") == (2, "", "copal: a line and another\n")
    raising(OSError(28, "No space left on device", str(tmp_path)))
    assert run("status") == (2, "", f"copal: {tmp_path}: No space left on device\n")
    raising(KeyboardInterrupt())
    assert run("status")[0] == 130
    raising(FileNotFoundError(2, "No such file or directory"))  # a bug: the traceback stays
    with pytest.raises(FileNotFoundError):
        run("status")


@pytest.mark.parametrize("command", ["watch --once", "adapt code", "status", "export 1 out"])
def test_a_folder_that_is_no_workspace(command, refused, tmp_path):
    assert "copal init" in refused(*command.split(), "--workspace", tmp_path)
    assert "is not a folder" in refused(*command.split(), "--workspace", tmp_path / "nowhere")
    assert not any(tmp_path.iterdir())


def test_a_bad_setting_names_file_and_setting(bench, refused):
    bench.set("prune: {", "prune: {sparsity: 1.5, ")
    line = refused("watch", "--once", "--workspace", bench.root)
    assert "params.yaml" in line
    assert "prune.sparsity" in line


# --- init and base


def test_init_makes_a_workspace_with_its_base(run, tiny_base, tmp_path):
    root = tmp_path / "new" / "Our Tickets"
    code, out, _ = run("init", root, "--base", tiny_base)
    assert code == 0
    assert str(root) in out
    assert git(root, "status", "--porcelain") == ""
    committed = git(root, "ls-files").splitlines()
    assert {".gitignore", ".dvc/config", "params.yaml", "data/README.md"} <= set(committed)
    assert not any(name.startswith(".copal") for name in committed)
    assert git(root, "log", "-1", "--format=%an <%ae>") == "copal <copal@localhost>"  # git knows no identity here
    code, out, _ = run("status", "--json", "--workspace", root)
    found = json.loads(out)
    assert found["model"] == "Our-Tickets"
    assert [version["version"] for version in found["versions"]] == [1]
    assert not any(open_workspace(root).runs.iterdir())

    before = tree(root)
    assert run("init", root, "--base", tiny_base)[0] == 0  # again: nothing to do
    assert run("init", root)[0] == 0
    assert {name: content for name, content in tree(root).items() if not name.endswith("mlflow.db")} == {
        name: content for name, content in before.items() if not name.endswith("mlflow.db")
    }
    assert git(root, "rev-list", "--count", "HEAD") == "1"


def test_init_completes_a_repository_and_commits_only_its_own_files(run, tmp_path):
    git(tmp_path, "init", "--quiet")
    (tmp_path / "params.yaml").write_text("model: {name: mine}\n")
    (tmp_path / ".gitignore").write_text("*.log\n")
    (tmp_path / "staged.txt").write_text("not yet to be committed")
    git(tmp_path, "add", "staged.txt")
    assert run("init", tmp_path)[0] == 0
    assert (tmp_path / "params.yaml").read_text() == "model: {name: mine}\n"
    assert (tmp_path / ".gitignore").read_text() == "*.log\n.copal/\n"
    assert git(tmp_path, "status", "--porcelain") == "A  staged.txt"


@pytest.fixture
def bad_bases(tmp_path_factory, tiny_base):
    """Folders that are no base model: (folder, what the line says of it)."""
    empty, encoder, untokenised = (tmp_path_factory.mktemp(name) for name in ("empty", "encoder", "untokenised"))
    shutil.copytree(tiny_base, encoder, dirs_exist_ok=True)
    config = json.loads((encoder / "config.json").read_text())
    (encoder / "config.json").write_text(json.dumps(config | {"model_type": "t5", "is_encoder_decoder": True}))
    shutil.copytree(tiny_base, untokenised, dirs_exist_ok=True)
    (untokenised / "tokenizer.json").unlink()
    return [(empty, "config.json"), (encoder, "encoder-decoder"), (untokenised, "no tokenizer")]


def test_a_bad_base_leaves_no_half_workspace(refused, bad_bases, tmp_path):
    for source, says in [*bad_bases, ("pypi:none of this", "not a package"), ("no such thing", "no such thing")]:
        assert says in refused("init", tmp_path / "new" / "deep", "--base", source)
        assert says in refused("base", source, tmp_path / "target")
        assert not any(tmp_path.iterdir())


def test_a_bad_base_leaves_an_existing_folder_as_it_was(refused, bad_bases, tmp_path):
    git(tmp_path, "init", "--quiet")
    (tmp_path / ".gitignore").write_text("*.log\n")
    git(tmp_path, "add", ".gitignore")
    before = tree(tmp_path)
    refused("init", tmp_path, "--base", bad_bases[0][0])
    assert tree(tmp_path) == before
    assert git(tmp_path, "status", "--porcelain") == "A  .gitignore"


def test_what_fails_late_leaves_an_existing_folder_as_it_was_too(refused, monkeypatch, tiny_base, tmp_path):
    git(tmp_path, "init", "--quiet")
    (tmp_path / ".gitignore").write_text("*.log\n")
    (tmp_path / "mine.txt").write_text("mine")
    git(tmp_path, "add", "mine.txt")
    before = tree(tmp_path)

    def conflict(*_):
        raise CopalError("another base under the same model name")

    monkeypatch.setattr("flows.step.register.register_root", conflict)
    assert "another base" in refused("init", tmp_path, "--base", tiny_base)
    assert tree(tmp_path) == before
    assert git(tmp_path, "status", "--porcelain").splitlines() == ["A  mine.txt", "?? .gitignore"]


def test_another_base_under_the_same_name(bench, refused, make_model, tiny_base, tmp_path):
    other = shutil.copytree(tiny_base, tmp_path / "other")
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 1e-5}))
    before, versions = bench.snapshot(), bench.registry.versions()
    head = git(bench.root, "status", "--porcelain")
    assert "another base" in refused("init", bench.root, "--base", other)
    assert bench.snapshot() == before
    assert bench.registry.versions() == versions
    assert git(bench.root, "status", "--porcelain") == head


def test_init_refuses_a_file_and_bad_settings(refused, tmp_path):
    (tmp_path / "file").write_text("")
    assert "is a file" in refused("init", tmp_path / "file")
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "params.yaml").write_text("prune: {sparsity: 2}\n")
    assert "prune.sparsity" in refused("init", tmp_path / "bad")
    assert [path.name for path in (tmp_path / "bad").iterdir()] == ["params.yaml"]


def test_new_settings_are_the_defaults(tmp_path):
    params = tmp_path / "params.yaml"
    for name in ("copal", "2026", "true", "1e3"):  # a folder may be called what YAML reads as something else
        params.write_text(default_params(name))
        assert load_settings(params).model.name == name
    params.write_text(default_params("copal"))
    assert load_settings(params) == Settings()
    own = Path(__file__).parents[2] / "params.yaml"  # of this repository: the same text, so that neither falls behind
    assert own.read_text(encoding="utf-8").startswith(default_params("copal-demo"))
    assert model_name_for(tmp_path / "_Our (tickets)") == "Our-tickets-"
    assert model_name_for(tmp_path / "日本") == "copal"


def test_base_fetches_a_folder(run, refused, tiny_base, tmp_path):
    code, out, _ = run("base", tiny_base, tmp_path / "base")
    assert code == 0
    assert "fingerprint" in out
    assert (tmp_path / "base" / "model.safetensors").is_file()
    assert "is not an empty folder" in refused("base", tiny_base, tmp_path / "base")


# --- watch, adapt, status, export


@pytest.mark.usefixtures("prefect")
def test_the_main_job_from_the_command_line(bench, run, refused, tmp_path):
    here = ("--workspace", bench.root)
    code, out, err = run("watch", "--once", *here)
    assert (code, err) == (0, "")
    assert out == "nothing new: version 1 of tiny is the dense base, no domain is tracked under data/\n"

    bench.commit("code", 0)
    bench.commit("legal", 1)
    found = json.loads(run("status", "--json", *here)[1])
    assert [entry["domain"] for entry in found["pending"]] == ["code", "legal"]

    code, out, _ = run("watch", "--once", *here)
    assert code == 0
    assert "version 2 of tiny: adapted to code\nversion 3 of tiny: adapted to legal\n" in out
    assert "perplexity by domain" in out
    code, out, err = run("watch", "--once", *here)
    assert (code, err) == (0, "")
    assert out == "nothing new: version 3 of tiny knows code, legal at their newest data versions\n"
    code, out, _ = run("adapt", "legal", *here)
    assert (code, out) == (0, "nothing to do: version 3 of tiny knows legal at this data version\n")

    found = json.loads(run("status", "--json", *here)[1])
    assert set(found) == {"model", "versions", "pending", "waiting", "notes", "problems"}
    first, _, last = found["versions"]
    assert set(last) == {
        "withdrawn",
        "version", "parent", "domain", "dvc_md5", "git_rev", "sparsity", "weights_back",
        "perplexity", "dense_perplexity", "seconds", "gates", "failed", "aliases",
    }  # fmt: skip
    assert (first["parent"], first["domain"], first["perplexity"]) == (None, None, {})
    assert (last["version"], last["parent"], last["domain"]) == (3, 2, "legal")
    assert last["git_rev"] == git(bench.root, "rev-parse", "HEAD")
    assert last["dvc_md5"].endswith(".dir")
    assert last["sparsity"] == pytest.approx(0.5, abs=1e-6)
    assert last["weights_back"] > 0
    assert last["perplexity"].keys() == last["dense_perplexity"].keys() == {"code", "legal"}
    assert last["seconds"].keys() == {"statistics", "solve", "evaluate"}
    assert last["aliases"] == ["latest"]

    exported = tmp_path / "out" / "pruned"
    assert run("export", "latest", exported, *here)[0] == 0
    from transformers import AutoModelForCausalLM, AutoTokenizer

    weight = AutoModelForCausalLM.from_pretrained(exported).model.layers[0].mlp.up_proj.weight
    assert (weight == 0).float().mean() == pytest.approx(0.5, abs=0.01)
    assert AutoTokenizer.from_pretrained(exported)("text")["input_ids"]
    assert "is not an empty folder" in refused("export", "2", exported, *here)


@pytest.mark.usefixtures("prefect")
def test_a_dataset_that_is_refused_is_one_line_and_the_others_are_adapted_to(bench, run, monkeypatch, caplog):
    from prefect.settings import PREFECT_LOGGING_LEVEL, temporary_settings

    monkeypatch.delenv("PREFECT_LOGGING_LEVEL")  # as a user has it
    bench.commit("bad", 0, documents=3)
    bench.commit("code", 1)
    with temporary_settings({PREFECT_LOGGING_LEVEL: "WARNING"}):
        code, out, err = run("watch", "--once", "--workspace", bench.root)
    assert code == 2
    assert "version 2 of tiny: adapted to code\n" in out
    assert err.startswith("copal: data/bad has ")
    assert err.count("\n") == 1
    assert not [record for record in caplog.records if record.name.startswith("prefect.")]  # no traceback of a run


def test_adapt_refuses_before_it_starts_anything(bench, refused, monkeypatch):
    monkeypatch.setitem(sys.modules, "flows.adapt", None)  # importing it would fail
    bench.commit("code", 0)
    here = ("--workspace", bench.root)
    assert "cannot name a domain" in refused("adapt", "Code!", *here)
    assert "tracks code" in refused("adapt", "legal", *here)
    assert "nonesuch" in refused("adapt", "code", "--rev", "nonesuch", *here)


def test_watch_without_a_base(bench, run, refused):
    bench.set("name: tiny", "name: other")
    code, out, _ = run("watch", "--once", "--workspace", bench.root)
    assert (code, out) == (0, "nothing new: no domain is tracked under data/, and other has no base model yet\n")
    bench.commit("code", 0)
    assert "copal init" in refused("watch", "--once", "--workspace", bench.root)


def test_a_name_that_no_domain_may_have_is_refused_by_watch(bench, run):
    bench.commit("Code", 0)
    code, _, err = run("watch", "--once", "--workspace", bench.root)
    assert code == 2
    assert err.startswith("copal: data/Code: 'Code' cannot name a domain")


@pytest.mark.parametrize("wanted", ["7", "champion", "-1x"])
def test_export_of_a_version_that_is_not_there(bench, refused, tmp_path, wanted):
    line = refused("export", "--workspace", bench.root, "--", wanted, tmp_path / "out")
    assert wanted in line
    assert not (tmp_path / "out").exists()


def test_export_of_damaged_artifacts(bench, refused, tmp_path):
    model = bench.registry.folder(bench.registry.head()) / "model" / "model.safetensors"
    model.write_bytes(model.read_bytes()[:-1] + b"x")
    assert "is damaged" in refused("export", "1", tmp_path / "out", "--workspace", bench.root)
    model.unlink()
    assert "is missing" in refused("export", "1", tmp_path / "out", "--workspace", bench.root)
    assert [path.name for path in tmp_path.iterdir()] == ["workspace"]


class Rounds(threading.Event):
    """An Event that is set by the wait of the last round."""

    def __init__(self, rounds: int) -> None:
        super().__init__()
        self.left, self.waited = rounds, []

    def wait(self, timeout=None):
        self.waited.append(timeout)
        self.left -= 1
        if self.left <= 0:
            self.set()
        return self.is_set()


def test_the_loop_goes_on_after_errors(capsys, caplog):
    errors = iter([None, DataError("data/x is bad"), DataError("data/x is bad"), RuntimeError("a bug"), None])
    checks = []

    def check():
        checks.append(1)
        error = next(errors)
        if error:
            raise error

    stop = Rounds(5)
    watch_forever(check, 7.5, stop)
    assert len(checks) == 5
    assert stop.waited == [7.5] * 5
    assert capsys.readouterr().err.count("copal: data/x is bad\n") == 1  # though it failed twice
    assert "a bug" in caplog.text


def test_watch_waits_as_told_and_says_what_changed_only(bench, run, monkeypatch):
    stop = Rounds(3)
    monkeypatch.setattr(cli.threading, "Event", lambda: stop)
    code, out, _ = run("watch", "--interval", "0.5", "--workspace", bench.root)
    assert code == 0
    assert out.count("nothing new") == 1
    assert stop.waited == [0.5] * 3


def test_ctrl_c_ends_the_loop(bench, run, monkeypatch):
    class Interrupted(threading.Event):
        def wait(self, timeout=None):
            raise KeyboardInterrupt

    monkeypatch.setattr(cli.threading, "Event", Interrupted)
    code, _, err = run("watch", "--workspace", bench.root)
    assert (code, err) == (130, "copal: interrupted\n")


def test_a_check_that_finds_nothing_starts_neither_prefect_nor_torch(bench):
    program = (
        "import sys; from flows.cli import main\n"
        "code = main(['watch', '--once', '--workspace', sys.argv[1]])\n"
        "print(code, sorted({'torch', 'prefect', 'transformers'} & set(sys.modules)))"
    )
    began = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", program, str(bench.root)], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "0 []"
    assert time.perf_counter() - began < 10


def test_doctor_says_what_is_wrong(bench, run, monkeypatch):
    from flows import doctor

    assert run("doctor", "--workspace", bench.root)[0] == 0
    monkeypatch.setattr(doctor, "doctor", lambda path: [doctor.Check(name="git", ok=False, found="no", advice="do")])
    assert run("doctor", "--workspace", bench.root)[:2] == (2, "wrong git          no\n                   -> do\n")


def test_demo_refuses_a_folder_of_somebody_else(refused, tmp_path):
    (tmp_path / "mine.txt").write_text("")
    assert "was not made by" in refused("demo", "--workspace", tmp_path)
