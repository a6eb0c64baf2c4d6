"""Figures of a report. Each figure has one panel and a sentence that says what to read from it."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from msae_sweep.config import DEAD_RATIO_ALLOWED
from msae_sweep.report.style import COLOURS, GREY, MARKERS, STYLES, Drawing, legend_below, panel, plain_log, to_drawing
from msae_sweep.report.sweep_data import Curve, Group, Trial

COMPONENTS = "k principal components"
"""Name of the principal components in legends and tables."""
MOST_ROWS = 40
"""Largest number of trials in the figure of early stopping."""


class Line(NamedTuple):
    """A curve with its name in the legend and its trained levels."""

    label: str
    curve: Curve
    levels: tuple[int, ...]


def r2_by_k(
    block: int,
    lines: Sequence[Line],
    baselines: Mapping[int, float],
    stopped: Mapping[int, int] | None = None,
    components: Sequence[float] = (),
) -> Drawing:
    """Draw R² at every k of the best trials, of SAEs that were trained for one k alone, and of principal components.

    Args:
        lines: curves of the best trials. The figure's sentence describes the first one.
        baselines: R² of the SAEs for one k alone, by k.
        stopped: last epoch of the SAEs for one k alone that early stopping ended, by k.
        components: R² of k = 1, 2, … principal components; empty if it is not known.
    """
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
    for k, epoch in (stopped or {}).items():
        label = f"k = {k} alone, stopped at epoch {epoch}"
        axes.plot(k, baselines[k], "*", color="k", markerfacecolor="white", markersize=9, label=label)
    ks = sorted({k for line in lines for k in line.levels} | set(baselines))
    components = components[: ks[-1]]
    _draw_components(axes, components)
    plain_log(axes, [k for k in (1, 2, 4, 8) if k < ks[0]] + ks, base=2)
    axes.set(xlabel="k: latents in use per position", ylabel="R²: share of variance explained")
    lowest = min(*(min(line.curve.r2) for line in lines), *baselines.values(), *components, 1.0)
    axes.set_ylim(max(-0.1, lowest - 0.03), None)
    legend_below(figure, axes, 1 if max(len(line.label) for line in lines) > 18 else 2)
    _, best, levels = lines[0]
    first, last = levels[0], levels[-1]
    r2 = dict(zip(best.ks, best.r2, strict=True))
    reading = f"{first} latents explain {r2[first]:.1%} of the variance, and {last} explain {r2[last]:.1%}"
    reading += _components_reading(components, first, last)
    gaps = {k: value - r2[k] for k, value in baselines.items() if k in r2}
    if gaps:
        k = max(gaps, key=lambda k: abs(gaps[k]))
        more = "more" if gaps[k] > 0 else "less"
        reading += (
            f"; an SAE trained for k = {k} alone explains {abs(gaps[k]):.3f} {more} at that k, the largest difference"
        )
    elif len(levels) > 1:
        gain = r2[last] - r2[levels[-2]]
        reading += f"; going from {levels[-2]} to {last} {'adds' if gain > 0 else 'loses'} {abs(gain):.3f}"
    return to_drawing(figure, f"r2_by_k_block{block}", f"Block {block}: R² at every k", f"{reading}.")


def _draw_components(axes: Any, components: Sequence[float]) -> None:
    """Draw R² of k = 1, 2, … principal components, if it is known, which an SAE with k latents must beat."""
    if components:
        look = {"color": GREY, "linestyle": "--", "linewidth": 1.2, "label": COMPONENTS}
        axes.plot(range(1, len(components) + 1), components, **look)


def _components_reading(components: Sequence[float], first: int, last: int) -> str:
    """Return the part of a figure's sentence on principal components; "" if their R² is not known."""
    if first > len(components):
        return ""
    text = f"; {first} principal components explain {components[first - 1]:.1%}"
    return text + (f", and {last} explain {components[last - 1]:.1%}" if first < last <= len(components) else "")


