"""infra/kubernetes: overlays build, what manifests name is there, and the job of a run is one that Kubernetes and
Prefect's worker take."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from prefect.utilities.templating import apply_values, find_placeholders
from ruamel.yaml import YAML

from flows.runs.sizing import PodSize, job_variables
from flows.stack.team import pool_template, read_team

BASE = Path(__file__).parents[2] / "infra" / "kubernetes" / "base"
OVERLAYS = BASE.parent / "overlays"
POOLS = [(overlay, pool) for overlay in ("cpu", "gpu") for pool in ("copal-cpu", "copal-gpu")]
GIB = 1 << 30
# What prefect-kubernetes 0.7 and 0.8 hold a job against before they make it.
WORKERS_OWN = {
    "apiVersion": "batch/v1",
    "kind": "Job",
    "metadata": {"annotations": {}, "labels": {}},
    "spec": {
        "template": {
            "spec": {
                "parallelism": 1,
                "completions": 1,
                "restartPolicy": "Never",
                "containers": [{"name": "prefect-job"}],
            }
        }
    },
}


def documents(text: str | Path) -> list[dict[str, Any]]:
    return [document for document in YAML(typ="safe", pure=True).load_all(text) if document]


@cache
def built(overlay: str) -> list[dict[str, Any]]:
    if shutil.which("kubectl") is None:
        pytest.skip("kubectl, which builds overlays, is not installed")
    command = ["kubectl", "kustomize", str(OVERLAYS / overlay)]
    return documents(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def named(parts: list[dict[str, Any]], kind: str) -> dict[str, dict[str, Any]]:
    return {part["metadata"]["name"]: part for part in parts if part["kind"] == kind}


def inside(value: Any) -> list[Any]:
    """The value and all that it holds."""
    held = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return [value, *(each for part in held for each in inside(part))]


def template_of(overlay: str, pool: str) -> dict[str, Any]:
    """The base job template that setup gives a pool."""
    base = json.loads((BASE / "job-template.json").read_text())
    return pool_template(base, json.loads((OVERLAYS / overlay / "pools.json").read_text())[pool])


def job(template: dict[str, Any], **variables: Any) -> dict[str, Any]:
    """The job that a worker makes of a template, but for what it adds itself: a name, labels, environment."""
    properties = template["variables"]["properties"]
    assert set(variables) <= set(properties)
    values = {name: found["default"] for name, found in properties.items() if "default" in found}
    values |= {"name": "adapt-legal", "command": "prefect flow-run execute"} | variables
    made = apply_values(template["job_configuration"], values)
    manifest: dict[str, Any] = made["job_manifest"]
    (container,) = manifest["spec"]["template"]["spec"]["containers"]
    container["args"] = container["args"].split()
    container["env"] = [{"name": "PREFECT_API_URL", "value": "http://prefect:4200/api"}, *container["env"]]
    return manifest


def validate(manifest: dict[str, Any]) -> None:
    """By Kubernetes' own schemas; unknown fields are errors."""
    kubernetes_validate = pytest.importorskip(
        "kubernetes_validate",
        reason="manifests are validated with kubernetes-validate: pip install kubernetes-validate",
    )
    kubernetes_validate.validate(manifest, "1.34", strict=True)


# --- manifests


@pytest.mark.parametrize("overlay", ["cpu", "gpu"])
def test_what_manifests_name_is_there(overlay) -> None:
    parts = built(overlay)
    secrets = named(documents(BASE / "secrets.example.yaml"), "Secret")
    keys = {name: set(secret["stringData"]) for name, secret in secrets.items()}
    maps = {name: set(part["data"]) for name, part in named(parts, "ConfigMap").items()}
    accounts = set(named(parts, "ServiceAccount"))
    claims = set(named(parts, "PersistentVolumeClaim"))
    jobs = [job(template_of(*each)) for each in POOLS]
    for each in inside([*(part for part in parts if part["kind"] in ("Deployment", "Job")), *jobs]):
        if not isinstance(each, dict):
            continue
        if (found := each.get("secretKeyRef")) and not found.get("optional"):
            assert found["key"] in keys[found["name"]]
        if (found := each.get("secret")) and not found.get("optional"):
            assert found["secretName"] in keys
        if found := each.get("configMapKeyRef"):
            assert found["key"] in maps[found["name"]]
        if found := each.get("configMapRef") or each.get("configMap"):
            assert found["name"] in maps
        assert each.get("serviceAccountName", "copal-run") in accounts
        if found := each.get("persistentVolumeClaim"):
            assert found["claimName"] in claims


@pytest.mark.parametrize("overlay", ["cpu", "gpu"])
def test_no_secret_is_applied_or_written_down(overlay) -> None:
    parts = built(overlay)
    assert named(parts, "Secret") == {}
    for each in inside(parts):
        if isinstance(each, dict) and re.search(r"PASSWORD|ACCESS_KEY|FLASK.*KEY|AUTH_STRING$", str(each.get("name"))):
            assert "secretKeyRef" in each["valueFrom"], each["name"]
        if isinstance(each, str):
            assert not re.search(r"://[^/\s:]*:[^/\s@]+@", each), each


