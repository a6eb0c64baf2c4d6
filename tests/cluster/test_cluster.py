"""Tests of sweeps on a cluster of four nodes with their own addresses, undisturbed and after every kind of failure.

Whatever happens, a sweep gives the same result as on one machine: the same summary, the same weights bit for bit, and
every trial, epoch and model exactly once in MLflow.

cluster/README.md lists what each failure cost. `pytest -m slow -s tests/cluster` prints it ("took").
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
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import yaml
from nodes import MB, ROOT, Cluster, Job, Node, why_not
from servers import S3, Mlflow, Postgres, SlowProxy, in_environment

from msae_sweep.paths import StoragePath
from msae_sweep.sae import model_file

if reason := why_not():
    pytest.skip(reason, allow_module_level=True)

# These settings scale the quickstart down to eight trials of a few seconds, some of which ASHA stops.
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
    # The nodes' GPUs exist by name only.
    "training.device=cpu",
    "search.trials_per_block=4",
    "asha={grace_epochs: 3, reduction_factor: 2}",
    "resources.checkpoint_seconds=1",
]
N_TRIALS = 8
TRIAL = "ray::ResourceTrainable"
"""Title of a trial's process, which is Tune's class around the trial's class."""
SMALL_DISK = 256 * MB
"""Disk size in bytes: enough for the job's package, packed and unpacked, and for logs, until something fills it."""
RUNTIME_ENV = ROOT / "cluster" / "runtime_env.yaml"


class Sweep:
    """Sweep in a folder that every node can access, or in an object store."""

    def __init__(self, folder: Path, uri: str) -> None:
        """Use the MLflow at `uri`. If `storage` differs from `folder`, `fetch` copies the sweep into `folder`."""
        self.storage, self.folder = str(folder), folder / "quickstart"
        self.uri = uri
        folder.mkdir()

    @classmethod
    def with_sqlite(cls, folder: Path, empty_database: Path) -> "Sweep":
        """Return a sweep that is tracked in a SQLite file beside it."""
        sweep = cls(folder, f"sqlite:///{folder}/mlflow.db")
        shutil.copy(empty_database, folder / "mlflow.db")
        return sweep

    def fetch(self) -> None:
        """Copy the sweep from the object store into `folder`."""
        there = StoragePath(self.storage) / "quickstart"
        for file in there.files(recursive=True):
            target = self.folder / file.relative_to(there)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(file.read())

    def command(self, *changes: str, resume: bool = False) -> list[str]:
        options = [word for change in (*CHANGES, *changes) for word in ("--set", change)]
        options += ["--storage", self.storage, "--tracking-uri", self.uri, *(["--resume"] if resume else [])]
        return ["python", "-m", "msae_sweep", "run", SPACE, *options]

    def run_here(self, *changes: str) -> None:
        """Run the sweep on this machine alone, undisturbed."""
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
    """Return a summary without the values that depend on the clock."""
    stripped = json.loads(json.dumps(summary))
    stripped.pop("seconds")
    for block in stripped["blocks"].values():
        for trial in block["trials"]:
            trial.pop("seconds")
            trial["metrics"].pop("samples_per_second", None)
    return stripped


def weights(file: Path) -> dict[str, torch.Tensor]:
    return model_file.load(file).model.state_dict()


def assert_same(sweep: Sweep, reference: Sweep) -> None:
    """Assert that every trial exists once, with the same results and the same weights, on disk and in MLflow."""
    assert results(sweep.summary) == results(reference.summary)
    files = sorted(file.relative_to(reference.folder) for file in reference.folder.glob("**/*.pt"))
    assert files == sorted(file.relative_to(sweep.folder) for file in sweep.folder.glob("**/*.pt"))
    assert len(files) == N_TRIALS + 2
    for file in files:
        ours, theirs = weights(sweep.folder / file), weights(reference.folder / file)
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs), f"{file} differs"
    assert_tracked(sweep)


def assert_tracked(sweep: Sweep) -> None:
    """Assert that MLflow agrees with the summary: no run, epoch or model is missing, and none exists twice."""
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
        versions = client.search_model_versions(f"name='quickstart-{name}'")
        assert [version.run_id for version in versions] == [trials[block["best"]].info.run_id]
        assert client.get_model_version_by_alias(f"quickstart-{name}", "champion").version == versions[0].version


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory, empty_database: Path) -> Sweep:
    """The sweep after an undisturbed run on one machine."""
    sweep = Sweep.with_sqlite(tmp_path_factory.mktemp("reference") / "sweeps", empty_database)
    sweep.run_here()
    assert {t["status"] for b in sweep.summary["blocks"].values() for t in b["trials"]} == {
        "completed",
        "stopped_early",
    }
    assert_tracked(sweep)
    return sweep


