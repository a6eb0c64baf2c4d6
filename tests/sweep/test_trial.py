"""Tests of one trial in a worker, which is driven as Ray Tune drives it, but without Tune."""

import copy
import errno
import gc
import os
import re
import weakref
from pathlib import Path
from typing import Any

import pytest
import ray
import torch
from ray import tune

from msae_sweep.config import SweepConfig, parse
from msae_sweep.data.prepare import shards
from msae_sweep.errors import StorageError
from msae_sweep.sae import model_file
from msae_sweep.sae.evaluation import evaluate
from msae_sweep.sweep.space import plan
from msae_sweep.sweep.trial import MSAETrial
from msae_sweep.sweep_folder.folder import SweepFolder
from msae_sweep.sweep_folder.rungs import rungs

SPACE = """
name: trials
data:
  path: planted
  blocks: [5, 20]
  planted: {rows: 1000, input_dim: 16, dictionary_size: 32, active: 3, noise: 0.02}
space:
  expansion_factor: {grid: [2, 4]}
  weighting: {grid: [uniform, reverse]}
training: {k_levels: [2, 4, 8], batch_size: 64, epochs: 6, aux_k: 8}
search: {trials_per_block: 4}
asha: {grace_epochs: 1, reduction_factor: 2}
"""

pytestmark = pytest.mark.usefixtures("ray_session")


@pytest.fixture(scope="module")
def config() -> SweepConfig:
    return parse(SPACE, [])


@pytest.fixture(scope="module")
def prepared(config, ray_session, tmp_path_factory) -> Any:
    return shards.prepare_blocks(config.data, str(tmp_path_factory.mktemp("data")), batch_size=64)


class Workers:
    """Factory of trial workers over one sweep folder, and of the configurations that Tune would give them."""

    def __init__(self, config: SweepConfig, prepared: Any, path: Path) -> None:
        self.config, self.prepared, self.folder = config, prepared, SweepFolder(path)

    def specs(self) -> list[dict[str, Any]]:
        specs = []
        for record in plan(self.config, list(self.prepared)):
            training = record.training(self.config.training)
            milestones = rungs(self.config.asha, training.epochs)
            spec = {"trial_id": record.trial_id, "block": record.block, "rungs": milestones, "input_dim": 16}
            specs.append({"trial": spec | {"training": training.model_dump(mode="json")}})
        return specs

    def worker(
        self, spec: dict[str, Any], checkpoint_seconds: float = 30, kind: Any = MSAETrial, **options: Any
    ) -> MSAETrial:
        options |= {"cpus": 1, "gpus": 0, "checkpoint_seconds": checkpoint_seconds}
        made = tune.with_parameters(kind, prepared=self.prepared, folder=self.folder, **options)
        return made(copy.deepcopy(spec))

    def state_file(self, spec: dict[str, Any]) -> Path:
        return self.folder.state_file(spec["trial"]["trial_id"])

    def model_file(self, spec: dict[str, Any]) -> Path:
        return self.folder.model_file(spec["trial"]["trial_id"])


@pytest.fixture
def workers(config, prepared, tmp_path) -> Workers:
    return Workers(config, prepared, tmp_path)


def to_the_end(worker: MSAETrial) -> list[dict[str, Any]]:
    reports = [worker.train()]
    while not reports[-1]["done"]:
        reports.append(worker.train())
    return reports


def metrics(reports: list[dict[str, Any]]) -> list[dict[str, float]]:
    """Return the metrics of every epoch without those that depend on the clock."""
    points = [point for report in reports for point in report["points"]]
    return [{key: value for key, value in point.items() if key != "samples_per_second"} for point in points]


def assert_same_model(one: Path, other: Path) -> None:
    weights = [model_file.load(path).model.state_dict() for path in (one, other)]
    assert weights[0].keys() == weights[1].keys()
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_a_trial_in_a_reused_worker_equals_the_same_trial_in_a_fresh_one(workers, config, prepared, tmp_path):
    alone = Workers(config, prepared, tmp_path / "alone")
    specs = workers.specs()
    settings = [(s["trial"]["block"], s["trial"]["training"]) for s in specs]
    assert len({(block, t["expansion_factor"], t["weighting"]) for block, t in settings}) == 8
    reused = workers.worker(specs[0])
    for i, spec in enumerate(specs):
        # Some trials are left in the middle, as when ASHA stops them or makes them wait.
        if i:
            assert reused.reset(copy.deepcopy(spec))
            reused.train()
            reused.reset(copy.deepcopy(spec))
        reports = to_the_end(reused)
        assert metrics(reports) == metrics(to_the_end(alone.worker(spec)))
        assert_same_model(workers.model_file(spec), alone.model_file(spec))


