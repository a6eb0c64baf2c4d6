"""Sweep folders made up for reports: settings, scores that depend on them and, on request, models and rows."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from msae_sweep.config import SweepConfig, parse
from msae_sweep.data.prepare.shard_folder import ShardFolder
from msae_sweep.paths import StoragePath
from msae_sweep.sae import model_file
from msae_sweep.sae.model import MSAE
from msae_sweep.sweep_folder.folder import SweepFolder
from msae_sweep.sweep_folder.rungs import STOPPED_AT, cutoff, objectives_at_rungs, rungs
from msae_sweep.sweep_folder.trial_record import TrialRecord

INPUT_DIM, N_TRAIN, N_VAL = 16, 200, 50
SPACE = """
name: made-up
data: {{path: planted, blocks: {blocks}}}
space: {space}
training: {{k_levels: [2, 4, 8], epochs: {epochs}, batch_size: 100}}
search: {{trials_per_block: {n}}}
asha: {asha}
"""
DIMENSIONS = (
    "{learning_rate: {loguniform: [1e-4, 1e-2]}, expansion_factor: {choice: [4, 8]}, "
    "weighting: {choice: [uniform, reverse]}}"
)

Score = Callable[[dict[str, Any], int], float]
"""Function that returns the objective of settings at an epoch."""


def make(
    folder: Path,
    params: Sequence[dict[str, Any]],
    score: Score,
    *,
    blocks: Sequence[int] = (5,),
    epochs: int = 4,
    asha: str = "null",
    space: str = DIMENSIONS,
) -> SweepFolder:
    """Write a sweep in which trial i has `params[i]` in every block. Trials are stopped where ASHA would stop them."""
    text = SPACE.format(blocks=list(blocks), space=space, epochs=epochs, n=len(params), asha=asha)
    config = parse(text)
    sweep = SweepFolder(folder)
    sweep.write_text(sweep.config_file, config.to_yaml())
    sweep.write_text(folder / "data.json", json.dumps({block: manifest(block) for block in blocks}))
    identity = {"sweep_id": "abc", "command": "msae-sweep run x.yaml", "torch": "2.0", "gpus_per_trial": 0.5}
    runs = [{"command": "msae-sweep run x.yaml --name <b>", "started": "2026-01-01T00:00:00+00:00", "seconds": 60.0}]
    sweep.write_text(folder / "identity.json", json.dumps({**identity, "runs": runs}))
    for block in blocks:
        done: list[TrialRecord] = []
        for i, settings in enumerate(params):
            done.append(record(config, block, i, settings, score, done))
            sweep.save_record(done[-1])
    return sweep


def record(
    config: SweepConfig, block: int, index: int, params: dict[str, Any], score: Score, before: Sequence[TrialRecord]
) -> TrialRecord:
    training = config.training_for(params)
    points = [point(epoch, score(params, epoch), training.levels) for epoch in range(1, training.epochs + 1)]
    status, reason = "completed", "epochs"
    for rung in rungs(config.asha, training.epochs):
        known = [objectives_at_rungs(r, config.asha, config.training_for(r.params).epochs) for r in before]
        needed = cutoff(known, rung, config.asha.reduction_factor)
        if needed is not None and points[rung - 1]["objective"] < needed:
            points, status, reason = points[:rung], "stopped_early", f"{STOPPED_AT}{rung}"
            break
    return TrialRecord(
        f"block{block}-{index:03d}", block, index, params, index, status, reason, points, seconds=2.0 * len(points)
    )


def point(epoch: int, objective: float, levels: Sequence[int]) -> dict[str, float]:
    middle = (len(levels) - 1) / 2
    r2 = {f"r2_k{k}": objective + 0.05 * (i - middle) for i, k in enumerate(levels)}
    losses = {"train_loss": 1 - objective, "val_loss": 1 - objective}
    return {**r2, **losses, "r2_mean": objective, "objective": objective, "dead_ratio": 0.01, "epoch": epoch}


def manifest(block: int) -> dict[str, Any]:
    return {
        "key": f"key{block}",
        "block": block,
        "source": {"where": f"/data/block{block}", "rows": N_TRAIN + N_VAL, "dtype": "float32", "fingerprint": "f00"},
        "input_dim": INPUT_DIM,
        "split": {"by": "row", "seed": 0, "val_split": 0.2},
        "n_train": N_TRAIN,
        "n_val": N_VAL,
        "shards": [[0, N_TRAIN, 20], [1, 0, N_VAL - 20]],
    }


def add_rows_and_models(sweep: SweepFolder) -> dict[int, np.ndarray]:
    """Write prepared shards beside the sweep and a model for every trial. Return the validation rows of each block."""
    rows = {}
    for block in {r.block for r in sweep.load_records().values()}:
        rng, info = np.random.default_rng(block), manifest(block)
        shards = ShardFolder(StoragePath(sweep.storage) / "prepared" / f"block{block}-{info['key']}")
        shards.create()
        parts = []
        for number, n_train, n_val in info["shards"]:
            # Training rows differ clearly from validation rows, so that using them by mistake would be noticed.
            z = np.concatenate([rng.normal(5, 1, (n_train, INPUT_DIM)), rng.normal(0, 1, (n_val, INPUT_DIM))])
            shards.save_shard(number, z.astype(np.float32))
            parts.append(z[n_train:].astype(np.float32))
        shards.save_stats(np.zeros(INPUT_DIM), np.ones(INPUT_DIM))
        shards.save_manifest(info)
        rows[block] = np.concatenate(parts)
    for trial in sweep.load_records().values():
        torch.manual_seed(trial.index)
        model = MSAE(INPUT_DIM, int(INPUT_DIM * trial.params.get("expansion_factor", 16)), [2, 4, 8])
        file = model_file.ModelFile(model, np.zeros(INPUT_DIM, "f4"), np.ones(INPUT_DIM, "f4"), {})
        sweep.model_file(trial.trial_id).parent.mkdir(parents=True, exist_ok=True)
        model_file.save(file, sweep.model_file(trial.trial_id))
    return rows


def settings(n: int, seed: int = 0) -> list[dict[str, Any]]:
    """Return settings that are drawn at random."""
    rng = np.random.default_rng(seed)
    return [
        {
            "learning_rate": float(np.exp(rng.uniform(np.log(1e-4), np.log(1e-2)))),
            "expansion_factor": int(rng.choice([4, 8])),
            "weighting": str(rng.choice(["uniform", "reverse"])),
        }
        for _ in range(n)
    ]
