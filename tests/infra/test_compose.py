"""infra/compose.yaml: what it names is there, every service is looked after, and no password stands in it."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

from flows.stack.buckets import parse_buckets
from flows.stack.team import read_team

INFRA = Path(__file__).parents[2] / "infra"
ONE_SHOT = {"setup"}
EXAMPLE = dict(
    line.split("=", 1)
    for line in (INFRA / ".env.example").read_text().splitlines()
    if line and not line.startswith("#")
)


def compose() -> dict[str, Any]:
    found: dict[str, Any] = YAML(typ="safe", pure=True).load(INFRA / "compose.yaml")
    return found


SERVICES: dict[str, dict[str, Any]] = compose()["services"]


def secrets_of(service: dict[str, Any]) -> set[str]:
    return {each if isinstance(each, str) else each["source"] for each in service.get("secrets", ())}


def test_what_services_name_is_defined_and_what_is_defined_is_used() -> None:
    whole = compose()
    used: dict[str, set[str]] = {"secrets": set(), "volumes": set(), "networks": set()}
    for service in SERVICES.values():
        used["secrets"] |= secrets_of(service)
        used["networks"] |= set(service["networks"])
        for volume in service.get("volumes", ()):
            source = volume.split(":")[0]
            if source.startswith("."):
                assert (INFRA / source).is_file(), source
            else:
                used["volumes"].add(source)
        assert set(service.get("depends_on", {})) <= set(SERVICES)
    assert used == {kind: set(whole[kind]) for kind in used}


@pytest.mark.parametrize("name", SERVICES)
def test_each_service_is_looked_after(name) -> None:
    service = SERVICES[name]
    limits = service["deploy"]["resources"]["limits"]
    assert {"cpus", "memory"} <= set(limits)
    assert name in ONE_SHOT or service["healthcheck"]["test"][0] == "CMD"
    assert service["restart"] == ("no" if name in ONE_SHOT else "unless-stopped")
    assert service["cap_drop"] == ["ALL"]
    tag = re.sub(r"\$\{[^}]*\}", "x", service["image"]).rpartition(":")[2]
    assert tag not in ("", "latest")
    assert re.search(r"[\dx]", tag)


@pytest.mark.parametrize("name", SERVICES)
def test_secrets_come_from_files_that_the_service_has(name) -> None:
    """Passwords, keys and auth strings are `_FILE`s of a secret, and no URI holds one."""
    service = SERVICES[name]
    had = secrets_of(service)
    for variable, value in service.get("environment", {}).items():
        if re.search(r"PASSWORD|SECRET|AUTH_STRING|TOKEN", variable):
            assert variable.endswith("_FILE"), variable
        if str(value).startswith("/run/secrets/"):
            assert value.removeprefix("/run/secrets/") in had, variable
        assert not re.search(r"://[^/\s]*:[^/\s]*@", str(value)), variable
    wanted = set(re.findall(r"/run/secrets/([\w.]+)", str(service)))
    assert wanted <= had


def test_the_databases_script_finds_the_passwords_that_postgres_is_given() -> None:
    script = (INFRA / "compose" / "databases.sh").read_text()
    names = set(re.findall(r"for name in ([\w ]+);", script)[0].split()) | {"ledger_reader"}
    assert {f"{name}_db_password" for name in names} <= secrets_of(SERVICES["postgres"])


def test_a_worker_has_the_keys_of_a_worker_and_of_nobody_else() -> None:
    for name in ("worker-cpu", "worker-gpu", "worker-no-gpu"):
        assert not [secret for secret in secrets_of(SERVICES[name]) if re.search("admin|root|promoter|server", secret)]


def test_stores_are_reached_from_inside_only() -> None:
    networks = compose()["networks"]
    assert networks["stores"]["internal"]
    assert networks["servers"]["internal"]
    assert [name for name, service in SERVICES.items() if "ports" in service] == ["proxy"]


def filled(value: str) -> str:
    """A value of the file with the variables of .env.example."""
    return re.sub(r"\$\{(\w+)[^}]*\}", lambda found: EXAMPLE[found[1]], value)


def test_every_variable_of_the_file_is_in_the_example_and_the_other_way_round() -> None:
    used = set(re.findall(r"\$\{(\w+)", (INFRA / "compose.yaml").read_text()))
    assert used == set(EXAMPLE) - {"COMPOSE_PROFILES"}
    assert {EXAMPLE["COMPOSE_PROFILES"]} <= {each for one in SERVICES.values() for each in one.get("profiles", ())}


def test_what_setup_is_told_can_be_set_up() -> None:
    given = {name.removesuffix("_FILE"): filled(str(value)) for name, value in SERVICES["setup"]["environment"].items()}
    found = read_team(given)
    assert found.mlflow is not None
    assert set(found.passwords) == {"reader", "worker", "promoter"}
    buckets = {bucket.name: bucket.accounts for bucket in parse_buckets(given["COPAL_BUCKETS"])}
    server, worker = (SERVICES[name]["environment"]["AWS_ACCESS_KEY_ID"] for name in ("mlflow", "worker-cpu"))
    assert buckets["mlflow"] == {server: "rw"}, "nobody but MLflow's server touches what it stores"
    assert buckets["dvc"][worker] == "r"
    assert found.workspace == EXAMPLE["COPAL_WORKSPACE"]


@pytest.mark.parametrize("tool", [("podman-compose",), ("docker", "compose")], ids=" ".join)
def test_a_tool_that_would_run_it_reads_it(tool, tmp_path) -> None:
    """In a copy, for secrets and .env are not in the repository."""
    if shutil.which(tool[0]) is None or subprocess.run([*tool, "version"], capture_output=True, check=False).returncode:
        pytest.skip(f"{' '.join(tool)} is not installed")
    shutil.copytree(INFRA, tmp_path / "infra")
    shutil.copy(INFRA / ".env.example", tmp_path / "infra" / ".env")
    subprocess.run(["sh", str(tmp_path / "infra" / "compose" / "secrets.sh")], check=True)
    command = [*tool, "--file", str(tmp_path / "infra" / "compose.yaml"), "config"]
    done = subprocess.run(command, cwd=tmp_path / "infra", capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
