"""Handlers that apply each kind of journal event to MLflow."""

import contextlib
import json
import math
import shutil
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from msae_sweep.config import registered_name
from msae_sweep.sae import model_file
from msae_sweep.track import logged_models
from msae_sweep.track.connection import RejectedByMlflow, raise_permanent_errors
from msae_sweep.track.cursor import Cursor, SentTrial
from msae_sweep.track.datasets import dataset_input
from msae_sweep.track.journal import Entry
from msae_sweep.track.runs import SWEEP_TAG, TRIAL_TAG, NewRun, OnRejected, Runs
from msae_sweep.track.uploads import Upload

_MLFLOW_TAGS = {"git_commit": "mlflow.source.git.commit", "command": "mlflow.source.name", "user": "mlflow.user"}
"""MLflow's names for those of our tags that have a column of their own in MLflow."""
_RUN_STATUS = {"completed": "FINISHED", "stopped_early": "FINISHED", "interrupted": "KILLED"}
"""MLflow's run status for each of our statuses. Any other status becomes FAILED."""
_NOT_A_SCORE = ("learning_rate", "samples_seen", "samples_per_second")
"""Metrics that describe how an epoch ran and not how good it was. They get no `best_…` metric."""


class EventHandlers:
    """Applies journal events to MLflow. An event may be applied any number of times.

    The cursor is updated with the runs that exist and the epochs that they have.
    """

    def __init__(
        self,
        client: Any,
        runs: Runs,
        cursor: Cursor,
        sweep_folder: Path,
        refused: Callable[[Entry, str, str], None],
        fetch: Callable[[Path], Path | None],
    ) -> None:
        """Find the runs that the sweep has already.

        Args:
            refused: called with event, part and reason for every part of an event that MLflow will never accept.
            fetch: returns a file of the sweep folder as a path on this machine; see `Fetch` in sender.
        """
        self._client, self._runs, self._cursor = client, runs, cursor
        self._folder, self._refused, self._fetch = sweep_folder, refused, fetch
        # Values that were sent from here, so that MLflow need not be asked for them: the params of trials whose run was
        # created here, and the times of every trial's epochs.
        self._made_here: dict[str, Mapping[str, str]] = {}
        self._times: dict[str, dict[int, int]] = defaultdict(dict)
        if cursor.sweep_id:
            self._find_runs()

    def apply(self, entries: Sequence[Entry], *, register_as: str | None) -> Upload | None:
        """Send one event, or several `metrics` events together.

        Args:
            register_as: beginning of the registered models' names. If it is None, no model is registered.

        Returns:
            The upload of a model, which the caller still has to run, in any thread; None if nothing is left to do. No
            later event of another trial depends on the upload.
        """
        entry = entries[0]
        try:
            with raise_permanent_errors():
                match entry.kind:
                    case "sweep_started":
                        self._sweep_started(entry)
                    case "trial_started":
                        self._trial_started(entry)
                    case "metrics":
                        self._metrics(entries)
                    case "trial_ended":
                        return self._trial_ended(entry)
                    case "sweep_ended":
                        self._sweep_ended(entry, register_as)
                    case "artifacts":
                        self._log_files(entry, self._sweep_run(), entry.event["files"])
                    case kind:
                        raise RejectedByMlflow(f"no such kind of event: {kind}")
        except RejectedByMlflow as error:
            self._refused(entry, "all", str(error))
        return None

    def _sweep_started(self, entry: Entry) -> None:
        event, cursor = entry.event, self._cursor
        cursor.sweep_id, cursor.datasets = event["sweep_id"], event["datasets"]
        self._find_runs()
        cursor.origin = {_MLFLOW_TAGS[key]: str(event["tags"][key]) for key in _MLFLOW_TAGS if key in event["tags"]}
        tags = {key: str(value) for key, value in event["tags"].items() if key not in _MLFLOW_TAGS} | cursor.origin
        tags |= {SWEEP_TAG: cursor.sweep_id, "status": "running"}
        cursor.run_id = self._begin(entry, "", event["name"], tags)
        self._log_datasets(entry, cursor.run_id, cursor.datasets)
        with self._part(entry, "sweep.yaml"):
            self._client.log_text(cursor.run_id, event["config_yaml"], "sweep.yaml")

    def _trial_started(self, entry: Entry) -> None:
        cursor, trial_id, block = self._cursor, entry.event["trial_id"], str(entry.event["block"])
        tags = {SWEEP_TAG: cursor.sweep_id, TRIAL_TAG: trial_id, "mlflow.parentRunId": self._sweep_run()}
        tags |= {"block": block, "status": "running", **cursor.origin}
        if self._runs.knows(trial_id):
            self._made_here.pop(trial_id, None)
        else:
            self._made_here[trial_id] = _texts(entry.event["params"])
        run_id = self._begin(entry, trial_id, trial_id, tags)
        known = cursor.trials.get(trial_id)
        cursor.trials[trial_id] = SentTrial(run_id, int(block), known.epoch if known else 0)
        if block in cursor.datasets:
            self._log_datasets(entry, run_id, [block])

    def _metrics(self, entries: Sequence[Entry]) -> None:
        """Log the metrics of epochs that were not sent before.

        A resumed sweep reports some epochs again, with other times, and these are left out.
        """
        points: dict[str, list[Any]] = defaultdict(list)
        epochs: dict[str, int] = {}
        for entry in entries:
            trial_id = entry.event["trial_id"]
            if trial_id not in self._cursor.trials:
                self._refused(entry, "all", f"trial {trial_id} has no run")
                continue
            for point in entry.event["points"]:
                epoch = int(point["epoch"])
                if epoch > epochs.get(trial_id, self._cursor.trials[trial_id].epoch):
                    epochs[trial_id] = epoch
                    self._times[trial_id][epoch] = int(point["time_ms"])
                    points[trial_id] += _metrics(point, time_ms=int(point["time_ms"]), step=epoch)
        for trial_id, metrics in points.items():
            trial = self._cursor.trials[trial_id]
            self._runs.log(trial.run_id, self._refuse(entries[0]), metrics=metrics)
            trial.epoch = epochs[trial_id]

    def _trial_ended(self, entry: Entry) -> Upload | None:
        """End a trial's run, and return the upload of its model; None if the trial has no model.

        The status is sent first, so that it is right even while the upload has to wait. The run's metrics under their
        plain names end with the last epoch. The metrics of the best epoch, which the model is from, are also logged as
        `best_…` on the run, and under their plain names on the logged model.
        """
        event = entry.event
        trial = self._cursor.trials.get(event["trial_id"])
        if trial is None:
            raise RejectedByMlflow(f"trial {event['trial_id']} has no run")
        scores = {key: value for key, value in event["best"].items() if key not in _NOT_A_SCORE}
        step = int(scores.get("epoch", 0))
        told = self._times.pop(event["trial_id"], {}).get(step)
        time_ms = told or (step and self._runs.time_of(trial.run_id, step)) or int(event["time_ms"])
        best = _metrics({f"best_{key}": value for key, value in scores.items()}, time_ms=time_ms, step=step)
        self._runs.log(trial.run_id, self._refuse(entry), metrics=best)
        self._end(entry, trial.run_id)
        params, name = self._made_here.pop(event["trial_id"], None), event["model_file"]
        if name is None:
            return None

        def upload() -> None:
            with self._part(entry, "model"), self._file(name) as path:
                on_model = _metrics(scores, time_ms=time_ms, step=step)
                self._log_model(trial, path, params, on_model, step)

        return upload

    @contextlib.contextmanager
    def _file(self, name: str) -> Iterator[Path]:
        """Provide a file of the sweep folder. If a temporary copy was fetched for this, remove the copy afterwards."""
        path = self._folder / name
        found = self._fetch(path) or path
        try:
            yield found
        finally:
            if found != path:
                shutil.rmtree(found.parent, ignore_errors=True)

    def _log_model(
        self, trial: SentTrial, path: Path, params: Mapping[str, str] | None, metrics: Sequence[Any], step: int
    ) -> None:
        """Upload the trial's model file and history as artifacts of its run, and log the model.

        Args:
            params: the run's params if the run was created here; None if they have to be read from MLflow.
        """
        file = model_file.load(path)
        with tempfile.TemporaryDirectory() as folder:
            history, notebook_file = Path(folder) / "history.json", Path(folder) / f"msae_block{trial.block}.pt"
            history.write_text(json.dumps(file.history, indent=1, default=float), encoding="utf-8")
            notebook_file.symlink_to(path.absolute())
            self._client.log_artifacts(trial.run_id, folder)
        run = (
            logged_models.RunOfModel.read(self._client, trial.run_id)
            if params is None
            else logged_models.RunOfModel(self._runs.experiment_id, trial.run_id, params, may_have_model=False)
        )
        logged_models.log_model(self._client, run, file, metrics, step)

    def _sweep_ended(self, entry: Entry, register_as: str | None) -> None:
        event, run_id = entry.event, self._sweep_run()
        metrics = _metrics(event["metrics"], time_ms=int(event["time_ms"]), step=0)
        self._runs.log(run_id, self._refuse(entry), metrics=metrics)
        self._end(entry, run_id)
        self._log_files(entry, run_id, event["artifacts"])
        if register_as is not None:
            for block, trial_id in event["champions"].items():
                with self._part(entry, f"champion of block {block}"):
                    self._register(register_as, int(block), trial_id, event["metrics"])
        self._find_runs()

    def _log_files(self, entry: Entry, run_id: str, names: Iterable[str]) -> None:
        for name in names:
            folder = Path(name).parent.as_posix()
            with self._part(entry, name), self._file(name) as path:
                self._client.log_artifact(run_id, str(path), None if folder == "." else folder)

    def _register(self, model_name: str, block: int, trial_id: str, metrics: Mapping[str, float]) -> None:
        trial = self._cursor.trials.get(trial_id)
        model = logged_models.find_model(self._client, self._runs.experiment_id, trial.run_id) if trial else None
        if model is None or not logged_models.is_ready(model):
            raise RejectedByMlflow(f"trial {trial_id} has no model")
        prefix = f"block{block}/"
        scores = {key.removeprefix(prefix): f"{v:.6g}" for key, v in metrics.items() if key.startswith(prefix)}
        tags = {SWEEP_TAG: self._cursor.sweep_id, TRIAL_TAG: trial_id, **scores}
        logged_models.register_champion(self._client, model, registered_name(model_name, block), tags)

    def _sweep_run(self) -> str:
        if not self._cursor.run_id:
            raise RejectedByMlflow("the sweep has no run")
        return self._cursor.run_id

    def _begin(self, entry: Entry, trial_id: str, name: str, tags: Mapping[str, str]) -> str:
        run = NewRun(name, int(entry.event["time_ms"]), tags, _texts(entry.event["params"]))
        return self._runs.begin(trial_id, run, self._refuse(entry))

    def _end(self, entry: Entry, run_id: str) -> None:
        event = entry.event
        tags = {key: str(value) for key, value in event["tags"].items()}
        tags |= {"status": event["status"], "reason": event["reason"]}
        status = _RUN_STATUS.get(event["status"], "FAILED")
        self._runs.end(run_id, status, int(event["time_ms"]), tags, self._refuse(entry))

    def _log_datasets(self, entry: Entry, run_id: str, blocks: Iterable[str]) -> None:
        with self._part(entry, "datasets"):
            inputs = [dataset_input(block, self._cursor.datasets[block]) for block in blocks]
            self._client.log_inputs(run_id, datasets=inputs)

    def _find_runs(self) -> None:
        sent = {self._cursor.run_id, *(trial.run_id for trial in self._cursor.trials.values())}
        self._runs.find(self._cursor.sweep_id, sent)

    def _refuse(self, entry: Entry) -> OnRejected:
        return lambda part, reason: self._refused(entry, part, reason)

    @contextlib.contextmanager
    def _part(self, entry: Entry, name: str) -> Iterator[None]:
        """Send a part of an event on which the rest does not depend. If MLflow rejects it, only it is left out."""
        try:
            with raise_permanent_errors():
                yield
        except RejectedByMlflow as error:
            self._refused(entry, name, str(error))


def _texts(params: Mapping[str, Any]) -> dict[str, str]:
    return {key: str(value) for key, value in params.items()}


def _metrics(values: Mapping[str, Any], *, time_ms: int, step: int) -> list[Any]:
    """Return MLflow metrics of the finite numbers among `values`. MLflow would draw NaN as 0."""
    from mlflow.entities import Metric

    return [
        Metric(key, float(value), time_ms, step)
        for key, value in values.items()
        if key != "time_ms" and isinstance(value, int | float) and math.isfinite(value)
    ]
