import itertools
import os
import random
import time
from types import SimpleNamespace

import pytest
from ray import tune

from msae_sweep.config import AshaConfig
from msae_sweep.sweep.ray_cluster import connect
from msae_sweep.sweep.scheduler import BlockAsha, Candidate, judge
from msae_sweep.sweep_folder.rungs import STOPPED_AT, cutoff, objectives_at_rungs, rungs, summarise_stops
from msae_sweep.sweep_folder.trial_record import TrialRecord

ASHA = AshaConfig(grace_epochs=1, reduction_factor=3)


def candidates(*objectives: float | None) -> dict[str, Candidate]:
    """Return trials t0, t1, … with their objective at rung 1. None means that a trial has not reached it yet."""
    return {f"t{i}": Candidate(i, {} if o is None else {1: o}) for i, o in enumerate(objectives)}


def test_rungs_are_grace_times_powers_of_the_factor_below_the_last_epoch():
    assert rungs(AshaConfig(grace_epochs=3, reduction_factor=3), 30) == [3, 9, 27]
    assert rungs(AshaConfig(grace_epochs=3, reduction_factor=3), 27) == [3, 9]
    assert rungs(AshaConfig(grace_epochs=5, reduction_factor=2), 5) == []
    assert rungs(None, 30) == []


def test_the_first_trial_passes_every_rung():
    assert judge(candidates(-5.0, None), "t0", 1, 3) == "pass"


def test_a_trial_passes_in_the_top_third_of_its_predecessors_and_itself_below_it_stops():
    assert judge(candidates(0.1, 0.2, 0.3, 0.4), "t3", 1, 3) == "pass"
    assert judge(candidates(0.1, 0.2, 0.3, 0.15), "t3", 1, 3) == "stop"


def test_an_equal_objective_passes():
    assert judge(candidates(0.5, 0.5), "t1", 1, 3) == "pass"


def test_a_verdict_waits_for_predecessors_on_their_way_and_for_no_successor():
    assert judge(candidates(0.1, None, 0.5), "t2", 1, 3) == "wait"
    assert judge(candidates(0.1, 0.5, None), "t1", 1, 3) == "pass"


def test_a_predecessor_that_ended_below_the_rung_is_not_waited_for():
    trials = candidates(0.1, None, 0.5)
    trials["t1"].ended = True
    assert judge(trials, "t2", 1, 3) == "pass"


class Controller:
    """Stand-in for Tune's controller with only what the scheduler uses. Its trials train one epoch at a time."""

    def __init__(self, scheduler: BlockAsha, curves: dict[str, list[float]], slots: int, rng: random.Random) -> None:
        self.scheduler, self.curves, self.slots, self.rng = scheduler, curves, slots, rng
        self.milestones = {name: rungs(ASHA, len(curve)) for name, curve in curves.items()}
        self.trials = [
            SimpleNamespace(
                config={"trial": {"trial_id": name, "group": name.split("-")[0], "index": i, "turn": i}},
                status="PENDING", epoch=0, outcome=None,
            )
            for i, name in enumerate(curves)
        ]  # fmt: skip
        for trial in self.trials:
            scheduler.on_trial_add(self, trial)

    def get_live_trials(self):
        return self.trials

    def stop_trial(self, trial):
        assert trial.status == "PAUSED"
        self.scheduler.on_trial_remove(self, trial)
        trial.status, trial.outcome = "TERMINATED", ("stopped", trial.epoch)

    def run(self) -> dict[str, tuple[str, int]]:
        while any(t.status != "TERMINATED" for t in self.trials):
            running = [t for t in self.trials if t.status == "RUNNING"]
            while len(running) < self.slots and (trial := self.scheduler.choose_trial_to_run(self)):
                trial.status = "RUNNING"
                running.append(trial)
            if running:
                self.train(self.rng.choice(running))
            else:
                assert all(t.status == "TERMINATED" for t in self.trials), "every trial waits: a deadlock"
        return {t.config["trial"]["trial_id"]: t.outcome for t in self.trials}

    def train(self, trial) -> None:
        trial.epoch += 1
        name = trial.config["trial"]["trial_id"]
        curve = self.curves[name]
        result = {"rungs": [[r, curve[r - 1]] for r in self.milestones[name] if r <= trial.epoch]}
        if trial.epoch == len(curve):
            self.scheduler.on_trial_complete(self, trial, result)
            trial.status, trial.outcome = "TERMINATED", ("completed", trial.epoch)
            return
        if self.rng.random() < 0.05:  # the worker is lost after its report was sent, and the trial is queued again
            self.scheduler.on_trial_error(self, trial)
            self.scheduler.on_trial_add(self, trial)
            trial.status, trial.epoch = "PENDING", trial.epoch - 1
            return
        decision = self.scheduler.on_trial_result(self, trial, result)
        if decision == "STOP":
            self.scheduler.on_trial_complete(self, trial, result)
            trial.status, trial.outcome = "TERMINATED", ("stopped", trial.epoch)
        elif decision == "PAUSE":
            trial.status = "PAUSED"