@pytest.mark.parametrize("overlay", ["cpu", "gpu"])
def test_every_pod_is_closed_limited_and_probed(overlay) -> None:
    parts = built(overlay)
    pods = [part["spec"]["template"]["spec"] for part in parts if part["kind"] in ("Deployment", "Job")]
    for pod in [*pods, *(job(template_of(*each))["spec"]["template"]["spec"] for each in POOLS)]:
        assert pod["securityContext"]["runAsNonRoot"]
        assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        (container,) = pod["containers"]
        assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}
        assert container["securityContext"]["readOnlyRootFilesystem"]
        assert "memory" in container["resources"]["limits"]
        assert not container["image"].endswith(":latest")
        assert {mount["name"] for mount in container["volumeMounts"]} <= {volume["name"] for volume in pod["volumes"]}
        assert pod["serviceAccountName"] == "copal-worker" or pod["automountServiceAccountToken"] is False
    for name, part in named(parts, "Deployment").items():
        (container,) = part["spec"]["template"]["spec"]["containers"]
        assert {"startupProbe", "readinessProbe", "livenessProbe"} <= set(container), name


def test_traffic_is_closed_and_opened_for_pods_that_there_are() -> None:
    parts = built("gpu")
    policies = named(parts, "NetworkPolicy")
    assert policies["nobody"]["spec"] == {"podSelector": {}, "policyTypes": ["Ingress", "Egress"]}
    pods = [part["spec"]["template"] for part in parts if part["kind"] in ("Deployment", "Job")]
    pods += [job(template_of(*each))["spec"]["template"] for each in POOLS]
    component = "app.kubernetes.io/component"
    there = {pod["metadata"]["labels"][component] for pod in pods}
    spoken_of: set[str] = set()
    for each in inside(list(policies.values())):
        if isinstance(each, dict) and component in each.get("matchLabels", {}):
            spoken_of.add(each["matchLabels"][component])
        if isinstance(each, dict) and each.get("key") == component:
            spoken_of |= {*each["values"]}
    assert spoken_of == there


def test_a_worker_may_make_jobs_and_read_no_secret() -> None:
    (role,) = named(built("gpu"), "Role").values()
    may = {(resource, verb) for rule in role["rules"] for resource in rule["resources"] for verb in rule["verbs"]}
    assert ("jobs", "create") in may
    assert not [resource for resource, _ in may if resource in ("secrets", "*")]


def test_a_worker_writes_no_auth_string_into_a_job() -> None:
    """It replaces it by a reference where it knows of a secret."""
    for part in named(built("gpu"), "Deployment").values():
        (container,) = part["spec"]["template"]["spec"]["containers"]
        if container["name"] != "worker":
            continue
        env = {each["name"]: each for each in container["env"]}
        own = env["PREFECT_API_AUTH_STRING"]["valueFrom"]["secretKeyRef"]
        told = "PREFECT_INTEGRATIONS_KUBERNETES_WORKER_API_AUTH_STRING_SECRET"
        assert own == {"name": env[f"{told}_NAME"]["value"], "key": env[f"{told}_KEY"]["value"]}


@pytest.mark.parametrize("overlay", ["cpu", "gpu"])
def test_what_setup_is_told_can_be_set_up(overlay, monkeypatch) -> None:
    parts = built(overlay)
    maps = named(parts, "ConfigMap")
    (container,) = named(parts, "Job")["copal-setup"]["spec"]["template"]["spec"]["containers"]
    given: dict[str, str] = {}
    for source in container["envFrom"]:
        given |= maps[source["configMapRef"]["name"]]["data"]
    given |= {each["name"]: each.get("value", "copal:x") for each in container["env"]}
    given["COPAL_JOB_TEMPLATE"] = str(BASE / "job-template.json")
    given["COPAL_JOB_DEFAULTS"] = str(OVERLAYS / overlay / "pools.json")
    found = read_team(given)
    assert found.pool == "kubernetes"
    assert found.templates == {pool: template_of(overlay, pool) for pool in ("copal-cpu", "copal-gpu")}
    assert found.mlflow is not None
    assert found.mlflow.user == "admin"


@pytest.mark.parametrize("overlay", ["cpu", "gpu"])
def test_kubernetes_takes_the_manifests(overlay) -> None:
    for part in built(overlay):
        validate(part)


# --- the jobs of runs


@pytest.mark.parametrize("nodes", [1, 4])
@pytest.mark.parametrize(("overlay", "pool"), POOLS)
def test_kubernetes_takes_the_job_of_a_run(overlay, pool, nodes) -> None:
    manifest = job(template_of(overlay, pool), nodes=nodes)
    validate(manifest | {"metadata": {"generateName": "adapt-legal-", "namespace": "copal"}})


