"""The keys of steps: the same parent, data and settings give the same key, and never two versions."""

from __future__ import annotations

from copal.config import fingerprint

__all__ = ["step_key", "withdrawal_key"]


def step_key(parent_version: int, domain: str, dvc_md5: str, settings_fingerprint: str) -> str:
    """SHA-256 that names the step which adds a domain, or replaces its data."""
    return fingerprint([parent_version, domain, dvc_md5, settings_fingerprint])


def withdrawal_key(parent_version: int, domain: str, dvc_md5: str, settings_fingerprint: str) -> str:
    """SHA-256 that names the step that takes a domain out; never that of a `step_key`."""
    return fingerprint([parent_version, domain, dvc_md5, settings_fingerprint, "withdrawn"])
