"""Where MLflow is: the tracking URI, resolved once, and shown without its secrets."""

import os
import re
from collections.abc import Mapping
from importlib.metadata import entry_points
from pathlib import Path
from urllib.parse import urlsplit

from msae_sweep.errors import ConfigError

_SQLITE = "sqlite:///"
# What MLflow registers by itself (`mlflow.tracking._tracking_service.utils`); `+driver` may follow a database.
_DATABASES = ("postgresql", "mysql", "mssql")
_DATABRICKS = ("databricks", "databricks-uc", "uc")
_WRITE = "write sqlite:///mlflow.db, the http:// address of a tracking server, or a database's URI"
# Neither part crosses a quote, a blank or a backslash, so that both are safe on a line of JSON that holds YAML.
_USER_INFO = re.compile(r"(?<=://)[^/\s\"'\\]*@")
_SECRET_PARAMETER = re.compile(r"([?&](?:password|passwd|pwd|token|secret|access_key|sig)=)[^&\s\"'\\]+", re.IGNORECASE)


def resolve_uri(configured: str | None, environ: Mapping[str, str] = os.environ) -> str:
    """The tracking URI: `configured`, else MLFLOW_TRACKING_URI, else `mlflow.db` in the working folder.

    A SQLite path is made absolute, because the working folder is not the same everywhere in a sweep.

    Raises:
        ConfigError: a folder or `file:` URI, which MLflow no longer writes to; a scheme that MLflow does not know; or a
            URI that lacks its host or path.
    """
    uri = configured or environ.get("MLFLOW_TRACKING_URI") or f"{_SQLITE}mlflow.db"
    scheme = _scheme(uri)
    if scheme in ("", "file"):
        raise ConfigError(f"{_named(uri)} is a folder, and MLflow has retired its file store; {_WRITE}")
    base = scheme.partition("+")[0]
    if base == "sqlite":
        return _absolute(uri)
    if scheme in ("http", "https"):
        _check_address(uri)
    elif not (scheme in _DATABRICKS or base in _DATABASES or scheme in _plugins()):
        raise ConfigError(f"{_named(uri)}: MLflow knows no scheme {scheme}; {_WRITE}")
    return uri


def _scheme(uri: str) -> str:
    """The scheme, lower-case; empty for a path (on Windows, too, where a drive looks like one)."""
    if uri in _DATABRICKS:
        return uri
    match = re.match(r"([A-Za-z][A-Za-z0-9+.-]+):", uri)
    return match[1].lower() if match else ""


def _absolute(uri: str) -> str:
    if not uri.startswith(_SQLITE):
        if "+" in uri.partition(":")[0]:  # with a driver, whose path is its own affair
            return uri
        raise ConfigError(f"{_named(uri)}: SQLite wants three slashes before a path; {_WRITE}")
    path, mark, query = uri.removeprefix(_SQLITE).partition("?")
    if path in ("", ":memory:"):
        raise ConfigError(f"{_named(uri)} names no file, and what is in memory would be lost; {_WRITE}")
    return f"{_SQLITE}{Path(path).absolute()}{mark}{query}"


def _check_address(uri: str) -> None:
    try:
        parts = urlsplit(uri)
        is_address = bool(parts.hostname) and parts.port != 0
    except ValueError:  # a bracket that is not closed, a port that is no number up to 65535
        is_address = False
    if not is_address:
        raise ConfigError(f"{_named(uri)} has no host, or no port that can be; write e.g. http://mlflow:5000")


def _plugins() -> set[str]:
    """Schemes of the tracking stores that installed packages bring along."""
    return {entry.name for entry in entry_points(group="mlflow.tracking_store")}


def _named(uri: str) -> str:
    return f"tracking.uri: {redact(uri)}"


def artifact_root(uri: str) -> str | None:
    """Where a new experiment keeps its artifacts: beside a SQLite file; None leaves it to the server.

    Without it MLflow takes a folder relative to the working folder of whoever asks first.
    """
    if not uri.startswith(_SQLITE):
        return None
    database = Path(uri.removeprefix(_SQLITE).partition("?")[0])
    return (database.parent / "mlartifacts").as_uri()


def redact(text: str) -> str:
    """`text` with `***` for user and password, or a token, in any URI within it."""
    return _SECRET_PARAMETER.sub(r"\1***", _USER_INFO.sub("***@", text))
