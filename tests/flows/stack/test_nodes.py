"""A step on two machines that share nothing but stores: what one process makes; a machine that dies; two networks."""

from __future__ import annotations

import contextlib
import math
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import load_file

from copal.errors import CopalError
from flows.data.git import git
from flows.isolated import isolated_environment, isolated_python
from flows.step.run import plain_tasks, run_step
from flows.workspace import open_workspace
from support.benches import PARAMS, Bench
from support.servers import MlflowServer, free_port

pytestmark = pytest.mark.team


@dataclass(frozen=True)
class Machine:
    """The other one: its own home and clone of the workspace."""

    home: Path
    address: str
    network: Sequence[str] = ()  # a command before its own
    variables: tuple[tuple[str, str], ...] = ()

    @contextlib.contextmanager
    def node(self) -> Iterator[subprocess.Popen[str]]:
        """`copal node 1`."""
        environment = isolated_environment() | {"HOME": str(self.home), "COPAL_NODES_ADDRESS": self.address}
        command = [*self.network, *isolated_python("flows.cli", "node", "1")]
        with subprocess.Popen(
            command,
            cwd=self.home / "team",
            env=environment | dict(self.variables),
            stderr=subprocess.PIPE,
            text=True,
        ) as process:
            try:
                yield process
            finally:
                kill(process.pid)


def kill(pid: int) -> None:
    """kill -9, as a machine dies: with all that runs there."""
    with contextlib.suppress(psutil.NoSuchProcess):
        found = psutil.Process(pid)
        for each in [*found.children(recursive=True), found]:
            with contextlib.suppress(psutil.NoSuchProcess):
                each.kill()


def team(folder: Path, template: Path, base: Path, registry: str, artifacts: str) -> Bench:
    """A workspace with the base as version 1 in stores beside it, and two domains."""
    shutil.copytree(template, folder / "one" / "team")
    found = Bench(open_workspace(folder / "one" / "team"), base)
    stores = PARAMS.replace("pictures: false", f"pictures: false, uri: '{registry}', artifacts: {artifacts}")
    ledger = f"ledger: {{uri: 'sqlite:///{folder / 'ledger.db'}'}}\n"
    found.workspace.params.write_text(stores + ledger + "gates: {dense: null}\n")
    found.register_root()
    found.commit("code", 0)
    found.commit("legal", 1)
    return found


def another_machine(folder: Path, bench: Bench, address: str, **more: object) -> Machine:
    home = folder / "two"
    home.mkdir()
    git(home, "clone", "--quiet", str(bench.root), "team")
    shutil.copyfile(bench.workspace.params, home / "team" / "params.yaml")
    return Machine(home, address, **more)  # type: ignore[arg-type]


def alone(bench: Bench, copy: Path, *domains: str) -> Bench:
    """A lineage of the same stores in which one process takes the steps."""
    shutil.copytree(bench.root, copy)
    other = Bench(open_workspace(copy), bench.base)
    other.set("name: tiny", "name: alone")
    other.register_root()
    for domain in domains:
        run_step(other.project, domain, None, plain_tasks())
    return other


def agree(ours: Bench, theirs: Bench, number: int) -> None:
    """Version `number` is the same in both, but for rounding.

    What is stored of second moments has 16 bits, and weights of equal price change places: so of pruned weights the
    perplexity is compared, and to the last digits that of the dense base and the Fisher information.
    """
    found = [bench.registry for bench in (ours, theirs)]
    one, other = (registry.record(registry.version(number)) for registry in found)
    assert one.sparsity == other.sparsity
    assert [layer.name for layer in one.layers] == [layer.name for layer in other.layers]
    for domain in other.perplexity:
        assert math.log(one.dense_perplexity[domain]) == pytest.approx(
            math.log(other.dense_perplexity[domain]), rel=1e-5
        )
        assert math.log(one.perplexity[domain]) == pytest.approx(math.log(other.perplexity[domain]), rel=1e-3)
    fisher = [
        load_file(registry.folder(registry.version(number)) / "state" / "sum" / "fisher.safetensors")
        for registry in found
    ]
    torch.testing.assert_close(*fisher, rtol=1e-5, atol=1e-7)


