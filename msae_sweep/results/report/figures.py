"""The figures of a report, one panel each, with a sentence of what to read from it."""

import itertools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from msae_sweep.config import DEAD_RATIO_ALLOWED
from msae_sweep.results.report.data import Curve, Group, Trial
from msae_sweep.results.report.response import Response
from msae_sweep.results.report.style import (
    COLOURS,
    GREY,
    MARKERS,
    STYLES,
    Drawing,
    finished,
    legend_below,
    panel,
    plain_log,
)

MOST_ROWS = 40
"""Trials that the figure of early stopping has room for."""


class Line(NamedTuple):
    """A curve with its name in the legend and its trained levels."""

    label: str
    curve: Curve
    levels: tuple[int, ...]


def r2_by_k(block: int, lines: Sequence[Line], baselines: Mapping[int, float]) -> Drawing:
    """R² at every k of the best trials, and of the SAEs that were trained for one k alone."""
    figure, axes = panel()
    for i, (label, curve, levels) in enumerate(lines):
        at = [curve.ks.index(k) for k in levels if k in curve.ks]
        axes.plot(
            curve.ks,
            curve.r2,
            color=COLOURS[i % 7],
            linestyle=STYLES[i % 7],
            marker=MARKERS[i % 7],
            markevery=at,
            label=label,
        )
    if baselines:
        axes.plot(*zip(*sorted(baselines.items()), strict=True), "k*", markersize=9, label="trained for one k alone")
    ks = sorted({k for line in lines for k in line.levels} | set(baselines))
    plain_log(axes, [k for k in (1, 2, 4, 8) if k < ks[0]] + ks, base=2)
    axes.set(xlabel="k: latents in use per position", ylabel="R²: share of variance explained")
    lowest = min(min(line.curve.r2) for line in lines)
    axes.set_ylim(max(-0.1, lowest - 0.03), None)
    legend_below(figure, axes, 1 if max(len(line.label) for line in lines) > 18 else 2)
    _, best, levels = lines[0]
    first, last = levels[0], levels[-1]
    r2 = dict(zip(best.ks, best.r2, strict=True))
    reading = f"With {first} latents {r2[first]:.1%} of the variance is explained, with {last} {r2[last]:.1%}"
    gaps = {k: value - r2[k] for k, value in baselines.items() if k in r2}
    if gaps:
        k = max(gaps, key=lambda k: abs(gaps[k]))
        more = "more" if gaps[k] > 0 else "less"
        reading += (
            f"; an SAE trained for k = {k} alone explains {abs(gaps[k]):.3f} {more} there, the largest difference"
        )
    elif len(levels) > 1:
        gain = r2[last] - r2[levels[-2]]
        reading += f"; going from {levels[-2]} to {last} {'adds' if gain > 0 else 'loses'} {abs(gain):.3f}"
    return finished(figure, f"r2_by_k_block{block}", f"Block {block}: R² at every k", f"{reading}.")


def learning_rate(group: Group) -> Drawing:
    """Score against learning rate, by expansion factor and weighting."""
    figure, axes = panel(3.7)
    _scatter(axes, group, lambda trial: trial.training.learning_rate)
    rates = [trial.training.learning_rate for trial in group.ended]
    plain_log(axes, rates)
    axes.set(xlabel="learning rate", ylabel="score: mean R² over levels")
    _score_limits(axes, group)
    legend_below(figure, axes, 3)
    top = sorted(trial.training.learning_rate for trial in group.ended[:3])
    reading = f"The best trial has learning rate {group.best.training.learning_rate:.2e}"
    if len(group.ended) > 3 and top[0] < top[-1]:
        reading += f"; the best three lie between {top[0]:.2e} and {top[-1]:.2e}"
    elif max(rates) / min(rates) < 1.001:
        reading += ", as all of them"
    return finished(figure, _name("learning_rate", group), f"Block {group.block}: learning rate", f"{reading}.")


