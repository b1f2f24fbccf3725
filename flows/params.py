"""Reads params.yaml and the environment into `flows.settings.Settings`; one line says what is wrong with them."""

from __future__ import annotations

import itertools
import os
import re
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from copal.bounded import check_bounds
from copal.errors import SettingsError, one_line
from flows.settings import DomainSettings, Settings
from flows.uris import cause, without_secrets

__all__ = ["VARIABLES", "load_settings", "recorded_settings"]

_T = TypeVar("_T", bound=BaseModel)

# Variable of the environment -> the setting that it goes before; of two for one setting, the later counts.
VARIABLES = {
    "MLFLOW_TRACKING_URI": ("registry", "uri"),
    "COPAL_REGISTRY_URI": ("registry", "uri"),
    "COPAL_REGISTRY_ARTIFACTS": ("registry", "artifacts"),
    "COPAL_LEDGER_URI": ("ledger", "uri"),
    "COPAL_WATCH_REPOSITORY": ("watch", "repository"),
    "COPAL_CACHE_SIZE": ("cache", "size"),
    "COPAL_NODES": ("model", "nodes"),
    "COPAL_NODES_ADDRESS": ("run", "nodes_address"),
    "COPAL_SIGNING_KEY": ("signing", "key"),
    "COPAL_SIGNING_PUBLIC_KEY": ("signing", "public_key"),
}

_DEEPEST = 64  # brackets within one another
_LARGEST = 64 << 10  # bytes; those of fifty domains take five thousand


def load_settings(params: Path) -> Settings:
    """Read params.yaml; what it leaves out has its default. What the environment says goes before it: `VARIABLES`.

    Raises:
        SettingsError: the file cannot be read, or a setting is unknown, of the wrong type or out of range. Names both.
            Or the registry is on a server and no ledger is named.
    """
    return _named(params, lambda: _with_environment(_settings(_read(params))))


def recorded_settings(values: Mapping[str, Any], where: str) -> Settings:
    """The settings that a record holds, checked as those of params.yaml are. The environment does not alter them.

    Raises:
        SettingsError: as `load_settings`; names `where`.
    """
    return _named(where, lambda: _settings(values))


def _named(where: Path | str, read: Callable[[], Settings]) -> Settings:
    try:
        return read()
    except SettingsError as error:
        said = " ".join(f"{where}: {error}".splitlines())  # a key may have two lines
        raise SettingsError(without_secrets(said)) from cause(error)  # what is in the wrong place may be a password


def _read(params: Path) -> dict[Any, Any] | None:
    from ruamel.yaml import YAML
    from ruamel.yaml.constructor import DuplicateKeyError
    from ruamel.yaml.error import YAMLError

    try:
        with params.open("rb") as file:
            text = file.read(_LARGEST + 1).decode()
        if len(text) > _LARGEST:
            raise SettingsError(f"is larger than {_LARGEST >> 10} KB, which no settings are")
        steps = ({"[": 1, "{": 1, "]": -1, "}": -1}.get(letter, 0) for letter in text)
        if max(itertools.accumulate(steps), default=0) > _DEEPEST:  # on which the parser would spend seconds
            raise SettingsError("is nested too deep")
        content = YAML(typ="safe", pure=True).load(text)
    except OSError as error:
        raise SettingsError(f"cannot be read ({error.strerror})") from error
    except UnicodeDecodeError as error:
        raise SettingsError(f"is not UTF-8 (byte {error.start})") from error
    except DuplicateKeyError as error:  # its own words hold both values, one of which may hold a password
        key = re.sub(r'found duplicate key "(.*?)" with value .*', r"\1", " ".join(error.problem.split()))
        line = error.problem_mark.line + 1
        raise SettingsError(f"{key} stands there twice, again in line {line}: keep one") from None
    except (YAMLError, ValueError) as error:  # ValueError: a date that is none
        raise SettingsError(f"is not YAML: {one_line(error)}") from cause(error)
    except RecursionError:
        raise SettingsError("is nested too deep") from None
    check_bounds(content, "what it says", SettingsError)
    if content is not None and not isinstance(content, dict):  # None: nothing but comments
        sections = ", ".join(Settings.model_fields)
        raise SettingsError(f"must be a mapping of sections ({sections}), not {type(content).__name__}")
    return content


def _settings(content: Mapping[Any, Any] | None) -> Settings:
    try:
        return Settings.model_validate(content)
    except ValidationError as error:
        raise SettingsError(_line(error)) from error


def _line(error: ValidationError) -> str:
    """What is wrong with the first of the settings that are, and what would be right."""
    first = error.errors(include_url=False)[0]
    *section, name = path = [str(part) for part in first["loc"]]
    setting = ".".join(path)
    if first["type"] in ("extra_forbidden", "invalid_key"):  # YAML reads `1:` as a number
        if not section:
            return f"{name} is not a section; there are {', '.join(Settings.model_fields)}"
        known = DomainSettings if section[0] == "domains" else type(getattr(Settings(), section[0]))
        return f"{setting} is not a setting; {'.'.join(section)} has {', '.join(known.model_fields)}"
    if first["type"] == "model_type":
        return f"{setting} must be a mapping of settings, not {first['input']!r}"
    if first["type"] == "dict_type":
        return f"{setting} must be a mapping of domain names, not {first['input']!r}"
    return f"{setting} {first['msg']}"


def _with_environment(settings: Settings) -> Settings:
    """The settings, with what the environment says in place of some; refused where hosts would share no ledger.

    Raises:
        SettingsError: two hosts would have one registry, and a ledger each; or a variable is no such URL.
    """
    set_here = {name: text for name in VARIABLES if (text := os.environ.get(name))}
    for name, text in set_here.items():
        section, setting = VARIABLES[name]
        changed = _of_variable(getattr(settings, section), setting, name, text)
        settings = settings.model_copy(update={section: changed})
    variable = next((name for name in reversed(set_here) if VARIABLES[name] == ("registry", "uri")), None)
    if settings.ledger.uri is None and _is_remote(settings.registry.uri):
        raise SettingsError(
            f"ledger.uri must be set, for {variable or 'registry.uri'} names a store that other hosts share "
            f"({settings.registry.uri}), "
            "and without it each host would have a ledger of its own: set ledger.uri or COPAL_LEDGER_URI to "
            "postgresql://USER@HOST/DATABASE, or for one host alone to sqlite:///.copal/ledger.db"
        )
    return settings


def _of_variable(section: _T, setting: str, variable: str, text: str) -> _T:
    value: object = text
    if isinstance(now := getattr(section, setting), (int, float)):  # a variable is always text
        with suppress(ValueError):
            value = type(now)(text)
    try:
        return type(section).model_validate({**section.model_dump(), setting: value})
    except ValidationError as error:
        raise SettingsError(f"{variable} {error.errors()[0]['msg']}") from error


def _is_remote(uri: str | None) -> bool:
    """Whether MLflow finds the store `uri` elsewhere than in a file or folder of this machine."""
    if uri is None:
        return False
    scheme = re.match(r"[A-Za-z0-9.-]+(?=[+:])", uri)
    return uri == "databricks" or (scheme is not None and scheme[0] not in ("sqlite", "file"))
