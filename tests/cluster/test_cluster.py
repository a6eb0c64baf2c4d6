"""The product on a cluster of four nodes with their own addresses, undisturbed and disturbed in every way.

Whatever happens, a sweep comes out as it does on one machine: the same summary, the same weights bit for bit, and every
trial, epoch and model once in MLflow. `FAULTS.md` has what each fault cost.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from nodes import MB, ROOT, Cluster, Job, why_not

from msae_sweep.sae import modelfile

if reason := why_not():
    pytest.skip(reason, allow_module_level=True)

# The quickstart, scaled down: eight trials of a few seconds, some stopped by ASHA.
SPACE = "search_spaces/quickstart.yaml"
CHANGES = [
    "data.planted={rows: 8000, input_dim: 16, dictionary_size: 32, active: 3, noise: 0.02}",
    "space.learning_rate={loguniform: [1.0e-3, 3.0e-2]}",
    "space.expansion_factor={choice: [2, 4]}",
    "training.k_levels=[2, 4, 8]",
    "training.batch_size=128",
    "training.epochs=24",
    "training.early_stopping_patience=null",
    "training.aux_k=8",
    # The nodes' GPUs are words only.
    "training.device=cpu",
    "search.trials_per_block=4",
    "asha={grace_epochs: 3, reduction_factor: 2}",
    "resources.checkpoint_seconds=1",
]
N_TRIALS = 8
TRIAL = "ray::MSAETrial"
"""Title of a trial's process."""


class Sweep:
    """A sweep in a folder that every node sees, with MLflow in a SQLite file beside it."""

    def __init__(self, storage: Path, empty_database: Path) -> None:
        self.storage, self.folder = storage, storage / "quickstart"
        storage.mkdir()
        shutil.copy(empty_database, storage / "mlflow.db")
        self.uri = f"sqlite:///{storage}/mlflow.db"

    def command(self, *changes: str, resume: bool = False) -> list[str]:
        options = [word for change in (*CHANGES, *changes) for word in ("--set", change)]
        options += ["--storage", str(self.storage), "--tracking-uri", self.uri, *(["--resume"] if resume else [])]
        return ["python", "-m", "msae_sweep", "run", SPACE, *options]

    def run_here(self, *changes: str) -> None:
        """On this machine alone, undisturbed."""
        environment = {**os.environ, "RAY_ADDRESS": "local", "PYTHONPATH": str(ROOT)}
        command = [sys.executable, *self.command(*changes)[1:]]
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stdout + done.stderr

    @property
    def summary(self) -> dict[str, Any]:
        return json.loads((self.folder / "summary.json").read_text())

    def records(self) -> dict[str, dict[str, Any]]:
        files = self.folder.glob("trials/*/trial.json")
        return {file.parent.name: json.loads(file.read_text()) for file in files}

    def ended(self) -> set[str]:
        return {name for name, record in self.records().items() if record["status"] not in ("pending", "running")}

    def running(self) -> set[str]:
        return {name for name, record in self.records().items() if record["status"] == "running"}

    def states(self) -> set[str]:
        return {file.parent.name for file in self.folder.glob("trials/*/state.pt")}


def results(summary: dict[str, Any]) -> dict[str, Any]:
    """A summary without what clocks say."""
    stripped = json.loads(json.dumps(summary))
    stripped.pop("seconds")
    for block in stripped["blocks"].values():
        for trial in block["trials"]:
            trial.pop("seconds")
            trial["metrics"].pop("samples_per_second", None)
    return stripped


def weights(file: Path) -> dict[str, torch.Tensor]:
    return modelfile.load(file).model.state_dict()


def assert_same(sweep: Sweep, reference: Sweep) -> None:
    """Every trial is there once with the same results and the same weights, on disk and in MLflow."""
    assert results(sweep.summary) == results(reference.summary)
    files = sorted(file.relative_to(reference.folder) for file in reference.folder.glob("**/*.pt"))
    assert files == sorted(file.relative_to(sweep.folder) for file in sweep.folder.glob("**/*.pt"))
    assert len(files) == N_TRIALS + 2
    for file in files:
        ours, theirs = weights(sweep.folder / file), weights(reference.folder / file)
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs), f"{file} differs"
    assert_tracked(sweep)


