"""Figures of every trial's score against one setting, drawn as 1 − score on a logarithmic axis.

The scores of good trials lie just below 1, and on a linear axis they could not be told apart.
"""

import itertools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

from msae_sweep.config import DEAD_RATIO_ALLOWED
from msae_sweep.report.figures import comparison_caveat, figure_name
from msae_sweep.report.response_surface import Response
from msae_sweep.report.style import COLOURS, GREY, MARKERS, Drawing, legend_below, log_y, panel, plain_log, to_drawing
from msae_sweep.report.sweep_data import Group, Trial

LOWER = "(lower is better)"
"""End of the label of a y axis."""


def learning_rate(group: Group) -> Drawing:
    """Draw score against learning rate, by expansion factor and weighting."""
    figure, axes = panel(3.7)
    _scatter(axes, group, lambda trial: trial.training.learning_rate)
    rates = [trial.training.learning_rate for trial in group.ended]
    plain_log(axes, rates)
    axes.set(xlabel="learning rate", ylabel=f"1 − score {LOWER}")
    legend_below(figure, axes, 3)
    top = sorted(trial.training.learning_rate for trial in group.ended[:3])
    reading = f"The best trial has learning rate {group.best.training.learning_rate:.2e}"
    if len(group.ended) > 3 and top[0] < top[-1]:
        reading += f"; the best three lie between {top[0]:.2e} and {top[-1]:.2e}"
    elif max(rates) / min(rates) < 1.001:
        reading += ", like all other trials"
    return to_drawing(figure, figure_name("learning_rate", group), f"Block {group.block}: learning rate", f"{reading}.")


def pareto_front(trials: Iterable[Trial], cost: Callable[[Trial], float]) -> list[Trial]:
    """Return the Pareto front: trials that no other beats in mean R² at the same or lower cost, cheapest first."""
    order = sorted(trials, key=lambda trial: (cost(trial), -trial.best["r2_mean"]))
    kept: list[Trial] = []
    for trial in order:
        if not kept or trial.best["r2_mean"] > kept[-1].best["r2_mean"]:
            kept.append(trial)
    return kept


def against_size(group: Group) -> Drawing:
    """Draw mean R² against the number of latents, with the Pareto front of trials that no smaller one beats."""
    figure, axes = panel()
    _scatter(axes, group, size, "r2_mean")
    best = pareto_front(group.ended, size)
    axes.plot([size(t) for t in best], _left(best, "r2_mean"), color="k", linewidth=1, label="best for its size")
    known = group.best.hidden_dim is not None
    plain_log(axes, [size(trial) for trial in group.ended], base=2)
    axes.set(xlabel="latents" if known else "expansion factor", ylabel=f"1 − mean R² {LOWER}")
    legend_below(figure, axes, 3)
    sizes = {size(trial) for trial in group.ended}
    if len(best) > 1:
        a, b = best[-2:]
        gain = b.best["r2_mean"] - a.best["r2_mean"]
        reading = f"The best trial of size {size(b):g} is {gain:.3f} ahead of the best of size {size(a):g}"
        reading += comparison_caveat(a, b, "expansion_factor")
        if size(b) < max(sizes):
            reading += f"; no trial of size {max(sizes):g} beats it"
    elif len(sizes) > 1:
        reading = f"No larger trial beats the best of size {size(best[0]):g}"
    else:
        reading = f"Every trial has size {size(best[0]):g}; other sizes were not tried"
    return to_drawing(figure, figure_name("size", group), f"Block {group.block}: size", f"{reading}.")


def against_dead(group: Group) -> Drawing:
    """Draw mean R² against the share of dead latents, with the Pareto front."""
    figure, axes = panel()
    _scatter(axes, group, lambda trial: 100 * trial.best["dead_ratio"], "r2_mean")
    best = pareto_front(group.ended, lambda trial: trial.best["dead_ratio"])
    axes.plot(
        [100 * t.best["dead_ratio"] for t in best],
        _left(best, "r2_mean"),
        color="k",
        linewidth=1,
        label="best for its dead share",
    )
    axes.axvline(
        100 * DEAD_RATIO_ALLOWED, color=GREY, linestyle=":", label=f"{DEAD_RATIO_ALLOWED:.0%}: largest share allowed"
    )
    axes.set(xlabel="dead latents: fired for no row of the best epoch (%)", ylabel=f"1 − mean R² {LOWER}")
    axes.set_xlim(-1, max(100 * DEAD_RATIO_ALLOWED + 3, axes.get_xlim()[1]))
    legend_below(figure, axes, 2)
    over = sum(trial.best["dead_ratio"] >= DEAD_RATIO_ALLOWED for trial in group.ended)
    reading = (
        f"The best trial has {group.best.best['dead_ratio']:.1%} dead latents; "
        f"{over or 'none'} of {len(group.ended)} trials {'has' if over == 1 else 'have'} "
        f"{DEAD_RATIO_ALLOWED:.0%} or more"
    )
    return to_drawing(figure, figure_name("dead", group), f"Block {group.block}: dead latents", f"{reading}.")


