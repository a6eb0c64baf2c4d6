"""Tests of the resources that a trial holds, on clusters where nodes may join and where they may not."""

import pytest
import ray
import torch

from msae_sweep.config import SweepConfig, parse
from msae_sweep.errors import DeviceError
from msae_sweep.sweep import resources

pytestmark = pytest.mark.usefixtures("ray_session")


def config(*changes: str) -> SweepConfig:
    return parse("name: small\ndata: {path: planted}\n", changes)


@pytest.fixture
def in_a_cluster(monkeypatch):
    """Simulate a Ray job, in whose cluster nodes may join."""
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:6379")
    monkeypatch.setattr(resources, "POLL_SECONDS", 0.01)


@pytest.fixture
def with_nodes(monkeypatch):
    """Function that makes Ray report other nodes: one list for each call, and the last list for all later calls."""

    def tell(*answers: list[dict[str, float]]) -> None:
        rest = list(answers)

        def nodes():
            found = rest.pop(0) if len(rest) > 1 else rest[0]
            return [{"Alive": True, "Resources": has} for has in found]

        monkeypatch.setattr(ray, "nodes", nodes)
        monkeypatch.setattr(ray, "cluster_resources", lambda: {"GPU": sum(n.get("GPU", 0) for n in answers[-1])})

    return tell


def test_a_cluster_without_the_gpu_asked_for_is_waited_for_and_asked(in_a_cluster, with_nodes, monkeypatch):
    demands: list[object] = []
    place, remove = resources.placement_group, resources.remove_placement_group
    monkeypatch.setattr(resources, "placement_group", lambda need: demands.append(need) or place(need))
    monkeypatch.setattr(resources, "remove_placement_group", lambda demand: demands.append("removed") or remove(demand))
    cpu_only, with_gpu = {"CPU": 4.0}, {"CPU": 4.0, "GPU": 1.0}
    with_nodes([cpu_only], [cpu_only], [cpu_only], [cpu_only, with_gpu])
    said: list[str] = []
    assert resources.gpus_per_trial(config("resources.gpu=1"), said.append) == 1
    assert demands == [[{"CPU": 1, "GPU": 1}], "removed"]
    assert said == [
        "resources.gpu: 1 per trial, but no node has that yet; waiting up to 30 minutes for one with 1 CPU and 1 GPU"
    ]


def test_a_trial_has_to_fit_on_one_node(in_a_cluster, with_nodes, monkeypatch):
    monkeypatch.setattr(resources, "JOIN_SECONDS", 0.1)
    with_nodes([{"CPU": 4.0}, {"CPU": 1.0, "GPU": 1.0}])
    with pytest.raises(
        DeviceError, match=r"resources\.gpu: 1 per trial, but no node with 2 CPU and 1 GPU joined within"
    ):
        resources.gpus_per_trial(config("resources.gpu=1", "resources.cpu=2"), lambda line: None)


def test_auto_waits_for_a_node_that_can_run_a_trial_and_takes_its_gpu(in_a_cluster, with_nodes):
    with_nodes([{"CPU": 0.0}], [{"CPU": 0.0}], [{"CPU": 0.0}, {"CPU": 4.0, "GPU": 2.0}])
    said: list[str] = []
    assert resources.gpus_per_trial(config(), said.append) == 1
    assert len(said) == 1
    assert "waiting" in said[0]


def test_auto_in_a_cluster_says_that_it_found_no_gpu(in_a_cluster, with_nodes):
    with_nodes([{"CPU": 4.0}])
    said: list[str] = []
    assert resources.gpus_per_trial(config(), said.append) == 0
    assert len(said) == 1
    assert "resources.gpu: auto, and the cluster has no GPU now: all trials train on CPUs" in said[0]
    # A sweep that asks for the CPU gets no message.
    assert resources.gpus_per_trial(config("training.device=cpu"), said.append) == 0
    assert len(said) == 1


def test_on_one_machine_nothing_is_waited_for(with_nodes, monkeypatch):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    with_nodes([{"CPU": 4.0}])
    said: list[str] = []
    with pytest.raises(DeviceError, match=r"resources\.gpu: 1 per trial, but no node has more than 0; write 0 or auto"):
        resources.gpus_per_trial(config("resources.gpu=1"), said.append)
    assert resources.gpus_per_trial(config(), said.append) == 0
    assert not said


@pytest.mark.parametrize("change", ["training.device=mps", "space.device={choice: [cpu, mps]}"])
def test_a_device_that_no_trial_can_have_is_refused_before_the_cluster_is_asked(change, monkeypatch):
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    with pytest.raises(DeviceError, match=r"training\.device: mps is not available on .*; write auto or cpu"):
        resources.check_device(config(change))
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    resources.check_device(config(change))


def test_a_sweep_that_varies_the_device_needs_a_gpu_for_cuda_too(with_nodes, monkeypatch):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    with_nodes([{"CPU": 4.0}])
    with pytest.raises(DeviceError, match=r"training\.device: cuda, but a trial gets no GPU"):
        resources.gpus_per_trial(config("space.device={choice: [cpu, cuda]}"), lambda line: None)
