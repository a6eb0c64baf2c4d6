"""Evaluate one model on any activations, for `msae-sweep eval`.

Rows are streamed by row range. The results are shown as a table and written in full as JSON.
"""

import json
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from jaxtyping import Float32
from rich.console import Group
from rich.table import Table
from rich.text import Text

from msae_sweep.config import DataConfig, parse
from msae_sweep.data.prepare.changes import describe_change
from msae_sweep.data.prepare.passes import PreparationJob
from msae_sweep.data.prepare.split import standardise
from msae_sweep.data.principal_components import Scatter, components_r2
from msae_sweep.data.sources.base import BlockInfo
from msae_sweep.data.sources.catalog import open_source, select_blocks
from msae_sweep.errors import ConfigError, DataError, DeviceError
from msae_sweep.models.find import FoundModel
from msae_sweep.paths import StoragePath
from msae_sweep.sae.evaluation import (
    Coherence,
    Evaluation,
    EvaluationSums,
    decoder_coherence,
    level_stability,
    matched_cosine,
)
from msae_sweep.sae.metrics import objective
from msae_sweep.sae.model import MSAE

Side = Literal["all", "training", "validation"]

MOST_CHANNELS_OF_PCA = 1024
"""Largest width of rows whose principal components are measured. Each part's sums are then 8 MiB at most, which matters
where tasks on a cluster send them to the driver."""
RANGE_BYTES = 16 << 20
"""Size in bytes of a row range as float64. It bounds how much is read at a time."""
QUANTILES = (0.1, 0.5, 0.9, 0.99)
"""Quantiles of the firing frequencies that `render` shows."""


class RangeRows(NamedTuple):
    """Rows of one row range on which the model is evaluated."""

    x: Float32[np.ndarray, "rows input_dim"]
    """Rows, standardised with the model's own mean and std."""
    n_dropped: int
    """Number of rows that were dropped because they contain NaN or Inf."""


class EvaluationPlan(NamedTuple):
    """Rows on which a model is evaluated, as row ranges. A plan is picklable, and making it reads no rows."""

    job: PreparationJob
    info: BlockInfo
    side: Side
    drop_nonfinite: bool
    mean: Float32[np.ndarray, " input_dim"]
    std: Float32[np.ndarray, " input_dim"]
    nonfinite_advice: str = "fix them, or drop them with --set data.drop_nonfinite=true"
    """Advice in the error that names a row with NaN or Inf."""

    @property
    def n_ranges(self) -> int:
        """Number of row ranges; `read` returns one part for each."""
        return len(self.job.ranges)

    def read(self, i: int) -> RangeRows:
        """Read part `i`, standardised with the model's own statistics.

        Raises:
            DataError: a row contains NaN or Inf, and `drop_nonfinite` is not set.
        """
        x, held_out, finite = self.job.read(i)
        wanted = {"all": np.ones_like(held_out), "validation": held_out, "training": ~held_out}[self.side]
        bad = np.flatnonzero(wanted & ~finite)
        if len(bad) and not self.drop_nonfinite:
            where = self.job.ranges[i].name(int(bad[0]), int(bad[-1]))
            raise DataError(f"{where}: NaN or Inf; {self.nonfinite_advice}")
        return RangeRows(standardise(x[wanted & finite], self.mean, self.std), len(bad))


class PartSums(NamedTuple):
    """Sums over one part of a plan; picklable once `model` is on the CPU."""

    model: EvaluationSums
    rows: Scatter | None
    """Sums from which the rows' principal components follow; None for rows of more than `MOST_CHANNELS_OF_PCA`."""
    n_dropped: int
    """Number of rows that were dropped because they contain NaN or Inf."""


