"""Servers that tests start on loopback and stop by their process id."""

from __future__ import annotations

import contextlib
import os
import select
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator

import pytest

from populace.storage.objects.dev import DevStore


@contextlib.contextmanager
def seaweedfs() -> Iterator[str]:
    """The endpoint of a SeaweedFS; its credentials are in the environment meanwhile."""
    with DevStore() as server, pytest.MonkeyPatch.context() as patch:
        for name, value in server.environment.items():
            patch.setenv(name, value)
        yield server.endpoint


@contextlib.contextmanager
def moto() -> Iterator[str]:
    """The endpoint of a moto server."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    process = subprocess.Popen(
        [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    try:
        deadline = time.monotonic() + 60
        while True:
            try:
                socket.create_connection(("127.0.0.1", port), timeout=1).close()
                break
            except OSError:
                assert process.poll() is None and time.monotonic() < deadline, "moto did not start"
                time.sleep(0.1)
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("AWS_ACCESS_KEY_ID", "moto")
            patch.setenv("AWS_SECRET_ACCESS_KEY", "moto")
            yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait(timeout=20)


class DroppingProxy:
    """A TCP proxy in front of an HTTP server. While `drops_answers`, requests arrive and their
    answers get lost."""

    def __init__(self, endpoint: str) -> None:
        host, port = endpoint.removeprefix("http://").split(":")
        self._backend = (host, int(port))
        self.drops_answers = False
        self.num_dropped = 0
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.endpoint = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        self._listener.close()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        with client, socket.create_connection(self._backend) as server:
            while True:
                ready, _, _ = select.select([client, server], [], [], 30)
                for source in ready:
                    chunk = source.recv(1 << 16)
                    if not chunk:
                        return
                    if source is client:
                        server.sendall(chunk)
                    elif self.drops_answers:
                        self.num_dropped += 1
                        return
                    else:
                        client.sendall(chunk)
                if not ready:
                    return