def weightings(group: Group, curves: Mapping[str, Curve], components: Sequence[float] = ()) -> Drawing | None:
    """Draw the best uniform trial beside the best reverse trial, and as many principal components as latents.

    Return None if only one of the weightings was tried, or if the group has a single level.

    Args:
        curves: R² by k of the trials, by trial_id.
        components: R² of k = 1, 2, … principal components; empty if it is not known.
    """
    pair = {weighting: group.best_with(weighting=weighting) for weighting in ("uniform", "reverse")}
    uniform, reverse = pair["uniform"], pair["reverse"]
    if uniform is None or reverse is None or len(group.levels) == 1:
        return None
    figure, axes = panel()
    for i, (weighting, trial) in enumerate(pair.items()):
        assert trial is not None
        curve = curves[trial.trial_id]
        at = [curve.ks.index(k) for k in group.levels if k in curve.ks]
        axes.plot(
            *(curve.ks, curve.r2),
            color=COLOURS[i],
            linestyle=STYLES[i],
            marker=MARKERS[i],
            markevery=at,
            label=f"{weighting} ({trial.shown_as})",
        )
    _draw_components(axes, components[: group.levels[-1]])
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
    reading += comparison_caveat(uniform, reverse, "weighting")
    return to_drawing(figure, figure_name("weighting", group), f"Block {group.block}: weighting", f"{reading}.")


def early_stopping(group: Group) -> Drawing | None:
    """Draw the epochs of each trial and the shortfall of the stopped ones. Return None if there are no rungs."""
    stopping = group.early_stopping
    if not stopping.rungs:
        return None
    shown = group.trials[:MOST_ROWS]
    figure, axes = panel(1.5 + 0.19 * len(shown))
    stops = {stop.trial_id: stop for stop in stopping.stops}
    looks = {
        "completed": (COLOURS[2], "", "completed"),
        "stopped_early": (COLOURS[4], "///", "stopped"),
        "running": (COLOURS[5], "...", "running or pending"),
        "pending": (COLOURS[5], "...", "running or pending"),
    }
    for row, trial in enumerate(shown):
        colour, hatch, label = looks.get(trial.record.status, (COLOURS[1], "xxx", "diverged or failed"))
        axes.barh(row, trial.record.epochs, color=colour, hatch=hatch, edgecolor="white", height=0.75, label=label)
        if stop := stops.get(trial.trial_id):
            look = {"xytext": (4, 0), "textcoords": "offset points", "va": "center", "fontsize": 8}
            axes.annotate(f"{_small(stop.shortfall)} short", (stop.rung, row), **look)
    for rung in stopping.rungs:
        axes.axvline(rung, color="k", linewidth=0.8, linestyle=":")
    axes.set_yticks(range(len(shown)), [trial.trial_id for trial in shown], fontsize=8)
    axes.set_ylim(len(shown) - 0.4, -0.6)
    axes.set_xlim(0, 1.02 * max(trial.training.epochs for trial in shown))
    axes.grid(visible=False, axis="y")
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set_xlabel(f"epochs (dotted: rungs at {', '.join(map(str, stopping.rungs))})")
    legend_below(figure, axes, 2)
    if stops:
        closest = min(stopping.stops, key=lambda stop: stop.shortfall)
        total = stopping.epochs_saved + stopping.epochs_trained
        reading = (
            f"{len(stops)} of {len(group.trials)} trials {'was' if len(stops) == 1 else 'were'} stopped, which saved "
            f"{stopping.epochs_saved} of {total} "
            f"epochs ({stopping.epochs_saved / total:.0%}); the smallest shortfall is that of {closest.trial_id}, "
            f"{_small(closest.shortfall)} at epoch {closest.rung}"
        )
    else:
        reading = f"None of {len(group.trials)} trials was stopped"
    if len(group.trials) > len(shown):
        reading += f" (the best {len(shown)} are drawn)"
    return to_drawing(
        figure, figure_name("early_stopping", group), f"Block {group.block}: early stopping", f"{reading}."
    )


TRAINING = {
    "train_loss": ("Training loss", "training loss"),
    "val_loss": ("Validation loss", "validation loss"),
    "dead_ratio": ("Dead latents", "dead latents (%)"),
    "r2_mean": ("Mean R² over levels", "mean R² over levels"),
}
"""Title and axis label of the figure that `training` draws, by metric."""