def curves(seed: int, blocks: int = 2, trials: int = 9, epochs: int = 10) -> dict[str, list[float]]:
    rng = random.Random(seed)
    names = [f"block{b}-{i}" for i in range(trials) for b in range(blocks)]
    return {name: list(itertools.accumulate(rng.random() for _ in range(epochs))) for name in names}


@pytest.mark.parametrize("seed", range(5))
def test_what_is_stopped_does_not_depend_on_order_concurrency_or_lost_workers(seed):
    outcomes = [
        Controller(BlockAsha(ASHA), curves(seed), slots, random.Random(f"{seed} {slots} {repeat}")).run()
        for slots in (1, 2, 5, 18)
        for repeat in range(3)
    ]
    assert all(outcome == outcomes[0] for outcome in outcomes)
    assert {kind for kind, _ in outcomes[0].values()} == {"completed", "stopped"}


@pytest.mark.parametrize("seed", range(5))
def test_a_report_states_the_verdicts_of_the_scheduler_where_trials_differ_in_their_epochs(seed):
    rng = random.Random(seed)
    # Some trials have only 3 or 9 epochs: their last epoch is a rung of the longer trials.
    of_lengths = {
        name: curve[: rng.choice([3, 9, 10, 27])] for name, curve in curves(seed, 1, trials=40, epochs=27).items()
    }
    outcomes = Controller(BlockAsha(ASHA), of_lengths, 3, random.Random(seed)).run()
    records = []
    for index, (name, (kind, epoch)) in enumerate(outcomes.items()):
        points = [{"epoch": i, "objective": value} for i, value in enumerate(of_lengths[name][:epoch], 1)]
        status, reason = ("stopped_early", f"{STOPPED_AT}{epoch}") if kind == "stopped" else ("completed", "epochs")
        records.append(TrialRecord(name, 5, index, {}, 0, status, reason, points))
    epochs = {name: len(curve) for name, curve in of_lengths.items()}
    stops = {stop.trial_id: stop for stop in summarise_stops(records, ASHA, epochs).stops}
    assert stops.keys() == {name for name, (kind, _) in outcomes.items() if kind == "stopped"}
    assert len(stops) > 10
    for place, record in enumerate(records):
        before = [objectives_at_rungs(earlier, ASHA, epochs[earlier.trial_id]) for earlier in records[:place]]
        for rung, objective in objectives_at_rungs(record, ASHA, epochs[record.trial_id]).items():
            stop = stops.get(record.trial_id)
            if stop is not None and stop.rung == rung:
                assert objective < stop.cutoff
            else:
                assert (needed := cutoff(before, rung, ASHA.reduction_factor)) is None or objective >= needed


def test_a_restored_scheduler_judges_as_the_undisturbed_one():
    whole = Controller(BlockAsha(ASHA), curves(0), 2, random.Random(0)).run()
    for n_finished in (3, 8, 15):
        scheduler = BlockAsha(ASHA)
        done = dict(itertools.islice(whole.items(), n_finished))
        controller = Controller(scheduler, curves(0), 3, random.Random(1))
        for trial in controller.trials:
            name = trial.config["trial"]["trial_id"]
            if name in done:
                kind, epoch = done[name]
                objectives = {r: controller.curves[name][r - 1] for r in controller.milestones[name] if r <= epoch}
                scheduler.add_trial(name.split("-")[0], name, trial.config["trial"]["index"], objectives, ended=True)
                trial.status, trial.outcome = "TERMINATED", (kind, epoch)
        assert controller.run() == whole


def tune_trial(name: str, index: int, group: str = "block5") -> SimpleNamespace:
    return SimpleNamespace(config={"trial": {"trial_id": name, "group": group, "index": index, "turn": index}})


