"""Real servers for the record of an arbiter: etcd, an S3 server, Azurite.

Owns one process for each server, its directory, and the port it keeps over restarts. Each ends with
`close`, by its own pid. Must never: use a port or a process that it did not make.
"""

import base64
import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import urllib.request
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from http import HTTPStatus
from pathlib import Path
from time import monotonic
from types import TracebackType
from typing import ClassVar, Self

import boto3
from azure.storage.blob import (
    AccountSasPermissions,
    BlobServiceClient,
    ResourceTypes,
    generate_account_sas,
)
from botocore.config import Config as BotoConfig

ROOT = Path(__file__).resolve().parents[2]
START_S = 60.0
POLL_S = 0.02
BUCKET = "records"
CONTAINER = "records"
ACCOUNT = "mirrors"
ACCOUNT_KEY = base64.b64encode(b"the key of the account in the tests").decode()
ACCESS_KEY, SECRET_KEY = "AKIAIOSFODNN7EXAMPLE", "the key of nobody"


def free_port() -> int:
    """A port that nobody listens on now."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return int(probe.getsockname()[1])


class Server:
    """One server process on one port of the loopback interface."""

    scheme: ClassVar[str] = "http"

    def __init__(self, environment: dict[str, str] | None = None) -> None:
        self.directory = Path(tempfile.mkdtemp(prefix="nbdm-store-"))
        self.port = free_port()
        self._environment = {**os.environ, **(environment or {})}
        self._process: subprocess.Popen[bytes] | None = None
        self.start()

    @property
    def url(self) -> str:
        """Where it takes clients."""
        return f"{self.scheme}://127.0.0.1:{self.port}"

    def command(self) -> Sequence[str]:
        """The program and its arguments."""
        raise NotImplementedError

    def prepare(self) -> None:
        """Make what a store needs once the server runs: a bucket, a container."""

    def start(self) -> None:
        """Start it and wait until it takes connections. An empty store is prepared."""
        with (self.directory / "log").open("ab") as log:
            self._process = subprocess.Popen(
                self.command(),
                cwd=self.directory,
                env=self._environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )
        until = monotonic() + START_S
        while not self.is_listening():
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(POLL_S)
            if self._process.returncode is not None or monotonic() > until:
                self.stop()
                text = (self.directory / "log").read_text(errors="replace")
                raise RuntimeError(f"{self.command()[0]} does not serve:\n{text[-4000:]}")
        self.prepare()

    def is_listening(self) -> bool:
        """Whether somebody takes connections on its port."""
        try:
            socket.create_connection(("127.0.0.1", self.port), 1).close()
        except OSError:
            return False
        return True

    def stop(self) -> None:
        """End the process; what it has on disk stays."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def restart_empty(self) -> None:
        """The same place, and nothing in it: a store that lost everything."""
        self.stop()
        shutil.rmtree(self.directory)
        self.directory.mkdir()
        self.start()

    @contextlib.contextmanager
    def frozen(self) -> Iterator[None]:
        """It takes connections, by the kernel's hand, and answers nothing."""
        assert self._process is not None
        self._process.send_signal(signal.SIGSTOP)
        # The signal stops a thread that runs on another core a moment later; until then it answers.
        # The parent is told when every thread has stopped.
        os.waitid(os.P_PID, self._process.pid, os.WSTOPPED | os.WEXITED | os.WNOWAIT)
        try:
            yield
        finally:
            self._process.send_signal(signal.SIGCONT)

    def close(self) -> None:
        """End the process and remove its files."""
        self.stop()
        shutil.rmtree(self.directory, ignore_errors=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


class Etcd(Server):
    """One member, a cluster of its own. `more`: further arguments."""

    def __init__(self, more: Sequence[str] = (), scheme: str = "http", token: str = "") -> None:
        self.more, self.scheme = more, scheme  # type: ignore[misc]  # of one server, not of all
        self.token = token or "nbdmirror-test"
        self.peer_port = free_port()
        super().__init__()

    def command(self) -> Sequence[str]:
        """See Server."""
        peers = f"http://127.0.0.1:{self.peer_port}"
        return [
            *("etcd", "--name", "one", "--data-dir", str(self.directory / "data")),
            *("--listen-client-urls", self.url, "--advertise-client-urls", self.url),
            *("--listen-peer-urls", peers, "--initial-advertise-peer-urls", peers),
            *("--initial-cluster", f"one={peers}", "--initial-cluster-token", self.token),
            *("--logger", "zap", "--unsafe-no-fsync", *self.more),
        ]

    def is_listening(self) -> bool:
        """It takes connections before it has a leader, and answers nothing then."""
        return super().is_listening() and (self.scheme != "http" or self.is_healthy())

    def is_healthy(self) -> bool:
        """Whether it says so itself."""
        try:
            with urllib.request.urlopen(f"{self.url}/health", timeout=START_S) as answer:
                return b"true" in answer.read()
        except OSError:
            return False

    def delete_all(self) -> None:
        """Every key is gone; the cluster is the same one."""
        everything = base64.b64encode(b"\0").decode()
        body = json.dumps({"key": everything, "range_end": everything}).encode()
        asked = urllib.request.Request(f"{self.url}/v3/kv/deleterange", data=body)
        with urllib.request.urlopen(asked, timeout=START_S) as answer:
            assert answer.status == HTTPStatus.OK


class S3(Server):
    """An S3 server with the bucket BUCKET, that forgets all when it ends."""

    def command(self) -> Sequence[str]:
        """See Server."""
        return [sys.executable, "-m", "tests.support.moto_program", str(self.port)]

    def __init__(self, *, has_users: bool = False) -> None:
        # With users, only the making of the bucket is let through without a right to it.
        more = {"INITIAL_NO_AUTH_ACTION_COUNT": "1"} if has_users else {}
        super().__init__({**more, "PYTHONPATH": str(ROOT)})

    def prepare(self) -> None:
        """See Server."""
        client = boto3.client(
            "s3",
            endpoint_url=self.url,
            region_name="us-east-1",
            aws_access_key_id=ACCESS_KEY,
            aws_secret_access_key=SECRET_KEY,
            config=BotoConfig(proxies={}, s3={"addressing_style": "path"}),
        )
        client.create_bucket(Bucket=BUCKET)
        client.close()


class Azurite(Server):
    """A storage account ACCOUNT with the container CONTAINER, that forgets all when it ends."""

    def __init__(self) -> None:
        super().__init__({"AZURITE_ACCOUNTS": f"{ACCOUNT}:{ACCOUNT_KEY}"})

    @property
    def account_url(self) -> str:
        """The address of the account."""
        return f"{self.url}/{ACCOUNT}"

    def command(self) -> Sequence[str]:
        """See Server."""
        program = ROOT / ".venv/azurite/node_modules/.bin/azurite-blob"
        if not program.exists():
            raise RuntimeError("Azurite is not installed; run packaging/azurite.sh once")
        return [
            *(str(program), "--blobHost", "127.0.0.1", "--blobPort", str(self.port)),
            *("--inMemoryPersistence", "--disableTelemetry", "--skipApiVersionCheck", "--silent"),
        ]

    def prepare(self) -> None:
        """See Server."""
        credential = {"account_name": ACCOUNT, "account_key": ACCOUNT_KEY}
        with BlobServiceClient(self.account_url, credential=credential) as client:
            client.create_container(CONTAINER)


def sas(*, expired: bool = False) -> str:
    """A shared access signature for the account of the tests, valid for ever or never more."""
    return generate_account_sas(
        ACCOUNT,
        ACCOUNT_KEY,
        ResourceTypes(object=True, container=True),
        AccountSasPermissions(read=True, write=True, create=True),
        expiry=datetime(2001 if expired else 2999, 1, 1, tzinfo=UTC),
        protocol="https,http",
    )
