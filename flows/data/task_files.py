"""The tasks of a domain: which files of lm-evaluation-harness are passed on to it, and what may stand in them.

They come from others. The harness imports Python that a file names, and asks the hub for data and metrics. So a file is
read as plain YAML, and only what is listed here may stand in it. Pure: the harness need not be installed.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from copal.bounded import check_bounds
from copal.config import fingerprint
from copal.domain_files import TASKS, check_name
from copal.errors import DataError
from copal.files import sha256_file

__all__ = ["METRICS", "TaskFile", "read_tasks"]

# Metric -> whether more is better. The harness looks for others on the hub.
METRICS = {
    "acc": True,
    "acc_norm": True,
    "acc_bytes": True,
    "acc_mutual_info": True,
    "bits_per_byte": False,
    "bleu": True,
    "brier_score": False,
    "byte_perplexity": False,
    "chrf": True,
    "exact_match": True,
    "f1": True,
    "mcc": True,
    "perplexity": False,
    "ter": False,
    "word_perplexity": False,
}

_FIELDS = {
    *("task", "task_alias", "tag", "metadata", "output_type", "metric_list", "generation_kwargs"),
    *("dataset_path", "dataset_kwargs", "training_split", "validation_split", "test_split", "fewshot_split"),
    *("doc_to_text", "doc_to_target", "doc_to_choice", "description", "target_delimiter", "fewshot_delimiter"),
    *("num_fewshot", "gen_prefix"),
}
_OF_METRIC = {"metric", "aggregation", "higher_is_better", "ignore_case", "ignore_punctuation", "ignore_numbers"}
_FORMATS = ("json", "csv", "parquet", "text")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")  # becomes part of the names of metrics
_LARGEST = 64 << 10  # bytes of a task file
_LARGEST_DATA = 256 << 20  # bytes of its data: the harness reads it whole


@dataclass(frozen=True, kw_only=True, slots=True)
class TaskFile:
    """A task that may be run.

    Attributes:
        domain, name: whose it is, and what it calls itself.
        config: what the file says, with absolute paths of the data.
        metric: the first that it names.
        digest: SHA-256 of all that it asks: figures with the same one compare.
    """

    domain: str
    name: str
    config: Mapping[str, Any]
    metric: str
    digest: str


def read_tasks(domain: str, folder: Path) -> tuple[TaskFile, ...]:
    """The tasks in `folder`/tasks, by name; none where there is no such folder.

    Raises:
        DataError: a file cannot be passed on: names it, as `data/DOMAIN/tasks/FILE`, and says what is wrong.
    """
    place = folder / TASKS
    if place.is_symlink():
        raise DataError(f"data/{domain}/{TASKS} is a link: put the files themselves there")
    if not place.is_dir():
        return ()
    tasks: dict[str, TaskFile] = {}
    for path in sorted(place.iterdir()):
        check_name(path.name, f"data/{domain}/{TASKS}")
        if path.suffix in (".yaml", ".yml") and not path.name.startswith("."):
            where = f"data/{domain}/{TASKS}/{path.name}"
            task = _task(domain, path, where)
            if task.name in tasks:
                raise DataError(f"{where}: another file of the folder has the task {task.name} too")
            tasks[task.name] = task
    return tuple(tasks[name] for name in sorted(tasks))


def _task(domain: str, path: Path, where: str) -> TaskFile:
    config = _read(_inside(path.parent, path.name, where), where)
    if unknown := sorted(map(str, config.keys() - _FIELDS)):
        raise DataError(f"{where}: {unknown[0]} is not passed on; there are {_listed(_FIELDS)}")
    name = config.get("task")
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise DataError(f"{where}: task must be a name of 1 to 64 letters, digits, '.', '_' or '-'")
    if config.get("dataset_path") not in _FORMATS:
        raise DataError(
            f"{where}: dataset_path must be one of {', '.join(_FORMATS)}: data is read from files beside it"
        )
    metric = _metric(config, where)
    files = _data_files(config, where)
    found = {
        split: [_inside(path.parent, file, where) for file in ([named] if isinstance(named, str) else named)]
        for split, named in files.items()
    }
    if sum(file.stat().st_size for each in found.values() for file in each) > _LARGEST_DATA:
        raise DataError(f"{where}: its data is larger than {_LARGEST_DATA >> 20} MB: put fewer questions there")
    asked = {split: [sha256_file(file) for file in each] for split, each in found.items()}
    absolute = {split: [str(file) for file in each] for split, each in found.items()}
    return TaskFile(
        domain=domain,
        name=name,
        config={**config, "dataset_kwargs": {"data_files": absolute}},
        metric=metric,
        digest=fingerprint({**config, "dataset_kwargs": {"data_files": asked}}),
    )


def _read(path: Path, where: str) -> dict[str, Any]:
    import yaml

    try:
        with path.open("rb") as file:
            text = file.read(_LARGEST + 1)
        if len(text) > _LARGEST:
            raise DataError(f"{where} is larger than {_LARGEST >> 10} KB, which no task is")
        content = yaml.safe_load(text)  # no tag of Python, and none of the harness: `!function` imports a module
        check_bounds(content, where, DataError)
        fingerprint(content)
    except yaml.constructor.ConstructorError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 0
        said = re.search(r"tag '(.*?)'", error.problem or "")
        what = f"{said[1]!a} names code, which is not run: write" if said else "is not plain YAML:"
        raise DataError(f"{where}, line {line}: {what} templates and plain values only") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise DataError(f"{where} is not YAML: {' '.join(str(error).split())[:300]}") from error
    except OSError as error:
        raise DataError(f"{where} cannot be read: {error.strerror}") from error
    except (RecursionError, TypeError, ValueError) as error:  # a date, a set, bytes, NaN, or brackets without end
        raise DataError(f"{where} holds what is no text, number, list or mapping, or is nested too deep") from error
    if not isinstance(content, dict):
        raise DataError(f"{where} must be a mapping of fields")
    return content


def _metric(config: Mapping[str, Any], where: str) -> str:
    """The first metric of a task, once all of them are known."""
    entries = config.get("metric_list")
    if not isinstance(entries, list) or not entries or not all(isinstance(entry, dict) for entry in entries):
        raise DataError(f"{where}: metric_list must be a list such as [{{metric: acc}}]; gates look at the first")
    for entry in entries:
        if unknown := sorted(map(str, entry.keys() - _OF_METRIC)):
            raise DataError(f"{where}: {unknown[0]} of a metric is not passed on; there are {_listed(_OF_METRIC)}")
        if entry.get("metric") not in METRICS:
            raise DataError(f"{where}: metric {entry.get('metric')!a} must be one of {', '.join(METRICS)}")
    return str(entries[0]["metric"])


def _data_files(config: Mapping[str, Any], where: str) -> dict[str, str | list[str]]:
    """Split -> names of files."""
    options = config.get("dataset_kwargs")
    files = options.get("data_files") if isinstance(options, dict) and options.keys() == {"data_files"} else None
    if isinstance(files, str):
        files = {"train": files}  # as `datasets` calls it
    plain = isinstance(files, dict) and all(
        isinstance(split, str) and (isinstance(named, str) or _texts(named)) for split, named in files.items()
    )
    if not plain or not files:
        raise DataError(f"{where}: dataset_kwargs must be data_files and nothing else: {{test: FILE}}, say")
    return dict(files)


def _listed(names: set[str]) -> str:
    return ", ".join(sorted(names))


def _texts(value: object) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(one, str) for one in value)


def _inside(folder: Path, name: str, where: str) -> Path:
    """The file `name` of `folder`, which lies in there and nowhere else."""
    check_name(name, where)
    path, root = (folder / name).resolve(), folder.resolve()
    if root not in path.parents:
        raise DataError(f"{where}: {name!a} does not lie in the folder tasks: put the file itself there")
    if not path.is_file():
        raise DataError(f"{where}: {name!a} is not there, or is no file")
    return path
