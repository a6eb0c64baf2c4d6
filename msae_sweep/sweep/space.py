"""Turns the search space into trials; a trial's settings depend on its number and on nothing else."""

import hashlib
import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np

from msae_sweep.config import Distribution, SweepConfig
from msae_sweep.sweep_folder.trial_record import TrialRecord


def trial_record(config: SweepConfig, block: int, index: int, params: dict[str, Any]) -> TrialRecord:
    """Return the record of a trial that has not started.

    The trial's seed follows from `search.seed`, block and number, unless the space or `training.seed` sets it.
    """
    seed = params.get("seed", config.training.seed)
    if seed is None:
        seed = _digest(config.search.seed, block, index) % 2**31
    plain = {key: list(value) if isinstance(value, tuple) else value for key, value in params.items()}
    return TrialRecord(f"block{block}-{index:03d}", block, index, plain, int(seed))


def plan(config: SweepConfig, blocks: Sequence[int]) -> list[TrialRecord]:
    """Return the trials of a `random` or `grid` search in the order of their numbers, blocks taking turns.

    Trial i of a random search has the same settings in every block and for every number of trials: a larger
    `trials_per_block` adds trials and changes none. Keys with `grid`, and in a `grid` search also keys with `choice`,
    take their combinations in order, one per trial; after the last combination, the first follows again.
    """
    assert config.search.algorithm != "optuna", "optuna proposes while the sweep runs"
    walked = ("grid", "choice") if config.search.algorithm == "grid" else ("grid",)
    grids = {key: d.values for key, d in config.space.items() if d.kind in walked}
    combinations = list(itertools.product(*grids.values()))
    proposals = []
    for index in range(config.n_trials_per_block()):
        combination = dict(zip(grids, combinations[index % len(combinations)], strict=True))
        proposals.append(
            {
                key: combination[key] if key in grids else sample(d, config.search.seed, index, key)
                for key, d in config.space.items()
            }
        )
    return [trial_record(config, block, i, params) for i, params in enumerate(proposals) for block in blocks]


def sample(distribution: Distribution, seed: int, index: int, key: str) -> Any:
    """Return the value of `key` in trial `index`, which depends on the arguments alone."""
    rng = np.random.default_rng(_digest(seed, index, key))
    kind, values = distribution.kind, distribution.values
    if kind in ("choice", "grid"):
        return values[int(rng.integers(len(values)))]
    low, high = values[:2]
    if kind == "randint":
        return int(rng.integers(low, high))
    if kind == "loguniform":
        return float(np.exp(rng.uniform(np.log(low), np.log(high))))
    value = float(rng.uniform(low, high))
    return distribution.nearest(value) if kind == "quniform" else value


def _digest(*parts: object) -> int:
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:8], "big")