def test_a_trial_that_passes_its_rungs_and_ends_writes_models_and_no_state(workers):
    spec = workers.specs()[0]
    worker = workers.worker(spec)
    for _ in spec["trial"]["rungs"]:
        report = worker.train()
        assert len(model_file.load(workers.model_file(spec)).history["objective"]) == report["epoch"]
        assert not workers.state_file(spec).exists()
    assert to_the_end(worker)[-1]["status"] == "completed"
    assert not workers.state_file(spec).exists()


def test_a_trials_model_counts_its_latents_over_the_validation_rows(workers, prepared):
    spec = workers.specs()[0]
    assert to_the_end(workers.worker(spec))[-1]["status"] == "completed"
    file, block = model_file.load(workers.model_file(spec)), prepared[spec["trial"]["block"]]
    measured = evaluate(file.model, (torch.tensor(read()) for read in block.val_shards()))
    assert file.total_samples == measured.n_rows == block.n_val
    assert file.activation_counts.tolist() == measured.firing.tolist()


def test_a_trial_that_has_to_wait_goes_on_in_any_worker_as_if_it_had_not(workers, config, prepared, tmp_path):
    undisturbed = Workers(config, prepared, tmp_path / "undisturbed")
    spec, other = workers.specs()[:2]
    first = workers.worker(spec)
    reports = [first.train(), first.train()]
    first.save(str(tmp_path / "checkpoint"))
    first.reset(copy.deepcopy(other))
    to_the_end(first)
    again = to_the_end(workers.worker(spec))
    assert metrics(again) == metrics(to_the_end(undisturbed.worker(spec)))
    assert metrics(reports) == metrics(again)[:2]
    assert_same_model(workers.model_file(spec), undisturbed.model_file(spec))


def test_a_long_trial_saves_its_state_every_checkpoint_seconds(workers):
    spec = workers.specs()[0]
    worker = workers.worker(spec, checkpoint_seconds=0)
    report = worker.train()
    saved = torch.load(workers.state_file(spec), weights_only=True)
    assert saved["train_state"]["points"] == report["points"]
    # If the worker is lost here, the next one first reports where the trial stands before it continues.
    assert workers.worker(spec).train()["points"] == report["points"]


class Evil:
    def __reduce__(self):
        return (print, ("code from a saved state ran",))


def test_a_saved_state_that_would_run_code_is_refused(workers, capsys):
    spec = workers.specs()[0]
    workers.state_file(spec).parent.mkdir(parents=True)
    torch.save({"train_state": Evil(), "seconds": 0.0}, workers.state_file(spec))
    (note,) = workers.worker(spec).step()["notes"]
    assert "state.pt is damaged (Weights only load failed" in note
    assert "ran" not in capsys.readouterr().out


