"""What `copal up` asks of a Prefect server."""

from __future__ import annotations

import json
import time
import urllib.request
from datetime import UTC, datetime
from typing import Any

from copal.errors import CopalError

__all__ = [
    "GPU_POOL",
    "POOLS",
    "UpError",
    "answers",
    "create_pools",
    "has_worker",
    "settle_old_runs",
]


GPU_POOL = "copal-gpu"


POOLS = ("copal-cpu", GPU_POOL)


_TRIES = 10  # a second apart


class UpError(CopalError):
    """The servers and workers of a workspace cannot start, or one of them ended."""


def create_pools(api: str) -> None:
    there = {pool["name"] for pool in _call(api, "POST", "/work_pools/filter", {})}
    for name in POOLS:
        if name not in there:  # the worker fills in what jobs of its type can be told
            _call(api, "POST", "/work_pools/", {"name": name, "type": "process"})


def settle_old_runs(api: str) -> None:
    """Runs whose processes ended with an earlier server are said to have; checks that it slept through are dropped."""
    now = datetime.now(UTC).isoformat()
    ours = {"work_pools": {"name": {"any_": list(POOLS)}}}
    lost = {"flow_runs": {"state": {"type": {"any_": ["RUNNING", "PENDING", "CANCELLING"]}}}}
    for run in _call(api, "POST", "/flow_runs/filter", ours | lost):
        state = {"type": "CRASHED", "message": "The machine or `copal up` ended while this ran."}
        _call(api, "POST", f"/flow_runs/{run['id']}/set_state", {"state": state, "force": True})
    late = {"flow_runs": {"state": {"type": {"any_": ["SCHEDULED"]}}, "expected_start_time": {"before_": now}}}
    for run in _call(api, "POST", "/flow_runs/filter", ours | late):
        if run["auto_scheduled"]:
            _call(api, "DELETE", f"/flow_runs/{run['id']}")


def has_worker(api: str, pool: str) -> bool:
    return bool(_call(api, "POST", f"/work_pools/{pool}/workers/filter", {}))


def answers(url: str) -> bool:
    try:
        with _opener().open(url, timeout=5) as answer:
            return bool(answer.status == 200)
    except OSError:  # URLError is one
        return False


def _call(api: str, method: str, path: str, body: Any = None) -> Any:
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(f"{api}{path}", data, {"Content-Type": "application/json"}, method=method)
    for rest in reversed(range(_TRIES)):
        try:
            with _opener().open(request, timeout=60) as answer:
                content = answer.read()
            break
        except OSError as error:
            busy = isinstance(error, urllib.error.HTTPError) and error.code == 503  # somebody else writes its database
            if not busy or not rest:
                raise UpError(f"the Prefect server at {api} refuses {method} {path}: {error}") from error
            time.sleep(1.0)
    return json.loads(content) if content else None


def _opener() -> urllib.request.OpenerDirector:
    return urllib.request.build_opener(urllib.request.ProxyHandler({}))  # loopback: no proxy
