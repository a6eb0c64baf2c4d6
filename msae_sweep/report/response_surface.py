"""Response surface: a small model of how the score depends on the settings, fitted to a block's trials.

The score is modelled as quadratic in the logarithm of the learning rate, whose best value may depend on the number of
latents, and as linear in every other setting that varied:

    score = a + b·x + c·x² + e·x·h + d·h + Σ f·other,    x = ln(learning rate), h = ln(expansion factor)

The fit is by least squares. The best learning rate is x* = −(b + e·h) / 2c, if c < 0. The quality of a fit is measured
in two ways: by predicting each trial from all others (leave-one-out), and by a permutation test, which counts how often
a fit to shuffled scores does as well. The uncertainty of x* is measured by refits to scores whose residuals have random
signs (the wild bootstrap of Wu 1986, which works with few trials).

Trials that early stopping ended are not a sample of bad settings, because their best score is that of fewer epochs.
Scores are therefore compared at one epoch: at the end of training if enough trials completed, else at the latest rung
that enough trials reached.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from msae_sweep.report.least_squares import REFITS, SPARE_TRIALS, Design, LeastSquaresFit
from msae_sweep.report.sweep_data import Group, Trial

TRUSTED = 0.3
"""Smallest leave-one-out R² (share of the variance between trials) of a trusted fit."""
MAX_P_VALUE = 0.02
"""Largest p-value of a trusted fit: the share of shuffled scores of which a fit explains as much."""


class Effect(NamedTuple):
    """Effect of one setting on the score, with all other settings held constant."""

    key: str
    share: float
    """Share of the variance between trials that the fit no longer explains without this setting."""
    change: float | None
    """Change in score from the setting's lowest value to its highest (for weighting: from uniform to reverse).

    None for a setting whose values have no order, and for the learning rate, whose best value lies in between."""
    interval: tuple[float, float]
    """Interval that contains `change` in 80% of refits; (0, 0) if `change` is None."""


class Response(NamedTuple):
    """Fit of one block."""

    block: int
    n_trials: int
    epoch: int | None
    """Epoch at which scores were compared; None if each trial's best score was used, and all trials completed."""
    error: float
    """Root mean square error in predicting a trial from all others."""
    explained: float
    """Leave-one-out R²: 1 is perfect, 0 is no better than the mean."""
    chance: float
    """p-value of the fit: share of shuffled scores of which a fit explains as much."""
    tried: tuple[float, float]
    """Lowest and highest learning rate of the trials."""
    optimum: float | None
    """Best learning rate at the best trial's size; None if the fit has no optimum or is not trusted."""
    interval: tuple[float, float]
    """Interval that contains the optimum of 80% of refits. An end is 0 or infinity if no optimum is in reach there."""
    size_exponent: tuple[float, float, float] | None
    """Power of the number of latents to which the best learning rate is proportional.

    The values are the 10%, 50% and 90% quantiles of refits. None if the best learning rate lies outside those tried, or
    if the fit is not trusted or cannot determine the exponent."""
    effects: list[Effect]
    """Effects of the settings, largest share first."""
    unexplained: float
    """Share of the variance between trials that the whole fit does not explain: noise, and interactions that the model
    does not have."""
    points: tuple[list[float], list[float]]
    """Learning rates and scores of the trials that the model is fitted to."""
    coefficients: tuple[float, float, float]
    """Coefficients a, b, c of the score over ln(learning rate), with all other settings as in the best trial."""
    sentence: str
    """Conclusion from the fit in plain words."""

    @property
    def is_trusted(self) -> bool:
        """True if the fit predicts unseen trials: `explained` and `chance` are within TRUSTED and MAX_P_VALUE."""
        return self.explained >= TRUSTED and self.chance <= MAX_P_VALUE

    @property
    def joint_share(self) -> float:
        """Share of the variance that is neither one setting's own nor unexplained. With these, the shares sum to 1.

        A positive value is variance that settings which went together in these trials explain, either one as well. A
        negative value corrects for the interaction of learning rate and expansion factor, which is counted for both.
        """
        return 1 - self.unexplained - sum(effect.share for effect in self.effects)

    def scores(self, learning_rates: Sequence[float] | np.ndarray) -> np.ndarray:
        """Return the predicted scores at these learning rates, with all other settings as in the best trial."""
        a, b, c = self.coefficients
        x = np.log(np.asarray(learning_rates, dtype=float))
        return np.asarray(a + b * x + c * x**2)


class NoFit(NamedTuple):
    """Block for which no fit is possible, with the reason."""

    block: int
    why: str
    """Reason in a few words, e.g. `too few trials to fit`."""
    sentence: str
    """Reason in a whole sentence, for the page."""


