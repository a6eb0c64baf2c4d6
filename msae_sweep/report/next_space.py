"""Proposal of the next search space, as a file for `msae-sweep run`, with the reason for every change."""

import math
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

from msae_sweep.config import SweepConfig
from msae_sweep.report.response_surface import NoFit, Response, fit_response
from msae_sweep.report.sweep_data import Group, Sweep

BEYOND = 3.0
"""Factor by which a range is extended past an edge at which the best value lies."""
WIDEN = 2.0
"""Factor by which both ends of a range are moved outwards if the fit allows no conclusion."""
MARGIN = 1.3
"""Factor of margin on both sides of the range in which the best learning rate is expected."""


class Advice(NamedTuple):
    """Conclusions from a sweep, and a proposal of the next one."""

    responses: list[Response | NoFit]
    """Fit of every block, or the reason why there is none."""
    groups: list[Group]
    """Groups of trials that the responses are fitted to, in the same order."""
    reasons: list[str]
    """Sentences with the reason why each setting changes or stays."""
    yaml: str
    """Content of the next search-space file."""
    name: str
    """Name of the next sweep."""


def advise(sweep: Sweep) -> Advice:
    """Fit every block's largest group of trials with the same levels, and return advice on what to run next."""
    groups = [max(sweep.groups_of(block), key=lambda group: len(group.trials)) for block in sweep.blocks]
    responses = [fit_response(group) for group in groups]
    raw = sweep.config.model_dump(mode="json")
    # `model_dump` returns the fields of a distribution, but the file needs {kind: values}.
    raw["space"] = {key: {d.kind: _plain(d.values)} for key, d in sweep.config.space.items()}
    reasons: list[str] = []
    _learning_rate(raw, sweep, groups, responses, reasons)
    _expansion_factor(raw, sweep, groups, responses, reasons)
    _weighting(raw, responses, reasons)
    _epochs(raw, groups, reasons)
    raw["name"] = _next_name(sweep.name)
    raw["search"]["seed"] += 1  # a new seed gives new proposals
    if raw["search"]["algorithm"] == "grid" and any(
        k not in ("grid", "choice") for d in raw["space"].values() for k in d
    ):
        raw["search"] |= {"algorithm": "random", "trials_per_block": max(8, sweep.config.n_trials_per_block())}
    if "***" in (raw["tracking"]["uri"] or ""):
        raw["tracking"]["uri"] = None  # the sweep did not store the URI's password
    config = SweepConfig.model_validate(raw)
    head = [f"Proposed after sweep {sweep.name}; what changed, and why:", *reasons]
    comments = "".join(f"# {line}\n" for line in head)
    return Advice(responses, groups, reasons, f"{comments}{config.to_yaml()}", config.name)


def _learning_rate(
    raw: dict[str, Any],
    sweep: Sweep,
    groups: Sequence[Group],
    responses: Sequence[Response | NoFit],
    reasons: list[str],
) -> None:
    """Set one range of learning rates for all blocks, which spans the ranges of all blocks.

    If the search space has a fixed learning rate, keep it.
    """
    values = sweep.config.corners("learning_rate")
    if min(values) == max(values):
        reasons.append(
            f"Learning rate: it stays fixed at {values[0]:.2g}, as in the search space; only a sweep that varies it "
            "can show whether another one is better."
        )
        return
    ranges = [_range(group, response) for group, response in zip(groups, responses, strict=True)]
    low, high = min(r[0] for r in ranges), max(r[1] for r in ranges)
    reasons += [f"Learning rate, block {g.block}: {why}" for g, (_, _, why) in zip(groups, ranges, strict=True)]
    raw["space"]["learning_rate"] = {"loguniform": [_two_digits(low, down=True), _two_digits(high, down=False)]}


def _range(group: Group, response: Response | NoFit) -> tuple[float, float, str]:
    """Return the range in which to search for a block's best learning rate (low, high), and the reason."""
    rates = [trial.training.learning_rate for trial in group.ended]
    low, high, best = min(rates), max(rates), group.best.training.learning_rate
    if isinstance(response, NoFit) or not response.is_trusted:
        why = response.why if isinstance(response, NoFit) else "the fit predicts nothing"
        return low / WIDEN, high * WIDEN, f"{why}; the range is widened on both sides."
    if response.optimum is not None and low <= response.optimum <= high:
        start, stop = max(response.interval[0], low / BEYOND), min(response.interval[1], high * BEYOND)
        start, stop = min(start, best) / MARGIN, max(stop, best) * MARGIN
        narrower = math.log(stop / start) < 0.9 * math.log(high / low)
        how = "the range is narrowed around it" if narrower else "it is not known well enough to narrow the range"
        return start, stop, f"the best one is near {response.optimum:.2g}; {how}."
    middle = math.sqrt(low * high)
    top = response.scores([low, high])
    if top[1] > top[0]:
        return min(middle, best), high * BEYOND, f"the score still rises at {high:.2g}; the range moves up."
    return low / BEYOND, max(middle, best), f"the score still rises towards {low:.2g}; the range moves down."


