"""What makes a version's folder a model of MLflow's: an `MLmodel` file beside `model/`, and what it names.

`mlflow.pyfunc.load_model`, `mlflow.transformers.load_model` and `mlflow models serve` read it. The weights stay where
they are, in `model/`; MLflow wants the tokenizer in a folder of its own, so its files are there twice. The same folder
and the same packages give the same bytes: no time, no run and no identifier is in them.
"""

from __future__ import annotations

import platform
import shutil
from importlib.metadata import version as installed
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from copal.files import atomic_folder, write_atomic

if TYPE_CHECKING:
    from mlflow.models import ModelSignature

__all__ = ["write_flavor"]

_TASK = "text-generation"
_PACKAGES = ("mlflow", "transformers", "torch", "accelerate")  # what loading and generating takes
_REQUIREMENTS, _CONDA, _PYTHON = "requirements.txt", "conda.yaml", "python_env.yaml"
_NEW_TOKENS = 256  # as many as transformers writes where nobody says how many


def write_flavor(folder: Path) -> None:
    """Make the folder of a version, with a whole `model/` in it, loadable by MLflow; again: writes the same.

    Written are `MLmodel`, `components/tokenizer/`, `requirements.txt`, `conda.yaml` and `python_env.yaml`.
    """
    from mlflow.models import Model
    from mlflow.models.model import MLMODEL_FILE_NAME
    from mlflow.pyfunc import add_to_model

    _copy_tokenizer(folder / "model", folder / "components" / "tokenizer")
    for name, text in _environment().items():
        write_atomic(folder / name, text)
    model = Model(signature=_signature(), model_uuid=None)
    add_to_model(model, loader_module="mlflow.transformers", conda_env=_CONDA, python_env=_PYTHON)
    model.add_flavor(
        "transformers",
        transformers_version=installed("transformers"),
        code=None,
        task=_TASK,
        instance_type="TextGenerationPipeline",
        # The Auto classes choose by config.json, as `from_pretrained` does, and MLflow runs no code of a model's then.
        pipeline_model_type="AutoModelForCausalLM",
        tokenizer_type="AutoTokenizer",
        components=["tokenizer"],
        model_binary="model",
        source_model_name="model",
    )
    said: dict[str, Any] = model.to_dict()
    for name in ("utc_time_created", "model_uuid"):  # the registry tells when and which; here they would never be twice
        said.pop(name)
    write_atomic(folder / MLMODEL_FILE_NAME, yaml.safe_dump(said, default_flow_style=False))


def _copy_tokenizer(model: Path, target: Path) -> None:
    """All that lies beside the weights: the tokenizer, and the configuration that names its class."""
    shutil.rmtree(target, ignore_errors=True)  # of an attempt before
    target.parent.mkdir(exist_ok=True)
    with atomic_folder(target) as partial:
        for path in sorted(model.iterdir()):
            if path.is_file() and not path.name.endswith((".safetensors", ".safetensors.index.json")):
                shutil.copyfile(path, partial / path.name)


def _environment() -> dict[str, str]:
    """The files that say which Python and packages to install, by name."""
    python = platform.python_version()
    # Without the local part (+cpu, +cu128) of a version, which no package index has.
    packages = [f"{name}=={installed(name).partition('+')[0]}" for name in _PACKAGES]
    environments = {
        _CONDA: {
            "name": "mlflow-env",
            "channels": ["conda-forge"],
            "dependencies": [f"python={python}", "pip", {"pip": packages}],
        },
        _PYTHON: {
            "python": python,
            "build_dependencies": ["pip", "setuptools", "wheel"],
            "dependencies": [f"-r {_REQUIREMENTS}"],
        },
    }
    texts = {name: yaml.safe_dump(value, sort_keys=False) for name, value in environments.items()}
    return {_REQUIREMENTS: "".join(f"{package}\n" for package in packages), **texts}


def _signature() -> ModelSignature:
    """Text in, text out; greedy, so that an answer can be had again, unless a request asks for something else."""
    from mlflow.models import ModelSignature
    from mlflow.types import ColSpec, DataType, ParamSchema, ParamSpec, Schema

    return ModelSignature(
        inputs=Schema([ColSpec(DataType.string)]),
        outputs=Schema([ColSpec(DataType.string)]),
        params=ParamSchema(
            [
                ParamSpec("max_new_tokens", DataType.long, _NEW_TOKENS),
                ParamSpec("do_sample", DataType.boolean, False),
            ]
        ),
    )
