"""Fixtures for MLflow: SQLite files that are copied from one, made once, and a real server on loopback."""

import os
import shutil
from collections.abc import Iterator

import pytest
from servers import Mlflow

# Set this before mlflow is imported anywhere: clients then give up soon on a server that does not answer.
os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "3")
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")


@pytest.fixture
def uri(empty_database, tmp_path) -> str:
    """Tracking URI of a fresh SQLite file."""
    shutil.copy(empty_database, tmp_path / "mlflow.db")
    return f"sqlite:///{tmp_path / 'mlflow.db'}"


@pytest.fixture(scope="session")
def server(tmp_path_factory, empty_database) -> Iterator[Mlflow]:
    """MLflow server for the whole session. A test that kills it starts it again."""
    folder = tmp_path_factory.mktemp("server")
    shutil.copy(empty_database, folder / "mlflow.db")
    with Mlflow(folder, f"sqlite:///{folder}/mlflow.db") as server:
        yield server