def test_what_a_trial_reported_first_counts():
    scheduler, lost, other = BlockAsha(ASHA), tune_trial("a", 0), tune_trial("b", 1)
    for trial in (lost, other):
        scheduler.on_trial_add(None, trial)
    assert scheduler.on_trial_result(None, lost, {"rungs": [[1, 0.5]]}) == "CONTINUE"
    scheduler.on_trial_error(None, lost)
    scheduler.on_trial_add(None, lost)
    # When it is trained again, its objective is a little higher, as may happen on a GPU.
    assert scheduler.on_trial_result(None, lost, {"rungs": [[1, 0.7]]}) == "CONTINUE"
    assert scheduler.on_trial_result(None, other, {"rungs": [[1, 0.6]]}) == "CONTINUE"


def test_a_resumed_trial_is_judged_where_it_stands_and_others_by_all_that_it_reported():
    scheduler = BlockAsha(ASHA)
    for i in range(3):
        scheduler.add_trial("block5", f"t{i}", i, {1: 0.1, 3: 0.9}, ended=True)
    resumed, later = tune_trial("t3", 3), tune_trial("t4", 4)
    # Before the interruption, the trial had reached rung 3, where it has to stop. Its state is from an earlier epoch.
    scheduler.add_trial("block5", "t3", 3, {1: 0.2, 3: 0.3})
    for trial in (resumed, later):
        scheduler.on_trial_add(None, trial)
    assert scheduler.on_trial_result(None, resumed, {"rungs": [[1, 0.2]]}) == "CONTINUE"
    assert scheduler.on_trial_result(None, later, {"rungs": [[1, 0.3], [3, 0.9]]}) == "CONTINUE", "it waits for nobody"
    assert scheduler.on_trial_result(None, resumed, {"rungs": [[1, 0.2], [3, 0.3]]}) == "STOP"
    assert scheduler.verdict("block5", "t3") == ("stop", 3)


def test_blocks_are_judged_apart():
    scheduler = BlockAsha(ASHA)
    for i in range(4):
        scheduler.add_trial("block5", f"a{i}", i, {1: 0.9}, ended=True)
    scheduler.add_trial("block35", "b0", 0, {1: 0.1})
    assert scheduler.verdict("block35", "b0") == ("pass", 0)
    scheduler.add_trial("block5", "a4", 4, {1: 0.1})
    assert scheduler.verdict("block5", "a4") == ("stop", 1)


def test_most_trials_are_stopped_at_the_first_rungs():
    many = curves(1, blocks=1, trials=60)
    outcome = Controller(BlockAsha(ASHA), many, 4, random.Random(0)).run()
    trained = sum(epoch for _, epoch in outcome.values())
    assert trained < 0.55 * 60 * 10


def test_without_asha_nothing_is_stopped():
    outcome = Controller(BlockAsha(None), curves(0), 3, random.Random(0)).run()
    assert {kind for kind, _ in outcome.values()} == {"completed"}


@pytest.mark.slow
def test_a_worker_that_is_starting_is_not_killed_for_one_that_is_free(ray_session, tmp_path):
    class SlowToStart(tune.Trainable):
        """Trial that takes a tenth of a second. Every worker but the first takes seconds to start."""

        def setup(self, config, *, folder):
            self.folder = folder
            try:
                (folder / "first").touch(exist_ok=False)
            except FileExistsError:
                time.sleep(4)

        def reset_config(self, new_config):
            return True

        def step(self):
            time.sleep(0.1)
            (self.folder / f"worker-{os.getpid()}").touch()
            return {"done": True}

        def save_checkpoint(self, checkpoint_dir):
            return {}

        def load_checkpoint(self, checkpoint):
            pass

    connect()  # Ray is connected already; this call keeps Tune quiet
    trials = [{"trial_id": f"t{i}", "group": "t", "index": i, "turn": i} for i in range(100)]
    tune.Tuner(
        tune.with_resources(tune.with_parameters(SlowToStart, folder=tmp_path), {"cpu": 1}),
        param_space={"trial": tune.grid_search(trials)},
        tune_config=tune.TuneConfig(scheduler=BlockAsha(None), reuse_actors=True),
        run_config=tune.RunConfig(storage_path=str(tmp_path / "tune"), verbose=0),
    ).fit()
    assert len(list(tmp_path.glob("worker-*"))) == 2
