"""Tests that a command connects to the right Ray, and that a problem with a cluster is one line within seconds."""

import signal
import socket
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import grpc
import pytest

from msae_sweep.errors import SweepError
from msae_sweep.signals import sigterm_as_ctrl_c
from msae_sweep.sweep import ray_cluster


@pytest.fixture(autouse=True)
def alone(tmp_path, monkeypatch):
    """Simulate a machine without a running Ray and without RAY_ADDRESS, and with a new home folder."""
    monkeypatch.setattr(ray_cluster.ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray_cluster, "CLUSTER_SECONDS", 0.2)
    monkeypatch.setattr(ray_cluster, "_session", None)
    monkeypatch.setattr(ray_cluster, "_keep_session", False)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))


class Init:
    """Replacement for ray.init that records the options of its call."""

    def __init__(self, session: Path) -> None:
        self.session, self.options = session, {}

    def __call__(self, **options):
        self.options = options
        self.session.mkdir()
        (self.session / "logs").write_text("what went wrong")
        return SimpleNamespace(address_info={"session_dir": str(self.session)})


@pytest.fixture
def init(tmp_path, monkeypatch) -> Init:
    init = Init(tmp_path / "session")
    monkeypatch.setattr(ray_cluster.ray, "init", init)
    monkeypatch.setattr(ray_cluster.ray, "shutdown", lambda: None)
    return init


@pytest.mark.parametrize("address", [None, "", "local"])
def test_without_an_address_ray_is_started_here_whatever_else_runs_on_the_machine(init, monkeypatch, address):
    if address is not None:
        monkeypatch.setenv("RAY_ADDRESS", address)
    ray_cluster.connect()
    assert init.options["address"] == "local"
    assert init.options["_node_ip_address"] == "127.0.0.1"


def test_what_a_ray_started_here_wrote_is_removed_unless_something_failed(init):
    ray_cluster.connect()
    ray_cluster.disconnect()
    assert not init.session.exists()
    ray_cluster.connect()
    ray_cluster.disconnect(keep_session=True)
    assert (init.session / "logs").exists()


def test_a_failed_trial_keeps_what_ray_wrote(init):
    ray_cluster.connect()
    ray_cluster.keep_session()
    ray_cluster.disconnect()
    assert (init.session / "logs").exists()


def test_nothing_of_a_cluster_is_ended_or_removed(init, monkeypatch):
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    monkeypatch.setattr(ray_cluster, "_answering", lambda address: address)
    monkeypatch.setattr(ray_cluster.ray, "shutdown", lambda: pytest.fail("it ends with the process"))
    ray_cluster.connect()
    assert init.options["address"] == "10.0.0.1:6379"
    ray_cluster.disconnect()
    assert init.session.exists()


def test_sigterm_is_taken_back_from_ray(tmp_path, monkeypatch):
    def init(**options):
        # Ray's C++ part does the same, without Python's knowledge.
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        return SimpleNamespace(address_info={"session_dir": str(tmp_path)})

    monkeypatch.setattr(ray_cluster.ray, "init", init)
    with sigterm_as_ctrl_c():
        ray_cluster.connect()
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGTERM)


def refusal(monkeypatch, address: str) -> str:
    monkeypatch.setenv("RAY_ADDRESS", address)
    monkeypatch.setattr(ray_cluster.ray, "init", lambda **options: pytest.fail("it would try for minutes"))
    with pytest.raises(SweepError) as refused:
        ray_cluster.connect()
    assert "\n" not in str(refused.value)
    return str(refused.value)


def test_a_cluster_that_does_not_answer_is_refused(monkeypatch):
    with socket.socket() as nobody:  # this port is taken, so that no other process listens there
        nobody.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{nobody.getsockname()[1]}"
        assert refusal(monkeypatch, address).startswith(f"RAY_ADDRESS {address}: no Ray cluster there: ")
        # The file in which `ray start` wrote its address outlives the cluster.
        monkeypatch.setattr("ray._private.services.canonicalize_bootstrap_address", lambda auto: address)
        assert refusal(monkeypatch, "auto").startswith(f"RAY_ADDRESS auto ({address}): no Ray cluster there: ")