class Sample(NamedTuple):
    """Trials of a fit and their scores at one epoch."""

    trials: list[Trial]
    scores: np.ndarray
    epoch: int | None
    n_left_out: int
    """Number of trials that are left out because they lie so far below the rest that they would distort a quadratic."""


def fit_response(group: Group) -> Response | NoFit:
    """Fit the response to a group's trials; return a `NoFit` with the reason if no fit is possible."""
    block, keys = group.block, varied(group)
    if "learning_rate" not in keys and len(group.ended) > 1:
        rate = f"{group.best.training.learning_rate:.2g}"
        why = f"every trial has learning rate {rate}"
        return NoFit(block, why, f"Block {block}: {why}, so nothing is fitted.")
    sample = choose_sample(group, needed=2 + len(keys) + SPARE_TRIALS)
    n = len(sample.trials)
    if n < 3 + SPARE_TRIALS:
        sentence = (
            f"Block {block}: only {n} trial{'' if n == 1 else 's'} can be compared at one epoch; "
            f"a fit of the learning rate needs {3 + SPARE_TRIALS}."
        )
        return NoFit(block, "too few trials to fit", sentence)
    if not _varies(sample):
        rate = f"{sample.trials[0].training.learning_rate:.2g}"
        why = f"the {n} trials that can be compared share one learning rate, {rate}"
        return NoFit(block, why, f"Block {block}: {why}, so nothing is fitted.")
    design = Design(sample.trials, keys)
    fit = LeastSquaresFit(design.rows(sample.trials), sample.scores)
    return _response(group, sample, design, fit)


def varied(group: Group) -> list[str]:
    """Return the training settings in which the group's trials differ, the learning rate first."""
    keys = {key for trial in group.ended for key in trial.record.params} - {"k_levels", "seed"}
    differ = [key for key in keys if len({repr(getattr(t.training, key)) for t in group.ended}) > 1]
    return sorted(differ, key=lambda key: (key != "learning_rate", key))


def choose_sample(group: Group, needed: int) -> Sample:
    """Return the trials and scores at the latest epoch that `needed` trials reached, else at the one that most reached.

    An epoch that only trials of one learning rate reached is used only if there is no other, because such trials
    contain no information on the learning rate.
    """
    completed = [trial for trial in group.ended if trial.record.status == "completed"]
    samples = [_sample(completed, [trial.best["objective"] for trial in completed], None)]
    for rung in reversed(group.early_stopping.rungs):
        there = [trial for trial in group.ended if trial.record.epochs >= rung]
        samples.append(_sample(there, [t.record.points[rung - 1]["objective"] for t in there], rung))
    useful = [sample for sample in samples if _varies(sample)] or samples
    enough = (sample for sample in useful if len(sample.trials) >= needed)
    return next(enough, max(useful, key=lambda sample: len(sample.trials)))


def _varies(sample: Sample) -> bool:
    """Return whether the learning rates differ by more than a relative 1e-6, which is rounding."""
    rates = [trial.training.learning_rate for trial in sample.trials]
    return bool(rates) and max(rates) > min(rates) * (1 + 1e-6)


def _sample(trials: Sequence[Trial], scores: Sequence[float], epoch: int | None) -> Sample:
    values = np.array(scores, dtype=float)
    if not len(values):
        return Sample([], values, epoch, 0)
    middle = np.median(values)
    keep = values >= middle - 4 * max(values.max() - middle, 1e-6)
    return Sample([t for t, kept in zip(trials, keep, strict=True) if kept], values[keep], epoch, int((~keep).sum()))


