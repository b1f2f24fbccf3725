"""The image of workers is built, on a root of Debian's packages in place of a registry's image, and takes a step."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[3]
PACKAGES = "python3,python3-venv,ca-certificates"  # what infra/Dockerfile expects of its PYTHON_IMAGE
TOLD = ("/etc/ssl/certs/ca-certificates.crt", "/etc/pip.conf")  # what this machine tells pip, it tells pip in there

pytestmark = [pytest.mark.soak, pytest.mark.timeout(7200)]


@pytest.fixture(scope="module")
def buildah(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., str]]:
    """buildah(*arguments) -> what it prints; its images are in a folder of the tests."""
    for tool in ("buildah", "debootstrap"):
        if shutil.which(tool) is None:
            pytest.skip(f"{tool} is not installed; on Debian and Ubuntu: apt-get install {tool}")
    if os.geteuid() != 0:
        pytest.skip("debootstrap and chroot want root: these tests do not run as root")
    folder = tmp_path_factory.mktemp("images")
    store = ("--root", str(folder / "storage"), "--runroot", str(folder / "run"))

    def run(*arguments: str) -> str:
        done = subprocess.run(["buildah", *store, *arguments], cwd=ROOT, capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{done.stdout[-3000:]}{done.stderr[-3000:]}"
        return done.stdout.strip()

    yield run
    # Gigabytes. `buildah rmi --all` was seen to spin; its driver overlay mounts a folder of its own.
    subprocess.run(["umount", str(folder / "storage" / "overlay")], capture_output=True, check=False)
    shutil.rmtree(folder)


@pytest.fixture(scope="module")
def image(buildah: Callable[..., str], tmp_path_factory: pytest.TempPathFactory) -> str:
    """infra/Dockerfile's target `cpu`; torch is the build that runs here, fetched as pip on this machine fetches it."""
    folder = tmp_path_factory.mktemp("root")
    system, wheels = folder / "system", folder / "wheels"
    subprocess.run(["debootstrap", "--variant=minbase", f"--include={PACKAGES}", "bookworm", str(system)], check=True)
    made = buildah("from", "scratch")
    buildah("add", "--quiet", made, str(system), "/")
    buildah("commit", "--quiet", made, "localhost/python")
    shutil.rmtree(system)
    fetch = [sys.executable, "-m", "pip", "download", "--no-deps", "--dest", str(wheels), f"torch=={torch.__version__}"]
    subprocess.run(fetch, check=True)
    (wheel,) = wheels.iterdir()
    arguments = {
        "PYTHON_IMAGE": "localhost/python",
        "TORCH": f"/wheels/{wheel.name}",
        "TORCH_CPU_INDEX": "https://pypi.org/simple",
    }
    volumes = [f"{wheels}:/wheels:ro", *(f"{path}:{path}:ro" for path in TOLD if Path(path).exists())]
    buildah(
        *("bud", "--isolation", "chroot", "--network", "host", "--file", "infra/Dockerfile", "--target", "cpu"),
        *(word for name, value in arguments.items() for word in ("--build-arg", f"{name}={value}")),
        *(word for volume in volumes for word in ("--volume", volume)),
        *("--tag", "localhost/copal", "."),
    )
    return "localhost/copal"


def test_a_step_runs_in_the_image_as_a_user_who_may_write_nowhere_else(
    image: str, buildah: Callable[..., str], bench, tmp_path
):
    bench.commit("code", 0)
    for path in (bench.root, *bench.root.rglob("*")):
        os.chown(path, 1000, 1000, follow_symlinks=False)
    container = buildah("from", image)
    here = ("--volume", f"{bench.root}:/srv/copal/team")

    def inside(*words: str) -> str:
        started = ("run", "--isolation", "chroot", "--network", "host", "--user", "1000:1000", *here, container, "--")
        return buildah(*started, "with-secrets", *words)

    assert inside("sh", "-c", "id --user && pwd").split() == ["1000", "/srv/copal"]
    assert (
        inside("sh", "-c", "touch /opt/copal/x /usr/x /etc/x 2> /dev/null; ls /opt/copal/x /usr/x /etc/x || true") == ""
    )
    assert inside("git", "--version").startswith("git version")
    assert "version 2 of tiny" in inside("copal", "adapt", "code", "--workspace", "/srv/copal/team")
    versions = bench.registry.versions()
    assert [version.tags.get("copal.domain") for version in versions] == [None, "code"]
    assert bench.registry.record(versions[-1]).files
    assert "nothing differs" in inside("copal", "verify", "2", "--workspace", "/srv/copal/team")
    assert inside("python", "-c", "import boto3, asyncpg, psycopg2, prefect_kubernetes, flask_wtf") == ""