def front(trials: Iterable[Trial], cost: Any) -> list[Trial]:
    """Those that no other one beats in mean R² at the same or lower cost, cheapest first."""
    order = sorted(trials, key=lambda trial: (cost(trial), -trial.best["r2_mean"]))
    kept: list[Trial] = []
    for trial in order:
        if not kept or trial.best["r2_mean"] > kept[-1].best["r2_mean"]:
            kept.append(trial)
    return kept


def against_size(group: Group) -> Drawing:
    """Mean R² against the number of latents, with the front of those that nothing smaller beats."""
    figure, axes = panel()
    _scatter(axes, group, size, "r2_mean")
    best = front(group.ended, size)
    axes.plot([size(t) for t in best], [t.best["r2_mean"] for t in best], color="k", linewidth=1, label="best for size")
    known = group.best.hidden_dim is not None
    plain_log(axes, [size(trial) for trial in group.ended], base=2)
    axes.set(xlabel="latents" if known else "expansion factor", ylabel="mean R² over levels")
    _score_limits(axes, group, "r2_mean")
    legend_below(figure, axes, 3)
    sizes = {size(trial) for trial in group.ended}
    if len(best) > 1:
        a, b = best[-2:]
        gain = b.best["r2_mean"] - a.best["r2_mean"]
        reading = f"The best with {size(b):g} is {gain:.3f} ahead of the best with {size(a):g}"
        reading += _but(a, b, "expansion_factor")
        if size(b) < max(sizes):
            reading += f"; none with {max(sizes):g} beats it"
    elif len(sizes) > 1:
        reading = f"Nothing larger beats the best with {size(best[0]):g}"
    else:
        reading = f"Every trial has {size(best[0]):g}; other sizes were not tried"
    return finished(figure, _name("size", group), f"Block {group.block}: size", f"{reading}.")


def against_dead(group: Group) -> Drawing:
    """Mean R² against the share of dead latents."""
    figure, axes = panel()
    _scatter(axes, group, lambda trial: 100 * trial.best["dead_ratio"], "r2_mean")
    best = front(group.ended, lambda trial: trial.best["dead_ratio"])
    axes.plot(
        [100 * t.best["dead_ratio"] for t in best],
        [t.best["r2_mean"] for t in best],
        color="k",
        linewidth=1,
        label="best for so many dead",
    )
    axes.axvline(
        100 * DEAD_RATIO_ALLOWED, color=GREY, linestyle=":", label=f"{DEAD_RATIO_ALLOWED:.0%}: the most allowed"
    )
    axes.set(xlabel="dead latents: fired for no row of the last epoch (%)", ylabel="mean R² over levels")
    axes.set_xlim(-1, max(100 * DEAD_RATIO_ALLOWED + 3, axes.get_xlim()[1]))
    _score_limits(axes, group, "r2_mean")
    legend_below(figure, axes, 2)
    over = sum(trial.best["dead_ratio"] >= DEAD_RATIO_ALLOWED for trial in group.ended)
    reading = (
        f"The best trial has {group.best.best['dead_ratio']:.1%} dead latents; "
        f"{over or 'none'} of {len(group.ended)} trials {'has' if over == 1 else 'have'} "
        f"{DEAD_RATIO_ALLOWED:.0%} or more"
    )
    return finished(figure, _name("dead", group), f"Block {group.block}: dead latents", f"{reading}.")


