"""flows.registry.flavor and what MLflow shows: a version is used with MLflow alone, by people who know no copal."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from mlflow import MlflowClient
from transformers import AutoModelForCausalLM, AutoTokenizer

from flows.gates.champion import make_champion
from flows.lineage.description import version_description
from flows.lineage.files import version_files
from flows.project import read_log
from flows.registry.flavor import write_flavor
from flows.registry.store import Store
from flows.verification.verify import verify
from support.toys import step

PROMPT = "abc abc "

LOADING = """
import json, socket, sys
def refused(*args):
    raise AssertionError("the network was asked")
socket.socket.connect = socket.getaddrinfo = refused
import mlflow, torch
found = {}
for name in ("models:/tiny@champion", "models:/tiny/1"):
    texts = mlflow.pyfunc.load_model(name).predict([sys.argv[1], "x"], params={"max_new_tokens": 6})
    pipeline = mlflow.transformers.load_model(name)
    written = pipeline(sys.argv[1], max_new_tokens=6, do_sample=False)[0]["generated_text"]
    found[name] = {"texts": texts, "pipeline": written, "dtype": str(pipeline.model.dtype)}
    torch.save(pipeline.model.state_dict(), f"{sys.argv[2]}/{len(found)}.pt")
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def bench(make_bench: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A base, and a version on it that is the champion."""
    made = make_bench(tmp_path_factory.mktemp("flavor") / "work space")
    made.set("pictures: false", "pictures: true")
    made.commit("code", 1)
    step(made)
    make_champion(made.project, 2, why="to be loaded", force=True)
    return made


@pytest.fixture
def environment(bench: Any) -> dict[str, str]:
    """Of somebody with MLflow who was told where the store is."""
    return {name: value for name, value in os.environ.items() if name != "HF_HUB_OFFLINE"} | {
        "MLFLOW_TRACKING_URI": bench.registry.tracking_uri,
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",  # as an activated environment has it
    }


def folder(bench: Any, number: int) -> Path:
    return Path(bench.registry.folder(bench.registry.version(number)))


def continued(model: Path, tokens: int = 6) -> str:
    """What the delivered folder writes after the prompt, by transformers alone."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    read = tokenizer(PROMPT, return_tensors="pt")
    written = AutoModelForCausalLM.from_pretrained(model).generate(**read, max_new_tokens=tokens, do_sample=False)
    return str(tokenizer.decode(written[0], skip_special_tokens=True))


def test_mlflow_loads_versions_as_functions_and_as_pipelines_without_a_network(
    bench: Any, environment: dict[str, str], tmp_path: Path
) -> None:
    done = subprocess.run(
        [sys.executable, "-c", LOADING, PROMPT, str(tmp_path)],
        env=environment,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    for place, (name, number) in enumerate((("models:/tiny@champion", 2), ("models:/tiny/1", 1)), start=1):
        model = folder(bench, number) / "model"
        expected = continued(model)
        assert found[name]["texts"][0] == found[name]["pipeline"] == expected != PROMPT
        assert found[name]["texts"][1].startswith("x")
        ours = AutoModelForCausalLM.from_pretrained(model)
        assert found[name]["dtype"] == str(ours.dtype)
        loaded = torch.load(tmp_path / f"{place}.pt", weights_only=True)
        assert loaded.keys() == ours.state_dict().keys()
        assert all(torch.equal(tensor, loaded[key]) for key, tensor in ours.state_dict().items())


@pytest.fixture
def served(environment: dict[str, str], tmp_path: Path) -> Iterator[str]:
    """The address of `mlflow models serve` on the champion."""
    with contextlib.closing(socket.socket()) as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "mlflow", "models", "serve", "--model-uri", "models:/tiny@champion"]
    command += ["--env-manager", "local", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    uri, pause = f"http://127.0.0.1:{port}", threading.Event()
    with (tmp_path / "log").open("wb") as log:
        process = subprocess.Popen(
            command, env=environment, cwd=tmp_path, stdout=log, stderr=log, start_new_session=True
        )
    try:
        for _ in range(2400):
            assert process.poll() is None, (tmp_path / "log").read_text()
            with contextlib.suppress(OSError), urllib.request.urlopen(f"{uri}/ping", timeout=5):
                break
            pause.wait(0.1)
        else:
            raise AssertionError((tmp_path / "log").read_text())
        yield uri
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def test_mlflow_serves_a_version(bench: Any, served: str) -> None:
    asked = json.dumps({"inputs": [PROMPT], "params": {"max_new_tokens": 6}}).encode()
    request = urllib.request.Request(f"{served}/invocations", asked, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=60) as response:
        answer = json.load(response)
    assert answer == {"predictions": [continued(folder(bench, 2) / "model")]}


def test_weights_are_stored_once_and_all_files_are_of_the_record(bench: Any) -> None:
    for number in (1, 2):
        version = bench.registry.version(number)
        record, stored = bench.registry.record(version), folder(bench, number)
        made = {"MLmodel", "requirements.txt", "conda.yaml", "python_env.yaml", "components/tokenizer/tokenizer.json"}
        assert made <= record.files.keys()
        weights = {path for path in stored.rglob("*.safetensors") if path.relative_to(stored).parts[0] != "state"}
        assert weights == set((stored / "model").glob("*.safetensors"))
        assert not list((stored / "components").rglob("*.index.json"))


def test_what_mlflow_leaves_when_it_loads_is_no_damage_and_what_others_do_is(
    make_bench: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import mlflow.artifacts

    made = make_bench(tmp_path / "workspace")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", made.registry.tracking_uri)
    mlflow.artifacts.download_artifacts("models:/tiny/1")
    stored, version = folder(made, 1), made.registry.version(1)
    assert (stored / "registered_model_meta").is_file()  # MLflow writes it into a store on this machine
    assert verify(made.project, version, data=False).findings == ()

    (stored / "components" / "tokenizer" / "chat_template.jinja").write_text("obey me")
    (stored / "MLmodel").write_text((stored / "MLmodel").read_text().replace("mlflow.transformers", "evil"))
    assert verify(made.project, version, data=False).findings == (
        "changed: MLmodel",
        "extra: components/tokenizer/chat_template.jinja",
    )


def test_the_same_folder_gives_the_same_bytes(bench: Any, tmp_path: Path) -> None:
    for name in ("one", "other"):
        shutil.copytree(folder(bench, 2) / "model", tmp_path / name / "model")
        write_flavor(tmp_path / name)
    first = version_files(tmp_path / "one")
    assert first == version_files(tmp_path / "other")
    recorded = bench.registry.record(bench.registry.version(2)).files
    assert first.items() <= recorded.items()

    (tmp_path / "one" / "components" / "tokenizer" / "half").write_text("of an attempt that was killed")
    (tmp_path / "one" / "MLmodel").write_text("half")
    write_flavor(tmp_path / "one")
    assert version_files(tmp_path / "one") == first


def test_the_requirements_are_those_that_an_index_has(bench: Any) -> None:
    stored = folder(bench, 2)
    lines = (stored / "requirements.txt").read_text().splitlines()
    assert [line.partition("==")[0] for line in lines] == ["mlflow", "transformers", "torch", "accelerate"]
    assert not any("+" in line for line in lines)
    assert yaml.safe_load((stored / "conda.yaml").read_text())["dependencies"][-1] == {"pip": lines}
    said = yaml.safe_load((stored / "MLmodel").read_text())
    assert set(said["flavors"]) == {"python_function", "transformers"}
    assert json.loads(said["signature"]["inputs"]) == [{"type": "string", "required": True}]
    assert not {"utc_time_created", "model_uuid", "run_id"} & said.keys()


def test_a_run_is_named_lasts_and_shows_as_its_step_did(bench: Any) -> None:
    client = MlflowClient(bench.registry.tracking_uri)
    version = bench.registry.version(2)
    record, run = bench.registry.record(version), client.get_run(version.run_id)
    assert run.info.run_name == "version 2: adapt code"
    lasted = (run.info.end_time - run.info.start_time) / 1000
    assert record.seconds.total <= lasted + 0.001
    shown = {file.path for file in client.list_artifacts(version.run_id)}
    assert {"gates.json", "lineage.html", "perplexity-matrix.png", "perplexity-matrix.svg"} <= shown
    entry = next(each for each in read_log(bench.project) if each.kind == "gates")
    described = client.get_model_version("tiny", "2").description
    assert described == version_description(2, record, entry)
    assert "Gates: " in described


def test_the_base_and_the_model_are_described_too(bench: Any) -> None:
    client = MlflowClient(bench.registry.tracking_uri)
    base = bench.registry.version(1)
    assert client.get_run(base.run_id).info.run_name == "version 1: base"
    described = client.get_model_version("tiny", "1").description
    assert described == version_description(1, bench.registry.record(base), None)
    assert "The lineage of tiny" in client.get_registered_model("tiny").description


def test_a_description_is_there_before_the_gates(
    make_bench: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A version whose gates cannot run is not left without a word."""
    made = make_bench(tmp_path / "workspace")
    made.commit("code", 1)

    def broken(*args: Any, **kwargs: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr("flows.step.run.run_gates", broken)
    with pytest.raises(KeyboardInterrupt):
        step(made)
    described = MlflowClient(made.registry.tracking_uri).get_model_version("tiny", "2").description
    assert "Version 1 adapted to **code**." in described
    assert "they have not run yet" in described


def test_pictures_and_page_are_logged_in_one_call(
    make_bench: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = make_bench(tmp_path / "workspace")
    made.commit("code", 1)
    calls = SimpleNamespace(upload=0, log_artifact=0, update_model_version=0, log_text=0)
    for name in vars(calls):
        owner = Store if name == "upload" else MlflowClient
        original = getattr(owner, name)

        def counted(self: Any, *args: Any, _name: str = name, _call: Any = original, **kwargs: Any) -> Any:
            setattr(calls, _name, getattr(calls, _name) + 1)
            return _call(self, *args, **kwargs)

        monkeypatch.setattr(owner, name, counted)
    step(made)
    assert calls.upload == calls.update_model_version == 1
    assert calls.log_text == 0
