"""Data of a report: sweeps, finished or not, as read from their folders, with their trials in groups."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from msae_sweep.config import SweepConfig, TrainingConfig, parse
from msae_sweep.errors import SweepError
from msae_sweep.paths import StoragePath
from msae_sweep.sweep_folder.folder import SweepFolder
from msae_sweep.sweep_folder.rungs import EarlyStopping, summarise_stops
from msae_sweep.sweep_folder.summary import Criterion, FurtherCriterion, further_criteria, success_criteria
from msae_sweep.sweep_folder.trial_record import TrialRecord, ranked


class LateGain(NamedTuple):
    """Increase of a trial's mean R² at the end of its training."""

    epochs: int
    """Number of last epochs over which the increase is measured."""
    of: int
    """Number of epochs trained."""
    r2: float
    """Mean R² at the end minus mean R² before these epochs."""

    def __str__(self) -> str:
        last = "last" if self.epochs == 1 else f"last {self.epochs}"
        return f"{self.r2:+.4f} in the {last} of {self.of} epochs"


@dataclass(frozen=True)
class Trial:
    """A trial with all its settings."""

    record: TrialRecord
    training: TrainingConfig
    hidden_dim: int | None
    """Number of latents; None if the width of the data is not known."""

    @property
    def trial_id(self) -> str:
        """Trial ID, e.g. `block5-003`."""
        return self.record.trial_id

    @property
    def levels(self) -> tuple[int, ...]:
        """Levels k at which R² was measured, ascending."""
        return self.training.levels

    @property
    def ended_well(self) -> bool:
        """True if the trial may be the best one: it has ended with a model, and will not change."""
        return self.record.has_model and bool(self.record.points)

    @cached_property
    def best(self) -> dict[str, float]:
        """Metrics of the epoch that the trial's model is from."""
        return self.record.best

    @property
    def r2(self) -> list[float]:
        """R² at each of `levels`."""
        return [self.best[f"r2_k{k}"] for k in self.levels]

    @property
    def is_cut_short(self) -> bool:
        """True if the trial has not completed and has not trained all its epochs, e.g. because it was stopped early."""
        return self.record.status != "completed" and self.record.epochs < self.training.epochs

    @property
    def shown_as(self) -> str:
        """Trial ID, followed by the last epoch if early stopping ended the trial, because its scores differ then."""
        stopped = self.record.status == "stopped_early"
        return f"{self.trial_id}, stopped at epoch {self.record.epochs}" if stopped else self.trial_id

    @property
    def late_gain(self) -> LateGain | None:
        """Gain of mean R² in the last tenth of the epochs; None for fewer than three epochs."""
        points = self.record.points
        tenth = max(1, len(points) // 10)
        if len(points) < 3:
            return None
        return LateGain(tenth, len(points), points[-1]["r2_mean"] - points[-1 - tenth]["r2_mean"])

    @property
    def still_rising(self) -> bool:
        """True if the last tenth of the epochs includes the best epoch and added 0.002 or more to the mean R².

        Only a trial that trained all its epochs can be still rising.
        """
        gain = self.late_gain
        if gain is None or self.record.reason != "epochs":
            return False
        return gain.r2 >= 0.002 and self.best["epoch"] > gain.of - gain.epochs


class Curve(NamedTuple):
    """R² by k of one trial's model on the validation rows."""

    ks: tuple[int, ...]
    r2: list[float]
    is_whole: bool
    """True if every k from 1 was measured; False if only the trained levels were."""


@dataclass(frozen=True)
class Group:
    """Trials of one block with the same k_levels. Only objectives of one group can be compared."""

    block: int
    levels: tuple[int, ...]
    trials: list[Trial]
    """Trials that ended well, best first, then trials that diverged, failed or have not ended yet."""
    early_stopping: EarlyStopping
    """Rungs of the group, and the trials that were stopped at them."""

    @property
    def ended(self) -> list[Trial]:
        """Trials that ended well and may be the best, best first."""
        return [trial for trial in self.trials if trial.ended_well]

    @property
    def best(self) -> Trial:
        """Best trial of the group. Every group has one."""
        return self.ended[0]

    def best_with(self, **settings: Any) -> Trial | None:
        """Return the best trial with these training settings, or None if there is none."""
        fits = (t for t in self.ended if all(getattr(t.training, key) == value for key, value in settings.items()))
        return next(fits, None)

    @property
    def criteria(self) -> list[Criterion]:
        """Success criteria, applied to the best trial."""
        return success_criteria(self.best.best, self.levels)

    @property
    def further_criteria(self) -> list[FurtherCriterion]:
        """Further criteria of the original series, applied to the best trial."""
        return further_criteria(self.best.best, self.levels)


@dataclass(frozen=True)
class Sweep:
    """A sweep with the results that it has so far."""

    folder: SweepFolder
    config: SweepConfig
    identity: dict[str, Any]
    """Content of `identity.json`: commands, versions and origin. Keys that older sweeps did not write are missing."""
    manifests: dict[int, dict[str, Any]]
    """Manifest of each block's prepared data, by block. A block without a known manifest is missing."""
    groups: list[Group]
    """Groups with at least one trial that ended well.

    They are in the sweep's order of blocks, and within a block in the order of their levels, smallest k first."""
    unranked: list[Trial]
    """Trials without a group, because no trial with their block and levels has ended with a model."""
    records: list[TrialRecord]
    """Records of all trials that were written so far."""
    n_planned: int
    """Number of trials that the sweep is to run."""
    seconds: float | None
    """Wall time of all runs of the sweep, without preparation; None if it was not recorded."""
    winners: dict[int, str] = field(default_factory=dict)
    """Trial whose model is in `models/`, by block; empty before the sweep has ended."""
    label: str = field(default="")
    """Name of the sweep on the page. If several sweeps have the same name, it includes the storage folder's name."""

    @property
    def name(self) -> str:
        """Name of the sweep's folder."""
        return self.folder.name

    @property
    def blocks(self) -> list[int]:
        """Blocks with a trial that ended with a model."""
        return list(dict.fromkeys(group.block for group in self.groups))

    @property
    def blocks_without(self) -> list[int]:
        """Blocks of the sweep in which no trial has ended with a model."""
        asked = self.config.data.blocks or sorted({record.block for record in self.records})
        return [block for block in asked if block not in self.blocks]

    @property
    def n_ended(self) -> int:
        """Number of trials that have ended, successfully or not."""
        return sum(record.finished for record in self.records)

    @property
    def is_whole(self) -> bool:
        """True if no trial is left to run."""
        return self.n_ended >= self.n_planned

    @property
    def runs(self) -> list[dict[str, Any]]:
        """Command, start, host, accelerators and seconds of each run or resume of the sweep.

        A value that was not recorded is None.
        """
        known = self.identity.get("runs") or [{"command": self.identity.get("command") or "not recorded"}]
        return [dict.fromkeys(("command", "started", "host", "accelerators", "seconds")) | run for run in known]

    @property
    def training_seconds(self) -> float:
        """Sum of the training times of all trials."""
        return sum(record.seconds for record in self.records)

    @property
    def gpu_seconds(self) -> float | None:
        """Training time multiplied by the GPUs per trial; None if the latter was not recorded."""
        gpus = self.identity.get("gpus_per_trial")
        return None if gpus is None else self.training_seconds * gpus

    def counts(self) -> dict[str, int]:
        """Return the number of trials by status."""
        counts: dict[str, int] = defaultdict(int)
        for record in self.records:
            counts[record.status] += 1
        return dict(counts)

    def groups_of(self, block: int) -> list[Group]:
        """Return the groups of a block."""
        return [group for group in self.groups if group.block == block]


def read(where: str | Path | SweepFolder) -> Sweep:
    """Read a sweep from its folder. A sweep that is running or was interrupted is read with its results so far.

    Raises:
        SweepError: the folder has no sweep, or none of its trials has ended, successfully or not.
    """
    folder = where if isinstance(where, SweepFolder) else SweepFolder.at(where)
    if not folder.exists():
        raise SweepError(f"{folder}: no sweep.yaml there; give the folder of a sweep, e.g. sweeps/quickstart")
    config = parse(folder.config_file.read_text(encoding="utf-8"), source=f"{folder}/sweep.yaml")
    summary, identity = folder.read_json("summary.json"), folder.read_json("identity.json")
    manifests = {int(name.removeprefix("block")): block["data"] for name, block in summary.get("blocks", {}).items()}
    manifests |= {int(block): manifest for block, manifest in folder.read_json("data.json").items()}
    records = list(folder.load_records().values())
    if not any(record.finished for record in records):
        raise SweepError(f"{folder}: none of its {len(records)} trials has ended yet; nothing to report")
    groups, unranked = _groups(config, records, {block: manifest["input_dim"] for block, manifest in manifests.items()})
    n_blocks = len(manifests or config.data.blocks or {record.block for record in records})
    runs = identity.get("runs", [])
    seconds = sum(run.get("seconds", 0) for run in runs) or summary.get("seconds")
    return Sweep(
        folder=folder,
        config=config,
        identity=identity,
        manifests=manifests,
        groups=groups,
        unranked=unranked,
        records=records,
        n_planned=max(config.n_trials_per_block() * n_blocks, len(records)),
        seconds=seconds,
        winners={int(name.removeprefix("block")): block["best"] for name, block in summary.get("blocks", {}).items()},
        label=folder.name,
    )


def read_all(places: Sequence[str | Path]) -> list[Sweep]:
    """Read several sweeps and give each its own label. A sweep that is listed twice is returned once."""
    sweeps = list({str(sweep.folder): sweep for sweep in map(read, places)}.values())
    names = [sweep.name for sweep in sweeps]
    return [
        sweep
        if names.count(sweep.name) == 1
        else _labelled(sweep, f"{StoragePath(sweep.folder.storage).name}/{sweep.name}")
        for sweep in sweeps
    ]


def _labelled(sweep: Sweep, label: str) -> Sweep:
    return Sweep(**{**vars(sweep), "label": label})


def _groups(
    config: SweepConfig, records: Sequence[TrialRecord], input_dims: Mapping[int, int]
) -> tuple[list[Group], list[Trial]]:
    """Return the groups that have a best trial, and the trials of all other groups."""
    together: dict[tuple[int, tuple[int, ...]], list[Trial]] = defaultdict(list)
    for record in records:
        training = record.training(config.training)
        width = input_dims.get(record.block)
        hidden_dim = training.hidden_dim(width) if width else None
        together[record.block, training.levels].append(Trial(record, training, hidden_dim))
    blocks = list(config.data.blocks or sorted({record.block for record in records}))
    groups: list[Group] = []
    unranked: list[Trial] = []
    for (block, levels), trials in sorted(together.items(), key=lambda item: (blocks.index(item[0][0]), item[0][1])):
        by_id = {trial.trial_id: trial for trial in trials}
        order = [by_id[r.trial_id] for r in ranked([t.record for t in trials if t.ended_well])]
        order += sorted((t for t in trials if not t.ended_well), key=lambda t: t.record.index)
        stopping = summarise_stops(
            [t.record for t in trials], config.asha, {t.trial_id: t.training.epochs for t in trials}
        )
        if order[0].ended_well:
            groups.append(Group(block, levels, order, stopping))
        else:
            unranked += order
    return groups, unranked