def assert_tracked(sweep: Sweep) -> None:
    """MLflow has what the summary has: no run, epoch or model missing, none twice."""
    from mlflow import MlflowClient

    client = MlflowClient(sweep.uri, sweep.uri)
    (experiment,) = [e for e in client.search_experiments() if e.name != "Default"]
    runs = client.search_runs([experiment.experiment_id])
    (parent,) = [run for run in runs if "mlflow.parentRunId" not in run.data.tags]
    assert parent.info.status == "FINISHED"
    trials = {run.data.tags["msae_sweep.trial_id"]: run for run in runs if run is not parent}
    assert len(trials) == len(runs) - 1
    entries = {t["trial_id"]: t for block in sweep.summary["blocks"].values() for t in block["trials"]}
    assert set(trials) == set(entries)
    for trial_id, run in trials.items():
        entry = entries[trial_id]
        assert run.data.tags["status"] == entry["status"]
        for metric in ("r2_k8", "objective", "val_loss"):
            history = client.get_metric_history(run.info.run_id, metric)
            assert [point.step for point in history] == list(range(1, entry["epochs"] + 1)), f"{trial_id} {metric}"
            assert history[entry["best_epoch"] - 1].value == entry["metrics"][metric]
    models = client.search_logged_models([experiment.experiment_id])
    assert sorted(model.source_run_id for model in models) == sorted(run.info.run_id for run in trials.values())
    assert {str(model.status) for model in models} == {"READY"}
    for name, block in sweep.summary["blocks"].items():
        versions = client.search_model_versions(f"name='msae-{name}'")
        assert [version.run_id for version in versions] == [trials[block["best"]].info.run_id]
        assert client.get_model_version_by_alias(f"msae-{name}", "champion").version == versions[0].version


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory, empty_database: Path) -> Sweep:
    """The sweep as one machine has it, undisturbed."""
    sweep = Sweep(tmp_path_factory.mktemp("reference") / "sweeps", empty_database)
    sweep.run_here()
    assert {t["status"] for b in sweep.summary["blocks"].values() for t in b["trials"]} == {
        "completed",
        "stopped_early",
    }
    assert_tracked(sweep)
    return sweep


@pytest.fixture(scope="module")
def nodes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with Cluster(tmp_path_factory.mktemp("cluster")) as cluster:
        cluster.start_head()
        yield cluster


@pytest.fixture
def cluster(nodes: Cluster) -> Cluster:
    """A head and three workers, whatever the test before did to them."""
    mend(nodes, workers=3)
    return nodes


def mend(cluster: Cluster, *, workers: int) -> None:
    """Bring the cluster to so many workers that are whole."""
    cluster.discard_dead()
    alive = cluster.alive()
    for i, worker in enumerate(cluster.workers):
        if i >= workers or worker.address not in alive:
            worker.kill()
    cluster.discard_dead()
    for _ in range(workers - len(cluster.workers)):
        cluster.start_worker(wait=False)
    cluster.settle()


@pytest.fixture
def sweep(tmp_path: Path, empty_database: Path) -> Sweep:
    return Sweep(tmp_path / "sweeps", empty_database)


@pytest.fixture
def submit(nodes: Cluster, tmp_path: Path) -> Iterator[Callable[..., Job]]:
    """`ray job submit` from a folder that has nothing to do with the checkout, as an operator does it."""
    (tmp_path / "elsewhere").mkdir()
    runtime_env = tmp_path / "runtime_env.yaml"
    runtime_env.write_text(
        yaml.safe_dump({"excludes": ["/tests/", "/.github/"], "env_vars": {"MLFLOW_DISABLE_TELEMETRY": "true"}})
    )
    jobs: list[Job] = []

    def submit(command: list[str]) -> Job:
        job_id = f"{tmp_path.name}-{len(jobs)}"
        jobs.append(
            nodes.submit(command, job_id=job_id, cwd=tmp_path / "elsewhere", working_dir=ROOT, runtime_env=runtime_env)
        )
        return jobs[-1]

    yield submit
    for job in jobs:
        if not job.ended:
            job.stop()


