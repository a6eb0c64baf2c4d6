"""What a report is about: a sweep as it lies in its folder, finished or not, with nothing drawn yet."""

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
from msae_sweep.sweep_folder.summary import Criterion, success_criteria
from msae_sweep.sweep_folder.trial_record import TrialRecord, ranked


class LateGain(NamedTuple):
    """How much the mean R² of a trial rose at the end of its training."""

    epochs: int
    """Number of last epochs that are looked at."""
    of: int
    """Number of epochs trained."""
    r2: float
    """Mean R² at the end less that before these epochs."""

    def __str__(self) -> str:
        last = "last" if self.epochs == 1 else f"last {self.epochs}"
        return f"{self.r2:+.4f} in the {last} of {self.of} epochs"


@dataclass(frozen=True)
class Trial:
    """A trial with all its settings."""

    record: TrialRecord
    training: TrainingConfig
    hidden_dim: int | None
    """Latents; None where the width of the data is not known."""

    @property
    def trial_id(self) -> str:
        """`block5-003`."""
        return self.record.trial_id

    @property
    def levels(self) -> tuple[int, ...]:
        """Ascending k at which R² was measured."""
        return self.training.levels

    @property
    def ended_well(self) -> bool:
        """Whether it may be the best one: it has a model, and will not change."""
        return self.record.has_model and bool(self.record.points)

    @cached_property
    def best(self) -> dict[str, float]:
        """Metrics of the epoch that its model is from."""
        return self.record.best

    @property
    def r2(self) -> list[float]:
        """R² at `levels`."""
        return [self.best[f"r2_k{k}"] for k in self.levels]

    @property
    def is_cut_short(self) -> bool:
        """Whether early stopping, or a loss that diverged, ended it before its last epoch."""
        return self.record.status != "completed" and self.record.epochs < self.training.epochs

    @property
    def shown_as(self) -> str:
        """Name with what sets its scores apart from those of a trial that was trained to its last epoch."""
        stopped = self.record.status == "stopped_early"
        return f"{self.trial_id}, stopped at epoch {self.record.epochs}" if stopped else self.trial_id

    @property
    def late_gain(self) -> LateGain | None:
        """Gain in its last tenth; None for fewer than three epochs."""
        points = self.record.points
        tenth = max(1, len(points) // 10)
        if len(points) < 3:
            return None
        return LateGain(tenth, len(points), points[-1]["r2_mean"] - points[-1 - tenth]["r2_mean"])

    @property
    def still_rising(self) -> bool:
        """Whether the best epoch is among the last tenth, and that tenth added 0.002 or more to the mean R²."""
        gain = self.late_gain
        if gain is None or self.record.reason != "epochs":
            return False
        return gain.r2 >= 0.002 and self.best["epoch"] > gain.of - gain.epochs


class Curve(NamedTuple):
    """R² of one trial's model on the validation rows."""

    ks: tuple[int, ...]
    r2: list[float]
    is_whole: bool
    """Whether every k from 1 was measured, or the trained levels only."""


@dataclass(frozen=True)
class Group:
    """Trials of one block with the same k_levels: those whose objectives mean the same."""

    block: int
    levels: tuple[int, ...]
    trials: list[Trial]
    """Best first; then those that diverged, failed, or are on their way."""
    ladder: EarlyStopping

    @property
    def ended(self) -> list[Trial]:
        """Those that may be the best, best first."""
        return [trial for trial in self.trials if trial.ended_well]

    @property
    def best(self) -> Trial:
        """The best one; there is one."""
        return self.ended[0]

    def best_with(self, **settings: Any) -> Trial | None:
        """The best one with these training settings."""
        fits = (t for t in self.ended if all(getattr(t.training, key) == value for key, value in settings.items()))
        return next(fits, None)

    @property
    def criteria(self) -> list[Criterion]:
        """The success criteria, applied to the best."""
        return success_criteria(self.best.best, self.levels)


@dataclass(frozen=True)
class Sweep:
    """A sweep, as far as it has come."""

    folder: SweepFolder
    config: SweepConfig
    identity: dict[str, Any]
    """Command, versions, where from; what older sweeps did not write is missing."""
    manifests: dict[int, dict[str, Any]]
    """Of each block's prepared data; empty where it is not known."""
    groups: list[Group]
    """Blocks in the sweep's order; within one, sets of levels, smallest k first. In each a trial has ended well."""
    unranked: list[Trial]
    """Trials that are in no group, because none of their block and levels has ended with a model."""
    records: list[TrialRecord]
    n_planned: int
    seconds: float | None
    """Wall time of all its runs, without preparation; None where it was not written."""
    winners: dict[int, str] = field(default_factory=dict)
    """By block, the trial whose model lies in `models/`; empty before the sweep has come to an end."""
    label: str = field(default="")
    """Its name, told apart from others of the same name on the page."""

    @property
    def name(self) -> str:
        """Of its folder."""
        return self.folder.name

    @property
    def blocks(self) -> list[int]:
        """Blocks with a trial that ended."""
        return list(dict.fromkeys(group.block for group in self.groups))

    @property
    def blocks_without(self) -> list[int]:
        """Blocks of the sweep in which no trial has ended with a model."""
        asked = self.config.data.blocks or sorted({record.block for record in self.records})
        return [block for block in asked if block not in self.blocks]

    @property
    def n_ended(self) -> int:
        """Trials that are over, well or not."""
        return sum(record.finished for record in self.records)

    @property
    def is_whole(self) -> bool:
        """Whether no trial is left to run."""
        return self.n_ended >= self.n_planned

    @property
    def runs(self) -> list[dict[str, Any]]:
        """Command, start and the like of each time it was run or resumed; None where that was not written."""
        known = self.identity.get("runs") or [{"command": self.identity.get("command") or "not written down"}]
        return [dict.fromkeys(("command", "started", "host", "accelerators", "seconds")) | run for run in known]

    @property
    def training_seconds(self) -> float:
        """Training time of all trials, one after another."""
        return sum(record.seconds for record in self.records)

    @property
    def gpu_seconds(self) -> float | None:
        """Training time times the GPUs a trial held; None where that was not written."""
        gpus = self.identity.get("gpus_per_trial")
        return None if gpus is None else self.training_seconds * gpus

    def counts(self) -> dict[str, int]:
        """How many trials have which status."""
        counts: dict[str, int] = defaultdict(int)
        for record in self.records:
            counts[record.status] += 1
        return dict(counts)

    def groups_of(self, block: int) -> list[Group]:
        """A block's groups."""
        return [group for group in self.groups if group.block == block]


def read(where: str | Path | SweepFolder) -> Sweep:
    """A sweep from its folder; one that runs, or was interrupted, as far as it has come.

    Raises:
        SweepError: no sweep there, or one in which no trial has ended, well or not.
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
    """Several sweeps, each with a label of its own; one that is named twice is read once."""
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
    """Groups with a best trial, and the trials of those without."""
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
        ladder = summarise_stops(
            [t.record for t in trials], config.asha, {t.trial_id: t.training.epochs for t in trials}
        )
        if order[0].ended_well:
            groups.append(Group(block, levels, order, ladder))
        else:
            unranked += order
    return groups, unranked