def fitted_learning_rate(response: Response) -> Drawing:
    """Draw the fitted response to the learning rate, and the trials that it was fitted to."""
    rates, scores = response.points
    block = response.block
    figure, axes = panel()
    left = _positive(1 - np.array(scores))
    axes.plot(rates, left, "o", color=COLOURS[0], label="trials")
    grid = np.geomspace(min(rates), max(rates), 100)
    fit = 1 - response.scores(grid)
    drawn = fit > 0  # a fit has no upper bound; where it predicts a score above 1, nothing can be drawn
    axes.plot(
        grid[drawn], fit[drawn], color=COLOURS[1], linestyle="--", label="fit, other settings as in the best trial"
    )
    log_y(axes, [*left, *fit[drawn]])
    low, high = max(response.interval[0], min(rates)), min(response.interval[1], max(rates))
    if response.optimum is not None and low < high:
        axes.axvspan(low, high, color=COLOURS[4], alpha=0.25, label="80% of refits have their optimum here")
    plain_log(axes, list(rates))
    ylabel = f"1 − score at epoch {response.epoch}" if response.epoch else f"1 − score {LOWER}"
    axes.set(xlabel="learning rate", ylabel=ylabel)
    legend_below(figure, axes, 1)
    return to_drawing(figure, f"fit_block{block}", f"Block {block}: fitted learning rate", response.sentence)


def size(trial: Trial) -> float:
    """Return a trial's number of latents, or its expansion factor if the width of the data is not known."""
    return trial.hidden_dim or trial.training.expansion_factor


def _left(trials: Sequence[Trial], key: str) -> np.ndarray:
    """Return 1 − metric `key` of each trial, for a logarithmic axis."""
    return _positive(1 - np.array([trial.best[key] for trial in trials]))


def _positive(values: np.ndarray) -> np.ndarray:
    """Return values of at least 1e-6, for a logarithmic axis. A perfect score lies at the axis' lower end."""
    return np.maximum(values, 1e-6)


def _scatter(axes: Any, group: Group, x: Callable[[Trial], float], y: str = "objective") -> None:
    """Draw a marker for each trial, with 1 − metric `y` on the vertical axis.

    Colour and shape show the expansion factor, filled or hollow shows the weighting, and small markers are trials that
    did not complete.
    """
    for i, (label, trials) in enumerate(_by_expansion(group.ended)):
        for trial in reversed(trials):
            colour, whole = COLOURS[i % 7], trial.record.status == "completed"
            filled = trial.training.weighting == "reverse"
            axes.plot(
                x(trial),
                _left([trial], y),
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
    if stopped := sorted({t.record.epochs for t in group.ended if t.record.status == "stopped_early"}):
        after = ", ".join(map(str, stopped)) if len(stopped) <= 3 else f"{stopped[0]} to {stopped[-1]}"
        label = f"small: stopped at epoch {after}"
        axes.plot([], [], "o", color=GREY, markersize=4.5, alpha=0.65, label=label)
    _limits(axes, _left(group.ended, y))


def _by_expansion(trials: Sequence[Trial]) -> list[tuple[str, list[Trial]]]:
    """Return labels and trials by expansion factor, or by thirds of its values if there are more than six values."""
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


def _limits(axes: Any, left: np.ndarray) -> None:
    """Set the y axis' limits without the values far above the rest, because one bad trial would flatten all others."""
    logs = np.log(left)
    middle = np.median(logs)
    far = min(middle + 4 * max(middle - logs.min(), 0.05), max(middle, 0.0) + np.log(2))
    shown = left[logs <= far]
    log_y(axes, list(shown))
    if hidden := len(left) - len(shown):
        axes.annotate(
            f"{hidden} more above", (0.02, 0.98), xycoords="axes fraction", fontsize=8, color="#555555", va="top"
        )
