"""Servers that tests start, kill and start again: an S3 store, PostgreSQL, MLflow, and a proxy that makes one slow.

Each dies with the process that started it.
"""

import contextlib
import os
import pwd
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import psutil

POSTGRES_TOOLS = ("initdb", "postgres")


def free_port() -> int:
    """A port of loopback that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def wait_for(condition: Callable[[], Any], seconds: float, what: str) -> Any:
    """The first true value of `condition`."""
    deadline = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < deadline, f"{what}: not within {seconds:g} s"
        time.sleep(0.1)
    return value


class Process:
    """A server's process and its children, with a log."""

    def __init__(self, command: list[str], log: Path, ready: Callable[[], bool], **options: Any) -> None:
        """Start, and wait until `ready`; `options` as of `subprocess.Popen`."""
        if tied := shutil.which("setpriv"):
            command = [tied, "--pdeathsig", "KILL", *command]
        with open(log, "ab") as out:
            self._process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=out, stderr=out, **options)

        def is_up() -> bool:
            assert self._process.poll() is None, f"{command}: {log.read_text()[-2000:]}"
            return ready()

        try:
            wait_for(is_up, 240, str(log))
        except BaseException:
            self.kill()
            raise

    def kill(self) -> None:
        """SIGKILL to all of it."""
        with contextlib.suppress(psutil.NoSuchProcess):
            root = psutil.Process(self._process.pid)
            family = [root, *root.children(recursive=True)]
            for process in family:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
            self._process.wait()
            psutil.wait_procs(family, timeout=30)


class Server:
    """Something that listens at a port; a context manager."""

    def __init__(self, folder: Path, address: str = "127.0.0.1") -> None:
        """Nothing runs yet; `folder` holds its log and its data."""
        self.folder, self.address, self.port = folder, address, free_port()
        self._process: Process | None = None
        folder.mkdir(parents=True, exist_ok=True)

    def __enter__(self) -> Any:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()

    def start(self) -> None:
        """Start, with the data of the last time."""
        raise NotImplementedError

    def kill(self) -> None:
        """kill -9, if it runs."""
        if self._process is not None:
            self._process.kill()
            self._process = None

    @property
    def log(self) -> str:
        """What it printed."""
        return (self.folder / "log").read_text()

    def _answers(self, path: str) -> bool:
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with contextlib.suppress(OSError), opener.open(f"http://{self.address}:{self.port}{path}", timeout=2):
            return True
        return False


class S3(Server):
    """moto's S3 server with one bucket, which lives as long as its process."""

    key, secret = "AKIAOBVIOUSLYATEST", "thesecretofthesecrets"
    bucket = "s3://bucket"

    @staticmethod
    def why_not() -> str | None:
        """Why there can be none, or None."""
        return None if _moto() else "no moto_server; pip install 'moto[server]'"

    @property
    def endpoint(self) -> str:
        """What clients are told."""
        return f"http://{self.address}:{self.port}"

    def environment(self, endpoint: str | None = None) -> dict[str, str]:
        """What a process needs to use it; `endpoint` is that of a proxy before it."""
        return {
            "AWS_ACCESS_KEY_ID": self.key,
            "AWS_SECRET_ACCESS_KEY": self.secret,
            "AWS_ENDPOINT_URL": endpoint or self.endpoint,
            "AWS_REGION": "us-east-1",
            "AWS_DEFAULT_REGION": "us-east-1",
        }

    def start(self) -> None:
        command = [_moto(), "-H", self.address, "-p", str(self.port)]
        self._process = Process(command, self.folder / "log", lambda: self._answers("/moto-api/"))
        request = urllib.request.Request(f"{self.endpoint}/bucket", method="PUT")
        urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request).close()


def _moto() -> str:
    return shutil.which("moto_server", path=str(Path(sys.executable).parent)) or shutil.which("moto_server") or ""


