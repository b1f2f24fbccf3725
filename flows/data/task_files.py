"""The tasks of a domain: which files of lm-evaluation-harness are passed on to it, and what may stand in them.

They come from others. The harness imports Python that a file names, and asks the hub for data and metrics. So a file is
read as plain YAML, and only what is listed here may stand in it. Pure: the harness need not be installed.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePath, PurePosixPath
from typing import Any

from copal.bounded import check_bounds
from copal.config import fingerprint
from copal.domain_files import TASKS, check_name
from copal.errors import DataError, one_line
from copal.files import sha256_file

__all__ = ["TaskFile", "count_tasks", "read_tasks"]

# Kind of question -> metrics of its answers. The harness gives none of another kind, and looks for others on the hub.
_METRICS_OF = {
    "multiple_choice": ("acc", "acc_norm", "acc_bytes", "acc_mutual_info", "brier_score", "f1", "mcc"),
    "loglikelihood": ("acc", "perplexity"),
    "loglikelihood_rolling": ("bits_per_byte", "byte_perplexity", "word_perplexity"),
    "generate_until": ("bleu", "chrf", "exact_match", "ter"),
}
_LESS_IS_BETTER = {"bits_per_byte", "brier_score", "byte_perplexity", "perplexity", "ter", "word_perplexity"}
# How the harness puts the answers to all questions together, where that is no mean.
_AGGREGATION = {
    "bits_per_byte": "bits_per_byte",
    "bleu": "bleu",
    "brier_score": "brier_score",
    "byte_perplexity": "weighted_perplexity",
    "chrf": "chrf",
    "f1": "f1",
    "mcc": "matthews_corrcoef",
    "perplexity": "perplexity",
    "ter": "ter",
    "word_perplexity": "weighted_perplexity",
}

_FIELDS = {
    *("task", "task_alias", "tag", "metadata", "output_type", "metric_list", "generation_kwargs"),
    *("dataset_path", "dataset_kwargs", "training_split", "validation_split", "test_split", "fewshot_split"),
    *("doc_to_text", "doc_to_target", "doc_to_choice", "description", "target_delimiter", "fewshot_delimiter"),
    *("num_fewshot", "gen_prefix"),
}
_OF_METRIC = {"metric", "aggregation", "higher_is_better", "ignore_case", "ignore_punctuation", "ignore_numbers"}
_GENERATION = {"until", "max_gen_toks", "do_sample", "temperature"}
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
        higher_is_better: of that metric.
        digest: SHA-256 of all that it asks: figures with the same one compare.
    """

    domain: str
    name: str
    config: Mapping[str, Any]
    metric: str
    higher_is_better: bool
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
        if _is_task(path):
            where = f"data/{domain}/{TASKS}/{path.name}"
            task = _task(domain, path, where)
            if task.name in tasks:
                raise DataError(f"{where}: another file of the folder has the task {task.name} too")
            tasks[task.name] = task
    return tuple(tasks[name] for name in sorted(tasks))


def count_tasks(files: Iterable[str]) -> int:
    """How many tasks `read_tasks` finds in a domain with these files: paths in its folder."""
    paths = map(PurePosixPath, files)
    return sum(path.parent == PurePosixPath(TASKS) and _is_task(path) for path in paths)


def _is_task(path: PurePath) -> bool:
    return path.suffix in (".yaml", ".yml") and not path.name.startswith(".")


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
    _check_generation(config.get("generation_kwargs") or {}, where)
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
        higher_is_better=metric not in _LESS_IS_BETTER,
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
        raise DataError(f"{where} is not YAML: {one_line(error)[:300]}") from error
    except OSError as error:
        raise DataError(f"{where} cannot be read: {error.strerror}") from error
    except (RecursionError, TypeError, ValueError) as error:  # a date, a set, bytes, NaN, or brackets without end
        raise DataError(f"{where} holds what is no text, number, list or mapping, or is nested too deep") from error
    if not isinstance(content, dict):
        raise DataError(f"{where} must be a mapping of fields")
    return content


def _metric(config: Mapping[str, Any], where: str) -> str:
    """The first metric of a task, once all of them are known."""
    kind = config.get("output_type")
    if not isinstance(kind, str) or kind not in _METRICS_OF:
        raise DataError(f"{where}: output_type must be one of {', '.join(_METRICS_OF)}")
    known = _METRICS_OF[kind]
    entries = config.get("metric_list")
    if not isinstance(entries, list) or not entries or not all(isinstance(entry, dict) for entry in entries):
        raise DataError(f"{where}: metric_list must be a list such as [{{metric: acc}}]; gates look at the first")
    for entry in entries:
        if unknown := sorted(map(str, entry.keys() - _OF_METRIC)):
            raise DataError(f"{where}: {unknown[0]} of a metric is not passed on; there are {_listed(_OF_METRIC)}")
        metric = entry.get("metric")
        if metric not in known:
            raise DataError(f"{where}: metric {metric!a} must be one of {', '.join(known)}, for output_type {kind}")
        own = {"aggregation": _AGGREGATION.get(metric, "mean"), "higher_is_better": metric not in _LESS_IS_BETTER}
        for name, value in own.items():
            if name in entry and entry[name] != value:
                raise DataError(f"{where}: {name} of {metric} must be {value}, as it is when left out")
    return str(entries[0]["metric"])


def _check_generation(options: object, where: str) -> None:
    """What goes to transformers' `generate`, where an option can name code."""
    if not isinstance(options, dict) or options.keys() - _GENERATION:
        raise DataError(f"{where}: generation_kwargs may have {_listed(_GENERATION)}, and nothing else")
    if options.get("do_sample") or options.get("temperature"):
        raise DataError(f"{where}: generation_kwargs must leave do_sample false: an answer is to be the same each time")


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