def test_a_server_that_is_not_ray_is_refused(monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = f"127.0.0.1:{silent.getsockname()[1]}"
        assert refusal(monkeypatch, address).startswith(f"RAY_ADDRESS {address}: no Ray cluster there: ")


def test_a_cluster_of_another_token_is_refused(monkeypatch):
    class Refusing(grpc.GenericRpcHandler):
        def service(self, details):
            def refuse(request, context):
                context.abort(grpc.StatusCode.UNAUTHENTICATED, "InvalidAuthToken")

            return grpc.unary_unary_rpc_method_handler(refuse)

    server = grpc.server(ThreadPoolExecutor(1), handlers=[Refusing()])
    address = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    server.start()
    monkeypatch.setattr(ray_cluster, "CLUSTER_SECONDS", 10)
    try:
        said = refusal(monkeypatch, address)
    finally:
        server.stop(None)
    assert said.startswith(f"RAY_ADDRESS {address}: the cluster rejects your token; set RAY_AUTH_MODE=token")


def test_auto_where_no_cluster_runs_is_refused(monkeypatch):
    def none(address):
        raise ConnectionError("Could not find any running Ray instance.")

    monkeypatch.setattr("ray._private.services.canonicalize_bootstrap_address", none)
    assert "start one with `ray start --head`, or unset RAY_ADDRESS" in refusal(monkeypatch, "auto")


@pytest.mark.parametrize(
    ("address", "says"),
    [
        ("10.0.0.1:6379", r"^RAY_ADDRESS 10\.0\.0\.1:6379: no Ray cluster there: the first line$"),
        (None, r"^Ray does not start on this machine: the first line$"),
    ],
)
def test_what_ray_says_when_it_does_not_start_is_one_line(monkeypatch, address, says):
    def init(**options):
        raise ConnectionError("the first line\nand its tail")

    monkeypatch.setattr(ray_cluster.ray, "init", init)
    monkeypatch.setattr(ray_cluster, "_answering", lambda address: address)
    if address:
        monkeypatch.setenv("RAY_ADDRESS", address)
    with pytest.raises(SweepError, match=says):
        ray_cluster.connect()


@pytest.mark.parametrize("n_failures", [1, 2])
def test_a_ray_that_is_slow_to_start_is_started_once_more(init, monkeypatch, n_failures):
    failures = ["The current node timed out during startup. This could happen because"] * n_failures

    def slow(**options):
        if failures:
            raise RuntimeError(failures.pop())
        return init(**options)

    monkeypatch.setattr(ray_cluster.ray, "init", slow)
    said: list[str] = []
    if n_failures == 1:
        ray_cluster.connect(said.append)
        assert init.options["address"] == "local"
    else:
        with pytest.raises(SweepError, match=r"^Ray does not start on this machine: The current node timed out"):
            ray_cluster.connect(said.append)
    assert said == ["Ray did not start within 30 s, because this machine is busy; trying again"]


def test_a_token_that_others_can_read_is_made_private_and_that_is_said_once(init, tmp_path):
    token = tmp_path / "home" / ".ray" / "auth_token"
    token.parent.mkdir(parents=True)
    token.write_text("secret")
    token.chmod(0o644)
    said: list[str] = []
    ray_cluster.connect(said.append)
    assert token.stat().st_mode & 0o777 == 0o600
    assert said == [f"{token}: other users could read this Ray token; now only you can"]
    init.session.rename(tmp_path / "first session")
    ray_cluster.connect(said.append)
    assert len(said) == 1


def test_a_token_that_ray_makes_is_private(tmp_path, monkeypatch):
    token = tmp_path / "home" / ".ray" / "auth_token"

    def init(**options):
        token.parent.mkdir(parents=True)
        token.write_text("secret")
        token.chmod(0o644)
        return SimpleNamespace(address_info={"session_dir": str(tmp_path / "session")})

    monkeypatch.setattr(ray_cluster.ray, "init", init)
    ray_cluster.connect(lambda line: pytest.fail(line))
    assert token.stat().st_mode & 0o777 == 0o600