def during(job: Job, condition: Callable[[], Any], seconds: float = 180) -> None:
    """Wait for something to happen while the job runs."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert not job.ended, f"the job ended before it could be disturbed\n{job.output[-3000:]}"
        assert time.monotonic() < deadline, f"nothing to disturb\n{job.output[-3000:]}"
        time.sleep(0.05)


def assert_succeeds(job: Job, seconds: float = 300) -> None:
    assert job.wait(seconds) == 0, job.output[-5000:]
    print(f"{job.id} took {job.seconds:.0f} s")


def test_a_submitted_sweep_comes_out_as_on_one_machine_and_its_log_can_be_read(cluster, submit, sweep, reference):
    job = submit(sweep.command())
    assert_succeeds(job)
    assert_same(sweep, reference)
    log = cluster.job("logs", job.id, cwd=sweep.storage).stdout
    assert "Best trial of each block" in log
    assert f"results: {sweep.folder}" in log


def test_a_sweep_that_cannot_be_run_fails_its_job_in_one_line(cluster, submit, sweep):
    job = submit(sweep.command("training.epochz=5"))
    assert job.wait() != 0
    assert cluster.status(job.id) == "FAILED"
    assert "msae-sweep: search_spaces/quickstart.yaml: training.epochz" in job.output
    assert "Traceback" not in job.output


def test_a_stopped_job_leaves_a_sweep_that_goes_on(cluster, submit, sweep, reference):
    job = submit(sweep.command())
    during(job, sweep.ended)
    job.stop()
    job.wait()
    assert cluster.status(job.id) == "STOPPED"
    ended = sweep.ended()
    assert 0 < len(ended) < N_TRIALS
    times = {name: (sweep.folder / "trials" / name / "model.pt").stat().st_mtime_ns for name in ended}
    assert_succeeds(submit(sweep.command(resume=True)))
    assert_same(sweep, reference)
    for name, before in times.items():
        assert (sweep.folder / "trials" / name / "model.pt").stat().st_mtime_ns == before, f"{name} ran again"


def test_a_killed_driver_leaves_a_sweep_that_goes_on(cluster, submit, sweep, reference):
    job = submit(sweep.command())
    during(job, sweep.ended)
    job.driver().kill()
    assert job.wait() != 0
    assert cluster.status(job.id) == "FAILED"
    assert 0 < len(sweep.ended()) < N_TRIALS
    assert_succeeds(submit(sweep.command(resume=True)))
    assert_same(sweep, reference)


def test_a_killed_trial_process_costs_no_trial(cluster, submit, sweep, reference):
    job = submit(sweep.command())
    during(job, lambda: sweep.states() & sweep.running())
    killed = [process for worker in cluster.workers for process in worker.processes(TRIAL)]
    for process in killed:
        process.kill()
    assert killed
    assert_succeeds(job)
    assert_same(sweep, reference)


def test_a_node_that_is_lost_with_its_shards_costs_no_trial(cluster, submit, sweep, reference):
    job = submit(sweep.command())
    during(job, lambda: sweep.states() & sweep.running())
    cluster.workers[0].kill()
    assert_succeeds(job)
    assert_same(sweep, reference)


def test_a_node_that_is_cut_off_for_a_minute_costs_no_trial(cluster, submit, sweep, reference):
    job = submit(sweep.command())
    during(job, lambda: sweep.states() & sweep.running())
    cluster.workers[0].disconnect()
    time.sleep(60)
    cluster.workers[0].connect()
    assert_succeeds(job)
    assert_same(sweep, reference)


def test_a_node_whose_disk_fills_up_costs_no_trial(cluster, submit, sweep, reference):
    mend(cluster, workers=2)
    small = cluster.start_worker(disk_bytes=64 * MB)
    job = submit(sweep.command())
    during(job, lambda: sweep.states() & sweep.running() and small.processes(TRIAL))
    small.fill_disk()
    assert_succeeds(job)
    assert_same(sweep, reference)


def test_a_node_whose_disk_is_full_before_it_gets_a_trial_costs_no_trial(cluster, submit, sweep, reference):
    mend(cluster, workers=2)
    cluster.start_worker(disk_bytes=64 * MB).fill_disk()
    job = submit(sweep.command())
    assert_succeeds(job)
    assert_same(sweep, reference)


def test_a_node_that_joins_gets_trials(cluster, submit, sweep, reference):
    mend(cluster, workers=1)
    job = submit(sweep.command())
    during(job, lambda: sweep.states() & sweep.running())
    joined = cluster.start_worker()
    during(job, lambda: joined.processes(f"{TRIAL}.train"))
    assert_succeeds(job)
    assert_same(sweep, reference)


def test_a_node_that_is_told_to_go_saves_its_trial_before(cluster, submit, sweep, reference):
    mend(cluster, workers=1)
    # A node that was told to go is no failure of its trial.
    job = submit(sweep.command("resources.checkpoint_seconds=600", "resources.max_failures=0"))
    (worker,) = cluster.workers
    during(job, lambda: sweep.running() and worker.processes(f"{TRIAL}.train"))
    assert not sweep.states()
    worker.terminate()
    during(job, sweep.states)
    assert worker.running
    worker.wait(60)
    cluster.start_worker()
    assert_succeeds(job)
    assert_same(sweep, reference)


# Three times what one node's object store holds, as raw activations of width 256.
LARGE_ROWS, LARGE_DIM = 300_000, 256
LARGE = [
    "data.blocks=[5]",
    "training.batch_size=4096",
    "training.k_levels=[4, 8]",
    "training.epochs=2",
    "search.trials_per_block=3",
    "space.expansion_factor={choice: [0.25, 0.5]}",
    "asha=null",
]
WHERE_SHARDS_ARE = """
import json, sys
import ray
from msae_sweep.config import DataConfig
from msae_sweep.data import shards
ray.init(log_to_driver=False)
block = shards.prepare(DataConfig(path=sys.argv[1], blocks=(5,)), sys.argv[2], batch_size=1)[5]
address = {node["NodeID"]: node["NodeManagerAddress"] for node in ray.nodes()}
places = ray.experimental.get_object_locations(block.refs).values()
print("SHARDS", json.dumps([[address[node] for node in place["node_ids"]] for place in places]))
"""


@pytest.fixture(scope="module")
def large_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("large")
    (folder / "block5").mkdir()
    rng = np.random.default_rng(0)
    dictionary = rng.standard_normal((16, LARGE_DIM), dtype=np.float32)
    for i in range(10):
        codes = rng.standard_normal((LARGE_ROWS // 10, 16), dtype=np.float32)
        np.save(folder / "block5" / f"chunk_{i:04d}.npy", (codes @ dictionary).astype(np.float16))
    return folder


def test_shards_lie_on_all_nodes(cluster, submit, tmp_path, large_data):
    job = submit(["python", "-c", WHERE_SHARDS_ARE, str(large_data), str(tmp_path / "sweeps")])
    assert_succeeds(job)
    (line,) = re.findall(r"SHARDS (.+)", job.output)
    places = json.loads(line)
    print(places)
    assert len(places) == 10
    assert {address for place in places for address in place} == {node.address for node in cluster.nodes}


def test_data_larger_than_a_nodes_object_store_comes_out_as_on_one_machine(
    cluster, submit, sweep, large_data, tmp_path, empty_database
):
    job = submit(sweep.command(*LARGE, f"data.path={large_data}"))
    spilled = cluster.folder.glob
    during(job, lambda: list(spilled("disk*/session_*/ray_spilled_objects_*/*")))
    assert_succeeds(job)
    alone = Sweep(tmp_path / "alone", empty_database)
    alone.run_here(*LARGE, f"data.path={large_data}")
    assert results(sweep.summary) == results(alone.summary)
    assert_tracked(sweep)
