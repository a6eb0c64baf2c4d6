"""Tests that a sweep that certainly cannot fit is refused before it starts, and that no other sweep is."""

import shutil
from collections import namedtuple

import pytest
import ray

from msae_sweep.config import SweepConfig, parse
from msae_sweep.data.sources.base import BlockInfo
from msae_sweep.errors import ConfigError, DataError
from msae_sweep.sae.model import MSAE
from msae_sweep.sweep import memory

Disk = namedtuple("Disk", "total used free")


def config(*changes: str) -> SweepConfig:
    return parse("name: small\ndata: {path: planted}\n", changes)


def block(n_rows: int = 1000, input_dim: int = 256) -> BlockInfo:
    return BlockInfo(5, "block 5", n_rows, input_dim, "float32", True)


def test_a_models_size_is_that_of_its_tensors():
    sizes = memory.model_of(16, 4)
    assert sizes.n_parameters == sum(p.numel() for p in MSAE(16, 64, [4]).parameters())
    assert sizes.state_bytes == 16 * sizes.n_parameters


@pytest.fixture
def one_machine(monkeypatch, tmp_path):
    """Simulate a machine with 8 GiB of memory, no GPU and 1 GiB of free disk, on which Ray has not started."""
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(memory.torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(memory, "machine_bytes", lambda: 8 << 30)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Disk(0, 0, 1 << 30))


def test_a_model_above_the_largest_device_is_refused_and_one_below_is_not(one_machine):
    # The model has 2 × 256 × hidden_dim parameters of 16 bytes, so 2^20 latents take 8 GiB.
    memory.check_memory_and_disk(config("training.expansion_factor=4095"), [block()])
    with pytest.raises(ConfigError, match=r"1,048,576 latents of width 256 \(block 5\).*take 8\.0 GiB .* has 8\.0 GiB"):
        memory.check_memory_and_disk(config("training.expansion_factor=4096"), [block()])


@pytest.mark.parametrize("address", ["auto", "10.0.0.1:6379"])
def test_a_cluster_may_have_larger_devices_than_this_machine(one_machine, monkeypatch, address):
    monkeypatch.setenv("RAY_ADDRESS", address)
    memory.check_memory_and_disk(config("training.expansion_factor=40960"), [block()])


def test_only_what_will_be_proposed_counts(one_machine):
    wide = "space.expansion_factor={uniform: [1, 4200]}"
    few = config(wide, "search.trials_per_block=1")
    memory.check_memory_and_disk(few, [block()])  # the only trial is small
    with pytest.raises(ConfigError, match="lower expansion_factor"):
        memory.check_memory_and_disk(config(wide, "search.trials_per_block=1", "search.algorithm=optuna"), [block()])


def test_shards_that_the_disk_cannot_hold_are_refused_but_not_those_that_are_there(one_machine, tmp_path, monkeypatch):
    rows = (1 << 30) // 1024
    there = config(f"storage={tmp_path}")
    memory.check_memory_and_disk(there, [block(rows)])
    with pytest.raises(
        DataError, match=r"1,048,577 rows of block 5 take 1\.0 GiB as prepared shards, but .* has 1\.0 GiB"
    ):
        memory.check_memory_and_disk(there, [block(rows + 1)])
    monkeypatch.setattr(memory.shards, "prepared_manifests", lambda data, storage: {5: {}})
    memory.check_memory_and_disk(there, [block(rows + 1)])
    # It is not known yet how many rows will be dropped, nor how much room a store has.
    memory.check_memory_and_disk(config(f"storage={tmp_path}", "data.drop_nonfinite=true"), [block(rows + 1)])
    memory.check_memory_and_disk(config("storage=s3://bucket/sweeps"), [block(rows + 1)])


def test_rows_beyond_memory_and_spilling_are_refused(one_machine, monkeypatch):
    with pytest.raises(DataError, match=r"take 10\.0 GiB in Ray's object store, but memory and .* have 9\.0 GiB"):
        memory.check_memory_and_disk(config("storage=s3://bucket/sweeps"), [block(10 << 20)])


def test_a_cluster_is_asked_only_about_large_models(ray_session, monkeypatch):
    asked = []
    monkeypatch.setattr(memory, "_largest_device", lambda gpus: asked.append(gpus) or (80 << 30))
    memory.check_devices(config(), [block()], 0.5)
    assert asked == []
    memory.check_devices(config("training.expansion_factor=4096"), [block()], 0.5)
    assert asked == [0.5]
    with pytest.raises(ConfigError, match=r"take 80\.0 GiB .* largest device has 80\.0 GiB"):
        memory.check_devices(config("training.expansion_factor=40960"), [block()], 0.5)


def test_the_largest_device_of_a_cpu_cluster_is_its_largest_machine(ray_session):
    assert memory._largest_device(0) == memory.machine_bytes()
