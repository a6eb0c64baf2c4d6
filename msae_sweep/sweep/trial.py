"""Runs trials on a worker: a Tune Trainable that keeps its process, data and device from one trial to the next.

A trial saves its state into the sweep folder and looks for it there when it starts. It therefore continues from that
state whoever starts it: Ray Tune after a lost worker or a pause, or a later driver that resumes the sweep. Tune's own
checkpoints hold no state: Tune's snapshot of which checkpoint belongs to which trial lags by seconds, so after a
kill -9 of the driver, trials that the snapshot had missed would begin again.

A trial writes:
- its best model at every rung and at the end, because the trial may end there, and then only the model is needed;
- its state when it has to wait for other trials, because another worker may continue it, and otherwise every
  `checkpoint_seconds`. A trial that passes a rung or ends writes no state: at 256 × 4096 the state is 34 MB.
- its state every second once its node is draining; until the node is shut down, the trial continues to train.

A lost worker or driver therefore costs a trial at most `checkpoint_seconds` of work, which the trial repeats. Its
reports from that time stay valid: the records keep them, and the scheduler judges by the objective that was reported
first (`scheduler.py`).
"""

import contextlib
import io
import math
import os
import time
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import torch
from ray import tune

from msae_sweep.config import TrainingConfig
from msae_sweep.data.batches.loader import ResidentBatches, WindowBatches, default_budget_bytes, make_batches
from msae_sweep.data.prepare.shards import PreparedBlock
from msae_sweep.errors import MsaeSweepError, StorageError, first_line
from msae_sweep.sae import kernels, model_file
from msae_sweep.sae.engines.step_cache import StepCache
from msae_sweep.sae.evaluation import activation_counts
from msae_sweep.sae.train import Progress, TrainState, choose_device, fit
from msae_sweep.sweep.preemption import PreemptionWatch
from msae_sweep.sweep_folder.folder import SweepFolder

DRAINING_SAVE_SECONDS = 1.0
"""Seconds between two saved states of a trial whose node is draining, unless `checkpoint_seconds` is less."""

REPORT_SECONDS = 5.0
"""Seconds after which a trial reports between rungs, so that the live display is updated; every rung is reported."""


class Blocks(Protocol):
    """Mapping of the sweep's prepared blocks, some of which may not be ready yet."""

    def __getitem__(self, block: int) -> PreparedBlock:
        """Return a block; wait until it is ready."""

    def __contains__(self, block: int) -> bool:
        """Return whether a block is ready."""


