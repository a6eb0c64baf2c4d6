"""Determines which trials of a sweep remain, and runs them with Ray Tune."""

import signal
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, Self

from ray import tune
from ray.tune.search.basic_variant import BasicVariantGenerator
from ray.tune.search.sample import Domain
from rich.console import Console

from msae_sweep.config import SweepConfig
from msae_sweep.errors import SweepError
from msae_sweep.models.trial_models import unreadable_models
from msae_sweep.patching import patched
from msae_sweep.signals import restored_handlers
from msae_sweep.sweep.callback import SweepCallback
from msae_sweep.sweep.display import Display
from msae_sweep.sweep.preparation import Preparation
from msae_sweep.sweep.record_writer import RecordWriter
from msae_sweep.sweep.resources import trials_at_once
from msae_sweep.sweep.scheduler import BlockAsha
from msae_sweep.sweep.space import plan, trial_record
from msae_sweep.sweep.trial import MSAETrial
from msae_sweep.sweep_folder.folder import SweepFolder
from msae_sweep.sweep_folder.rungs import objectives_at_rungs, rungs
from msae_sweep.sweep_folder.trial_record import TrialRecord
from msae_sweep.track import journal
from msae_sweep.track.tracker import Tracker


class Tuning:
    """Trials of one sweep; `run` runs those that have not ended."""

    def __init__(
        self,
        config: SweepConfig,
        folder: SweepFolder,
        preparation: Preparation,
        gpus: float,
        console: Console,
        tracker: Tracker,
        sweep_id: str,
    ) -> None:
        self._config, self._folder, self._preparation, self._gpus = config, folder, preparation, gpus
        self._blocks = list(preparation.input_dims)
        self._at_once = (trials_at_once(config, gpus) or 0) if gpus else 0
        self._console, self._tracker, self._sweep_id = console, tracker, sweep_id
        self.records = self._known_records()
        self.n_trials = config.n_trials_per_block() * len(self._blocks)

    @property
    def is_whole(self) -> bool:
        """True if every trial of the sweep has ended."""
        return len(self.records) >= self.n_trials and all(record.finished for record in self.records.values())

    def run(self, begin: Callable[[], None]) -> list[TrialRecord]:
        """Run the trials that remain, and run a block's best trial again if its model turns out to be damaged.

        Args:
            begin: called in the record writer's thread before its first write; writes the files of a started sweep.

        Returns:
            The records of all trials. The models of the blocks' best trials are readable.

        Raises:
            SweepError: the model of a trial that was trained again is damaged again.
        """
        self._run(begin)
        trained_again: set[str] = set()
        while lost := unreadable_models(self._folder, list(self.records.values())):
            is_whole = self.is_whole
            for trial_id, what in lost.items():
                if trial_id in trained_again:
                    raise SweepError(f"{what}; it was trained again just now, so the disk or the store loses data")
                self._train_again(self.records[trial_id], what)
            # An interrupted sweep does not run them now; the run that resumes it does.
            if is_whole:
                trained_again |= lost.keys()
                self._run(lambda: None)
        return list(self.records.values())

    def _run(self, begin: Callable[[], None]) -> None:
        config, scheduler = self._config, BlockAsha(self._config.asha)
        if config.search.algorithm != "optuna":
            # The records on disk and in the table have the order of the plan.
            self.records = {r.trial_id: self.records.get(r.trial_id, r) for r in plan(config, self._blocks)}
        for record in self.records.values():
            if record.status in ("failed", "running"):
                record.status, record.reason = "pending", ""
        known = list(self.records.values())
        for record in known:
            # Earlier reports of an unfinished trial stay valid too, because other trials may have been judged by them.
            scheduler.add_trial(
                self._group(record), record.trial_id, record.index, self._objectives(record), ended=record.finished
            )
        display = Display(self._console, config, self.n_trials, self._tracking_note)
        display.show(known)
        record_writer = RecordWriter(begin)
        callback = SweepCallback(
            records=self.records,
            folder=self._folder,
            scheduler=scheduler,
            record_writer=record_writer,
            tracker=self._tracker,
            display=display,
            tracked_params=self._params,
        )
        if config.search.algorithm == "optuna":
            from msae_sweep.sweep.optuna_search import BlockOptuna

            search: Any = BlockOptuna(config, self._blocks, known, self._register)
            if config.resources.max_concurrent:
                search = tune.search.ConcurrencyLimiter(search, config.resources.max_concurrent)
            param_space: dict[str, Any] = {}
            samples, left = self.n_trials, sum(not r.finished for r in known) + self.n_trials - len(known)
        else:
            specs = [self._spec(record) for record in known if not record.finished]
            search = BasicVariantGenerator(max_concurrent=config.resources.max_concurrent or 0)
            param_space, samples, left = {"trial": _InOrder(specs)}, len(specs), len(specs)
        with record_writer:
            if left:
                with display:
                    try:
                        self._fit(param_space, search, scheduler, samples, callback, _Failure(record_writer))
                    finally:
                        self._preparation.abandon()

    def _known_records(self) -> dict[str, TrialRecord]:
        """Return the records of an earlier run.

        A trial whose record or model is damaged or missing counts as not done.
        """
        records, damaged = self._folder.read_records()
        for trial_id, what in damaged.items():
            self._say(f"{what}: {trial_id} is trained again")
            if self._config.search.algorithm == "optuna":
                records[trial_id] = self._proposed_before(trial_id)
        models = self._folder.models()
        for record in records.values():
            if record.has_model and record.trial_id not in models:
                self._train_again(record, f"{self._folder.model_file(record.trial_id)} is missing or truncated")
        return records

    def _train_again(self, record: TrialRecord, what: str) -> None:
        """Mark an ended trial to be run again.

        Its settings and seed follow from its number, so that it has the same epochs and the same model again.
        """
        self._say(f"{what}: {record.trial_id} is trained again")
        record.status, record.reason = "pending", ""

    def _proposed_before(self, trial_id: str) -> TrialRecord:
        """Return a trial as Optuna proposed it, from the journal; a new proposal could have other settings.

        Raises:
            SweepError: the journal does not contain the trial.
        """
        event = journal.last(self._folder.path, "trial_started", trial_id=trial_id)
        if event is None:
            file = self._folder.record_file(trial_id)
            raise SweepError(
                f"{file}: damaged, and the journal has no entry for the trial; restore the file from a backup"
            )
        params = {key: event["params"][key] for key in self._config.space}
        index = int(trial_id.rpartition("-")[2])
        return trial_record(self._config, int(event["block"]), index, params)

    def _say(self, line: str) -> None:
        self._console.print(line, highlight=False, markup=False, soft_wrap=True)

    def _fit(
        self,
        param_space: dict[str, Any],
        search: Any,
        scheduler: BlockAsha,
        samples: int,
        callback: SweepCallback,
        failure: tune.Stopper,
    ) -> None:
        resources = self._config.resources
        trainable = tune.with_resources(
            tune.with_parameters(
                MSAETrial,
                prepared=self._preparation.blocks(),
                warmup_settings=self._warmup_settings() if self._gpus else [],
                folder=self._folder,
                cpus=resources.cpu,
                gpus=self._gpus,
                checkpoint_seconds=resources.checkpoint_seconds,
            ),
            {"cpu": resources.cpu, "gpu": self._gpus},
        )
        tuner = tune.Tuner(
            trainable,
            param_space=param_space,
            tune_config=tune.TuneConfig(
                search_alg=search,
                scheduler=scheduler,
                num_samples=samples,
                reuse_actors=True,
                trial_name_creator=_trial_id,
                trial_dirname_creator=_trial_id,
            ),
            run_config=tune.RunConfig(
                # Tune names its working folders on a node by the second in which it starts, and by this name.
                name=self._sweep_id,
                **self._folder.tune_storage,
                # A finished trial's model is in the sweep folder; by default, Tune would request one more checkpoint.
                checkpoint_config=tune.CheckpointConfig(checkpoint_at_end=False),
                failure_config=tune.FailureConfig(max_failures=resources.max_failures),
                callbacks=[callback],
                stop=failure,
                verbose=0,
            ),
        )
        # Tune leaves its signal handlers in place, which would swallow the first Ctrl-C after the trials.
        with _without_usage_statistics(), restored_handlers(signal.SIGINT, signal.SIGUSR1):
            tuner.fit()

    def _register(self, record: TrialRecord) -> dict[str, Any]:
        """Add a trial that Optuna proposed and write its record before it runs; return its config."""
        self.records.setdefault(record.trial_id, record)
        self._folder.save_record(record)
        return self._spec(record)

    def _spec(self, record: TrialRecord) -> dict[str, Any]:
        training = record.training(self._config.training)
        return {
            "trial_id": record.trial_id,
            "block": record.block,
            "index": record.index,
            "turn": self._turn(record),
            "group": self._group(record),
            "input_dim": self._preparation.input_dims[record.block],
            "rungs": rungs(self._config.asha, training.epochs),
            "training": training.model_dump(mode="json"),
        }

    def _turn(self, record: TrialRecord) -> int:
        """Return the trial's position in the start order, in which blocks take turns.

        As many trials of the first block as run at once come first, because other blocks are ready seconds later.
        """
        if record.block == self._blocks[0] and record.index < self._at_once:
            return record.index
        return self._at_once + record.index * len(self._blocks) + self._blocks.index(record.block)

    def _params(self, record: TrialRecord) -> dict[str, Any]:
        """Return the params of the trial's MLflow run: every training setting, also defaults, and derived values."""
        training = record.training(self._config.training)
        input_dim = self._preparation.input_dims[record.block]
        return {
            "block": record.block,
            "trial_id": record.trial_id,
            "input_dim": input_dim,
            "hidden_dim": training.hidden_dim(input_dim),
            **training.model_dump(mode="json"),
        }

    def _warmup_settings(self) -> list[dict[str, Any]]:
        """Return training settings to warm up with: those of one trial per shape of step, in the trials' order."""
        shapes: dict[str, dict[str, Any]] = {}
        for record in self.records.values():
            training = record.training(self._config.training)
            of_no_matter = {"learning_rate", "weighting", "epochs", "seed"}
            shapes.setdefault(training.model_dump_json(exclude=of_no_matter), training.model_dump(mode="json"))
        return list(shapes.values())

    def _group(self, record: TrialRecord) -> str:
        """Return the name of the group of trials that ASHA may compare with this one.

        The R² that can be reached differs between blocks, and between sets of levels.
        """
        return f"block{record.block} k={record.training(self._config.training).levels}"

    def _objectives(self, record: TrialRecord) -> dict[int, float]:
        return objectives_at_rungs(record, self._config.asha, record.training(self._config.training).epochs)

    def _tracking_note(self) -> str:
        status = self._tracker.status
        return f"MLflow unreachable, {status.pending} events kept on disk" if status.last_error else ""


