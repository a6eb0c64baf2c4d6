"""Resolution of the MLflow tracking URI, and removal of secrets before a URI is shown."""

import os
import re
from collections.abc import Mapping
from importlib.metadata import entry_points
from pathlib import Path
from urllib.parse import urlsplit

from msae_sweep.errors import ConfigError

_SQLITE = "sqlite:///"
# Schemes that MLflow registers itself (`mlflow.tracking._tracking_service.utils`). `+driver` may follow a database's.
_DATABASES = ("postgresql", "mysql", "mssql")
_DATABRICKS = ("databricks", "databricks-uc", "uc")
_WRITE = "write sqlite:///mlflow.db, the http:// address of a tracking server, or a database's URI"
# Neither pattern matches across a quote, a blank or a backslash, so both are safe on a line of JSON that holds YAML.
_USER_INFO = re.compile(r"(?<=://)[^/\s\"'\\]*@")
_SECRET_PARAMETER = re.compile(r"([?&](?:password|passwd|pwd|token|secret|access_key|sig)=)[^&\s\"'\\]+", re.IGNORECASE)


def resolve_uri(configured: str | None, environ: Mapping[str, str] = os.environ) -> str:
    """Return the tracking URI: `configured`, else MLFLOW_TRACKING_URI, else `mlflow.db` in the working folder.

    A SQLite path is made absolute, because the processes of a sweep have different working folders.

    Raises:
        ConfigError: the URI is a folder or a `file:` URI, to which MLflow no longer writes; or MLflow does not know its
            scheme; or its host or path is missing.
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
        raise ConfigError(f"{_named(uri)}: MLflow does not support the scheme {scheme}; {_WRITE}")
    return uri


def _scheme(uri: str) -> str:
    """Return the scheme in lower case, or "" for a path (also on Windows, where a drive looks like a scheme)."""
    if uri in _DATABRICKS:
        return uri
    match = re.match(r"([A-Za-z][A-Za-z0-9+.-]+):", uri)
    return match[1].lower() if match else ""


def _absolute(uri: str) -> str:
    if not uri.startswith(_SQLITE):
        if "+" in uri.partition(":")[0]:  # each driver has its own form of path
            return uri
        raise ConfigError(f"{_named(uri)}: SQLite needs three slashes before a path; {_WRITE}")
    path, mark, query = uri.removeprefix(_SQLITE).partition("?")
    if path in ("", ":memory:"):
        raise ConfigError(f"{_named(uri)} names no file, and a database in memory would be lost; {_WRITE}")
    return f"{_SQLITE}{Path(path).absolute()}{mark}{query}"


def _check_address(uri: str) -> None:
    try:
        parts = urlsplit(uri)
        is_address = bool(parts.hostname) and parts.port != 0
    except ValueError:  # e.g. a bracket that is not closed, or a port that is not a number up to 65535
        is_address = False
    if not is_address:
        raise ConfigError(f"{_named(uri)} has no host, or no valid port; write e.g. http://mlflow:5000")


def _plugins() -> set[str]:
    """Return the schemes of the tracking stores that installed packages add to MLflow."""
    return {entry.name for entry in entry_points(group="mlflow.tracking_store")}


def _named(uri: str) -> str:
    return f"tracking.uri: {redact(uri)}"


def artifact_root(uri: str) -> str | None:
    """Return the URI of the artifact folder of a new experiment: `mlartifacts` beside a SQLite file.

    For any other store, return None, which leaves the choice to the server. Without an explicit URI for a SQLite file,
    MLflow would take a folder relative to the working folder of the process that creates the experiment.
    """
    if not uri.startswith(_SQLITE):
        return None
    database = Path(uri.removeprefix(_SQLITE).partition("?")[0])
    return (database.parent / "mlartifacts").as_uri()


def redact(text: str) -> str:
    """Return `text` with `***` in place of user and password, or of a token, in every URI in it."""
    return _SECRET_PARAMETER.sub(r"\1***", _USER_INFO.sub("***@", text))