def _expansion_factor(
    raw: dict[str, Any],
    sweep: Sweep,
    groups: Sequence[Group],
    responses: Sequence[Response | NoFit],
    reasons: list[str],
) -> None:
    """Add a larger factor if the largest is clearly best in some block, and a smaller one if the smallest is.

    A value is clearly best if the best trial has it and the effect's 80% interval, in a trusted fit, excludes 0.
    """
    distribution = raw["space"].get("expansion_factor", {})
    kind = next((k for k in ("choice", "grid") if k in distribution), None)
    if kind is None:
        return
    values = sorted(distribution[kind])
    clear = [r for r in responses if isinstance(r, Response) and r.is_trusted]
    changes = {r.block: effect for r in clear for effect in r.effects if effect.key == "expansion_factor"}
    best = {group.block: group.best.training.expansion_factor for group in groups}
    up = [b for b, e in changes.items() if e.interval[0] > 0 and best[b] == values[-1]]
    down = [b for b, e in changes.items() if e.interval[1] < 0 and best[b] == values[0]]
    widths = [manifest["input_dim"] for manifest in sweep.manifests.values()]
    most_k = max(group.levels[-1] for group in groups)
    if up:
        values.append(2 * values[-1])
        reasons.append(f"Expansion factor: the largest is clearly best ({_blocks(up)}); {values[-1]:g} is added.")
    if down and widths and round(min(widths) * values[0] / 2) >= most_k:
        values.insert(0, values[0] / 2)
        reasons.append(f"Expansion factor: the smallest is clearly best ({_blocks(down)}); {values[0]:g} is added.")
    if not up and not down:
        reasons.append("Expansion factor: no value at the edge is clearly best; the choices stay.")
    distribution[kind] = [int(v) if v == int(v) else v for v in values]


def _weighting(raw: dict[str, Any], responses: Sequence[Response | NoFit], reasons: list[str]) -> None:
    """Keep only the better weighting if it is clearly better in every block at the end of training.

    Fits to scores of an earlier epoch do not count, because the weighting that leads early may not be best at the end.
    """
    if "weighting" not in raw["space"]:
        return
    late = [r for r in responses if isinstance(r, Response) and r.is_trusted and r.epoch is None]
    found = [effect for r in late for effect in r.effects if effect.key == "weighting"]
    for better, clear in (
        ("reverse", [effect.interval[0] > 0 for effect in found]),
        ("uniform", [effect.interval[1] < 0 for effect in found]),
    ):
        if len(found) == len(responses) and all(clear):
            del raw["space"]["weighting"]
            raw["training"]["weighting"] = better
            least = min(abs(effect.change or 0) for effect in found)
            reasons.append(
                f"Weighting: {better} is better in every block, by {least:.3f} or more; only {better} is kept."
            )
            return
    reasons.append("Weighting: neither is clearly better in every block at the end of training; both stay.")


def _epochs(raw: dict[str, Any], groups: Sequence[Group], reasons: list[str]) -> None:
    """Double the number of epochs if the best trial of some block was still rising at its last epoch."""
    if "epochs" in raw["space"]:
        return
    before = raw["training"]["epochs"]
    rising = [f"{group.best.late_gain} (block {group.block})" for group in groups if group.best.still_rising]
    if rising:
        raw["training"]["epochs"] = 2 * before
        reasons.append(
            f"Epochs: the mean R² of the best trial was still rising, {', '.join(rising)}; the next sweep has "
            f"{2 * before} epochs instead of {before}."
        )
        return
    gains = [f"{group.best.late_gain} (block {group.block})" for group in groups if group.best.late_gain]
    changed = (
        f"mean R² of the best trial changed by {', '.join(gains)}"
        if gains
        else "there are too few epochs to show a trend"
    )
    reasons.append(f"Epochs: the number stays {before}; {changed}. What many more epochs would add has not been tried.")


def _blocks(blocks: Sequence[int]) -> str:
    return f"block {blocks[0]}" if len(blocks) == 1 else f"blocks {', '.join(map(str, blocks))}"


def _two_digits(value: float, *, down: bool) -> float:
    """Return a value rounded to two significant digits, down for a lower bound and up for an upper bound."""
    unit = 10.0 ** (math.floor(math.log10(value)) - 1)
    return float(f"{(math.floor if down else math.ceil)(value / unit - (-1e-9 if down else 1e-9)) * unit:.2g}")


def _next_name(name: str) -> str:
    """Return the name of the sweep after `name`: `study` → `study-2` → `study-3`."""
    numbered = re.fullmatch(r"(.+)-(\d+)", name)
    return f"{numbered[1]}-{int(numbered[2]) + 1}" if numbered else f"{name[:97]}-2"


def _plain(value: Any) -> Any:
    return [_plain(v) for v in value] if isinstance(value, tuple | list) else value