class MSAETrial(tune.Trainable):  # type: ignore[misc]
    """Tune Trainable that trains one MSAE.

    A result holds the metrics of the epochs since the previous result, and the objective at every rung reached.
    """

    def setup(
        self,
        config: dict[str, Any],
        *,
        prepared: Blocks,
        warmup_settings: Sequence[dict[str, Any]] = (),
        folder: SweepFolder,
        cpus: float,
        gpus: float,
        checkpoint_seconds: float,
    ) -> None:
        """Set up the process and its first trial; `reset_config` begins every further trial in the process.

        Args:
            prepared: the sweep's blocks.
            warmup_settings: training settings to warm up with while the block of the first trial is not ready.
            folder: the sweep folder, into which models and states are written.
            cpus: CPUs per trial.
            gpus: GPUs per trial; may be a fraction.
            checkpoint_seconds: seconds between two saved states.
        """
        torch.set_num_threads(max(1, int(cpus)))
        self._prepared, self._folder, self._preemption = prepared, folder, PreemptionWatch()
        self._holds_gpu, self._checkpoint_seconds = gpus > 0, checkpoint_seconds
        # Trials that share a device or a machine also share its memory.
        self._device_share = min(1.0, gpus) if gpus else min(1.0, cpus / (os.cpu_count() or 1))
        self._budget: int | None = None
        self._loaded: dict[int, tuple[WindowBatches, ...]] = {}
        self._steps = StepCache()
        self._runs_on: dict[str, str] = {}
        self.reset_config(config)
        for settings in warmup_settings:
            if self._block in prepared:
                break
            self._warm_up(TrainingConfig.model_validate(settings), input_dim=config["trial"]["input_dim"])

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        """Begin another trial in this process; for a trial of the same block, the data stays on the device."""
        spec = new_config["trial"]
        self._trial_id, self._block, self._rungs = spec["trial_id"], spec["block"], list(spec["rungs"])
        self._training = TrainingConfig.model_validate(spec["training"])
        self._state: TrainState | None = None
        self._progress: Iterator[Progress] | None = None
        self._validation: WindowBatches | None = None
        self._notes: list[str] = []
        self._n_reported = 0
        self._seconds = 0.0
        self._trained: tuple[float, float] | None = None
        self._saved_at = time.monotonic()
        return True

    def step(self) -> dict[str, Any]:
        """Train to the next rung or for `REPORT_SECONDS`, and return the result for Tune."""
        started = time.monotonic()
        try:
            done, reason = self._train_until_report(started)
        except (torch.OutOfMemoryError, MemoryError) as error:
            return self._give_up(_out_of_memory(error))
        except RuntimeError as error:
            # The CPU allocator raises a plain RuntimeError when memory runs out.
            if "can't allocate memory" not in str(error):
                raise
            return self._give_up(_out_of_memory(error))
        except StorageError:
            # No other trial can save anything either, so the driver ends the sweep.
            raise
        except MsaeSweepError as error:
            return self._give_up(str(error))
        assert self._state is not None
        self._seconds += time.monotonic() - started
        points = self._state.points[self._n_reported :]
        self._n_reported = self._state.epoch
        return {
            "points": points,
            "rungs": [[r, self._state.points[r - 1]["objective"]] for r in self._rungs if r <= self._state.epoch],
            "epoch": self._state.epoch,
            "seconds": self._seconds,
            # Start and end of the training for this report, in Unix seconds. Between the end of one report and the
            # start of the next in the same process, the device was idle.
            "trained": self._trained,
            "status": ("diverged" if reason == "diverged" else "completed") if done else "running",
            "reason": reason,
            "runs_on": self._runs_on,
            "notes": self._take_notes(),
            "done": done,
        }

    def save_checkpoint(self, checkpoint_dir: str) -> dict[str, Any]:
        """Save the state; Tune calls this when it pauses a trial, which any worker may continue afterwards."""
        assert self._state is not None, "a trial that has not begun is not paused"
        self._save_state()
        return {"epoch": self._state.epoch}

    def load_checkpoint(self, checkpoint: dict[str, Any] | None) -> None:
        """Do nothing: the trial finds its state in the sweep folder."""

    def _train_until_report(self, started: float) -> tuple[bool, str]:
        """Run epochs until there is something to report; return whether training ended, and why."""
        if self._progress is None:
            self._begin()
        assert self._state is not None
        assert self._progress is not None
        at_report_point = self._state.stop_reason is not None or self._at_rung()
        if at_report_point and self._n_reported < self._state.epoch:
            # A trial that was lost or paused after saving its state first reports the epochs that it has finished.
            self._trained = None
            return self._state.stop_reason is not None, self._state.stop_reason or ""
        self._trained = (time.time(), time.time())
        for progress in self._progress:
            self._trained = (self._trained[0], time.time())
            ended = progress.stop_reason is not None
            if ended or self._at_rung():
                self._save_model()
            if not ended and time.monotonic() - self._saved_at >= self._seconds_between_states():
                self._save_state()
            if ended:
                return True, progress.stop_reason or ""
            if self._at_rung() or time.monotonic() - started >= REPORT_SECONDS:
                return False, ""
        return True, self._state.stop_reason or "epochs"

    def _warm_up(self, training: TrainingConfig, input_dim: int) -> None:
        """Warm up on one batch of zeros, so that what these settings import, compile or capture is ready in time."""
        device = choose_device(training, holds_gpu=self._holds_gpu)
        once = training.model_copy(update={"epochs": 1})
        # An error here will recur in the trial itself, which reports it.
        with contextlib.suppress(RuntimeError, MemoryError, MsaeSweepError):
            rows = ResidentBatches(torch.zeros(once.batch_size, input_dim, device=device), once.batch_size)
            state = TrainState.create(once, input_dim, seed=0, device=device)
            for _ in fit(state, rows, rows, once, self._steps):
                pass

    def _begin(self) -> None:
        device = choose_device(self._training, holds_gpu=self._holds_gpu)
        choice = kernels.choose_engine(device, self._training, self._prepared[self._block].input_dim)
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{torch.get_num_threads()} threads"
        self._runs_on |= {"device": f"{device.type} ({name})", "kernel": f"{choice.name} ({choice.reason})"}
        train, self._validation = self._load_data(device)
        input_dim = self._prepared[self._block].input_dim
        assert self._training.seed is not None, "the driver gives every trial its seed"
        self._state = self._saved_state(input_dim, device) or TrainState.create(
            self._training, input_dim, seed=self._training.seed, device=device, train=train
        )
        self._progress = fit(self._state, train, self._validation, self._training, self._steps)

    def _saved_state(self, input_dim: int, device: torch.device) -> TrainState | None:
        """Return the state that the trial saved last; None if there is none or it is damaged, which counts as lost."""
        assert self._training.seed is not None
        file = self._folder.state_file(self._trial_id)
        saved = self._folder.read(file)
        if saved is None:
            return None
        state = TrainState.create(self._training, input_dim, seed=self._training.seed, device=device)
        try:
            model_file.verify_checksums(saved)
            raw = torch.load(io.BytesIO(saved), map_location="cpu", weights_only=True)
            seconds = float(raw["seconds"])
            state.load_state_dict(raw["train_state"])
        except (torch.OutOfMemoryError, MemoryError):
            raise
        except Exception as error:  # torch raises many kinds of error, and none names the file
            self._notes.append(
                f"{file} is damaged ({first_line(error)}): {self._trial_id} is trained from its beginning"
            )
            return None
        self._seconds = seconds
        return state

    def _load_data(self, device: torch.device) -> tuple[WindowBatches, WindowBatches]:
        """Return training and validation rows of the block, and keep them for later trials.

        If the memory budget is exceeded, the blocks that were loaded first are dropped.
        """
        block = self._prepared[self._block]
        batch_size = self._training.batch_size
        if self._block not in self._loaded:
            n_bytes = 4 * block.input_dim * (block.n_train + block.n_val)
            while self._loaded and self._loaded_bytes() + n_bytes > self._budget_bytes(device):
                self._loaded.pop(next(iter(self._loaded)))
            # The validation rows get the budget that the training rows leave; streamed rows take almost nothing.
            budget, sides = self._budget_bytes(device), []
            for shards, n_rows in ((block.train_shards(), block.n_train), (block.val_shards(), block.n_val)):
                sides.append(make_batches(shards, n_rows, block.input_dim, batch_size, device, budget))
                n_bytes = 4 * block.input_dim * n_rows
                budget -= n_bytes if n_bytes <= budget else 0
            self._loaded[self._block] = tuple(side.batches for side in sides)
            self._runs_on["data"] = sides[0].reason
        train, validation = self._loaded[self._block]
        return train.with_batch_size(batch_size), validation.with_batch_size(batch_size)

    def _loaded_bytes(self) -> int:
        blocks = [self._prepared[block] for block in self._loaded]
        return sum(4 * block.input_dim * (block.n_train + block.n_val) for block in blocks)

    def _budget_bytes(self, device: torch.device) -> int:
        """Return the bytes that loaded rows may take on the device.

        This is determined once, while nothing is loaded: later, the rows themselves would reduce the free memory.
        """
        if self._budget is None:
            self._budget = default_budget_bytes(device, self._device_share)
        return self._budget

    def _seconds_between_states(self) -> float:
        longest = DRAINING_SAVE_SECONDS if self._preemption.is_draining else math.inf
        return min(self._checkpoint_seconds, longest)

    def _at_rung(self) -> bool:
        return self._state is not None and self._state.epoch in self._rungs

    def _save_model(self) -> None:
        """Write the best model; the driver makes it durable before it records that the trial ended."""
        assert self._state is not None
        if self._state.best_epoch:
            block = self._prepared[self._block]
            assert self._validation is not None
            best = self._state.best_model()
            on_device = best.on(self._state.samples_since_fired.device)
            counts = activation_counts(on_device, self._validation.ordered())
            model = model_file.ModelFile(
                model=best,
                mean=block.mean,
                std=block.std,
                history=self._state.history(self._training),
                activation_counts=counts.float().numpy(),
                total_samples=self._validation.n_rows,
            )
            file = self._folder.model_file(self._trial_id)
            self._folder.write(file, model_file.to_bytes(model), durable=False)

    def _save_state(self) -> None:
        """Write the training state, which includes the best weights."""
        assert self._state is not None
        content = io.BytesIO()
        torch.save({"train_state": self._state.state_dict(), "seconds": self._seconds}, content)
        self._folder.write(self._folder.state_file(self._trial_id), content.getbuffer())
        self._saved_at = time.monotonic()

    def _take_notes(self) -> list[str]:
        """Return the lines for the user that no report has contained yet, and clear them."""
        notes, self._notes = self._notes, []
        return notes

    def _give_up(self, reason: str) -> dict[str, Any]:
        """Return the result of a failed trial, and free its memory for the next trial in this process."""
        points = self._state.points if self._state else []
        self._state = self._progress = self._validation = None
        self._loaded.clear()
        self._steps.clear()
        with contextlib.suppress(RuntimeError):
            torch.cuda.empty_cache()
        return {
            "points": points[self._n_reported :],
            "rungs": [],
            "epoch": len(points),
            "seconds": self._seconds,
            "status": "failed",
            "reason": reason,
            "runs_on": self._runs_on,
            "notes": self._take_notes(),
            "done": True,
        }


def _out_of_memory(error: BaseException) -> str:
    """Return a short reason that keeps only the requested size from CUDA's long out-of-memory message."""
    return f"out of memory: {first_line(error).split(' GPU ')[0]}"