@pytest.mark.parametrize("nodes", [1, 4])
@pytest.mark.parametrize(("overlay", "pool"), POOLS)
def test_prefects_worker_takes_the_job_of_a_run(overlay, pool, nodes) -> None:
    """It refuses a job that lacks something of its own, or says otherwise; what the job says more is fine."""
    from jsonpatch import JsonPatch

    manifest = job(template_of(overlay, pool), nodes=nodes)
    manifest["metadata"].setdefault("annotations", {})
    wanted = [change for change in JsonPatch.from_diff(manifest, WORKERS_OWN) if change["op"] in ("add", "replace")]
    assert wanted == []
    pod = manifest["spec"]["template"]["spec"]
    assert "parallelism" not in pod, "Kubernetes knows it in a job's spec only"
    assert "completions" not in pod


def test_prefects_own_worker_makes_a_configuration_of_the_template() -> None:
    worker = pytest.importorskip(
        "prefect_kubernetes.worker", reason="prefect-kubernetes is not installed: pip install prefect-kubernetes"
    )
    from prefect.utilities.asyncutils import run_coro_as_sync

    made = run_coro_as_sync(
        worker.KubernetesWorkerJobConfiguration.from_template_and_values(
            template_of("gpu", "copal-gpu"), {"gpus": 2, "nodes": 3}
        )
    )
    assert made.job_manifest["spec"]["completions"] == 3
    (container,) = made.job_manifest["spec"]["template"]["spec"]["containers"]
    assert container["resources"]["limits"]["nvidia.com/gpu"] == 2


def test_every_placeholder_is_a_variable_and_every_variable_is_used() -> None:
    template = json.loads((BASE / "job-template.json").read_text())
    used = {found.name for found in find_placeholders(template["job_configuration"])}
    assert used == set(template["variables"]["properties"])
    assert not find_placeholders(job(template))


def test_a_run_gets_the_size_of_its_step() -> None:
    variables = job_variables(PodSize(memory=70 * GIB + 1, disk=300 * GIB, gpus=4))
    pod = job(template_of("gpu", "copal-gpu"), **variables)["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    assert container["resources"]["limits"] == {"memory": "71Gi", "ephemeral-storage": "300Gi", "nvidia.com/gpu": 4}
    assert container["resources"]["requests"] == {"cpu": "8", "memory": "71Gi", "ephemeral-storage": "300Gi"}
    scratch = {volume["name"]: volume for volume in pod["volumes"]}["scratch"]
    assert scratch == {"name": "scratch", "emptyDir": {"sizeLimit": "300Gi"}}, (
        "local disk, no bigger than was asked for"
    )
    assert pod["nodeSelector"] == {"nvidia.com/gpu.present": "true"}


def test_the_pods_of_a_step_on_several_nodes_are_one_gang(tmp_path) -> None:
    """Index 0 runs the flow and the others a node each; they find the first, may speak, and live and die together."""
    parts = built("gpu")
    manifest = job(template_of("gpu", "copal-gpu"), nodes=3)
    spec, template = manifest["spec"], manifest["spec"]["template"]
    assert (spec["completionMode"], spec["completions"], spec["parallelism"]) == ("Indexed", 3, 3)
    assert spec["backoffLimit"] == 0, "a pod that fails ends the job"
    assert spec["successPolicy"] == {"rules": [{"succeededIndexes": "0"}]}
    service = named(parts, "Service")[template["spec"]["subdomain"]]["spec"]
    assert (service["clusterIP"], service["publishNotReadyAddresses"]) == ("None", True)
    assert service["selector"].items() <= template["metadata"]["labels"].items()
    among = named(parts, "NetworkPolicy")["nodes"]["spec"]
    assert "ports" not in among["ingress"][0]
    assert "ports" not in among["egress"][0]
    (container,) = template["spec"]["containers"]
    (tmp_path / "copal").write_text('#!/bin/sh\necho copal "$@" at $COPAL_NODES_ADDRESS\n')
    (tmp_path / "copal").chmod(0o755)
    assert container["command"][0] == "with-secrets"
    ran = []
    for index in range(2):
        environment = {
            "PATH": f"{tmp_path}:/usr/bin:/bin",
            "HOSTNAME": f"adapt-legal-x7-{index}",
            "JOB_COMPLETION_INDEX": str(index),
        }
        command = [*container["command"][1:], "env"]
        ran.append(subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout)
    address = "adapt-legal-x7-0.copal-nodes:29400"
    assert f"COPAL_NODES_ADDRESS={address}\n" in ran[0]
    assert ran[1] == f"copal node 1 --wait 1800 at {address}\n"
    maps = {source["configMapRef"]["name"] for source in container["envFrom"]}
    assert any("COPAL_WORKSPACE" in named(parts, "ConfigMap")[name]["data"] for name in maps), (
        "a node has no parameters"
    )


def test_secrets_of_a_run_are_references() -> None:
    text = (BASE / "job-template.json").read_text()
    for each in inside(json.loads(text)):
        if isinstance(each, dict) and re.search("PASSWORD|KEY", str(each.get("name"))):
            assert "secretKeyRef" in each["valueFrom"]
    assert "AUTH_STRING" not in text, "the worker adds it, as a reference; twice it would be refused"
