"""The buckets of a team's S3 store, and which of its accounts may do what in them."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from copal.errors import CopalError, SettingsError, one_line

__all__ = ["Bucket", "BucketError", "ensure_bucket", "parse_buckets", "policy"]

_READ = ("s3:GetObject", "s3:ListBucket", "s3:GetBucketLocation")
_WRITE = ("s3:PutObject", "s3:DeleteObject", "s3:AbortMultipartUpload", "s3:ListMultipartUploadParts")
_MAY = {"r": _READ, "rw": _READ + _WRITE}


class BucketError(CopalError):
    """The S3 store does not answer, or refuses."""


@dataclass(frozen=True, slots=True)
class Bucket:
    """A bucket; `accounts`: account -> `r` or `rw`, empty where the store's own rules say who may do what."""

    name: str
    accounts: Mapping[str, str]


def parse_buckets(text: str) -> tuple[Bucket, ...]:
    """Read `mlflow=server:rw data=worker:r,people:rw results`: buckets, each with its accounts if it has any.

    Raises:
        SettingsError: it is none of that.
    """
    found = []
    for word in text.split():
        name, equals, accounts = word.partition("=")
        grants = [each.rpartition(":") for each in accounts.split(",")] if equals else []
        if not re.fullmatch(r"[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]", name) or any(
            not account or may not in _MAY for account, _, may in grants
        ):
            raise SettingsError(
                f"COPAL_BUCKETS: {word!r} is no bucket with its accounts, such as results or data=worker:r,people:rw"
            )
        found.append(Bucket(name, {account: may for account, _, may in grants}))
    return tuple(found)


def policy(bucket: Bucket) -> dict[str, Any]:
    """The bucket's policy, in the language of S3. Accounts are named as the store names them: Amazon's by ARN."""
    return {
        "Version": "2012-10-17",
        "Statement": [
            {
                "Effect": "Allow",
                "Principal": {"AWS": [account]},
                "Action": list(_MAY[may]),
                "Resource": [f"arn:aws:s3:::{bucket.name}", f"arn:aws:s3:::{bucket.name}/*"],
            }
            for account, may in bucket.accounts.items()
        ],
    }


def ensure_bucket(bucket: Bucket) -> None:
    """Create the bucket if it is not there, and set its policy. Address and keys come from boto3's own environment.

    Raises:
        BucketError: see there, or boto3 is not installed.
    """
    try:
        import boto3
        from botocore.exceptions import BotoCoreError, ClientError
    except ImportError as error:
        raise BucketError("buckets need boto3: pip install 'copal[s3]'") from error
    try:
        client = boto3.client("s3")
        if bucket.name not in {each["Name"] for each in client.list_buckets()["Buckets"]}:
            client.create_bucket(Bucket=bucket.name)
        if bucket.accounts:
            client.put_bucket_policy(Bucket=bucket.name, Policy=json.dumps(policy(bucket)))
    except (BotoCoreError, ClientError) as error:
        raise BucketError(f"the S3 store refuses the bucket {bucket.name}: {one_line(error)}") from error