def weightings(group: Group, curves: Mapping[str, Curve]) -> Drawing | None:
    """The best uniform trial beside the best reverse one; None where only one was tried."""
    pair = {name: group.best_with(weighting=name) for name in ("uniform", "reverse")}
    uniform, reverse = pair["uniform"], pair["reverse"]
    if uniform is None or reverse is None or len(group.levels) == 1:
        return None
    figure, axes = panel()
    for i, (name, trial) in enumerate(pair.items()):
        assert trial is not None
        curve = curves[trial.trial_id]
        at = [curve.ks.index(k) for k in group.levels if k in curve.ks]
        axes.plot(
            *(curve.ks, curve.r2),
            color=COLOURS[i],
            linestyle=STYLES[i],
            marker=MARKERS[i],
            markevery=at,
            label=f"{name} ({trial.trial_id})",
        )
    plain_log(axes, [k for k in (1, 2, 4, 8) if k < group.levels[0]] + list(group.levels), base=2)
    axes.set(xlabel="k: latents in use per position", ylabel="R²: share of variance explained")
    axes.set_ylim(max(-0.1, axes.get_ylim()[0]), None)
    legend_below(figure, axes, 1)
    differences = [
        f"{abs(r - u):.3f} {'better' if r > u else 'worse'} at k = {k}"
        for k, u, r in zip(group.levels, uniform.r2, reverse.r2, strict=True)
        if k in (group.levels[0], group.levels[-1])
    ]
    reading = f"The best reverse trial is {' and '.join(differences)} than the best uniform one"
    reading += _but(uniform, reverse, "weighting")
    return finished(figure, _name("weighting", group), f"Block {group.block}: weighting", f"{reading}.")


def early_stopping(group: Group) -> Drawing | None:
    """How far each trial came and what the stopped ones lacked; None where nothing is stopped by rule."""
    ladder = group.ladder
    if not ladder.rungs:
        return None
    shown = group.trials[:MOST_ROWS]
    figure, axes = panel(1.5 + 0.19 * len(shown))
    stops = {stop.trial_id: stop for stop in ladder.stops}
    looks = {
        "completed": (COLOURS[2], "", "trained to its end"),
        "stopped_early": (COLOURS[4], "///", "stopped"),
        "running": (COLOURS[5], "...", "on its way"),
        "pending": (COLOURS[5], "...", "on its way"),
    }
    for row, trial in enumerate(shown):
        colour, hatch, label = looks.get(trial.record.status, (COLOURS[1], "xxx", "diverged or failed"))
        axes.barh(row, trial.record.epochs, color=colour, hatch=hatch, edgecolor="white", height=0.75, label=label)
        if stop := stops.get(trial.trial_id):
            look = {"xytext": (4, 0), "textcoords": "offset points", "va": "center", "fontsize": 8}
            axes.annotate(f"{_small(stop.shortfall)} short", (stop.rung, row), **look)
    for rung in ladder.rungs:
        axes.axvline(rung, color="k", linewidth=0.8, linestyle=":")
    axes.set_yticks(range(len(shown)), [trial.trial_id for trial in shown], fontsize=8)
    axes.set_ylim(len(shown) - 0.4, -0.6)
    axes.set_xlim(0, 1.02 * max(trial.training.epochs for trial in shown))
    axes.grid(visible=False, axis="y")
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set_xlabel(f"epochs (dotted: judged at {', '.join(map(str, ladder.rungs))})")
    legend_below(figure, axes, 2)
    if stops:
        closest = min(ladder.stops, key=lambda stop: stop.shortfall)
        total = ladder.epochs_saved + ladder.epochs_trained
        reading = (
            f"{len(stops)} of {len(group.trials)} trials {'was' if len(stops) == 1 else 'were'} stopped, which saved "
            f"{ladder.epochs_saved} of {total} "
            f"epochs ({ladder.epochs_saved / total:.0%}); the closest, {closest.trial_id}, would have needed "
            f"{_small(closest.shortfall)} more at epoch {closest.rung}"
        )
    else:
        reading = f"None of {len(group.trials)} trials was stopped"
    if len(group.trials) > len(shown):
        reading += f" (the best {len(shown)} are drawn)"
    return finished(figure, _name("early_stopping", group), f"Block {group.block}: early stopping", f"{reading}.")


TRAINING = {
    "train_loss": ("Training loss", "training loss"),
    "val_loss": ("Validation loss", "validation loss"),
    "dead_ratio": ("Dead latents", "dead latents (%)"),
    "r2_mean": ("Mean R² over levels", "mean R² over levels"),
}
"""Title and axis of what `training` draws."""


