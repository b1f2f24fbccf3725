"""An S3 store that tests start, stop and start again: moto's, over HTTP."""

from __future__ import annotations

from threading import Thread
from typing import Any

import boto3
from moto.moto_server.werkzeug_app import DomainDispatcherApplication, MotoRequestHandler, create_backend_app
from werkzeug.serving import BaseWSGIServer, make_server

from support.servers import free_port


class S3Server:
    """What is in it is this process's, and outlives that the server goes away."""

    def __init__(self) -> None:
        self.port = free_port()
        self.environment = {  # of whoever may read and write it
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{self.port}",
            "AWS_ACCESS_KEY_ID": "an access key",
            "AWS_SECRET_ACCESS_KEY": "a secret key",
            "AWS_DEFAULT_REGION": "us-east-1",
        }
        self._server: BaseWSGIServer | None = None

    def start(self) -> None:
        """Start it: it answers from now on."""
        app = DomainDispatcherApplication(create_backend_app)
        self._server = make_server("127.0.0.1", self.port, app, threaded=True, request_handler=_OneRequest)
        Thread(target=self._server.serve_forever, daemon=True).start()

    def kill(self) -> None:
        """Answer nobody any more; nothing where it does not run."""
        if self._server is not None:
            self._server.shutdown()
            self._server = None

    def new_bucket(self, name: str) -> None:
        self._client().create_bucket(Bucket=name)

    def objects(self, bucket: str) -> list[tuple[str, str]]:
        """(key, ETag) of all that is in a bucket."""
        pages = self._client().get_paginator("list_objects_v2").paginate(Bucket=bucket)
        return [(found["Key"], found["ETag"]) for page in pages for found in page.get("Contents", ())]

    def _client(self) -> Any:
        return boto3.client(
            "s3",
            endpoint_url=self.environment["AWS_ENDPOINT_URL"],
            aws_access_key_id=self.environment["AWS_ACCESS_KEY_ID"],
            aws_secret_access_key=self.environment["AWS_SECRET_ACCESS_KEY"],
            region_name=self.environment["AWS_DEFAULT_REGION"],
        )


class _OneRequest(MotoRequestHandler):
    protocol_version = "HTTP/1.0"  # a connection for each request: none goes on with a server that was killed
