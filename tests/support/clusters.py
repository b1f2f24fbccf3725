"""A small Kubernetes: kmock keeps what its API is given, and a kubelet runs the container of each job as a process."""

from __future__ import annotations

import asyncio
import contextlib
import json
import shutil
import subprocess
import uuid
from collections.abc import AsyncIterator, Iterator, Mapping
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import attrs
import kmock
from anyio.from_thread import start_blocking_portal

ROOT = Path(__file__).parents[2]
WORK = "/srv/copal"  # where a container has its scratch


@dataclass(frozen=True)
class Cluster:
    """An API server with one node.

    Attributes:
        config: the file that a client finds it by.
        values: what config maps and secrets hold, by kind (`configMapRef`, `secretKeyRef`) and name.
        image: environment of a container before its manifest's.
        jobs: manifests, as they came.
        ended: exit status and words of each container; -1 and why of one that could not be run.
    """

    folder: Path
    values: Mapping[str, Mapping[str, Mapping[str, str]]]
    image: Mapping[str, str]
    jobs: list[dict[str, Any]] = field(default_factory=list)
    ended: list[tuple[int, str]] = field(default_factory=list)

    @property
    def config(self) -> Path:
        return self.folder / "kubeconfig"


@contextlib.contextmanager
def started_cluster(cluster: Cluster) -> Iterator[None]:
    """Let it run in a thread; what still runs in it at the end is killed."""
    with start_blocking_portal() as portal, portal.wrap_async_context_manager(_running(cluster)):
        yield


@contextlib.asynccontextmanager
async def _running(cluster: Cluster) -> AsyncIterator[None]:
    api = _Api(cluster=cluster)
    api.resources.load_bundled()
    async with api, kmock.Server(api) as server:
        place = {"cluster": {"server": str(server.url).rstrip("/")}, "name": "here"}
        context = {"context": {"cluster": "here", "user": "me", "namespace": "copal"}, "name": "here"}
        user = {"name": "me", "user": {}}
        config = {"clusters": [place], "contexts": [context], "users": [user], "current-context": "here"}
        cluster.config.write_text(json.dumps({"apiVersion": "v1", "kind": "Config", **config}))
        yield
        for task in api.containers:
            task.cancel()
        await asyncio.gather(*api.containers, return_exceptions=True)


async def _end_of(api: _Api, job: dict[str, Any]) -> None:
    """Run a job, and say so where that cannot be done: whoever waits for it would wait for ever."""
    try:
        await _run(api, job)
    except Exception as error:
        api.cluster.ended.append((-1, f"{type(error).__name__}: {error}"))
        raise


async def _run(api: _Api, job: dict[str, Any]) -> None:
    """What a node does for a job: a pod, its container, and its end."""
    metadata, pod = job["metadata"], job["spec"]["template"]["spec"]
    namespace, name = metadata["namespace"], metadata["name"]
    labels = {"job-name": name, **metadata.get("labels", {})}
    api.objects["v1/pods", namespace, name] = {
        "metadata": {"name": name, "namespace": namespace, "labels": labels},
        "spec": pod,
        "status": {"phase": "Running"},
    }
    scratch = api.cluster.folder / "scratch" / name
    (scratch / "home").mkdir(parents=True)
    (container,) = pod["containers"]
    variables = {**api.cluster.image, "HOME": str(scratch / "home"), **_environment(api.cluster, container)}
    command = ["sh", str(ROOT / "infra" / "compose" / "with-secrets.sh"), *container["args"]]  # the image's entry point
    process = await asyncio.create_subprocess_exec(
        *_in_namespace(scratch, command),
        env=variables,
        cwd=scratch,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    try:
        said, _ = await process.communicate()
    finally:
        if process.returncode is None:
            process.kill()
    status = process.returncode
    assert status is not None
    api.cluster.ended.append((status, said.decode(errors="replace")))
    api.objects["v1/pods", namespace, name].patch({"status": {"phase": "Succeeded" if status == 0 else "Failed"}})
    api.objects["batch/v1/jobs", namespace, name].patch({"status": {"succeeded" if status == 0 else "failed": 1}})


def _environment(cluster: Cluster, container: Mapping[str, Any]) -> dict[str, str]:
    """Of a container: config maps first, then variables and secrets by name."""
    found: dict[str, str] = {}
    for source in container.get("envFrom", []):
        found |= cluster.values["configMapRef"][source["configMapRef"]["name"]]
    for variable in container["env"]:
        if "value" in variable:
            found[variable["name"]] = variable["value"]
        else:
            wanted = variable["valueFrom"]["secretKeyRef"]
            found[variable["name"]] = cluster.values["secretKeyRef"][wanted["name"]][wanted["key"]]
    return found


def _in_namespace(scratch: Path, command: list[str]) -> list[str]:
    """The command with its scratch at the place where a container has it, in a namespace of mounts; where this system
    allows none, in the scratch's own folder.
    """
    inside = f"mount -t tmpfs tmpfs /srv && mkdir {WORK} && mount --bind {scratch} {WORK} && cd {WORK}"
    isolated = ["unshare", "--mount", "sh", "-c", f'{inside} && exec "$@"', "sh"]
    if Path("/srv") in ROOT.parents or shutil.which("unshare") is None:
        return command
    allowed = subprocess.run([*isolated, "true"], capture_output=True, check=False).returncode == 0
    return [*isolated, *command] if allowed else command


@attrs.define(kw_only=True)
class _Api(kmock.KubernetesEmulator):
    """The emulator with what it leaves out: names for `generateName`, and something that runs jobs."""

    cluster: Cluster
    containers: list[asyncio.Task[None]] = attrs.field(factory=list, init=False)

    async def _handle(self, request: Any) -> Any:
        made = request.action == kmock.action.CREATE and request.resource is not None
        if not made:
            return await super()._handle(request)
        metadata = request.data["metadata"]
        if request.resource.plural == "jobs":
            self.cluster.jobs.append(deepcopy(request.data))
        if "name" not in metadata:
            metadata["name"] = f"{metadata['generateName']}{uuid.uuid4().hex[:5]}"
        answer = await super()._handle(request)
        if request.resource.plural == "jobs":
            self.containers.append(asyncio.create_task(_end_of(self, request.data)))
        return answer
