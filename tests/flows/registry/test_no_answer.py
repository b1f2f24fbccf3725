"""A server of MLflow that is down, or says nothing: one line, within seconds."""

from __future__ import annotations

import socket
import time

import pytest

from flows.cache import Cache
from flows.registry import store
from flows.registry.errors import RegistryError
from flows.registry.registry import Registry


@pytest.fixture
def listener():
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        yield found


@pytest.mark.parametrize("listens", [False, True], ids=["down", "silent"])
def test_a_server_that_does_not_answer_is_said(listener, monkeypatch, tmp_path, listens):
    monkeypatch.setattr(store, "_ANSWER", 0.5)
    if listens:
        listener.listen()
    host = f"127.0.0.1:{listener.getsockname()[1]}"
    registry = Registry(store.Places(f"http://me:secret@{host}", tmp_path, None), "tiny", Cache(tmp_path))
    began = time.monotonic()
    with pytest.raises(RegistryError, match=r"does not answer within 0\.5 s: start it, or mend") as caught:
        registry.versions()
    assert time.monotonic() - began < 20  # imports and a busy machine; MLflow itself would try for minutes
    assert host in str(caught.value)
    assert "secret" not in str(caught.value)