def training(groups: Sequence[Group], key: str) -> Drawing:
    """Losses, dead latents or mean R² by epoch of each block's best trial, as in the notebook."""
    title, ylabel = TRAINING[key]
    figure, axes = panel()
    factor = 100 if key == "dead_ratio" else 1
    for i, group in enumerate(groups):
        points = [point for point in group.best.record.points if key in point]
        epochs = [point["epoch"] for point in points]
        values = [factor * point[key] for point in points]
        look = {"color": COLOURS[i % 7], "linestyle": STYLES[i % 7]}
        best = epochs.index(group.best.best["epoch"]) if group.best.best["epoch"] in epochs else None
        axes.plot(
            epochs,
            values,
            **look,
            marker=MARKERS[i % 7],
            markevery=[] if best is None else [best],
            label=f"block {group.block}",
        )
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set(xlabel="epoch (marker: the best)", ylabel=ylabel)
    if key == "dead_ratio":
        axes.axhline(100 * DEAD_RATIO_ALLOWED, color=GREY, linestyle=":")
        axes.set_ylim(-1, max(100 * DEAD_RATIO_ALLOWED + 3, axes.get_ylim()[1]))
    elif key.endswith("loss") and _spans_a_decade([p[key] for g in groups for p in g.best.record.points if key in p]):
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter(_every_other)
    legend_below(figure, axes, 3)
    return finished(figure, f"training_{key}", title, _training_reading(key, groups))


def fitted(response: Response) -> Drawing:
    """The fitted response to the learning rate, through the trials that it was fitted to."""
    rates, scores = response.points
    block = response.block
    figure, axes = panel()
    axes.plot(rates, scores, "o", color=COLOURS[0], label="trials")
    grid = np.geomspace(min(rates), max(rates), 100)
    axes.plot(grid, response.scores(grid), color=COLOURS[1], linestyle="--", label="fit, all else as in the best trial")
    low, high = max(response.interval[0], min(rates)), min(response.interval[1], max(rates))
    if response.optimum is not None and low < high:
        axes.axvspan(low, high, color=COLOURS[4], alpha=0.25, label="80% of refits have their best here")
    plain_log(axes, list(rates))
    axes.set(xlabel="learning rate", ylabel=f"score at epoch {response.epoch}" if response.epoch else "score")
    legend_below(figure, axes, 1)
    return finished(figure, f"fit_block{block}", f"Block {block}: fitted learning rate", response.sentence)


def size(trial: Trial) -> float:
    """Latents, or the expansion factor where the width of the data is not known."""
    return trial.hidden_dim or trial.training.expansion_factor


def _scatter(axes: Any, group: Group, x: Any, y: str = "objective") -> None:
    """Trials by expansion factor (colour and marker), weighting (filled or hollow), and whether they were stopped."""
    for i, (label, trials) in enumerate(_by_expansion(group.ended)):
        for trial in reversed(trials):
            colour, whole = COLOURS[i % 7], trial.record.status == "completed"
            filled = trial.training.weighting == "reverse"
            axes.plot(
                x(trial),
                trial.best[y],
                linestyle="none",
                marker=MARKERS[i % 7],
                markersize=7 if whole else 4.5,
                color=colour,
                markerfacecolor=colour if filled else "white",
                alpha=1 if whole else 0.65,
            )
        axes.plot([], [], linestyle="none", marker=MARKERS[i % 7], color=COLOURS[i % 7], label=label)
    for weighting, face in (("uniform", "white"), ("reverse", GREY)):
        if group.best_with(weighting=weighting) and len(group.levels) > 1:
            axes.plot([], [], "o", color=GREY, markerfacecolor=face, label=weighting)
    if any(trial.record.status == "stopped_early" for trial in group.ended):
        axes.plot([], [], "o", color=GREY, markersize=4.5, alpha=0.65, label="small: stopped")