class Postgres(Server):
    """PostgreSQL on loopback, as a user of its own where this process is root."""

    def __init__(self) -> None:
        """Nothing runs yet; its data lies where that user gets at it."""
        super().__init__(Path(tempfile.mkdtemp(prefix="msae-postgres-")))
        self._as_user: dict[str, Any] = {}
        if os.geteuid() == 0:
            user = pwd.getpwnam("nobody")
            self._as_user = {"user": user.pw_uid, "group": user.pw_gid, "extra_groups": []}
            os.chown(self.folder, user.pw_uid, user.pw_gid)
        command = ["initdb", "--pgdata", str(self._data), "--username=mlflow", "--auth=trust", "--encoding=UTF8"]
        done = subprocess.run(
            command, capture_output=True, text=True, cwd=self.folder, env=self._environment, **self._as_user
        )
        assert done.returncode == 0, done.stderr

    @staticmethod
    def why_not() -> str | None:
        """Why there can be none, or None."""
        if missing := [tool for tool in POSTGRES_TOOLS if shutil.which(tool) is None]:
            return f"PostgreSQL's {', '.join(missing)} not on the path"
        try:
            import psycopg2  # noqa: F401 - SQLAlchemy's driver
        except ImportError:
            return "no psycopg2; pip install psycopg2-binary"
        return None

    def __exit__(self, *_: object) -> None:
        self.kill()
        shutil.rmtree(self.folder, ignore_errors=True)

    @property
    def uri(self) -> str:
        """SQLAlchemy's."""
        return f"postgresql+psycopg2://mlflow@{self.address}:{self.port}/postgres"

    def start(self) -> None:
        command = ["postgres", "-D", str(self._data), "-p", str(self.port), "-h", self.address, "-k", str(self.folder)]
        self._process = Process(
            command, self.folder / "log", self._accepts, cwd=self.folder, env=self._environment, **self._as_user
        )

    def _accepts(self) -> bool:
        import psycopg2

        try:
            psycopg2.connect(host=self.address, port=self.port, user="mlflow", dbname="postgres").close()
        except psycopg2.OperationalError:
            return False
        return True

    @property
    def _data(self) -> Path:
        return self.folder / "data"

    @property
    def _environment(self) -> dict[str, str]:
        return {"PATH": os.environ["PATH"], "LC_ALL": "C"}


class Mlflow(Server):
    """A real `mlflow server`, which hands artifacts on, so that who logs to it needs no key."""

    def __init__(
        self,
        folder: Path,
        backend: str,
        *,
        artifacts: str | None = None,
        environment: dict[str, str] | None = None,
        address: str = "127.0.0.1",
        workers: int = 1,
    ) -> None:
        """Nothing runs yet.

        Args:
            backend: SQLAlchemy's URI of the database.
            artifacts: where they lie; without, in a folder.
            environment: besides this process's.
        """
        super().__init__(folder, address)
        self._backend, self._artifacts, self._workers = backend, artifacts or str(folder / "artifacts"), workers
        # What runs jobs in the server is half a dozen processes that nobody needs here.
        self._environment = {**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", **(environment or {})}

    @property
    def uri(self) -> str:
        """What clients are told."""
        return f"http://{self.address}:{self.port}"

    def start(self) -> None:
        command = [sys.executable, "-m", "mlflow", "server", "--workers", str(self._workers)]
        command += ["--host", self.address, "--port", str(self.port), "--backend-store-uri", self._backend]
        command += ["--artifacts-destination", self._artifacts, "--allowed-hosts", f"{self.address}:{self.port}"]
        self._process = Process(
            command, self.folder / "log", lambda: self._answers("/health"), cwd=self.folder, env=self._environment
        )


class SlowProxy:
    """A TCP proxy before a server of requests and answers, which holds each answer back for `delay_seconds`."""

    def __init__(self, address: str, port: int) -> None:
        """Before the server at `127.0.0.1:port`, listening at `address`."""
        self.delay_seconds = 0.0
        self.n_answers = 0
        self._target = ("127.0.0.1", port)
        self._listener = socket.create_server((address, 0))
        self.endpoint = f"http://{address}:{self._listener.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        """Accept no more."""
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        asked = threading.Event()
        with contextlib.suppress(OSError), client, socket.create_connection(self._target) as server:

            def bring_questions() -> None:
                with contextlib.suppress(OSError):
                    while data := client.recv(1 << 16):
                        asked.set()
                        server.sendall(data)
                    server.shutdown(socket.SHUT_WR)

            threading.Thread(target=bring_questions, daemon=True).start()
            while data := server.recv(1 << 16):
                if asked.is_set():
                    asked.clear()
                    self.n_answers += 1
                    time.sleep(self.delay_seconds)
                client.sendall(data)


@contextlib.contextmanager
def in_environment(changes: dict[str, str]) -> Iterator[None]:
    """`os.environ` with `changes`, as long as this is open."""
    before = {key: os.environ.get(key) for key in changes}
    os.environ.update(changes)
    try:
        yield
    finally:
        for key, value in before.items():
            os.environ.pop(key) if value is None else os.environ.__setitem__(key, value)


@cache
def _empty_database() -> tuple[tempfile.TemporaryDirectory[str], Path]:
    from msae_sweep.track.connection import connect

    folder = tempfile.TemporaryDirectory(prefix="msae-empty-")
    path = Path(folder.name) / "mlflow.db"
    connect(f"sqlite:///{path}").search_experiments()
    return folder, path


def empty_database() -> Path:
    """A SQLite file with MLflow's tables, which take seconds to make; to be copied, made once a process."""
    return _empty_database()[1]
