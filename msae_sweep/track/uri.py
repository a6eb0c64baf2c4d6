"""Where MLflow is: the tracking URI, resolved once, and shown without its secrets."""

import os
import re
from collections.abc import Mapping
from pathlib import Path

from msae_sweep.errors import ConfigError

_SQLITE = "sqlite:///"
# Neither part crosses a quote, a blank or a backslash, so that both are safe on a line of JSON that holds YAML.
_USER_INFO = re.compile(r"(?<=://)[^/\s\"'\\]*@")
_SECRET_PARAMETER = re.compile(r"([?&](?:password|passwd|pwd|token|secret|access_key|sig)=)[^&\s\"'\\]+", re.IGNORECASE)


def resolve_uri(configured: str | None, environ: Mapping[str, str] = os.environ) -> str:
    """The tracking URI: `configured`, else MLFLOW_TRACKING_URI, else `mlflow.db` in the working folder.

    A SQLite path is made absolute, because the working folder is not the same everywhere in a sweep.

    Raises:
        ConfigError: a folder or `file:` URI, which MLflow no longer writes to.
    """
    uri = configured or environ.get("MLFLOW_TRACKING_URI") or f"{_SQLITE}mlflow.db"
    if uri.startswith(_SQLITE):
        path, mark, query = uri.removeprefix(_SQLITE).partition("?")
        return f"{_SQLITE}{Path(path).absolute()}{mark}{query}"
    is_databricks = uri.partition(":")[0] in ("databricks", "databricks-uc")
    if uri.startswith("file:") or not (is_databricks or re.match(r"[A-Za-z][A-Za-z0-9+.-]*:", uri)):
        raise ConfigError(
            f"tracking.uri: {redact(uri)} is a folder, and MLflow has retired its file store; "
            "write sqlite:///mlflow.db, or the http:// address of a tracking server"
        )
    return uri


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
