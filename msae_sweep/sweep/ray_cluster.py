"""Connects to Ray: to the cluster that RAY_ADDRESS names, or else to a Ray that is started for this process alone."""

import atexit
import contextlib
import logging
import os
import shutil
import socket
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import ray

from msae_sweep import signals
from msae_sweep.errors import SweepError, first_line
from msae_sweep.patching import patched

CLUSTER_SECONDS = 10.0
"""Seconds that a cluster that RAY_ADDRESS names may take to answer, e.g. while its head node starts again."""

LOOPBACK = "127.0.0.1"

_session: Path | None = None
"""Session folder, with logs and spilled objects, of the Ray that `connect` has started; None if it started none."""
_keep_session = False


def connect(say: Callable[[str], None] = lambda line: print(line, file=sys.stderr)) -> None:
    """Connect to the cluster that RAY_ADDRESS names (`auto`: the one of this node), else start Ray on this machine.

    A Ray that is started here listens on loopback only. If the process is connected already, the connection is kept.

    Args:
        say: takes a line for the user.

    Raises:
        SweepError: no cluster answers at the address, the cluster rejects this process, or Ray does not start.
    """
    global _session
    _keep_tune_quiet()
    if ray.is_initialized():
        return
    address = cluster_address()
    where = f"RAY_ADDRESS {address}: no Ray cluster there" if address else "Ray does not start on this machine"
    if tightened := _make_token_private():
        say(f"{tightened}: other users could read this Ray token; now only you can")
    options: dict[str, Any] = {"include_dashboard": False, "log_to_driver": False, "logging_level": "ERROR"}
    with contextlib.ExitStack() as stack:
        if address:
            options["address"] = _answering(address)
        else:
            # Ray's servers listen on all interfaces unless the node's address is loopback, and ray.init would replace
            # a loopback address by the machine's network address.
            stack.enter_context(patched("ray._private.services", "resolve_ip_for_localhost", lambda host: host))
            options |= {"address": "local", "_node_ip_address": LOOPBACK}
            options |= {"_system_config": {"enable_metrics_collection": False}}
            stack.enter_context(_without_metrics_pages())
        if signals.sigterm_handled_here():
            stack.enter_context(patched("ray._private.utils", "set_sigterm_handler", lambda handler: None))
        try:
            context = _start_or_connect(options, say)
        except Exception as error:
            # ray.init raises many kinds: ValueError, ConnectionError, RuntimeError, and plain Exception.
            raise SweepError(f"{where}: {first_line(error)}") from error
        finally:
            # Ray's C++ part handles SIGTERM too: it prints its stack, and aborts the process after three seconds.
            signals.reclaim_sigterm()
    if not address:
        _session = Path(context.address_info["session_dir"])
    _make_token_private()


def _start_or_connect(options: dict[str, Any], say: Callable[[str], None]) -> Any:
    """Call `ray.init`, and once more if Ray was too slow to start; its limit of 30 s cannot be set.

    Starting takes that long only where other programs keep all cores busy.
    """
    try:
        return ray.init(**options)
    except Exception as error:
        if "timed out during startup" not in str(error):
            raise
    say("Ray did not start within 30 s, because this machine is busy; trying again")
    return ray.init(**options)


def cluster_address() -> str | None:
    """Return the address in RAY_ADDRESS, which every Ray job sets; None if Ray is to be started on this machine."""
    address = os.environ.get("RAY_ADDRESS", "")
    return None if address in ("", "local") else address


def keep_session() -> None:
    """Make `disconnect` keep Ray's logs, because something failed."""
    global _keep_session
    _keep_session = True


def disconnect(*, keep_session: bool = False) -> None:
    """Shut down a Ray that `connect` has started, and remove its session folder unless the logs are to be kept."""
    global _session
    session, _session = _session, None
    if session is None:
        return
    ray.shutdown()
    if not (keep_session or _keep_session):
        # Ray's processes may still be writing their last lines.
        shutil.rmtree(session, ignore_errors=True)


def abandon() -> None:
    """Let this process end without `ray.shutdown`; Ray notices by itself that the process has ended.

    Ray aborts a process that shuts it down while a thread still uses it, as a thread that prepares data may.
    """
    atexit.unregister(ray.shutdown)


def _keep_tune_quiet() -> None:
    # By default Tune prints its own table and writes its own logs; neither is wanted, whoever has started Ray.
    os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")
    os.environ.setdefault("TUNE_DISABLE_AUTO_CALLBACK_LOGGERS", "1")
    # `SweepCallback` prints a trial's error in one line; the trial's folder under tune/ keeps the whole error.
    os.environ.setdefault("TUNE_PRINT_ALL_TRIAL_ERRORS", "0")
    # If one task's error ends the sweep, other tasks' errors are never retrieved, and Ray would print them.
    os.environ.setdefault("RAY_IGNORE_UNHANDLED_ERRORS", "1")
    # Nothing is read back from Tune's snapshots of its own state.
    os.environ.setdefault("TUNE_GLOBAL_CHECKPOINT_S", "600")
    os.environ.setdefault("TUNE_WARN_EXCESSIVE_EXPERIMENT_CHECKPOINT_SYNC_THRESHOLD_S", "0")
    # A snapshot may fail if a sweep ends soon after it began, or if the disk is full.
    logging.getLogger("ray.tune.execution.experiment_state").setLevel(logging.CRITICAL)
    # At the end, Tune logs a warning for every trial of which it has no log.
    logging.getLogger("ray.tune.analysis.experiment_analysis").setLevel(logging.ERROR)