class EvaluationReport(NamedTuple):
    """Results of the evaluation of one model."""

    found: FoundModel
    plan: EvaluationPlan
    evaluation: Evaluation
    n_dropped: int
    coherence: Coherence
    stability: dict[str, list[float]]
    """Mean matched cosine with each other model at every level of the evaluation, by the other model's `where`."""
    pca_r2: list[float]
    """R² of k = 1, 2, … principal components of the evaluated rows themselves, up to the largest k evaluated or the
    width of the rows. It is an upper bound: no other k directions that are the same for every row explain more. Empty
    for rows of more than `MOST_CHANNELS_OF_PCA`."""

    def to_json(self) -> dict[str, Any]:
        """Return all results for `--out`, such as R² and L0 at k = 1, 2, … and the firing frequency of every latent."""
        model, evaluation = self.found.file.model, self.evaluation
        levels = [str(k) for k in evaluation.levels]
        frequencies = evaluation.level_firing.double() / evaluation.n_rows
        return {
            "model": {"where": self.found.where, "block": self.found.block, **model.config},
            "data": {
                "where": self.plan.info.where,
                "block": self.plan.info.block,
                "rows": self.plan.side,
                "n_rows": evaluation.n_rows,
                "n_dropped": self.n_dropped,
            },
            "r2": [_number(value) for value in evaluation.r2],
            "l0": evaluation.l0,
            "r2_by_level": {k: _number(evaluation.r2[int(k) - 1]) for k in levels},
            "pca_r2": [_number(value) for value in self.pca_r2],
            "l0_by_level": {k: evaluation.l0[int(k) - 1] for k in levels},
            "dead_ratio": evaluation.dead_ratio,
            "decoder_coherence": self.coherence._asdict(),
            "stability": [
                {"against": name, "matched_cosine_by_level": dict(zip(levels, map(_number, values), strict=True))}
                for name, values in self.stability.items()
            ],
            "firing_frequency_by_level": dict(zip(levels, frequencies.tolist(), strict=True)),
        }

    def metrics(self) -> dict[str, float]:
        """Return the metrics that a trial reports for its validation rows, under the same names.

        R² and the metrics that follow from it are left out if the rows do not vary.
        """
        evaluation, levels = self.evaluation, self.found.file.model.k_levels
        named = {f"r2_k{k}": evaluation.r2[k - 1] for k in levels}
        named["r2_mean"] = sum(named.values()) / len(levels)
        named["objective"] = objective(named["r2_mean"], evaluation.dead_ratio)
        named |= {f"l0_k{k}": evaluation.l0[k - 1] for k in levels}
        named["dead_ratio"] = evaluation.dead_ratio
        return {key: value for key, value in named.items() if math.isfinite(value)}


def data_config_for(what: str, data: str | None, overrides: Sequence[str]) -> DataConfig:
    """Return the location and split of the rows: those of `data`, or without it those of the sweep in folder `what`.

    Args:
        overrides: texts `data.KEY=VALUE`, as for a sweep.

    Raises:
        ConfigError: `data` is None and `what` is not a sweep, or an override is invalid.
    """
    for override in overrides:
        if not override.startswith("data."):
            raise ConfigError(f"--set {override}: only data.… can be set here, e.g. data.val_split=0.2")
    if data is not None:
        return parse(json.dumps({"name": "eval", "data": {"path": data}}), overrides, source="--data").data
    file = StoragePath(what) / "sweep.yaml"
    try:
        text = file.read().decode()
    except OSError:
        raise ConfigError(f"--data: missing; give activations, because {what} is not a sweep folder") from None
    return parse(text, overrides, source=str(file)).data


