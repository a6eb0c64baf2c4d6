"""The MLflow client and the meaning of its errors.

`connect` sets MLflow's environment variables and is the first function that imports mlflow.
"""

import logging
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from msae_sweep.errors import MsaeSweepError
from msae_sweep.track.uri import redact

_ENVIRONMENT = {
    # The sender retries by itself, after it has checked whether a request without an answer was carried out after all.
    # MLflow's own retries do not check that, and would create a run twice.
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",
    # MLflow's default is 120 s. No trial waits for the sender, so the timeout can be long enough to upload a model of
    # 32 MB to a slow store.
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "20",
    # A sweep shows its own progress, so MLflow's output is turned off.
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
}
# 4xx statuses that do not mean that the request itself is wrong: a login is required, or the request came too early or
# too often. Such requests are retried.
_PASSING_STATUS = (401, 403, 407, 408, 425, 429)
# Exceptions that our own code raises if it cannot read or export this model. They would come again on a retry. Clients
# of cloud stores raise exceptions of their own classes.
_OWN_FAULTS = (MsaeSweepError, FileNotFoundError, ValueError, TypeError, LookupError, AttributeError, RuntimeError)


class RejectedByMlflow(Exception):
    """Raised if MLflow will never accept a request, however often it is sent."""


def connect(uri: str) -> Any:
    """Return an `MlflowClient` for `uri`. For a new SQLite file this creates the tables, which takes seconds."""
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    from mlflow import MlflowClient

    for noisy in ("mlflow", "alembic"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    return MlflowClient(tracking_uri=uri, registry_uri=uri)


@contextmanager
def raise_permanent_errors() -> Iterator[None]:
    """Turn permanent errors into `RejectedByMlflow`. Errors that a retry may overcome are raised unchanged."""
    try:
        yield
    except Exception as error:
        if _is_lasting(error):
            raise RejectedByMlflow(one_line(error)) from error
        raise


def has_error_code(error: Exception, *codes: str) -> bool:
    """Return whether an MLflow error has one of these codes, e.g. RESOURCE_ALREADY_EXISTS."""
    return getattr(error, "error_code", None) in codes


def one_line(error: BaseException) -> str:
    """Return an error as one line without secrets, at most 300 characters."""
    text = " ".join(str(error).split()) or type(error).__name__
    # For a server that cannot be reached, MLflow wraps an error of requests, which wraps an error of urllib3.
    if silent := re.match(
        r"API request to (\w+://[^/]+)\S* failed with exception .*(Connection|Timeout|timed out)", text
    ):
        text = f"no answer from {silent[1]}"
    return redact(text)[:300]


def _is_lasting(error: Exception) -> bool:
    status = _http_status(error)
    if status is not None:
        return 400 <= status < 500 and status not in _PASSING_STATUS
    if isinstance(error, OSError):  # e.g. connection errors; errors of requests are OSErrors too
        return isinstance(error, FileNotFoundError)
    return isinstance(error, _OWN_FAULTS)


def _http_status(error: Exception) -> int | None:
    """Return the HTTP status of an error, or None if the error has none.

    MLflow's own errors have the status that its server answered or would have answered. Errors of its artifact proxy
    have a response with a status.
    """
    if hasattr(error, "get_http_status_code"):
        return int(error.get_http_status_code())
    status = getattr(getattr(error, "response", None), "status_code", None)
    return status if isinstance(status, int) else None