@pytest.mark.slow
def test_two_machines_make_what_one_makes_and_go_on_when_one_died(
    tmp_path, template, tiny_base, mlflow_template, monkeypatch
):
    (tmp_path / "mlflow").mkdir()
    server = MlflowServer(tmp_path / "mlflow", mlflow_template, serves=True)
    server.start()
    try:
        bench = team(tmp_path, template, tiny_base, server.uri, "null")
        expected = alone(bench, tmp_path / "alone", "code", "legal")
        address = f"127.0.0.1:{free_port()}"
        two = another_machine(tmp_path, bench, address)
        monkeypatch.setenv("COPAL_NODES", "2")
        monkeypatch.setenv("COPAL_NODES_ADDRESS", address)
        with two.node() as node:
            assert run_step(bench.project, "code", None, plain_tasks()) is not None
            assert node.wait(timeout=60) == 0, node.stderr
        agree(bench, expected, 2)
        assert list((two.home / "team" / ".copal" / "cache").glob("tiny-1-*")), "it fetched the base for itself"

        finished: list[int] = []
        blocks = two.home / "team" / ".copal" / "nodes" / "1"

        def inode() -> int:
            (part,) = blocks.rglob("prune-00000.*.safetensors")
            return part.stat().st_ino

        with two.node() as node:

            def die(stage: str, done: int, total: int) -> None:
                if stage == "prune" and not finished:
                    finished.append(inode())
                    kill(node.pid)

            with pytest.raises(CopalError, match=r"^node 1 \(\S+\) is gone: ") as caught:
                run_step(bench.project, "legal", None, plain_tasks(die))
            assert "\n" not in str(caught.value)

        def see(stage: str, done: int, total: int) -> None:
            if stage == "prune" and len(finished) == 1:
                finished.append(inode())

        with two.node() as node:
            assert run_step(bench.project, "legal", None, plain_tasks(see)) is not None
            assert node.wait(timeout=60) == 0, node.stderr
        assert finished[0] == finished[1], "the block that was whole was not made again"
        agree(bench, expected, 3)
        assert not list(blocks.rglob("*.safetensors"))
    finally:
        server.kill()


@pytest.fixture
def two_networks() -> Iterator[tuple[str, list[str]]]:
    """This network's end of a cable to another one, and the command that runs something there."""
    if os.geteuid() != 0 or shutil.which("ip") is None or sys.platform != "linux":
        pytest.skip("two networks need root and `ip netns`")
    name = f"copal{os.getpid() % 100000}"
    cable, here = (f"{name}a", f"{name}b"), "10.213.77.1"
    try:
        for command in (
            f"ip netns add {name}",
            f"ip link add {cable[0]} type veth peer name {cable[1]} netns {name}",
            f"ip addr add {here}/30 dev {cable[0]}",
            f"ip link set {cable[0]} up",
            f"ip -n {name} addr add 10.213.77.2/30 dev {cable[1]}",
            f"ip -n {name} link set {cable[1]} up",
            f"ip -n {name} link set lo up",
        ):
            done = subprocess.run(command.split(), capture_output=True, text=True, check=False)
            if done.returncode != 0:
                pytest.skip(f"two networks cannot be made here: {command}: {done.stderr.strip()}")
        yield here, ["ip", "netns", "exec", name]
    finally:
        subprocess.run(["ip", "netns", "delete", name], capture_output=True, check=False)  # the cable goes with it


@pytest.mark.slow
def test_two_networks_make_what_one_process_makes(
    tmp_path, template, tiny_base, mlflow_template, two_networks, monkeypatch
):
    """Stores in files, which both reach; all else goes through the cable."""
    here, there = two_networks
    shutil.copyfile(mlflow_template, tmp_path / "mlflow.db")
    bench = team(tmp_path, template, tiny_base, f"sqlite:///{tmp_path}/mlflow.db", str(tmp_path / "artifacts"))
    expected = alone(bench, tmp_path / "alone", "code")
    address, cable = f"{here}:{free_port()}", there[-1]
    variables = (("GLOO_SOCKET_IFNAME", f"{cable}b"),)
    two = another_machine(tmp_path, bench, address, network=there, variables=variables)
    monkeypatch.setenv("COPAL_NODES", "2")
    monkeypatch.setenv("COPAL_NODES_ADDRESS", address)
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", f"{cable}a")
    with two.node() as node:
        assert run_step(bench.project, "code", None, plain_tasks()) is not None
        assert node.wait(timeout=60) == 0, node.stderr
    agree(bench, expected, 2)
