"""The MLflow runs of one sweep, which are created at most once and filled without duplicates.

Every method may be called again with the same arguments and then changes nothing: runs are looked up by their tags
before they are created, MLflow keeps equal metric rows only once, and existing params are left unchanged.
"""

import json
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from msae_sweep.errors import TrackingError
from msae_sweep.track.connection import RejectedByMlflow, has_error_code, raise_permanent_errors

SWEEP_TAG = "msae_sweep.sweep_id"
TRIAL_TAG = "msae_sweep.trial_id"
_BATCH = {"metrics": 1000, "params": 100, "tags": 100}
"""Largest number of entities that MLflow accepts in one `log_batch`."""

MAX_PARAM_CHARACTERS, MAX_TAG_CHARACTERS = 6000, 8000
"""MLflow's limits on the length of values. MLflow would cut longer values itself, with a warning on the user's terminal
for each. A resumed sweep would then take the cut values for changed ones."""

OnRejected = Callable[[str, str], None]
"""Callback that receives the name of a part that MLflow will never accept, and the reason."""


class NewRun(NamedTuple):
    """Name, start time, tags and params with which a run begins."""

    name: str
    time_ms: int
    tags: Mapping[str, str]
    params: Mapping[str, str]


class Runs:
    """An experiment and the runs in it that belong to one sweep."""

    def __init__(self, client: Any, experiment: str, artifact_location: str | None) -> None:
        """Find the experiment, or create it.

        Raises:
            TrackingError: the experiment was deleted.
        """
        self._client = client
        self.experiment_id = self._ensure_experiment(experiment, artifact_location)
        self._known: dict[str, str] = {}

    def is_alive(self, run_id: str) -> bool:
        """Return whether a run exists and is not deleted."""
        try:
            return bool(self._client.get_run(run_id).info.lifecycle_stage == "active")
        except Exception as error:
            if has_error_code(error, "RESOURCE_DOES_NOT_EXIST", "NOT_FOUND"):
                return False
            raise

    def find(self, sweep_id: str, sent: set[str]) -> None:
        """Look up the run of every trial of the sweep and the sweep's own run (trial ID `""`), and delete duplicates.

        An empty duplicate results if the server creates a run after the sender has stopped waiting for the answer.

        Args:
            sent: IDs of runs that were filled. They are never treated as duplicates.
        """
        twins: dict[str, list[Any]] = defaultdict(list)
        token = None
        while True:
            page = self._client.search_runs(
                [self.experiment_id], f"tags.`{SWEEP_TAG}` = '{sweep_id}'", page_token=token
            )
            for run in page:
                twins[run.data.tags.get(TRIAL_TAG, "")].append(run)
            token = page.token
            if not token:
                break
        for trial_id, runs in twins.items():
            keep = max(runs, key=lambda run: (run.info.run_id in sent, len(run.data.metrics), len(run.data.params)))
            self._known[trial_id] = keep.info.run_id
            for run in runs:
                if run is not keep and run.info.run_id not in sent:
                    self._client.delete_run(run.info.run_id)

    def knows(self, trial_id: str) -> bool:
        """Return whether `find` or `begin` has found or created a run of the trial."""
        return trial_id in self._known

    def begin(self, trial_id: str, run: NewRun, refuse: OnRejected) -> str:
        """Create a run with its params, or continue the trial's existing run, which keeps its first params.

        Returns:
            ID of the run.
        """
        from mlflow.entities import Param

        params, run_id = _cut(run.params, MAX_PARAM_CHARACTERS), self._known.get(trial_id)
        if run_id is None:
            created = self._client.create_run(
                self.experiment_id, start_time=run.time_ms, tags=_cut(run.tags, MAX_TAG_CHARACTERS), run_name=run.name
            )
            run_id = self._known[trial_id] = str(created.info.run_id)
        else:
            self._client.update_run(run_id, status="RUNNING")
            before = self._client.get_run(run_id).data.params
            changed = {key: value for key, value in params.items() if before.get(key, value) != value}
            params = {key: value for key, value in params.items() if key not in before}
            tags = {**run.tags, "reason": ""} | ({"changed_on_resume": json.dumps(changed)} if changed else {})
            self.log(run_id, refuse, tags=_tags(tags))
        self.log(run_id, refuse, params=[Param(key, value) for key, value in params.items()])
        return run_id

    def end(self, run_id: str, status: str, time_ms: int, tags: Mapping[str, str], refuse: OnRejected) -> None:
        """Set a run's last tags, and end it with one of MLflow's statuses."""
        self.log(run_id, refuse, tags=_tags(tags))
        self._client.set_terminated(run_id, status, end_time=time_ms)

    def log(self, run_id: str, refuse: OnRejected, **entities: Sequence[Any]) -> None:
        """Log `metrics`, `params` or `tags` with as many calls of `log_batch` as MLflow's limits require."""
        for kind, sequence in entities.items():
            for start in range(0, len(sequence), _BATCH[kind]):
                self._log_batch(run_id, refuse, kind, sequence[start : start + _BATCH[kind]])

    def time_of(self, run_id: str, epoch: int) -> int | None:
        """Return the timestamp (ms) with which the metrics of an epoch were logged, or None if they were not.

        Metrics that are logged again for the epoch must have the same timestamp.
        """
        history = self._client.get_metric_history(run_id, "epoch")
        return next((metric.timestamp for metric in history if metric.step == epoch), None)

    def _log_batch(self, run_id: str, refuse: OnRejected, kind: str, batch: Sequence[Any]) -> None:
        """Log a batch. If MLflow rejects it, halve it until the rejected entity is found, and log all others."""
        try:
            with raise_permanent_errors():
                self._client.log_batch(run_id, synchronous=True, **{kind: batch})
        except RejectedByMlflow as error:
            if len(batch) == 1:
                refuse(f"{kind} {batch[0].key}", str(error))
                return
            middle = len(batch) // 2
            self._log_batch(run_id, refuse, kind, batch[:middle])
            self._log_batch(run_id, refuse, kind, batch[middle:])

    def _ensure_experiment(self, name: str, artifact_location: str | None) -> str:
        found = self._client.get_experiment_by_name(name)
        if found is None:
            try:
                return str(self._client.create_experiment(name, artifact_location=artifact_location))
            except Exception as error:
                if not has_error_code(error, "RESOURCE_ALREADY_EXISTS"):
                    raise
                found = self._client.get_experiment_by_name(name)  # another sweep created it in the meantime
        if found.lifecycle_stage != "active":
            raise TrackingError(f"experiment {name} is deleted; restore it, or set another tracking.experiment")
        return str(found.experiment_id)


def _cut(texts: Mapping[str, str], n_characters: int) -> dict[str, str]:
    return {key: text[:n_characters] for key, text in texts.items()}


def _tags(texts: Mapping[str, str]) -> list[Any]:
    from mlflow.entities import RunTag

    return [RunTag(key, value) for key, value in _cut(texts, MAX_TAG_CHARACTERS).items()]
