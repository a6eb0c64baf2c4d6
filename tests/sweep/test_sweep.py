"""Tests of a whole sweep on planted data: what it leaves, and that the result does not depend on how it ran."""

import contextlib
import json
import os
import re
import shutil
import signal
import sys
import threading
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from planted_sweep import config, results, sweep

from msae_sweep import signals
from msae_sweep.cli import main
from msae_sweep.data.sources.planted import PlantedSource
from msae_sweep.errors import ConfigError, DataError, DeviceError, StorageError, SweepError
from msae_sweep.sae import model_file
from msae_sweep.sae.evaluation import evaluate
from msae_sweep.sweep.preparation import Preparation
from msae_sweep.sweep.tuning import Tuning
from msae_sweep.sweep_folder.trial_record import FINAL_STATUSES
from msae_sweep.track.journal import Journal
from msae_sweep.track.uri import redact

NOT_BEGUN = "the sweep has not started; prepared data is kept; run the same command to continue"
pytestmark = pytest.mark.usefixtures("ray_session")


CTRL_C_HANDLERS: list[Any] = []
"""SIGINT handlers before and after the sweep of `finished`."""


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Any:
    CTRL_C_HANDLERS.append(signal.getsignal(signal.SIGINT))
    result = sweep(tmp_path_factory.mktemp("finished"), "resources.max_concurrent=2", drawn=True)
    CTRL_C_HANDLERS.append(signal.getsignal(signal.SIGINT))
    return result