class _InOrder(Domain):  # type: ignore[misc]
    """Tune search-space value that gives the configs of all trials, one after the other.

    A grid of the configs would also work, but Tune copies its whole search space for every trial, which takes 37 ms per
    trial with 1,000 trials.
    """

    def __init__(self, specs: list[dict[str, Any]]) -> None:
        self._left = iter(specs)

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        return self

    def sample(self, config: Any = None, size: int = 1, random_state: Any = None) -> dict[str, Any]:
        """Return the next trial's config."""
        return next(self._left)


class _Failure(tune.Stopper):  # type: ignore[misc]
    """Tune stopper that ends the sweep in an orderly way if its data cannot be used or its folder cannot be written."""

    def __init__(self, record_writer: RecordWriter) -> None:
        self._record_writer = record_writer

    def __getstate__(self) -> dict[str, Any]:
        # Tune pickles its settings for `Tuner.restore`, which is not used here.
        return {}

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        return False

    def stop_all(self) -> bool:
        return self._record_writer.failed


def _without_usage_statistics() -> AbstractContextManager[None]:
    """Monkeypatch Ray's usage statistics so that they do not count callbacks by kind.

    To count them, Tune would import the integrations of MLflow, wandb and others, which delays the first worker by 2 s.
    """
    return patched("ray.air._internal.usage", "tag_callbacks", lambda callbacks: False)


def _trial_id(trial: Any) -> str:
    return str(trial.config["trial"]["trial_id"])