@pytest.mark.parametrize("damage", ["cut off", "rubbish", "of another trial", "some bytes are others"])
def test_a_damaged_state_counts_as_lost_and_the_trial_ends_as_it_would_have(
    workers, tmp_path, config, prepared, damage
):
    spec, wider = workers.specs()[0], workers.specs()[-1]
    interrupted, other = Workers(config, prepared, tmp_path / "a"), Workers(config, prepared, tmp_path / "b")
    interrupted.worker(spec, checkpoint_seconds=0).train()
    other.worker(wider, checkpoint_seconds=0).train()
    state = interrupted.state_file(spec)
    whole = state.read_bytes()
    damaged = {
        "cut off": whole[: len(whole) // 2],
        "rubbish": b"rubbish",
        "of another trial": other.state_file(wider).read_bytes(),
        "some bytes are others": whole[: len(whole) // 2] + bytes(300) + whole[len(whole) // 2 + 300 :],
    }
    state.write_bytes(damaged[damage])
    reports = to_the_end(interrupted.worker(spec))
    assert [len(report["notes"]) for report in reports] == [1] + [0] * (len(reports) - 1)
    assert reports[0]["notes"][0].startswith(f"{state} is damaged (")
    assert reports[0]["notes"][0].endswith("is trained from its beginning")
    assert metrics(reports) == metrics(to_the_end(workers.worker(spec)))
    assert_same_model(interrupted.model_file(spec), workers.model_file(spec))


@pytest.mark.parametrize(
    ("number", "says"),
    [
        (errno.ENOSPC, r"No space left on device, [\d,]+ MiB are free; make space"),
        (errno.EROFS, "Read-only file system; make it writable"),
    ],
)
def test_a_state_that_cannot_be_saved_is_an_error_that_names_disk_and_way_out(workers, monkeypatch, number, says):
    def full(self, content):
        raise OSError(number, os.strerror(number))

    worker = workers.worker(workers.specs()[0], checkpoint_seconds=0)
    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(StorageError) as raised:
        worker.step()
    file, folder = workers.state_file(workers.specs()[0]), workers.folder
    assert re.fullmatch(
        rf"{file.parent}/(state|model).pt cannot be written: {says}, then continue with: msae-sweep resume {folder}",
        str(raised.value),
    )


def test_a_trial_that_gives_up_says_what_it_ran_on(workers, monkeypatch):
    worker = workers.worker(workers.specs()[0])
    worker.train()

    def no_memory(*_):
        raise torch.OutOfMemoryError("out of memory")

    monkeypatch.setattr(worker, "_train_until_report", no_memory)
    report = worker.step()
    assert report["status"] == "failed"
    assert {"device", "kernel", "data"} <= report["runs_on"].keys()


def test_a_trial_on_a_node_that_was_told_to_go_saves_its_state_whatever_its_settings(workers, monkeypatch):
    from msae_sweep.sweep import preemption, trial

    monkeypatch.setattr(trial, "DRAINING_SAVE_SECONDS", 0)
    monkeypatch.setattr(preemption, "POLL_SECONDS", 0)
    spec = workers.specs()[0]
    worker = workers.worker(spec, checkpoint_seconds=600)
    draining = {"another node": 0}
    monkeypatch.setattr(preemption.cluster_state, "get_draining_nodes", lambda: draining)
    worker.train()
    assert not workers.state_file(spec).exists()
    draining[ray.get_runtime_context().get_node_id()] = 0
    report = worker.train()
    saved = torch.load(workers.state_file(spec), weights_only=True)
    assert saved["train_state"]["points"][-1] == report["points"][-1]


class StillComing(dict):
    """Blocks of which none is ready when a worker starts."""

    def __contains__(self, block: object) -> bool:
        return False


def test_a_worker_rehearses_while_its_block_is_not_ready_and_trains_the_same(workers, config, prepared, tmp_path):
    rehearsing = Workers(config, StillComing(prepared), tmp_path / "rehearsing")
    spec, other = workers.specs()[0], workers.specs()[-1]
    begun = []

    class Noting(MSAETrial):
        def _warm_up(self, training, input_dim):
            super()._warm_up(training, input_dim)
            begun.append((training.expansion_factor, input_dim))

    impossible = {**other["trial"]["training"], "batch_size": 10**15}
    warmup_settings = [spec["trial"]["training"], impossible, other["trial"]["training"]]
    worker = rehearsing.worker(spec, kind=Noting, warmup_settings=warmup_settings)
    assert [expansion for expansion, _ in begun] == [2, 4, 4]
    assert metrics(to_the_end(worker)) == metrics(to_the_end(workers.worker(spec, warmup_settings=warmup_settings)))
    assert_same_model(workers.model_file(spec), rehearsing.model_file(spec))


def test_a_report_says_when_its_epochs_were_trained(workers):
    worker = workers.worker(workers.specs()[0])
    reports = [report["trained"] for report in to_the_end(worker)]
    assert all(start < end for start, end in reports)
    assert reports == sorted(reports)


def test_an_ended_trial_leaves_nothing_in_its_worker(workers):
    spec, other = workers.specs()[:2]
    worker = workers.worker(spec)
    to_the_end(worker)
    state = weakref.ref(worker._state.model)
    worker.reset(copy.deepcopy(other))
    gc.collect()
    assert state() is None