@contextlib.contextmanager
def _without_metrics_pages() -> Iterator[None]:
    """Keep Ray processes that start inside this context from serving metrics pages, which require no token.

    Ray has no option for this, but it goes on without a page whose port is invalid. A port that the user has set is
    kept.
    """
    pages = [name for name in ("AUTOSCALER_METRIC_PORT", "DASHBOARD_METRIC_PORT") if name not in os.environ]
    os.environ.update(dict.fromkeys(pages, "-1"))
    try:
        yield
    finally:
        for name in pages:
            os.environ.pop(name, None)


def _make_token_private() -> Path | None:
    """Make Ray's token file readable by its owner only; by default, every user of the machine can read it.

    Returns:
        The token file if its permissions had to be changed, else None.
    """
    file = Path.home() / ".ray" / "auth_token"
    with contextlib.suppress(OSError):
        status = file.stat()
        if status.st_mode & 0o077 and status.st_uid == os.getuid():
            file.chmod(0o600)
            return file
    return None


def _answering(address: str) -> str:
    """Return host and port of the cluster that `address` names, once it answers and accepts this process.

    Ray itself would try for minutes, and print one line per second.

    Raises:
        SweepError: there is no cluster, or it does not answer or accept this process.
    """
    if address.startswith("ray://"):
        _reach(address.removeprefix("ray://"), address)
        return address
    found = _of_this_node() if address == "auto" else address
    _reach(found, address)
    _enter(found, address)
    return found


def _of_this_node() -> str:
    """Return the address that Ray takes for `auto`: the cluster that `ray start` started last here, or the only one.

    Raises:
        SweepError: no cluster runs on this node.
    """
    from ray._private import services
    from ray._private.authentication.authentication_token_setup import maybe_enable_token_auth_if_token_available

    try:
        services.find_gcs_addresses.cache_clear()
        found = services.canonicalize_bootstrap_address("auto")
    except (ConnectionError, ValueError):
        reason = "no Ray cluster runs on this node; start one with `ray start --head`, or unset RAY_ADDRESS"
        raise SweepError(f"RAY_ADDRESS auto: {reason}") from None
    # ray.init does this for `auto` only; here its warning is left out.
    logging.getLogger("ray._private.authentication").setLevel(logging.ERROR)
    maybe_enable_token_auth_if_token_available(warn_if_disabled=False)
    return str(found)


def _reach(found: str, address: str) -> None:
    """Wait until a server accepts connections at `found`.

    Raises:
        SweepError: none does within `CLUSTER_SECONDS`.
    """
    host, _, port = found.rpartition(":")
    if not port.isdigit():  # ray.init reports what is wrong with the address
        return
    deadline = time.monotonic() + CLUSTER_SECONDS
    while True:
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=CLUSTER_SECONDS).close()
        except OSError as error:
            if time.monotonic() > deadline:
                raise _refused(found, address, first_line(error)) from error
            time.sleep(0.5)
        else:
            return


def _enter(found: str, address: str) -> None:
    """Request the cluster id from the server at `found`, to check that it is Ray and accepts this process's token.

    Raises:
        SweepError: the server is not Ray, or it rejects the token.
    """
    try:
        import grpc
        from ray._private.grpc_utils import init_grpc_channel
        from ray.core.generated import gcs_service_pb2, gcs_service_pb2_grpc
    except ImportError:  # this is another version of Ray; ray.init reports errors then
        return
    # Ray itself does not use a proxy either.
    with init_grpc_channel(found, options=[("grpc.enable_http_proxy", 0)]) as channel:
        stub = gcs_service_pb2_grpc.NodeInfoGcsServiceStub(channel)
        try:
            stub.GetClusterId(gcs_service_pb2.GetClusterIdRequest(), timeout=CLUSTER_SECONDS)
        except grpc.RpcError as error:
            if error.code() in (grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.PERMISSION_DENIED):
                reason = "the cluster rejects your token; set RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN to its token"
                raise SweepError(f"RAY_ADDRESS {_both(found, address)}: {reason}") from None
            raise _refused(found, address, first_line(Exception(error.details()))) from None


def _refused(found: str, address: str, reason: str) -> SweepError:
    return SweepError(f"RAY_ADDRESS {_both(found, address)}: no Ray cluster there: {reason}")


def _both(found: str, address: str) -> str:
    return address if found == address else f"{address} ({found})"