def training(groups: Sequence[Group], key: str) -> Drawing:
    """Draw losses, dead latents or mean R² by epoch of each block's best trial, as in the notebook."""
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
            label=f"block {group.block}" + (f", {ended}" if (ended := _ended_early(group.best)) else ""),
        )
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set(xlabel="epoch (marker: best epoch)", ylabel=ylabel)
    if key == "dead_ratio":
        axes.axhline(100 * DEAD_RATIO_ALLOWED, color=GREY, linestyle=":")
        axes.set_ylim(-1, max(100 * DEAD_RATIO_ALLOWED + 3, axes.get_ylim()[1]))
    elif key.endswith("loss") and _spans_a_decade([p[key] for g in groups for p in g.best.record.points if key in p]):
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter(_every_other)
    legend_below(figure, axes, 1 if any(_ended_early(group.best) for group in groups) else 3)
    return to_drawing(figure, f"training_{key}", title, _training_reading(key, groups))


def _small(value: float) -> str:
    """Return a number with three decimals, or `less than 0.001` if they would show zero."""
    return f"{value:.3f}" if value >= 0.0005 else "less than 0.001"


def comparison_caveat(a: Trial, b: Trial, compared: str) -> str:
    """Return a remark on the differences of two trials besides the setting `compared`; "" if there are none."""
    early = [t for t in (a, b) if t.record.status == "stopped_early"]
    if early and a.record.epochs != b.record.epochs:
        return f" (but {early[0].trial_id} was stopped at epoch {early[0].record.epochs})"
    keys = [key for key in ("learning_rate", "expansion_factor", "weighting") if key != compared]
    differ = [key.replace("_", " ") for key in keys if getattr(a.training, key) != getattr(b.training, key)]
    return f" (they also differ in {' and '.join(differ)})" if differ else ""


def _training_reading(key: str, groups: Sequence[Group]) -> str:
    if key == "dead_ratio":
        worst = max(groups, key=lambda group: max(p["dead_ratio"] for p in group.best.record.points))
        most = max(point["dead_ratio"] for point in worst.best.record.points)
        if not most:
            return "No latent of a best trial was dead at the end of any epoch."
        return f"At most {most:.1%} of the latents of a best trial are dead at any epoch (block {worst.block})."
    if key == "r2_mean":
        return _late_gains(groups)
    best = {group.block: group.best for group in groups}
    parts = [f"{t.record.points[-1][key]:.3f} (block {b})" for b, t in best.items() if key in t.record.points[-1]]
    return f"At the last epoch: {', '.join(parts)}; losses of blocks can be compared only if the weighting is the same."


def _late_gains(groups: Sequence[Group]) -> str:
    """Return a sentence on the gain of the last epochs, without a claim about epochs that were not trained."""
    gains = {group.block: group.best.late_gain for group in groups}
    known = [f"{gain} (block {block})" for block, gain in gains.items() if gain is not None]
    short = [f"block {group.block} has {_epochs(group.best)}" for group in groups if gains[group.block] is None]
    parts = [f"Mean R² changed by {', '.join(known)}"] if known else []
    parts += [f"too few epochs to show a trend: {', '.join(short)}"] if short else []
    text = "; ".join(parts)
    return f"{text[0].upper()}{text[1:]}. What more epochs would add is not known: small gains per epoch can add up."


def _epochs(trial: Trial) -> str:
    n = trial.record.epochs
    return f"{n} epoch{'' if n == 1 else 's'}"


def _ended_early(trial: Trial) -> str:
    """Return e.g. `stopped after 1 epoch`, or "" for a trial that early stopping did not stop."""
    return f"stopped after {_epochs(trial)}" if trial.record.status == "stopped_early" else ""


def _spans_a_decade(losses: Sequence[float]) -> bool:
    """Return whether losses span a decade. Only then does a logarithmic axis have enough labels at 1, 2 and 5."""
    return bool(losses) and min(losses) > 0 and max(losses) >= 10 * min(losses)


def _every_other(value: float, position: int | None = None) -> str:
    """Return the label of a minor tick of a logarithmic axis. Only 2 and 5 of every decade have a label."""
    digit = round(value / 10 ** np.floor(np.log10(value) + 1e-9)) if value > 0 else 0
    return f"{value:g}" if digit in (2, 5) else ""


def figure_name(kind: str, group: Group) -> str:
    """Return the stem of a figure's file names, e.g. `size_block5`."""
    return f"{kind}_block{group.block}" + (f"_k{group.levels[0]}" if len(group.levels) == 1 else "")