@pytest.fixture(autouse=True)
def ctrl_c() -> Iterator[None]:
    """Set the default handler of SIGINT, because tests of other files that use Ray Tune alone leave Tune's."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_the_summary_has_every_trial_best_first(finished):
    written = json.loads((finished.folder.path / "summary.json").read_text())
    assert written == json.loads(json.dumps(finished.summary))
    assert not finished.interrupted
    for name, block in written["blocks"].items():
        assert len(block["trials"]) == 4
        for trial in block["trials"]:
            assert {"trial_id", "status", "epochs", "params", "metrics"} <= set(trial)
            assert set(trial["params"]) == {"learning_rate", "expansion_factor", "weighting"}
            assert {"r2_k2", "r2_k4", "r2_k8", "objective", "dead_ratio"} <= set(trial["metrics"])
        objectives = [trial["metrics"]["objective"] for trial in block["trials"]]
        assert objectives == sorted(objectives, reverse=True)
        assert block["best"] == block["trials"][0]["trial_id"]
        assert block["best"].startswith(name)


def test_asha_stops_some_trials_at_rungs_and_the_rest_train_to_the_end(finished):
    trials = [t for block in finished.summary["blocks"].values() for t in block["trials"]]
    assert {t["status"] for t in trials} == {"completed", "stopped_early"}
    for trial in trials:
        assert trial["epochs"] in ([6] if trial["status"] == "completed" else [1, 2, 4])
        assert trial["reason"] == ("epochs" if trial["status"] == "completed" else f"asha at epoch {trial['epochs']}")


def test_reconstruction_json_is_in_the_notebooks_form(finished):
    written = json.loads((finished.folder.path / "results" / "reconstruction.json").read_text())
    assert {name: set(levels) for name, levels in written.items()} == {
        "block5": {"k2", "k4", "k8"},
        "block20": {"k2", "k4", "k8"},
    }


def test_the_figure_is_a_png(finished):
    png = (finished.folder.path / "figures" / "msae_training.png").read_bytes()
    assert png.startswith(b"\x89PNG")
    assert len(png) > 50_000


def test_the_report_is_written_and_its_curves_go_through_the_r2_that_the_summary_states(finished):
    page = (finished.folder.path / "report" / "report.html").read_text()
    curves = json.loads((finished.folder.path / "results" / "r2_by_k.json").read_text())
    for name, block in finished.summary["blocks"].items():
        assert f"Block {name.removeprefix('block')}: use {block['best']}" in page
        for k in (2, 4, 8):
            stated = block["trials"][0]["metrics"][f"r2_k{k}"]
            assert curves[block["best"]]["r2"][k - 1] == pytest.approx(stated, abs=1e-5)
    assert "trained levels only" not in page


def test_what_a_report_needs_to_tell_how_to_run_it_again_is_written(finished):
    identity = json.loads((finished.folder.path / "identity.json").read_text())
    assert {"torch", "ray", "mlflow", "python", "msae_sweep", "config_digest", "gpus_per_trial"} <= set(identity)
    assert identity["runs"][0]["command"] == "test"
    assert identity["runs"][0]["seconds"] > 0
    manifests = json.loads((finished.folder.path / "data.json").read_text())
    assert manifests == {name.removeprefix("block"): b["data"] for name, b in finished.summary["blocks"].items()}


def test_a_report_that_fails_costs_the_sweep_nothing(finished, tmp_path, monkeypatch):
    from msae_sweep import report

    def fail(path, draw):
        raise RuntimeError("no fonts")

    copy_of(finished, tmp_path)
    monkeypatch.setattr(report, "write_at_the_end", fail)
    result = sweep(tmp_path, resume=True, drawn=True)
    assert results(result.summary) == results(finished.summary)
    assert not result.tracking.pending
    said = (tmp_path / "log").read_text()
    assert "no report was written: RuntimeError: no fonts; try msae-sweep report" in said
    assert said.index("Success criteria") < said.index("no report"), "results come before what takes longer"


@pytest.mark.slow
def test_figures_drawn_side_by_side_are_those_drawn_here(finished, monkeypatch):
    from msae_sweep.report import write_at_the_end
    from msae_sweep.sweep.figure_workers import draw_in_workers

    def figures() -> dict[str, bytes]:
        return {file.name: file.read_bytes() for file in (finished.folder.path / "report" / "figures").iterdir()}

    write_at_the_end(finished.folder)
    here = figures()
    monkeypatch.setattr(os, "cpu_count", lambda: 4)
    shares: list[int] = []

    def counted(jobs):
        shares.append(len(jobs))
        return draw_in_workers(jobs)

    for file in (finished.folder.path / "report" / "figures").iterdir():
        file.unlink()
    write_at_the_end(finished.folder, counted)
    assert figures() == here
    assert sum(shares) >= len(here) // 2, "an SVG and a PNG a job"


def test_what_a_worker_cannot_draw_is_drawn_here(monkeypatch):
    from msae_sweep.sweep.figure_workers import run_in_workers

    here = os.getpid()

    def job(only_here: bool) -> int:
        if only_here and os.getpid() != here:
            raise RuntimeError("no fonts")
        return os.getpid()

    monkeypatch.setattr(os, "cpu_count", lambda: 4)
    (there,) = run_in_workers([partial(job, False)])()
    assert there != here
    assert run_in_workers([partial(job, True)] * 3)() == [here] * 3
    assert run_in_workers([])() == []


def test_tune_does_not_import_mlflow_for_statistics(monkeypatch):
    from ray import tune
    from ray.air._internal import usage

    from msae_sweep.sweep.tuning import _without_usage_statistics

    monkeypatch.delitem(sys.modules, "mlflow", raising=False)
    before = usage.tag_callbacks
    with _without_usage_statistics():
        usage.tag_callbacks([tune.Callback()])
    assert "mlflow" not in sys.modules
    assert usage.tag_callbacks is before


def test_the_report_goes_with_the_sweeps_run_in_mlflow(finished):
    from msae_sweep.track.connection import connect

    client = connect(config(finished.folder.path.parents[1]).tracking.uri)
    runs = client.search_runs([e.experiment_id for e in client.search_experiments()])
    (sweep_run,) = [run for run in runs if "mlflow.parentRunId" not in run.data.tags and run.data.params]
    assert [f.path for f in client.list_artifacts(sweep_run.info.run_id, "report")] == ["report/report.html"]
    assert sweep_run.info.status == "FINISHED"


@pytest.mark.parametrize("block", [5, 20])
def test_the_best_model_of_a_block_has_the_r2_that_the_summary_states(finished, block):
    best = finished.summary["blocks"][f"block{block}"]["trials"][0]
    file = model_file.load(finished.folder.path / "models" / f"msae_block{block}.pt")
    same = model_file.load_safetensors(finished.folder.path / "models" / f"msae_block{block}.safetensors")
    source = PlantedSource(config(finished.folder.path).data.planted)
    raw = torch.from_numpy(np.concatenate([source.read(r).x for r in source.row_ranges(block, 3000)]))
    from msae_sweep.data.prepare.split import is_validation

    val = raw[torch.from_numpy(is_validation(np.arange(3000) // 10, 0, 0.1))]
    x = (val - torch.from_numpy(file.mean)) / torch.from_numpy(file.std)
    x_hat = (file.standardised()(val) - torch.from_numpy(file.mean)) / torch.from_numpy(file.std)
    r2 = 1 - ((x - x_hat) ** 2).sum() / ((x - x.mean(dim=0)) ** 2).sum()
    assert r2.item() == pytest.approx(best["metrics"]["r2_k8"], abs=1e-5)
    assert torch.equal(file.standardised()(val), same.standardised()(val))
    assert (file.total_samples, same.total_samples) == (len(val), len(val))
    assert (
        file.activation_counts.tolist() == evaluate(file.model, [x]).firing.tolist() == same.activation_counts.tolist()
    )


def test_the_summary_says_how_much_of_the_true_dictionary_was_recovered(finished):
    for block in finished.summary["blocks"].values():
        assert 0.5 < block["dictionary_recovery"] <= 1


def test_success_criteria_stand_for_the_largest_and_smallest_k(finished):
    criteria = finished.summary["blocks"]["block5"]["success_criteria"]
    assert list(criteria) == ["R² (k=8) > 0.85", "R² (k=2) > 0.40", "Dead latents < 30%"]
    assert all(
        c["passed"] == (c["value"] < 0.3 if "Dead" in n else c["value"] > float(n[-4:])) for n, c in criteria.items()
    )


@pytest.mark.parametrize("block", [5, 20])
def test_the_summary_has_the_r2_of_as_many_principal_components_as_latents(finished, block):
    from msae_sweep.data.prepare.split import is_validation

    source = PlantedSource(config(finished.folder.path).data.planted)
    raw = np.concatenate([source.read(r).x for r in source.row_ranges(block, 3000)]).astype("f8")
    held_out = is_validation(np.arange(3000) // 10, 0, 0.1)
    train, val = (
        (raw[rows] - raw[~held_out].mean(axis=0)) / raw[~held_out].std(axis=0) for rows in (~held_out, held_out)
    )
    components = np.linalg.svd(train, full_matrices=False)[2]
    expected = {}
    for k in (2, 4, 8):
        error = val - val @ components[:k].T @ components[:k]
        expected[f"k{k}"] = pytest.approx(1 - (error**2).sum() / ((val - val.mean(axis=0)) ** 2).sum(), abs=1e-5)
    assert finished.summary["blocks"][f"block{block}"]["pca_r2"] == expected
    assert "k principal components" in (finished.folder.path / f"report/figures/r2_by_k_block{block}.svg").read_text()


def test_components_that_workers_measure_are_those_measured_here(finished, monkeypatch):
    from msae_sweep.report.pca_baseline import CACHE, pca_baselines
    from msae_sweep.sweep.figure_workers import run_in_workers

    folder = finished.folder
    manifests = {block: finished.summary["blocks"][f"block{block}"]["data"] for block in (5, 20)}
    here = pca_baselines(folder, folder.storage, manifests)
    assert here.by_block[5][7] == finished.summary["blocks"]["block5"]["pca_r2"]["k8"]
    monkeypatch.setattr(os, "cpu_count", lambda: 4)
    (folder.path / CACHE).unlink()
    assert pca_baselines(folder, folder.storage, manifests, run=run_in_workers) == here


def test_further_criteria_are_in_the_summary_and_shown_after_the_three_that_decide(finished):
    further = finished.summary["blocks"]["block5"]["further_criteria"]
    assert list(further) == ["R² (k=8) − R² (k=2) > 0.25", "Nestedness > 0.80", "R² (k=8) > 0.92 (a wish)"]
    metrics = finished.summary["blocks"]["block5"]["trials"][0]["metrics"]
    assert next(iter(further.values()))["value"] == metrics["r2_k8"] - metrics["r2_k2"]
    said = (finished.folder.path.parents[1] / "log").read_text()
    assert said.index("Success criteria") < said.index("Further criteria of the original series")


def test_finished_trials_leave_a_model_and_no_training_state(finished):
    folders = list((finished.folder.path / "trials").iterdir())
    assert len(folders) == 8
    assert all((folder / "model.pt").exists() and not (folder / "state.pt").exists() for folder in folders)


def test_mlflow_has_a_run_for_the_sweep_and_one_for_each_trial_with_every_epoch(finished):
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{finished.folder.path.parents[1]}/mlflow.db")
    experiment = client.get_experiment_by_name("msae-sweep")
    runs = client.search_runs([experiment.experiment_id])
    (parent,) = [r for r in runs if "mlflow.parentRunId" not in r.data.tags]
    trials = {r.data.tags["msae_sweep.trial_id"]: r for r in runs if r is not parent}
    entries = {t["trial_id"]: t for block in finished.summary["blocks"].values() for t in block["trials"]}
    assert set(trials) == set(entries)
    for trial_id, run in trials.items():
        assert run.data.tags["mlflow.parentRunId"] == parent.info.run_id
        assert run.data.tags["status"] == entries[trial_id]["status"]
        assert run.data.params["aux_coefficient"] == "0.03125"
        steps = [m.step for m in client.get_metric_history(run.info.run_id, "r2_k8")]
        assert steps == list(range(1, entries[trial_id]["epochs"] + 1))
        assert run.inputs.dataset_inputs
    models = client.search_logged_models([experiment.experiment_id])
    assert sorted(m.source_run_id for m in models) == sorted(r.info.run_id for r in trials.values())
    assert {str(m.status) for m in models} == {"READY"}
    for block in (5, 20):
        champion = client.get_model_version_by_alias(f"planted-block{block}", "champion")
        assert champion.run_id == trials[finished.summary["blocks"][f"block{block}"]["best"]].info.run_id
    assert finished.tracking.pending == 0


@pytest.mark.slow  # the tests below use one worker and compare with `finished`, which had two
@pytest.mark.parametrize("concurrent", [1, 3])
def test_the_result_does_not_depend_on_how_many_trials_run_at_once(finished, tmp_path, concurrent):
    other = sweep(tmp_path, f"resources.max_concurrent={concurrent}")
    assert results(other.summary) == results(finished.summary)


@pytest.mark.slow
def test_a_fast_trial_waits_at_its_rung_for_a_slow_predecessor(tmp_path, monkeypatch):
    from msae_sweep.sweep import tuning
    from msae_sweep.sweep.scheduler import BlockAsha

    decisions, one_waits = [], tmp_path / "one waits"
    judge_result = BlockAsha.on_trial_result

    def recording(self, tune_controller, trial, result):
        decisions.append((trial.config["trial"]["index"], judge_result(self, tune_controller, trial, result)))
        if decisions[-1][1] == "PAUSE":
            one_waits.touch()
        return decisions[-1][1]

    class SlowFirst(tuning.MSAETrial):
        def step(self):
            deadline = time.monotonic() + 60
            while self._trial_id == "block5-000" and not one_waits.exists() and time.monotonic() < deadline:
                time.sleep(0.02)
            return super().step()

    monkeypatch.setattr(BlockAsha, "on_trial_result", recording)
    monkeypatch.setattr(tuning, "MSAETrial", SlowFirst)
    changes = ["data.blocks=[5]", "search.trials_per_block=3", "space.expansion_factor={grid: [4, 2, 3]}",
               "training.epochs=4", "asha.grace_epochs=2", "data.planted.rows=1500"]  # fmt: skip
    (tmp_path / "two").mkdir()
    (tmp_path / "one").mkdir()
    together = sweep(tmp_path / "two", *changes, "resources.max_concurrent=2")
    assert any(index > 0 and decision == "PAUSE" for index, decision in decisions)
    assert not any(index == 0 and decision != "CONTINUE" for index, decision in decisions)
    alone = sweep(tmp_path / "one", *changes)
    assert results(together.summary) == results(alone.summary)


def test_a_block_swept_alone_has_the_same_trials(finished, tmp_path):
    alone = sweep(tmp_path, "data.blocks=[20]")
    assert results(alone.summary)["blocks"]["block20"] == results(finished.summary)["blocks"]["block20"]


def test_a_name_that_exists_needs_resume_and_a_finished_sweep_stays_as_it_is(finished):
    folder = finished.folder.path.parents[1]
    with pytest.raises(SweepError, match=r"small exists in .*; continue it with --resume"):
        sweep(folder)
    times = {f: f.stat().st_mtime_ns for f in (finished.folder.path / "trials").rglob("model.pt")}
    again = sweep(folder, resume=True)
    assert results(again.summary) == results(finished.summary)
    assert {f: f.stat().st_mtime_ns for f in (finished.folder.path / "trials").rglob("model.pt")} == times


def test_a_resumed_sweep_must_ask_the_same_question(finished):
    with pytest.raises(ConfigError, match=r"training\.epochs: is 7 but sweep small was started with 6"):
        sweep(finished.folder.path.parents[1], "training.epochs=7", resume=True)


def test_a_sweep_is_resumed_from_another_working_folder_and_after_it_was_moved(finished, tmp_path, monkeypatch):
    from msae_sweep.sweep.resume import load_config

    monkeypatch.chdir(tmp_path)
    config = load_config(finished.folder.path)
    assert Path(config.storage) == finished.folder.path.parent
    assert config.tracking.uri.startswith("sqlite:////")
    moved = tmp_path / "elsewhere" / "renamed"
    shutil.copytree(finished.folder.path, moved)
    assert (load_config(moved).storage, load_config(moved).name) == (str(moved.parent), "renamed")


def test_a_password_in_the_tracking_uri_is_not_kept_and_has_to_be_given_again(finished, tmp_path, monkeypatch):
    from msae_sweep.sweep.resume import load_config

    shutil.copytree(finished.folder.path, tmp_path / "small")
    file = tmp_path / "small" / "sweep.yaml"
    file.write_text(re.sub("uri: sqlite.*", "uri: http://***@mlflow:5000", file.read_text()))
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    with pytest.raises(ConfigError, match=r"password .* is not kept"):
        load_config(tmp_path / "small")
    given = "http://me:secret@mlflow:5000"
    assert load_config(tmp_path / "small", given).tracking.uri == given
    monkeypatch.setenv("MLFLOW_TRACKING_URI", given)
    assert load_config(tmp_path / "small").tracking.uri == given


def test_a_sweep_whose_tracking_uri_had_a_password_is_resumed_when_it_is_given_again(tmp_path, monkeypatch):
    from msae_sweep.sweep import resume, run

    given = "http://me:secret@mlflow:5000"
    begun, folder, _ = run.check_before_ray(config(tmp_path, f"tracking.uri={given}"), resume=False)
    folder.create()
    folder.write_text(folder.config_file, redact(begun.to_yaml()))
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    resumed, _, _ = run.check_before_ray(resume.load_config(folder.path, given), resume=True)
    assert resumed.tracking.uri == given
    assert "secret" not in folder.config_file.read_text()


def test_a_gpu_that_is_not_there_is_refused_before_any_trial(tmp_path):
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    with pytest.raises(DeviceError, match=r"resources\.gpu: 1 per trial, but no node has more than 0; write 0 or auto"):
        sweep(tmp_path, "resources.gpu=1")
    with pytest.raises(DeviceError, match=r"resources\.cpu: 99"):
        sweep(tmp_path, "resources.cpu=99")
    with pytest.raises(DeviceError, match="cuda"):
        sweep(tmp_path, "training.device=cuda")
    assert not (tmp_path / "sweeps" / "small").exists()


def test_a_driver_that_another_one_is_ahead_of_writes_nothing(finished, tmp_path):
    copy = shutil.copytree(finished.folder.path, tmp_path / "sweeps" / "small")
    before = {file: file.read_bytes() for file in copy.rglob("*") if file.is_file()}
    with contextlib.closing(Journal(copy)), pytest.raises(SweepError, match="is being run by another process"):
        sweep(tmp_path, resume=True)
    assert {file: file.read_bytes() for file in copy.rglob("*") if file.is_file()} == before


def test_a_sweep_that_another_driver_began_meanwhile_is_left_alone(tmp_path, monkeypatch):
    """Two commands have one name: what the second one checked before it connected to Ray is no longer true."""
    other = tmp_path / "sweeps" / "small" / "sweep.yaml"

    def gpus(config, say) -> float:
        other.parent.mkdir(parents=True)
        other.write_text(config.to_yaml())
        return 0.0

    monkeypatch.setattr("msae_sweep.sweep.run.gpus_per_trial", gpus)
    with pytest.raises(SweepError, match=r"sweep small exists .*; continue it with --resume"):
        sweep(tmp_path)
    assert not (other.parent / "identity.json").exists()


def test_ray_tune_leaves_no_handler_that_would_swallow_a_later_ctrl_c(finished):
    before, after = CTRL_C_HANDLERS
    assert after is before


def test_tune_has_a_folder_of_the_sweeps_own(finished):
    """Tune keeps the working folders of all sweeps of a node in one place, named by start second and this name."""
    identity = json.loads((finished.folder.path / "identity.json").read_text())
    assert [folder.name for folder in (finished.folder.path / "tune").iterdir()] == [identity["sweep_id"]]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_while_data_is_prepared_it_says_how_to_go_on(tmp_path, monkeypatch, number):
    def prepare(*args, on_progress, **options):
        is_waited_for.wait(60)
        os.kill(os.getpid(), number)  # the signal goes to the main thread, which waits for the data
        ended.wait(60)
        on_progress("of no interest any more")

    def wait(preparation):
        is_waited_for.set()
        return wait_for_all(preparation)

    wait_for_all, is_waited_for = Preparation.wait, threading.Event()
    monkeypatch.setattr(Preparation, "wait", wait)
    ended, before = threading.Event(), signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr("msae_sweep.sweep.preparation.shards.prepare_blocks", prepare)
    with pytest.raises(KeyboardInterrupt) as interrupt:
        sweep(tmp_path)
    ended.set()
    assert interrupt.value.__notes__ == [NOT_BEGUN]
    assert signals.exit_code() == 128 + number
    assert signal.getsignal(signal.SIGTERM) is before
    assert not (tmp_path / "sweeps/small/sweep.yaml").exists()
    assert "of no interest" not in (tmp_path / "log").read_text()


def test_interrupted_while_workers_start_beside_the_preparation_it_says_the_same(tmp_path, monkeypatch):
    ended = threading.Event()
    monkeypatch.setattr("msae_sweep.sweep.run.enough_free_cores", lambda config, gpus: True)
    monkeypatch.setattr("msae_sweep.sweep.preparation.shards.prepare_blocks", lambda *args, **options: ended.wait(60))
    # Ray Tune returns when it is interrupted, as if all trials had ended.
    monkeypatch.setattr(Tuning, "_fit", lambda *args: None)
    with pytest.raises(KeyboardInterrupt) as interrupt:
        sweep(tmp_path)
    ended.set()
    assert interrupt.value.__notes__ == [NOT_BEGUN]


@pytest.mark.slow
def test_the_result_does_not_depend_on_whether_workers_start_beside_the_preparation(finished, tmp_path, monkeypatch):
    monkeypatch.setattr("msae_sweep.sweep.run.enough_free_cores", lambda config, gpus: True)
    beside = sweep(tmp_path)
    assert results(beside.summary) == results(finished.summary)


ONE_EPOCH = ["search.trials_per_block=1", "training.epochs=1"]


@pytest.fixture
def repaired(tmp_path, monkeypatch):
    """Two folders with the same data. The sweep of the first was refused for a bad row that is now repaired."""
    monkeypatch.setattr("msae_sweep.sweep.run.enough_free_cores", lambda config, gpus: True)
    rng = np.random.default_rng(0)
    good = {block: rng.standard_normal((600, 16), dtype=np.float32) for block in (5, 20)}
    bad = np.where(np.arange(600)[:, None] == 77, np.nan, good[20])
    for folder, last_block in ((tmp_path / "bad", bad), (tmp_path / "good", good[20])):
        for block, x in ((5, good[5]), (20, last_block)):
            (folder / "data" / f"block{block}").mkdir(parents=True)
            np.save(folder / "data" / f"block{block}" / "chunk_0000.npy", x)
    with pytest.raises(DataError, match=r"chunk_0000.npy row 77: NaN or Inf"):
        sweep(tmp_path / "bad", f"data.path={tmp_path}/bad/data", *ONE_EPOCH)
    np.save(tmp_path / "bad" / "data" / "block20" / "chunk_0000.npy", good[20])
    return tmp_path / "bad", tmp_path / "good"


def test_data_that_cannot_be_used_leaves_no_sweep_though_workers_started(repaired):
    left = repaired[0] / "sweeps" / "small"
    assert not (left / "sweep.yaml").exists()
    assert not (left / "trials").exists()


@pytest.mark.slow
def test_after_data_that_could_not_be_used_the_same_name_gives_the_sweep_of_the_repaired_data(repaired):
    mended, whole = (sweep(folder, f"data.path={folder}/data", *ONE_EPOCH) for folder in repaired)
    trials = [[b["trials"] for b in results(sw.summary)["blocks"].values()] for sw in (mended, whole)]
    assert trials[0] == trials[1]


@pytest.mark.slow
def test_a_sweep_folder_that_fills_up_ends_the_sweep_and_it_can_be_resumed(finished, tmp_path, monkeypatch):
    write, n_written = Path.write_bytes, []

    def until_full(self, content):
        n_written.append(self)
        if len(n_written) > 12:
            write(self, content[: len(content) // 2])
            raise OSError(28, "No space left on device", str(self))
        return write(self, content)

    line = (
        r"^\S+ cannot be written: No space left on device, [\d,]+ MiB are free; make space, "
        r"then continue with: msae-sweep"
    )
    with monkeypatch.context() as disk:
        disk.setattr(Path, "write_bytes", until_full)
        with pytest.raises(StorageError, match=line):
            sweep(tmp_path, "data.blocks=[5]")
    folder = tmp_path / "sweeps" / "small"
    known = {f.parent.name: json.loads(f.read_text()) for f in (folder / "trials").glob("*/trial.json")}
    assert 0 < len(known) <= 4
    assert not list((folder / "trials").rglob("*.part"))
    resumed = sweep(tmp_path, "data.blocks=[5]", resume=True)
    assert results(resumed.summary)["blocks"]["block5"] == results(finished.summary)["blocks"]["block5"]


@pytest.mark.slow
def test_a_worker_that_cannot_save_ends_the_sweep_in_one_line_and_no_trial_counts_as_failed(tmp_path, monkeypatch):
    from msae_sweep.sweep import tuning

    class OnAFullDisk(tuning.MSAETrial):
        def _save_model(self):
            error = OSError(28, "No space left on device")
            raise self._folder.write_error(self._folder.model_file(self._trial_id), error)

    changes = ["data.blocks=[5]", "search.trials_per_block=2", "training.epochs=2"]
    with monkeypatch.context() as disk:
        disk.setattr(tuning, "MSAETrial", OnAFullDisk)
        with pytest.raises(StorageError, match=r"block5-00\d/model.pt cannot be written: No space left on device, "):
            sweep(tmp_path, *changes)
    assert "failed" not in (tmp_path / "log").read_text()
    records = [json.loads(f.read_text()) for f in (tmp_path / "sweeps/small/trials").glob("*/trial.json")]
    assert not {record["status"] for record in records} & set(FINAL_STATUSES), "a resumed sweep would not train it"


def copy_of(finished: Any, folder: Path) -> Path:
    """Return a copy of a finished sweep that may be damaged. Its MLflow is another one, which is empty."""
    shutil.copytree(finished.folder.path.parent, folder / "sweeps")
    return folder / "sweeps" / "small"


@pytest.mark.slow
def test_what_is_damaged_and_can_be_made_again_is_and_the_sweep_ends_as_before(finished, tmp_path):
    folder = copy_of(finished, tmp_path)
    entries = {name: block["trials"] for name, block in finished.summary["blocks"].items()}
    gone, spoilt = (entries[name][0]["trial_id"] for name in ("block5", "block20"))
    cut_off, last = (entries["block20"][i]["trial_id"] for i in (1, -1))
    models = {trial_id: folder / "trials" / trial_id / "model.pt" for trial_id in (gone, spoilt, cut_off)}
    models[gone].unlink()
    models[cut_off].write_bytes(models[cut_off].read_bytes()[:3000])
    # This damage is found only when the best model is read at the end.
    content = models[spoilt].read_bytes()
    middle = len(content) // 2
    models[spoilt].write_bytes(content[:middle] + bytes(400) + content[middle + 400 :])
    record = folder / "trials" / last / "trial.json"
    record.write_text(record.read_text()[:100])
    for name in ("identity.json", "data.json", "origins.json", "sweep.yaml"):
        (folder / name).write_text((folder / name).read_text()[:30])
    before = {name: json.loads((finished.folder.path / name).read_text()) for name in ("identity.json", "data.json")}

    again = sweep(tmp_path, resume=True)
    assert results(again.summary) == results(finished.summary)
    assert json.loads((folder / "identity.json").read_text())["sweep_id"] == before["identity.json"]["sweep_id"]
    assert json.loads((folder / "data.json").read_text()) == before["data.json"]
    said = (tmp_path / "log").read_text()
    for trial_id, what in (
        (gone, "missing or truncated"),
        (cut_off, "missing or truncated"),
        (last, "trial.json is damaged"),
        (spoilt, "model.pt is damaged"),
    ):
        assert re.search(rf"^\S+.*{what}.*: {trial_id} is trained again$", said, re.MULTILINE)
    assert_same_weights(folder, finished.folder.path)


def assert_same_weights(one: Path, other: Path) -> None:
    for name in ("models/msae_block5.pt", "models/msae_block20.pt"):
        weights = [model_file.load(folder / name).model.state_dict() for folder in (one, other)]
        assert all(torch.equal(weights[0][key], weights[1][key]) for key in weights[0])


def test_data_that_changed_since_is_refused_before_anything_runs_and_a_copy_of_the_same_is_not(
    tmp_path, monkeypatch, capsys
):
    rng = np.random.default_rng(0)
    chunks = tmp_path / "data" / "block5"
    chunks.mkdir(parents=True)
    x = rng.standard_normal((600, 16), dtype=np.float32)
    np.save(chunks / "chunk_0000.npy", x)
    changes = [f"data.path={tmp_path}/data", "data.blocks=[5]", "search.trials_per_block=1", "training.epochs=1"]
    first = sweep(tmp_path, *changes)
    left = {f: f.read_bytes() for f in first.folder.path.rglob("*") if f.is_file()}

    np.save(chunks / "chunk_0000.npy", x[::-1])
    line = (
        rf"^{chunks}: chunk_0000.npy was rewritten \(.*\) and contains other rows: this is not the data that sweep "
        "small was started with; restore that data, or give another --name$"
    )
    with pytest.raises(SweepError, match=line):
        sweep(tmp_path, *changes, resume=True)
    assert {f: f.read_bytes() for f in first.folder.path.rglob("*") if f.is_file()} == left
    monkeypatch.setattr(sys, "argv", ["msae-sweep", "eval", str(first.folder.path)])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    assert "and contains other rows: these are not the rows that" in capsys.readouterr().err

    np.save(chunks / "chunk_0000.npy", x)
    again = sweep(tmp_path, *changes, resume=True)
    assert (
        "files were rewritten since they were prepared; checking whether their rows" in (tmp_path / "log").read_text()
    )
    trials = [results(sw.summary)["blocks"]["block5"]["trials"] for sw in (again, first)]
    assert trials[0] == trials[1]


def test_a_diverged_and_an_oversized_trial_end_alone(tmp_path, monkeypatch):
    # The estimate that would refuse this is a lower bound. Trials that pass it but need too much must end alone.
    monkeypatch.setattr("msae_sweep.sweep.memory._check_models", lambda *_: None)
    outcome = sweep(
        tmp_path, "data.blocks=[5]", "asha=null", "training.epochs=2", "search={algorithm: grid}",
        "space={learning_rate: {grid: [1e-2, 1e30]}, expansion_factor: {grid: [2, 1e9]}}",
        "training.normalize_decoder=false",
    )  # fmt: skip
    statuses = {
        (t["params"]["learning_rate"], t["params"]["expansion_factor"]): (t["status"], t["reason"])
        for t in outcome.summary["blocks"]["block5"]["trials"]
    }
    assert statuses[1e-2, 2][0] == "completed"
    assert statuses[1e30, 2] == ("diverged", "diverged")
    for rate in (1e-2, 1e30):
        status, reason = statuses[rate, 1e9]
        assert status == "failed"
        assert reason.startswith("out of memory")
    assert not outcome.interrupted
    text = (outcome.folder.path / "summary.json").read_text()
    assert "NaN" not in text
    assert "Infinity" not in text


def test_a_trial_that_fails_says_of_what(tmp_path, monkeypatch):
    from msae_sweep.sweep import tuning

    class Failing(tuning.MSAETrial):
        def step(self):
            raise RuntimeError("the device is on fire")

    monkeypatch.setattr(tuning, "MSAETrial", Failing)
    changes = ["data.blocks=[5]", "search.trials_per_block=1", "training.epochs=1"]
    (entry,) = sweep(tmp_path, *changes, "resources.max_failures=1").summary["blocks"]["block5"]["trials"]
    assert entry["status"] == "failed"
    assert "the device is on fire" in entry["reason"]
    assert "block5-000 starts again from its last state: " in (tmp_path / "log").read_text()


OPTUNA = ["search.algorithm=optuna", "data.blocks=[5]"]


@pytest.fixture(scope="module")
def proposed(tmp_path_factory):
    """A finished sweep whose trials Optuna proposed."""
    return sweep(tmp_path_factory.mktemp("proposed"), *OPTUNA)


def test_optuna_proposes_within_the_space_and_resumes(proposed):
    trials = proposed.summary["blocks"]["block5"]["trials"]
    assert len(trials) == 4
    assert all(1e-3 <= t["params"]["learning_rate"] <= 3e-2 for t in trials)
    assert all(t["params"]["expansion_factor"] in (2, 4) for t in trials)
    again = sweep(proposed.folder.path.parents[1], *OPTUNA, resume=True)
    assert results(again.summary) == results(proposed.summary)


@pytest.mark.slow
def test_a_damaged_record_of_a_trial_that_optuna_proposed_is_proposed_again(proposed, tmp_path):
    record = copy_of(proposed, tmp_path) / "trials" / "block5-001" / "trial.json"
    record.write_text("{")
    again = sweep(tmp_path, *OPTUNA, resume=True)
    assert results(again.summary) == results(proposed.summary)
    assert not again.interrupted
