"""Tune callback on the driver, which turns the trials' reports into records, files, tracking events and display."""

import re
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from ray import tune
from ray.tune.experiment import Trial

from msae_sweep.errors import StorageError
from msae_sweep.sweep.display import Display
from msae_sweep.sweep.record_writer import RecordWriter
from msae_sweep.sweep.scheduler import BlockAsha
from msae_sweep.sweep_folder.folder import SweepFolder
from msae_sweep.sweep_folder.rungs import STOPPED_AT
from msae_sweep.sweep_folder.trial_record import FINAL_STATUSES, Status, TrialRecord
from msae_sweep.track.tracker import Tracker


class SweepCallback(tune.Callback):  # type: ignore[misc]
    """Tune callback that keeps every trial's record up to date on disk.

    A resumed sweep does not run a trial again whose record has a final status other than `failed`.

    Tune calls the callback in its own loop, while a worker waits for its next trial. The callback therefore only
    updates records and posts writes, which the `RecordWriter` carries out in its thread. Until the sweep's trials have
    ended, only that thread uses the tracker.
    """

    def __init__(
        self,
        records: dict[str, TrialRecord],
        folder: SweepFolder,
        scheduler: BlockAsha,
        record_writer: RecordWriter,
        tracker: Tracker,
        display: Display,
        tracked_params: Callable[[TrialRecord], dict[str, Any]],
    ) -> None:
        self._records, self._folder, self._scheduler, self._record_writer = records, folder, scheduler, record_writer
        self._tracker, self._display, self._tracked_params = tracker, display, tracked_params
        self._runs_on: dict[str, dict[str, str]] = {}
        self._said: list[dict[str, str]] = []

    def __getstate__(self) -> dict[str, Any]:
        # Tune pickles its settings for `Tuner.restore`, which is not used here; files and threads cannot be pickled.
        return {}

    def on_trial_start(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        """Mark a trial as running when it begins, or continues after a pause or a failure."""
        record = self._record(trial)
        if record.status == "pending":
            self._record_writer.post(
                partial(
                    self._tracker.trial_started,
                    trial_id=record.trial_id,
                    block=record.block,
                    params=self._tracked_params(record),
                )
            )
        record.status = "running"
        self._save(record)

    def on_trial_result(
        self, iteration: int, trials: list[Trial], trial: Trial, result: dict[str, Any], **info: Any
    ) -> None:
        """Record the epochs that a trial reports, post them to the tracker and update the display."""
        record = self._record(trial)
        for note in result.get("notes", []):
            self._display.print_line(note)
        runs_on = result.get("runs_on", {})
        # Printed once per kind: the details after the colon, such as free bytes, differ from worker to worker.
        kind = {key: text.split(":")[0] for key, text in runs_on.items()}
        if runs_on and kind not in self._said:
            self._said.append(kind)
            self._display.print_line(", ".join(f"{key}: {text}" for key, text in runs_on.items()))
        self._runs_on[record.trial_id] = runs_on
        record.seconds = max(record.seconds, float(result.get("seconds", 0.0)))
        if new := record.add_points(result["points"]):
            now = int(time.time() * 1000)
            points = [{**point, "time_ms": now} for point in new]
            self._record_writer.post(partial(self._tracker.metrics, trial_id=record.trial_id, points=points))
            self._save(record)
        self._display.update(record)

    def on_trial_complete(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        """Record the end of a trial that ended by itself or was stopped by ASHA."""
        result = trial.last_result or {}
        spec = trial.config["trial"]
        # Tune also sets `done` on the result of a trial that its scheduler stopped, so the trial's own status decides.
        if result.get("status") in FINAL_STATUSES:
            self._end(self._record(trial), result["status"], result["reason"])
            return
        verdict, rung = self._scheduler.verdict(spec["group"], spec["trial_id"])
        assert verdict == "stop", f"{spec['trial_id']} was stopped by nobody"
        self._end(self._record(trial), "stopped_early", f"{STOPPED_AT}{rung}")

    def on_trial_recover(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        """Print why Tune starts a trial again: its worker or node was lost, or it failed."""
        if self._cannot_be_kept(trial):
            return
        trial_id = self._record(trial).trial_id
        self._display.print_line(f"{trial_id} starts again from its last state: {_what_failed(trial)}")

    def on_trial_error(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        """Record a failed trial that is not started again; Tune calls this only after `max_failures`."""
        if self._cannot_be_kept(trial):
            return
        self._end(self._record(trial), "failed", _what_failed(trial))

    def on_step_end(self, iteration: int, trials: list[Trial], **info: Any) -> None:
        """Print a status line if one is due; Tune calls this once per turn of its loop."""
        self._display.update()

    def _record(self, trial: Trial) -> TrialRecord:
        return self._records[trial.config["trial"]["trial_id"]]

    def _cannot_be_kept(self, trial: Trial) -> bool:
        """Return whether a trial failed because its worker could not write to the sweep folder.

        If so, the sweep is ended.
        """
        # Ray passes on the text of a worker's exception, not the exception itself.
        found = re.search(r"^msae_sweep\.errors\.StorageError: (.+)$", _error_text(trial), re.MULTILINE)
        if found:
            self._record_writer.fail(StorageError(found[1]))
        return found is not None

    def _save(self, record: TrialRecord) -> None:
        self._record_writer.post(
            partial(self._folder.write_text, self._folder.record_file(record.trial_id), record.to_json())
        )

    def _end(self, record: TrialRecord, status: Status, reason: str) -> None:
        record.status, record.reason = status, reason
        ended = replace(record, points=list(record.points))
        self._record_writer.post(partial(self._write_end, ended, self._runs_on.pop(record.trial_id, {})))
        self._display.update(record)

    def _write_end(self, record: TrialRecord, tags: dict[str, str]) -> None:
        """Write the end of a trial; called in the record writer's thread.

        A resumed sweep goes by the record, so the model and the journal are written before it.
        """
        ended_well = record.status in ("completed", "stopped_early")
        model = self._folder.model_file(record.trial_id) if ended_well else None
        if model is not None and model.exists():  # a model in an object store is durable already
            self._folder.make_durable(model)
        # The journal comes before the record: once a record says that its trial ended, no further event is written for
        # the trial, while a second `trial_ended` event changes nothing.
        self._tracker.trial_ended(
            trial_id=record.trial_id,
            status=record.status,
            reason=record.reason,
            best=record.best,
            model_file=model,
            tags=tags,
        )
        self._folder.save_record(record)
        if record.status != "failed":  # a resumed sweep tries a failed trial again, from its last state
            self._folder.remove(self._folder.state_file(record.trial_id))
        self._display.trial_ended(record)


def _what_failed(trial: Trial) -> str:
    """Return the last line of the errors that Tune recorded for a trial, at most 300 characters."""
    lines = _error_text(trial).strip().splitlines()
    return (lines[-1] if lines else "the worker was lost")[:300]


def _error_text(trial: Trial) -> str:
    """Return everything that Tune recorded of a trial's errors; empty if there is nothing."""
    # This is the driver's local file: Tune's `get_pickled_error` reads the storage, to which it is copied later.
    try:
        return Path(trial.error_file).read_text(encoding="utf-8") if trial.error_file else ""
    except FileNotFoundError:
        return ""
