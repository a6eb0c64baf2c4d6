"""Distribution over one training key, with the values that it can propose."""

import math
from collections.abc import Mapping
from typing import Any, Literal, Self, get_args

from pydantic import model_validator

from msae_sweep.config.frozen_model import FrozenModel, plain_types, short_repr

DistributionKind = Literal["loguniform", "uniform", "quniform", "randint", "choice", "grid"]
DECIMALS = 12
"""Number of decimals to which values of a `quniform` are rounded, so that 0.1 × 3 gives 0.3."""
ROUNDING = 1e-9
"""Fraction of a step by which floating-point numbers may miss a whole number of steps."""
LARGEST_WHOLE, LARGEST_EXACT = 2**63, 2**53
"""Bound of 64-bit integers, and bound of the whole numbers that a float represents exactly."""


class Distribution(FrozenModel):
    """Distribution over one training key: exactly one of the six kinds, e.g. `{loguniform: [1.0e-4, 4.0e-3]}`."""

    kind: DistributionKind
    """Kind of the distribution: `loguniform`, `uniform`, `quniform` (low, low + step, low + 2 step … up to high),
    `randint` (high excluded), `choice` or `grid`."""
    values: tuple[Any, ...]
    """Bounds low and high (then the step, for `quniform`), or the options of `choice` and `grid`."""

    @model_validator(mode="before")
    @classmethod
    def _from_yaml(cls, raw: object) -> object:
        if isinstance(raw, Mapping) and set(raw) == {"kind", "values"}:
            return raw
        kinds = get_args(DistributionKind)
        if not isinstance(raw, Mapping) or len(raw) != 1 or next(iter(raw)) not in kinds:
            raise ValueError(
                f"{short_repr(raw)} must be one of {', '.join(kinds)} with a list, e.g. {{choice: [8, 16, 32]}}"
            )
        ((kind, values),) = raw.items()
        if not isinstance(values, list | tuple):
            raise ValueError(f"{kind}: {short_repr(values)} must be a list")
        frozen = tuple(tuple(v) if isinstance(v, list) else v for v in values)
        return {"kind": kind, "values": frozen}

    @model_validator(mode="after")
    def _check(self) -> Self:
        kind, values = self.kind, self.values
        if kind in ("choice", "grid"):
            if not values:
                raise ValueError(f"{kind}: needs at least one option")
            if len({repr(v) for v in values}) != len(values):
                raise ValueError(f"{kind}: {short_repr(list(values))} repeats an option")
            return self
        n_bounds = 3 if kind == "quniform" else 2
        form = "[low, high, step]" if kind == "quniform" else "[low, high]"
        numbers = all(isinstance(v, int | float) and not isinstance(v, bool) and math.isfinite(v) for v in values)
        if len(values) != n_bounds or not numbers:
            hint = " (a number in quotes is text)" if any(isinstance(v, str) for v in values) else ""
            raise ValueError(f"{kind}: {short_repr(list(values))} must be numbers {form}{hint}")
        low, high = values[:2]
        if low >= high:
            raise ValueError(f"{kind}: low {low} must be below high {high}")
        if kind == "loguniform" and low <= 0:
            raise ValueError(f"loguniform: low {low} must be above 0")
        if kind == "randint":
            if not all(isinstance(v, int) for v in values):
                raise ValueError(f"randint: {short_repr(list(values))} must be whole numbers")
            if low < -LARGEST_WHOLE or high > LARGEST_WHOLE:
                raise ValueError(f"randint: {short_repr(list(values))} must lie between -2^63 and 2^63")
        elif not math.isfinite(float(high) - float(low)):
            raise ValueError(
                f"{kind}: [{low}, {high}] is wider than the range of a float; bring low and high closer together"
            )
        if kind == "quniform":
            if values[2] <= 0 or (high - low) / values[2] < 1 - ROUNDING:
                raise ValueError(f"quniform: step {values[2]} must be above 0 and at most high - low")
            if (high - low) / values[2] > LARGEST_EXACT:
                raise ValueError(f"quniform: step {values[2]} is too small for [{low}, {high}]; use uniform")
        return self

    def corners(self) -> tuple[Any, ...]:
        """Return values whose check covers the whole distribution: every option, or the smallest and the largest."""
        if self.kind in ("choice", "grid"):
            return self.values
        low, high = self.values[:2]
        if self.kind == "randint":
            return low, high - 1
        return float(low), self.largest if self.kind == "quniform" else float(high)

    def check_fits(self, annotation: Any) -> None:
        """Check that a key with this type annotation also accepts the values between the corners.

        Raises:
            ValueError: the distribution proposes numbers and the key takes none, or it proposes fractions and the key
                takes whole numbers.
        """
        if self.kind in ("choice", "grid"):
            return
        kinds = plain_types(annotation)
        if not kinds & {int, float}:
            raise ValueError(
                f"{self.kind} proposes numbers, which this key does not take; use choice: […] or grid: […]"
            )
        whole = self.kind == "randint" or (self.kind == "quniform" and not any(v % 1 for v in self.values[::2]))
        if float not in kinds and not whole:
            low, high = math.ceil(self.values[0]), math.floor(self.values[1])
            raise ValueError(
                f"{self.kind} proposes fractions, and this key takes whole numbers; write randint: [{low}, {high + 1}] "
                f"(high excluded), quniform: [{low}, {high}, 1] or choice: […]"
            )

    @property
    def largest(self) -> float:
        """Largest value of a `quniform`: high if it is a whole number of steps above low, else the next step below."""
        low, high, step = self.values
        n_steps = (high - low) / step
        if abs(n_steps - round(n_steps)) < ROUNDING:
            return float(high)
        return float(round(low + math.floor(n_steps) * step, DECIMALS))

    def nearest(self, value: float) -> float:
        """Return the value of a `quniform` that is nearest to `value`, a number between low and high."""
        low, _, step = self.values
        # If low is a multiple of the step, as it usually is, all values are multiples, and steps are counted from 0.
        origin = 0.0 if abs(low / step - round(low / step)) < ROUNDING else float(low)
        point = round(origin + round((value - origin) / step) * step, DECIMALS)
        return float(min(max(point, low), self.largest))
