"""The command line as a whole: help, usage errors, exit codes, what all commands take."""

from __future__ import annotations

import errno
import logging
import os
import re
import resource
import shutil
import subprocess
import sys
import tempfile

import pytest

from copal.errors import DataError

GROUPS = {
    "Getting started": ["init", "add", "base", "sizes", "doctor", "demo", "completion"],
    "Adapting to domains": ["watch", "adapt", "status", "plan", "withdraw", "gc"],
    "Which version serves": ["gates", "promote", "rollback", "export"],
    "What made a version": ["lineage", "plot", "verify", "replay", "audit"],
    "Running it for a team": ["up", "down", "node", "notify", "metrics", "hook"],
    "Options of every command": ["--verbose", "--quiet", "--debug", "--help", "--version"],
}


COMMANDS = [*(name for names in list(GROUPS.values())[:-1] for name in names), "audit data"]


@pytest.fixture
def raising(monkeypatch):
    """raising(error): from then on every command raises it when it opens its workspace."""

    def arrange(error: BaseException) -> None:
        def open_workspace(path):
            logging.getLogger("flows.somewhere").info("what goes on inside")
            raise error

        monkeypatch.setattr("flows.project.open_workspace", open_workspace)

    return arrange


# --- help


def test_help_shows_commands_in_their_groups(run, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    code, out, err = run("--help")
    assert (code, err) == (0, "")
    shown: dict[str, list[str]] = {}
    for line in out.partition("\n\n")[2].splitlines():
        if line.strip() in GROUPS:
            names = shown.setdefault(line.strip(), [])
        elif found := re.match(r"    (\S+)(?: -h)?  +\S", line):
            names.append(found[1])
    assert shown == GROUPS
    assert run() == (0, out, ""), "no arguments"


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_a_command_says_what_it_does_and_takes(command, run):
    code, out, err = run(*command.split(), "--help")
    assert (code, err) == (0, "")
    assert out.startswith(f"Usage: copal {command} ")
    assert "--quiet" in out
    assert (" --workspace " in out) == (command not in {"init", "base", "sizes", "completion", "audit"})


def test_help_is_quick_and_loads_nothing_heavy():
    program = (
        "import sys\n"
        "from flows.cli import main\n"
        "code = main(['--help'])\n"
        "heavy = {'torch', 'mlflow', 'dvc', 'prefect', 'transformers', 'accelerate', 'datasets', 'yaml', 'pydantic'}\n"
        "print(code, sorted(heavy & set(sys.modules)), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stderr.strip() == "0 []"

    def cheapest(*command: str) -> float:
        """Seconds of processor time, which a busy machine hardly adds to."""
        seconds = []
        for _ in range(5):
            began = resource.getrusage(resource.RUSAGE_CHILDREN)
            subprocess.run([sys.executable, *command], capture_output=True, check=True)
            ended = resource.getrusage(resource.RUSAGE_CHILDREN)
            seconds.append(ended.ru_utime + ended.ru_stime - began.ru_utime - began.ru_stime)
        return min(seconds)

    # 5 on an idle machine; 20 is half a second where Python starts in 0.025 s.
    assert cheapest("-m", "flows.cli", "--help") / cheapest("-c", "pass") < 20


def test_a_process_of_its_own_looks_for_garbage_seldom(bench):
    # Else that is a third of a small step's time: libraries are many objects, and stay.
    program = (
        "import gc, sys\n"
        "from flows.cli import command\n"
        f"sys.argv[1:] = ['status', '--workspace', {str(bench.root)!r}]\n"
        "code = command()\n"
        "print(code, gc.isenabled(), gc.get_stats()[2]['collections'], gc.get_freeze_count() > 10_000)"
    )
    done = subprocess.run([sys.executable, "-P", "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "0 True 0 True"


def test_version(run):
    assert run("--version") == (0, "copal 0.1.0\n", "")


def test_a_completion_script_completes(run):
    code, script, err = run("completion", "bash")
    assert (code, err) == (0, "")
    ask = 'eval "$1"; shift; COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); _copal; echo "${COMPREPLY[*]}"'

    def complete(*words: str) -> str:
        done = subprocess.run(["bash", "-c", ask, "-", script, *words], capture_output=True, text=True, check=True)
        return done.stdout.strip()

    assert shutil.which("bash")
    assert complete("copal", "st") == "status"
    assert complete("copal", "status", "--w") == "--workspace"
    assert complete("copal", "audit", "") == "used data diff worse whose"
    assert complete("copal", "hook", "un") == "uninstall"
    for shell in ("zsh", "fish"):
        assert "rollback" in run("completion", shell)[1]


# --- what is refused


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("stauts", 'unknown command "stauts". Did you mean "status"? See `copal --help`.'),
        ("prune", 'unknown command "prune". See `copal --help`.'),
        ("audit usd", 'unknown command "usd". Did you mean "used"? See `copal audit --help`.'),
        ("status --jsno", "unknown option: --jsno. Did you mean --json? See `copal status --help`."),
        ("status --quite", "unknown option: --quite. Did you mean --quiet? See `copal status --help`."),
        ("plan legal", "unexpected: legal. See `copal plan --help`."),
        ("init", 'command "init" parameter FOLDER requires an argument. See `copal init --help`.'),
        ("withdraw legal", 'command "withdraw" parameter --why requires an argument. See `copal withdraw --help`.'),
        ("watch --interval 0", 'invalid value "0.0" for --interval. Must be > 0. See `copal watch --help`.'),
        ("watch --interval=nan", 'invalid value "nan" for --interval. Must be < inf. See `copal watch --help`.'),
        (
            "watch --interval soon",
            'invalid value for --interval: unable to convert "soon" into float. See `copal watch --help`.',
        ),
        ("up --port 65536", 'invalid value "65536" for --port. Must be <= 65535. See `copal up --help`.'),
        (
            "hook instal",
            'invalid value "instal" for ACTION. Choose from: "install", "uninstall". Did you mean "install"? '
            "See `copal hook --help`.",
        ),
        (
            "lineage --json --html x",
            "invalid values for group Form. Mutually exclusive arguments: {--json, --html}. "
            "See `copal lineage --help`.",
        ),
        (
            "status --verbose --quiet",
            "invalid values for group Verbosity. Mutually exclusive arguments: {--verbose, --quiet}. "
            "See `copal --help`.",
        ),
    ],
)
def test_a_usage_error_is_one_line_that_says_what_was_meant_and_where_more_is_said(words, said, run):
    assert run(*words.split()) == (2, "", f"copal: {said}\n")


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


# --- what every command takes


def test_the_workspace_may_come_from_the_environment(bench, run, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COPAL_WORKSPACE", str(bench.root))
    assert run("down") == (0, f"nothing runs in {bench.root}\n", "")
    assert run("down", "--workspace", tmp_path)[0] == 2, "the option wins"
    monkeypatch.setenv("COPAL_WORKSPACE", "")
    monkeypatch.chdir(bench.root)
    assert run("down")[0] == 0, "an empty one is none"


def test_quiet_prints_results_only(run, tiny_base, tmp_path, monkeypatch):
    monkeypatch.setattr("flows.terminal.progress._LONG", 0)
    code, out, err = run("init", tmp_path / "a", "--base", tiny_base)
    assert (code, out.count("\n"), err.count("next:")) == (0, 2, 0)
    assert err, "progress"
    code, quiet, err = run("init", tmp_path / "b" / "a", "--base", tiny_base, "--quiet")
    assert (code, err) == (0, "")
    assert quiet == out.partition("\n")[0].replace(str(tmp_path / "a"), str(tmp_path / "b" / "a")) + "\n"
    assert run("--quiet", "base", tiny_base, tmp_path / "c")[2] == ""
    assert run("base", tiny_base, tmp_path / "d")[2], "the next command is not quiet"


def test_verbose_shows_what_is_logged_inside(run, raising, monkeypatch):
    monkeypatch.delenv("PREFECT_LOGGING_LEVEL", raising=False)
    raising(DataError("data/x is bad"))
    code, out, err = run("status", "--verbose")
    assert (code, out) == (2, "")
    first, second = err.splitlines()
    assert first.endswith(" INFO flows.somewhere: what goes on inside")
    assert second == "copal: data/x is bad"
    assert os.environ["PREFECT_LOGGING_LEVEL"] == "INFO"
    assert run("status") == (2, "", "copal: data/x is bad\n")


def test_libraries_are_told_to_phone_nobody_and_what_the_user_set_wins(monkeypatch, run, tmp_path):
    monkeypatch.setenv("DO_NOT_TRACK", "mine")
    monkeypatch.delenv("MLFLOW_DISABLE_TELEMETRY")
    run("status", "--workspace", tmp_path)
    assert os.environ["DO_NOT_TRACK"] == "mine"
    assert os.environ["MLFLOW_DISABLE_TELEMETRY"] == "true"


# --- exit codes


def test_exit_codes_of_errors(run, raising, tmp_path):
    raising(DataError("a line\nand another"))
    assert run("status") == (2, "", "copal: a line and another\n")
    raising(OSError(28, "No space left on device", str(tmp_path)))
    assert run("status") == (2, "", f"copal: {tmp_path}: No space left on device\n")
    for number in (errno.EMFILE, errno.ENAMETOOLONG, errno.ENOTDIR, errno.EIO, errno.ENOENT):
        raising(OSError(number, os.strerror(number), str(tmp_path)))
        assert run("status") == (2, "", f"copal: {tmp_path}: {os.strerror(number)}\n")
    raising(KeyboardInterrupt())
    assert run("status") == (130, "", "copal: interrupted\n")


def test_ctrl_c_in_the_middle_of_a_library_is_no_bug_of_ours(run, raising):
    # Prefect's clean-up fails with an error of its own where Ctrl-C comes while it makes the run of a task.
    error = ValueError("Task run is not set")
    error.__context__ = KeyboardInterrupt()
    raising(error)
    assert run("status") == (130, "", "copal: interrupted\n")


def test_a_bug_is_one_line_and_its_traceback_is_in_the_workspace(bench, run, raising):
    raising(RuntimeError("a bug\nat https://me:secret@host/x"))
    code, out, err = run("status", "--json", "--workspace", bench.root)
    (log,) = (bench.root / ".copal" / "logs").iterdir()
    assert re.fullmatch(r"error-\d{8}T\d{6}-\d+\.log", log.name)
    assert (code, out) == (1, "")
    assert err == (
        "copal: unexpected RuntimeError: a bug at https://host/x "
        f"(a bug; its traceback is in {log}, --debug shows it)\n"
    )
    text = log.read_text()
    assert text.startswith(f"command: copal status --json --workspace {bench.root}\n")
    assert "Traceback (most recent call last):\n" in text
    assert "secret" not in text


@pytest.mark.parametrize("error", [FileNotFoundError(2, "No such file or directory"), AssertionError()])
def test_a_bug_outside_a_workspace_is_in_a_temporary_folder(error, run, raising, monkeypatch, tmp_path):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    raising(error)
    code, out, err = run("status", "--workspace", tmp_path)
    (log,) = tmp_path.glob("copal-*/error-*.log")
    assert (code, out) == (1, "")
    assert err.startswith(f"copal: unexpected {type(error).__name__}")
    assert err.endswith(f"its traceback is in {log}, --debug shows it)\n")
    assert type(error).__name__ in log.read_text().splitlines()[-1]


def test_with_debug_the_traceback_is_on_the_terminal(bench, run, raising):
    raising(RuntimeError("a bug"))
    code, out, err = run("status", "--debug", "--workspace", bench.root)
    assert (code, out) == (1, "")
    assert err.startswith("Traceback (most recent call last):\n")
    assert err.endswith("\nRuntimeError: a bug\n")
    assert not (bench.root / ".copal" / "logs").exists()


def test_whoever_has_read_enough_of_the_output_sees_no_error(bench):
    command = f'{sys.executable} -m flows.cli status --quiet --json --workspace "$1" | true; echo "${{PIPESTATUS[0]}}"'
    done = subprocess.run(["bash", "-c", command, "-", str(bench.root)], capture_output=True, text=True, check=True)
    assert done.stderr == ""
    assert done.stdout in {"0\n", "141\n"}  # it may have written before the reader was gone
