"""Least-squares fit of a score to the settings of trials: the design matrix, and the fit with its uncertainty."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from msae_sweep.report.sweep_data import Trial

SPARE_TRIALS = 3
"""Number of trials that a fit needs in addition to one per coefficient."""

REFITS = 1000
"""Number of refits with random residual signs, and number of fits to shuffled scores."""


class Design:
    """Design matrix of the regression: its columns, and the settings that each column belongs to."""

    def __init__(self, trials: Sequence[Trial], keys: Sequence[str]) -> None:
        self._scales = {key: Scale([getattr(t.training, key) for t in trials]) for key in keys}
        self.owners: list[set[str]] = []
        self._columns: list[Any] = []
        self._add(set(), lambda values: 1.0)
        room = len(trials) - SPARE_TRIALS
        self.has_curvature = False
        for key in keys:
            scale = self._scales[key]
            if scale.options:
                for option in scale.options[1:]:
                    self._add({key}, lambda v, key=key, option=option: float(repr(v[key]) == option), room)
            elif scale.spread:
                self._add({key}, lambda values, key=key: values[key], room)
            # Two learning rates do not determine a curvature: measured from their middle, both have the same square.
            if key == "learning_rate" and len({trial.training.learning_rate for trial in trials}) > 2:
                self.has_curvature = self._add({key}, lambda values: values["learning_rate"] ** 2, room)
        self.has_interaction = "expansion_factor" in self._owned() and self._add(
            {"learning_rate", "expansion_factor"},
            lambda values: values["learning_rate"] * values["expansion_factor"],
            room,
        )

    def _owned(self) -> set[str]:
        return set().union(*self.owners)

    def _add(self, owners: set[str], column: Any, room: float = float("inf")) -> bool:
        """Add a column if there are fewer than `room` columns, and return whether it was added."""
        if len(self._columns) >= room:
            return False
        self.owners.append(owners)
        self._columns.append(column)
        return True

    def rows(self, trials: Sequence[Trial]) -> np.ndarray:
        """Return the design matrix [trials, columns]."""
        return np.array([self._row({key: getattr(t.training, key) for key in self._scales}) for t in trials])

    def _row(self, settings: dict[str, Any]) -> list[float]:
        values = {key: self._scales[key].place(value) for key, value in settings.items()}
        return [column(values) for column in self._columns]

    def row_at(self, trial: Trial, **changed: Any) -> np.ndarray:
        """Return the row of the design matrix of a trial with some of its settings changed."""
        return np.array(self._row({key: getattr(trial.training, key) for key in self._scales} | changed))

    def settings(self) -> list[str]:
        """Return the settings that have a column."""
        return [key for key in self._scales if key in self._owned()]

    def ends(self, key: str) -> tuple[Any, Any] | None:
        """Return the lowest and highest value of a setting, or (uniform, reverse) for the weighting.

        Return None for a setting whose options have no order.
        """
        scale = self._scales[key]
        if not scale.options:
            return scale.low, scale.high
        return ("uniform", "reverse") if key == "weighting" else None


class Scale:
    """Scale of a setting: numbers are measured from their middle, logarithmically if they span a factor of 2 or more.

    Values that are not numbers are options without a position.
    """

    def __init__(self, values: Sequence[Any]) -> None:
        self.options: list[str] = []
        if all(isinstance(value, int | float) and not isinstance(value, bool) for value in values):
            self.low, self.high = min(values), max(values)
            self._log = self.low > 0 and self.high / self.low >= 2
            placed = [self._raw(value) for value in values]
            self._middle, self.spread = (min(placed) + max(placed)) / 2, max(placed) - min(placed)
        else:
            self.options = sorted({repr(value) for value in values})

    def _raw(self, value: float) -> float:
        return float(np.log(value)) if self._log else float(value)

    def place(self, value: Any) -> Any:
        """Return the position of a number on the scale; return an option unchanged."""
        return value if self.options else self._raw(value) - self._middle


class LeastSquaresFit:
    """Least-squares fit with leave-one-out errors, refits and a permutation test."""

    def __init__(self, rows: np.ndarray, scores: np.ndarray) -> None:
        self.rows, self.values = rows, scores
        inverse = np.linalg.pinv(rows)
        self.coefficients = inverse @ scores
        self.residuals = scores - rows @ self.coefficients
        leave_one_out = 1 / (1 - np.clip(np.einsum("ij,ji->i", rows, inverse), 0, 0.999))
        self.left_out = self.residuals * leave_one_out
        rng = np.random.default_rng(0)
        signs = rng.choice((-1.0, 1.0), size=(REFITS, len(scores)))
        self.refits = (rows @ self.coefficients + signs * self.left_out) @ inverse.T  # [refits, columns]
        self.total = float(((scores - scores.mean()) ** 2).sum())
        shuffled = rng.permuted(np.tile(scores, (REFITS, 1)), axis=1)  # [refits, trials]
        by_chance = (((shuffled - shuffled @ inverse.T @ rows.T) * leave_one_out) ** 2).sum(axis=1)
        self.chance = float((by_chance <= (self.left_out**2).sum()).mean())

    @property
    def explained(self) -> float:
        """Leave-one-out R²; 0 if all scores are equal."""
        return 1 - float((self.left_out**2).sum()) / self.total if self.total else 0.0

    def share_of(self, mine: np.ndarray) -> float:
        """Return the share of the variance that is no longer explained without the columns `mine`."""
        rest = self.rows[:, ~mine]
        without = self.values - rest @ np.linalg.pinv(rest) @ self.values
        lost = float((without**2).sum() - (self.residuals**2).sum())
        return max(0.0, lost) / self.total if self.total else 0.0