class FarStore(NamedTuple):
    """S3 server that the nodes reach through a proxy, which may be slow."""

    s3: S3
    proxy: SlowProxy


@pytest.fixture(scope="module")
def network(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """A cluster without nodes."""
    with Cluster(tmp_path_factory.mktemp("cluster"), {"MLFLOW_DISABLE_TELEMETRY": "true"}) as cluster:
        yield cluster


@pytest.fixture(scope="module")
def far_store(network: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Iterator[FarStore]:
    """S3 server behind a proxy. The server is not started; a test that needs it starts it."""
    s3 = S3(tmp_path_factory.mktemp("s3"))
    proxy = SlowProxy(network.address(254), s3.port)
    yield FarStore(s3, proxy)
    proxy.close()


@pytest.fixture(scope="module")
def nodes(network: Cluster, far_store: FarStore) -> Cluster:
    """Cluster with a head. As in a real cluster, its nodes are started with the store's keys in their environment."""
    network.environment |= far_store.s3.environment(far_store.proxy.endpoint)
    network.start_head()
    return network


@pytest.fixture
def cluster(nodes: Cluster) -> Cluster:
    """Cluster with a head and three workers, whatever the previous test did to them."""
    mend(nodes, workers=3)
    return nodes


def mend(cluster: Cluster, *, workers: int) -> None:
    """Repair the cluster, so that it has exactly `workers` intact workers."""
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
    return Sweep.with_sqlite(tmp_path / "sweeps", empty_database)


@pytest.fixture
def submit(nodes: Cluster, tmp_path: Path) -> Iterator[Callable[..., Job]]:
    """Function that runs `ray job submit` from a folder outside the checkout, as an operator does."""
    (tmp_path / "elsewhere").mkdir()
    jobs: list[Job] = []

    def submit(command: list[str]) -> Job:
        job_id = f"{tmp_path.name}-{len(jobs)}"
        jobs.append(
            nodes.submit(command, job_id=job_id, cwd=tmp_path / "elsewhere", working_dir=ROOT, runtime_env=RUNTIME_ENV)
        )
        return jobs[-1]

    yield submit
    for job in jobs:
        if not job.ended:
            job.stop()


def during(job: Job, condition: Callable[[], Any], seconds: float = 180) -> None:
    """Wait until `condition` is true. Fail if the job ends before."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert not job.ended, f"the job ended before it could be disturbed\n{job.output[-3000:]}"
        assert time.monotonic() < deadline, f"nothing to disturb\n{job.output[-3000:]}"
        time.sleep(0.2)


def assert_succeeds(job: Job, seconds: float = 300) -> None:
    assert job.wait(seconds) == 0, job.output[-5000:]
    print(f"{job.id} took {job.seconds:.0f} s")


# The next two tests always run. They are as short as is possible on a cluster.


def test_a_submitted_sweep_runs_on_the_worker_and_its_log_can_be_read(nodes, submit, sweep):
    mend(nodes, workers=1)
    (worker,) = nodes.workers
    job = submit(sweep.command("resources.gpu=1", "data.blocks=[5]", "search.trials_per_block=2", "training.epochs=4"))
    during(job, lambda: worker.processes(f"{TRIAL}.train"))
    assert_succeeds(job)
    assert {trial["status"] for trial in sweep.summary["blocks"]["block5"]["trials"]} <= {"completed", "stopped_early"}
    assert_tracked(sweep)
    log = nodes.job("logs", job.id, cwd=sweep.folder).stdout
    assert "Best trial of each block" in log
    assert f"results: {sweep.folder}" in log


@pytest.mark.slow
def test_a_sweep_that_cannot_be_run_fails_its_job_in_one_line(nodes, submit, sweep):
    job = submit(sweep.command("training.epochz=5"))
    # This is Ray's own exit code for a failed job, whatever the driver's was. `ray job status` shows the driver's.
    assert job.wait() == 1
    assert nodes.status(job.id) == "FAILED"
    assert "exit code 2" in nodes.job("status", job.id, cwd=sweep.folder.parent).stdout
    assert "msae-sweep: search_spaces/quickstart.yaml: training.epochz" in job.output
    assert "Traceback" not in job.output


# The other tests take minutes.


@pytest.mark.slow
def test_a_submitted_sweep_comes_out_as_on_one_machine_and_its_log_can_be_read(cluster, submit, sweep, reference):
    job = submit(sweep.command())
    assert_succeeds(job)
    assert_same(sweep, reference)
    log = cluster.job("logs", job.id, cwd=sweep.folder).stdout
    assert "Best trial of each block" in log
    assert f"results: {sweep.folder}" in log


@pytest.mark.slow
def test_a_stopped_job_ends_in_order_and_leaves_a_sweep_that_goes_on(cluster, submit, sweep, reference):
    job = submit(sweep.command())
    during(job, lambda: sweep.ended() and sweep.running())
    job.stop()
    assert job.wait() == 0  # this is Ray's own exit code, the same as for a job that succeeded
    assert cluster.status(job.id) == "STOPPED"
    assert "interrupted; continue with: msae-sweep resume" in job.output
    assert "Traceback" not in job.output
    ended = sweep.ended()
    assert 0 < len(ended) < N_TRIALS
    assert (sweep.folder / "summary.json").exists()
    times = {name: (sweep.folder / "trials" / name / "model.pt").stat().st_mtime_ns for name in ended}
    assert_succeeds(submit(sweep.command(resume=True)))
    assert_same(sweep, reference)
    for name, before in times.items():
        assert (sweep.folder / "trials" / name / "model.pt").stat().st_mtime_ns == before, f"{name} ran again"


@pytest.mark.slow
def test_a_killed_driver_leaves_a_sweep_that_goes_on(cluster, submit, sweep, reference):
    job = submit(sweep.command())
    during(job, sweep.ended)
    job.driver().kill()
    assert job.wait() != 0
    assert cluster.status(job.id) == "FAILED"
    assert 0 < len(sweep.ended()) < N_TRIALS
    assert_succeeds(submit(sweep.command(resume=True)))
    assert_same(sweep, reference)


@pytest.mark.slow
def test_a_killed_trial_process_costs_no_trial(cluster, submit, sweep, reference):
    job = submit(sweep.command())
    during(job, lambda: sweep.states() & sweep.running())
    killed = [process for worker in cluster.workers for process in worker.processes(TRIAL)]
    for process in killed:
        process.kill()
    assert killed
    assert_succeeds(job)
    assert_same(sweep, reference)


@pytest.mark.slow
def test_a_node_that_is_lost_with_its_shards_costs_no_trial(cluster, submit, sweep, reference):
    job = submit(sweep.command())
    during(job, lambda: sweep.states() & sweep.running())
    cluster.workers[0].kill()
    assert_succeeds(job)
    assert_same(sweep, reference)


@pytest.mark.slow
def test_a_node_that_is_cut_off_for_a_minute_costs_no_trial(cluster, submit, sweep, reference):
    job = submit(sweep.command())
    during(job, lambda: sweep.states() & sweep.running())
    cluster.workers[0].disconnect()
    time.sleep(60)
    cluster.workers[0].connect()
    assert_succeeds(job)
    assert_same(sweep, reference)


@pytest.mark.slow
def test_a_node_whose_disk_fills_up_costs_no_trial(cluster, submit, sweep, reference):
    mend(cluster, workers=2)
    small = cluster.start_worker(disk_bytes=SMALL_DISK)
    job = submit(sweep.command())
    during(job, lambda: sweep.states() & sweep.running() and small.processes(TRIAL))
    small.fill_disk()
    assert_succeeds(job)
    assert_same(sweep, reference)


@pytest.mark.slow
def test_a_node_whose_disk_is_full_before_it_gets_a_trial_costs_no_trial(cluster, submit, sweep, reference):
    mend(cluster, workers=2)
    cluster.start_worker(disk_bytes=SMALL_DISK).fill_disk()
    job = submit(sweep.command())
    assert_succeeds(job)
    assert_same(sweep, reference)


@pytest.mark.slow
def test_a_node_that_joins_gets_trials(cluster, submit, sweep, tmp_path, empty_database):
    mend(cluster, workers=1)
    # The sweep lasts long enough for a node to start and join.
    job = submit(sweep.command("training.epochs=120"))
    during(job, sweep.running)
    joined = cluster.start_worker()
    during(job, lambda: joined.processes(f"{TRIAL}.train"))
    assert_succeeds(job)
    alone = Sweep.with_sqlite(tmp_path / "alone", empty_database)
    alone.run_here("training.epochs=120")
    assert_same(sweep, alone)


def terminate(cluster: Cluster, worker: Node) -> None:
    """Send SIGTERM to the first process, as Slurm, the end of a spot machine and `docker stop` do."""
    worker.terminate()


def drain(cluster: Cluster, worker: Node) -> None:
    """Run the preStop command of cluster/raycluster.yaml, which its pods run before their SIGTERM."""
    manifest = yaml.safe_load((ROOT / "cluster" / "raycluster.yaml").read_text())
    (container,) = manifest["spec"]["workerGroupSpecs"][0]["template"]["spec"]["containers"]
    *_, script = container["lifecycle"]["preStop"]["exec"]["command"]
    worker.run("bash", "-c", script.replace("sleep 45", "true"), RAY_ADDRESS=f"{cluster.head.address}:6379")


@pytest.mark.slow
@pytest.mark.parametrize("tell", [terminate, drain])
def test_a_node_that_is_told_to_go_saves_its_trial_before(cluster, submit, sweep, reference, tell):
    mend(cluster, workers=1)
    # A node that was asked to leave does not count as a failure of its trial.
    job = submit(sweep.command("resources.checkpoint_seconds=600", "resources.max_failures=0"))
    (worker,) = cluster.workers
    during(job, lambda: sweep.running() and worker.processes(f"{TRIAL}.train"))
    assert not sweep.states()
    tell(cluster, worker)
    during(job, sweep.states)
    assert worker.running
    if tell is terminate:
        worker.wait(60)
    else:
        worker.kill()
    cluster.start_worker()
    assert_succeeds(job)
    assert_same(sweep, reference)


@pytest.mark.slow
def test_a_sweep_that_asks_for_a_gpu_waits_for_a_node_with_one(cluster, submit, sweep, reference):
    mend(cluster, workers=0)
    job = submit(sweep.command("resources.gpu=1"))
    during(job, lambda: "resources.gpu: 1 per trial, but no node has that yet; waiting" in job.output)
    cluster.start_worker()
    assert_succeeds(job)
    assert_same(sweep, reference)


@pytest.mark.slow
def test_a_sweep_that_takes_what_there_is_says_that_there_was_no_gpu(cluster, submit, sweep):
    mend(cluster, workers=0)
    job = submit(sweep.command("training.device=auto"))
    during(job, lambda: "resources.gpu: auto, and the cluster has no GPU now" in job.output)


@pytest.fixture
def tracked(
    nodes: Cluster, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Sweep, Mlflow, Postgres]]:
    """Sweep that is tracked by a server on PostgreSQL, which the nodes reach by its address."""
    if reason := Postgres.why_not():
        pytest.skip(reason)
    folder = tmp_path_factory.mktemp("mlflow")
    with Postgres() as database, Mlflow(folder, database.uri, address=nodes.address(254), workers=2) as server:
        yield Sweep(tmp_path / "sweeps", server.uri), server, database


@pytest.mark.slow
@pytest.mark.parametrize("what", ["server", "database"])
def test_tracking_that_dies_and_comes_back_misses_and_doubles_nothing(cluster, submit, tracked, reference, what):
    sweep, server, database = tracked
    job = submit(sweep.command())
    during(job, lambda: sweep.states() & sweep.running())
    victim = server if what == "server" else database
    victim.kill()
    time.sleep(5)
    assert not job.ended
    victim.start()
    assert_succeeds(job)
    assert "not sent to MLflow" not in job.output
    assert_same(sweep, reference)


@pytest.mark.slow
@pytest.mark.parametrize("what", ["server", "database"])
def test_tracking_that_is_dead_at_the_end_costs_the_sweep_nothing_and_is_told_later(
    cluster, submit, tracked, reference, what
):
    sweep, server, database = tracked
    job = submit(sweep.command())
    during(job, lambda: len(sweep.ended()) >= N_TRIALS - 1)
    victim = server if what == "server" else database
    victim.kill()
    assert_succeeds(job)
    assert "not sent to MLflow" in job.output
    assert f"send them later with: msae-sweep track-sync {sweep.folder}" in job.output
    assert results(sweep.summary) == results(reference.summary)
    victim.start()
    command = ["python", "-m", "msae_sweep", "track-sync", str(sweep.folder), "--tracking-uri", sweep.uri]
    assert_succeeds(submit(command))
    assert_same(sweep, reference)


@pytest.mark.slow
def test_a_sweep_in_a_store_that_takes_five_seconds_a_call_comes_out_the_same(
    cluster, submit, far_store, reference, empty_database, tmp_path
):
    if reason := S3.why_not():
        pytest.skip(reason)
    s3, proxy = far_store
    with s3, in_environment(s3.environment()):
        sweep = Sweep.with_sqlite(tmp_path / "sweeps", empty_database)
        sweep.storage = f"{s3.bucket}/sweeps"
        proxy.delay_seconds = 5.0
        # A state saved every second would take five seconds each time.
        job = submit(sweep.command("resources.checkpoint_seconds=30"))
        try:
            assert_succeeds(job, 900)
        finally:
            proxy.delay_seconds = 0.0
        print(f"{proxy.n_answers} answers of the store took 5 s each")
        sweep.fetch()
    assert_same(sweep, reference)
    said = job.output + "".join(file.read_text() for file in cluster.folder.glob("disk*/session_*/logs/*driver*"))
    assert s3.secret not in said


# Raw activations of these rows and this width take three times the object store of one node.
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
FETCHING = """
import json, sys
import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy
from msae_sweep.config import DataConfig
from msae_sweep.data.prepare import shards

@ray.remote(num_cpus=0)
class Reader:
    def fetch(self, block):
        before = self.received()
        n_rows = sum(len(shard()) for shard in (*block.train_shards(), *block.val_shards()))
        return n_rows, self.received() - before

    def received(self):
        (line,) = [line for line in open("/proc/net/dev") if "eth0" in line]
        return int(line.split(":")[1].split()[0])

data, storage, reader = sys.argv[1:]
ray.init(log_to_driver=False)
block = shards.prepare_blocks(DataConfig(path=data, blocks=(5,)), storage, batch_size=1)[5]
address = {node["NodeID"]: node["NodeManagerAddress"] for node in ray.nodes()}
places = [[address[node] for node in place["node_ids"]] for place in
          (ray.experimental.get_object_locations([ref])[ref] for ref in block.refs)]
(there,) = [node for node in address if address[node] == reader and node in
            {node["NodeID"] for node in ray.nodes() if node["Alive"]}]
strategy = NodeAffinitySchedulingStrategy(there, soft=False)
readers = [Reader.options(scheduling_strategy=strategy).remote() for _ in range(2)]
fetched = [ray.get(reader.fetch.remote(block)) for reader in readers]
print("FETCHED", json.dumps({"places": places, "fetched": fetched}))
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


@pytest.mark.slow
def test_shards_lie_on_all_nodes_and_a_node_fetches_each_once(cluster, submit, tmp_path, large_data):
    mend(cluster, workers=2)
    # Its object store has room for the shards of all nodes beside its own.
    reader = cluster.start_worker(store_bytes=800 * MB)
    job = submit(["python", "-c", FETCHING, str(large_data), str(tmp_path / "sweeps"), reader.address])
    assert_succeeds(job)
    reader.kill()
    found = json.loads(re.findall(r"FETCHED (.+)", job.output)[0])
    assert {address for place in found["places"] for address in place} == {node.address for node in cluster.nodes}
    far = sum(reader.address not in place for place in found["places"]) / len(found["places"])
    (n_rows, first), (again, second) = found["fetched"]
    assert n_rows == again == LARGE_ROWS
    n_bytes = 4 * LARGE_ROWS * LARGE_DIM
    print(f"{far:.0%} of {n_bytes / MB:.0f} MiB elsewhere; fetched {first / MB:.0f} MiB, then {second / MB:.0f} MiB")
    assert far * n_bytes * 0.8 < first < far * n_bytes * 1.2
    assert second < 0.02 * n_bytes


@pytest.mark.slow
def test_data_larger_than_a_nodes_object_store_comes_out_as_on_one_machine(
    cluster, submit, sweep, large_data, tmp_path, empty_database
):
    job = submit(sweep.command(*LARGE, f"data.path={large_data}"))
    spilled = cluster.folder.glob
    during(job, lambda: list(spilled("disk*/session_*/ray_spilled_objects_*/*")))
    assert_succeeds(job)
    alone = Sweep.with_sqlite(tmp_path / "alone", empty_database)
    alone.run_here(*LARGE, f"data.path={large_data}")
    assert results(sweep.summary) == results(alone.summary)
    assert_tracked(sweep)