def _by_expansion(trials: Sequence[Trial]) -> list[tuple[str, list[Trial]]]:
    """Trials by expansion factor; by thirds of its range where there are too many values to tell apart."""
    values = sorted({trial.training.expansion_factor for trial in trials})
    if len(values) <= 6:
        groups = [(f"expansion {v:g}", [t for t in trials if t.training.expansion_factor == v]) for v in values]
    else:
        edges = [float(edge) for edge in np.quantile(values, (0, 1 / 3, 2 / 3, 1))]
        edges[-1] += 1e-9
        groups = [
            (f"expansion {a:.3g}–{b:.3g}", [t for t in trials if a <= t.training.expansion_factor < b])
            for a, b in itertools.pairwise(edges)
        ]
    return [(label, members) for label, members in groups if members]


def _score_limits(axes: Any, group: Group, key: str = "objective") -> None:
    """Leave out of sight what is far below the rest: one trial that went wrong would flatten all others."""
    values = np.array([trial.best[key] for trial in group.ended])
    top, middle = values.max(), np.median(values)
    low = max(values.min(), middle - 4 * max(top - middle, 0.01))
    margin = 0.08 * max(top - low, 0.005)
    axes.set_ylim(low - margin, top + margin)
    if hidden := int((values < low - margin).sum()):
        axes.annotate(
            f"{hidden} more below", (0.02, 0.02), xycoords="axes fraction", fontsize=8, color="#555555", va="bottom"
        )


def _small(value: float) -> str:
    """Three decimals; what they cannot show is not zero."""
    return f"{value:.3f}" if value >= 0.0005 else "less than 0.001"


def _but(a: Trial, b: Trial, compared: str) -> str:
    """What makes a comparison of two trials uneven besides the setting `compared`; empty where nothing does."""
    early = [t for t in (a, b) if t.record.status == "stopped_early"]
    if early and a.record.epochs != b.record.epochs:
        return f" (but {early[0].trial_id} was stopped at epoch {early[0].record.epochs})"
    keys = [key for key in ("learning_rate", "expansion_factor", "weighting") if key != compared]
    differ = [key.replace("_", " ") for key in keys if getattr(a.training, key) != getattr(b.training, key)]
    return f" (they differ in {' and '.join(differ)} too)" if differ else ""


def _training_reading(key: str, groups: Sequence[Group]) -> str:
    if key == "dead_ratio":
        worst = max(groups, key=lambda group: max(p["dead_ratio"] for p in group.best.record.points))
        most = max(point["dead_ratio"] for point in worst.best.record.points)
        if not most:
            return "No latent of a best trial was dead at the end of any epoch."
        return f"At no epoch are more than {most:.1%} of the latents of a best trial dead (block {worst.block})."
    if key == "r2_mean":
        rising = [group for group in groups if group.best.still_rising]
        if rising:
            names = ", ".join(str(group.block) for group in rising)
            return f"Still rising at the last epoch: block {names}; more epochs would raise it further."
        return "Every best trial has stopped rising; more epochs would change little."
    best = {group.block: group.best for group in groups}
    parts = [f"{t.record.points[-1][key]:.3f} (block {b})" for b, t in best.items() if key in t.record.points[-1]]
    return f"At the last epoch: {', '.join(parts)}; compare between blocks only trials of the same weighting."


def _spans_a_decade(losses: Sequence[float]) -> bool:
    """Whether a logarithmic axis has enough of its 1, 2 and 5 to be read by."""
    return bool(losses) and min(losses) > 0 and max(losses) >= 10 * min(losses)


def _every_other(value: float, position: int | None = None) -> str:
    """Labels of a logarithmic axis' minor ticks: 2 and 5 of every decade."""
    digit = round(value / 10 ** np.floor(np.log10(value) + 1e-9)) if value > 0 else 0
    return f"{value:g}" if digit in (2, 5) else ""


def _name(kind: str, group: Group) -> str:
    return f"{kind}_block{group.block}" + (f"_k{group.levels[0]}" if len(group.levels) == 1 else "")
