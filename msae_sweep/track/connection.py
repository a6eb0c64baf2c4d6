"""The one place where mlflow is imported first: an MLflow client, and what its errors mean."""

import logging
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from msae_sweep.errors import MsaeSweepError
from msae_sweep.track.uri import redact

_ENVIRONMENT = {
    # The sender tries again by itself, after looking whether a request that got no answer came through nevertheless.
    # MLflow's own repetition is blind to that, and would create a run twice.
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",
    # MLflow waits 120 s. Nobody waits for the sender, but a model of 32 MB must get through to a slow store.
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "20",
    # A sweep shows its own progress.
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
}
# 4xx answers that say nothing against the request itself: log in first, come back later, not so fast.
_PASSING_STATUS = (401, 403, 407, 408, 425, 429)
# What our own reading and exporting of a model raises for this model; clients of cloud stores have their own classes.
_OWN_FAULTS = (MsaeSweepError, FileNotFoundError, ValueError, TypeError, LookupError, AttributeError, RuntimeError)


class RejectedByMlflow(Exception):
    """MLflow will never take this, however often it is sent."""


def connect(uri: str) -> Any:
    """An `MlflowClient` for `uri`; a SQLite file gets its tables here, which takes seconds."""
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    from mlflow import MlflowClient

    for noisy in ("mlflow", "alembic"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    return MlflowClient(tracking_uri=uri, registry_uri=uri)


@contextmanager
def refusals() -> Iterator[None]:
    """Turn errors that would come again for ever into `RejectedByMlflow`; what may pass is raised as it is."""
    try:
        yield
    except Exception as error:
        if _is_lasting(error):
            raise RejectedByMlflow(one_line(error)) from error
        raise


def is_code(error: Exception, *codes: str) -> bool:
    """Whether an MLflow error has one of these codes, e.g. RESOURCE_ALREADY_EXISTS."""
    return getattr(error, "error_code", None) in codes


def one_line(error: BaseException) -> str:
    """An error as one line without secrets, at most 300 characters."""
    text = " ".join(str(error).split()) or type(error).__name__
    # MLflow wraps what requests wraps what urllib3 says of a server that is not there.
    if silent := re.match(
        r"API request to (\w+://[^/]+)\S* failed with exception .*(Connection|Timeout|timed out)", text
    ):
        text = f"no answer from {silent[1]}"
    return redact(text)[:300]


def _is_lasting(error: Exception) -> bool:
    status = _http_status(error)
    if status is not None:
        return 400 <= status < 500 and status not in _PASSING_STATUS
    if isinstance(error, OSError):  # connections; requests' errors are OSErrors too
        return isinstance(error, FileNotFoundError)
    return isinstance(error, _OWN_FAULTS)


def _http_status(error: Exception) -> int | None:
    """Status that MLflow's server answered, or would have: its own errors, and those of its artifact proxy."""
    if hasattr(error, "get_http_status_code"):
        return int(error.get_http_status_code())
    status = getattr(getattr(error, "response", None), "status_code", None)
    return status if isinstance(status, int) else None
