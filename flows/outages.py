"""What the libraries of object stores raise; DVC and MLflow let it through as it is."""

from __future__ import annotations

import sys

__all__ = ["outages"]

# Module -> the base classes of what the library raises.
_BASES = {
    "botocore.exceptions": ("BotoCoreError", "ClientError"),
    "boto3.exceptions": ("Boto3Error",),
    "google.api_core.exceptions": ("GoogleAPIError",),
    "google.auth.exceptions": ("GoogleAuthError",),
    "azure.core.exceptions": ("AzureError",),
    "aiohttp": ("ClientError",),
}


def outages() -> tuple[type[Exception], ...]:
    """The errors of a store that is away, or does not let us in, for `except`: of the libraries that are imported.

    What is not imported has raised nothing.
    """
    loaded = [(sys.modules[module], names) for module, names in _BASES.items() if module in sys.modules]
    return ConnectionError, TimeoutError, *(getattr(module, name) for module, names in loaded for name in names)
