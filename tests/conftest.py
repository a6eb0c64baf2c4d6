"""Fixtures that several test folders share: a local Ray, an S3 server, and the real activations beside the checkout."""

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

# Set this before torch is imported anywhere: threads that wait by spinning take cores from the other processes.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import pytest
import servers
import torch
from servers import S3, in_environment

if not torch.cuda.is_available():
    # Set this before triton is imported anywhere: without a GPU, Triton's kernels run in its interpreter.
    os.environ.setdefault("TRITON_INTERPRET", "1")

# Set these before ray is imported anywhere: tests start throw-away clusters on loopback, which need no token file.
os.environ.setdefault("RAY_AUTH_MODE", "disabled")
os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")

# A shell makes background processes ignore Ctrl-C, and the processes that a test interrupts would inherit that.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

REAL_DATA = Path(__file__).resolve().parents[2] / "shared" / "data"


@pytest.fixture(scope="session")
def real_data() -> Path:
    """Activation folder with the real blocks 5, 20 and 35. Tests are skipped, with the reason, if it is missing."""
    folder = Path(os.environ.get("MSAE_SWEEP_REAL_DATA", REAL_DATA)) / "activations"
    if not folder.is_dir():
        pytest.skip(f"no real activations at {folder}; set MSAE_SWEEP_REAL_DATA to a folder that holds activations/")
    return folder


class ObjectStore(NamedTuple):
    """An S3 server on loopback with one bucket."""

    bucket: str
    """URI of the bucket."""
    environment: dict[str, str]
    """Environment variables that a process needs to use the server."""
    secrets: tuple[str, ...]


@pytest.fixture(scope="session")
def object_store(tmp_path_factory) -> Iterator[ObjectStore]:
    """S3 server whose environment variables are set. Start it before Ray, whose workers inherit the environment."""
    if reason := S3.why_not():
        pytest.skip(reason)
    with S3(tmp_path_factory.mktemp("s3")) as s3, in_environment(s3.environment()):
        yield ObjectStore(s3.bucket, s3.environment(), (s3.key, s3.secret))


@pytest.fixture(scope="session")
def ray_session() -> Iterator[None]:
    """A local Ray with two CPUs for the whole test session."""
    import ray

    # An idle worker is kept for the next test, which saves that test the seconds that its imports would take.
    workers_stay = {"num_workers_soft_limit": 6, "idle_worker_killing_time_threshold_ms": 600_000}
    ray.init(
        address="local", num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR",
        _system_config=workers_stay,
    )  # fmt: skip
    yield
    ray.shutdown()


@pytest.fixture(scope="session")
def empty_database() -> Path:
    """SQLite file with MLflow's tables, which tests copy."""
    return servers.empty_database()