def make_plan(found: FoundModel, data: DataConfig, block: int | None, side: Side) -> EvaluationPlan:
    """Choose the rows on which a model is evaluated. Only headers are read.

    Args:
        block: block of the data; by default the model's own block, or else the only block of the data.

    Raises:
        DataError: the block does not exist, its rows have another width than the model's, or the data cannot be split
            as `data.split_by` says.
        ConfigError: the data has several blocks, and neither `block` nor the model selects one.
    """
    block = found.block if block is None else block
    # Planted data can generate any block. Of other data all blocks are opened, so that messages can list them.
    blocks = (data.blocks if block is None else (block,)) if data.path == "planted" else None
    source = open_source(data.model_copy(update={"blocks": blocks}))
    infos = source.infos()
    if block is None:
        if len(infos) > 1:
            raise ConfigError(f"--block: {data.path} has blocks {', '.join(map(str, infos))}; choose one")
        block = next(iter(infos))
    (info,) = select_blocks(infos, data.model_copy(update={"blocks": (block,)}))
    model = found.file.model
    if info.input_dim != model.input_dim:
        raise DataError(
            f"{info.where}: rows of width {info.input_dim}, but {found.where} takes rows of width {model.input_dim}"
        )
    split_by = ("game_id" if info.has_groups else "row") if data.split_by == "auto" else data.split_by
    if split_by == "game_id" and not info.has_groups:
        raise DataError(f"data.split_by: game_id, but {info.where} has no game_id; add one or write row")
    ranges = source.row_ranges(block, max(1, RANGE_BYTES // (8 * info.input_dim)))
    job = PreparationJob(source, ranges, split_by, data.seed, data.val_split)
    return EvaluationPlan(job, info, side, data.drop_nonfinite, found.file.mean, found.file.std)


def check_unchanged(sweep: str, plan: EvaluationPlan, say: Callable[[str], None] = lambda line: None) -> None:
    """Check that a sweep's data is still the data on which its models were trained.

    Sweeps of earlier versions are not checked if they have recorded no manifest of their data.

    Args:
        say: called with a line for the user before rows are read and compared.

    Raises:
        DataError: the data has changed since; the message names the change.
    """
    manifests, origins = (_json_of(StoragePath(sweep) / name) for name in ("data.json", "origins.json"))
    block = str(plan.info.block)
    if block in manifests:
        changed = describe_change(plan.job.source, plan.info, manifests[block], origins.get(block, {}), say)
        if changed:
            raise DataError(
                f"{changed}: these are not the rows that {sweep} was run on; restore them, or give rows with --data"
            )


def _json_of(place: StoragePath) -> dict[str, Any]:
    try:
        found: dict[str, Any] = json.loads(place.read())
    except (OSError, ValueError):
        return {}
    return found


def choose_evaluation_device(name: str) -> torch.device:
    """Return the device for an evaluation; `auto` means CUDA if available, else the CPU.

    Raises:
        DeviceError: the device is not available.
    """
    available = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if name == "auto":
        return torch.device("cuda" if available["cuda"] else "cpu")
    if not available.get(name, False):
        raise DeviceError(f"--device: {name} is not available; write auto or cpu")
    return torch.device(name)


def local_sums(plan: EvaluationPlan, model: MSAE, max_k: int, device: torch.device) -> Iterator[PartSums]:
    """Yield the sums of each part, computed in this process."""
    on_device = model.on(device)
    for i in range(plan.n_ranges):
        yield part_sums(plan.read(i), on_device, max_k, device)


def part_sums(part: RangeRows, model: MSAE, max_k: int, device: torch.device) -> PartSums:
    """Return the sums of one part; `model` must be on `device`."""
    sums = EvaluationSums(model, max_k, device)
    sums.update(model, torch.from_numpy(part.x).to(device))
    rows = Scatter.of(part.x) if part.x.shape[1] <= MOST_CHANNELS_OF_PCA else None
    return PartSums(sums, rows, part.n_dropped)


def evaluate(
    found: FoundModel,
    plan: EvaluationPlan,
    parts: Callable[[EvaluationPlan, MSAE, int], Iterator[PartSums]],
    *,
    max_k: int | None = None,
    against: Sequence[FoundModel] = (),
    on_progress: Callable[[int, int], None] = lambda done, n_parts: None,
) -> EvaluationReport:
    """Evaluate a model on the rows of a plan.

    Args:
        parts: function that yields the sums of the plan's parts, e.g. `local_sums` for one device.
        max_k: largest k to evaluate; by default the model's largest level.
        against: models whose dictionaries are compared with this model's.
        on_progress: called with the number of parts that are done and the number of all parts.

    Raises:
        ConfigError: `max_k` is above hidden_dim.
        DataError: there are no rows, or a model in `against` has another input_dim.
    """
    model = found.file.model
    max_k = model.k_levels[-1] if max_k is None else max_k
    if max_k > model.hidden_dim:
        raise ConfigError(f"--max-k: {max_k} exceeds hidden_dim {model.hidden_dim}")
    for other in against:
        if other.file.model.input_dim != model.input_dim:
            raise DataError(
                f"{other.where}: input_dim {other.file.model.input_dim} must be {model.input_dim}, as in {found.where}"
            )
    total, n_dropped = EvaluationSums(model, max_k), 0
    rows: Scatter | None = Scatter.empty(model.input_dim) if model.input_dim <= MOST_CHANNELS_OF_PCA else None
    for done, part in enumerate(parts(plan, model, max_k), start=1):
        total.merge(part.model)
        rows = rows.merge(part.rows) if rows is not None and part.rows is not None else None
        n_dropped += part.n_dropped
        on_progress(done, plan.n_ranges)
    if not total.n_rows:
        raise DataError(f"{plan.info.where}: no {'' if plan.side == 'all' else plan.side + ' '}rows to evaluate on")
    evaluation = total.compute()
    stability = {
        other.where: level_stability(evaluation.level_firing, matched_cosine(model.W_dec, _in_units_of(found, other)))
        for other in against
    }
    return EvaluationReport(
        found=found,
        plan=plan,
        evaluation=evaluation,
        n_dropped=n_dropped,
        coherence=decoder_coherence(model.W_dec),
        stability=stability,
        pca_r2=components_r2(rows, rows)[:max_k].tolist() if rows is not None else [],
    )


def _in_units_of(found: FoundModel, other: FoundModel) -> torch.Tensor:
    """Return the dictionary of `other` in the standardised space of `found`, because their statistics may differ."""
    scale = other.file.std.astype(np.float64) / found.file.std.astype(np.float64)
    return other.file.model.W_dec.detach() * torch.from_numpy(scale.astype(np.float32))


def render(report: EvaluationReport) -> Group:
    """Return a table with a row per level, then lines on R² at more k, dead latents, firing and decoder coherence."""
    evaluation, model = report.evaluation, report.found.file.model
    rows = {"all": "rows", "validation": "validation rows", "training": "training rows"}[report.plan.side]
    # The title is a text of its own, because rich would wrap a table's title at the table's width.
    title = Text(f"{report.found.where} on {evaluation.n_rows:,} {rows}", style="italic", overflow="fold")
    table = Table()
    names = [f"matched cosine {i}" for i in range(1, len(report.stability) + 1)]
    for heading in ("k", "R²", "active latents", "ever active", *names):
        table.add_column(heading, justify="right")
    for level, k in enumerate(evaluation.levels):
        ever = (evaluation.level_firing[level] > 0).double().mean().item()
        table.add_row(
            str(k),
            f"{evaluation.r2[k - 1]:.4f}",
            f"{evaluation.l0[k - 1]:.1f}",
            f"{ever:.1%}",
            *(f"{values[level]:.3f}" for values in report.stability.values()),
        )
    curve = [k for k in (2**i for i in range(len(evaluation.r2).bit_length())) if k <= len(evaluation.r2)]
    frequencies = evaluation.firing.double() / evaluation.n_rows
    quantiles = torch.quantile(frequencies, torch.tensor(QUANTILES, dtype=torch.float64)).tolist()
    n_dead = int((evaluation.firing == 0).sum())
    lines = [
        "R²(k): " + " · ".join(f"{k} {evaluation.r2[k - 1]:.3f}" for k in curve),
        *_components_line(report.pca_r2, curve),
        f"dead latents: {n_dead:,} of {model.hidden_dim:,} ({evaluation.dead_ratio:.1%}) fired for none of these rows "
        f"at k = {len(evaluation.r2)}; a sweep counts those that fired for no row of a whole training epoch",
        "firing frequency: "
        + " · ".join(
            f"{share:.0%} of latents below {value:.2%}" for share, value in zip(QUANTILES, quantiles, strict=True)
        ),
        f"decoder coherence |cosine|: largest {report.coherence.max:.3f} · nearest row, mean "
        f"{report.coherence.mean_max:.3f} · all pairs, mean {report.coherence.mean:.3f}",
    ]
    lines += [f"{name}: {where}" for name, where in zip(names, report.stability, strict=True)]
    if report.n_dropped:
        lines.append(f"{report.n_dropped:,} rows with NaN or Inf left out")
    return Group(title, table, *lines)


def _components_line(pca_r2: Sequence[float], ks: Sequence[int]) -> list[str]:
    """Return a line with R² of k principal components at the given k; no line if it was not measured."""
    shown = " · ".join(f"{k} {pca_r2[k - 1]:.3f}" for k in ks if k <= len(pca_r2))
    return [f"R²(k) of k principal components, fitted to these rows themselves: {shown}"] if pca_r2 else []


def _number(value: float) -> float | None:
    """Return None for a number that is not finite, because JSON has no NaN."""
    return value if math.isfinite(value) else None
