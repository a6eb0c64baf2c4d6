"""Servers that tests start, kill and restart: an S3 store, PostgreSQL, MLflow, and a proxy that slows a server down.

Where `setpriv` is installed, each server dies with the process that started it.
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
    """Return a port of loopback on which nothing listens."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def wait_for(condition: Callable[[], Any], seconds: float, what: str) -> Any:
    """Poll `condition` and return its first true value. Fail if that takes more than `seconds`."""
    deadline = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < deadline, f"{what}: not within {seconds:g} s"
        time.sleep(0.1)
    return value


class Process:
    """Process of a server, with its children and a log file."""

    def __init__(self, command: list[str], log: Path, ready: Callable[[], bool], **options: Any) -> None:
        """Start `command` and wait until `ready` returns True. `options` are those of `subprocess.Popen`."""
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
        """Send SIGKILL to the process and all its children."""
        with contextlib.suppress(psutil.NoSuchProcess):
            root = psutil.Process(self._process.pid)
            family = [root, *root.children(recursive=True)]
            for process in family:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
            self._process.wait()
            psutil.wait_procs(family, timeout=30)


class Server:
    """Server that listens on a port. As a context manager, it is started on entry and killed on exit."""

    def __init__(self, folder: Path, address: str = "127.0.0.1") -> None:
        """Prepare the server without starting it. `folder` holds its log and its data."""
        self.folder, self.address, self.port = folder, address, free_port()
        self._process: Process | None = None
        folder.mkdir(parents=True, exist_ok=True)

    def __enter__(self) -> Any:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()

    def start(self) -> None:
        """Start the server with the data that its last run left."""
        raise NotImplementedError

    def kill(self) -> None:
        """Send SIGKILL to the server if it is running."""
        if self._process is not None:
            self._process.kill()
            self._process = None

    @property
    def log(self) -> str:
        """Everything that the server has printed."""
        return (self.folder / "log").read_text()

    def _answers(self, path: str) -> bool:
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with contextlib.suppress(OSError), opener.open(f"http://{self.address}:{self.port}{path}", timeout=2):
            return True
        return False


class S3(Server):
    """moto's S3 server with one bucket, whose content is lost when the process ends."""

    key, secret = "AKIAOBVIOUSLYATEST", "thesecretofthesecrets"
    bucket = "s3://bucket"

    @staticmethod
    def why_not() -> str | None:
        """Return the reason why the server cannot run here, or None if it can."""
        return None if _moto() else "no moto_server; pip install 'moto[server]'"

    @property
    def endpoint(self) -> str:
        """URL that clients connect to."""
        return f"http://{self.address}:{self.port}"

    def environment(self, endpoint: str | None = None) -> dict[str, str]:
        """Return the environment variables to reach the server, or a proxy in front of it at `endpoint`."""
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
    """PostgreSQL on loopback. If this process is root, the server runs as the user `nobody`."""

    def __init__(self) -> None:
        """Create the database in a folder that the server's user can access. The server is not started."""
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
        """Return the reason why the server cannot run here, or None if it can."""
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
        """URI of the database for SQLAlchemy."""
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
    """A real `mlflow server`, which passes artifacts on to their store, so that its clients need no key."""

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
        """Prepare the server without starting it.

        Args:
            backend: SQLAlchemy URI of the database.
            artifacts: folder or URI for artifacts; by default, the folder `artifacts` inside `folder`.
            environment: environment variables that are set in addition to those of this process.
        """
        super().__init__(folder, address)
        self._backend, self._artifacts, self._workers = backend, artifacts or str(folder / "artifacts"), workers
        # To run jobs, the server would start half a dozen processes, which no test needs.
        self._environment = {**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", **(environment or {})}

    @property
    def uri(self) -> str:
        """URL that clients connect to."""
        return f"http://{self.address}:{self.port}"

    def start(self) -> None:
        command = [sys.executable, "-m", "mlflow", "server", "--workers", str(self._workers)]
        command += ["--host", self.address, "--port", str(self.port), "--backend-store-uri", self._backend]
        command += ["--artifacts-destination", self._artifacts, "--allowed-hosts", f"{self.address}:{self.port}"]
        self._process = Process(
            command, self.folder / "log", lambda: self._answers("/health"), cwd=self.folder, env=self._environment
        )


class SlowProxy:
    """TCP proxy in front of a request-response server, which delays each response by `delay_seconds`."""

    def __init__(self, address: str, port: int) -> None:
        """Listen on a free port of `address` and forward to the server at `127.0.0.1:port`."""
        self.delay_seconds = 0.0
        self.n_answers = 0
        self._target = ("127.0.0.1", port)
        self._listener = socket.create_server((address, 0))
        self.endpoint = f"http://{address}:{self._listener.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        """Stop accepting connections."""
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
    """Set the environment variables in `changes` while the context is open."""
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
    """Return a SQLite file with MLflow's tables, to be copied. It takes seconds and is made once per process."""
    return _empty_database()[1]
