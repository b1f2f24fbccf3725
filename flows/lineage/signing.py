"""Signatures of versions with the model-signing library: an elliptic-curve key pair, no network, no log of others.

The signature of a version is a file beside its record, a Sigstore bundle. It covers all files of the version
and `lineage.json`, but not the running sum and the contribution, which may be dropped: their SHA-256 are in the record.
"""

from __future__ import annotations

import re
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from copal.errors import CopalError
from flows.lineage.files import CONTRIBUTION_FOLDER, SIGNATURE_FILE, SUM_FOLDER

__all__ = ["SigningError", "check_key", "sign", "signature_problem"]


class SigningError(CopalError):
    """A version cannot be signed, or no signature checked: a key is unusable, or the library is not installed."""


def check_key(key: Path) -> None:
    """Nothing where `key` can sign.

    Raises:
        SigningError: it cannot.
    """
    _signer(key)


def sign(folder: Path, key: Path) -> None:
    """Write the signature of the version in `folder` into it.

    Raises:
        SigningError: `key` cannot sign, or the folder holds what cannot be signed (a symbolic link).
    """
    signer = _signer(key)
    from model_signing import hashing

    left_out = [SIGNATURE_FILE, SUM_FOLDER, CONTRIBUTION_FOLDER]
    covers = hashing.Config().set_ignored_paths(paths=left_out, ignore_git_paths=False)
    try:
        signer.set_hashing_config(covers).sign(folder, folder / SIGNATURE_FILE)
    except ValueError as error:
        raise SigningError(f"{folder} cannot be signed: {_one_line(error)}") from error


def signature_problem(folder: Path, *, key: Path | None, public_key: Path | None) -> str | None:
    """What is wrong with the signature in `folder`, by `public_key`, else by the public half of `key`.

    Files that were added later are not looked at: see `flows.lineage.verify_files`.

    Raises:
        SigningError: the key cannot be used, or the library is not installed.
    """
    _library()
    from cryptography.exceptions import InvalidSignature
    from model_signing import verifying

    with TemporaryDirectory(prefix="copal-") as scratch:
        if public_key is None:
            assert key is not None
            public_key = Path(scratch) / "public.pem"
            public_key.write_bytes(_public_half(key))
        verifier: Any = verifying.Config().set_ignore_unsigned_files(True)
        try:
            verifier.use_elliptic_key_verifier(public_key=public_key)
        except (OSError, ValueError, AttributeError) as error:  # AttributeError: a key of another kind
            raise SigningError(f"signing.public_key: {public_key} cannot be used: {_one_line(error)}") from error
        try:
            verifier.verify(folder, folder / SIGNATURE_FILE)
        except InvalidSignature:
            return f"{SIGNATURE_FILE} was not made with the private key of {public_key}"
        except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:  # what a damaged bundle may raise
            return f"{SIGNATURE_FILE}: {_one_line(error)}"
    return None


def _signer(key: Path) -> Any:
    _library()
    from model_signing import signing

    try:
        return signing.Config().use_elliptic_key_signer(private_key=key)
    except (OSError, ValueError, TypeError, AttributeError) as error:  # TypeError: a password; AttributeError: RSA
        raise SigningError(
            f"signing.key: {key} cannot sign: {_one_line(error)}; it must be an elliptic-curve key in a PEM file "
            "without a password: openssl ecparam -name prime256v1 -genkey -noout -out KEY"
        ) from error


def _public_half(key: Path) -> bytes:
    from cryptography.hazmat.primitives import serialization

    try:
        private = serialization.load_pem_private_key(key.read_bytes(), None)
    except (OSError, ValueError, TypeError) as error:
        raise SigningError(f"signing.key: {key} cannot be read: {_one_line(error)}") from error
    form = serialization.PublicFormat.SubjectPublicKeyInfo
    return private.public_key().public_bytes(serialization.Encoding.PEM, form)


def _library() -> None:
    try:
        import model_signing.signing  # noqa: F401
    except ImportError as error:
        raise SigningError(
            f"signatures need model-signing, which cannot be imported ({error}): pip install model-signing pyopenssl, "
            "or set signing.key to null"
        ) from error


def _one_line(error: Exception) -> str:
    """The library's message, without the digests in it."""
    text = re.sub(r": Expected 'Digest\(.*?\)', Actual 'Digest\(.*?\)'", "", str(error))
    return " ".join(text.split()) or type(error).__name__