def _response(group: Group, sample: Sample, design: Design, fit: LeastSquaresFit) -> Response:
    best = group.best
    rates = [trial.training.learning_rate for trial in sample.trials]
    tried = min(rates), max(rates)
    # With all other settings as in the best trial, the fit is a parabola in ln(learning rate). Three predictions
    # determine it.
    x = np.log(np.array([tried[0], np.sqrt(tried[0] * tried[1]), tried[1]]))
    rows = np.array([design.row_at(best, learning_rate=float(rate)) for rate in np.exp(x)])
    solve = np.linalg.inv(np.vander(x, 3, increasing=True)) @ rows
    a, b, c = solve @ fit.coefficients
    drawn = fit.refits @ solve.T
    optima = _optima(drawn[:, 1], drawn[:, 2], x)
    low, high = np.exp(np.quantile(optima, (0.1, 0.9), method="nearest"))
    optimum = float(np.exp(_optima(b[None], c[None], x)[0]))
    n = len(sample.trials)
    trusted = fit.explained >= TRUSTED and fit.chance <= MAX_P_VALUE
    is_inside = tried[0] <= optimum <= tried[1]
    effects = []
    for key in design.settings():
        share = fit.share_of(np.array([key in owners for owners in design.owners]))
        ends = None if key == "learning_rate" else design.ends(key)
        if ends:
            step = design.row_at(best, **{key: ends[1]}) - design.row_at(best, **{key: ends[0]})
            change, spread = float(step @ fit.coefficients), np.quantile(fit.refits @ step, (0.1, 0.9))
            effects.append(Effect(key, share, change, (float(spread[0]), float(spread[1]))))
        else:
            effects.append(Effect(key, share, None, (0.0, 0.0)))
    response = Response(
        block=group.block,
        n_trials=n,
        epoch=sample.epoch,
        error=float(np.sqrt((fit.left_out**2).mean())),
        explained=fit.explained,
        chance=fit.chance,
        tried=tried,
        optimum=optimum if 0 < optimum < np.inf and trusted else None,
        interval=(float(low), float(high)),
        size_exponent=_size_exponent(design, fit) if trusted and is_inside else None,
        effects=sorted(effects, key=lambda effect: -effect.share),
        unexplained=float((fit.residuals**2).sum()) / fit.total if fit.total else 1.0,
        points=(rates, sample.scores.tolist()),
        coefficients=(float(a), float(b), float(c)),
        sentence="",
    )
    return response._replace(sentence=_sentence(response, sample) + _scaling(response))


def _optima(b: np.ndarray, c: np.ndarray, x: np.ndarray) -> np.ndarray:
    """Return ln(learning rate) at the maximum of each parabola; ± infinity, to the better side, if none is in reach.

    A maximum is in reach if it lies inside the tried range, or beyond its ends by at most twice the range's width (at
    least a factor of 10).
    """
    low, _, high = x
    better = np.where(b * (high - low) + c * (high**2 - low**2) > 0, np.inf, -np.inf)
    with np.errstate(divide="ignore", invalid="ignore"):
        top = -b / (2 * c)
    reach = max(2 * (high - low), np.log(10))
    return np.where((c < 0) & (top > low - reach) & (top < high + reach), top, better)


def _size_exponent(design: Design, fit: LeastSquaresFit) -> tuple[float, float, float] | None:
    """Return −e / 2c, the power of the number of latents to which the best learning rate is proportional.

    The values are the 10%, 50% and 90% quantiles of the refits with c < 0. Return None if the design has no interaction
    or no curvature, or if fewer than 80% of refits have c < 0.
    """
    if not (design.has_interaction and design.has_curvature):
        return None
    is_pure = [owners == {"learning_rate"} for owners in design.owners]
    square = [i for i, pure in enumerate(is_pure) if pure][1]
    c, e = fit.refits[:, square], fit.refits[:, -1]
    exponents = np.sort((-e / (2 * c))[c < 0])
    if len(exponents) < 0.8 * REFITS:
        return None
    low, middle, high = np.quantile(exponents, (0.1, 0.5, 0.9))
    return float(low), float(middle), float(high)


def _sentence(response: Response, sample: Sample) -> str:
    at = f"their scores at epoch {response.epoch}" if response.epoch else "their best scores"
    start = f"Block {response.block}: fitted to {response.n_trials} trials ({at})"
    if sample.n_left_out:
        start += f", without {sample.n_left_out} far below the rest"
    if not response.is_trusted:
        return (
            f"{start}; its predictions for unseen trials (off by {response.error:.3f}) may be no better than chance, "
            "so nothing is concluded from the fit."
        )
    early = "; scores so early favour high learning rates" if response.epoch else ""
    known = f"{start}; it predicts an unseen trial to within {response.error:.3f}"
    low, high = response.interval
    if response.optimum is None or not response.tried[0] <= response.optimum <= response.tried[1]:
        side = "highest" if low > np.sqrt(response.tried[0] * response.tried[1]) else "lowest"
        edge = response.tried[1] if side == "highest" else response.tried[0]
        return f"{known}; the best learning rate lies at or beyond the {side} one tried, {edge:.2g}{early}."
    text = f"{known}; the best learning rate is {response.optimum:.2g}"
    if low < response.tried[0] or high > response.tried[1]:
        return f"{text}, but it could lie beyond the range that was tried{early}."
    text += f" (80% of refits: {low:.2g} to {high:.2g})"
    return f"{text}{early}."


def _scaling(response: Response) -> str:
    if response.size_exponent is None:
        return ""
    low, middle, high = response.size_exponent
    return (
        f" The best learning rate is proportional to the number of latents to the power {middle:.2f} "
        f"(80% of refits: {low:.2f} to {high:.2f})."
    )
